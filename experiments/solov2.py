"""SOLOv2 (arXiv:2003.10152): SOLO with dynamic kernels, on COCO.

    python -m jaxseg.main --config experiments/solov2.py --workdir runs/solov2 \\
        --config.init.backbone=resnet50.pth

COCO val2017, mask AP of the authors' code after 36 epochs: ResNet-50 37.5, ResNet-101 39.1;
variant=light ResNet-18 29.6, ResNet-34 32.0, ResNet-50 33.7. recipe=mmdet computes as MMDetection
does, whose ResNet-50 has 37.5 and light ResNet-18 29.7, but for images that are padded to one of
eval.buckets shapes. Not run.

variant=small is for `shapes` and `nuclei` on two CPU cores, from scratch:

    python -m jaxseg.main --config experiments/solov2.py:dataset=shapes,variant=small \\
        --workdir runs/solov2_shapes
"""

from typing import Literal

from jaxseg import recipes
from jaxseg.config import default


def get_config(
    dataset: str = "coco",
    backbone: str = "",
    variant: Literal["", "light", "small"] = "",
    recipe: Literal["paper", "mmdet"] = "paper",
    num_classes: int = 0,
):
    """backbone="": resnet50, small resnet18. num_classes=0: as many as the data set has."""
    config = default()
    config.data.dataset = dataset
    config.model.name = "solov2"
    config.model.num_classes = num_classes
    if variant == "small":
        recipes.refuse("variant=small", recipe=recipe.removeprefix("paper"))
        config.model.backbone = {"name": backbone or "resnet18", "output_stride": 32}
        small(config)
        return config
    config.model.backbone = {"name": backbone or "resnet50", "output_stride": 32}
    config.model.backbone.norm = {"frozen": True}
    recipes.solo(config, (768, 512) if variant else (1333, 800), square=recipe == "paper")
    if variant:  # the authors' code: light
        config.model.update(convs=2, features=256, embedding=128)
        config.model.ranges = ((1, 56), (28, 112), (56, 224), (112, 448), (224, 896))
        config.eval.resize = (768, 448)
    return config


def small(config):
    """Narrow towers, and grids and ranges for objects of a tenth to a half of the image's side."""
    recipes.small_solo(config)
    config.model.update(convs=2, features=64, embedding=64, mask_features=64)
    if recipes.known(config) == "nuclei":
        config.loss.positives = 256
