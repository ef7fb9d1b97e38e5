"""What an evaluation leaves: the same numbers in every file, and absent classes called so."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from jaxseg.data.colours import Classes, voc_palette
from jaxseg.ops import boundary, metrics
from jaxseg.report import Evaluation, report, reported_step, table

NAMES = ("sky", "road", "car", "bird")
SIZE = (30, 40)


class Scenes:
    """Three images, each half sky and half road; nowhere a bird."""

    classes = Classes(NAMES, voc_palette(4))

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict:
        label = np.zeros(SIZE, np.uint8)
        label[15:] = 1
        image = np.random.default_rng(index).integers(0, 256, (*SIZE, 3), np.uint8)
        return {"image": image, "label": label, "name": f"street/{index}"}


CONFUSION = np.array([[1700, 100, 0, 0], [300, 1400, 100, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


def _result(edges: bool = True) -> Evaluation:
    scores = {**metrics.scores(CONFUSION), "image_mIoU": 0.5, "image_aAcc": 0.75}
    if edges:
        bands = np.array([[4, 2, 0, 0], [5, 4, 0, 0], [6, 4, 1, 0]])
        rings = np.zeros((3, len(boundary.TRIMAP), 4), int)
        rings[:, 2, :2] = [[1, 2], [2, 2], [2, 3]]
        scores |= {**boundary.scores(bands, rings), "BF": 0.25}
    images = [
        {"name": f"street/{i}", "mIoU": value, "aAcc": 0.5}
        for i, value in enumerate((0.5, 0.2, None))
    ]
    prediction = np.ones(SIZE, np.uint8)
    return Evaluation(
        scores,
        CONFUSION,
        images,
        {0: prediction, 2: prediction},
        {1: prediction, 0: prediction},
        1,
        1,
    )


@pytest.fixture
def reported(tmp_path):
    report(tmp_path, 12, _result(), Scenes(), "val")
    return tmp_path


def test_eval_json_has_the_totals_as_fractions_and_each_class(reported):
    summary, scores = json.loads((reported / "eval.json").read_text()), _result().scores
    assert (summary["step"], summary["split"], summary["images"]) == (12, "val", 3)
    for key in ("mIoU", "mAcc", "mAcc_binary", "aAcc", "fwIoU", "mDice", "mPrecision", "BF"):
        assert summary[key] == scores[key] and 0 <= summary[key] <= 1
    assert list(summary["per_class"]) == list(NAMES)
    for number, values in enumerate(summary["per_class"].values()):
        keys = ("IoU", "Acc", "Dice", "precision", "boundary_IoU")
        assert values == {key: scores[key][number] for key in keys}
    assert set(summary["per_class"]["bird"].values()) == {None}
    assert "null" in summary["policy"]


def test_the_step_of_a_report_is_that_of_its_own_split(tmp_path):
    assert reported_step(tmp_path, "val") == 0
    report(tmp_path, 7, _result(), Scenes(), "test")
    assert reported_step(tmp_path, "test") == 7 and reported_step(tmp_path, "val") == 0
    (tmp_path / "eval.json").write_text('{"step": 7')
    assert reported_step(tmp_path, "test") == 0


def test_eval_json_has_the_trimap_by_width(reported):
    trimap = json.loads((reported / "eval.json").read_text())["trimap"]
    assert list(map(int, trimap)) == list(boundary.TRIMAP)
    assert trimap["1"] is None and trimap["3"] == trimap["40"] == pytest.approx((1 / 3 + 2 / 3) / 2)


def test_eval_json_names_the_worst_images(reported):
    worst = json.loads((reported / "eval.json").read_text())["worst"]
    assert [image["name"] for image in worst] == ["street/1", "street/0"]
    assert [image["mIoU"] for image in worst] == [0.2, 0.5]


def _rows(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_per_class_csv_names_absent_classes_and_counts_pixels(reported):
    rows, scores = _rows(reported / "per_class.csv"), _result().scores
    assert [row["name"] for row in rows] == list(NAMES)
    assert [int(row["id"]) for row in rows] == list(range(4))
    assert [int(row["pixels"]) for row in rows] == [1800, 1800, 0, 0]
    assert rows[3]["Acc"] == rows[3]["IoU"] == rows[2]["Acc"] == "absent"
    assert float(rows[2]["IoU"]) == 0
    for key in ("IoU", "Dice", "precision", "boundary_IoU"):
        assert float(rows[0][key]) == pytest.approx(scores[key][0], abs=1e-6)


def test_per_image_csv_has_every_image(reported):
    rows = _rows(reported / "per_image.csv")
    assert [row["name"] for row in rows] == ["street/0", "street/1", "street/2"]
    assert [row["mIoU"] for row in rows] == ["0.500000", "0.200000", "absent"]


def test_pictures_are_drawn(reported):
    names = sorted(p.name for p in (reported / "pictures").iterdir())
    assert names == ["0_0.png", "1_2.png"]
    sheets = [reported / name for name in ("confusion.png", "trimap.png", "worst.png")]
    for path in [*(reported / "pictures").iterdir(), *sheets]:
        with Image.open(path) as picture:
            assert min(picture.size) > 50 and np.asarray(picture.convert("L")).std() > 5
    with (
        Image.open(reported / "worst.png") as sheet,
        Image.open(reported / "pictures" / "0_0.png") as one,
    ):
        assert sheet.height > 2 * one.height and sheet.width == one.width


def test_large_images_are_shrunk_in_the_sheet(tmp_path):
    class Large(Scenes):
        def __getitem__(self, index: int) -> dict:
            example = super().__getitem__(index)
            grown = {k: example[k].repeat(40, 0).repeat(40, 1) for k in ("image", "label")}
            return {**example, **grown}

    prediction = np.ones((1200, 1600), np.uint8)
    report(tmp_path, 1, _result()._replace(drawn={}, worst={0: prediction}), Large(), "val")
    with Image.open(tmp_path / "worst.png") as sheet:
        assert 4 * 340 < sheet.width < 4 * 380 and sheet.height < 400


def test_a_report_takes_what_it_does_not_draw_of_the_one_before_away(reported):
    report(reported, 13, _result(edges=False)._replace(worst={}), Scenes(), "val")
    assert not (reported / "trimap.png").exists() and not (reported / "worst.png").exists()
    summary = json.loads((reported / "eval.json").read_text())
    assert "trimap" not in summary and "boundary_IoU" not in summary["per_class"]["sky"]


def test_the_table_calls_a_class_that_is_nowhere_absent_and_says_what_that_means():
    lines = table(metrics.scores(np.diag([3, 2, 1, 0])), Scenes.classes).splitlines()
    assert lines[1].split() == ["sky", "1.000"] and lines[4].split() == ["bird", "absent"]
    assert lines[5] == f"({metrics.POLICY})"
    assert lines[-1] == "mIoU 1.0000  mAcc 1.0000  aAcc 1.0000  fwIoU 1.0000  mDice 1.0000"


def test_the_table_of_no_pixels_is_all_absent():
    lines = table(metrics.scores(np.zeros((4, 4))), Scenes.classes).splitlines()
    assert all(line.endswith("absent") for line in lines[1:5])


@pytest.mark.parametrize(
    ("channels", "dtype"), [(1, np.uint8), (1, np.float32), (3, np.float32), (5, np.float32)]
)
def test_large_images_of_any_kind_are_drawn(tmp_path, channels, dtype):
    class Bands(Scenes):
        def __getitem__(self, index: int) -> dict:
            example = super().__getitem__(index)
            image = np.zeros((800, 500, channels), dtype)
            image[400:] = 200
            return {**example, "image": image, "label": np.zeros((800, 500), np.uint8)}

    prediction = np.ones((800, 500), np.uint8)
    report(tmp_path, 1, _result()._replace(drawn={}, worst={0: prediction}), Bands(), "val")
    with Image.open(tmp_path / "worst.png") as sheet:
        pixels = np.asarray(sheet)
    assert (pixels[24 + 10 : 24 + 170, :220] == 0).all()
    assert (pixels[24 + 190 : 24 + 350, :220] == 200).all()
