"""Cross-entropy against a loop over pixels in float64."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxseg.ops.losses import cross_entropy

K = 5
WEIGHTS = (0.5, 2.0, 1.0, 0.0, 3.0)


def reference(logits, label, class_weights=None, ignore=255):
    """Loss and gradient in float64."""
    rows, labels = logits.astype(np.float64).reshape(-1, K), label.ravel()
    loss, total, slope = 0.0, 0.0, np.zeros(rows.shape)
    for n, k in enumerate(labels):
        if k == ignore:
            continue
        weight = class_weights[k] if class_weights else 1.0
        top = max(rows[n])
        powers = [math.exp(value - top) for value in rows[n]]
        loss += weight * (math.log(sum(powers)) + top - rows[n][k])
        for c in range(K):
            slope[n, c] = weight * (powers[c] / sum(powers) - (c == k))
        total += weight
    total = total or 1.0
    return loss / total, slope.reshape(logits.shape) / total


@partial(jax.jit, static_argnums=2)
def value_and_grad(logits, label, class_weights=None):
    return jax.value_and_grad(cross_entropy)(logits, label, class_weights=class_weights)


def batch(ignored=0.3, dtype=np.int32, ignore=255, shape=(2, 4, 3)):
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(*shape, K)).astype(np.float32)
    label = rng.integers(0, K, size=shape).astype(dtype)
    label[rng.random(shape) < ignored] = ignore
    return logits, label


@pytest.mark.parametrize("class_weights", [None, (), WEIGHTS])
@pytest.mark.parametrize(("ignored", "dtype"), [(0.0, np.int32), (0.3, np.uint8)])
def test_against_loops(class_weights, ignored, dtype):
    logits, label = batch(ignored, dtype)
    loss, gradient = value_and_grad(logits, label, class_weights)
    expected, expected_gradient = reference(logits, label, class_weights)
    assert loss.shape == () and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=1e-6)


def test_finite_differences():
    logits, label = batch()
    loss = jax.jit(partial(cross_entropy, label=label, class_weights=WEIGHTS))
    check_grads(loss, (logits,), 1, ["rev"], atol=1e-2, rtol=1e-2)


def test_uniform_logits_give_log_k():
    logits, label = batch()
    loss, _ = value_and_grad(np.zeros_like(logits), label)
    assert float(loss) == pytest.approx(math.log(K))


@pytest.mark.parametrize("ignore", [-1, 0, 4])
def test_other_ignore_values(ignore):
    logits, label = batch(ignore=ignore)
    expected, _ = reference(logits, label, ignore=ignore)
    loss = jax.jit(partial(cross_entropy, ignore=ignore))(logits, label)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
@pytest.mark.parametrize("fill", [0.0, np.inf, -np.inf, np.nan])
def test_all_ignored_is_zero_with_zero_gradient(class_weights, fill):
    label = np.full((2, 4, 3), 255)
    loss, gradient = value_and_grad(np.full((2, 4, 3, K), fill, np.float32), label, class_weights)
    assert float(loss) == 0
    np.testing.assert_array_equal(gradient, np.zeros((2, 4, 3, K)))


def test_only_classes_of_weight_zero():
    logits, _ = batch()
    label = np.full(logits.shape[:-1], 3)
    loss, gradient = value_and_grad(logits, label, WEIGHTS)
    assert float(loss) == 0 and not np.any(gradient)


@pytest.mark.parametrize("fill", [np.inf, -np.inf, np.nan])
def test_logits_under_ignored_pixels_do_not_matter(fill):
    logits, label = batch()
    poisoned = np.where((label == 255)[..., None], np.float32(fill), logits)
    clean, dirty = (value_and_grad(x, label) for x in (logits, poisoned))
    np.testing.assert_array_equal(clean[0], dirty[0])
    np.testing.assert_array_equal(clean[1], dirty[1])


def test_large_logits_do_not_overflow():
    logits, label = batch(ignored=0)
    loss, gradient = value_and_grad(1e4 * logits, label)
    np.testing.assert_allclose(loss, reference(1e4 * logits, label)[0], rtol=1e-5)
    assert np.isfinite(gradient).all()


def test_bfloat16_logits_are_computed_in_float32():
    logits, label = batch(shape=(2, 16, 16))
    half = jnp.asarray(logits, jnp.bfloat16)
    loss, gradient = value_and_grad(half, label)
    expected, _ = reference(np.asarray(half, np.float32), label)
    assert loss.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
