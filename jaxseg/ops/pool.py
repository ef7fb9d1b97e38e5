"""Pooling of NHWC arrays with gradients that neither scatter nor search.

XLA differentiates `lax.reduce_window` into select-and-scatter (maximum) or a convolution with a
whole window per pixel (average), both scalar loops on CPU. Here the maximum keeps which tap of
each window won, and its gradient lets every input pixel ask the few windows that contain it;
averages are taken along one axis after the other.
"""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np


def max_pool(
    x: jax.Array, window: int, stride: int, padding: int = 0, ceil: bool = False
) -> jax.Array:
    """Maximum over window x window pixels: float [B,H,W,C] -> [B,h,w,C].

    h = (H + 2 padding - window) // stride + 1, as `torch.nn.MaxPool2d`; rows and columns that fill
    no whole window are dropped. With `ceil` they make a last, cut window where it starts inside
    the image or the padding before it, as in Caffe and torch's `ceil_mode`. The border is filled
    with -inf, so it never wins. The gradient goes to the first maximum of each window in
    row-major order, as in torch. Reverse mode only.

    window, stride, padding: pixels, the same for both axes; window at most 11.
    """
    if window > 11:
        raise ValueError(f"window {window} has more taps than an int8 index: use at most 11")
    return _pool(_cover(x, window, stride, padding, ceil, -jnp.inf), window, stride)[0]


