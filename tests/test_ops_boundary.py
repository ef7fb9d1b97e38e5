"""Scores near boundaries against erosion by hand, and against all distances one by one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.ops import boundary

K = 4
SHAPE = (60, 84)
SIZES = [(60, 84), (51, 84), (60, 30), (37, 41)]


def _scene(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Rectangles of random classes, as far as `size`; the last class is rare."""
    label = np.zeros(SHAPE, np.int32)
    for _ in range(12):
        top, left = rng.integers(0, size[0]), rng.integers(0, size[1])
        height, width = rng.integers(2, 25, 2)
        label[top : top + height, left : left + width] = rng.integers(0, K)
    label[size[0] :], label[:, size[1] :] = 255, 255
    return label


def _batch(seed: int, void: float = 0.01) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions, labels with void in and around objects, sizes."""
    rng = np.random.default_rng(seed)
    label = np.stack([_scene(rng, size) for size in SIZES])
    moved = np.roll(label, (1, 2), (1, 2))
    prediction = np.where(rng.random(label.shape) < 0.02, rng.integers(0, K, label.shape), moved)
    prediction = np.where(prediction == 255, 0, prediction)
    label[rng.random(label.shape) < void] = 255
    return prediction, label, np.array(SIZES, np.int32)


counts = jax.jit(partial(boundary.counts, num_classes=K))


def _cut(prediction: np.ndarray, label: np.ndarray, size: tuple) -> tuple[np.ndarray, np.ndarray]:
    """One image alone, the prediction ignored where the truth is."""
    label, prediction = (x[: size[0], : size[1]] for x in (label, prediction))
    return np.where(label == 255, 255, prediction), label


def _inner_band(mask: np.ndarray) -> np.ndarray:
    """Cheng et al.: the mask without its erosion by 3x3, 2 % of the diagonal times."""
    steps = max(1, round(0.02 * float(np.hypot(*mask.shape))))
    kept = np.pad(mask, 1)
    for _ in range(steps):
        kept = np.pad(kept, 1)
        corners = [
            kept[i : i + kept.shape[0] - 2, j : j + kept.shape[1] - 2]
            for i in range(3)
            for j in range(3)
        ]
        kept = np.min(corners, axis=0)
    return mask & ~kept[1:-1, 1:-1]


def _bands(prediction: np.ndarray, label: np.ndarray) -> list[list[int]]:
    rows = []
    for k in range(K):
        truth, found = _inner_band(label == k), _inner_band(prediction == k)
        rows.append([(truth & found).sum(), truth.sum(), found.sum()])
    return np.transpose(rows)


@pytest.mark.parametrize("seed", range(3))
def test_bands_are_those_of_each_class_eroded(seed):
    prediction, label, sizes = _batch(seed)
    bands = np.asarray(counts(prediction, label, sizes)["bands"])
    assert bands.dtype == np.int32
    expected = [_bands(*_cut(*item)) for item in zip(prediction, label, sizes, strict=True)]
    np.testing.assert_array_equal(bands, expected)
    assert (bands[:, 0] < bands[:, 1]).any()


def _contour(label: np.ndarray) -> np.ndarray:
    """Pixels beside a pixel of another value."""
    contour = np.zeros(label.shape, bool)
    for y, x in np.ndindex(label.shape):
        for i, j in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            inside = 0 <= i < label.shape[0] and 0 <= j < label.shape[1]
            contour[y, x] |= inside and label[i, j] != label[y, x]
    return contour


def _contours(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Csurka et al., with every distance computed."""
    limit = 0.0075 * np.hypot(*label.shape) + 1e-9
    found, true = _contour(prediction), _contour(label)
    rows = []
    for k in range(K):
        a, b = (
            np.argwhere(c & (x == k)).astype(float) for c, x in ((found, prediction), (true, label))
        )
        far = np.hypot(*(a[:, None] - b[None]).transpose(2, 0, 1))
        near = far <= limit
        rows.append([near.any(1).sum(), len(a), near.any(0).sum(), len(b)])
    return np.transpose(rows)


@pytest.mark.parametrize("seed", range(2))
def test_contours_match_within_the_tolerance(seed):
    prediction, label, sizes = _batch(seed)
    contours = np.asarray(counts(prediction, label, sizes)["contours"])
    expected = [_contours(*_cut(*item)) for item in zip(prediction, label, sizes, strict=True)]
    np.testing.assert_array_equal(contours, expected)


