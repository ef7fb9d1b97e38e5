"""Confusion counts and scores against loops and hand-made matrices."""

import json

import jax
import numpy as np
import pytest

from jaxseg.ops.metrics import confusion, confusions, scores

count = jax.jit(confusion, static_argnames=("num_classes", "ignore"))


def reference(prediction, label, num_classes, ignore):
    counts = np.zeros((num_classes, num_classes), np.int64)
    for p, t in zip(prediction.ravel().tolist(), label.ravel().tolist(), strict=True):
        if t != ignore and 0 <= p < num_classes and 0 <= t < num_classes:
            counts[t, p] += 1
    return counts


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int16])
@pytest.mark.parametrize("num_classes", [1, 2, 19, 150])
def test_against_loops(dtype, num_classes):
    rng = np.random.default_rng(0)
    prediction, label = rng.integers(0, num_classes, size=(2, 2, 31, 17)).astype(dtype)
    label[rng.random(label.shape) < 0.2] = 255
    counts = count(prediction, label, num_classes)
    assert counts.dtype == np.int32 and counts.shape == (num_classes, num_classes)
    np.testing.assert_array_equal(counts, reference(prediction, label, num_classes, 255))


def test_out_of_range_is_dropped_and_never_wraps():
    values = np.array([-7, -1, 0, 1, 2, 3, 4, 200, 255, 256, 2**30], np.int32)
    prediction, label = (a.ravel() for a in np.meshgrid(values, values))
    counts = count(prediction, label, 3)
    np.testing.assert_array_equal(counts, np.ones((3, 3)))


def test_rows_are_truth():
    counts = np.asarray(count(np.array([1, 1, 0]), np.array([0, 0, 0]), 2))
    assert counts.tolist() == [[1, 2], [0, 0]]


@pytest.mark.parametrize("ignore", [0, 2, -1])
def test_other_ignore_values(ignore):
    prediction, label = np.random.default_rng(0).integers(0, 3, size=(2, 50))
    counts = count(prediction, label, 3, ignore)
    np.testing.assert_array_equal(counts, reference(prediction, label, 3, ignore))


def test_more_than_255_classes_keep_class_255():
    label = np.full((4,), 255, np.int32)
    counts = count(label, label, 300, ignore=-1)
    assert counts[255, 255] == 4 and counts.sum() == 4


def test_each_image_is_counted_by_itself():
    prediction, label = np.random.default_rng(0).integers(-1, 6, size=(2, 3, 7, 9))
    each = jax.jit(confusions, static_argnames="num_classes")(prediction, label, num_classes=5)
    assert each.dtype == np.int32
    expected = [reference(p, t, 5, 255) for p, t in zip(prediction, label, strict=True)]
    np.testing.assert_array_equal(each, expected)


def test_all_ignored():
    counts = count(np.zeros((2, 3), np.int32), np.full((2, 3), 255), 4)
    assert not np.any(counts)


def loops(counts):
    """Every score from the list of pixels itself."""
    classes = range(len(counts))
    pixels = [(t, p) for t in classes for p in classes for _ in range(counts[t][p])]
    iou, acc, weighted = [], [], 0.0
    dice, precision, binary = [], [], []
    for k in classes:
        hit = sum(t == k == p for t, p in pixels)
        union = sum(k in pixel for pixel in pixels)
        truth = sum(t == k for t, _ in pixels)
        iou.append(hit / union if union else None)
        acc.append(hit / truth if truth else None)
        weighted += truth * hit / union if truth else 0
        found = sum(p == k for _, p in pixels)
        dice.append(2 * hit / (truth + found) if union else None)
        precision.append(hit / found if found else None)
        same = sum((t == k) == (p == k) for t, p in pixels)
        binary.append(same / len(pixels) if union else None)

    def average(values):
        present = [value for value in values if value is not None]
        return sum(present) / len(present)

    return {
        "mIoU": average(iou),
        "mAcc": average(acc),
        "mAcc_binary": average(binary),
        "mDice": average(dice),
        "mPrecision": average(precision),
        "aAcc": sum(t == p for t, p in pixels) / len(pixels),
        "fwIoU": weighted / len(pixels),
        "IoU": iou,
        "Acc": acc,
        "Dice": dice,
        "precision": precision,
    }


def assert_close(result, expected):
    assert result.keys() == expected.keys()
    for key, want in expected.items():
        got = result[key]
        if not isinstance(want, list):
            got, want = [got], [want]
        assert [value is None for value in got] == [value is None for value in want], key
        assert [v for v in got if v is not None] == pytest.approx(
            [v for v in want if v is not None], rel=1e-12, abs=0
        ), key


@pytest.mark.parametrize("absent", [(), (1,), (0, 4)])
@pytest.mark.parametrize("predicted_only", [None, 2])
def test_scores_against_loops(absent, predicted_only):
    counts = np.random.default_rng(0).integers(0, 9, size=(5, 5))
    for k in absent:
        counts[k] = counts[:, k] = 0
    if predicted_only is not None:
        counts[predicted_only] = 0
    assert_close(scores(counts), loops(counts))


def test_scores_by_hand():
    # Class 2 is only predicted, class 3 is in neither.
    result = scores(np.array([[3, 1, 0, 0], [0, 2, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    expected = {
        "mIoU": (3 / 4 + 2 / 5 + 0) / 3,
        "mAcc": (3 / 4 + 2 / 4) / 2,
        "aAcc": 5 / 8,
        "fwIoU": (4 * 3 / 4 + 4 * 2 / 5) / 8,
        "mAcc_binary": (7 / 8 + 5 / 8 + 6 / 8) / 3,
        "mDice": (6 / 7 + 4 / 7 + 0) / 3,
        "mPrecision": (3 / 3 + 2 / 3 + 0 / 2) / 3,
        "IoU": [3 / 4, 2 / 5, 0.0, None],
        "Acc": [3 / 4, 2 / 4, None, None],
        "Dice": [6 / 7, 4 / 7, 0.0, None],
        "precision": [1.0, 2 / 3, 0.0, None],
    }
    assert_close(result, expected)


def test_perfect_prediction():
    result = scores(np.diag([5, 0, 2]))
    totals = [value for value in result.values() if not isinstance(value, list)]
    assert totals == [1.0] * 7


def test_no_pixels_gives_none_and_not_nan():
    result = scores(np.zeros((3, 3), np.int64))
    assert all(value is None or value == [None] * 3 for value in result.values())


def test_scores_are_plain_python():
    result = scores(np.array([[2, 1], [0, 0]], np.int64))
    assert json.loads(json.dumps(result)) == result
    assert type(result["aAcc"]) is float and type(result["IoU"][0]) is float


def test_counts_past_float32_and_int32():
    big = 2**40 + 1
    result = scores(np.array([[big, 1], [0, big]], np.int64))
    assert result["aAcc"] == 2 * big / (2 * big + 1) < 1
