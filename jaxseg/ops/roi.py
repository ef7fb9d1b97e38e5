"""Regions of interest: features and masks cut out of boxes, and masks put back.

RoIAlign (He et al. 2017, arXiv:1703.06870, section 3) reads features at points between pixels,
bilinearly, without rounding a box anywhere. Boxes are as in `ops.boxes`; the functions take one
image, and `jax.vmap` a batch. No gradient goes to the boxes.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.ops.boxes import area, sides

SMALL = 2048  # cells of all levels up to which products are faster than gathering


def level_of(
    boxes: jax.Array, lowest: int = 2, highest: int = 5, canonical: float = 224.0
) -> jax.Array:
    """The pyramid level whose features a box [R,4] gets: int32 [R], lowest .. highest.

    k = floor(4 + log2(sqrt(area) / canonical)), Lin et al. 2017, arXiv:1612.03144, Eq. 1.
    """
    side = jnp.sqrt(jnp.maximum(area(boxes), 1e-12))
    level = jnp.floor(4 + jnp.log2(side / canonical) + 1e-6)  # 1e-6: as the libraries guard 224
    return jnp.clip(level, lowest, highest).astype(jnp.int32)


def roi_align(
    levels: list[jax.Array],
    strides: list[int],
    boxes: jax.Array,
    level: jax.Array,
    size: int,
    samples: int = 2,
    aligned: bool = True,
) -> jax.Array:
    """Features of boxes [R,4]: maps [h,w,C] -> [R,size,size,C], each box from its own level.

    Every bin is the mean of samples x samples points, bilinearly interpolated. level: int32 [R],
    which of `levels`. aligned: pixel i covers i .. i + 1, so its value stands at i + 0.5;
    otherwise values stand at i and a box has at least one cell of its map (the paper's code,
    torchvision). Points more than a cell outside of the map are 0, others take its border.
    """
    boxes = jax.lax.stop_gradient(boxes).astype(jnp.float32)
    shapes = np.array([x.shape[:2] for x in levels])
    if shapes.prod(1).sum() <= SMALL:
        return _by_products(levels, strides, boxes, level, size, samples, aligned)
    scale = 1 / jnp.asarray(strides, jnp.float32)[level]
    extent = jnp.asarray(shapes)[level]  # [R,2]
    start, length = _span(boxes * scale[:, None], aligned)
    rows, row_weights = _taps(start[:, 0], length[:, 0], extent[:, 0], size, samples)
    cols, col_weights = _taps(start[:, 1], length[:, 1], extent[:, 1], size, samples)
    flat = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in levels])
    first = jnp.asarray(np.cumsum([0, *shapes.prod(1)[:-1]]))[level]
    rows = first[:, None, None] + rows * extent[:, 1, None, None]
    total = 0
    for i in range(2 * samples):  # fused into one pass; the points of all at once would be 16 times
        for j in range(2 * samples):
            weight = row_weights[:, :, None, i] * col_weights[:, None, :, j]
            point = flat[rows[:, :, None, i] + cols[:, None, :, j]]
            total += weight[..., None].astype(flat.dtype) * point
    return total


def _by_products(
    levels: list[jax.Array],
    strides: list[int],
    boxes: jax.Array,
    level: jax.Array,
    size: int,
    samples: int,
    aligned: bool,
) -> jax.Array:
    """The same for small maps: rows, then columns, blended by a matrix; no gather, no scatter."""
    total = 0
    for k, (x, stride) in enumerate(zip(levels, strides, strict=True)):
        start, length = _span(boxes / stride, aligned)
        rows, cols = (
            _matrix(*_taps(start[:, a], length[:, a], x.shape[a], size, samples), x.shape[a])
            for a in (0, 1)
        )
        rows = jnp.where((level == k)[:, None, None], rows, 0).astype(x.dtype)
        highest = {"precision": jax.lax.Precision.HIGHEST}
        y = jnp.einsum("rph,hwc->rpwc", rows, x, **highest)
        total += jnp.einsum("rqw,rpwc->rpqc", cols.astype(x.dtype), y, **highest)
    return total


def _span(boxes: jax.Array, aligned: bool) -> tuple[jax.Array, jax.Array]:
    """(start, length) [R,2] of boxes [R,4], in cells."""
    if aligned:
        return boxes[:, :2] - 0.5, sides(boxes)
    return boxes[:, :2], jnp.maximum(sides(boxes), 1)


def _taps(
    start: jax.Array, length: jax.Array, cells: jax.Array | int, size: int, samples: int
) -> tuple[jax.Array, jax.Array]:
    """The cells and weights whose sum is each bin along one axis: both [R,size,2 * samples].

    start, length: [R], in cells; cells: how many there are, of each box or of all.
    """
    cells = jnp.broadcast_to(cells, start.shape)[:, None]
    offset = (np.arange(size * samples) + 0.5) / (size * samples)
    at = start[:, None] + length[:, None] * jnp.asarray(offset, jnp.float32)
    inside = (at >= -1) & (at <= cells)
    at = jnp.clip(at, 0, cells - 1)
    low = jnp.floor(at)
    part = at - low
    index = jnp.stack([low, jnp.minimum(low + 1, cells - 1)], axis=-1).astype(jnp.int32)
    weight = jnp.stack([1 - part, part], axis=-1) * inside[..., None] / samples
    shape = (len(start), size, 2 * samples)
    return index.reshape(shape), weight.reshape(shape)


def _matrix(index: jax.Array, weight: jax.Array, cells: int) -> jax.Array:
    """Taps [R,size,t] as weights of all cells [R,size,cells]."""
    return (weight[..., None] * (index[..., None] == jnp.arange(cells))).sum(-2)


def crop_masks(
    masks: jax.Array,
    index: jax.Array,
    boxes: jax.Array,
    size: int,
    samples: int = 2,
    aligned: bool = True,
) -> jax.Array:
    """The part of a mask inside a box, RoIAligned: masks [N,H,W] -> float32 [R,size,size], 0..1.

    index: int32 [R], the mask of each of boxes [R,4].
    """
    start, length = _span(boxes.astype(jnp.float32), aligned)
    rows, row_weights = _taps(start[:, 0], length[:, 0], masks.shape[1], size, samples)
    cols, col_weights = _taps(start[:, 1], length[:, 1], masks.shape[2], size, samples)
    total, own = 0, index[:, None, None]
    for i in range(2 * samples):
        for j in range(2 * samples):
            point = masks[own, rows[:, :, None, i], cols[:, None, :, j]].astype(jnp.float32)
            total += row_weights[:, :, None, i] * col_weights[:, None, :, j] * point
    return total


def paste(masks: jax.Array, boxes: jax.Array, size: tuple[int, int], whole: bool) -> jax.Array:
    """Masks [M,m,m] stretched over their boxes [M,4], in an image of size (H, W): [M,H,W] float32.

    Bilinear, 0 outside. A pixel takes what stands at its centre (detectron2); with `whole`, boxes
    are grown by a ring of zeros around the mask and cut to whole pixels (the paper's code,
    torchvision).
    """
    side = masks.shape[-1]
    if whole:
        masks = jnp.pad(masks, ((0, 0), (1, 1), (1, 1)))
        centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, sides(boxes) / 2 * (side + 2) / side
        grown = jnp.concatenate([centre - half, centre + half], axis=-1)
        boxes = jnp.trunc(grown) + jnp.array([0, 0, 1, 1])  # the last pixel belongs to it
    rows, cols = (_stretch(boxes[:, a::2], size[a], masks.shape[-1], whole) for a in (0, 1))
    highest = {"precision": jax.lax.Precision.HIGHEST}
    y = jnp.einsum("myp,mpq->myq", rows, masks.astype(jnp.float32), **highest)
    return jnp.einsum("mxq,myq->myx", cols, y, **highest)


def _stretch(span: jax.Array, pixels: int, cells: int, clamp: bool) -> jax.Array:
    """Weights [M,pixels,cells] that stretch cells over span [M,2] (first pixel, end)."""
    first, length = span[:, :1], jnp.maximum(span[:, 1:] - span[:, :1], 1 if clamp else 1e-6)
    at = jnp.arange(pixels) + 0.5 - first  # [M,pixels]
    inside = (at > 0) & (at < length)
    at = at / length * cells - 0.5
    if clamp:
        at = jnp.clip(at, 0, cells - 1)
    hats = jnp.maximum(0, 1 - jnp.abs(at[..., None] - jnp.arange(cells)))
    return jnp.where(inside[..., None], hats, 0) if clamp else hats
