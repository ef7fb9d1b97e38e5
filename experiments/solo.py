"""SOLO (arXiv:1912.04488): objects by the cells of grids, on COCO.

    python -m jaxseg.main --config experiments/solo.py --workdir runs/solo \\
        --config.init.backbone=resnet50.pth

COCO val2017, mask AP of the authors' code after 36 epochs: ResNet-50 35.8, ResNet-101 37.1;
variant=decoupled 36.4 and 37.9; variant=decoupled_light, ResNet-50, 33.0. recipe=mmdet computes
as MMDetection does, whose own figures are 35.9, 36.7 and 32.9, but for images that are padded to
one of eval.buckets shapes. Not run.

variant=small is for `shapes` and `nuclei` on two CPU cores, from scratch:

    python -m jaxseg.main --config experiments/solo.py:dataset=shapes,variant=small \\
        --workdir runs/solo_shapes
"""

from typing import Literal

from jaxseg import recipes
from jaxseg.config import default


def get_config(
    dataset: str = "coco",
    backbone: str = "",
    variant: Literal["", "decoupled", "decoupled_light", "small"] = "",
    recipe: Literal["paper", "mmdet"] = "paper",
    num_classes: int = 0,
):
    """backbone="": resnet50, small resnet18. num_classes=0: as many as the data set has."""
    config = default()
    config.data.dataset = dataset
    config.model.name = "solo"
    config.model.num_classes = num_classes
    if variant == "small":
        recipes.refuse("variant=small", recipe=recipe.removeprefix("paper"))
        config.model.backbone = {"name": backbone or "resnet18", "output_stride": 32}
        small(config)
        return config
    light = variant == "decoupled_light"
    config.model.masks = variant or "vanilla"
    config.model.backbone = {"name": backbone or "resnet50", "output_stride": 32}
    config.model.backbone.norm = {"frozen": True}
    recipes.solo(config, (852, 512) if light else (1333, 800), square=recipe == "paper")
    if light:
        config.model.convs = 4
        config.model.ranges = ((1, 64), (32, 128), (64, 256), (128, 512), (256, 2048))
    return config


def small(config):
    """Narrow towers, and grids and ranges for objects of a tenth to a half of the image's side."""
    recipes.small_solo(config)
    config.model.update(convs=3, features=64, prior=0.5)
    if recipes.known(config) == "nuclei":
        config.loss.positives = 128
