"""The loss of soft masks and their errors, beside the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.ops import matting


def _case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (2, 5, 6, 2)).astype(np.float32)
    alpha = rng.uniform(0, 1, (2, 5, 6)).astype(np.float32)
    label = (alpha >= 0.5).astype(np.int32)
    label[:, :2] = 255
    return logits, alpha, label


def test_the_loss_is_its_formula_where_pixels_count():
    logits, alpha, label = _case()
    p = 1 / (1 + np.exp(logits[..., 0] - logits[..., 1]))
    counted = label != 255
    entropy = -(alpha * np.log(p) + (1 - alpha) * np.log(1 - p))[counted].mean()
    distance = np.abs(p - alpha)[counted].mean()
    value, logs = matting.loss(logits, alpha, label, 0.7)
    assert logs["ce_loss"] == pytest.approx(entropy, rel=1e-5)
    assert logs["alpha_loss"] == pytest.approx(distance, rel=1e-5)
    assert value == logs["loss"] == pytest.approx(entropy + 0.7 * distance, rel=1e-5)


def test_pixels_that_count_nowhere_have_no_gradient_and_none_is_not_nan():
    logits, alpha, label = _case()
    gradient = jax.grad(lambda x: matting.loss(x, alpha, label)[0])(logits)
    assert (gradient[:, :2] == 0).all() and (gradient[:, 2:] != 0).any()
    value, _ = matting.loss(logits, alpha, np.full_like(label, 255))
    assert value == 0


def test_the_least_loss_is_at_the_truth():
    _, alpha, label = _case()
    alpha = alpha.clip(0.05, 0.95)
    right = jnp.stack([jnp.log(1 - alpha), jnp.log(alpha)], axis=-1)
    gradient = jax.grad(lambda x: matting.loss(x, alpha, label, 0.0)[0])(right)
    assert jnp.abs(gradient).max() < 1e-6
    np.testing.assert_allclose(matting.opacity(right), alpha, atol=1e-6)


def test_errors_are_means_and_a_sum_in_thousands():
    logits, alpha, label = _case()
    p = np.asarray(matting.opacity(logits))
    found = matting.scores(matting.sums(logits, alpha, label).sum(0), 2)
    difference = (p - alpha)[label != 255]
    assert found["MAD"] == pytest.approx(np.abs(difference).mean(), rel=1e-5)
    assert found["MSE"] == pytest.approx((difference**2).mean(), rel=1e-5)
    assert found["SAD"] == pytest.approx(np.abs(difference).sum() / 2 / 1000, rel=1e-5)
