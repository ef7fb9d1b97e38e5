"""Operations on rows that lie on eight devices: equal to one device, and nothing is gathered."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.config import default
from jaxseg.ops import rows
from jaxseg.ops.conv import conv, depthwise
from jaxseg.ops.resize import resize
from jaxseg.sharding import make_mesh, over_rows, spread_rows, traced_on

KERNEL = np.random.default_rng(1).normal(size=(3, 3, 4, 4)).astype(np.float32)


def _same(rate):
    return lambda x: conv(x, KERNEL, rate=rate, padding=((rate, rate), (rate, rate)))


def _each(rate):
    edges = ((rate, rate), (rate, rate))
    return lambda x: depthwise(x, KERNEL[..., 0], rate=rate, padding=edges)


OPERATIONS = {
    "a rate within a device's rows": (_same(2), 32),
    "a rate beyond them": (_same(6), 32),
    "a rate beyond half of the image": (_same(18), 32),
    "a rate beyond the image": (_same(40), 32),
    "uneven shares of rows": (_same(12), 33),
    "valid, strided": (lambda x: conv(x, KERNEL, stride=2, rate=9), 64),
    "depthwise, a rate beyond them": (_each(6), 32),
    "depthwise, a rate beyond half of the image": (_each(18), 32),
    "depthwise, one row of taps": (
        lambda x: depthwise(x, KERNEL[0, 0, None], padding=((18, 18), (0, 0))),
        32,
    ),
    "resize by 4": (lambda x: resize(x, (128, 32)), 32),
    "resize, aligned corners": (lambda x: resize(x, (128, 24), align_corners=True), 32),
    "resize to uneven shares": (lambda x: resize(x, (50, 24)), 32),
    "resize, antialiased": (lambda x: resize(x, (24, 24), antialias=True), 64),
}


@pytest.fixture(scope="module")
def mesh():
    return over_rows(make_mesh(default().mesh))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_shared_rows_equal_one_device_and_are_not_gathered(name, mesh):
    operation, height = OPERATIONS[name]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, height, 24, 4)).astype(np.float32)
    weight = rng.normal(size=jax.eval_shape(operation, x).shape).astype(np.float32)

    def both(x, weight):
        value, pull = jax.vjp(operation, x)
        return value, pull(weight)[0]

    def shared(x, weight):
        results = both(spread_rows(x, mesh), spread_rows(weight, mesh))
        fills = [((0, 0), (0, -y.shape[1] % 8), (0, 0), (0, 0)) for y in results]
        return [spread_rows(jnp.pad(y, f), mesh) for y, f in zip(results, fills, strict=True)]

    compiled = jax.jit(traced_on(mesh, shared)).lower(x, weight).compile()
    assert not re.findall(r"= (.*?) all-(?:gather|to-all)", compiled.as_text())
    for ours, one in zip(compiled(x, weight), jax.jit(both)(x, weight), strict=True):
        np.testing.assert_allclose(ours[:, : one.shape[1]], one, rtol=1e-5, atol=2e-5)


def test_without_a_mesh_rows_are_in_one_place(mesh):
    assert rows.parts() == 1
    assert traced_on(mesh, rows.parts)() == 8


def test_a_device_sees_its_rows_and_its_neighbours(mesh):
    x = np.arange(1, 23, dtype=np.float32).reshape(1, 22, 1, 1)
    seen = traced_on(mesh, lambda x: rows.windows(x, 1, 2))(x)[0, :, :, 0, 0]
    assert seen.shape == (8, 1 + 3 + 2)
    np.testing.assert_array_equal(seen[0], [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(seen[6], [18, 19, 20, 21, 22, 0])
    np.testing.assert_array_equal(seen[7], [21, 22, 0, 0, 0, 0])


@pytest.mark.parametrize("step", [3, -3])
def test_shift(step):
    x = jnp.arange(5.0).reshape(1, 5, 1, 1) + 1
    moved = rows.shift(x, step)[0, :, 0, 0]
    np.testing.assert_array_equal(moved, [0, 0, 0, 1, 2] if step > 0 else [4, 5, 0, 0, 0])


def test_images_of_any_size_are_spread_over_rows(mesh):
    x = np.ones((2, 9, 4, 3), np.float32)
    spread = jax.jit(lambda x: spread_rows(x, mesh).sum((2, 3)))
    np.testing.assert_array_equal(spread(x), np.full((2, 9), 12))
