"""Suppression of points and masks against loops on random inputs."""

import jax
import numpy as np
import pytest

from jaxseg.ops.matrix_nms import matrix_nms, point_nms


def test_points_against_loops():
    scores = np.random.default_rng(0).random((2, 7, 7, 3)).astype(np.float32)
    scores[0, 3, 3] = scores[0, 3, 2]  # a tie stays
    expected = np.zeros_like(scores)
    for b, i, j, k in np.ndindex(scores.shape):
        window = scores[b, max(i - 1, 0) : i + 1, max(j - 1, 0) : j + 1, k]
        if scores[b, i, j, k] == window.max():
            expected[b, i, j, k] = scores[b, i, j, k]
    np.testing.assert_array_equal(point_nms(scores), expected)


def decayed(masks, categories, scores, kernel, sigma):
    """Equations 4 and 5, pair by pair."""
    f = {"gaussian": lambda x: np.exp(-sigma * x * x), "linear": lambda x: 1 - x}[kernel]
    m, out = len(masks), scores.copy()
    iou = np.zeros((m, m))
    for i, j in np.ndindex(m, m):
        if categories[i] == categories[j] and scores[i] > scores[j]:
            union = (masks[i] | masks[j]).sum()
            iou[i, j] = (masks[i] & masks[j]).sum() / union if union else 0
    for j in range(m):
        ratios = [1.0] + [f(iou[i, j]) / f(iou[:, i].max()) for i in range(m)]
        out[j] = scores[j] * min(ratios)
    return out


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_masks_against_loops(kernel):
    run = jax.jit(matrix_nms, static_argnums=(3, 4))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:20, :24]
        centres = rng.uniform(6, 18, (30, 2, 1, 1))
        masks = (y - centres[:, 0]) ** 2 + (x - centres[:, 1]) ** 2 < rng.uniform(4, 60, (30, 1, 1))
        masks[:2] = False  # empty ones
        categories = rng.integers(0, 2, 30)
        scores = rng.random(30).astype(np.float32)
        expected = decayed(masks, categories, scores, kernel, 2.0)
        got = run(masks, categories, scores, kernel, 2.0)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
        assert (expected < 0.7 * scores).sum() > 3


def test_the_same_mask_again_is_decayed_and_one_alone_is_not():
    mask = np.zeros((3, 4, 4), bool)
    mask[:, :2] = True
    scores = np.float32([0.5, 0.9, 0.7])
    got = np.asarray(matrix_nms(mask, np.array([1, 1, 1]), scores))
    np.testing.assert_allclose(got, [0.5 * np.exp(-2), 0.9, 0.7 * np.exp(-2)], rtol=1e-6)
    np.testing.assert_allclose(matrix_nms(mask[:1], np.array([3]), scores[:1]), [0.5])
    linear = np.asarray(matrix_nms(mask, np.array([1, 1, 1]), scores, "linear"))
    np.testing.assert_allclose(linear, [0, 0.9, 0], atol=1e-7)
