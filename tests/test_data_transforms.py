"""Augmentation: image and label stay aligned, sizes are right, chances are fair and seeded."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxseg.config import default
from jaxseg.data import transforms
from jaxseg.data.colours import IGNORE

STEP = 20  # the images here are labels drawn as brightness: image = STEP * label
MEAN = (101.4, 51.6, 7.0)


def _data(**fields) -> ConfigDict:
    data = default().data
    data.update(crop=(24, 32), mean=MEAN, flip=False, **fields)
    return data


def _drawn(label: np.ndarray, channels: int = 3) -> dict:
    return {"image": np.repeat(label[..., None] * np.uint8(STEP), channels, axis=2), "label": label}


def _regions(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A label of a few large rectangles on ground 0."""
    label = np.zeros(size, np.uint8)
    for value in range(1, 8):
        top, left = rng.integers(0, size[0] - 8), rng.integers(0, size[1] - 8)
        label[top : top + rng.integers(8, 24), left : left + rng.integers(8, 24)] = value
    return label


def _inside(label: np.ndarray, reach: int) -> np.ndarray:
    """Where all neighbours within `reach` pixels have the same label, borders left out."""
    same = np.zeros(label.shape, bool)
    core = label[reach:-reach, reach:-reach]
    same[reach:-reach, reach:-reach] = True
    for dy in range(2 * reach + 1):
        for dx in range(2 * reach + 1):
            shifted = label[dy : dy + core.shape[0], dx : dx + core.shape[1]]
            same[reach:-reach, reach:-reach] &= shifted == core
    return same


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("channels", [1, 3])
def test_without_scaling_image_and_label_stay_exactly_aligned(seed, channels):
    rng = np.random.default_rng(seed)
    data = _data()
    data.flip = data.flip_vertical = True
    example = _drawn(_regions(rng, (40, 50)), channels)
    out = transforms.augment(example, rng, data)
    assert out["image"].shape == (24, 32, channels) and out["label"].shape == (24, 32)
    np.testing.assert_array_equal(out["image"], _drawn(out["label"], channels)["image"])


@pytest.mark.parametrize("scale", [(0.5, 0.5), (0.7, 0.9), (1.3, 1.4), (2.0, 2.0)])
@pytest.mark.parametrize("seed", range(6))
def test_scaled_image_and_label_stay_aligned_away_from_edges(seed, scale):
    rng = np.random.default_rng(seed)
    data = _data(scale=scale)
    data.flip = data.flip_vertical = True
    out = transforms.augment(_drawn(_regions(rng, (80, 90))), rng, data)
    assert out["image"].dtype == out["label"].dtype == np.uint8
    inside = _inside(out["label"], reach=2)
    assert inside.mean() > 0.2
    difference = out["image"].astype(int) - STEP * out["label"][..., None].astype(int)
    assert np.abs(difference[inside]).max() <= 1


def test_scaling_shrinks_and_grows_by_its_factor():
    label = np.zeros((80, 90), np.uint8)
    label[30:50, 30:60] = 1
    for factor in (0.5, 2.0):
        data = _data(scale=(factor, factor))
        data.crop = (round(80 * factor), round(90 * factor))
        out = transforms.augment(_drawn(label), np.random.default_rng(0), data)
        assert (out["label"] == 1).sum() == 20 * 30 * factor**2
        assert (out["label"] != IGNORE).all()


def test_resized_labels_hold_no_new_ids():
    label = np.where(_regions(np.random.default_rng(0), (61, 47)) % 2, 0, IGNORE).astype(np.uint8)
    for size in [(30, 23), (122, 94), (61, 46), (1, 1)]:
        resized = transforms.resize_label(label, size)
        assert resized.shape == size and set(np.unique(resized)) <= {0, IGNORE}


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (61, 47), (13, 200)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resized_images_have_the_size_and_the_channels_that_were_asked(size, channels):
    image = np.random.default_rng(0).integers(0, 256, (31, 33, channels), np.uint8)
    resized = transforms.resize(image, size)
    assert resized.shape == (*size, channels) and resized.dtype == np.uint8


def test_constant_images_stay_constant_when_resized():
    image = np.full((31, 33, 3), 77, np.uint8)
    assert (transforms.resize(image, (64, 20)) == 77).all()
    assert transforms.resize(image, (31, 33)) is image


@pytest.mark.parametrize("size", [(11, 13), (23, 33), (25, 31), (24, 32), (1, 1), (97, 61)])
def test_crops_of_any_image_have_the_crop_size_and_pad_with_mean_and_ignore(size):
    rng = np.random.default_rng(0)
    example = {"image": np.full((*size, 3), 200, np.uint8), "label": np.ones(size, np.uint8)}
    out = transforms.augment(example, rng, _data())
    assert out["image"].shape == (24, 32, 3) and out["label"].shape == (24, 32)
    inside = out["label"] == 1
    assert inside.sum() == min(size[0], 24) * min(size[1], 32)
    assert (out["label"][~inside] == IGNORE).all()
    assert (out["image"][inside] == 200).all()
    assert (out["image"][~inside] == np.array([101, 52, 7])).all()


