"""Batch normalisation against its definition, differentiated by jax, in float64 and bfloat16."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxseg.backbones.layers import Norm
from jaxseg.ops.norm import batch_norm


def plain(x, scale, bias, epsilon):
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) / jnp.sqrt(var + epsilon) * scale + bias, mean, var


def arguments(shape, dtype=np.float32):
    rng = np.random.default_rng(0)
    x = rng.normal(1, 2, shape)
    scale, bias = rng.uniform(0.5, 2, shape[-1]), rng.normal(size=shape[-1])
    return [jnp.asarray(a, dtype) for a in (x, scale, bias)]


def run(norm, args, epsilon=1e-3):
    y, pull = jax.vjp(lambda *a: norm(*a, epsilon)[0], *args)
    return y, *norm(*args, epsilon)[1:], *pull(args[0] ** 2)


@pytest.mark.parametrize("shape", [(2, 5, 6, 3), (1, 1, 1, 4), (3, 4, 1, 130)])
def test_value_and_gradient_in_float64(shape):
    with jax.enable_x64(True):
        args = arguments(shape, np.float64)
        for have, want in zip(run(batch_norm, args), run(plain, args), strict=True):
            assert have.dtype == jnp.float64
            np.testing.assert_allclose(have, want, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_other_platforms_sum_at_once(monkeypatch):
    args = arguments((2, 5, 6, 3))
    here = run(batch_norm, args)
    jax.clear_caches()
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, cpu, default: default(*a))
    for have, want in zip(here, run(batch_norm, args), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_has_statistics_in_float32():
    args = arguments((2, 8, 8, 5), jnp.bfloat16)
    found = run(batch_norm, args)
    expected = run(plain, [a.astype(jnp.float32) for a in args])
    assert found[1].dtype == found[2].dtype == jnp.float32
    for i, (have, want) in enumerate(zip(found, expected, strict=True)):
        assert i in (1, 2) or have.dtype == jnp.bfloat16
        error = np.abs(np.asarray(have, np.float32) - want)
        assert error.max() <= 2**-6 * np.abs(want).max()


def test_the_layer_is_flaxs():
    """Variables, output and running statistics, in training and after."""
    x = arguments((2, 6, 4, 3))[0]

    class Ours(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return Norm(momentum=0.7, epsilon=1e-3)(x, train)

    class Flax(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(not train, momentum=0.7, epsilon=1e-3, name="norm")(x)

    variables = Ours().init(jax.random.key(0), x, True)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(
        jnp.shape, Flax().init(jax.random.key(0), x, True)
    )
    for train in (True, False):
        ours, theirs = (
            net.apply(variables, x, train, mutable=["batch_stats"]) for net in (Ours(), Flax())
        )
        for have, want in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)


def test_sharded_batch_and_rows_are_one_batch():
    mesh = jax.make_mesh((2, 4), ("data", "space"), (AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, PartitionSpec("data", "space"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    args = arguments((4, 8, 3, 5))
    places = (rows, everywhere, everywhere)
    compiled = jax.jit(lambda *a: run(batch_norm, a), in_shardings=places).lower(*args).compile()
    assert "all-gather" not in compiled.as_text()
    found = compiled(*map(jax.device_put, args, places))
    for have, want in zip(found, run(batch_norm, args), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)
