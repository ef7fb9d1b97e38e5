"""Augmentation on the device: scale, crop, flips and colours of a batch, inside the training step.

Scale, crop, flip and padding are together one product with two matrices an image, rows @ image @
columns, which suits a matrix unit and has static shapes. The definitions are those of the host's
`data/transforms.py` and `data/pixels.py`: the same numbers give the same example, but for rounding.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

IGNORE = 255


class Draw(NamedTuple):
    """The random numbers of one example."""

    factor: jax.Array  # of the resize
    start: jax.Array  # int32 [2], top and left of the window, pixels of the image
    flip: jax.Array  # bool [2]: top-bottom, left-right
    brightness: jax.Array  # added, of 0..255
    contrast: jax.Array  # factor of every value
    saturation: jax.Array  # factor
    hue: jax.Array  # degrees
    contrast_first: jax.Array  # bool: before saturation and hue


def augment(
    batch: dict[str, jax.Array],
    rng: jax.Array,
    *,
    crop: tuple[int, int],
    mean: Sequence[float],
    scale: tuple[float, float] = (1.0, 1.0),
    scale_step: float = 0.0,
    flip: bool = True,
    flip_vertical: bool = False,
    photometric: bool = False,
    hue: float = 18.0,
) -> dict[str, jax.Array]:
    """A batch of whole images -> one of crops; `size` and `position` are used up, other keys stay.

    image: [B,H,W,C] uint8 or float 0..255. label: int32 [B,H,W]. size: int32 [B,2], the part of
    H, W that is the image. position: uint32 [B], of the examples in the stream. The options are
    those of `config.data`. An example is drawn from rng and its position alone, whichever process
    holds it. Beyond the image, crops have the mean and label 255.
    """
    drawn = partial(
        draw,
        crop=crop,
        scale=scale,
        scale_step=scale_step,
        flips=(flip_vertical, flip),
        photometric=photometric,
        hue=hue,
    )

    def one(position: jax.Array, image: jax.Array, label: jax.Array, size: jax.Array) -> tuple:
        numbers = drawn(jax.random.fold_in(rng, position), size)
        image, label = place(image, label, size, numbers, crop, mean)
        return distort(image, numbers) if photometric else image, label

    used = ("position", "image", "label", "size")
    image, label = jax.vmap(one)(*(batch[key] for key in used))
    rest = {key: value for key, value in batch.items() if key not in used}
    return {"image": image, "label": label, **rest}


def draw(
    key: jax.Array,
    size: jax.Array,
    *,
    crop: tuple[int, int],
    scale: tuple[float, float],
    scale_step: float,
    flips: tuple[bool, bool],
    photometric: bool,
    hue: float = 18.0,
) -> Draw:
    """The numbers of one example of `size` (height, width)."""
    u = jax.random.uniform(key, (14,))
    if scale_step:
        steps = math.floor((scale[1] - scale[0]) / scale_step + 1e-6) + 1
        factor = scale[0] + scale_step * jnp.floor(u[0] * steps)
    else:
        factor = scale[0] + u[0] * (scale[1] - scale[0])
    filled, factors = scaled_size(size, factor, crop)
    room = jnp.floor(size - filled / factors + 1e-4)
    start = jnp.minimum(jnp.floor(u[1:3] * (room + 1)), room).astype(jnp.int32)
    flip = (u[3:5] < 0.5) & jnp.array(flips)
    on = (u[5:10] < 0.5) & photometric
    low, high = jnp.array([-32, 0.5, 0.5, -hue]), jnp.array([32, 1.5, 1.5, hue])
    neutral = jnp.array([0.0, 1.0, 1.0, 0.0])
    colours = jnp.where(on[:4], low + u[10:] * (high - low), neutral)
    return Draw(factor, start, flip, *colours, on[4])


def scaled_size(
    size: jax.Array, factor: jax.Array, crop: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """How much of the crop an image of `size` fills, int32 [2], and its factors along both axes:
    images that are seen whole are fitted to whole pixels."""
    whole = jnp.maximum(1, jnp.round(size * factor)).astype(jnp.int32)
    filled = jnp.minimum(whole, jnp.array(crop))
    return filled, jnp.maximum(factor, filled / size)


def place(
    image: jax.Array,
    label: jax.Array,
    size: jax.Array,
    numbers: Draw,
    crop: tuple[int, int],
    mean: Sequence[float],
) -> tuple[jax.Array, jax.Array]:
    """image [H,W,C], label [H,W] -> the crop of both that `numbers` says."""
    filled, factors = scaled_size(size, numbers.factor, crop)
    wide = factors.min() < 0.5  # below half the size, bilinear would skip pixels
    maps = []
    for axis, (n, want) in enumerate(zip(label.shape, crop, strict=True)):
        known = (size[axis], filled[axis], numbers.start[axis], factors[axis])
        parts = _axis(n, want, *known, wide)
        maps.append([jnp.where(numbers.flip[axis], part[::-1], part) for part in parts])
    (rows, y, inside_y), (columns, x, inside_x) = maps
    # HIGHEST: accelerators would round the pixels and the weights to fewer bits.
    precision = jax.lax.Precision.HIGHEST
    out = jnp.einsum("yh,hwc->ywc", rows, image.astype(jnp.float32), precision=precision)
    out = jnp.einsum("xw,ywc->yxc", columns, out, precision=precision)
    inside = inside_y[:, None] & inside_x[None, :]
    out = jnp.where(inside[..., None], out, jnp.round(jnp.array(mean, jnp.float32)))
    label = jnp.where(inside, label[y][:, x], IGNORE)
    return _like(out, image.dtype), label


def _axis(
    n: int,
    want: int,
    size: jax.Array,
    filled: jax.Array,
    start: jax.Array,
    factor: jax.Array,
    wide: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Along one axis of n pixels, for `want` outputs: bilinear weights [want,n], the nearest pixel
    [want], and which outputs are inside the image.

    wide: the weights are a triangle of width 2 / factor instead.
    """
    at = (jnp.arange(want) + 0.5) / factor
    last = jnp.minimum(size, start + jnp.ceil(filled / factor - 1e-4).astype(jnp.int32)) - 1
    centre = start + at - 0.5
    width = jnp.where(wide, 1 / factor, 1.0)
    centre = jnp.where(wide, centre, jnp.clip(centre, start, last))
    pixel = jnp.arange(n)
    weights = jnp.maximum(0, 1 - jnp.abs(centre[:, None] - pixel) / width)
    weights = jnp.where((pixel >= start) & (pixel <= last), weights, 0)
    weights = weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 1e-6)
    nearest = jnp.minimum(start + jnp.floor(at + 1e-4).astype(jnp.int32), last)
    return weights, nearest, jnp.arange(want) < filled


