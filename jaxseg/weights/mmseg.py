"""MMSegmentation 1.2: the configs of its model zoo, named as their files begin."""

import re

from jaxseg.weights.names import Rolled, Rule, resnet

EXPERIMENTS = {
    "fcn": "fcn.py:recipe=mmseg",
    "pspnet": "pspnet.py:recipe=mmseg",
    "deeplabv3": "deeplabv3.py:recipe=mmseg",
    "deeplabv3plus": "deeplabv3plus.py:recipe=mmseg",
}
BACKBONES = {
    **{f"r{depth}-d8": f"backbone=resnet{depth}" for depth in (18, 50, 101)},
    **{f"r{depth}b-d8": f"backbone=resnet{depth},stem=7x7" for depth in (18, 50, 101)},
}
# Name at the source -> experiment that builds the same network.
ARCHS = {
    **{
        f"{network}_{theirs}": f"{experiment},{ours}"
        for network, experiment in EXPERIMENTS.items()
        for theirs, ours in BACKBONES.items()
    },
    "unet-s5-d16_fcn": "unet.py:recipe=mmseg",
}
CLASSIFIER = ("decode_head.conv_seg", "auxiliary_head.conv_seg")
IGNORED = r"backbone\.fc\..*"  # an ImageNet classifier that came along


def module(theirs: str, ours: str) -> list[Rule]:
    """mmcv's ConvModule: "x.conv", "x.bn"."""
    return [(rf"{theirs}\.conv", f"{ours}/conv"), (rf"{theirs}\.bn", f"{ours}/norm")]


def separable(theirs: str, ours: str) -> list[Rule]:
    """mmcv's DepthwiseSeparableConvModule."""
    return [
        (rf"{theirs}\.depthwise_conv\.conv", f"{ours}/depthwise"),
        (rf"{theirs}\.depthwise_conv\.bn", f"{ours}/inner_norm"),
        *module(rf"{theirs}\.pointwise_conv", f"{ours}/pointwise"),
    ]


def rules(arch: str) -> list[Rule]:
    """How the modules of a network are called here."""
    if arch.startswith("unet"):
        return unet()
    head = {"fcn": fcn, "pspnet": pspnet, "deeplabv3": v3, "deeplabv3plus": v3plus}
    return [
        *head[arch.split("_")[0]](),
        (r"decode_head\.conv_seg", "classifier"),
        *module(r"auxiliary_head\.convs\.0", "aux/conv1"),
        (r"auxiliary_head\.conv_seg", "aux/classifier"),
        *resnet(r"backbone\."),
    ]


def fcn() -> list[Rule]:
    """FCNHead."""

    def conv(match: re.Match) -> str:
        return f"head/conv{int(match[1]) + 1}/{ {'conv': 'conv', 'bn': 'norm'}[match[2]] }"

    return [
        (r"decode_head\.convs\.(\d)\.(conv|bn)", conv),
        *module(r"decode_head\.conv_cat", "head/fuse"),
        (r"decode_head\.conv_seg", "head/classifier"),
    ]


def pspnet() -> list[Rule]:
    """PSPHead."""

    def pool(match: re.Match) -> str:
        layer = {"conv": "conv", "bn": "norm"}[match[2]]
        return f"pyramid/pool{(1, 2, 3, 6)[int(match[1])]}/{layer}"

    return [
        (r"decode_head\.psp_modules\.(\d)\.1\.(conv|bn)", pool),
        *module(r"decode_head\.bottleneck", "fuse"),
    ]


def v3() -> list[Rule]:
    """ASPPHead, and the branches of DepthwiseSeparableASPPHead."""
    # MMSegmentation sets the image's mean before the other four branches, we after them.
    last = Rolled("aspp/project/conv", lambda channels: -channels // 5)
    return [
        *module(r"decode_head\.image_pool\.1", "aspp/image_pooling"),
        *module(r"decode_head\.aspp_modules\.0", "aspp/conv1x1"),
        *separable(r"decode_head\.aspp_modules\.([123])", r"aspp/atrous\1"),
        *module(r"decode_head\.aspp_modules\.([123])", r"aspp/atrous\1"),
        (r"decode_head\.bottleneck\.conv", lambda _: last),
        (r"decode_head\.bottleneck\.bn", "aspp/project/norm"),
    ]


def v3plus() -> list[Rule]:
    """DepthwiseSeparableASPPHead."""
    return [
        *v3(),
        *module(r"decode_head\.c1_bottleneck", "low_level"),
        *separable(r"decode_head\.sep_bottleneck\.0", "decoder1"),
        *separable(r"decode_head\.sep_bottleneck\.1", "decoder2"),
    ]


def unet() -> list[Rule]:
    """UNet-S5-D16 with an FCNHead."""

    def encoder(match: re.Match) -> str:
        layer = {"conv": "conv", "bn": "norm"}[match[3]]
        return f"down{match[1]}_{int(match[2]) + 1}/{layer}"

    def decoder(match: re.Match) -> str:
        layer = {"conv": "conv", "bn": "norm"}[match[3]]
        return f"up{match[1]}_{int(match[2]) + 1}/{layer}"

    return [
        (r"backbone\.encoder\.(\d)\.\d\.convs\.(\d)\.(conv|bn)", encoder),
        (r"backbone\.decoder\.(\d)\.conv_block\.convs\.(\d)\.(conv|bn)", decoder),
        *module(r"backbone\.decoder\.(\d)\.upsample\.interp_upsample\.1", r"up\1/conv"),
        *module(r"decode_head\.convs\.0", "head"),
        (r"decode_head\.conv_seg", "classifier"),
        *module(r"auxiliary_head\.convs\.0", "aux"),
        (r"auxiliary_head\.conv_seg", "aux_classifier"),
    ]
