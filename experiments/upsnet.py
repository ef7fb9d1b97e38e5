"""UPSNet (arXiv:1901.03784): Mask R-CNN and a semantic head, joined by a panoptic head.

    python -m jaxseg.main --config experiments/upsnet.py --workdir runs/upsnet \\
        --config.init.backbone=resnet50.pth

COCO val, ResNet-50: PQ 42.5, things 48.5, stuff 33.4. Cityscapes val
(dataset=cityscapes_panoptic): PQ 59.3, things 54.6, stuff 62.7. The authors' backbone has
its strides in the 1x1 convolutions, as the MSRA weights have; this one has torchvision's. Not run.

variant=small is for `shapes` and `nuclei` on two CPU cores, from scratch:

    python -m jaxseg.main --config experiments/upsnet.py:dataset=shapes,variant=small \\
        --workdir runs/upsnet_shapes
"""

from typing import Literal

from jaxseg import recipes
from jaxseg.config import default


def get_config(
    dataset: str = "coco_panoptic",
    backbone: str = "",
    variant: Literal["", "small"] = "",
    num_classes: int = 0,
):
    """backbone="": resnet50, small resnet18. num_classes=0: as many as the data set has."""
    config = default()
    config.data.dataset = dataset
    config.model.name = "upsnet"
    config.model.num_classes = num_classes
    name = backbone or ("resnet18" if variant else "resnet50")
    config.model.backbone = {"name": name, "output_stride": 32}
    if variant:
        small(config)
        return config
    config.data.objects = 100
    config.model.backbone.norm = {"kind": "frozen"}
    config.model.proposals = {"after": (2000, 1000)}
    config.optim.lr = 0.02  # the authors' configurations, as all that follows
    config.optim.momentum = 0.9
    config.optim.weight_decay = 1e-4
    config.optim.multipliers = (
        ("^backbone/(stem|conv2)/", 0.0),
        ("^backbone/", 1.0),
        ("/bias$", 2.0),
    )
    config.optim.power = 0.0
    config.optim.warmup = 1_500
    config.train.batch = 16
    config.eval.batch = 1
    cityscapes(config) if "cityscapes" in dataset else coco(config)
    return config


def coco(config):
    config.data.resize = (1333, 800)
    config.data.crop = (1344, 1344)  # upright and lying images; the rest is filled
    config.eval.resize = (1333, 800)
    config.train.steps = 90_000
    config.optim.drops = (60_000, 80_000)


def cityscapes(config):
    config.data.resize = (2048, 1024)
    config.data.scale = (0.78125, 1.0)  # shorter sides 800, 832, .. 1024
    config.data.scale_step = 0.03125
    config.data.crop = (1024, 2048)
    config.model.update(semantic=(128, 128), scene=False, stuff_area=2048)
    config.loss.update(semantic_weight=1.0, roi_weight=0.0, panoptic_weight=0.5)
    config.train.steps = 12_000
    config.optim.drops = (9_000,)


def small(config):
    """ResNet-18, a narrow pyramid, few boxes; live batch norm; the semantic head counts more."""
    recipes.small_objects(config)
    nuclei = recipes.known(config) == "nuclei"
    config.data.crop = (128, 128) if nuclei else (96, 96)
    config.data.scale = (0.75, 1.5) if nuclei else (0.8, 1.25)
    config.data.objects = 64 if nuclei else 12
    config.model.update(features=64, box_features=256, mask_features=64, mask_convs=2)
    config.model.update(semantic=(32, 32), score=0.5, stuff_area=0)
    config.model.proposals = {
        "sizes": (12.0, 24.0, 48.0, 96.0, 192.0),
        "before": (256, 128),
        "after": (128, 96 if nuclei else 64),
    }
    config.model.detections = {"rois": 64, "candidates": 256, "count": 96 if nuclei else 24}
    config.loss.update(semantic_weight=1.0, roi_weight=0.2, panoptic_weight=0.5, box_beta=1 / 9)
    config.optim.lr = 1e-3
    config.train.steps = 2_000 if nuclei else 1_400
    config.train.batch = 8
    config.train.checkpoint_every = 250
    config.eval.batch = 8
