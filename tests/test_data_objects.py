"""Copy-paste: image, label and objects of both examples stay aligned."""

import numpy as np
import pytest

from jaxseg.data.objects import bounds, copy_paste, of_classes, slots
from jaxseg.errors import InputError


def _drawn(label: np.ndarray) -> np.ndarray:
    return np.repeat(label[..., None] * np.uint8(20), 3, axis=2)


def _square(value: int, top: int, crowd: bool = False) -> dict:
    label = np.zeros((24, 32), np.uint8)
    label[top : top + 8, 4:20] = value
    objects = {
        "masks": (label > 0).astype(np.uint8)[None],
        "classes": np.int32([value]),
        "crowd": np.array([crowd]),
    }
    return {"image": _drawn(label), "label": label, "instances": objects}


def test_pasted_objects_hide_what_is_below():
    sizes = set()
    for seed in range(20):
        out = copy_paste(_square(1, 4), _square(2, 8), np.random.default_rng(seed))
        np.testing.assert_array_equal(out["image"], _drawn(out["label"]))
        areas = dict(
            zip(
                out["instances"]["classes"].tolist(),
                out["instances"]["masks"].sum((1, 2)).tolist(),
                strict=True,
            )
        )
        assert areas in ({1: 128}, {1: 64, 2: 128})
        sizes.add(len(areas))
    assert sizes == {1, 2}


def test_objects_that_are_wholly_hidden_are_gone_and_crowds_are_not_pasted():
    for seed in range(20):
        out = copy_paste(_square(1, 8), _square(2, 8), np.random.default_rng(seed))
        assert out["instances"]["classes"].tolist() in ([1], [2])
        out = copy_paste(_square(1, 4), _square(2, 8, True), np.random.default_rng(seed))
        assert out["instances"]["classes"].tolist() == [1]


def test_copy_paste_without_objects_is_an_input_error():
    semantic = {key: _square(1, 4)[key] for key in ("image", "label")}
    with pytest.raises(InputError, match="copy_paste needs a data set that tells objects apart"):
        copy_paste(semantic, semantic, np.random.default_rng(0))


def _objects(*areas: int) -> dict:
    """An object for each area, a row each, of classes 1, 2, ..."""
    masks = np.zeros((len(areas), 8, 16), np.uint8)
    for i, area in enumerate(areas):
        masks[i, i, :area] = 1
    crowd = np.arange(len(areas)) == 1
    return {"masks": masks, "classes": np.arange(1, len(areas) + 1, dtype=np.int32), "crowd": crowd}


def test_objects_are_dealt_to_slots_and_the_rest_is_empty():
    found = slots(_objects(3, 5), 4)
    assert found["masks"].shape == (4, 8, 16) and found["masks"].dtype == np.uint8
    assert found["masks"].sum((1, 2)).tolist() == [3, 5, 0, 0]
    assert found["classes"].dtype == np.int32 and found["classes"].tolist() == [1, 2, -1, -1]
    assert found["boxes"].dtype == np.float32
    assert found["boxes"].tolist() == [[0, 0, 1, 3], [1, 0, 2, 5], [0] * 4, [0] * 4]
    assert found["crowd"].tolist() == [False, True, False, False] and found["dropped"] == 0


def test_of_more_objects_than_slots_the_smallest_are_dropped_and_counted():
    found = slots(_objects(3, 9, 1, 7, 3), 3)
    assert found["classes"].tolist() == [1, 2, 4] and found["dropped"] == 2
    assert found["masks"].sum((1, 2)).tolist() == [3, 9, 7]


def test_no_objects_fill_no_slots():
    found = slots(_objects(), 2)
    assert found["masks"].shape == (2, 8, 16) and found["classes"].tolist() == [-1, -1]


def test_other_classes_and_objects_without_a_pixel_are_left_out():
    assert of_classes(_objects(4, 0, 2, 6), (2, 3, 9))["classes"].tolist() == [3]
    assert of_classes(_objects(), (1,))["masks"].shape == (0, 8, 16)
    assert of_classes(_objects(4, 0, 2, 6), (2, 3, 9), empty=True)["classes"].tolist() == [2, 3]


def test_bounds_just_hold_the_mask():
    rng = np.random.default_rng(0)
    masks = rng.random((50, 9, 11)) < rng.choice([0, 0.02, 0.1], (50, 1, 1))
    for mask, box in zip(masks, bounds(masks).tolist(), strict=True):
        y, x = np.nonzero(mask)
        assert box == ([y.min(), x.min(), y.max() + 1, x.max() + 1] if len(y) else [0] * 4)
