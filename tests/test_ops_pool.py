"""Pooling and its gradients against loops over windows in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from jaxseg.ops.pool import (
    adaptive_avg_pool,
    avg_pool,
    max_pool,
    max_pool_with_indices,
    max_unpool,
)

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


def windows(n, window, stride, padding, ceil):
    """The first pixel of each window along n pixels, from -padding on.

    The last one ends inside the padding; with `ceil` it may end beyond, as long as the one before
    has left something over and it starts before the end of the image.
    """
    starts = [-padding] if ceil or window <= n + 2 * padding else []
    while starts:
        start, end = starts[-1] + stride, starts[-1] + window
        if start + window > n + padding and not (ceil and end < n + padding and start < n):
            break
        starts.append(start)
    return starts


def reference(x, g, window, stride, padding, ceil=False):
    """Output and input gradient in float64; the first maximum in row-major order takes all."""
    batch, height, width, channels = x.shape
    tops = windows(height, window, stride, padding, ceil)
    lefts = windows(width, window, stride, padding, ceil)
    h, w = len(tops), len(lefts)
    y, dx = np.zeros((batch, h, w, channels)), np.zeros(x.shape)
    for b, u, v, c in np.ndindex(y.shape):
        best, at = -np.inf, None
        for i in range(tops[u], tops[u] + window):
            for j in range(lefts[v], lefts[v] + window):
                inside = 0 <= i < height and 0 <= j < width
                if inside and x[b, i, j, c] > best:
                    best, at = x[b, i, j, c], (b, i, j, c)
        y[b, u, v, c] = best
        dx[at] += g[b, u, v, c]
    return y, dx


def compare(pool, x, window, stride, padding, ceil=False):
    shape = jax.eval_shape(pool, x).shape
    g = np.random.default_rng(1).integers(-8, 9, size=shape)  # sums exact in every dtype
    expected, slope = reference(np.asarray(x, np.float64), g, window, stride, padding, ceil)

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


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if c[0] > 1])
@pytest.mark.parametrize("size", [(6, 8), (7, 5), (9, 10)])
def test_ceil_keeps_the_cut_windows(case, size):
    x = np.random.default_rng(0).normal(size=(1, *size, 2)).astype(np.float32)
    compare(lambda x: max_pool(x, *case, ceil=True), x, *case, ceil=True)


def test_caffe_resnet_needs_ceil():
    """Without padding, 3x3 windows at stride 2 take 112 pixels to 56 only with a cut window."""
    x = jax.ShapeDtypeStruct((1, 112, 112, 1), jnp.float32)
    sizes = [
        jax.eval_shape(lambda x, c=ceil: max_pool(x, 3, 2, ceil=c), x).shape for ceil in (0, 1)
    ]
    assert sizes == [(1, 55, 55, 1), (1, 56, 56, 1)]


@pytest.mark.parametrize("case", CASES)
def test_ties_go_to_the_first_maximum(case):
    x = np.random.default_rng(0).integers(0, 2, size=(2, 7, 8, 3)).astype(np.float32)
    x[1] = 0
    compare(lambda x: max_pool(x, *case), x, *case)


def test_first_maximum_by_hand():
    x = jnp.array([[1.0, 5.0], [5.0, 5.0]]).reshape(1, 2, 2, 1)
    dx = jax.grad(lambda x: max_pool(x, 2, 2).sum())(x)
    np.testing.assert_array_equal(dx.reshape(2, 2), [[0, 1], [0, 0]])


@pytest.mark.parametrize("size", [(2, 2), (3, 3), (5, 4), (4, 7), (1, 4)])
def test_2x2_drops_an_odd_last_row_and_column(size):
    x = np.random.default_rng(0).normal(size=(1, *size, 2)).astype(np.float32)
    compare(lambda x: max_pool(x, 2, 2), x, 2, 2, 0)


def test_1x1_input_with_padding():
    compare(lambda x: max_pool(x, 3, 2, 1), np.full((1, 1, 1, 1), -3, np.float32), 3, 2, 1)


@pytest.mark.parametrize("case", [(2, 2, 0), (3, 2, 1)])
def test_finite_differences(case):
    # Distinct values at least 1/4 apart: the winner does not change within a step.
    x = np.random.default_rng(0).permutation(60).reshape(1, 6, 5, 2).astype(np.float32) / 4
    check_grads(jax.jit(lambda x: max_pool(x, *case)), (x,), 1, ["rev"], atol=1e-2, rtol=1e-2)


def test_vmap():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 5, 6, 2)), jnp.float32)
    slope = jax.grad(lambda x: (max_pool(x, 2, 2) ** 2).sum())
    np.testing.assert_array_equal(jax.jit(jax.vmap(slope))(x)[2], jax.jit(slope)(x[2]))


def test_large_windows_are_refused():
    with pytest.raises(ValueError, match="at most 11"):
        max_pool(jnp.zeros((1, 16, 16, 1)), 12, 1)


SIZES = [(4, 6), (5, 7), (6, 5), (1, 4), (3, 1)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("values", ["distinct", "ties"])
def test_unpooling_puts_every_maximum_back(size, values):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    if values == "ties":
        x = np.sign(x)
    y, indices = jax.jit(max_pool_with_indices)(x)
    back = np.asarray(jax.jit(lambda y, i: max_unpool(y, i, size))(y, indices))
    assert y.shape == indices.shape == (2, -(-size[0] // 2), -(-size[1] // 2), 3)
    assert indices.dtype == jnp.int8 and back.shape == x.shape
    expected = np.zeros(x.shape)
    for b, u, v, c in np.ndindex(y.shape):
        block = x[b, 2 * u : 2 * u + 2, 2 * v : 2 * v + 2, c]
        i, j = np.unravel_index(block.argmax(), block.shape)
        assert y[b, u, v, c] == block.max() and indices[b, u, v, c] == 2 * i + j
        expected[b, 2 * u + i, 2 * v + j, c] = block.max()
    np.testing.assert_array_equal(back, expected)


@pytest.mark.parametrize("size", SIZES)
def test_gradients_of_pooling_and_unpooling(size):
    """The gradient of one is the other."""
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    (y, indices), pull = jax.vjp(max_pool_with_indices, x)
    g = np.random.default_rng(1).normal(size=y.shape).astype(np.float32)
    (dx,) = pull((g, np.zeros(y.shape, jax.dtypes.float0)))
    back, pull = jax.vjp(lambda y: max_unpool(y, indices, size), y)
    np.testing.assert_array_equal(dx, max_unpool(g, indices, size))
    wide = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)
    (dy,) = jax.jit(pull)(wide)
    for b, u, v, c in np.ndindex(y.shape):
        i, j = divmod(int(indices[b, u, v, c]), 2)
        assert dy[b, u, v, c] == wide[b, 2 * u + i, 2 * v + j, c]


def test_segnet_sizes():
    """CamVid's 360x480 through five pools and back: 45x60 <-> 23x30 and 23x30 <-> 12x15."""

    sizes = []

    def there_and_back(x):
        kept = []
        for _ in range(5):
            sizes.append(x.shape[1:3])
            x, indices = max_pool_with_indices(x)
            kept.append(indices)
        for size, indices in zip(sizes[::-1], kept[::-1], strict=True):
            x = max_unpool(x, indices, size)
        return x

    x = jax.ShapeDtypeStruct((1, 360, 480, 1), jnp.float32)
    assert jax.eval_shape(there_and_back, x).shape == x.shape
    assert sizes == [(360, 480), (180, 240), (90, 120), (45, 60), (23, 30)]


