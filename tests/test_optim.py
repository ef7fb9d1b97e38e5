"""The optimizer against plain NumPy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from jaxseg.config import default
from jaxseg.errors import InputError
from jaxseg.optim import make_optimizer, multipliers, path_of, schedule

STEPS = 20


def _optim(**fields) -> ConfigDict:
    optim = default().optim
    optim.update(fields)
    return optim


def _params() -> dict:
    rng = np.random.default_rng(0)
    return {
        "backbone": {"conv": {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}},
        "head": {"kernel": rng.normal(size=(4, 2)), "norm": {"scale": rng.normal(size=2)}},
    }


def _gradients(count: int) -> list[dict]:
    rng = np.random.default_rng(1)
    return [jax.tree.map(lambda p: rng.normal(size=p.shape), _params()) for _ in range(count)]


def _run(optim: ConfigDict, gradients: list[dict], params: dict | None = None) -> dict:
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params or _params())
    tx = make_optimizer(optim, STEPS, params)
    state = tx.init(params)
    for gradient in gradients:
        gradient = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradient)
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def _assert_close(ours: dict, theirs: dict) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), ours, theirs)


def _rates(optim: ConfigDict) -> list[float]:
    return [float(schedule(optim, STEPS)(jnp.int32(step))) for step in range(STEPS + 2)]


def test_poly_decays_from_lr_to_min_lr():
    rates = _rates(_optim(lr=0.5, power=0.9, min_lr=0.1))
    assert rates[0] == pytest.approx(0.5)
    assert rates[10] == pytest.approx(0.4 * 0.5**0.9 + 0.1)
    assert rates[20] == rates[21] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[:20], rates[1:21], strict=True))


def test_the_rate_drops_at_each_of_the_given_steps():
    rates = _rates(_optim(lr=0.5, power=0.0, drops=(4, 10), drop_factor=0.2))
    assert rates == pytest.approx([0.5] * 4 + [0.1] * 6 + [0.02] * 12)
    poly, both = _rates(_optim(lr=0.5)), _rates(_optim(lr=0.5, drops=(5,)))
    assert both == pytest.approx(poly[:5] + [0.1 * rate for rate in poly[5:]])


def test_power_0_is_a_constant_rate():
    assert _rates(_optim(lr=0.5, power=0.0, min_lr=0.1)) == pytest.approx([0.5] * 22)


def test_power_1_is_a_line():
    rates = _rates(_optim(lr=0.5, power=1.0))
    assert rates[:21] == pytest.approx([0.5 * (20 - step) / 20 for step in range(21)])


def test_warm_up_rises_in_a_line_and_meets_the_decay():
    plain, warm = _rates(_optim(lr=0.5)), _rates(_optim(lr=0.5, warmup=4))
    assert warm[:4] == pytest.approx([plain[step] * (step + 1) / 4 for step in range(4)])
    assert warm[4:] == pytest.approx(plain[4:])
    assert warm[0] > 0


def test_sgd_is_torchs():
    optim = _optim(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.05, power=0.9)
    gradients, params = _gradients(5), _params()
    momenta = jax.tree.map(np.zeros_like, params)
    for step, gradient in enumerate(gradients):
        lr = 0.1 * (1 - step / STEPS) ** 0.9
        decayed = jax.tree.map(lambda g, p: g + 0.05 * p * (p.ndim > 1), gradient, params)
        momenta = jax.tree.map(lambda m, g: 0.9 * m + g, momenta, decayed)
        params = jax.tree.map(lambda p, m, lr=lr: p - lr * m, params, momenta)
    _assert_close(_run(optim, gradients), params)


def test_adamw_is_torchs():
    optim = _optim(name="adamw", lr=0.1, betas=(0.8, 0.95), weight_decay=0.05, power=0.9)
    gradients, params = _gradients(5), _params()
    first, second = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    for step, gradient in enumerate(gradients):
        lr = 0.1 * (1 - step / STEPS) ** 0.9
        first = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g**2, second, gradient)

        def moved(p, m, v, lr=lr, t=step + 1):
            direction = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
            return p - lr * direction - lr * 0.05 * p * (p.ndim > 1)

        params = jax.tree.map(moved, params, first, second)
    _assert_close(_run(optim, gradients), params)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_decay_leaves_out_vectors(name):
    optim = _optim(name=name, lr=0.1, weight_decay=0.5, power=0.0)
    zeros = jax.tree.map(np.zeros_like, _params())
    before, after = _params(), _run(optim, [zeros])
    expected = jax.tree.map(lambda p: p * (0.95 if p.ndim > 1 else 1.0), before)
    _assert_close(after, expected)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_multipliers_scale_the_whole_update_and_0_freezes(name):
    rules = (("conv/bias", 10.0), ("backbone", 0.0))
    fields = {"name": name, "lr": 0.01, "weight_decay": 0.5, "power": 0.0}
    gradients, before = _gradients(1), _params()
    plain = _run(_optim(**fields), gradients)
    scaled = _run(_optim(multipliers=rules, **fields), gradients)
    _assert_close(scaled["head"], plain["head"])
    kernel = scaled["backbone"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel, before["backbone"]["conv"]["kernel"].astype(np.float32))
    bias = before["backbone"]["conv"]["bias"]
    step = plain["backbone"]["conv"]["bias"] - bias
    np.testing.assert_allclose(scaled["backbone"]["conv"]["bias"], bias + 10 * step, rtol=1e-4)


def test_the_first_multiplier_that_matches_wins():
    rules = (("norm/", 2.0), ("^head", 10.0), ("kernel$", 0.5))
    factors = multipliers(_optim(multipliers=rules), _params())
    assert factors == {
        "backbone": {"conv": {"kernel": 0.5, "bias": 1.0}},
        "head": {"kernel": 10.0, "norm": {"scale": 2.0}},
    }


def test_a_multiplier_that_matches_nothing_is_named():
    rules = (("head", 10.0), ("decoder", 2.0))
    with pytest.raises(InputError, match=r"\['decoder'\] match no parameter") as error:
        multipliers(_optim(multipliers=rules), _params())
    assert "backbone/conv/bias" in str(error.value)


@pytest.mark.parametrize("rules", [("head", 10.0), (("(", 1.0),), (("head", "x"),), ((1, 1.0),)])
def test_multipliers_that_are_no_pairs_of_regex_and_number_are_refused(rules):
    with pytest.raises(InputError, match=r"optim\.multipliers is .*needs pairs"):
        multipliers(_optim(multipliers=rules), _params())


def test_paths_are_the_keys_with_slashes():
    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(_params())]
    assert "backbone/conv/kernel" in paths and "head/norm/scale" in paths


def test_clipping_bounds_the_global_norm_of_the_gradient():
    fields = {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "power": 0.0}
    gradient = _gradients(1)[0]
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))
    assert norm > 1
    clipped = _run(_optim(clip=1.0, **fields), [gradient])
    _assert_close(clipped, jax.tree.map(lambda p, g: p - g / norm, _params(), gradient))
    loose = _run(_optim(clip=2 * float(norm), **fields), [gradient])
    _assert_close(loose, jax.tree.map(lambda p, g: p - g, _params(), gradient))
