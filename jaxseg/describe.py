"""The verb `describe`: what a network is made of and costs, without data and without a run."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters.partial_eval import dce_jaxpr
from ml_collections import ConfigDict

from jaxseg import models
from jaxseg.backbones.layers import UpConv
from jaxseg.models.fcn import Deconv
from jaxseg.optim import make_optimizer, path_of
from jaxseg.train import init_state, load_variables


def describe(
    config: ConfigDict | None, workdir: Path | None, size: tuple[int, int] | None, as_json: bool
) -> int:
    """Prints the facts of a config, or of the run in `workdir`; returns the exit code."""
    run = {}
    if config is None:
        config, _, _, step, digest = load_variables(workdir)
        run = {"step": step, "fingerprint": digest}
    facts = {**run, **network_facts(config, size or config.data.crop)}
    if as_json:
        print(json.dumps(facts))
        return 0
    for key, value in facts.items():
        if isinstance(value, dict):
            value = "  ".join(f"{k} {v}" for k, v in value.items())
        print(f"{key:20} {value:,}" if isinstance(value, int) else f"{key:20} {value}")
    return 0


def network_facts(config: ConfigDict, size: tuple[int, int]) -> dict[str, Any]:
    """Parameters, multiply-accumulates of one image of `size`, output shapes, memory of a step."""
    model, loss, _ = models.build(config)
    image = jax.ShapeDtypeStruct((1, *size, config.data.channels), jnp.float32)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image)
    params = jax.tree_util.tree_leaves_with_path(variables["params"])
    aux = sum(x.size for path, x in params if path_of(path).startswith("aux"))
    total = sum(x.size for _, x in params)
    macs, outputs = count_macs(model, variables, image)
    return {
        "model": config.model.name,
        "params": total,
        "params_without_aux": total - aux,
        "size": list(size),
        "macs": macs,
        "macs_without_aux": count_macs(model, variables, image, without="aux")[0],
        "output_stride": model.output_stride,
        "outputs": {k: list(v.shape) for k, v in outputs.items()},
        "train_batch": config.train.batch,
        "train_crop": list(config.data.crop),
        "train_memory_bytes": step_memory(config, model, loss),
    }


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


def step_memory(config: ConfigDict, model: nn.Module, loss: Any) -> int:
    """Bytes that a training step needs: state, gradients, and what the backward pass keeps.

    The kept activations are those of the traced program, before the compiler fuses any: an
    estimate, for the whole batch on one device.
    """
    shape = (config.train.batch // config.train.accumulate, *config.data.crop)
    dtype = config.train.compute_dtype
    image = jax.ShapeDtypeStruct((*shape, config.data.channels), dtype)
    label = jax.ShapeDtypeStruct(shape, jnp.int32)
    one = jax.ShapeDtypeStruct((1, *image.shape[1:]), jnp.float32)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), one)
    tx = make_optimizer(config.optim, config.train.steps, variables["params"])
    state = jax.eval_shape(partial(init_state, config, model, tx))

    def residuals(params: Any, image: jax.Array, label: jax.Array) -> Any:
        def objective(params: Any) -> jax.Array:
            rest = {k: v for k, v in variables.items() if k != "params"}
            rest = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rest)
            cast = jax.tree.map(lambda p: p.astype(dtype), params)
            rngs = {"dropout": jax.random.key(0)}
            outputs, _ = model.apply(
                {"params": cast, **rest}, image, train=True, rngs=rngs, mutable=["batch_stats"]
            )
            return loss(outputs, {"image": image, "label": label})[0]

        return jax.vjp(objective, params)[1]

    kept = jax.eval_shape(residuals, state.params, image, label)

    def size(tree: Any) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    return size(state) + size(state.params) + size(kept) + size((image, label))
