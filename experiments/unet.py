"""U-Net (arXiv:1505.04597), as published and as it is usually run today.

The paper's network, valid convolutions and no norm, on the ISBI 2012 membranes:

    python -m jaxseg.main --config experiments/unet.py --workdir runs/unet_original

Same padding and batch norm, at half the resolution inside (patch=2):

    python -m jaxseg.main --config experiments/unet.py:dataset=isbi2012,variant=same --workdir runs/isbi
    python -m jaxseg.main --config experiments/unet.py:dataset=camvid,variant=same --workdir runs/camvid
    python -m jaxseg.main --config experiments/unet.py:dataset=FOLDER,variant=same --workdir runs/mine
"""

from jaxseg.config import default


def get_config(
    dataset: str = "isbi2012",
    variant: str = "original",
    width: int = 64,
    num_classes: int = 0,
    in_channels: int = 0,
):
    """variant: "original" or "same". num_classes=0: the data set's. in_channels=0: 1 on ISBI, else 3."""
    config = default()
    config.data.dataset = dataset
    config.data.channels = in_channels or (1 if dataset == "isbi2012" else 3)
    config.data.mean = (127.5,) * config.data.channels
    config.data.std = (64.0,) * config.data.channels
    config.model.name = "unet"
    config.model.num_classes = num_classes
    config.model.widths = tuple(width * 2**level for level in range(5))  # Fig. 1
    return {"original": original, "same": same}[variant](config, dataset)


def original(config, dataset):
    """Section 3. The learning rate is not in the paper; with momentum 0.99 its steps add up 100-fold."""
    config.data.crop = (508, 508)  # 324 labelled pixels; Fig. 1's 572 would not fit ISBI's 512
    config.data.flip_vertical = True
    config.model.padding = "valid"
    config.optim.lr = 1e-3
    config.optim.momentum = 0.99  # section 3
    config.optim.weight_decay = 0.0
    config.optim.clip = 1.0
    config.train.batch = 1  # section 3: large tiles rather than a large batch
    config.train.steps = 30_000
    config.eval.batch = 1
    return config


def same(config, dataset):
    config.model.padding = "same"
    config.model.patch = 2
    config.model.norm = {"kind": "batch"}
    config.model.dropout = 0.1
    config.optim.name = "adamw"
    config.optim.lr = 2e-3
    config.optim.warmup = 200
    config.optim.weight_decay = 1e-2
    config.optim.clip = 1.0
    config.train.batch = 8
    config.train.log_every = 50
    config.data.crop = (256, 256)
    config.data.scale = (0.5, 2.0)
    config.data.photometric = True
    return config
