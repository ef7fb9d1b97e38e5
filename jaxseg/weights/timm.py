"""timm 1.0: ImageNet classifiers. They have no head that segments: DeepLab v3+'s, new, is added."""

from jaxseg.weights import imagenet
from jaxseg.weights.names import Rule

BACKBONES = {
    **{f"resnet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)},
    **{f"resnet{depth}d": f"resnet{depth},stem=v1d" for depth in (50, 101, 152)},
    **{f"xception{depth}": f"xception{depth}" for depth in (41, 65, 71)},
    "mobilenetv2_100": "mobilenetv2",
    "mobilenetv3_large_100": "mobilenetv3_large",
}
# Name at the source -> experiment with the same backbone.
ARCHS = {name: f"deeplabv3plus.py:recipe=timm,backbone={ours}" for name, ours in BACKBONES.items()}
CLASSIFIER = ()
IGNORED = imagenet.CLASSIFIERS


def rules(arch: str) -> list[Rule]:
    """How the modules of a backbone are called here."""
    return imagenet.rules(BACKBONES[arch].split(",")[0])
