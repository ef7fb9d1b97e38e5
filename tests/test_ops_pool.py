"""Max pooling and its gradient against loops over windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxseg.ops.pool import max_pool, max_pool_2x2

CASES = [  # window, stride, padding
    (2, 2, 0),
    (3, 2, 1),  # ResNet stem
    (3, 1, 1),  # DeepLab's VGG-16
    (3, 3, 0),
    (2, 1, 0),
    (2, 3, 0),  # pixels between the windows
    (5, 2, 2),
    (1, 2, 0),
]


def reference(x, g, window, stride, padding):
    """Output and input gradient in float64; the first maximum in row-major order takes all."""
    batch, height, width, channels = x.shape
    h = (height + 2 * padding - window) // stride + 1
    w = (width + 2 * padding - window) // stride + 1
    y, dx = np.zeros((batch, h, w, channels)), np.zeros(x.shape)
    for b, u, v, c in np.ndindex(y.shape):
        best, at = -np.inf, None
        for i in range(u * stride - padding, u * stride - padding + window):
            for j in range(v * stride - padding, v * stride - padding + window):
                inside = 0 <= i < height and 0 <= j < width
                if inside and x[b, i, j, c] > best:
                    best, at = x[b, i, j, c], (b, i, j, c)
        y[b, u, v, c] = best
        dx[at] += g[b, u, v, c]
    return y, dx


def compare(pool, x, window, stride, padding):
    shape = jax.eval_shape(pool, x).shape
    g = np.random.default_rng(1).integers(-8, 9, size=shape)  # sums exact in every dtype
    expected, slope = reference(np.asarray(x, np.float64), g, window, stride, padding)

    @jax.jit
    def run(x, g):
        y, pull = jax.vjp(pool, x)
        return y, pull(g)[0]

    y, dx = run(x, g.astype(x.dtype))
    assert y.dtype == dx.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(y, np.float64), expected)
    np.testing.assert_array_equal(np.asarray(dx, np.float64), slope)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("size", "dtype"), [((6, 8), jnp.float32), ((7, 5), jnp.bfloat16)])
def test_against_loops(case, size, dtype):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(dtype)
    compare(lambda x: max_pool(x, *case), x, *case)


@pytest.mark.parametrize("case", CASES)
def test_ties_go_to_the_first_maximum(case):
    x = np.random.default_rng(0).integers(0, 2, size=(2, 7, 8, 3)).astype(np.float32)
    x[1] = 0
    compare(lambda x: max_pool(x, *case), x, *case)


def test_first_maximum_by_hand():
    x = jnp.array([[1.0, 5.0], [5.0, 5.0]]).reshape(1, 2, 2, 1)
    dx = jax.grad(lambda x: max_pool_2x2(x).sum())(x)
    np.testing.assert_array_equal(dx.reshape(2, 2), [[0, 1], [0, 0]])


@pytest.mark.parametrize("size", [(2, 2), (3, 3), (5, 4), (4, 7), (1, 4)])
def test_2x2_drops_an_odd_last_row_and_column(size):
    x = np.random.default_rng(0).normal(size=(1, *size, 2)).astype(np.float32)
    compare(max_pool_2x2, x, 2, 2, 0)


def test_1x1_input_with_padding():
    compare(lambda x: max_pool(x, 3, 2, 1), np.full((1, 1, 1, 1), -3, np.float32), 3, 2, 1)


@pytest.mark.parametrize("case", [(2, 2, 0), (3, 2, 1)])
def test_finite_differences(case):
    # Distinct values at least 1/4 apart: the winner does not change within a step.
    x = np.random.default_rng(0).permutation(60).reshape(1, 6, 5, 2).astype(np.float32) / 4
    check_grads(jax.jit(lambda x: max_pool(x, *case)), (x,), 1, ["rev"], atol=1e-2, rtol=1e-2)


def test_vmap():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 5, 6, 2)), jnp.float32)
    slope = jax.grad(lambda x: (max_pool_2x2(x) ** 2).sum())
    np.testing.assert_array_equal(jax.jit(jax.vmap(slope))(x)[2], jax.jit(slope)(x[2]))


def test_large_windows_are_refused():
    with pytest.raises(ValueError, match="at most 11"):
        max_pool(jnp.zeros((1, 16, 16, 1)), 12, 1)
