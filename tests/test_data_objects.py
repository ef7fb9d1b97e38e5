"""Copy-paste: image, label and objects of both examples stay aligned."""

import numpy as np
import pytest

from jaxseg.data.objects import copy_paste
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