def test_crops_reach_every_place():
    label = (np.arange(5)[:, None] * 7 + np.arange(7)).astype(np.uint8)
    rng, corners = np.random.default_rng(0), set()
    for _ in range(200):
        image, cut = transforms.random_crop(label[..., None], label, (3, 4), np.zeros(1), rng)
        np.testing.assert_array_equal(image[..., 0], cut)
        corners.add(int(cut[0, 0]))
    assert corners == {7 * y + x for y in range(3) for x in range(4)}


@pytest.mark.parametrize("axis", [0, 1])
def test_flips_happen_half_of_the_time_along_their_axis_only(axis):
    data = _data(flip_vertical=axis == 0)
    data.flip = axis == 1
    label = np.arange(24 * 32, dtype=np.int64).reshape(24, 32).astype(np.uint8)
    mirrored, rng = np.flip(label, axis), np.random.default_rng(1)
    count = 0
    for _ in range(400):
        out = transforms.augment(_drawn(label), rng, data)["label"]
        flipped = (out == mirrored).all()
        assert flipped or (out == label).all()
        count += flipped
    assert 150 < count < 250


def test_without_flips_nothing_is_mirrored():
    label = np.arange(24 * 32, dtype=np.int64).reshape(24, 32).astype(np.uint8)
    rng = np.random.default_rng(1)
    for _ in range(20):
        np.testing.assert_array_equal(
            transforms.augment(_drawn(label), rng, _data())["label"], label
        )


def test_photometric_changes_the_image_and_never_the_label():
    rng, changed = np.random.default_rng(0), 0
    example = _drawn(_regions(rng, (24, 32)))
    for _ in range(20):
        out = transforms.augment(example, rng, _data(photometric=True))
        assert out["image"].dtype == np.uint8 and out["image"].shape == (24, 32, 3)
        np.testing.assert_array_equal(out["label"], example["label"])
        changed += (out["image"] != example["image"]).any()
    assert 10 <= changed < 20  # one in sixteen is left as it was


@pytest.mark.parametrize("value", [0, 100, 255])
def test_brightness_and_contrast_stay_within_their_ranges(value):
    rng, image = np.random.default_rng(0), np.full((4, 4, 1), value, np.uint8)
    seen = np.array([transforms.photometric(image, rng)[0, 0, 0] for _ in range(2000)], int)
    low, high = max(0, value - 32) // 2, min(255, (value + 32) * 1.5)
    assert low <= seen.min() < low + 16 and high - 16 < seen.max() <= high
    assert 0.2 < (seen == value).mean()


def test_grey_pixels_of_colour_images_stay_grey():
    rng = np.random.default_rng(0)
    image = np.repeat(rng.integers(0, 256, (8, 8, 1), np.uint8), 3, axis=2)
    for _ in range(50):
        out = transforms.photometric(image, rng).astype(int)
        assert np.ptp(out, axis=2).max() <= 1


def test_hue_turns_by_at_most_18_degrees():
    rng, hues = np.random.default_rng(0), []
    image = np.zeros((2, 2, 3), np.uint8)
    image[..., 0] = 200  # red, hue 0
    for _ in range(400):
        red, green, blue = transforms.photometric(image, rng)[0, 0].astype(float)
        spread = red - min(green, blue)
        assert red == max(red, green, blue) and spread > 0
        hues.append(60 * (green - blue) / spread)
    assert -20 <= min(hues) < -12 and 12 < max(hues) <= 20


def test_the_same_seed_gives_the_same_example_and_another_seed_another():
    data = _data(scale=(0.5, 2.0), photometric=True)
    example = _drawn(_regions(np.random.default_rng(9), (50, 60)))
    first, again, other = (
        transforms.augment(example, np.random.default_rng(seed), data) for seed in (3, 3, 4)
    )
    for key in ("image", "label"):
        np.testing.assert_array_equal(first[key], again[key])
    assert (first["image"] != other["image"]).any()


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 2.0)])
def test_the_example_of_the_source_is_left_as_it_was(scale):
    data = _data(scale=scale, photometric=True)
    data.flip = data.flip_vertical = True
    example = _drawn(_regions(np.random.default_rng(9), (24, 32)))
    kept = {key: value.copy() for key, value in example.items()}
    for value in example.values():
        value.flags.writeable = False
    for seed in range(20):
        transforms.augment(example, np.random.default_rng(seed), data)
    for key, value in kept.items():
        np.testing.assert_array_equal(example[key], value)
