"""Max pooling of NHWC arrays whose gradient is a gather.

XLA differentiates `lax.reduce_window` into select-and-scatter, a scalar loop on CPU. Here the
forward pass keeps which tap of each window won, and the backward pass lets every input pixel ask
the few windows that contain it.
"""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """Maximum of each 2x2 block, stride 2: float [B,H,W,C] -> [B,H//2,W//2,C].

    An odd last row or column is dropped.
    """
    return max_pool(x, 2, 2)


def max_pool(x: jax.Array, window: int, stride: int, padding: int = 0) -> jax.Array:
    """Maximum over window x window pixels: float [B,H,W,C] -> [B,h,w,C].

    h = (H + 2 padding - window) // stride + 1, as `torch.nn.MaxPool2d`. The border is filled with
    -inf, so it never wins; rows and columns that fill no whole window are dropped. The gradient
    goes to the first maximum of each window in row-major order, as in torch. Reverse mode only.

    window, stride, padding: pixels, the same for both axes; window at most 11.
    """
    if window > 11:
        raise ValueError(f"window {window} has more taps than an int8 index: use at most 11")
    if padding:
        edge = (padding, padding)
        x = jnp.pad(x, ((0, 0), edge, edge, (0, 0)), constant_values=-jnp.inf)
    used_h, used_w = ((n - window) // stride * stride + window for n in x.shape[1:3])
    return _pool(x[:, :used_h, :used_w], window, stride)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _pool(x: jax.Array, window: int, stride: int) -> jax.Array:
    return _pool_forward(x, window, stride)[0]


def _pool_forward(x: jax.Array, window: int, stride: int) -> tuple[jax.Array, jax.Array]:
    """Also returns the winning tap of every window, int8 [B,h,w,C]."""
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


def _pool_backward(window: int, stride: int, index: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    """Rows stride * u + a of x are tap a of window u, tap a + stride of window u - 1, and so on:
    one sum per phase (a, b), then the phases are interleaved by stack and reshape."""
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
