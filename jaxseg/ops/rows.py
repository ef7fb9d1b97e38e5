"""Arrays whose rows lie on several devices: how many, and rows that move between neighbours.

The compiler partitions every operation by itself. Where an output row needs only rows nearby, it
exchanges a halo; where it cannot tell, it gathers the whole array on every device. The operations
of the second kind ask here whether rows are shared, and then take a form of the first kind.
"""

import jax
import jax.numpy as jnp


def parts() -> int:
    """On how many devices the rows of images lie: the mesh's axis "space", 1 without one.

    Known while a function is traced within `jax.sharding.use_abstract_mesh`.
    """
    return dict(jax.sharding.get_abstract_mesh().shape).get("space", 1)


def shift(x: jax.Array, step: int, axis: int = 1) -> jax.Array:
    """x moved down by `step` pixels of that axis, up where negative; zeros follow.

    A device gets the rows that become its own, however far they come, and no others.
    """
    edges = [(step, -step, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), edges)


def windows(x: jax.Array, low: int, high: int) -> jax.Array:
    """The rows of each device, with `low` of the device above and `high` of the one below.

    [B,h,w,C] -> [B,parts,low+rows+high,w,C], rows = ceil(h / parts) >= low, high; zeros lie beyond
    the image.
    """
    n = parts()
    batch, h, w, channels = x.shape
    rows = -(-h // n)
    x = jnp.pad(x, ((0, 0), (0, n * rows - h), (0, 0), (0, 0)))
    x = x.reshape(batch, n, rows, w, channels)
    above = shift(x[:, :, rows - low :], 1)
    below = shift(x[:, :, :high], -1)
    return jnp.concatenate([above, x, below], axis=2)
