"""torchvision.models.segmentation, and its Mask R-CNN."""

import re

from jaxseg.weights.imagenet import torchvision as backbone
from jaxseg.weights.names import Rule, Transposed, pair

# Name at the source -> experiment that builds the same network.
ARCHS = {
    "fcn_resnet50": "fcn.py:recipe=torchvision,backbone=resnet50",
    "fcn_resnet101": "fcn.py:recipe=torchvision,backbone=resnet101",
    "deeplabv3_resnet50": "deeplabv3.py:recipe=torchvision,backbone=resnet50",
    "deeplabv3_resnet101": "deeplabv3.py:recipe=torchvision,backbone=resnet101",
    "deeplabv3_mobilenet_v3_large": "deeplabv3.py:recipe=torchvision,backbone=mobilenetv3_large",
    "maskrcnn_resnet50_fpn": "maskrcnn.py:recipe=torchvision",
}
CLASSIFIER = ("classifier.4", "aux_classifier.4", "aux_classifier.1")
# arch -> the layer that tells its classes, which has a background before them, and how many outputs
# it has for the data set of the arch's experiment.
DETECTORS = {"maskrcnn_resnet50_fpn": ("roi_heads.box_predictor.cls_score", 91)}
IGNORED = r"(?!)"  # a regex of names that a file may hold for nothing here: none


def rules(arch: str) -> list[Rule]:
    """How the modules of a network are called here."""
    if arch in DETECTORS:
        return maskrcnn()
    if arch.startswith("fcn"):
        head = [*pair(r"classifier", "head/conv1"), (r"classifier\.4", "head/classifier")]
    else:
        head = [
            *pair(r"classifier\.0\.convs\.0", "aspp/conv1x1"),
            *pair(r"classifier\.0\.convs\.([123])", r"aspp/atrous\1"),
            (r"classifier\.0\.convs\.4\.1", "aspp/image_pooling/conv"),
            (r"classifier\.0\.convs\.4\.2", "aspp/image_pooling/norm"),
            *pair(r"classifier\.0\.project", "aspp/project"),
            (r"classifier\.1", "head/conv"),
            (r"classifier\.2", "head/norm"),
            (r"classifier\.4", "classifier"),
        ]
    aux = [*pair(r"aux_classifier", "aux/conv1"), (r"aux_classifier\.4", "aux/classifier")]
    return [*head, *aux, *backbone(r"backbone\.")]


def maskrcnn() -> list[Rule]:
    """In files of either age: modules that were one layer have become several since."""

    def level(match: re.Match) -> str:
        kind = {"inner": "lateral", "layer": "output"}[match[1]]
        return f"fpn/{kind}{int(match[2]) + 2}"

    return [
        *backbone(r"backbone\.body\."),
        (r"backbone\.fpn\.(inner|layer)_blocks\.(\d)(?:\.0)?", level),
        (r"rpn\.head\.conv(?:\.0\.0)?", "rpn/conv"),
        (r"rpn\.head\.cls_logits", "rpn/objectness"),
        (r"rpn\.head\.bbox_pred", "rpn/regressor"),
        (r"roi_heads\.box_head\.fc6", "box/fc1"),
        (r"roi_heads\.box_head\.fc7", "box/fc2"),
        (r"roi_heads\.box_predictor\.cls_score", "box/classifier"),
        (r"roi_heads\.box_predictor\.bbox_pred", "box/regressor"),
        (r"roi_heads\.mask_head\.mask_fcn(\d)", r"mask/conv\1"),
        (r"roi_heads\.mask_head\.(\d)\.0", lambda match: f"mask/conv{int(match[1]) + 1}"),
        (r"roi_heads\.mask_predictor\.conv5_mask", lambda _: Transposed("mask/up")),
        (r"roi_heads\.mask_predictor\.mask_fcn_logits", "mask/classifier"),
    ]
