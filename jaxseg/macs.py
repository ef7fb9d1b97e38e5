"""What a forward pass multiplies, counted on its traced program."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters.partial_eval import dce_jaxpr

from jaxseg.backbones.layers import UpConv
from jaxseg.models.fcn import Deconv
from jaxseg.optim import path_of


def count_macs(
    model: nn.Module, variables: Any, image: jax.ShapeDtypeStruct, without: str = ""
) -> tuple[int, Any]:
    """(multiply-accumulates of all convolutions, outputs' shapes) for one forward pass.

    Every layer with a kernel multiplies all of it at each position: of its output, or of its input
    where it is a transposed convolution. Biases, norms, poolings and resizing are not counted, as
    is usual in the field; nor are layers that no output needs, where `without` names, by its
    beginning, the outputs that do not matter.
    """
    multiplied = {}

    def count(run: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        y = run(*args, **kwargs)
        module = context.module
        if context.method_name == "__call__" and module.has_variable("params", "kernel"):
            kernel = module.get_variable("params", "kernel")
            positions = args[0] if isinstance(module, (UpConv, Deconv)) else y
            tag = f"layer {len(multiplied)}"
            multiplied[tag] = kernel.size * int(np.prod(positions.shape[:-1]))
            y = checkpoint_name(y, tag)  # a mark that stays while the value is needed
        return y

    def forward(variables: Any, image: jax.Array) -> Any:
        with nn.intercept_methods(count):
            return model.apply(variables, image, train=False)

    traced, outputs = jax.make_jaxpr(forward, return_shape=True)(variables, image)
    wanted = [
        not (without and path_of(path).startswith(without))
        for path, _ in jax.tree_util.tree_leaves_with_path(outputs)
    ]
    needed, _ = dce_jaxpr(traced.jaxpr, wanted)
    tags = [e.params["name"] for e in needed.eqns if e.primitive.name == "name"]
    return sum(multiplied[tag] for tag in tags), outputs
