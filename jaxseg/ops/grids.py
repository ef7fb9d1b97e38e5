"""SOLO's grids: which cell answers for which object (Wang et al., ECCV 2020, arXiv:1912.04488).

An image is divided into S x S cells. The cells under the centre of an object's mass are to say its
category and to draw its mask. All shapes are fixed: empty slots of objects and of positives are
marked, never left out.
"""

import jax
import jax.numpy as jnp


def coordinates(x: jax.Array) -> jax.Array:
    """CoordConv: [B,h,w,C] -> [B,h,w,2], each pixel's column and row, both in -1 .. 1.

    Liu et al., NeurIPS 2018, arXiv:1807.03247; section 3.2 of SOLO.
    """
    rows, cols = (jnp.linspace(-1, 1, n, dtype=x.dtype) for n in x.shape[1:3])
    grid = jnp.stack(jnp.meshgrid(cols, rows), -1)
    return jnp.broadcast_to(grid, (x.shape[0], *grid.shape))


def mass_centres(masks: jax.Array) -> jax.Array:
    """masks [...,H,W], 0 or 1 -> float32 [...,2]: mean row and column, pixels; 0 where empty."""
    rows, cols = masks.sum(-1, dtype=jnp.float32), masks.sum(-2, dtype=jnp.float32)
    area = jnp.maximum(rows.sum(-1), 1)
    y = (rows * jnp.arange(rows.shape[-1])).sum(-1) / area
    x = (cols * jnp.arange(cols.shape[-1])).sum(-1) / area
    return jnp.stack([y, x], -1)


def assign(
    centres: jax.Array,
    boxes: jax.Array,
    counted: jax.Array,
    grid: int,
    scales: tuple[float, float],
    size: tuple[int, int],
    centre: float = 0.2,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The cells of one grid that objects are to fill. Section 3.3.1.

    An object takes part where the square root of its box's area is within `scales`. It takes the
    cells, 3 x 3 at most, that its centre region touches: `centre` times its box, around its mass.

    centres: float32 [B,N,2]. boxes: [B,N,4], y0, x0, y1, x1 in pixels, half open. counted: bool
    [B,N]. size: (H, W) of the image, pixels.
    Returns owner int32 [B,S,S], the object of each cell, the last of several, or -1; cells int32
    [B,N,9], numbers of cells; positive bool [B,N,9], which of them the object takes.
    """
    sides = (boxes[..., 2:] - boxes[..., :2]).astype(jnp.float32)  # [B,N,2]
    scale = jnp.sqrt(sides.prod(-1))
    here = counted & (scale >= scales[0]) & (scale <= scales[1])

    def cell(at: jax.Array) -> jax.Array:
        return jnp.floor(at * grid / jnp.array(size, jnp.float32)).astype(jnp.int32)

    middle, half = cell(centres), sides * centre / 2
    first = jnp.maximum(jnp.clip(cell(centres - half), 0), middle - 1)  # [B,N,2]
    last = jnp.minimum(jnp.clip(cell(centres + half), max=grid - 1), middle + 1)

    def within(at: jax.Array) -> jax.Array:
        """[B,N,n,2] or [n,1] of rows and columns -> bool [B,N,n,2]."""
        return (at >= first[..., None, :]) & (at <= last[..., None, :])

    near = middle[..., None, :] + jnp.arange(-1, 2)[:, None]  # [B,N,3,2]
    inside = within(near)
    cells = near[..., :, None, 0] * grid + near[..., None, :, 1]
    positive = inside[..., :, None, 0] & inside[..., None, :, 1] & here[..., None, None]

    inside = within(jnp.arange(grid)[:, None])  # [B,N,S,2]
    covers = inside[..., :, None, 0] & inside[..., None, :, 1] & here[..., None, None]
    number = jnp.arange(boxes.shape[1], dtype=jnp.int32)[:, None, None]
    owner = jnp.where(covers, number, -1).max(1, initial=-1)
    shape = (*boxes.shape[:2], 9)
    return owner, jnp.where(positive, cells, 0).reshape(shape), positive.reshape(shape)


def own(owner: jax.Array, cells: jax.Array, positive: jax.Array) -> jax.Array:
    """`positive` [B,N,9] of `assign` without the cells that a later object took."""
    batch, objects = cells.shape[:2]
    taker = jnp.take_along_axis(owner.reshape(batch, -1), cells.reshape(batch, -1), 1)
    return positive & (taker.reshape(cells.shape) == jnp.arange(objects)[:, None])


def choose(flags: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """The places of the true ones of flags bool [B,M], in a fixed number of slots.

    Returns places int32 [B,slots] and used bool [B,slots]. Where more are true, they are thinned
    evenly, so that no object and no level is favoured.
    """
    counts = jnp.cumsum(flags, -1, dtype=jnp.int32)
    total = counts[:, -1:]
    slot = jnp.arange(slots)
    rank = jnp.where(total > slots, slot * total // slots, slot)
    places = jax.vmap(jnp.searchsorted)(counts, rank + 1)
    return jnp.minimum(places, flags.shape[1] - 1), slot < total


def shrink(masks: jax.Array, size: tuple[int, int]) -> jax.Array:
    """masks uint8 [B,N,H,W] -> bool [B,N,h,w]: bilinear at a whole stride, 1 from one half on.

    The stride H / h = W / w is even: of each block, the four pixels around its centre count.
    """
    step = masks.shape[2] // size[0]
    rows = masks[:, :, step // 2 - 1 :: step] + masks[:, :, step // 2 :: step]
    return rows[..., step // 2 - 1 :: step] + rows[..., step // 2 :: step] >= 2
