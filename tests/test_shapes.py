"""The synthetic scenes: reproducible, self-consistent, and not to be solved by colour."""

import hashlib

import numpy as np
import pytest

from jaxseg.data.shapes import CLASSES, COUNT, MIN_PIXELS, PALETTE, SILHOUETTES, scene

SIZES = [(96, 96), (64, 120), (130, 50), (16, 16), (16, 70), (320, 256)]


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def _joined(seed: int, indices: range) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [S, H, W, 3] and labels uint8 [S, H, W] of several scenes."""
    scenes = [scene(seed, index) for index in indices]
    return np.stack([s["image"] for s in scenes]), np.stack([s["label"] for s in scenes])


def _mean_iou(predicted: np.ndarray, label: np.ndarray) -> float:
    pairs = len(CLASSES) * label.astype(int) + predicted
    confusion = np.bincount(pairs.ravel(), minlength=len(CLASSES) ** 2)
    confusion = confusion.reshape(len(CLASSES), -1)
    hits = confusion.diagonal()
    return float(np.mean(hits / (confusion.sum(axis=0) + confusion.sum(axis=1) - hits)))


def test_same_seed_and_index_give_the_same_scene():
    first, again = scene(5, 17), scene(5, 17)
    for key, value in first.items():
        np.testing.assert_array_equal(value, again[key])


def test_other_seeds_and_indices_give_other_scenes():
    keys = [(seed, index) for seed in range(4) for index in range(4)]
    assert len({_digest(scene(*key)["image"]) for key in keys}) == len(keys)
    assert len({_digest(scene(*key)["label"]) for key in keys}) == len(keys)


def test_the_data_set_never_changes_silently():
    first = scene(0, 0)
    assert (
        _digest(first["label"])
        == "37945538e27b62f4c637310904dee8cbdb1666b4ca6012884063255dfc985fd0"
    )
    assert (
        _digest(first["image"])
        == "8b1d1113d65995203ff563e4b67556ac1810fd8d33d93a5c5a07f49410c53fb2"
    )


def test_the_palette_tells_all_classes_apart():
    assert CLASSES[0] == "background" and len(set(CLASSES)) == len(CLASSES) >= 8
    assert len(PALETTE) == len(set(PALETTE)) == len(CLASSES)


@pytest.mark.parametrize("size", SIZES)
def test_shapes_types_and_ranges(size):
    height, width = size
    for index in range(8):
        s = scene(2, index, size)
        count = len(s["classes"])
        assert s["image"].shape == (height, width, 3) and s["image"].dtype == np.uint8
        assert s["label"].shape == size and s["label"].dtype == np.uint8
        assert s["boxes"].shape == (count, 4) and s["boxes"].dtype == np.float32
        assert s["classes"].shape == (count,) and s["classes"].dtype == np.int32
        assert s["masks"].shape == (count, height, width) and s["masks"].dtype == np.uint8
        assert s["image"].std() > 10
        assert set(np.unique(s["masks"])) <= {0, 1}
        assert np.all((s["classes"] >= 1) & (s["classes"] < len(CLASSES)))


@pytest.mark.parametrize("size", SIZES)
def test_masks_boxes_classes_and_label_agree(size):
    for index in range(8):
        s = scene(3, index, size)
        masks, classes = s["masks"].astype(int), s["classes"]
        assert masks.sum(axis=0).max() <= 1
        np.testing.assert_array_equal((masks * classes[:, None, None]).sum(axis=0), s["label"])
        for mask, box in zip(masks, s["boxes"], strict=True):
            y, x = np.nonzero(mask)
            assert len(y) >= MIN_PIXELS
            np.testing.assert_array_equal(box, [y.min(), x.min(), y.max() + 1, x.max() + 1])


def test_later_objects_lie_in_front():
    # Nothing covers the last object, so where it is a disk, the whole disk shows.
    areas = []
    for index in range(60):
        s = scene(4, index)
        y0, x0, y1, x1 = s["boxes"][-1]
        clear = min(y0, x0, 96 - y1, 96 - x1) > 0
        if clear and CLASSES[s["classes"][-1]] == "disk":
            areas.append(s["masks"][-1].sum() / ((y1 - y0) * (x1 - x0)))
    assert areas
    np.testing.assert_allclose(areas, np.pi / 4, atol=0.06)


def test_silhouettes_have_the_areas_of_their_formulas():
    axis = np.linspace(-2, 2, 401)
    areas = {
        name: np.mean(inside(*np.meshgrid(axis, axis)) < 0) * 4**2
        for name, inside in SILHOUETTES.items()
    }
    assert areas["disk"] == pytest.approx(np.pi * 0.95**2, rel=0.02)
    assert areas["square"] == pytest.approx(1.7**2, rel=0.02)
    assert areas["triangle"] == pytest.approx(3 * 3**0.5 * 0.62**2, rel=0.02)
    assert areas["ring"] == pytest.approx(np.pi * (1.0**2 - 0.52**2), rel=0.02)
    # No silhouette is so thin, or so much larger than the others, that its size gives it away.
    assert min(areas.values()) > 1 and max(areas.values()) < 3


def test_scenes_hold_all_classes_and_some_small_objects():
    scenes = [scene(1, index) for index in range(64)]
    assert all(COUNT[0] <= len(s["classes"]) <= COUNT[1] for s in scenes)
    assert set(np.concatenate([s["classes"] for s in scenes])) == set(range(1, len(CLASSES)))
    sides = [(s["boxes"][:, 2:] - s["boxes"][:, :2]).max(axis=1) for s in scenes]
    assert 0.35 < np.mean([side.min() <= 16 for side in sides]) < 0.85
    assert 0.05 < np.mean(np.concatenate(sides) <= 16) < 0.3
    assert np.mean([side.max() >= 26 for side in sides]) > 0.5


def test_objects_grow_with_the_scene():
    def typical_area(size: tuple[int, int]) -> float:
        masks = [scene(6, index, size)["masks"] for index in range(12)]
        return float(np.median(np.concatenate([m.sum(axis=(1, 2)) for m in masks])))

    assert 2.5 < typical_area((192, 192)) / typical_area((96, 96)) < 6


def test_objects_stand_out_from_what_surrounds_them():
    images, labels = _joined(8, range(60))
    # Three pixels apart, because the edge itself is softened.
    change = np.abs(images[:, :, 3:].astype(int) - images[:, :, :-3]).max(axis=-1)
    edge = labels[:, :, 3:] != labels[:, :, :-3]
    assert np.mean(change[edge] < 50) < 0.04


def test_colour_alone_does_not_solve_it():
    # The best guess from a pixel's colour: a histogram of each class over 16 x 16 x 16 colours.
    def bins(images: np.ndarray) -> np.ndarray:
        return (images.astype(int) // 16) @ [256, 16, 1]

    images, labels = _joined(0, range(200))
    counts = np.zeros((16**3, len(CLASSES)))
    np.add.at(counts, (bins(images).ravel(), labels.ravel()), 1)
    held_out, truth = _joined(1, range(100))
    for weights in (1, 1 / counts.sum(axis=0)):
        guess = (counts * weights).argmax(axis=1)[bins(held_out)]
        assert _mean_iou(guess, truth) < 0.4
