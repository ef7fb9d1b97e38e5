"""The verb `describe`: what a network is made of and costs, without data and without a run."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from jaxseg import models, sharding
from jaxseg.config import default
from jaxseg.errors import InputError
from jaxseg.macs import count_macs
from jaxseg.optim import make_optimizer, path_of
from jaxseg.remat import passes
from jaxseg.train import TrainState, init_state, load_variables


def describe(
    config: ConfigDict | None,
    workdir: Path | None,
    size: tuple[int, int] | None,
    as_json: bool,
    budget: int = 0,
) -> int:
    """Prints the facts of a config, or of the run in `workdir`; returns the exit code.

    budget: bytes of a device, for the largest batch that fits.
    """
    run = {}
    if config is None:
        config, _, _, step, digest = load_variables(workdir)
        run = {"step": step, "fingerprint": digest}
    facts = {**run, **network_facts(config, size or config.data.crop, budget)}
    if as_json:
        print(json.dumps(facts))
        return 0
    for key, value in facts.items():
        if isinstance(value, dict):
            value = "  ".join(f"{k} {v}" for k, v in value.items())
        print(f"{key:20} {value:,}" if isinstance(value, int) else f"{key:20} {value}")
    return 0


def network_facts(config: ConfigDict, size: tuple[int, int], budget: int = 0) -> dict[str, Any]:
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
        **device_facts(config, model, loss, budget),
    }


def device_facts(config: ConfigDict, model: nn.Module, loss: Any, budget: int) -> dict[str, Any]:
    """Bytes that a training step needs: state, gradients, and what the backward pass keeps.

    `train_memory_bytes` is for one device; where a mesh or a budget is asked for,
    `device_memory_bytes` for each of the mesh, which need not exist, and `largest_batch` for the
    largest that fits the budget of bytes. The kept activations are those of the traced program,
    before the compiler fuses any: an estimate.
    """
    state, kept = step_memory(config, model, loss)
    follow, _, _ = passes(config.train, model.apply, loss)
    batch, alone = config.train.batch, AbstractMesh((1, 1, 1), sharding.AXES)
    facts = {"train_memory_bytes": _held(state, alone) + kept(batch // follow)}
    if config.mesh == default().mesh and not budget:
        return facts
    mesh = mesh_to_be(config.mesh)
    one, two, parts = kept(1), kept(2), sharding.batch_parts(mesh)
    image = -(-(two - one) // mesh.shape["space"])
    fixed = _held(state, mesh) + 2 * one - two
    images = -(-batch // (parts * follow))  # of a part of the batch, on a device
    facts |= {"mesh": dict(mesh.shape), "device_memory_bytes": fixed + images * image}
    if budget:
        fitting = max(0, (budget - fixed) // image) * parts * follow
        facts |= {"budget_bytes": budget, "largest_batch": fitting}
    return facts


def step_memory(
    config: ConfigDict, model: nn.Module, loss: Any
) -> tuple[TrainState, Callable[[int], int]]:
    """(shapes of the state, kept(images): bytes of so many images and what is kept of them)."""
    dtype = config.train.compute_dtype
    shapes = (*config.data.crop, config.data.channels)
    one = jax.ShapeDtypeStruct((1, *shapes), jnp.float32)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), one)
    tx = make_optimizer(config.optim, config.train.steps, variables["params"])
    state = jax.eval_shape(partial(init_state, config, model, tx))
    _, apply, loss = passes(config.train, model.apply, loss)

    def residuals(params: Any, batch: dict[str, jax.Array]) -> Any:
        def objective(params: Any) -> jax.Array:
            rest = {k: v for k, v in variables.items() if k != "params"}
            rest = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rest)
            cast = jax.tree.map(lambda p: p.astype(dtype), params)
            rngs = {"dropout": jax.random.key(0)}
            given = (batch["image"], *(model.inputs(batch) if hasattr(model, "inputs") else ()))
            outputs, _ = apply(
                {"params": cast, **rest}, *given, train=True, rngs=rngs, mutable=["batch_stats"]
            )
            return loss(outputs, batch)[0]

        return jax.vjp(objective, params)[1]

    def kept(images: int) -> int:
        shape = (images, *config.data.crop)
        batch = {
            "image": jax.ShapeDtypeStruct((images, *shapes), dtype),
            "label": jax.ShapeDtypeStruct(shape, jnp.int32),
            **object_slots(shape, config.data.objects),
        }
        held = jax.tree.leaves((batch, jax.eval_shape(residuals, state.params, batch)))
        return sum(x.size * x.dtype.itemsize for x in held)

    return state, kept


def _held(state: TrainState, mesh: AbstractMesh) -> int:
    """Bytes of the state and of the gradients on a device of the mesh."""
    places = sharding.state_sharding(state, mesh)

    def size(x: jax.ShapeDtypeStruct, place: jax.sharding.NamedSharding) -> int:
        return math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize

    sizes = jax.tree.map(size, state, places)
    return sum(jax.tree.leaves(sizes)) + sum(jax.tree.leaves(sizes.params))


def mesh_to_be(mesh: ConfigDict) -> AbstractMesh:
    """The mesh of a config, of devices that need not be here; data=-1 takes what is left of those
    that are. Raises InputError for sizes below 1."""
    fsdp, space = mesh.fsdp, mesh.space
    if min(fsdp, space) < 1 or mesh.data < -1 or not mesh.data:
        raise InputError(f"mesh has data={mesh.data}, fsdp={fsdp}, space={space}: needs 1 or more")
    data = max(1, jax.device_count() // (fsdp * space)) if mesh.data == -1 else mesh.data
    return AbstractMesh((data, fsdp, space), sharding.AXES)


def object_slots(shape: tuple[int, ...], count: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What a batch of `shape` [B,H,W] has for `count` objects, see `pipeline.train_batches`."""
    if not count:
        return {}
    slots = (shape[0], count)
    return {
        "masks": jax.ShapeDtypeStruct((*slots, *shape[1:]), jnp.uint8),
        "classes": jax.ShapeDtypeStruct(slots, jnp.int32),
        "boxes": jax.ShapeDtypeStruct((*slots, 4), jnp.float32),
        "crowd": jax.ShapeDtypeStruct(slots, jnp.bool_),
    }
