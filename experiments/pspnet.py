"""PSPNet (arXiv:1612.01105): pyramid pooling on an atrous ResNet, as published and as libraries
build it.

    python -m jaxseg.main --config experiments/pspnet.py:dataset=ade20k --workdir runs/pspnet

Table 1, ADE20K val, ResNet-50: mIoU 41.68, pixel accuracy 80.04. recipe=mmseg, Cityscapes val,
40,000 steps: mIoU 77.85 (MMSegmentation's own figure). Not run.
"""

from typing import Literal

from jaxseg import recipes
from jaxseg.config import default


def get_config(
    dataset: str = "",
    backbone: str = "resnet50",
    variant: str = "",
    recipe: Literal["paper", "mmseg", "smp"] = "paper",
    output_stride: int = 0,
    stem: str = "",
    num_classes: int = 0,
):
    """dataset="": ade20k, mmseg's cityscapes, smp's voc2012. output_stride=0, stem="": the
    recipe's. num_classes=0: as many as the data set has. It has no variant."""
    recipes.refuse("pspnet.py", variant=variant)
    recipes.resnet_only(backbone, stem)
    config = default()
    recipes.read(config, dataset, recipe, paper="ade20k")
    config.model.name = "pspnet"
    config.model.num_classes = num_classes
    fill = {"paper": paper, "mmseg": mmseg, "smp": smp}[recipe]
    config.model.backbone = fill(config, backbone, stem)
    if output_stride:
        config.model.backbone.output_stride = output_stride
    return config


def paper(config, name, stem):
    """Section 5.1 and the authors' code; returns the backbone."""
    training(config)
    config.eval.mode = "slide"  # the authors' code: windows of the crop, two thirds of it apart
    config.model.norm = {"momentum": 0.95}  # the authors' code
    backbone = {"name": name, "output_stride": 8, "norm": {"momentum": 0.95}}
    if name.startswith("resnet"):
        backbone |= {"stem": stem or "deep", "strides": "caffe"}  # the authors' code
    return backbone


def training(config):
    dataset = recipes.known(config)
    large = dataset == "cityscapes"
    config.data.crop = (713, 713) if large else (473, 473)  # the authors' code
    config.data.scale = (0.5, 2.0)  # section 5.1
    config.data.rotate = 10.0  # section 5.1, degrees
    config.data.blur = 0.0 if large else 0.5  # section 5.1: on ADE20K and VOC
    config.optim.lr = 0.01  # section 5.1
    config.optim.momentum = 0.9
    config.optim.weight_decay = 1e-4
    # The authors' code: new layers ten times, their biases twenty times.
    new = "^(pyramid|fuse|classifier|aux)/"
    config.optim.multipliers = ((f"{new}.*bias", 20.0), (new, 10.0))
    config.optim.power = 0.9
    config.train.batch = 16  # section 5.1
    steps = {"ade20k": 150_000, "voc2012": 30_000, "cityscapes": 90_000}  # section 5.1
    config.train.steps = steps.get(dataset, 30_000)
    config.eval.batch = 4


def mmseg(config, name, stem):
    """configs/pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py, number by number."""
    recipes.mmseg(config)
    config.model.update(align_corners=False, channel_dropout=True)
    if recipes.narrow(name):
        config.model.update(pooled=128, features=128, aux=64)
    return recipes.mmseg_backbone(name, stem)


def smp(config, name, stem):
    """segmentation_models.pytorch 0.6, whose PSPNet pools c3; the training is the paper's."""
    training(config)
    config.model.update(source="c3", kernel=1, classifier_kernel=3, norm_single=False)
    config.model.update(aux=0, dropout=0.2, channel_dropout=True, fit_corners=False)
    config.data.crop = (480, 480)  # smp takes multiples of the stride
    backbone = {"name": name, "output_stride": 32}
    if name.startswith("resnet"):
        backbone["stem"] = stem or "7x7"
    if name == "mobilenetv2":
        backbone["last"] = 1280
    return backbone
