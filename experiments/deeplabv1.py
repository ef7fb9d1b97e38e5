"""DeepLab v1 (arXiv:1412.7062): VGG-16 at stride 8, with a wide field of view.

    python -m jaxseg.main --config experiments/deeplabv1.py --workdir runs/deeplabv1

Trained on VOC 2012's trainaug, val without the CRF, Tables 1 and 2: mIoU 62.25 (largefov), 64.38
(7x7), 59.80 (4x4; 63.41 with --config.model.rate=8), 64.21 (msc). Not run.

All start from ImageNet's VGG-16 but msc, which adds to a trained largefov and learns only what it
adds: --config.init.workdir=runs/deeplabv1.
"""

from typing import Literal

from jaxseg import recipes
from jaxseg.config import default

# Table 2 and the authors' code.
VARIANTS = {
    "largefov": {"kernel": 3, "rate": 12, "features": 1024, "average": True},
    "7x7": {"kernel": 7, "rate": 4, "features": 4096, "average": False},
    "4x4": {"kernel": 4, "rate": 4, "features": 4096, "average": False},
    "msc": {"kernel": 3, "rate": 12, "features": 1024, "average": True, "multi_scale": 128},
}


def get_config(
    dataset: str = "voc2012",
    backbone: str = "vgg16",
    variant: Literal["largefov", "7x7", "4x4", "msc"] = "largefov",
    recipe: Literal["paper"] = "paper",
    output_stride: int = 8,
    stem: str = "",
    num_classes: int = 0,
):
    """stem: of a ResNet. num_classes=0: as many as the data set has."""
    recipes.resnet_only(backbone, stem)
    config = default()
    recipes.read(config, dataset, recipe, paper="voc2012")
    config.data.mean = (122.675, 116.669, 104.008)  # of the Caffe weights, which take no std
    config.data.std = (1.0, 1.0, 1.0)
    config.data.crop = (321, 321)  # the authors' code
    config.model.name = "deeplabv1"
    config.model.num_classes = num_classes
    config.model.update(VARIANTS[variant])
    config.model.backbone = {"name": backbone, "output_stride": output_stride}
    if backbone.startswith("vgg"):
        config.model.backbone.pool = 3  # the authors' code
    if stem:
        config.model.backbone.stem = stem

    config.optim.lr = 1e-3  # section 5
    config.optim.drops = (2_000, 4_000)  # section 5: a tenth every 2,000 steps
    config.optim.power = 0.0
    config.optim.momentum = 0.9  # section 5
    config.optim.weight_decay = 5e-4  # section 5
    # Section 5: the classifier learns ten times as fast; the authors' code: biases twice as fast.
    config.optim.multipliers = (("^fc8/bias", 20.0), ("^fc8/", 10.0), ("bias$", 2.0))
    if variant == "msc":
        kept = ("^(backbone|fc6|fc7)/", 0.0)  # section 4.3: only the new weights are adjusted
        config.optim.multipliers = (kept, *config.optim.multipliers)
    config.train.batch = 20  # section 5
    config.train.steps = 6_000  # the authors' code
    config.eval.batch = 4
    return config
