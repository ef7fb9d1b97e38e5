"""What was found returns to the image's own size, whole and in its place."""

import jax
import numpy as np
import pytest

from jaxseg.data.colours import Classes, voc_palette
from jaxseg.found import Found, packed, resized, unpacked

CLASSES = Classes(("ground", "cat", "dog"), voc_palette(3), (1, 2))


def _answer(masks: np.ndarray, **fields) -> dict:
    count = masks.shape[1]
    scores = np.linspace(0.1, 0.9, count, dtype=np.float32)[None]
    classes = np.ones((1, count), np.int32)
    return {"instances": {"masks": masks, "scores": scores, "classes": classes, **fields}}


def test_answers_are_packed_and_unpacked_without_loss():
    rng = np.random.default_rng(0)
    masks = rng.random((1, 5, 9, 13)) < 0.5
    classes = np.int32([[2, -1, 1, 1, -1]])
    out = _answer(masks) | {"semantic": rng.integers(0, 3, (1, 9, 13)), "logits": 0.0}
    out["instances"]["classes"] = classes
    kept = jax.device_get(packed(out))
    assert kept.keys() == {"semantic", "instances"}
    found = unpacked(kept, 0, (7, 10), (7, 10))
    np.testing.assert_array_equal(found.instances["masks"], masks[0, [3, 2, 0], :7, :10])
    assert found.instances["classes"].tolist() == [1, 1, 2]  # the surest first
    np.testing.assert_array_equal(found.semantic, out["semantic"][0, :7, :10])
    assert found.semantic.dtype == np.uint8 and found.panoptic is None


def test_little_stuff_is_void_by_the_pixels_of_the_image_itself():
    panoptic = np.full((1, 6, 8), 2000, np.int32)  # what was added looks like class 2
    panoptic[0, :4, :4] = 1000
    panoptic[0, 0, :2], panoptic[0, 1, 0] = 2000, 3007
    kept = {"panoptic": panoptic}
    have = unpacked(kept, 0, (4, 4), (4, 4), stuff_area=3).panoptic
    want = panoptic[0, :4, :4].copy()
    want[0, :2] = 255_000  # two pixels of the image; the object of one pixel stays
    np.testing.assert_array_equal(have, want)
    assert have.dtype == np.int32
    large = unpacked(kept, 0, (4, 4), (8, 8), stuff_area=3).panoptic  # eight pixels
    np.testing.assert_array_equal(large, panoptic[0, :4, :4].repeat(2, 0).repeat(2, 1))


def test_what_lies_outside_the_image_is_left_out_and_boxes_are_clipped():
    masks = np.zeros((1, 3, 16, 16), bool)
    masks[0, 0, 2:6, 2:6] = masks[0, 1, 12:15, 3:5] = masks[0, 2, 4:12, 4:12] = True
    boxes = np.float32([[[2, 2, 6, 6], [12, 3, 15, 5], [4, 4, 12, 12]]])
    for fields in ({}, {"boxes": boxes}):
        found = unpacked(jax.device_get(packed(_answer(masks, **fields))), 0, (8, 10), (8, 10))
        assert found.instances["scores"].tolist() == pytest.approx([0.9, 0.1])
    assert found.instances["boxes"].tolist() == [[4, 4, 8, 10], [2, 2, 6, 6]]
    large = unpacked(jax.device_get(packed(_answer(masks, boxes=boxes))), 0, (8, 10), (16, 30))
    assert large.instances["boxes"].tolist() == [[8, 12, 16, 30], [4, 6, 12, 18]]
    assert large.instances["masks"].shape == (2, 16, 30)


@pytest.mark.parametrize("size", [(8, 10), (16, 30)])
def test_masks_are_bool_of_any_size_and_number(size):
    for count in (0, 2):
        kept = jax.device_get(packed(_answer(np.ones((1, count, 16, 16), bool))))
        masks = unpacked(kept, 0, (8, 10), size).instances["masks"]
        assert masks.shape == (count, *size) and masks.dtype == bool


@pytest.mark.parametrize("size", [(40, 44), (11, 7), (20, 26), (33, 13)])
def test_masks_are_resized_bilinearly(size):
    rng, have = np.random.default_rng(0), (20, 26)
    factor = tuple(n / h for n, h in zip(size, have, strict=True))
    masks = [np.zeros(have, bool), np.ones(have, bool), rng.random(have) < 0.5]
    masks += [np.zeros(have, bool)]
    masks[3][7:13, 5:20] = True
    for mask in masks:
        expected = np.zeros(size)
        for i in range(size[0]):
            for j in range(size[1]):
                at = [(n + 0.5) / f - 0.5 for n, f in zip((i, j), factor, strict=True)]
                at = [min(max(a, 0), n - 1) for a, n in zip(at, have, strict=True)]
                for y in (int(at[0]), int(at[0]) + 1):
                    for x in (int(at[1]), int(at[1]) + 1):
                        share = (1 - abs(at[0] - y)) * (1 - abs(at[1] - x))
                        if share > 0:
                            expected[i, j] += share * mask[y, x]
        out = resized(mask, factor, size)
        clear = np.abs(expected - 0.5) > 1e-5
        np.testing.assert_array_equal(out[clear], (expected >= 0.5)[clear])


def test_a_label_is_made_of_objects_where_there_is_no_other():
    masks = np.zeros((2, 4, 4), bool)
    masks[0, :2], masks[1, 1:3] = True, True
    classes, scores = np.int32([1, 2]), np.float32([0.9, 0.6])
    found = Found((4, 4), instances={"masks": masks, "classes": classes, "scores": scores})
    assert found.label(CLASSES, (1, 2), 0.5)[:, 0].tolist() == [1, 1, 2, 0]
    assert found.label(CLASSES, (1, 2), 0.7)[:, 0].tolist() == [1, 1, 0, 0]
    assert found.label(CLASSES, (0, 1, 2), 0.5)[:, 0].tolist() == [1, 1, 2, 255]
    panoptic = np.int32([[255000, 1001], [2001, 0]])
    label = Found((2, 2), panoptic=panoptic).label(CLASSES, (1,), 0.5)
    assert label.tolist() == [[255, 1], [2, 0]]
