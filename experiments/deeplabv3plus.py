"""DeepLab v3+ (arXiv:1802.02611): the decoder on DeepLab v3, with Xception, an atrous ResNet or
MobileNetV2; as segmentation_models.pytorch and MMSegmentation build it; and, with recipe=timm, on
ImageNet backbones of timm.

    python -m jaxseg.main --config experiments/deeplabv3plus.py --workdir runs/v3plus

Tables 3 and 5, VOC 2012 val, trained on trainaug and evaluated at output stride 16: ResNet-101 mIoU
78.85, Xception-65 79.79 (separable). The authors' model zoo: MobileNetV2, started from COCO, 75.32.
The paper has no ResNet-50. Not run.
"""

from typing import Literal

from jaxseg import recipes
from jaxseg.config import default


def get_config(
    dataset: str = "",
    backbone: str = "resnet50",
    variant: str = "",
    recipe: Literal["paper", "smp", "mmseg", "timm"] = "paper",
    output_stride: int = 0,
    stem: str = "",
    num_classes: int = 0,
):
    """dataset="": voc2012, or mmseg's cityscapes. output_stride=0, stem="": the recipe's.
    num_classes=0: as many as the data set has. It has no variant."""
    recipes.refuse("deeplabv3plus.py", variant=variant)
    recipes.resnet_only(backbone, stem)
    config = default()
    recipes.read(config, dataset, recipe, paper="voc2012")
    config.model.name = "deeplabv3plus"
    config.model.num_classes = num_classes
    fill = {"paper": paper, "smp": smp, "mmseg": mmseg, "timm": timm}[recipe]
    config.model.backbone = fill(config, backbone, stem)
    if output_stride:
        config.model.backbone.output_stride = output_stride
    return config


def training(config):
    recipes.deeplab(config)
    config.data.scale_step = 0.25  # the authors' code


def paper(config, name, stem):
    """The networks and the training of section 4; returns the backbone."""
    training(config)
    config.model.norm = {"momentum": 0.9997}  # the authors' code
    backbone = {"name": name, "output_stride": 16, "norm": {"momentum": 0.9997}}
    if name.startswith("resnet"):
        backbone["stem"] = stem or "7x7"
        backbone["strides"] = "tensorflow"
        backbone["multi_grid"] = (1, 2, 4)  # DeepLab v3, Table 5; the authors' code
        return backbone
    backbone["norm"]["epsilon"] = 1e-3  # the authors' code, Xception and MobileNetV2
    config.data.mean = config.data.std = (127.5, 127.5, 127.5)  # the authors' code
    config.optim.weight_decay = 4e-5  # the authors' code
    if name.startswith("xception"):
        config.model.separable = True  # section 4.3
    if name.startswith("mobilenet"):
        backbone["contract"] = True  # the authors' code
    if name == "mobilenetv2":
        config.model.update(rates=(), decoder=())  # the authors' model zoo
    return backbone


def timm(config, name, stem):
    """The paper's heads on a backbone as timm 1.0 has trained it: its strides, norms and input."""
    training(config)
    backbone = {"name": name, "output_stride": 16}
    if name.startswith("resnet"):
        backbone |= {"stem": stem or "7x7", "contract": True}
    if name.startswith("xception"):
        config.data.mean = config.data.std = (127.5, 127.5, 127.5)
        config.model.separable = True
    if name.startswith("mobilenet"):
        backbone["norm"] = {"epsilon": 1e-5}
    if name == "mobilenetv2":
        config.model.update(rates=(), decoder=())
    return backbone


def smp(config, name, stem):
    """segmentation_models.pytorch 0.6; the training is the paper's."""
    training(config)
    config.data.crop = (512, 512)  # smp takes multiples of the stride
    config.model.update(rates=(12, 24, 36), scale_rates=False, fit_corners=False)
    config.model.update(dropout=0.5, separable=True, inner_norm=False)
    config.model.update(after_aspp=256, decoder=(256,))
    backbone = {"name": name, "output_stride": 16}
    if name.startswith("resnet"):
        backbone["stem"] = stem or "7x7"
    if name == "mobilenetv2":
        backbone["last"] = 1280
    return backbone


def mmseg(config, name, stem):
    """configs/deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024.py."""
    recipes.mmseg(config)
    config.model.update(align_corners=False, features=512, project_kernel=3, aux=256)
    config.model.update(separable=True, decoder=(512, 512), channel_dropout=True)
    if recipes.narrow(name):
        config.model.update(features=128, decoder=(128, 128), low_level=12, aux=64)
    return recipes.mmseg_backbone(name, stem)
