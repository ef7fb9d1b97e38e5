"""Transforms of soft masks, crops around objects, and a function of one's own."""

import sys
import types

import numpy as np
import pytest
from test_data_transforms import MOVES, _data, _drawn, _regions

from jaxseg.data import pixels, transforms
from jaxseg.data.colours import IGNORE
from jaxseg.errors import InputError


@pytest.fixture
def own_module(monkeypatch):
    module = types.ModuleType("my_transforms")
    monkeypatch.setitem(sys.modules, "my_transforms", module)
    return module


@pytest.mark.parametrize("name", [name for name in MOVES if name not in ("blur", "copy_paste")])
def test_alpha_stays_aligned_with_the_image(name):
    fields, _ = MOVES[name]
    data = _data(**{**fields, "copy_paste": 0.0, "blur": 0.0})
    data.flip, checked = True, 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        alpha = _regions(rng, (60, 75)).astype(np.float32) / 7
        alpha = pixels.blur(alpha[..., None])[..., 0]
        example = {"image": np.repeat(alpha[..., None] * 255, 3, axis=2), "alpha": alpha}
        example["label"] = (alpha >= 0.5).astype(np.uint8)
        out = transforms.augment(example, rng, data)
        assert out["alpha"].shape == (24, 32) and out["alpha"].dtype == np.float32
        assert out["alpha"].min() >= 0 and out["alpha"].max() <= 1 + 1e-6
        inside = out["label"] != IGNORE
        np.testing.assert_allclose(
            out["image"][inside][:, 0] / 255, out["alpha"][inside], atol=0.01
        )
        assert (out["alpha"][~inside] == 0).all()
        clear = inside & (np.abs(out["alpha"] - 0.5) > 0.3)
        assert ((out["alpha"] >= 0.5) == out["label"])[clear].mean() > 0.98
        checked += inside.sum()
    assert checked > 1000


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_crops_may_be_drawn_around_objects(share):
    data, small, seen = _data(crop_on_objects=share), np.zeros((120, 160), np.uint8), 0
    small[100:104, 7:11] = 1
    mask = {"masks": small[None], "classes": np.int32([1]), "crowd": np.array([False])}
    starts = set()
    for seed in range(60):
        example = {**_drawn(small), "instances": mask}
        out = transforms.augment(example, np.random.default_rng(seed), data)
        found = np.argwhere(out["label"] == 1)
        seen += len(found) > 0
        starts.add(tuple(found[0]) if len(found) else ())
    assert seen == 60 if share else seen < 20
    assert len(starts) > (30 if share else 0)  # anywhere in the crop


def test_an_example_without_objects_is_cropped_anywhere():
    data, label = _data(crop_on_objects=1.0), np.zeros((40, 50), np.uint8)
    none = {
        "masks": np.zeros((0, 40, 50), np.uint8),
        "classes": np.int32([]),
        "crowd": np.array([]),
    }
    none["crowd"] = none["crowd"].astype(bool)
    out = transforms.augment({**_drawn(label), "instances": none}, np.random.default_rng(0), data)
    assert out["label"].shape == (24, 32)
    with pytest.raises(InputError, match="data.crop_on_objects needs a data set that tells"):
        transforms.augment(_drawn(label), np.random.default_rng(0), data)


def _id(value: int):
    return lambda image, label: (image, np.full_like(label, value))


def _raises(image, label):
    raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_id(8), r"my_transforms:f on photo made a label with ids such as 8 \(768 pixels\): needs"),
        (_id(254), "ids such as 254"),
        (_raises, "my_transforms:f on photo: KeyError: 'no such thing'"),
        (lambda image, label: image, "my_transforms:f on photo: ValueError"),
        (lambda image: image, "my_transforms:f on photo: TypeError"),
        (lambda image, label: None, "my_transforms:f on photo: TypeError"),
    ],
)
def test_what_a_function_of_ones_own_does_wrong_is_named(own_module, function, message):
    own_module.f = function
    example = {**_drawn(_regions(np.random.default_rng(0), (24, 32))), "name": "photo"}
    with pytest.raises(InputError, match=message):
        transforms.own_transform(example, "my_transforms:f", 8)


def test_a_function_of_ones_own_may_name_its_arguments_and_draw(own_module):
    own_module.f = lambda x, y, rng: (x, np.full_like(y, rng.integers(8)))
    own_module.keep = lambda x, y, other=None: (x, np.full_like(y, 255 if other is None else 0))
    example = _drawn(np.zeros((24, 32), np.uint8))
    found = [
        transforms.augment(example, np.random.default_rng(seed), _data(transform="my_transforms:f"))
        for seed in (1, 1, 2, 3, 4)
    ]
    values = [int(out["label"][0, 0]) for out in found]
    assert values[0] == values[1] and len(set(values)) > 1
    out = transforms.own_transform(example, "my_transforms:keep", 8)
    assert (out["label"] == 255).all()
