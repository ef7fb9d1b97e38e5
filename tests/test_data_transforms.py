"""Augmentation: all stays aligned, sizes are right, chances are fair and seeded."""

import sys
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxseg.config import default
from jaxseg.data import pixels, transforms
from jaxseg.data.colours import IGNORE
from jaxseg.errors import InputError

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
        factor = tuple(n / have for n, have in zip(size, label.shape, strict=True))
        resized = pixels.nearest(label, (0, 0), factor, size)
        assert resized.shape == size and set(np.unique(resized)) <= {0, IGNORE}


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (61, 47), (13, 200)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resized_images_have_the_size_and_the_channels_that_were_asked(size, channels):
    image = np.random.default_rng(0).integers(0, 256, (31, 33, channels), np.uint8)
    factor = tuple(n / have for n, have in zip(size, image.shape[:2], strict=True))
    resized = pixels.resample(image, (0, 0), factor, size)
    assert resized.shape == (*size, channels) and resized.dtype == np.uint8


def test_constant_images_stay_constant_when_resized():
    image = np.full((31, 33, 3), 77, np.uint8)
    resized = pixels.resample(image, (0, 0), (64 / 31, 20 / 33), (64, 20))
    assert resized.shape == (64, 20, 3) and (resized == 77).all()
    np.testing.assert_array_equal(pixels.resample(image, (0, 0), (1, 1), (31, 33)), image)


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
        window = transforms.draw_window(rng, label, 1.0, (3, 4), 1.0)
        out = transforms.cut(_drawn(label), window)
        np.testing.assert_array_equal(out["image"], _drawn(out["label"])["image"])
        corners.add(int(out["label"][0, 0]))
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


@pytest.mark.parametrize("most", [18.0, 36.0])
def test_hue_turns_by_at_most_so_many_degrees(most):
    rng, hues = np.random.default_rng(0), []
    image = np.zeros((2, 2, 3), np.uint8)
    image[..., 0] = 200  # red, hue 0
    for _ in range(400):
        red, green, blue = transforms.photometric(image, rng, most)[0, 0].astype(float)
        spread = red - min(green, blue)
        assert red == max(red, green, blue) and spread > 0
        hues.append(60 * (green - blue) / spread)
    assert -most - 2 <= min(hues) < 6 - most and most - 6 < max(hues) <= most + 2


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


# What moves pixels, and how far from an edge of the label the image may still show it.
MOVES = {
    "rotate": ({"rotate": 40.0}, 2),
    "quarter turns": ({"quarter_turns": True}, 0),
    "elastic": ({"elastic": 4.0}, 2),
    "resize": ({"resize": (70, 60)}, 2),
    "steps": ({"scale": (0.5, 2.0), "scale_step": 0.25}, 2),
    "far smaller": ({"scale": (0.3, 0.4)}, 2),
    "cat_max_ratio": ({"cat_max_ratio": 0.75}, 0),
    "blur": ({"blur": 1.0}, 2),
    "copy_paste": ({"copy_paste": 1.0}, 0),
    "all": (
        {"rotate": 10.0, "quarter_turns": True, "elastic": 2.0, "scale": (0.5, 2.0)}
        | {"flip_vertical": True, "copy_paste": 0.5, "blur": 0.5, "cat_max_ratio": 0.9},
        4,
    ),
}


def _with_objects(rng: np.random.Generator, size: tuple[int, int]) -> dict:
    """An example whose objects are its labels 1..7, each whole."""
    example = _drawn(_regions(rng, size))
    classes = np.unique(example["label"])[1:].astype(np.int32)
    masks = (example["label"] == classes[:, None, None]).astype(np.uint8)
    crowd = classes == 7
    return {**example, "instances": {"masks": masks, "classes": classes, "crowd": crowd}}


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("name", MOVES)
def test_image_label_and_objects_stay_aligned(name, dtype):
    fields, reach = MOVES[name]
    data = _data(**fields)
    data.flip = True
    checked = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        example = _with_objects(rng, (60, 75))
        example["image"] = example["image"].astype(dtype)
        out = transforms.augment(example, rng, data, lambda rng: _with_objects(rng, (44, 90)))
        assert out["image"].shape == (24, 32, 3) and out["image"].dtype == dtype
        assert out["label"].shape == (24, 32) and out["label"].dtype == np.uint8
        sure = (_inside(out["label"], reach) if reach else True) & (out["label"] != IGNORE)
        difference = out["image"] - STEP * out["label"][..., None].astype(float)
        assert np.abs(difference[sure]).max(initial=0) <= 1.01
        checked += sure.sum()
        objects = out["instances"]
        assert objects["masks"].shape[1:] == (24, 32)
        assert len(objects["masks"]) == len(objects["classes"]) == len(objects["crowd"])
        assert objects["masks"].any((1, 2)).all()
        union = np.zeros((24, 32), bool)
        for mask, value in zip(objects["masks"] > 0, objects["classes"], strict=True):
            assert (out["label"][mask] == value).all()
            union |= mask
        np.testing.assert_array_equal(union, (out["label"] > 0) & (out["label"] != IGNORE))
    assert checked > 300


