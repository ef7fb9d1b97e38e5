"""segmentation_models.pytorch 0.6: Architecture/encoder, with its default arguments."""

import re

from jaxseg.weights.imagenet import torchvision as backbone
from jaxseg.weights.names import Rolled, Rule, pair

EXPERIMENTS = {
    "Unet": "unet.py:recipe=smp",
    "PSPNet": "pspnet.py:recipe=smp",
    "DeepLabV3": "deeplabv3.py:recipe=smp",
    "DeepLabV3Plus": "deeplabv3plus.py:recipe=smp",
}
ENCODERS = {
    **{f"resnet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)},
    "mobilenet_v2": "mobilenetv2",
}
# Name at the source -> experiment that builds the same network.
ARCHS = {
    f"{network}/{encoder}": f"{experiment},backbone={ours}"
    for network, experiment in EXPERIMENTS.items()
    for encoder, ours in ENCODERS.items()
}
CLASSIFIER = ("segmentation_head.0",)
IGNORED = r"classification_head\..*"  # aux_params: a classifier of whole images
DECODER = (256, 128, 64, 32, 16)  # channels of Unet's decoder
C5 = {"resnet18": 512, "resnet34": 512, "mobilenet_v2": 1280}  # the other encoders: 2048


def rules(arch: str) -> list[Rule]:
    """How the modules of a network are called here."""
    network, encoder = arch.split("/")
    head = {"Unet": unet, "PSPNet": pspnet, "DeepLabV3": v3, "DeepLabV3Plus": v3plus}[network]
    return [
        *head(encoder),
        (r"segmentation_head\.0", "classifier"),
        *backbone(r"encoder\."),
    ]


def unet(encoder: str) -> list[Rule]:
    """Five blocks of an upsampling and two convolutions."""
    above = (C5[encoder] if encoder in C5 else 2048, *DECODER)  # channels that enter each block

    def first(match: re.Match) -> Rolled:
        """smp sets the skip after the upsampled features, we before."""
        block = int(match[1])
        return Rolled(f"up{4 - block}_1/conv", lambda channels: channels - above[block])

    def other(match: re.Match) -> str:
        block, conv, layer = (int(n) for n in match.groups())
        return f"up{4 - block}_{conv}/{('conv', 'norm')[layer]}"

    return [
        (r"decoder\.blocks\.(\d)\.conv1\.0", first),
        (r"decoder\.blocks\.(\d)\.conv([12])\.([01])", other),
    ]


def pspnet(encoder: str) -> list[Rule]:
    """The pyramid and the convolution after it."""

    def pool(match: re.Match) -> str:
        return f"pyramid/pool{(1, 2, 3, 6)[int(match[1])]}/{('conv', 'norm')[int(match[2])]}"

    return [
        (r"decoder\.psp\.blocks\.(\d)\.pool\.1\.([01])", pool),
        # smp sets the pools before the features, we after; both have as many channels.
        (r"decoder\.conv\.0", lambda _: Rolled("fuse/conv", lambda channels: channels // 2)),
        (r"decoder\.conv\.1", "fuse/norm"),
    ]


def v3(encoder: str) -> list[Rule]:
    """ASPP and the 3x3 convolution after it."""
    return [
        *aspp(r"decoder\.aspp"),
        (r"decoder\.conv", "head/conv"),
        (r"decoder\.bn", "head/norm"),
    ]


def aspp(theirs: str) -> list[Rule]:
    """ASPP, whose atrous convolutions may be separable."""
    return [
        *pair(rf"{theirs}\.convs\.0", "aspp/conv1x1"),
        *separable(rf"{theirs}\.convs\.([123])", r"aspp/atrous\1"),
        *pair(rf"{theirs}\.convs\.([123])", r"aspp/atrous\1"),
        (rf"{theirs}\.convs\.4\.1", "aspp/image_pooling/conv"),
        (rf"{theirs}\.convs\.4\.2", "aspp/image_pooling/norm"),
        *pair(rf"{theirs}\.project", "aspp/project"),
    ]


def separable(theirs: str, ours: str) -> list[Rule]:
    """A depthwise and a pointwise convolution, then a norm."""
    return [
        (rf"{theirs}\.0\.0", rf"{ours}/depthwise"),
        (rf"{theirs}\.0\.1", rf"{ours}/pointwise/conv"),
        (rf"{theirs}\.1", rf"{ours}/norm|{ours}/pointwise/norm"),
    ]


def v3plus(encoder: str) -> list[Rule]:
    """ASPP, two separable convolutions and the projection of c2."""
    return [
        *aspp(r"decoder\.aspp\.0"),
        (r"decoder\.aspp\.1\.0", "after_aspp/depthwise"),
        (r"decoder\.aspp\.1\.1", "after_aspp/pointwise/conv"),
        (r"decoder\.aspp\.2", "after_aspp/pointwise/norm"),
        *pair(r"decoder\.block1", "low_level"),
        *separable(r"decoder\.block2", "decoder1"),
    ]
