"""The device mesh, and which axis of which array lies along which of its axes.

`data` splits the batch; `fsdp` splits the batch too, and large parameters with their optimizer
state; `space` splits the rows of images. Everything runs under `jax.jit` with these shardings, so
the compiler inserts the collectives, and batch norm sees the global batch without further ado.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from jaxseg.errors import InputError

AXES = ("data", "fsdp", "space")
SMALLEST_SHARDED = 2**16  # elements; below this a gather costs more than the memory it saves


def make_mesh(mesh: ConfigDict) -> Mesh:
    """A mesh of all devices with the sizes of `config.mesh`; data=-1 takes what is left.

    Raises InputError where the sizes do not multiply to the number of devices.
    """
    sizes, devices = [mesh[axis] for axis in AXES], jax.device_count()
    if sizes[0] == -1 and min(sizes[1:]) > 0:
        sizes[0] = devices // (sizes[1] * sizes[2])
    if min(sizes) < 1 or np.prod(sizes) != devices:
        got = ", ".join(f"{axis}={mesh[axis]}" for axis in AXES)
        raise InputError(
            f"mesh {got} does not multiply to the {devices} devices here: "
            "set mesh.fsdp and mesh.space to divisors of it and mesh.data=-1"
        )
    # make_mesh defaults to Explicit axes, under which Linen convolutions do not trace.
    made = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    hosts = np.vectorize(lambda device: device.process_index)(made.devices)
    if (hosts != hosts[..., :1]).any():
        raise InputError(
            f"mesh.space is {sizes[2]}, over devices of several hosts, of which each reads whole "
            f"images: needs a divisor of {jax.local_device_count()}, the devices of a host"
        )
    return made


def over_rows(mesh: Mesh) -> Mesh:
    """The same devices, all of which share the rows of an image."""
    return Mesh(mesh.devices.reshape(1, 1, -1), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def traced_on(mesh: Mesh, function: Callable) -> Callable:
    """The function, with the mesh in sight while it is traced: by it, `ops` choose forms in which
    shared rows stay where they are."""

    @wraps(getattr(function, "func", function))
    def run(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return run


def spread_rows(x: jax.Array, mesh: Mesh) -> jax.Array:
    """Inside jit: images [B,H,W,C] of any size, examples over data and fsdp where these divide
    them, rows over space."""
    batch = ("data", "fsdp") if x.shape[0] % batch_parts(mesh) == 0 else None
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(batch, "space")))


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts the batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(batch: dict[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Examples over data and fsdp; the rows of `image` [B,H,W,C] and `label` [B,H,W] over space,
    where it divides them: images to evaluate may have any size."""

    def spec(name: str) -> P:
        rows = name in ("image", "label") and batch[name].shape[1] % mesh.shape["space"] == 0
        return P(("data", "fsdp"), "space") if rows else P(("data", "fsdp"))

    return {name: NamedSharding(mesh, spec(name)) for name in batch}


def state_sharding(shapes: Any, mesh: Mesh) -> Any:
    """For a tree of shapes: a large array is split over fsdp along its longest divisible axis."""
    parts = mesh.shape["fsdp"]

    def rule(array: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = [i for i, n in enumerate(array.shape) if n % parts == 0]
        if parts == 1 or array.size < SMALLEST_SHARDED or not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda i: (array.shape[i], i))
        return NamedSharding(
            mesh, P(*("fsdp" if i == longest else None for i in range(array.ndim)))
        )

    return jax.tree.map(rule, shapes)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process' part of a batch, as global arrays on the mesh."""
    shardings = batch_sharding(batch, mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, shardings)
    return jax.tree.map(lambda x, s: jax.make_array_from_process_local_data(s, x), batch, shardings)
