"""MMDetection 3.3: the configs of its model zoo, named as their files begin."""

import re

from jaxseg.weights.names import Rule, resnet

BACKBONES = {"r18": "resnet18", "r34": "resnet34", "r50": "resnet50", "r101": "resnet101"}
NETWORKS = {
    "solo": "solo.py:",
    "decoupled-solo": "solo.py:variant=decoupled,",
    "decoupled-solo-light": "solo.py:variant=decoupled_light,",
    "solov2": "solov2.py:",
    "solov2-light": "solov2.py:variant=light,",
}
# Name at the source -> experiment that builds the same network.
ARCHS = {
    f"{network}_{theirs}_fpn": f"{experiment}recipe=mmdet,backbone={ours}"
    for network, experiment in NETWORKS.items()
    for theirs, ours in BACKBONES.items()
}
CLASSIFIER = ("mask_head.conv_cls",)
DETECTORS = {arch: (CLASSIFIER[0], 80) for arch in ARCHS}  # 80: COCO's, as in the experiment
BACKGROUND = 0  # outputs that are no class
IGNORED = r"backbone\.fc\..*"  # an ImageNet classifier that came along
LAYERS = {"conv": "conv", "gn": "norm"}


def rules(arch: str) -> list[Rule]:
    """How the modules of a network are called here."""
    return [
        (r"neck\.(lateral|fpn)_convs\.(\d)\.conv", pyramid),
        (r"mask_head\.(cls|mask|kernel)_convs(_[xy])?\.(\d)\.(conv|gn)", tower),
        (r"mask_head\.conv_mask_list(_[xy])?\.(\d)", masks),
        (r"mask_head\.conv_cls", "classifier"),
        (r"mask_head\.conv_kernel", "kernels"),
        (r"mask_head\.mask_feature_head\.convs_all_levels\.(\d)\.conv(\d)\.(conv|gn)", feature),
        (r"mask_head\.mask_feature_head\.conv_pred\.conv", "mask_features/fuse/conv"),
        (r"mask_head\.mask_feature_head\.conv_pred\.gn", "mask_features/fuse/norm"),
        *resnet(r"backbone\."),
    ]


def pyramid(match: re.Match) -> str:
    """Levels, which count from 0 there and from p2 here."""
    return f"fpn/{ {'lateral': 'lateral', 'fpn': 'output'}[match[1]] }{int(match[2]) + 2}"


def masks(match: re.Match) -> str:
    return f"masks{match[1] or ''}{int(match[2]) + 2}"


def tower(match: re.Match) -> str:
    """Convolutions and norms of the branches; the category's is called cls there."""
    name = "category" if match[1] == "cls" else match[1]
    return f"{name}{match[2] or ''}/conv{int(match[3]) + 1}/{LAYERS[match[4]]}"


def feature(match: re.Match) -> str:
    return f"mask_features/level{int(match[1]) + 2}_{int(match[2]) + 1}/{LAYERS[match[3]]}"