@pytest.mark.parametrize("size", [(4, 6), (7, 6), (5, 8), (6, 4)])
def test_unpooling_to_other_sizes_is_refused(size):
    x = jnp.zeros((1, 3, 3, 1))
    with pytest.raises(ValueError, match="6 or 5 rows and 6 or 5 columns"):
        max_unpool(x, x.astype(jnp.int8), size)


def average(x, g, window, stride, padding, ceil):
    """Output and input gradient in float64."""
    batch, height, width, channels = x.shape
    tops = windows(height, window, stride, padding, ceil)
    lefts = windows(width, window, stride, padding, ceil)
    y, dx = np.zeros((batch, len(tops), len(lefts), channels)), np.zeros(x.shape)
    for (u, top), (v, left) in ((p, q) for p in enumerate(tops) for q in enumerate(lefts)):
        rows = [i for i in range(top, top + window) if -padding <= i < height + padding]
        cols = [j for j in range(left, left + window) if -padding <= j < width + padding]
        for i in (i for i in rows if 0 <= i < height):
            for j in (j for j in cols if 0 <= j < width):
                y[:, u, v] += x[:, i, j] / (len(rows) * len(cols))
                dx[:, i, j] += g[:, u, v] / (len(rows) * len(cols))
    return y, dx


def check_average(pool, expected, x):
    """Compares a pool and its gradient; `expected(x, g)` gives both in float64."""
    g = np.random.default_rng(1).normal(size=jax.eval_shape(pool, x).shape).astype(x.dtype)

    @jax.jit
    def run(x, g):
        y, pull = jax.vjp(pool, x)
        return y, pull(g)[0]

    tolerance = 2**-8 if x.dtype == jnp.bfloat16 else 1e-6
    wants = expected(np.asarray(x, np.float64), np.asarray(g, np.float64))
    for have, want in zip(run(x, g), wants, strict=True):
        assert have.shape == want.shape and have.dtype == x.dtype
        have = np.asarray(have, np.float64)
        np.testing.assert_allclose(have, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if 2 * c[2] <= c[0]] + [(4, 3, 2), (5, 4, 1)])