def max_pool_with_indices(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maximum of each 2x2 block and where it was: float [B,H,W,C] -> [B,h,w,C] and int8 [B,h,w,C].

    An odd last row or column makes cut blocks: h = ceil(H / 2). The index counts inside the block,
    0 and 1 in its first row, 2 and 3 in its second; of equal values the first wins. `max_unpool` is
    the way back, as in SegNet (Badrinarayanan et al. 2017), where 45x60 becomes 23x30.
    """
    return _pool(_cover(x, 2, 2, 0, True, -jnp.inf), 2, 2)


def max_unpool(x: jax.Array, indices: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Puts values back where `max_pool_with_indices` found them: [B,h,w,C] -> [B,H,W,C], else 0.

    indices: int8 [B,h,w,C] of 0..3. size: (H, W) of the array that was pooled, so each of H and W
    is twice that of x or one less. A comparison per pixel and no scatter: rows may be sharded.
    Raises ValueError for another size.
    """
    batch, h, w, channels = x.shape
    if any(n not in (2 * m - 1, 2 * m) for n, m in zip(size, (h, w), strict=True)):
        raise ValueError(
            f"max_unpool to {size}: {h}x{w} takes {2 * h} or {2 * h - 1} rows and "
            f"{2 * w} or {2 * w - 1} columns; give the size before pooling"
        )
    rows = [
        jnp.stack([jnp.where(indices == 2 * i + j, x, 0) for j in range(2)], 3) for i in range(2)
    ]
    return jnp.stack(rows, 2).reshape(batch, 2 * h, 2 * w, channels)[:, : size[0], : size[1]]


def avg_pool(
    x: jax.Array, window: int, stride: int, padding: int = 0, ceil: bool = False
) -> jax.Array:
    """Mean over window x window pixels: float [B,H,W,C] -> [B,h,w,C], sizes as `max_pool`.

    Equals `torch.nn.AvgPool2d`: the zeros of the border count. What `ceil` adds beyond the padding
    does not. Sums are float32.

    window, stride, padding: pixels, the same for both axes; padding at most half the window.
    """
    if 2 * padding > window:
        raise ValueError(
            f"padding {padding} is more than half of window {window}: use at most half"
        )
    pixels = []
    for n in x.shape[1:3]:
        start = np.arange(_count(n, window, stride, padding, ceil)) * stride - padding
        pixels.append(np.minimum(start + window, n + padding) - start)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    total = _cover(wide, window, stride, padding, ceil, 0)
    for axis in (1, 2):
        total = _window_sums(total, axis, window, stride)
    return (total / np.outer(*pixels)[..., None]).astype(x.dtype)


def adaptive_avg_pool(x: jax.Array, bins: int) -> jax.Array:
    """Means over a grid of bins x bins cells: float [B,H,W,C] -> [B,bins,bins,C].

    Cell i covers rows floor(i H / bins) to ceil((i + 1) H / bins), so neighbours overlap by a row
    where bins does not divide H; as `torch.nn.AdaptiveAvgPool2d`. PSPNet's pyramid uses bins 1, 2,
    3 and 6 (Zhao et al. 2017, section 3.2). Sums are float32.
    """
    rows, cols = (_cells(n, bins) for n in x.shape[1:3])
    total = _cell_sums(_cell_sums(x, 1, bins), 2, bins)
    return (total / np.outer(rows.sum(1), cols.sum(1))[..., None]).astype(x.dtype)


def _cells(n: int, bins: int) -> np.ndarray:
    """Which of n pixels lie in which cell, bool [bins, n]."""
    i = np.arange(bins)[:, None]
    return (np.arange(n) >= i * n // bins) & (np.arange(n) < -(-(i + 1) * n // bins))


def _cell_sums(x: jax.Array, axis: int, bins: int) -> jax.Array:
    """Sums along axis 1 or 2 of the pixels in each cell, in float32.

    A small product with the matrix of cells, which leaves sharded rows where they are. Its gradient
    is no product: every pixel sums the few cells it lies in, one loop that XLA fuses with others.
    """
    inside = _cells(x.shape[axis], bins)
    wide = jnp.promote_types(x.dtype, jnp.float32)

    @jax.custom_vjp
    def run(x: jax.Array) -> jax.Array:
        *batch, n = x.shape[: axis + 1]
        matrix = jnp.broadcast_to(jnp.asarray(inside, x.dtype), (*batch, bins, n))
        # HIGHEST: accelerators would round float32 inputs of a product to fewer bits.
        y = jnp.matmul(
            matrix,
            x.reshape(*batch, n, -1),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=wide,
        )
        return y.reshape(*batch, bins, *x.shape[axis + 1 :])

    def spread(_: None, g: jax.Array) -> tuple:
        cells = jnp.split(g, bins, axis)
        masks = inside.reshape(bins, *(-1 if i == axis else 1 for i in range(4)))
        dx = sum(jnp.where(mask, cell, 0) for mask, cell in zip(masks, cells, strict=True))
        return (dx.astype(x.dtype),)

    run.defvjp(lambda x: (run(x), None), spread)
    return run(x)


def _count(n: int, window: int, stride: int, padding: int, ceil: bool) -> int:
    """How many windows lie along n pixels."""
    room = n + 2 * padding - window
    if not ceil:
        return room // stride + 1
    count = -(-room // stride) + 1
    return count - ((count - 1) * stride >= n + padding)


def _cover(
    x: jax.Array, window: int, stride: int, padding: int, ceil: bool, fill: float
) -> jax.Array:
    """x padded with `fill` and cut to exactly the pixels under its windows."""
    edges = [(0, 0, 0)]
    for n in x.shape[1:3]:
        covered = (_count(n, window, stride, padding, ceil) - 1) * stride + window
        edges.append((padding, covered - padding - n, 0))
    return jax.lax.pad(x, jnp.asarray(fill, x.dtype), [*edges, (0, 0, 0)])


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _pool(x: jax.Array, window: int, stride: int) -> tuple[jax.Array, jax.Array]:
    """The maximum of every window and its tap, int8 in row-major order, both [B,h,w,C]."""
    end_h, end_w = (n - window + 1 for n in x.shape[1:3])
    best = index = None
    for tap, (i, j) in enumerate(product(range(window), repeat=2)):
        value = x[:, i : i + end_h : stride, j : j + end_w : stride]
        if best is None:
            best, index = value, jnp.zeros(value.shape, jnp.int8)
        else:
            index = jnp.where(value > best, jnp.int8(tap), index)
            best = jnp.maximum(best, value)
    return best, index


def _pool_forward(x: jax.Array, window: int, stride: int) -> tuple:
    best, index = _pool(x, window, stride)
    return (best, index), index


def _pool_backward(window: int, stride: int, index: jax.Array, cotangents: tuple) -> tuple:
    """Rows stride * u + a of x are tap a of window u, tap a + stride of window u - 1, and so on:
    one sum per phase (a, b), then the phases are interleaved by stack and reshape."""
    g, _ = cotangents
    reach = (window - 1) // stride
    batch, h, w, channels = g.shape
    rows = []
    for a in range(stride):
        row = []
        for b in range(stride):
            phase = jnp.zeros((batch, h + reach, w + reach, channels), g.dtype)
            for i, j in product(range(a, window, stride), range(b, window, stride)):
                won = jnp.where(index == i * window + j, g, 0)
                shift = [(0, 0)] + [(k // stride, reach - k // stride) for k in (i, j)] + [(0, 0)]
                phase += jnp.pad(won, shift)
            row.append(phase)
        rows.append(jnp.stack(row, 3))
    dx = jnp.stack(rows, 2).reshape(batch, (h + reach) * stride, (w + reach) * stride, channels)
    return (dx[:, : (h - 1) * stride + window, : (w - 1) * stride + window],)


_pool.defvjp(_pool_forward, _pool_backward)


def _window_sums(x: jax.Array, axis: int, window: int, stride: int) -> jax.Array:
    """Sums along one axis of the windows that cover it exactly: n -> (n - window) / stride + 1."""
    if window == stride:
        cells = (*x.shape[:axis], -1, window, *x.shape[axis + 1 :])
        return x.reshape(cells).sum(axis + 1)
    return _overlapping_sums(x, axis, window, stride)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _overlapping_sums(x: jax.Array, axis: int, window: int, stride: int) -> jax.Array:
    end = x.shape[axis] - window + 1
    slices = (jax.lax.slice_in_dim(x, i, i + end, stride, axis) for i in range(window))
    return sum(slices)


def _overlapping_backward(axis: int, window: int, stride: int, _: None, g: jax.Array) -> tuple:
    """Every pixel sums the windows that contain it: the same sums over g spread by the stride."""
    edges = [(window - 1, window - 1, stride - 1) if i == axis else (0, 0, 0) for i in range(4)]
    return (_overlapping_sums(jax.lax.pad(g, jnp.zeros((), g.dtype), edges), axis, window, 1),)


_overlapping_sums.defvjp(
    lambda x, *args: (_overlapping_sums(x, *args), None), _overlapping_backward
)