@pytest.mark.parametrize("name", [name for name in MOVES if name != "blur"])
def test_each_move_moves(name):
    data, example = _data(**MOVES[name][0]), _with_objects(np.random.default_rng(9), (60, 75))

    def run(data: ConfigDict, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return transforms.augment(example, rng, data, lambda rng: _with_objects(rng, (60, 75)))[
            "label"
        ]

    assert any((run(data, seed) != run(_data(), seed)).any() for seed in range(8))


def test_turning_by_an_angle_is_about_the_centre_and_anticlockwise():
    label = np.zeros((65, 65), np.uint8)
    label[30:35, 50:60] = 1  # right of the centre
    window = transforms.Window((0, 0), (1.0, 1.0), (65, 65))
    still = np.zeros((2, 3, 3))
    turned = transforms.deform(_drawn(label), window, (65, 65), 90.0, still, MEAN)
    np.testing.assert_array_equal(turned["label"], np.rot90(label))
    np.testing.assert_array_equal(turned["image"], np.rot90(_drawn(label)["image"]))
    slightly = transforms.deform(_drawn(label), window, (65, 65), 10.0, still, MEAN)["label"]
    rows, columns = np.nonzero(slightly == 1)
    angle = np.degrees(np.arctan2(32 - rows.mean(), columns.mean() - 32))
    assert angle == pytest.approx(10, abs=0.5)
    assert (slightly[0, 0], slightly[32, 32]) == (IGNORE, 0)


def test_without_angle_and_vectors_a_deformed_crop_is_the_crop():
    example = _with_objects(np.random.default_rng(3), (60, 75))
    for factor in (1.0, 1.6):
        window = transforms.Window((4, 9), (factor, factor), (24, 32))
        bent = transforms.deform(example, window, (24, 32), 0.0, np.zeros((2, 3, 3)), MEAN)
        straight = transforms.cut(example, window)
        np.testing.assert_array_equal(bent["label"], straight["label"])
        inner = np.s_[2:-2, 2:-2]  # the straight one is cut first and sees nothing beyond
        difference = bent["image"][inner].astype(int) - straight["image"][inner]
        assert np.abs(difference).max() <= 255 / 32 + 1


def test_elastic_takes_each_pixel_from_where_its_vector_points():
    label = np.arange(40 * 50, dtype=np.int64).reshape(40, 50) % 250
    vectors = np.stack([np.full((3, 3), 3.0), np.full((3, 3), -2.0)])
    window = transforms.Window((5, 6), (1.0, 1.0), (20, 30))
    example = {"image": np.zeros((40, 50, 1), np.uint8), "label": label.astype(np.uint8)}
    out = transforms.deform(example, window, (20, 30), 0.0, vectors, MEAN[:1])
    np.testing.assert_array_equal(out["label"], label[8:28, 4:34])


@pytest.mark.parametrize(
    ("size", "box", "want"),
    [
        ((100, 200), (0, 0), (100, 200)),
        ((1024, 2048), (2048, 512), (512, 1024)),  # the short side decides
        ((300, 3000), (2048, 512), (205, 2048)),  # the long side
        ((2048, 1024), (2048, 512), (1024, 512)),
        ((100, 200), (400, 400), (200, 400)),
    ],
)
def test_resize_keeps_proportions_within_a_box(size, box, want):
    assert transforms.fitted_size(size, box) == want


def test_stepped_scales_are_the_listed_ones_and_no_others():
    rng = np.random.default_rng(0)
    drawn = {transforms.draw_scale(rng, (0.5, 2.0), 0.25) for _ in range(300)}
    assert sorted(drawn) == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
    smooth = [transforms.draw_scale(rng, (0.5, 2.0), 0.0) for _ in range(2000)]
    assert 0.5 <= min(smooth) < 0.51 and 1.99 < max(smooth) <= 2
    assert np.mean(smooth) == pytest.approx(1.25, abs=0.03)


@pytest.mark.parametrize(
    ("counts", "ratio", "balanced"),
    [
        ({0: 100}, 0.75, False),  # one class
        ({0: 75, 1: 25}, 0.75, False),  # exactly the share
        ({0: 74, 1: 26}, 0.75, True),
        ({0: 74, 1: 26, IGNORE: 900}, 0.75, True),  # ignored pixels count nowhere
        ({IGNORE: 100}, 0.75, False),
        ({0: 10, IGNORE: 90}, 0.75, False),
    ],
)
def test_a_crop_is_balanced_where_no_class_has_the_share(counts, ratio, balanced):
    label = np.concatenate([np.full(n, v, np.uint8) for v, n in counts.items()])[None]
    assert transforms.balanced(label, ratio) == balanced


def test_cat_max_ratio_draws_ten_times_more_at_most(monkeypatch):
    tried = []
    monkeypatch.setattr(transforms, "balanced", lambda *_: bool(tried.append(1)))
    label = np.zeros((50, 50), np.uint8)
    rng = np.random.default_rng(0)
    window = transforms.draw_window(rng, label, 1.0, (10, 10), 0.75)
    again = np.random.default_rng(0)
    last = [tuple(int(again.integers(41)) for _ in range(2)) for _ in range(11)][-1]
    assert len(tried) == 10 and window.start == last


def test_cat_max_ratio_finds_the_crops_with_several_classes():
    label = np.zeros((40, 200), np.uint8)
    label[:, 160:] = 1
    rng = np.random.default_rng(0)
    mixed = {1.0: 0, 0.75: 0}
    for ratio in mixed:
        for _ in range(100):
            window = transforms.draw_window(rng, label, 1.0, (20, 20), ratio)
            part = transforms.pixels.nearest(label, *window)
            mixed[ratio] += transforms.balanced(part, 0.75)
    assert mixed[1.0] < 15 and 40 < mixed[0.75]


def test_quarter_turns_are_four_and_equally_likely():
    label = np.arange(24 * 24, dtype=np.int64).reshape(24, 24).astype(np.uint8)
    data, rng = _data(quarter_turns=True), np.random.default_rng(0)
    data.crop = (24, 24)
    counts = [0] * 4
    for _ in range(400):
        out = transforms.augment(_drawn(label), rng, data)["label"]
        counts[[np.array_equal(out, np.rot90(label, k)) for k in range(4)].index(True)] += 1
    assert min(counts) > 70


def test_blur_comes_with_its_probability():
    example = _drawn(_regions(np.random.default_rng(0), (24, 32)))
    rng = np.random.default_rng(1)
    changed = sum(
        (transforms.augment(example, rng, _data(blur=0.3))["image"] != example["image"]).any()
        for _ in range(300)
    )
    assert 60 < changed < 120


@pytest.fixture
def own_module(monkeypatch):
    module = types.ModuleType("my_transforms")
    module.invert = lambda image, label: (255 - image, label)
    module.half = lambda image, label: (image[::2], label)
    monkeypatch.setitem(sys.modules, "my_transforms", module)
    return module


def test_a_function_of_ones_own_comes_last(own_module):
    example = _drawn(_regions(np.random.default_rng(0), (24, 32)))
    out = transforms.augment(
        example, np.random.default_rng(0), _data(transform="my_transforms:invert")
    )
    np.testing.assert_array_equal(out["image"], 255 - example["image"])
    np.testing.assert_array_equal(out["label"], example["label"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_transforms:half", r"made image uint8 \[12, 32, 3\] of uint8 \[24, 32, 3\]"),
        ("my_transforms:none", "none"),
        ("no_such_module:f", "No module named"),
    ],
)
def test_a_function_that_cannot_be_used_is_an_input_error(own_module, name, message):
    example = _drawn(_regions(np.random.default_rng(0), (24, 32)))
    with pytest.raises(InputError, match=message):
        transforms.augment(example, np.random.default_rng(0), _data(transform=name))


def test_colours_are_distorted_in_the_order_of_their_mode():
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    first = transforms.distort(image, transforms.Colour(10, 1.4, 1.3, 9.0, True))
    last = transforms.distort(image, transforms.Colour(10, 1.4, 1.3, 9.0, False))
    bright = transforms.pixels.brighten(image, 10, 1.4)
    np.testing.assert_array_equal(first, transforms.pixels.turn_colours(bright, 1.3, 9.0))
    turned = transforms.pixels.turn_colours(transforms.pixels.brighten(image, 10, 1), 1.3, 9.0)
    np.testing.assert_array_equal(last, transforms.pixels.brighten(turned, 0, 1.4))
    assert (first != last).any()
    assert transforms.distort(image, transforms.Colour()) is image


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_channels_goes_through(channels):
    data = _data(scale=(0.4, 2.0), rotate=10.0, photometric=True, blur=0.5, elastic=2.0)
    data.update(mean=(10.0,) * channels, flip=True)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        out = transforms.augment(_drawn(_regions(rng, (40, 50)), channels), rng, data)
        assert out["image"].shape == (24, 32, channels) and out["image"].dtype == np.uint8
