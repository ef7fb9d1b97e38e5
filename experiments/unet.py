"""U-Net (arXiv:1505.04597), as published and as it is usually run today.

The paper's network, valid convolutions and no norm, on the ISBI 2012 membranes. Not run.

    python -m jaxseg.main --config experiments/unet.py --workdir runs/unet_original

Same padding and batch norm, at half the resolution inside. Measured: see the README.

    python -m jaxseg.main --config experiments/unet.py:dataset=isbi2012,variant=same --workdir DIR
    python -m jaxseg.main --config experiments/unet.py:dataset=camvid,variant=same --workdir DIR
    python -m jaxseg.main --config experiments/unet.py:dataset=FOLDER,variant=same --workdir DIR
"""

from typing import Literal

from jaxseg.config import default

# SegNet (Badrinarayanan et al. 2017, section 4): median class frequency / class frequency, over the
# images with the class, of the 367 training images.
CAMVID_MEDIAN_FREQUENCY = (
    *(0.2793, 0.2017, 4.7865, 0.1490, 1.0000, 0.4217),  # sky building pole road pavement tree
    *(3.8467, 1.9736, 0.7889, 6.3747, 8.8587),  # sign_symbol fence car pedestrian bicyclist
)


def get_config(
    dataset: str = "isbi2012",
    variant: Literal["original", "same"] = "original",
    width: int = 0,
    num_classes: int = 0,
    in_channels: int = 0,
):
    """width: channels of the first level, doubled after each pooling; 0 = the variant's own widths.
    num_classes=0: as many as the data set has. in_channels=0: 1 on ISBI, else 3."""
    config = default()
    config.data.dataset = dataset
    config.data.channels = in_channels or (1 if dataset == "isbi2012" else 3)
    config.data.mean = (127.5,) * config.data.channels
    config.data.std = (64.0,) * config.data.channels
    config.model.name = "unet"
    config.model.num_classes = num_classes
    original(config) if variant == "original" else same(config)
    if width:
        config.model.widths = tuple(width * 2**level for level in range(5))
    return config


def original(config):
    """Section 3. The paper gives no learning rate; momentum 0.99 multiplies it by 100."""
    config.model.padding = "valid"
    config.model.widths = (64, 128, 256, 512, 1024)  # Fig. 1
    config.data.crop = (508, 508)  # 324 labelled pixels; Fig. 1's 572 are more than ISBI's 512
    config.data.flip_vertical = True
    config.optim.lr = 1e-3
    config.optim.momentum = 0.99  # section 3
    config.optim.weight_decay = 0.0
    config.optim.clip = 1.0
    config.train.batch = 1  # section 3: large tiles rather than a large batch
    config.train.steps = 30_000
    config.eval.batch = 1


def same(config):
    """What libraries call U-Net today; the recipe is ours, for two CPU cores."""
    config.model.padding = "same"
    config.model.patch = 2
    config.model.widths = (32, 64, 96, 128, 192)
    config.model.norm = {"kind": "batch"}
    config.model.dropout = 0.1
    config.data.crop = (256, 256)
    config.data.scale = (0.8, 1.25)
    config.optim.name = "adamw"
    config.optim.lr = 2e-3
    config.optim.warmup = 100
    config.optim.weight_decay = 1e-2
    config.optim.clip = 1.0
    config.train.batch = 8
    config.train.steps = 2_000
    config.train.ema = 0.99
    config.train.eval_every = 500
    config.train.checkpoint_every = 500
    if config.data.dataset == "camvid":
        config.data.crop = (256, 320)
        config.train.steps = 1_900
        # The roots: the full weights cost the frequent classes more than they bring the rare ones.
        config.loss.class_weights = tuple(round(w**0.5, 3) for w in CAMVID_MEDIAN_FREQUENCY)
    elif config.data.dataset == "isbi2012":
        config.data.flip_vertical = True
        config.train.steps = 600
