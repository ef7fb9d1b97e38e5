"""Backbones: `Backbone(...)(image, train) -> {"c1": ..., "c5": ...}`, at strides 2, 4, 8, 16, 32.

No stride is above `output_stride`. One file a family; its `VARIANTS` name its members.
"""

from collections.abc import Callable

from jaxseg.backbones import hrnet, mobilenet, resnet, vgg, xception
from jaxseg.errors import unknown

VARIANTS: dict[str, Callable] = {
    **resnet.VARIANTS,
    **vgg.VARIANTS,
    **xception.VARIANTS,
    **mobilenet.VARIANTS,
    **hrnet.VARIANTS,
}


def find(name: str) -> Callable:
    """The constructor of a backbone such as "resnet50". Raises InputError for another name."""
    if name not in VARIANTS:
        raise unknown("backbone", name, VARIANTS)
    return VARIANTS[name]
