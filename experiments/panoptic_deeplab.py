"""Panoptic-DeepLab (arXiv:1911.10194): objects as centres and offsets beside a semantic DeepLab.

    python -m jaxseg.main --config experiments/panoptic_deeplab.py --workdir runs/panoptic

Cityscapes val, single scale: Xception-71 (backbone=xception71,output_stride=16) PQ 63.0, AP 35.3,
mIoU 80.5; the authors' later code: ResNet-50 at output stride 32 (the default) PQ 59.8,
with stem=deep 60.8; HRNet-W48 63.4. COCO val (dataset=coco_panoptic): Xception-71 39.7;
ResNet-50 at stride 32 34.1. Start from ImageNet weights with init.backbone. Not run.

variant=small is for `shapes` and `nuclei` on two CPU cores, from scratch:

    python -m jaxseg.main --config experiments/panoptic_deeplab.py:dataset=shapes,variant=small \\
        --workdir runs/panoptic_shapes
"""

from typing import Literal

from jaxseg import recipes
from jaxseg.config import default


def get_config(
    dataset: str = "cityscapes_panoptic",
    backbone: str = "",
    variant: Literal["", "small"] = "",
    output_stride: int = 0,
    stem: str = "",
    num_classes: int = 0,
):
    """backbone="": resnet50, small resnet18. output_stride=0: 32, small 16. stem="": 7x7.
    num_classes=0: as many as the data set has."""
    config = default()
    config.data.dataset = dataset
    config.model.name = "panoptic_deeplab"
    config.model.num_classes = num_classes
    name = backbone or ("resnet18" if variant else "resnet50")
    recipes.resnet_only(name, stem)
    config.model.backbone = {"name": name, "output_stride": output_stride or 32}
    if name.startswith("resnet"):
        config.model.backbone.stem = stem or "7x7"
    if variant:
        small(config, output_stride)
        return config
    config.model.backbone.norm = {"momentum": 0.99, "epsilon": 1e-3}  # the authors' code
    if name.startswith("xception"):
        config.model.separable = True  # the paper's ASPP
        config.model.backbone.norm = {"momentum": 0.9997, "epsilon": 1e-3}  # DeepLab v3+
        config.data.mean = config.data.std = (127.5, 127.5, 127.5)  # as DeepLab v3+
    if name.startswith("hrnet"):  # the authors' code: decoders from the branch at stride 32 on
        recipes.refuse(
            f"backbone={name}, whose decoders start at stride 32", output_stride=output_stride
        )
        config.model.levels = ("c4", "c3", "c2")
        config.model.semantic = (128, 64, 32)
        config.model.instance = (64, 32, 16)
    coco(config) if "coco" in dataset else cityscapes(config)
    if name.startswith("xception"):  # the paper's
        config.model.update(nms=7, top_k=200)
    return config


def cityscapes(config):
    """The authors' later code."""
    config.data.objects = 128  # of more objects in a crop the smallest are left out
    config.data.crop = (1025, 2049)
    config.data.scale = (0.5, 2.0)
    config.data.scale_step = 0.1
    adam(config, 2.5e-4, 60_000, 8)
    config.model.update(nms=13, top_k=400, stuff_area=2048)


def coco(config):
    """The authors' later code, but for its AutoAugment policy, which jaxseg does not have."""
    config.data.objects = 100
    config.data.resize = (641, 641)
    config.data.crop = (641, 641)
    config.data.scale = (0.5, 1.5)
    config.data.scale_step = 0.1
    adam(config, 5e-4, 200_000, 64)
    config.optim.warmup = 2_000
    config.eval.resize = (641, 641)
    config.model.update(nms=41, top_k=400, stuff_area=4096)


def adam(config, rate, steps, batch):
    config.optim.name = "adamw"
    config.optim.lr = rate
    config.optim.weight_decay = 0.0  # plain Adam
    config.optim.power = 0.9
    config.train.steps = steps
    config.train.batch = batch
    config.eval.batch = 1


def small(config, output_stride):
    """Small images from scratch: narrow heads that climb to stride 2, centres of small objects."""
    recipes.small_objects(config)
    nuclei = recipes.known(config) == "nuclei"
    config.data.objects = 64 if nuclei else 16
    config.data.crop = (128, 128) if nuclei else (96, 96)
    config.data.scale = (0.75, 1.5) if nuclei else (0.8, 1.25)
    config.data.photometric = nuclei
    config.model.align_corners = False  # sides that are multiples of the stride
    config.model.backbone.output_stride = output_stride or 16
    config.model.update(features=64, decoder=64, instance_decoder=64, instance_head=32)
    config.model.update(levels=("c3", "c2", "c1"), semantic=(32, 24, 16), instance=(32, 24, 16))
    config.model.update(kernel=3, dropout=0.0, stuff_area=0, norm={"momentum": 0.9})
    config.model.update(top_k=200 if nuclei else 32, detections=100 if nuclei else 32)
    config.loss.update(sigma=3.0, small_area=64, offset_weight=0.2, centre_weight=100.0)
    config.loss.pixel = {"name": "cross_entropy"}
    adam(config, 2e-3, 2_000 if nuclei else 1_400, 8)
    config.train.checkpoint_every = 250
    config.eval.batch = 8
