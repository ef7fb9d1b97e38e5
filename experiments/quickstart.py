"""A small U-Net on `shapes`, the embedded data set: the whole pipeline in a minute on two cores.

    python -m jaxseg.main --config experiments/quickstart.py --workdir runs/quickstart

Measured: see the README.
"""

from jaxseg.config import default


def get_config(width: int = 16, steps: int = 1_000):
    config = default()
    config.data.dataset = "shapes"
    config.data.crop = (96, 96)
    config.data.mean = (127.5, 127.5, 127.5)
    config.data.std = (64.0, 64.0, 64.0)

    config.model.update(
        name="unet",
        num_classes=8,
        widths=(width, 3 * width, 6 * width, 8 * width),  # cheap where the resolution is high
        padding="same",
        patch=2,
        dropout=0.0,
        norm={"kind": "batch"},
    )

    config.optim.name = "adamw"
    config.optim.lr = 5e-3
    config.optim.warmup = 50
    config.optim.clip = 1.0

    config.train.steps = steps
    config.train.batch = 4  # small: many steps matter more than smooth ones
    config.train.log_every = 100
    config.train.eval_every = 0
    config.train.checkpoint_every = 250
    config.eval.batch = 32
    return config
