"""How libraries train: the recipes that several papers' experiments share, each in one place.

A recipe fills the sections `data`, `loss`, `optim`, `train` and `eval` of a config; the network is
the experiment's.
"""

from ml_collections import ConfigDict

from jaxseg.errors import InputError

# SegNet (Badrinarayanan et al. 2017, section 4): median class frequency / class frequency, over the
# images with the class, of CamVid's 367 training images.
CAMVID_MEDIAN_FREQUENCY = (
    *(0.2793, 0.2017, 4.7865, 0.1490, 1.0000, 0.4217),  # sky building pole road pavement tree
    *(3.8467, 1.9736, 0.7889, 6.3747, 8.8587),  # sign_symbol fence car pedestrian bicyclist
)
# What every paper's experiment takes; it refuses, see `refuse`, what does not apply.
ARGUMENTS = "dataset backbone variant recipe output_stride stem num_classes".split()


def refuse(choice: str, **given: str | int) -> None:
    """Raises InputError where an argument of an experiment was given that `choice` does not heed.

    given: those arguments, "" or 0 where they were not given.
    """
    for key, value in given.items():
        if value:
            valid = ", ".join(name for name in ARGUMENTS if name not in given)
            raise InputError(f"{key}={value} means nothing to {choice}: needs one of {valid}")


def resnet_only(backbone: str, stem: str) -> None:
    """Raises InputError for the stem of a backbone that is no ResNet."""
    if not backbone.startswith("resnet"):
        refuse(f"backbone={backbone}", stem=stem)


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
    config.data.hue = 36.0  # hue_delta=18 of OpenCV's hues, which count two degrees each
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


def mmseg_backbone(name: str, stem: str) -> dict:
    """MMSegmentation's -D8 networks: the section `backbone` of a model."""
    backbone = {"name": name, "output_stride": 8}
    if name.startswith("resnet"):
        backbone |= {"stem": stem or "v1c", "contract": True, "second_rate": False}
    return backbone


def narrow(name: str) -> bool:
    """Whether MMSegmentation's heads have 128 channels, and 64 in the auxiliary one, in place of
    512 and 256: on ResNet-18, and here on ResNet-34, which its model zoo does not have."""
    return name in ("resnet18", "resnet34")
