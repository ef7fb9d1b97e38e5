"""A small U-Net on `shapes`, the embedded data set: the whole road in a minute on two CPU cores.

python -m jaxseg.main --config experiments/quickstart.py --workdir runs/quickstart
"""

from jaxseg.config import default


def get_config(width: int = 16, steps: int = 700):
    config = default()
    config.data.dataset = "shapes"
    config.data.crop = (96, 96)
    config.data.mean = (127.5, 127.5, 127.5)
    config.data.std = (64.0, 64.0, 64.0)
    config.data.flip_vertical = True  # shapes lie in all directions

    config.model.update(
        name="unet",
        num_classes=8,
        widths=tuple(width * 2**level for level in range(5)),
        padding="same",
        dropout=0.0,
        norm={"kind": "batch"},
    )

    config.optim.name = "adamw"
    config.optim.lr = 3e-3
    config.optim.warmup = 50
    config.optim.weight_decay = 1e-4

    config.train.steps = steps
    config.train.batch = 16
    config.train.log_every = 50
    config.train.eval_every = 0
    config.train.checkpoint_every = 200
    config.eval.batch = 32
    return config
