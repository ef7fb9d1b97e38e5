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
# What a library's recipe is for, where no data set is named.
DATASETS = {"torchvision": "coco_voc", "mmseg": "cityscapes", "smp": "voc2012", "timm": "voc2012"}


def read(config: ConfigDict, dataset: str, recipe: str, paper: str) -> None:
    """Sets the data set, if "" that of the recipe, or of the paper.

    Of VOC 2012 that is trainaug, with SBD's labels, on which papers since DeepLab v1 train.
    """
    config.data.dataset = dataset or DATASETS.get(recipe, paper)
    if known(config) == "voc2012":
        config.data.train_split = "trainaug"


def known(config: ConfigDict) -> str:
    """The name of the data set, which may also be given as NAME:PATH."""
    return config.data.dataset.partition(":")[0]


def refuse(choice: str, **given: str | int) -> None:
    """Raises InputError where an argument of an experiment was given that `choice` does not heed.

    given: those arguments, "" or 0 where they were not given.
    """
    for key, value in given.items():
        if value:
            raise InputError(f"{key}={value} means nothing to {choice}: leave it out")


def resnet_only(backbone: str, stem: str) -> None:
    """Raises InputError for the stem of a backbone that is no ResNet."""
    if not backbone.startswith("resnet"):
        refuse(f"backbone={backbone}", stem=stem)


def deeplab(config: ConfigDict) -> None:
    """VOC 2012 as DeepLab v3 (section 4.1) and v3+ (section 4) train on it."""
    config.data.crop = (513, 513)
    config.data.scale = (0.5, 2.0)
    config.optim.lr = 0.007
    config.optim.weight_decay = 1e-4  # the authors' code, ResNet
    config.train.steps = 30_000
    config.train.batch = 16
    config.eval.batch = 4


def torchvision(config: ConfigDict) -> None:
    """torchvision's references/segmentation/train.py, for its COCO models with VOC's classes.

    Its evaluation brings the shorter side to 520 pixels; here images keep their own size.
    """
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


def solo(config: ConfigDict, box: tuple[int, int], square: bool) -> None:
    """COCO in 36 epochs, as SOLO's and SOLOv2's authors' code and MMDetection 3.3 train both.

    box: long and short side of the largest images, whose short sides have five more lengths. They
    train by batches of one aspect ratio; here all lie on one square, the same in every step.
    square: evaluation extends images to squares too.
    """
    config.data.objects = 100
    config.data.resize = box
    smallest = {800: 640, 512: 352}[box[1]]
    config.data.scale = (smallest / box[1], 1.0)
    config.data.scale_step = 32 / box[1]
    config.data.crop = (-(-box[0] // 32) * 32,) * 2
    config.model.square = square
    config.optim.lr = 0.01
    config.optim.momentum = 0.9
    config.optim.weight_decay = 1e-4
    config.optim.decay_all = True
    config.optim.power = 0.0
    config.optim.clip = 35.0
    config.optim.warmup = 500
    config.optim.multipliers = (("^backbone/(stem|conv2)/", 0.0),)  # frozen
    epoch = 117_266 / 16  # images with objects
    config.optim.drops = (int(27 * epoch), int(33 * epoch))
    config.train.batch = 16
    config.train.steps = int(36 * epoch)
    config.eval.batch = 1
    config.eval.resize = box


def small_objects(config: ConfigDict) -> None:
    """The papers of objects for two CPU cores, from scratch; what is not the same in all is theirs.

    Cells have no up.
    """
    config.data.mean = (127.5, 127.5, 127.5)
    config.data.std = (64.0, 64.0, 64.0)
    config.data.flip_vertical = config.data.quarter_turns = known(config) == "nuclei"
    config.optim.name = "adamw"
    config.optim.warmup = 100
    config.optim.clip = 5.0
    config.train.log_every = 50
    config.train.eval_every = 0


def small_solo(config: ConfigDict) -> None:
    """SOLO and SOLOv2 for two CPU cores, from scratch: `shapes`, and `nuclei` in squares of 384,
    most of whose images have 256: masks of stride 4 are too coarse for cells of 12 pixels."""
    small_objects(config)
    config.data.scale = (0.8, 1.25)
    if known(config) == "nuclei":
        # Whole images: a cell of a grid is a part of the image, and crops would have other cells.
        config.data.crop = config.data.resize = config.eval.resize = (384, 384)
        config.data.photometric = True
        config.data.objects = 128
        config.model.square = True
        config.model.grids = (40, 36, 24, 16, 12)
        config.model.ranges = ((1, 28), (20, 42), (32, 60), (48, 120), (96, 2048))
        config.model.select = {"candidates": 200, "objects": 150}
        config.optim.lr = 1.5e-3
        config.train.batch = 2
        config.train.steps = 2_800
    else:
        config.data.crop = (96, 96)
        config.data.objects = 16
        config.model.grids = (16, 14, 12, 8, 6)
        config.model.ranges = ((1, 20), (14, 28), (22, 40), (32, 80), (64, 2048))
        config.model.select = {"candidates": 100, "objects": 32}
        config.optim.lr = 2e-3
        config.train.batch = 8
        config.train.steps = 2_000
    config.model.fpn = 64
    config.model.norm = {"kind": "group", "groups": 8}
    config.optim.weight_decay = 1e-2
    config.train.ema = 0.99
    config.eval.batch = 8
