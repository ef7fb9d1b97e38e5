"""Segmentation before networks: nothing to train, regions without a class.

    python -m jaxseg.main --config experiments/classical.py:method=slic --workdir runs/slic
    python -m jaxseg.main predict --workdir runs/slic --input FOLDER --output regions

method: otsu, adaptive or grabcut, which separate figure and ground; kmeans or meanshift, which
cluster colours; slic, felzenszwalb, watershed or ncut, which aim at `segments` regions. The papers
are named in jaxseg/models/classical.py. Needs pip install -e '.[classical]'.

The scores are ceilings: each region has the majority class of the truth, so that they tell how well
regions follow the outlines of objects, and more regions score higher. Measured: see the README.
"""

from jaxseg import recipes
from jaxseg.config import default


def get_config(
    dataset: str = "shapes",
    method: str = "slic",
    segments: int = 200,
    num_classes: int = 0,
    in_channels: int = 0,
):
    """segments: regions an image to aim at. num_classes=0: as many as the data set has.
    in_channels=0: 1 on ISBI, else 3."""
    config = default()
    config.data.dataset = dataset
    config.data.channels = in_channels or (1 if recipes.known(config) == "isbi2012" else 3)
    config.data.mean = (127.5,) * config.data.channels  # one a channel; no method asks for them
    config.data.std = (64.0,) * config.data.channels
    config.model.name = "classical"
    config.model.num_classes = num_classes
    config.model.method = method
    config.model.segments = segments
    return config
