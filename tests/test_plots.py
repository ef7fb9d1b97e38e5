"""Pictures of a run: they are drawn and are PNG files, for runs of any length."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxseg import plots
from jaxseg.log import SHOWN


def _train(step: int, loss: float = 1.0) -> dict:
    return {"kind": "train", "step": step, "loss": loss, "lr": 0.1 / step}


def _eval(step: int, value: float | None = 0.5) -> dict:
    return {"kind": "eval", "step": step, "mIoU": value, "mAcc": value, "aAcc": value}


def _picture(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize(
    "records",
    [
        [*map(_train, range(1, 30)), _eval(10, 0.3), _eval(20)],
        [_train(1), _eval(1)],
        [_train(1), _train(2)],
        [_eval(1)],
        [_train(1), _eval(1, None)],
        [_train(1), _train(2, float("nan")), _train(3)],
        [],
    ],
    ids=["long", "single", "no eval", "only eval", "no scores", "nan", "empty"],
)
def test_curves_are_drawn(tmp_path, records):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(r) + "\n" for r in records))
    plots.curves(metrics, tmp_path / "curves.png", SHOWN)
    pixels = _picture(tmp_path / "curves.png")
    assert pixels.shape[1] > 2 * pixels.shape[0] and pixels.std() > 5


def test_lines_that_a_crash_cut_short_are_passed_over(tmp_path):
    records = [*map(_train, range(1, 9)), _eval(8)]
    for name, extra in (("whole", b""), ("cut", b'{"kind": "train", "st\n\xff\n\n')):
        lines = "".join(json.dumps(r) + "\n" for r in records).encode()
        (tmp_path / f"{name}.jsonl").write_bytes(extra + lines)
        plots.curves(tmp_path / f"{name}.jsonl", tmp_path / f"{name}.png", SHOWN)
    whole, cut = (_picture(tmp_path / f"{name}.png") for name in ("whole", "cut"))
    np.testing.assert_array_equal(whole, cut)


def test_curves_show_the_loss(tmp_path):
    pictures = []
    for name, slope in (("rising", 1.0), ("falling", -1.0)):
        records = [_train(step, loss=5 + slope * step) for step in range(1, 5)]
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in records))
        plots.curves(tmp_path / name, tmp_path / f"{name}.png", SHOWN)
        pictures.append(_picture(tmp_path / f"{name}.png"))
    assert (pictures[0] != pictures[1]).any()


@pytest.mark.parametrize(
    "matrix",
    [[[5, 1, 0], [0, 0, 0], [2, 0, 7]], [[0, 0, 0]] * 3, [[10**12, 0, 0], [0, 1, 0], [0, 0, 1]]],
    ids=["absent class", "empty", "large"],
)
def test_a_confusion_is_drawn(tmp_path, matrix):
    names = ("sky", "road", "a_class of_a rather long name, as ADE20K has")
    plots.confusion(np.array(matrix), names, tmp_path / "confusion.png")
    assert _picture(tmp_path / "confusion.png").std() > 5


@pytest.mark.parametrize("values", [[0.3, 0.5, 0.6], [None, 0.5, 0.6], [None] * 3])
def test_a_trimap_is_drawn(tmp_path, values):
    plots.trimap((1, 2, 40), values, tmp_path / "trimap.png")
    assert _picture(tmp_path / "trimap.png").std() > 5


@pytest.mark.parametrize("count", [2, 40])
def test_a_confusion_grows_with_its_classes(tmp_path, count):
    names = [f"class {k}" for k in range(count)]
    plots.confusion(np.eye(count, dtype=int), names, tmp_path / "confusion.png")
    height, width = _picture(tmp_path / "confusion.png").shape[:2]
    assert min(height, width) > 40 * count
