"""Batch normalisation of NHWC arrays by the statistics of the batch, with a gradient of its own.

XLA's CPU backend runs a sum over all but the last axis channel by channel, so that at 512 channels
or more every number read evicts the next: ten times slower than along the rows of pixels first.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x - mean) / sqrt(var + epsilon) * scale + bias over all but the channels: [B,h,w,C].

    Returns it in the dtype of x, with mean and var [C], float32 or wider, which are not
    differentiated. var is that of the batch, without Bessel's correction. Reverse mode only.
    Ioffe and Szegedy, ICML 2015, arXiv:1502.03167, Algorithm 1.
    """
    return _forward(x, scale, bias, epsilon)[0]


def _forward(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> tuple:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    count = x.size // x.shape[-1]
    total, squares = _channel_sums(wide, wide * wide)
    mean = total / count
    var = jnp.maximum(squares / count - mean * mean, 0)
    inverse = lax.rsqrt(var + epsilon)
    y = (wide - mean) * (inverse * scale) + bias
    return (y.astype(x.dtype), mean, var), (x, scale, bias, mean, inverse)


def _backward(_: float, saved: tuple, slopes: tuple) -> tuple:
    x, scale, bias, mean, inverse = saved
    g = slopes[0].astype(mean.dtype)
    count = x.size // x.shape[-1]
    normal = (x.astype(mean.dtype) - mean) * inverse
    dbias, dscale = _channel_sums(g, g * normal)
    dx = scale * inverse * (g - (dbias + normal * dscale) / count)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype)


batch_norm.defvjp(_forward, _backward)


def _channel_sums(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sums [C] of two arrays [B,h,w,C], in one pass over both."""

    def by_rows(a: jax.Array, b: jax.Array) -> tuple:
        zeros = (jnp.zeros((), a.dtype),) * 2
        rows = lax.reduce((a, b), zeros, lambda x, y: (x[0] + y[0], x[1] + y[1]), (2,))
        return tuple(row.sum((0, 1)) for row in rows)

    def at_once(a: jax.Array, b: jax.Array) -> tuple:
        return a.sum((0, 1, 2)), b.sum((0, 1, 2))

    return lax.platform_dependent(a, b, cpu=by_rows, default=at_once)
