"""Experiments of ours, each with the PyTorch network of the very same architecture.

A pair is an experiment with overrides, and what builds the peer, of torch_networks.py. Parameter
counts agree to the last one, which is checked whenever a pair is built.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple


class Pair(NamedTuple):
    """One architecture on both sides."""

    config: str  # experiment of ours, with arguments
    overrides: dict[str, object]
    peer: Callable[[int], Any]  # of the number of classes
    margin: int = 0  # pixels by which an input side is smaller than the size asked for


def peer(name: str, *args: Any) -> Callable[[int], Any]:
    """torch_networks.NAME(classes, *args), imported when it is built: ours run without PyTorch."""

    def build(classes: int) -> Any:
        return getattr(importlib.import_module("torch_networks"), name)(classes, *args)

    return build


NO_AUX = {"model.aux": 0}
PADDED = {
    "model.padding": "same",
    "model.patch": 1,
    "model.widths": (64, 128, 256, 512, 1024),
    "model.norm.kind": "batch",
}
# Of timm's recipe the heads are the paper's; without aligned corners the peer's sizes fit too.
TIMM = {"model.align_corners": False}
V3PLUS, V3, FCN = (f"experiments/{name}.py" for name in ("deeplabv3plus", "deeplabv3", "fcn"))
PSPNET, UNET = "experiments/pspnet.py:recipe=mmseg,stem=7x7", "experiments/unet.py"
PAIRS = {
    "deeplabv3plus_r50": Pair(f"{V3PLUS}:recipe=smp", {}, peer("smp", "DeepLabV3Plus", "resnet50")),
    "fcn_r50": Pair(
        f"{FCN}:recipe=torchvision,backbone=resnet50", NO_AUX, peer("torchvision", "fcn_resnet50")
    ),
    "deeplabv3_r50": Pair(
        f"{V3}:recipe=torchvision,backbone=resnet50",
        NO_AUX,
        peer("torchvision", "deeplabv3_resnet50"),
    ),
    "pspnet_r50": Pair(f"{PSPNET},backbone=resnet50", NO_AUX, peer("PSPNet")),
    "deeplabv3plus_mobilenetv2": Pair(
        f"{V3PLUS}:recipe=smp,backbone=mobilenetv2",
        {},
        peer("smp", "DeepLabV3Plus", "mobilenet_v2"),
    ),
    "deeplabv3plus_xception65": Pair(
        f"{V3PLUS}:recipe=timm,backbone=xception65", TIMM, peer("DeepLabV3PlusXception")
    ),
    "unet": Pair(f"{UNET}:in_channels=3", {}, peer("UNet", False), margin=4),
    "unet_same": Pair(f"{UNET}:in_channels=3", PADDED, peer("UNet", True)),
    "segnet": Pair("experiments/segnet.py", {}, peer("SegNet")),
    "deeplabv3plus_r101": Pair(
        f"{V3PLUS}:recipe=smp,backbone=resnet101", {}, peer("smp", "DeepLabV3Plus", "resnet101")
    ),
    "fcn_r101": Pair(
        f"{FCN}:recipe=torchvision,backbone=resnet101", NO_AUX, peer("torchvision", "fcn_resnet101")
    ),
    "deeplabv3_r101": Pair(
        f"{V3}:recipe=torchvision,backbone=resnet101",
        NO_AUX,
        peer("torchvision", "deeplabv3_resnet101"),
    ),
    "pspnet_r101": Pair(f"{PSPNET},backbone=resnet101", NO_AUX, peer("PSPNet", 101)),
}
