"""Objects as centres and offsets: the targets of Panoptic-DeepLab, and the way back to masks.

Cheng, Collins, Zhu, Liu, Huang, Adam, Chen, CVPR 2020, arXiv:1911.10194, section 3. All
shapes are static: objects fill slots, what is beyond them is left out. Coordinates are those of
pixel centres, (row, column), in pixels. Nothing here has a gradient.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxseg.ops.metrics import histograms
from jaxseg.ops.panoptic_quality import STEP, VOID


def targets(
    masks: jax.Array, there: jax.Array, sigma: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What the network shall say of the objects masks [B,N,H,W], those of the slots `there` [B,N].

    Returns
        heat: float32 [B,H,W], 1 at each object's centre of mass (rounded to a pixel) and a Gaussian
            of `sigma` pixels around it, cut off beyond 3 sigma + 1; the maximum where two meet;
        offset: float32 [B,H,W,2], from each pixel to the centre of mass of its object; 0 elsewhere;
        owner: int32 [B,H,W], the slot of its object, the first where masks overlap; -1 elsewhere;
        area: int32 [B,N], pixels of each mask.
    """
    b, n, h, w = masks.shape
    masks = (masks != 0) & there[..., None, None]
    rows, columns = masks.sum(3, dtype=jnp.int32), masks.sum(2, dtype=jnp.int32)
    area = rows.sum(2)
    share = 1 / jnp.maximum(area, 1)[..., None]
    y = (rows * share * jnp.arange(h)).sum(2)  # [B,N]
    x = (columns * share * jnp.arange(w)).sum(2)

    def bell(centre: jax.Array, size: int) -> jax.Array:
        away = jnp.arange(size) - jnp.round(centre)[..., None]
        near = jnp.abs(away) <= 3 * sigma + 1
        return jnp.where(near, jnp.exp(-(away**2) / (2 * sigma**2)), 0)

    alive = (area > 0)[..., None]
    heat = ((bell(y, h) * alive)[..., None] * bell(x, w)[:, :, None]).max(1)

    owner = jnp.where(masks.any(1), jnp.argmax(masks, 1), -1).astype(jnp.int32)
    own = owner[:, None] == jnp.arange(n)[:, None, None]  # read by sums only: nothing is stored
    offset = [
        jnp.where(own, (centre[..., None, None] - place), 0).sum(1)
        for centre, place in ((y, jnp.arange(h)[:, None]), (x, jnp.arange(w)))
    ]
    return heat, jnp.stack(offset, axis=-1), owner, area


def peaks(
    heat: jax.Array, window: int, threshold: float, count: int
) -> tuple[jax.Array, jax.Array]:
    """The highest maxima of heat [B,H,W]: (centres int32 [B,count,2], scores float32 [B,count]).

    A maximum is above `threshold` and not below any pixel of the window x window pixels around it
    (an odd number). Sorted, best first; of equal ones the first in row-major order. Empty slots
    have score 0.
    """
    heat = heat.astype(jnp.float32)
    b, h, w = heat.shape
    most = heat
    for size in ((1, window, 1), (1, 1, window)):
        most = lax.reduce_window(most, -jnp.inf, lax.max, size, (1, 1, 1), "SAME")
    found = jnp.where((heat == most) & (heat > threshold), heat, 0).reshape(b, h * w)
    found = jnp.pad(found, ((0, 0), (0, max(0, count - h * w))))
    scores, place = lax.top_k(found, count)
    return jnp.stack([place // w, place % w], axis=-1), scores


def group(offset: jax.Array, centres: jax.Array, there: jax.Array) -> jax.Array:
    """The centre nearest to where each pixel points: int32 [B,H,W], -1 without any centre.

    offset [B,H,W,2]; centres [B,M,2]; there: bool [B,M], its True slots first. Of equally near
    centres the first.
    """
    b, h, w, _ = offset.shape
    y = offset[..., 0].astype(jnp.float32) + jnp.arange(h)[:, None]
    x = offset[..., 1].astype(jnp.float32) + jnp.arange(w)
    start = (jnp.full((b, h, w), jnp.inf), jnp.full((b, h, w), -1, jnp.int32))

    def nearer(m: jax.Array, best: tuple) -> tuple:
        at = centres[:, m, :, None, None].astype(jnp.float32)
        distance = (y - at[:, 0]) ** 2 + (x - at[:, 1]) ** 2
        closer = there[:, m, None, None] & (distance < best[0])
        return jnp.where(closer, distance, best[0]), jnp.where(closer, m, best[1])

    # As many turns as the fullest image has centres, and no array [B,M,H,W].
    return lax.fori_loop(0, there.sum(1).max(), nearer, start)[1]


def votes(owner: jax.Array, semantic: jax.Array, count: int, classes: int) -> jax.Array:
    """int32 [B,count,classes]: the pixels of each class in each object; owner -1 is nobody's."""
    cells = histograms(owner * classes + semantic, owner >= 0, count * classes)
    return cells.reshape(-1, count, classes)


def means(values: jax.Array, owner: jax.Array, count: int) -> jax.Array:
    """float32 [B,count]: the mean of values [B,H,W] over each object's pixels; 0 without any."""

    def sums(values: jax.Array, owner: jax.Array) -> jax.Array:
        place = jnp.where(owner < 0, count, owner).ravel()
        return jnp.zeros(count + 1).at[place].add(values.ravel())[:count]

    total, pixels = jax.vmap(sums)(values, owner), jax.vmap(sums)(jnp.ones_like(values), owner)
    return total / jnp.maximum(pixels, 1)


def merge(
    semantic: jax.Array, owner: jax.Array, classes: jax.Array, is_thing: jax.Array
) -> jax.Array:
    """The panoptic map int32 [B,H,W]: class id * 1000 + number of the object, 255000 = void.

    A pixel with an owner is of class classes [B,M] of that slot, and the number is the slot's, from
    1; fewer than 1000. Any other keeps its semantic class [B,H,W] with the number 0, unless that is
    a thing (`is_thing` bool [K]): those are void.
    """
    stuff = jnp.where(is_thing[semantic], VOID, semantic * STEP)
    slot = jnp.maximum(owner, 0).reshape(len(owner), -1)
    owned = jnp.take_along_axis(classes, slot, 1).reshape(owner.shape) * STEP + owner + 1
    return jnp.where(owner >= 0, owned, stuff).astype(jnp.int32)
