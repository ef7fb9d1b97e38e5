"""Transposed convolutions and their gradients against loops over pixels in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxseg.ops import upsample
from jaxseg.ops.resize import resize
from jaxseg.ops.upsample import bilinear_kernel, bilinear_transposed, transposed

CASES = [  # size, kernel, stride, padding
    ((3, 4), (2, 2), 2, ((0, 0), (0, 0))),  # U-Net
    ((4, 3), (4, 4), 2, ((1, 1), (1, 1))),  # twice the size
    ((3, 5), (4, 4), 2, ((0, 0), (0, 0))),  # FCN
    ((5, 3), (3, 3), 2, ((1, 0), (1, 0))),  # twice the size, a tap past the first pixel
    ((4, 4), (3, 3), 1, ((1, 1), (1, 1))),
    ((3, 2), (6, 6), 4, ((1, 1), (2, 0))),
    ((4, 3), (5, 3), 3, ((3, 5), (0, 1))),  # cut by more than a stride
    ((3, 3), (2, 1), 3, ((0, 0), (1, 0))),  # fewer taps than strides: gaps of zeros
    ((2, 3), (3, 4), 2, ((-1, -2), (0, -3))),  # zeros added
    ((1, 1), (4, 4), 2, ((1, 1), (1, 1))),
    # Above MOST_PHASED, one convolution of a spread-out array:
    ((2, 3), (32, 32), 16, ((0, 0), (0, 0))),  # FCN-16s
    ((3, 2), (20, 11), 9, ((2, 3), (-1, 0))),
    ((2, 2), (7, 3), 10, ((0, 4), (1, 0))),  # gaps of zeros
]


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def reference(x, kernel, g, stride, padding):
    """Output, and gradients of x and kernel; every pixel adds its kernel to the output."""
    batch, h, w, _ = x.shape
    kh, kw, _, channels = kernel.shape
    (above, below), (left, right) = padding
    height, width = (h - 1) * stride + kh - above - below, (w - 1) * stride + kw - left - right
    y, dx, dk = (
        np.zeros((batch, height, width, channels)),
        np.zeros(x.shape),
        np.zeros(kernel.shape),
    )
    for u, v, i, j in np.ndindex(h, w, kh, kw):
        row, col = stride * u + i - above, stride * v + j - left
        if 0 <= row < height and 0 <= col < width:
            y[:, row, col] += x[:, u, v] @ kernel[i, j]
            dx[:, u, v] += g[:, row, col] @ kernel[i, j].T
            dk[i, j] += x[:, u, v].T @ g[:, row, col]
    return y, dx, dk


def run(op, *args):
    """A random cotangent, the output and the gradients of all arguments."""
    g = random(9, *jax.eval_shape(op, *args).shape).astype(args[0].dtype)

    @jax.jit
    def both(g, *args):
        y, pull = jax.vjp(op, *args)
        return y, *pull(g)

    return g, both(g, *args)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_transposed_against_loops(case):
    size, taps, *args = case
    x, kernel = random(0, 2, *size, 3), random(1, *taps, 3, 4)
    g, found = run(lambda x, k: transposed(x, k, *args), x, kernel)
    expected = reference(*(a.astype(np.float64) for a in (x, kernel, g)), *args)
    for have, want in zip(found, expected, strict=True):
        assert have.shape == want.shape and have.dtype == jnp.float32
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_both_forms_of_a_transposed_convolution_are_equal(monkeypatch):
    """FCN-32s learned would be 1,024 convolutions phase by phase."""
    x, kernel = random(0, 1, 2, 3, 2), random(1, 18, 18, 2, 3)
    text = jax.jit(lambda x, k: transposed(x, k, 9)).lower(x, kernel).as_text()
    assert text.count("stablehlo.convolution") == 1
    once = transposed(x, kernel, 9)
    monkeypatch.setattr(upsample, "MOST_PHASED", 9)
    np.testing.assert_allclose(transposed(x, kernel, 9), once, rtol=1e-5, atol=1e-5)


def test_transposed_in_bfloat16():
    x, kernel = random(0, 1, 3, 4, 3).astype("bfloat16"), random(1, 4, 4, 3, 2).astype("bfloat16")
    args = (2, ((1, 1), (1, 1)))
    g, found = run(lambda x, k: transposed(x, k, *args), x, kernel)
    expected = reference(*(a.astype(np.float64) for a in (x, kernel, g)), *args)
    for have, want in zip(found, expected, strict=True):
        assert have.dtype == jnp.bfloat16
        error = np.abs(np.asarray(have, np.float64) - want)
        assert error.max() <= 2**-7 * np.abs(want).max()


@pytest.mark.parametrize("factor", [1, 2, 3, 8])
def test_bilinear_kernel_by_hand(factor):
    kernel = np.asarray(bilinear_kernel(factor))
    for i, j in np.ndindex(2 * factor, 2 * factor):
        middle = factor - 0.5
        want = (1 - abs(i - middle) / factor) * (1 - abs(j - middle) / factor)
        assert kernel[i, j] == pytest.approx(want, rel=1e-6)
    # The copies that overlap at a pixel sum to one.
    total = kernel.reshape(2, factor, 2, factor).sum((0, 2))
    np.testing.assert_allclose(total, np.ones((factor, factor)), rtol=1e-6)


def test_bilinear_kernel_of_factor_2():
    row = np.array([0.25, 0.75, 0.75, 0.25])
    np.testing.assert_array_equal(bilinear_kernel(2), np.outer(row, row))


@pytest.mark.parametrize("factor", [1, 2, 3, 8])
@pytest.mark.parametrize(("size", "dtype"), [((3, 4), "float32"), ((1, 5), "bfloat16")])
def test_bilinear_transposed_is_the_transposed_convolution(factor, size, dtype):
    x = random(0, 2, *size, 3).astype(jnp.dtype(dtype))
    g, (y, dx) = run(lambda x: bilinear_transposed(x, factor), x)
    assert y.dtype == dx.dtype == x.dtype
    assert y.shape == (2, *((n - 1) * factor + 2 * factor for n in size), 3)
    kernel = np.asarray(bilinear_kernel(factor), np.float64)[:, :, None, None] * np.eye(3)
    x, g = (np.asarray(a, np.float64) for a in (x, g))
    want, slope, _ = reference(x, kernel, g, factor, ((0, 0), (0, 0)))
    scale = 1e-6 if dtype == "float32" else 2**-8
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=0, atol=8 * scale)
    np.testing.assert_allclose(
        np.asarray(dx, np.float64), slope, rtol=0, atol=2 * scale * np.abs(slope).max()
    )


def test_fcn_sizes():
    """Scores of 16x16 for a padded 500x500 image become 544 at stride 32; 34, 70, 568 by steps."""
    for n, factor, size in [(16, 32, 544), (16, 2, 34), (34, 2, 70), (70, 8, 568)]:
        x = jax.ShapeDtypeStruct((1, n, n, 1), jnp.float32)
        y = jax.eval_shape(lambda x, f=factor: bilinear_transposed(x, f), x)
        assert y.shape == (1, size, size, 1)


@pytest.mark.parametrize("factor", [2, 4])
def test_bilinear_transposed_is_resize_inside_the_border(factor):
    x = random(0, 1, 5, 6, 2)
    y = jax.jit(lambda x: bilinear_transposed(x, factor))(x)
    y = y[:, factor // 2 : -factor // 2, factor // 2 : -factor // 2]
    expected = resize(x, (5 * factor, 6 * factor))
    assert y.shape == expected.shape
    inside = slice(factor, -factor)
    np.testing.assert_allclose(y[:, inside, inside], expected[:, inside, inside], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("taps", "stride", "padding"), [(2, 2, 0), (4, 2, 1), (3, 2, 1), (8, 4, 2), (3, 1, 1)]
)
def test_sharded_rows_move_only_a_halo(taps, stride, padding):
    mesh = jax.make_mesh((2, 4), ("data", "space"), (AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, PartitionSpec("data", "space"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    x, kernel = random(0, 2, 16, 6, 2), random(1, taps, taps, 2, 3)
    end = taps - stride - padding  # so that sizes are multiplied by the stride
    edges = ((padding, end), (padding, end))

    def slopes(x, kernel):
        y, pull = jax.vjp(lambda x, k: transposed(x, k, stride, edges), x, kernel)
        assert y.shape[1] == 16 * stride
        return y, *pull(jnp.sin(y))

    places = {"in_shardings": (rows, everywhere), "out_shardings": (rows, rows, everywhere)}
    compiled = jax.jit(slopes, **places).lower(x, kernel).compile()
    assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()
    found = compiled(jax.device_put(x, rows), jax.device_put(kernel, everywhere))
    for have, want in zip(found, jax.jit(slopes)(x, kernel), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-4)


def test_vmap():
    x, kernel = random(0, 3, 2, 4, 5, 2), random(1, 3, 4, 4, 2, 3)
    y = jax.jit(jax.vmap(lambda x, k: transposed(x, k, 2)))(x, kernel)
    np.testing.assert_allclose(y[2], transposed(x[2], kernel[2], 2), rtol=1e-5, atol=1e-5)
