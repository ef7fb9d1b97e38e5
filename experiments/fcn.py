"""FCN (arXiv:1411.4038): VGG-16 turned fully convolutional, with skips to finer levels; and what
libraries call FCN, on an atrous ResNet.

    python -m jaxseg.main --config experiments/fcn.py:variant=32s --workdir runs/fcn32s

32s and 8s_at_once start from ImageNet's VGG-16, 16s from 32s (--config.init.workdir=runs/fcn32s)
and 8s from 16s.

Table 2, trained on SBD's 8,498 images, 736 images of VOC 2011 val: mIoU 59.4 (32s), 62.4 (16s),
62.7 (8s); the authors' released networks, with this recipe: 63.6, 65.0, 65.5, and 65.4 for
8s_at_once. Here it is VOC 2012's trainaug and val, 10,582 and 1,449 images. recipe=torchvision,
backbone=resnet50, COCO val with VOC's classes: 60.5; recipe=mmseg, Cityscapes val: 72.25 (their own
figures). Not run.
"""

from typing import Literal

from jaxseg import recipes
from jaxseg.config import default

# The authors' code: stride of the finest scores, learning rate of the summed loss, steps.
VARIANTS = {
    "32s": (32, 1e-10, 100_000),
    "16s": (16, 1e-12, 100_000),
    "8s": (8, 1e-14, 100_000),
    "8s_at_once": (8, 1e-10, 300_000),
}


def get_config(
    dataset: str = "",
    backbone: str = "",
    variant: Literal["", "32s", "16s", "8s", "8s_at_once"] = "",
    recipe: Literal["paper", "torchvision", "mmseg"] = "paper",
    upsampling: Literal["", "fixed", "learned", "all"] = "",
    output_stride: int = 0,
    stem: str = "",
    num_classes: int = 0,
):
    """variant="" (8s), upsampling="" (fixed): of recipe=paper. dataset="": voc2012, torchvision's
    coco_voc, mmseg's cityscapes. backbone="": vgg16, or the libraries' resnet50. output_stride=0
    (of the libraries), stem="": the recipe's. num_classes=0: as many as the data set has."""
    config = default()
    recipes.read(config, dataset, recipe, paper="voc2012")
    config.model.name = "fcn" if recipe == "paper" else "fcn_resnet"
    config.model.num_classes = num_classes
    backbone = backbone or ("vgg16" if recipe == "paper" else "resnet50")
    recipes.resnet_only(backbone, stem)
    if recipe == "paper":
        recipes.refuse("recipe=paper", output_stride=output_stride)
        config.model.upsampling = upsampling or "fixed"
        config.model.backbone = paper(config, backbone, variant or "8s")
    else:
        recipes.refuse(f"recipe={recipe}", variant=variant, upsampling=upsampling)
        fill = {"torchvision": torchvision, "mmseg": mmseg}[recipe]
        config.model.backbone = fill(config, backbone)
    if stem:
        config.model.backbone.stem = stem
    if output_stride:
        config.model.backbone.output_stride = output_stride
    return config


def paper(config, name, variant):
    """The authors' code; the paper has batches of 20 and another rate. Returns the backbone."""
    config.data.mean = (122.679, 116.669, 104.007)  # of the Caffe weights, which take no std
    config.data.std = (1.0, 1.0, 1.0)
    # Whole images: the border is as the network's own.
    config.data.crop = (360, 480) if recipes.known(config) == "camvid" else (500, 500)
    config.data.flip = False  # section 4.3: no gain
    stride, lr, steps = VARIANTS[variant]
    config.model.stride = stride
    config.model.at_once = variant == "8s_at_once"
    config.loss.pixel = {"reduction": "sum"}
    config.optim.lr = lr
    config.optim.power = 0.0
    config.optim.momentum = 0.99
    config.optim.weight_decay = 5e-4
    config.optim.multipliers = (("bias$", 2.0),)  # section 4.3
    config.train.batch = 1
    config.train.steps = steps
    config.eval.batch = 1
    return {"name": name, "output_stride": 32}


def torchvision(config, name):
    """torchvision.models.segmentation.fcn_resnet50 and fcn_resnet101."""
    recipes.torchvision(config)
    contract = {"contract": True} if name.startswith("resnet") else {}
    return {"name": name, "output_stride": 8, **contract}


def mmseg(config, name):
    """configs/fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py."""
    recipes.mmseg(config)
    config.model.update(features=512, convs=2, concat_input=True, channel_dropout=True)
    if recipes.narrow(name):
        config.model.update(features=128, aux=64)
    return recipes.mmseg_backbone(name, "")
