"""DeepLab v3 (arXiv:1706.05587): ASPP with image pooling, or a cascade of blocks, on an atrous
ResNet; and as torchvision, segmentation_models.pytorch and MMSegmentation build it.

    python -m jaxseg.main --config experiments/deeplabv3.py --workdir runs/deeplabv3

Table 6, VOC 2012 val, ResNet-101, trained on trainaug at output stride 16 and evaluated at 8: mIoU
78.51, at 16 77.21. variant=cascade, Table 4, evaluated at 8: 78.05. Not run.
"""

from typing import Literal

from jaxseg import recipes
from jaxseg.config import default


def get_config(
    dataset: str = "",
    backbone: str = "",
    variant: Literal["", "aspp", "cascade"] = "",
    recipe: Literal["paper", "torchvision", "smp", "mmseg"] = "paper",
    output_stride: int = 0,
    stem: str = "",
    num_classes: int = 0,
):
    """dataset="": voc2012, torchvision's coco_voc, mmseg's cityscapes. backbone="": resnet101, or
    the libraries' resnet50. variant="" (aspp): of recipe=paper. output_stride=0, stem="": the
    recipe's. num_classes=0: as many as the data set has."""
    backbone = backbone or ("resnet101" if recipe == "paper" else "resnet50")
    recipes.resnet_only(backbone, stem)
    if recipe != "paper":
        recipes.refuse(f"recipe={recipe}", variant=variant)
    config = default()
    recipes.read(config, dataset, recipe, paper="voc2012")
    config.model.name = "deeplabv3"
    config.model.num_classes = num_classes
    config.model.cascade = 3 if variant == "cascade" else 0  # section 4.2: block5 to block7
    fill = {"paper": paper, "torchvision": torchvision, "smp": smp, "mmseg": mmseg}[recipe]
    config.model.backbone = fill(config, backbone, stem)
    if output_stride:
        config.model.backbone.output_stride = output_stride
    return config


def paper(config, name, stem):
    """The network and the training of section 4; returns the backbone."""
    recipes.deeplab(config)
    config.eval.output_stride = 8  # section 4.3, Table 6
    momentum = {"momentum": 0.9997}  # section 4.1
    config.model.norm = momentum
    backbone = {"name": name, "output_stride": 16, "norm": momentum}  # section 4.1
    if name.startswith("resnet"):
        # Table 4 for the cascade, Table 5 for ASPP.
        grid = (1, 2, 1) if config.model.cascade else (1, 2, 4)
        backbone |= {"stem": stem or "7x7", "strides": "tensorflow", "multi_grid": grid}
    if name.startswith("mobilenet"):
        backbone["contract"] = True  # the authors' code
    return backbone


def torchvision(config, name, stem):
    """torchvision.models.segmentation.deeplabv3_resnet50, _resnet101, _mobilenet_v3_large."""
    recipes.torchvision(config)
    config.model.update(align_corners=False, dropout=0.5, head=256, aux=256)
    if name == "mobilenetv3_large":
        config.model.update(rates=(12, 24, 36), aux=10, aux_on="block4")
        config.optim.lr = 0.01
        config.optim.weight_decay = 1e-6
        return {"name": name, "output_stride": 16}
    backbone = {"name": name, "output_stride": 8}
    if name.startswith("resnet"):
        backbone |= {"stem": stem or "7x7", "contract": True}
    return backbone


def smp(config, name, stem):
    """segmentation_models.pytorch 0.6; the training is the paper's."""
    recipes.deeplab(config)
    config.data.crop = (512, 512)  # smp takes multiples of the stride
    config.model.update(rates=(12, 24, 36), scale_rates=False, fit_corners=False)
    config.model.update(dropout=0.5, head=256)
    backbone = {"name": name, "output_stride": 8}
    if name.startswith("resnet"):
        backbone["stem"] = stem or "7x7"
    if name == "mobilenetv2":
        backbone["last"] = 1280
    return backbone


def mmseg(config, name, stem):
    """configs/deeplabv3/deeplabv3_r50-d8_4xb2-40k_cityscapes-512x1024.py."""
    recipes.mmseg(config)
    config.model.update(align_corners=False, features=512, project_kernel=3, aux=256)
    config.model.channel_dropout = True
    if recipes.narrow(name):
        config.model.update(features=128, aux=64)
    return recipes.mmseg_backbone(name, stem)
