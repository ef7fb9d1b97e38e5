"""torchvision.models.segmentation."""

from jaxseg.weights.imagenet import torchvision as backbone
from jaxseg.weights.names import Rule, pair

# Name at the source -> experiment that builds the same network.
ARCHS = {
    "fcn_resnet50": "fcn.py:recipe=torchvision,backbone=resnet50",
    "fcn_resnet101": "fcn.py:recipe=torchvision,backbone=resnet101",
    "deeplabv3_resnet50": "deeplabv3.py:recipe=torchvision,backbone=resnet50",
    "deeplabv3_resnet101": "deeplabv3.py:recipe=torchvision,backbone=resnet101",
    "deeplabv3_mobilenet_v3_large": "deeplabv3.py:recipe=torchvision,backbone=mobilenetv3_large",
}
CLASSIFIER = ("classifier.4", "aux_classifier.4", "aux_classifier.1")
IGNORED = r"(?!)"  # a regex of names that a file may hold for nothing here: none


def rules(arch: str) -> list[Rule]:
    """How the modules of a network are called here."""
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
