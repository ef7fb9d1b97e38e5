"""How libraries train: the recipes that several papers' experiments share, each in one place.

A recipe fills the sections `data`, `loss`, `optim`, `train` and `eval` of a config; the network is
the experiment's.
"""

from ml_collections import ConfigDict

# SegNet (Badrinarayanan et al. 2017, section 4): median class frequency / class frequency, over the
# images with the class, of CamVid's 367 training images.
CAMVID_MEDIAN_FREQUENCY = (
    *(0.2793, 0.2017, 4.7865, 0.1490, 1.0000, 0.4217),  # sky building pole road pavement tree
    *(3.8467, 1.9736, 0.7889, 6.3747, 8.8587),  # sign_symbol fence car pedestrian bicyclist
)


def torchvision(config: ConfigDict) -> None:
    """torchvision's references/segmentation/train.py, for its COCO models with VOC's classes."""
    config.data.resize = (100_000, 520)  # the shorter side; the random scale after it
    config.data.scale = (0.5, 2.0)
    config.data.crop = (480, 480)
    config.loss.aux_weight = 0.5
    config.optim.lr = 0.02
    config.optim.momentum = 0.9
    config.optim.weight_decay = 1e-4
    config.optim.decay_all = True
    config.optim.multipliers = (("^aux/", 10.0),)  # --aux-loss: ten times the rate
    config.optim.power = 0.9
    config.train.batch = 32  # 8 devices of 4
    config.train.steps = 30 * 92_518 // 32  # 30 epochs of the COCO images with VOC's classes


def mmseg(config: ConfigDict, steps: int = 40_000) -> None:
    """MMSegmentation 1.2: configs/_base_/schedules/schedule_40k.py and datasets/cityscapes.py."""
    config.data.resize = (2048, 1024)
    config.data.scale = (0.5, 2.0)
    config.data.crop = (512, 1024)
    config.data.cat_max_ratio = 0.75
    config.data.photometric = True
    config.loss.pixel = {"reduction": "mean_all"}  # avg_non_ignore=False
    config.loss.aux_weight = 0.4
    config.optim.lr = 0.01
    config.optim.momentum = 0.9
    config.optim.weight_decay = 5e-4
    config.optim.decay_all = True  # biases and norms too
    config.optim.power = 0.9
    config.optim.min_lr = 1e-4
    config.train.batch = 8  # 4 devices of 2
    config.train.steps = steps
    config.train.eval_every = 4_000
    config.train.checkpoint_every = 4_000