def distort(image: jax.Array, numbers: Draw) -> jax.Array:
    """image [H,W,C] with the colours of `numbers`; saturation and hue are of 3 channels."""
    x = jnp.clip(image.astype(jnp.float32) + numbers.brightness, 0, 255)
    contrast = jnp.where(numbers.contrast_first, numbers.contrast, 1.0)
    x = _rounded(jnp.clip(x * contrast, 0, 255), image.dtype)
    if image.shape[2] == 3:
        x = _rounded(turn_colours(x, numbers.saturation, numbers.hue), image.dtype)
    contrast = jnp.where(numbers.contrast_first, 1.0, numbers.contrast)
    return _like(jnp.clip(x * contrast, 0, 255), image.dtype)


def turn_colours(x: jax.Array, saturation: jax.Array, hue: jax.Array) -> jax.Array:
    """RGB float32 [...,3], its HSV saturation multiplied (at most 1), its hue turned by degrees."""
    red, green, blue = x[..., 0], x[..., 1], x[..., 2]
    value = x.max(-1)
    spread = value - x.min(-1)
    safe = jnp.where(spread > 0, spread, 1)
    sector = jnp.where(  # the hue in sixths of a turn, -1 .. 5
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    spread = jnp.minimum(spread * saturation, value)
    k = (sector[..., None] + jnp.array([5.0, 3.0, 1.0]) + hue / 60) % 6
    return value[..., None] - spread[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def _rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """float32 x, at the whole numbers that bytes would hold."""
    return jnp.round(x) if dtype == jnp.uint8 else x


def _like(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return _rounded(x, dtype).astype(dtype)
