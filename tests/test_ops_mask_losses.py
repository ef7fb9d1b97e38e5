"""Losses of objects against their formulas in float64, and at the ends of their range."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.ops.mask_losses import binary_cross_entropy, mask_dice, sigmoid_focal, smooth_l1


def test_focal_loss_is_its_formula():
    rng = np.random.default_rng(0)
    logits, truth = rng.normal(0, 3, (4, 7)).astype(np.float32), rng.random((4, 7)) < 0.3
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    p, alpha = np.where(truth, p, 1 - p), np.where(truth, 0.25, 0.75)
    expected = -alpha * (1 - p) ** 2 * np.log(p)
    np.testing.assert_allclose(sigmoid_focal(logits, truth), expected, rtol=1e-5)


def test_focal_loss_of_sure_logits_is_finite_and_so_is_its_slope():
    logits, truth = jnp.array([-300.0, 300.0, -300.0, 300.0]), jnp.array([True, True, False, False])
    value, slope = jax.value_and_grad(lambda x: sigmoid_focal(x, truth).sum())(logits)
    np.testing.assert_allclose(value, 300 * (0.25 + 0.75))
    np.testing.assert_allclose(slope, [-0.25, 0, 0, 0.75], atol=1e-6)


def test_losses_of_boxes_are_their_formulas():
    rng = np.random.default_rng(0)
    x, truth = rng.normal(0, 2, 20).astype(np.float32), rng.random(20) < 0.5
    p = 1 / (1 + np.exp(-x.astype(np.float64)))
    expected = -np.log(np.where(truth, p, 1 - p))
    np.testing.assert_allclose(binary_cross_entropy(x, truth), expected, rtol=1e-5)
    for beta in (0.0, 0.5, 2.0):
        expected = [v**2 / (2 * beta) if abs(v) < beta else abs(v) - beta / 2 for v in x]
        np.testing.assert_allclose(smooth_l1(x, beta), expected, rtol=1e-5)


def test_dice_is_its_formula_and_finite_of_nothing():
    rng = np.random.default_rng(0)
    p, truth = rng.random((3, 5, 6)).astype(np.float32), rng.random((3, 5, 6)) < 0.4
    hit, squares = (p * truth).sum((1, 2)), (p * p).sum((1, 2)) + truth.sum((1, 2))
    np.testing.assert_allclose(mask_dice(p, truth), 1 - 2 * hit / (squares + 2e-3), rtol=1e-5)
    nothing = np.zeros((1, 2, 2), np.float32)
    assert mask_dice(nothing, nothing > 0) == 1
    assert mask_dice(np.ones((1, 9, 9), np.float32), np.ones((1, 9, 9), bool)) < 1e-4
