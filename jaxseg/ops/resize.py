"""Bilinear and nearest resizing of NHWC arrays, in forms that are fast and stay sharded.

`jax.image.resize` gathers an array whose height or width is sharded over devices. Here rows that
are shared exchange only a halo.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.ops import rows

MAX_PHASES = 16  # beyond it the unrolled program grows, while the matrix is small


def resize(
    x: jax.Array, size: tuple[int, int], align_corners: bool = False, antialias: bool = False
) -> jax.Array:
    """Bilinear interpolation: float [B,h,w,C] -> [B,H,W,C] in the dtype of x.

    Equals `torch.nn.functional.interpolate(mode="bilinear")`. With `align_corners=False` pixels are
    areas: output i samples the input at (i + 0.5) h / H - 0.5, clamped to the image. With
    `align_corners=True` they are points: output i samples at i (h - 1) / (H - 1), and a size of 1
    takes the first pixel. With `antialias` (and not `align_corners`) an axis that shrinks is
    smoothed first, as Pillow's and torch's do: the triangles are as wide as an output pixel.

    size: (H, W) in pixels.
    Raises TypeError for integer x, whose weights would all round to zero: use `nearest` or cast.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"resize interpolates floats, got {x.dtype}: cast, or use nearest")
    for axis, n in zip((1, 2), size, strict=True):
        x = resize_axis(x, axis, n, align_corners, antialias)
    return x


