"""Mask R-CNN (arXiv:1703.06870): box, class and mask of every object, on a feature pyramid.

    python -m jaxseg.main --config experiments/maskrcnn.py --workdir runs/maskrcnn \\
        --config.init.backbone=resnet50.pth

COCO val2017, ResNet-50-FPN, box / mask AP: 38.6 / 35.2 (detectron2's 1x schedule, which this is;
MMDetection's 38.2 / 34.7). The paper, Table 2 (minival, mask AP): 33.6, ResNet-101-FPN 35.4.
recipe=torchvision is torchvision's maskrcnn_resnet50_fpn, 37.9 / 34.6, whose weights `convert`
takes. Not run.

variant=small is for `shapes` and `nuclei` on two CPU cores, from scratch:

    python -m jaxseg.main --config experiments/maskrcnn.py:dataset=shapes,variant=small \\
        --workdir runs/maskrcnn_shapes
"""

from typing import Literal

from jaxseg import recipes
from jaxseg.config import default

IMAGES = 117_266  # of COCO's train2017 that have an object
# torchvision's outputs are COCO's category ids, 1 .. 90, of which ten were never used.
UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)


def get_config(
    dataset: str = "coco",
    backbone: str = "",
    variant: Literal["", "small"] = "",
    recipe: Literal["paper", "torchvision"] = "paper",
    num_classes: int = 0,
):
    """backbone="": resnet50, small resnet18. num_classes=0: as many as the data set has."""
    config = default()
    config.data.dataset = dataset
    config.model.name = "maskrcnn"
    config.model.num_classes = num_classes
    name = backbone or ("resnet18" if variant else "resnet50")
    config.model.backbone = {"name": name, "output_stride": 32}
    if variant:
        recipes.refuse("variant=small", recipe="" if recipe == "paper" else recipe)
        small(config)
    else:
        coco(config)
        torchvision(config) if recipe == "torchvision" else detectron(config)
    return config


def coco(config):
    """Section 3.1, and what all its implementations have in common."""
    config.data.objects = 100  # more than any image has
    config.data.resize = (1333, 800)
    config.data.crop = (1344, 1344)  # upright and lying images; the rest is filled
    config.data.scale = (1.0, 1.0)
    config.model.backbone.norm = {"kind": "frozen"}
    config.optim.lr = 0.02
    config.optim.momentum = 0.9
    config.optim.weight_decay = 1e-4
    config.optim.decay_all = True  # biases too
    config.optim.multipliers = (("^backbone/(stem|conv2)/", 0.0),)
    config.optim.power = 0.0
    config.train.batch = 16
    config.eval.resize = (1333, 800)
    config.eval.batch = 2


def detectron(config):
    """detectron2's mask_rcnn_R_50_FPN_1x, but for torchvision's strides, mean and deviation."""
    config.data.scale = (0.8, 1.0)
    config.data.scale_step = 0.04  # shorter sides 640, 672, .. 800
    config.loss.update(beta=0.0, box_beta=0.0)
    config.optim.warmup = 1_000
    config.optim.drops = (60_000, 80_000)
    config.train.steps = 90_000


def torchvision(config):
    """references/detection/train.py and MaskRCNN_ResNet50_FPN_Weights.COCO_V1."""
    config.model.backbone.norm = {"kind": "frozen", "epsilon": 0.0}  # those weights' own
    config.model.aligned = False
    config.model.proposals = {"rounded": True, "after": (2000, 1000)}
    if recipes.known(config) == "coco" and not config.model.num_classes:
        ids, things = iter(range(1, 81)), []
        for category in range(1, 91):
            things.append(-1 if category in UNUSED else next(ids))
        config.model.things = tuple(things)
    config.optim.warmup = 1_000
    config.optim.drops = (16 * IMAGES // 16, 22 * IMAGES // 16)  # epochs of 16 images a step
    config.train.steps = 26 * IMAGES // 16


def small(config):
    """For two CPU cores: ResNet-18, a narrow pyramid, few boxes; live batch norm."""
    recipes.small_objects(config)
    config.model.update(features=64, box_features=256, mask_features=64, mask_convs=2)
    proposals = {"sizes": (12.0, 24.0, 48.0, 96.0, 192.0)}
    if recipes.known(config) == "nuclei":
        config.data.crop = (256, 256)
        config.data.scale = (0.75, 1.5)
        config.data.objects = 128
        config.model.proposals = {**proposals, "before": (512, 512), "after": (256, 256)}
        config.model.detections = {"rois": 128, "candidates": 512, "count": 160}
        config.train.batch = 4
        config.train.steps = 1_500
        config.eval.buckets = 4
        config.eval.batch = 2
    else:
        config.data.crop = (96, 96)
        config.data.scale = (1.0, 1.0)
        config.data.objects = 12
        config.model.proposals = {**proposals, "before": (256, 128), "after": (128, 64)}
        config.model.detections = {"rois": 64, "candidates": 256, "count": 24}
        config.train.batch = 8
        config.train.steps = 1_000
        config.eval.batch = 8
    config.optim.lr = 1e-3
    config.train.checkpoint_every = 250
