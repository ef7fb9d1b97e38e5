"""Rematerialisation: the backward pass computes the inside of a block again instead of keeping it.

Of a residual unit, or of a convolution with its norm outside of one, only the input is kept, and of
the loss only the logits. A step then takes a third more arithmetic, one more forward pass.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from jaxseg.backbones import mobilenet, resnet, xception
from jaxseg.backbones.layers import ConvNorm, SeparableConvNorm

UNITS = (resnet.Basic, resnet.Bottleneck, mobilenet.InvertedResidual, xception.Module)
BLOCKS = (*UNITS, ConvNorm, SeparableConvNorm)


def passes(train: ConfigDict, apply: Callable, loss: Callable) -> tuple[int, Callable, Callable]:
    """(parts of the batch that follow each other, `Model.apply`, loss(outputs, batch)) as
    train.accumulate, accumulate_norm and remat ask.

    Norms that see the whole batch need every layer's output for all of it before the next layer
    starts. So then the parts do not follow each other: the batch goes through at once, and what is
    kept of it are the inputs of its blocks.
    """
    together = train.accumulate > 1 and train.accumulate_norm == "batch"
    if train.remat == "none" and not together:
        return train.accumulate, apply, loss

    def run(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(_Blocks()):
            return apply(*args, **kwargs)

    return 1 if together else train.accumulate, run, jax.checkpoint(loss)


class _Blocks:
    """Intercepts the outermost blocks: those inside are computed again with them."""

    def __init__(self):
        self.inside = False

    def __call__(
        self, run: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        block = isinstance(context.module, BLOCKS) and context.method_name == "__call__"
        if self.inside or not block:
            return run(*args, **kwargs)
        x, *static = args
        self.inside = True
        try:
            return nn.remat(lambda module, x: module(x, *static, **kwargs))(context.module, x)
        finally:
            self.inside = False