def nearest(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Nearest neighbour: [B,h,w,...] of any dtype -> [B,H,W,...]; output i takes floor(i h / H).

    The convention of torch's mode "nearest", with the ratio exact instead of in float32.
    """
    for axis, n in zip((1, 2), size, strict=True):
        n_in = x.shape[axis]
        if n % n_in == 0:  # a broadcast, whose gradient is a sum and not a scatter
            x = jnp.repeat(x, n // n_in, axis)
        else:
            x = jnp.take(x, np.arange(n) * n_in // n, axis, mode="clip")
    return x


def resize_axis(
    x: jax.Array, axis: int, n: int, align_corners: bool = False, antialias: bool = False
) -> jax.Array:
    """`resize` along axis 1 or 2 alone, to n pixels."""
    n_in = x.shape[axis]
    if n == n_in:
        return x
    span, span_in = (n - 1, n_in - 1) if align_corners else (n, n_in)
    if span_in and span and span % span_in == 0 and span // span_in <= MAX_PHASES:
        return _upscale(x, axis, n, span // span_in, align_corners)
    weights = interpolation(n_in, n, align_corners, antialias)
    if axis == 1 and rows.parts() > 1:
        return _shared_rows(x, weights)
    # HIGHEST: accelerators would round float32 inputs of a product to fewer bits.
    matrix = jnp.asarray(weights, x.dtype)
    equation = "Hh,bhwc->bHwc" if axis == 1 else "Ww,bhwc->bhWc"
    return jnp.einsum(equation, matrix, x, precision=jax.lax.Precision.HIGHEST)


def _shared_rows(x: jax.Array, weights: np.ndarray) -> jax.Array:
    """weights [H,h] @ x [B,h,w,C] where rows lie on several devices: each sees a halo.

    As a product with all of the matrix it would gather x. Where x has so few rows that a halo would
    reach beyond the neighbour, that is what remains.
    """
    (n, n_in), parts = weights.shape, rows.parts()
    out, held = -(-n // parts), -(-n_in // parts)
    used = [np.flatnonzero(weights[i * out : (i + 1) * out].any(0)) for i in range(parts)]
    low = max([0] + [i * held - u[0] for i, u in enumerate(used) if u.size])
    high = max([0] + [u[-1] + 1 - (i + 1) * held for i, u in enumerate(used) if u.size])
    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    if max(low, high) > held:
        return product("Hh,bhwc->bHwc", jnp.asarray(weights, x.dtype), x)
    padded = np.pad(weights, ((0, parts * out - n), (low, parts * held - n_in + high)))
    blocks = [
        padded[i * out : (i + 1) * out, i * held : (i + 1) * held + low + high]
        for i in range(parts)
    ]
    seen = rows.windows(x, low, high)
    y = product("pHh,bphwc->bpHwc", jnp.asarray(np.stack(blocks), x.dtype), seen)
    return y.reshape(x.shape[0], parts * out, *x.shape[2:])[:, :n]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _upscale(x: jax.Array, axis: int, n: int, ratio: int, align_corners: bool) -> jax.Array:
    """Whole-number upscaling: the outputs around each pixel are `ratio` fixed blends.

    Outputs ratio * i + p, p = 0 .. ratio - 1, lie at the same offset from every input pixel i, so
    each phase p is one blend of x with x shifted by a pixel (clamped at the edge).
    """
    before, after = _shift(x, axis, 1), _shift(x, axis, -1)
    phases = []
    for offset in _offsets(ratio, align_corners):
        neighbour = before if offset < 0 else after
        phases.append((1 - abs(offset)) * x + abs(offset) * neighbour if offset else x)
    shape = x.shape[:axis] + (x.shape[axis] * ratio,) + x.shape[axis + 1 :]
    # Aligned corners end on the last pixel: the blends past it are cut off.
    return jax.lax.slice_in_dim(jnp.stack(phases, axis + 1).reshape(shape), 0, n, axis=axis)


def _offsets(ratio: int, align_corners: bool) -> list[float]:
    """How far each phase is from its pixel, in pixels of the input."""
    return [p / ratio if align_corners else (p + 0.5) / ratio - 0.5 for p in range(ratio)]


def _upscale_backward(
    axis: int, n: int, ratio: int, align_corners: bool, _: None, g: jax.Array
) -> tuple[jax.Array]:
    """Every phase gives its share to its pixel and the rest to the neighbour: three sums of phases,
    two of them moved back by a pixel but for what the edge had clamped."""
    m = -(-n // ratio)
    g = jax.lax.pad(g, jnp.zeros((), g.dtype), _along(axis, 0, m * ratio - n))
    g = g.reshape(*g.shape[:axis], m, ratio, *g.shape[axis + 1 :])
    offsets = _offsets(ratio, align_corners)
    kept, before, after = (
        sum(
            weight * jax.lax.index_in_dim(g, p, axis + 1, keepdims=False)
            for p, weight in enumerate(weights)
            if weight
        )
        for weights in (
            [1 - abs(offset) for offset in offsets],
            [max(0.0, -offset) for offset in offsets],
            [max(0.0, offset) for offset in offsets],
        )
    )
    zero, position = jnp.zeros((), g.dtype), jax.lax.broadcasted_iota(jnp.int32, kept.shape, axis)
    # Without the barrier, XLA sums all phases again for each of the moved sums.
    kept, before, after = jax.lax.optimization_barrier(
        tuple(jnp.broadcast_to(x, kept.shape).astype(g.dtype) for x in (kept, before, after))
    )
    dx = kept + jnp.where(position == 0, before, 0) + jnp.where(position == m - 1, after, 0)
    dx += jax.lax.pad(before, zero, _along(axis, -1, 1))
    return (dx + jax.lax.pad(after, zero, _along(axis, 1, -1)),)


def _along(axis: int, low: int, high: int) -> list[tuple[int, int, int]]:
    return [(low, high, 0) if i == axis else (0, 0, 0) for i in range(4)]


_upscale.defvjp(lambda x, *args: (_upscale(x, *args), None), _upscale_backward)


def _shift(x: jax.Array, axis: int, step: int) -> jax.Array:
    """x moved by one pixel (step 1 or -1) with its edge pixel repeated.

    A pad and a select, because XLA reshards a concatenation along a sharded axis.
    """
    n = x.shape[axis]
    moved = jax.lax.pad(x, jnp.zeros((), x.dtype), _along(axis, step, -step))
    position = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    edge = position == (0 if step > 0 else n - 1)
    return jnp.where(edge, x, moved)


def interpolation(n_in: int, n: int, align_corners: bool, antialias: bool = False) -> np.ndarray:
    """The weights of `resize` along an axis, float64 [n, n_in]; every row sums to one."""
    if align_corners:
        at = np.arange(n) * (n_in - 1) / max(n - 1, 1)
    else:
        at = (np.arange(n) + 0.5) * n_in / n - 0.5
    width = max(1, n_in / n) if antialias else 1
    if width == 1:  # wider triangles are cut off by the edge, and not moved
        at = np.clip(at, 0, n_in - 1)
    hats = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(n_in)) / width)
    return hats / hats.sum(1, keepdims=True)