@pytest.mark.parametrize("size", [(36, 48), (240, 320), (16, 12)])
def test_a_contour_matches_up_to_the_tolerance_and_not_beyond(size):
    """Of 240x320 the tolerance is exactly 3 pixels, of 36x48 and 16x12 none."""
    reach = int(0.0075 * np.hypot(*size))
    label = np.zeros((1, *size), np.int32)
    label[0, :, : size[1] // 2] = 1
    for shift in (0, reach, reach + 1):
        contours = counts(
            np.roll(label, -shift, 2) & (np.arange(size[1]) < size[1] // 2),
            label,
            np.array([size], np.int32),
        )
        matched, found, *_ = np.asarray(contours["contours"])[0, :, 1]
        assert matched == (found if shift <= reach else 0) and found == size[0]


def _rings(prediction: np.ndarray, label: np.ndarray, widths: tuple) -> np.ndarray:
    """Hits, truth and predictions of each class at most `width` from another true label."""
    at = np.indices(label.shape).reshape(2, -1).T
    flat = label.ravel()
    nearest = np.full(flat.shape, 10**6)
    for value in np.unique(flat):
        mine, others = at[flat == value], at[flat != value]
        if len(others):
            steps = np.abs(mine[:, None] - others[None]).max(2).min(1)
            nearest[flat == value] = steps
    nearest = nearest.reshape(label.shape)
    table = []
    for width in widths:
        kept = (nearest <= width) & (label != 255)
        masks = [(label == prediction, label), (True, label), (True, prediction)]
        table.append([[(kept & m & (x == k)).sum() for k in range(K)] for m, x in masks])
    return np.array(table).swapaxes(0, 1)


def test_rings_are_distances_to_another_true_label():
    prediction, label, sizes = _batch(0)
    rings = np.asarray(counts(prediction, label, sizes)["rings"])
    assert rings.shape == (len(SIZES), 3, len(boundary.TRIMAP), K)
    for item, found in list(zip(zip(prediction, label, sizes, strict=True), rings, strict=True))[
        2:
    ]:
        expected = _rings(*_cut(*item), boundary.TRIMAP)
        np.testing.assert_array_equal(np.cumsum(found, axis=1), expected)


def test_a_batch_of_padded_images_counts_as_each_image_alone():
    prediction, label, sizes = _batch(1)
    together = counts(prediction, label, sizes)
    for i, size in enumerate(SIZES):
        cut = np.s_[i : i + 1, : size[0], : size[1]]
        alone = counts(prediction[cut], label[cut], sizes[i : i + 1])
        for key, value in alone.items():
            np.testing.assert_array_equal(value[0], together[key][i], err_msg=key)


def test_a_perfect_prediction_scores_one_whatever_stands_where_the_truth_is_void():
    _, label, sizes = _batch(2, void=0.05)
    rng = np.random.default_rng(0)
    prediction = np.where(label == 255, rng.integers(0, K, label.shape), label)
    out = jax.device_get(counts(prediction, label, sizes))
    scores = boundary.scores(out["bands"].sum(0), out["rings"].sum(0))
    assert scores["mBoundaryIoU"] == 1.0 and set(scores["trimap"]) == {1.0}
    assert {boundary.image_f1(c) for c in out["contours"]} == {1.0}


def test_an_image_of_one_class_has_a_border_but_no_contour():
    label = np.zeros((1, 20, 30), np.int32)
    out = jax.device_get(counts(label, label, np.array([[20, 30]], np.int32)))
    assert out["bands"][0, :, 0].tolist() == [96] * 3  # one pixel inside the image's border
    assert not out["contours"].any() and not out["rings"].any()
    assert boundary.image_f1(out["contours"][0]) is None
    scores = boundary.scores(out["bands"][0], out["rings"][0])
    assert scores["trimap"] == [None] * len(boundary.TRIMAP)
    assert scores["boundary_IoU"] == [1.0, None, None, None]


def test_all_ignored_counts_nothing():
    label = np.full((1, 9, 9), 255)
    out = counts(np.zeros_like(label), label, np.array([[9, 9]], np.int32))
    assert not any(np.asarray(value).any() for value in out.values())


def test_scores_by_hand():
    bands = [[3, 0, 0], [4, 2, 0], [5, 3, 0]]
    rings = np.zeros((3, len(boundary.TRIMAP), 3), int)
    rings[:, 0, :2] = [[1, 2], [2, 2], [4, 2]]
    rings[:, 1, :2] = [[3, 0], [4, 0], [3, 1]]
    scores = boundary.scores(np.array(bands), rings)
    assert scores["boundary_IoU"] == [3 / 6, 0.0, None]
    assert scores["mBoundaryIoU"] == pytest.approx(1 / 4)
    assert scores["trimap"][:2] == pytest.approx([(1 / 5 + 1) / 2, (4 / 9 + 2 / 3) / 2])
    assert scores["trimap"][2] == scores["trimap"][-1] == scores["trimap"][1]


def test_image_f1_by_hand():
    # Matched and all of the prediction, then of the truth; class 2 is only predicted.
    contours = np.array([[3, 0, 0], [4, 0, 5], [2, 0, 0], [4, 6, 0]])
    first = 2 * (3 / 4) * (2 / 4) / (3 / 4 + 2 / 4)
    assert boundary.image_f1(contours) == pytest.approx((first + 0) / 2)


@pytest.mark.parametrize("most", [0, 1, 2, 5, 100])
def test_distance_in_steps_of_a_king(most):
    mask = np.random.default_rng(0).random((2, 17, 23)) < 0.01
    mask[1] = False
    mask[1, 3, 20] = True
    at = np.indices(mask.shape[1:]).reshape(2, -1).T
    for found, one in zip(boundary.distance(jnp.asarray(mask), most), mask, strict=True):
        steps = np.abs(at[:, None] - np.argwhere(one)[None]).max(2).min(1)
        np.testing.assert_array_equal(found, np.minimum(steps, most).reshape(one.shape))
