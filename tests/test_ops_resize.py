"""resize and nearest against loops over pixels in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from jaxseg.ops.resize import nearest, resize

SIZES = [
    ((4, 5), (8, 10)),  # x2
    ((4, 5), (12, 20)),  # x3 and x4: a different whole number per axis
    ((3, 2), (60, 34)),  # x20 and x17: past the unrolled blends
    ((4, 5), (7, 11)),  # fractional, odd
    ((3, 5), (9, 17)),  # x4 with aligned corners
    ((9, 8), (4, 3)),  # down
    ((8, 8), (4, 2)),  # whole-number down
    ((6, 4), (3, 9)),  # down and up
    ((5, 7), (5, 14)),  # one axis kept
    ((5, 7), (5, 7)),  # both kept
    ((1, 1), (4, 6)),
    ((1, 6), (5, 3)),
    ((5, 4), (1, 1)),
    ((5, 4), (1, 8)),
    ((1, 1), (1, 1)),
]


def sample(n_in, n, i, align_corners):
    """The two input pixels of output i and the weight of the second."""
    if align_corners:
        at = i * (n_in - 1) / (n - 1) if n > 1 else 0.0
    else:
        at = max((i + 0.5) * n_in / n - 0.5, 0.0)
    low = min(math.floor(at), n_in - 1)
    return low, min(low + 1, n_in - 1), at - low


def reference(x, size, align_corners):
    y = np.zeros((x.shape[0], *size, x.shape[3]))
    for i in range(size[0]):
        top, bottom, v = sample(x.shape[1], size[0], i, align_corners)
        for j in range(size[1]):
            left, right, u = sample(x.shape[2], size[1], j, align_corners)
            upper = (1 - u) * x[:, top, left] + u * x[:, top, right]
            lower = (1 - u) * x[:, bottom, left] + u * x[:, bottom, right]
            y[:, i, j] = (1 - v) * upper + v * lower
    return y


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("size_in", "size"), SIZES)
def test_forward_and_gradient(size_in, size, align_corners):
    x = random(2, *size_in, 3)
    g = random(2, *size, 3)

    @jax.jit
    def run(x, g):
        y, pull = jax.vjp(lambda x: resize(x, size, align_corners), x)
        return y, pull(g)[0]

    y, dx = run(x, g)
    assert y.shape == (2, *size, 3) and y.dtype == jnp.float32
    np.testing.assert_allclose(y, reference(x, size, align_corners), rtol=0, atol=2e-6)

    # The gradient is the transpose of the map, column by column: unit images through the loops.
    units = np.eye(math.prod(size_in)).reshape(-1, *size_in, 1)
    columns = reference(units, size, align_corners)
    expected = np.einsum("khwo,bhwc->bkc", columns, g.astype(np.float64)).reshape(x.shape)
    scale = math.prod(size) / math.prod(size_in) + 1
    np.testing.assert_allclose(dx, expected, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("align_corners", [False, True])
def test_known_values(align_corners):
    x = jnp.array([0.0, 4.0]).reshape(1, 1, 2, 1)
    expected = [0, 4 / 3, 8 / 3, 4] if align_corners else [0, 1, 3, 4]
    np.testing.assert_allclose(resize(x, (1, 4), align_corners).ravel(), expected, atol=1e-6)


def test_deeplab_sizes_with_aligned_corners_hit_the_input_pixels():
    x = random(1, 17, 17, 2)
    np.testing.assert_array_equal(resize(x, (65, 65), True)[:, ::4, ::4], x)


@pytest.mark.parametrize(("size", "align_corners"), [((8, 12), False), ((7, 5), True)])
def test_bfloat16_stays_bfloat16(size, align_corners):
    x = jnp.asarray(random(1, 4, 6, 3), jnp.bfloat16)
    y = jax.jit(lambda x: resize(x, size, align_corners))(x)
    dx = jax.jit(jax.grad(lambda x: resize(x, size, align_corners).sum()))(x)
    assert y.dtype == dx.dtype == jnp.bfloat16
    expected = reference(np.asarray(x, np.float64), size, align_corners)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=0, atol=0.04)
    # Every row of weights sums to one, so the gradient of the sum counts the outputs.
    assert float(dx.astype(jnp.float32).sum()) == pytest.approx(y.size, rel=0.02)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="uint8"):
        resize(jnp.zeros((1, 4, 4, 3), jnp.uint8), (8, 8))


@pytest.mark.parametrize("whole", [False, True])
def test_sharded_height_moves_only_a_halo(whole):
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    mesh = jax.make_mesh((4,), ("h",), (AxisType.Auto,), devices=jax.devices()[:4])
    rows = NamedSharding(mesh, PartitionSpec(None, "h"))
    x = random(1, 32, 8, 2)

    def slope(x):
        y, pull = jax.vjp(lambda x: resize(x, (128, 32 if whole else 13)), x)
        return pull(y)[0]

    run = jax.jit(slope, in_shardings=rows, out_shardings=rows).lower(x).compile()
    assert "all-gather" not in run.as_text() and "all-to-all" not in run.as_text()
    np.testing.assert_allclose(run(jax.device_put(x, rows)), slope(x), atol=2e-5)


@pytest.mark.parametrize(("size_in", "size"), SIZES)
def test_nearest(size_in, size):
    x = np.random.default_rng(1).integers(0, 256, size=(2, *size_in)).astype(np.int32)
    y = np.asarray(jax.jit(lambda x: nearest(x, size))(x))
    assert y.dtype == np.int32 and y.shape == (2, *size)
    for i in range(size[0]):
        for j in range(size[1]):
            source = x[:, i * size_in[0] // size[0], j * size_in[1] // size[1]]
            np.testing.assert_array_equal(y[:, i, j], source)


@pytest.mark.parametrize("dtype", [np.uint8, np.bool_, np.float32])
def test_nearest_keeps_dtype_and_channels(dtype):
    y = nearest(jnp.ones((1, 2, 3, 4), dtype), (4, 5))
    assert y.dtype == dtype and y.shape == (1, 4, 5, 4) and bool((y == 1).all())


def test_nearest_gradient_sums_the_copies():
    x = random(1, 2, 3, 2)
    dx = jax.grad(lambda x: nearest(x, (4, 9)).sum())(x)
    np.testing.assert_array_equal(dx, np.full(x.shape, 6.0))


@pytest.mark.parametrize("size", [(7, 9), (20, 9), (13, 40), (31, 23), (1, 1)])
def test_antialiasing_is_pillows(size):
    """Pillow resizes float pictures in float32, with triangles as wide as an output pixel."""
    x = np.random.default_rng(0).random((2, 20, 23, 3), np.float32)
    found = resize(jnp.asarray(x), size, antialias=True)
    for image, ours in zip(x, found, strict=True):
        for channel in range(3):
            picture = Image.fromarray(image[..., channel])
            theirs = picture.resize(size[::-1], Image.Resampling.BILINEAR)
            np.testing.assert_allclose(ours[..., channel], np.asarray(theirs), atol=2e-6)
