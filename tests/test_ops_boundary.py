"""Scores near boundaries against erosion by hand, and against all distances one by one."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

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


@pytest.mark.slow
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


def _mean_ratio(parts: list, wholes: list) -> float | None:
    """The mean of part / whole over the classes that are there."""
    ratios = [p / w for p, w in zip(parts, wholes, strict=True) if w]
    return float(np.mean(ratios)) if ratios else None


def _image_f1(contours: np.ndarray) -> float | None:
    values = []
    for hit, found, hit_truth, truth in np.transpose(contours).tolist():
        if truth:
            precision, recall = hit / found if found else 0, hit_truth / truth
            both = precision + recall
            values.append(2 * precision * recall / both if both else 0)
    return float(np.mean(values)) if values else None


@pytest.mark.parametrize("seed", [0, 7])
def test_scores_of_all_images_are_those_of_counting_without_jax(seed):
    batch = _batch(seed)
    out = jax.device_get(counts(*batch))
    scores = boundary.scores(out["bands"].sum(0), out["rings"].sum(0))
    cut = [_cut(*item) for item in zip(*batch, strict=True)]
    both, truth, found = np.sum([_bands(*item) for item in cut], axis=0).tolist()
    union = [t + f - b for b, t, f in zip(both, truth, found, strict=True)]
    assert scores["mBoundaryIoU"] == pytest.approx(_mean_ratio(both, union), rel=1e-12)
    for found_iou, b, u in zip(scores["boundary_IoU"], both, union, strict=True):
        assert found_iou == (pytest.approx(b / u, rel=1e-12) if u else None)
    for width, value in zip(boundary.TRIMAP, scores["trimap"], strict=True):
        hit, true, said = np.sum([_ring(*item, width) for item in cut], axis=0).tolist()
        union = [t + s - h for h, t, s in zip(hit, true, said, strict=True)]
        assert value == pytest.approx(_mean_ratio(hit, union), rel=1e-12)
    for contours, item in zip(out["contours"], cut, strict=True):
        expected = _image_f1(_contours(*item))
        assert boundary.image_f1(contours) == pytest.approx(expected, rel=1e-12)


def _ring(prediction: np.ndarray, label: np.ndarray, width: int) -> list[list[int]]:
    """Hits, truth and predictions of each class at most `width` king's steps from another label."""
    nearest = np.full(label.shape, 10**6)
    for value in np.unique(label):
        if (label != value).any():
            steps = ndimage.distance_transform_cdt(label == value, "chessboard")
            nearest = np.where(label == value, steps, nearest)
    kept = (nearest <= width) & (label != 255)
    masks = [(label == prediction, label), (True, label), (True, prediction)]
    return [[(kept & m & (x == k)).sum() for k in range(K)] for m, x in masks]


def _near(ours: np.ndarray, theirs: np.ndarray, reach: int) -> np.ndarray:
    """Whether the squared distance from each class of `ours` to it in `theirs` is at most reach."""
    found = np.zeros(ours.shape, bool)
    for k in np.intersect1d(ours[ours >= 0], theirs):
        far = ndimage.distance_transform_edt(theirs != k)
        found |= (ours == k) & (np.rint(far**2) <= reach)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("classes", [1, 3, 32, 33, 150])
@pytest.mark.parametrize("shape", [(40, 61), (1, 30), (33, 2)])
def test_marks_near_marks_of_their_class_for_every_reach(classes, shape):
    """A reach for each image, up to that of the largest: every disk up to radius 8."""
    reaches = np.array([0, 1, 2, 3, 4, 5, 8, 9, 10, 13, 24, 25, 26, 50, 63, 64], np.int32)
    rng = np.random.default_rng(classes)
    marks = rng.integers(0, classes, (2, len(reaches), *shape))
    marks[rng.random(marks.shape) < 0.9] = -1
    marks = marks.astype(np.int32)
    out = boundary._near(*map(jnp.asarray, marks), reaches[:, None, None], 64, classes)
    for which, found in enumerate(out):
        ours, theirs = marks[which], marks[1 - which]
        expected = [_near(*item) for item in zip(ours, theirs, reaches, strict=True)]
        np.testing.assert_array_equal(found & (ours >= 0), expected)
    assert shape != (40, 61) or 0 < np.mean(out[0])


def test_the_steps_of_matching_contours_grow_with_the_radius_alone():
    """Of the disk's area, or the classes that are not there, nothing is left."""

    def steps(height: int, width: int) -> int:
        label = jax.ShapeDtypeStruct((1, height, width), jnp.int32)
        size = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        jaxpr = jax.make_jaxpr(partial(boundary.counts, num_classes=K))(label, label, size)
        return max(int(n) for n in re.findall(r"length=(\d+)", str(jaxpr)))

    assert steps(1024, 2048) < 50 and steps(8192, 8192) < 240
