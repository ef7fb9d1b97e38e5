"""Windows of a large image: where they lie, and what a network says of them, blended.

All of it has static shapes, under jit: a scan cuts the windows, labels and blends them.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxseg import sharding

Size = tuple[int, int]  # height, width, pixels


def mirror(image: jax.Array, size: Size, before: Size | None = None) -> jax.Array:
    """image [B,h,w,C] grown to `size` by mirroring it at its borders.

    before: how many rows and columns come first; by default half of the new ones.
    """
    new = [n - h for n, h in zip(size, image.shape[1:3], strict=True)]
    before = before or [n // 2 for n in new]
    pads = [(b, n - b) for b, n in zip(before, new, strict=True)]
    return jnp.pad(image, [(0, 0), *pads, (0, 0)], mode="symmetric")


def starts(length: int, crop: int, stride: int) -> np.ndarray:
    """Where windows of `crop` begin on an axis: each `stride`, the last one moved back to the end.

    The rule of PSPNet's and MMSegmentation's code.
    """
    count = 1 + max(0, -(-(length - crop) // stride))
    return np.minimum(np.arange(count) * stride, length - crop)


def axis_shares(length: int, crop: int, stride: int, blend: str) -> tuple[np.ndarray, np.ndarray]:
    """`starts` [n] and each window's share of each of its pixels, float32 [n,crop].

    The shares of a pixel add up to 1. Those of a window are equal, or a Gaussian of standard
    deviation crop / 8 around its centre (nnU-Net). Two axes multiply, as the windows are a grid.
    """
    first = starts(length, crop, stride)
    offset = (np.arange(crop) - (crop - 1) / 2) / (crop / 8)
    bump = np.exp(-(offset**2) / 2) if blend == "gaussian" else np.ones(crop)
    total = np.zeros(length)
    for start in first:
        total[start : start + crop] += bump
    shares = np.stack([bump / total[start : start + crop] for start in first])
    return first, shares.astype(np.float32)


def blended(
    label: Callable[[jax.Array], jax.Array],
    image: jax.Array,
    crop: Size,
    stride: Size,
    inputs: Size,
    ask: ConfigDict,
    mesh: Mesh | None,
    keep: bool,
) -> dict[str, jax.Array]:
    """What `scan` returns of the whole image [B,h,w,C], grown where it is smaller than a window
    and by what windows see around their crop."""
    have = image.shape[1:3]
    covered = tuple(map(max, have, crop))
    image = mirror(image, covered, before=(0, 0))
    image = mirror(image, tuple(n + i - c for n, i, c in zip(covered, inputs, crop, strict=True)))
    grid = [axis_shares(*along, ask.blend) for along in zip(covered, crop, stride, strict=True)]

    columns, batch = len(grid[1][0]), len(image)
    turns = -(-columns * batch // max(ask.batch, batch))
    parts = sharding.batch_parts(mesh) if mesh else 1
    least = parts // math.gcd(parts, batch)  # a group's windows go on all devices
    group = -(-columns // (turns * least)) * least

    def spread(x: jax.Array) -> jax.Array:
        if mesh:
            over = sharding.batch_sharding({"windows": x}, mesh)["windows"]
            x = jax.lax.with_sharding_constraint(x, over)
        return label(x)

    out = scan(spread, image, grid, inputs, crop, group, keep)
    return {k: v if k == "finite" else v[:, : have[0], : have[1]] for k, v in out.items()}


def scan(
    label: Callable[[jax.Array], jax.Array],
    image: jax.Array,
    grid: list[tuple[np.ndarray, np.ndarray]],
    inputs: Size,
    crop: Size,
    group: int,
    keep: bool,
) -> dict[str, jax.Array]:
    """Rows of windows, one after the other, each `group` windows at a time: `semantic` [B,H,W],
    `finite` [B] and, with keep, `scores` [B,H,W,K].

    label: [N,*inputs,C] -> scores [N,*crop,K]. Of the scores only a strip is held, as high as a
    window: each row of windows labels it, and then it moves on; later rows overwrite what they
    cover, so that the last word on a pixel has heard all of its windows.
    """
    (tops, row_shares), (lefts, column_shares) = grid
    batch, *_, channels = image.shape
    size = (tops[-1] + crop[0], lefts[-1] + crop[1])
    steps = np.diff(tops, append=tops[-1])
    fill = -len(lefts) % group  # windows again, whose share is nothing
    lefts = np.pad(lefts, (0, fill), mode="edge").reshape(-1, group)
    column_shares = np.pad(column_shares, ((0, fill), (0, 0))).reshape(-1, group, crop[1])
    example = jax.ShapeDtypeStruct((group * batch, *inputs, channels), image.dtype)
    classes = jax.eval_shape(label, example).shape[-1]

    def add(strip: jax.Array, window: tuple) -> tuple[jax.Array, None]:
        left, scores, share = window
        at = (0, 0, left, 0)
        scores = scores * share[:, :, None] + jax.lax.dynamic_slice(strip, at, scores.shape)
        return jax.lax.dynamic_update_slice(strip, scores, at), None

    def row(carry: tuple, item: tuple) -> tuple[tuple, None]:
        strip, out = carry
        top, step, row_share = item

        def some(strip: jax.Array, columns: tuple) -> tuple[jax.Array, None]:
            lefts, column_shares = columns
            cut = (batch, *inputs, channels)
            seen = jax.lax.map(lambda x: jax.lax.dynamic_slice(image, (0, top, x, 0), cut), lefts)
            scores = label(seen.reshape(example.shape)).reshape(group, batch, *crop, classes)
            shares = row_share[:, None] * column_shares[:, None]  # [group,*crop]
            return jax.lax.scan(add, strip, (lefts, scores, shares))

        strip, _ = jax.lax.scan(some, strip, (lefts, column_shares))
        semantic = jnp.argmax(strip, axis=-1).astype(jnp.int32)
        new = {
            "semantic": jax.lax.dynamic_update_slice(out["semantic"], semantic, (0, top, 0)),
            "finite": out["finite"] & jnp.isfinite(strip).all((1, 2, 3)),
        }
        if keep:
            new["scores"] = jax.lax.dynamic_update_slice(out["scores"], strip, (0, top, 0, 0))
        strip = jnp.pad(strip, [(0, 0), (0, crop[0]), (0, 0), (0, 0)])
        strip = jax.lax.dynamic_slice_in_dim(strip, step, crop[0], axis=1)
        return (strip, new), None

    strip = jnp.zeros((batch, crop[0], size[1], classes))
    out = {"semantic": jnp.zeros((batch, *size), jnp.int32), "finite": jnp.ones(batch, bool)}
    if keep:
        out["scores"] = jnp.zeros((batch, *size, classes))
    return jax.lax.scan(row, (strip, out), (tops, steps, row_shares))[0][1]
