"""Deformable convolution and its gradients against loops over pixels and taps in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.ops.conv import conv
from jaxseg.ops.deform import deform_conv


def bilinear(x, y0, x0):
    """The value of x [H,W,C] at a point, its slopes there, and how much each pixel had in it."""
    value, slopes, shares = np.zeros(x.shape[2]), np.zeros((2, x.shape[2])), {}
    for i in (int(np.floor(y0)), int(np.floor(y0)) + 1):
        for j in (int(np.floor(x0)), int(np.floor(x0)) + 1):
            if 0 <= i < x.shape[0] and 0 <= j < x.shape[1]:
                v, u = 1 - abs(y0 - i), 1 - abs(x0 - j)
                value += v * u * x[i, j]
                slopes[0] += np.sign(i - y0) * u * x[i, j]
                slopes[1] += np.sign(j - x0) * v * x[i, j]
                shares[i, j] = v * u
    return value, slopes, shares


def reference(x, offset, kernel, mask, g, stride, rate, pad):
    """Value and the gradients of x, offset, kernel, mask, for the output's gradient g."""
    kh, kw, c, d = kernel.shape
    groups = offset.shape[3] // (2 * kh * kw)
    per, out = c // groups, np.zeros(g.shape)
    dx, do, dk, dm = (np.zeros(a.shape) for a in (x, offset, kernel, mask))
    for b, p, q, group, i, j in np.ndindex(*g.shape[:3], groups, kh, kw):
        tap, chosen = group * kh * kw + i * kw + j, slice(group * per, (group + 1) * per)
        down, right = offset[b, p, q, 2 * tap : 2 * tap + 2]
        at = p * stride - pad + i * rate + down, q * stride - pad + j * rate + right
        value, slopes, shares = bilinear(x[b, :, :, chosen], *at)
        weight, up = mask[b, p, q, tap], kernel[i, j, chosen] @ g[b, p, q]
        out[b, p, q] += weight * value @ kernel[i, j, chosen]
        dk[i, j, chosen] += weight * np.outer(value, g[b, p, q])
        dm[b, p, q, tap] += value @ up
        do[b, p, q, 2 * tap : 2 * tap + 2] += weight * slopes @ up
        for place, share in shares.items():
            dx[b, place[0], place[1], chosen] += weight * share * up
    return out, dx, do, dk, dm


CASES = [  # kernel, groups, stride, rate, pad, spread of the offsets
    (3, 1, 1, 1, 1, 1.0),
    (3, 2, 2, 2, 2, 4.0),  # many samples outside
    (1, 2, 1, 1, 0, 2.0),
]


@pytest.mark.parametrize(("size", "groups", "stride", "rate", "pad", "spread"), CASES)
def test_value_and_gradients_against_loops(size, groups, stride, rate, pad, spread):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 6, 7, 4)), rng.normal(size=(size, size, 4, 3))
    h, w = ((n + 2 * pad - rate * (size - 1) - 1) // stride + 1 for n in x.shape[1:3])
    offset = rng.normal(0, spread, (2, h, w, groups * size**2 * 2))
    mask = rng.uniform(0, 2, (2, h, w, groups * size**2))
    g = rng.normal(size=(2, h, w, 3))
    arrays = [np.asarray(a, np.float32) for a in (x, offset, kernel, mask)]
    options = {"stride": stride, "rate": rate, "padding": ((pad, pad), (pad, pad))}

    @jax.jit
    def run(g, *arrays):
        y, pull = jax.vjp(lambda *a: deform_conv(*a, **options), *arrays)
        return y, *pull(g)

    wants = reference(*(a.astype(np.float64) for a in arrays), g, stride, rate, pad)
    for have, want in zip(run(g.astype(np.float32), *arrays), wants, strict=True):
        np.testing.assert_allclose(have, want, atol=2e-4 * max(1, np.abs(want).max()))


@pytest.mark.slow
def test_without_offsets_it_is_a_convolution_in_its_dtype():
    rng = np.random.default_rng(0)
    pads = ((2, 2), (2, 2))
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.1)):
        x, kernel = (jnp.asarray(rng.normal(size=s), dtype) for s in ((2, 8, 9, 4), (3, 3, 4, 5)))
        y = deform_conv(x, jnp.zeros((2, 4, 5, 18)), kernel, None, 2, 2, pads)
        assert y.dtype == dtype
        want = conv(x.astype(jnp.float32), kernel.astype(jnp.float32), 2, 2, pads)
        np.testing.assert_allclose(y.astype(jnp.float32), want, atol=tolerance)


def test_an_offset_by_whole_pixels_is_a_shift():
    x = np.random.default_rng(0).normal(size=(1, 6, 7, 2)).astype(np.float32)
    offset = np.broadcast_to(np.array([1, -2], np.float32), (1, 6, 7, 2))
    y = deform_conv(x, offset, jnp.eye(2)[None, None])
    want = np.zeros(x.shape, np.float32)
    want[:, :-1, 2:] = x[:, 1:, :-2]
    np.testing.assert_allclose(y, want, atol=1e-6)