@pytest.mark.parametrize(("size", "dtype"), [((9, 8), jnp.bfloat16), ((6, 11), jnp.float32)])
@pytest.mark.parametrize("ceil", [True, False])
def test_average_against_loops(case, size, dtype, ceil):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(dtype)
    check_average(lambda x: avg_pool(x, *case, ceil), lambda x, g: average(x, g, *case, ceil), x)


def test_too_much_padding_is_refused():
    with pytest.raises(ValueError, match="half"):
        avg_pool(jnp.zeros((1, 4, 4, 1)), 3, 1, 2)


def adaptive(x, g, bins):
    """Output and input gradient in float64, cell by cell."""
    height, width = x.shape[1:3]
    y, dx = np.zeros(g.shape), np.zeros(x.shape)
    for u, v in np.ndindex(bins, bins):
        rows = slice(math.floor(u * height / bins), math.ceil((u + 1) * height / bins))
        cols = slice(math.floor(v * width / bins), math.ceil((v + 1) * width / bins))
        cell = x[:, rows, cols]
        y[:, u, v] = cell.mean((1, 2))
        dx[:, rows, cols] += g[:, None, None, u, v] / (cell.shape[1] * cell.shape[2])
    return y, dx


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [((12, 6), jnp.float32), ((13, 8), jnp.float32), ((3, 17), jnp.float32), ((9, 12), "bfloat16")],
)
def test_adaptive_average_against_loops(bins, size, dtype):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(jnp.dtype(dtype))
    check_average(lambda x: adaptive_avg_pool(x, bins), lambda x, g: adaptive(x, g, bins), x)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pool",
    [
        lambda x: max_pool(x, 3, 2, 1),
        lambda x: max_unpool(*max_pool_with_indices(x), x.shape[1:3]),
        lambda x: avg_pool(x, 2, 2),
        lambda x: avg_pool(x, 3, 1, 1),
        lambda x: adaptive_avg_pool(x, 1),
        lambda x: adaptive_avg_pool(x, 3),
        lambda x: adaptive_avg_pool(x, 6),
    ],
)
def test_sharded_rows_move_only_a_halo(pool):
    mesh = jax.make_mesh((2, 4), ("data", "space"), (AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, PartitionSpec("data", "space"))
    x = np.random.default_rng(0).normal(size=(2, 24, 12, 2)).astype(np.float32)

    def slope(x):
        return jax.grad(lambda x: jnp.sin(pool(x)).sum())(x)

    run = jax.jit(slope, in_shardings=rows, out_shardings=rows).lower(x).compile()
    assert "all-gather" not in run.as_text() and "all-to-all" not in run.as_text()
    np.testing.assert_allclose(run(jax.device_put(x, rows)), slope(x), atol=1e-5)
