"""scripts/crf_search.py: the walk over the grid, a search on files, one message for bad ones."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxseg.inference import crf_parameters

PATH = Path(__file__).parent.parent / "scripts" / "crf_search.py"
SPEC = importlib.util.spec_from_file_location("crf_search", PATH)
crf_search = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(crf_search)


def test_the_walk_finds_the_top_of_a_hill_without_scoring_everything():
    axes = {"a": range(4), "b": range(8), "c": range(4)}
    top = {"a": 3, "b": 5, "c": 0}
    asked = []

    def score(point):
        asked.append(tuple(point.values()))
        return -sum((point[name] - top[name]) ** 2 for name in top)

    assert crf_search.search(axes, score) == (top, 0, len(asked))
    assert len(asked) == len(set(asked)) < 60
    assert set(asked[:16]) == {(a, b, c) for a in (0, 2) for b in (0, 2, 4, 6) for c in (0, 2)}


@pytest.mark.parametrize(
    ("text", "values"), [("3:6", [3, 4, 5, 6]), ("30:10:50", [30, 40, 50]), ("0.5:0.1:0.7", 3)]
)
def test_ranges(text, values):
    found = crf_search.parse_range("sigma_xy", text)
    assert len(found) == values if isinstance(values, int) else found == values


@pytest.fixture
def folders(tmp_path):
    """Two images of two halves; the logits say so but for a wrong block in each."""
    rng = np.random.default_rng(0)
    for kind in ("logits", "images", "labels"):
        (tmp_path / kind).mkdir()
    for name, width in (("a", 30), ("b", 34)):
        label = np.zeros((20, width), np.uint8)
        label[:, width // 2 :] = 1
        image = 40 + 150 * label[..., None] + rng.integers(0, 5, (20, width, 3))
        logits = np.stack([1.0 - label, label], -1) * 1.5
        logits[5:9, 3:6] = logits[5:9, 3:6, ::-1]
        label[0] = 255
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray(label).save(tmp_path / "labels" / f"{name}.png")
        np.savez(tmp_path / "logits" / f"{name}.npz", logits=logits.astype(np.float16))
    return tmp_path


def run(folder, monkeypatch, *words):
    names = [
        word for kind in ("logits", "images", "labels") for word in (f"--{kind}", folder / kind)
    ]
    monkeypatch.setattr(sys, "argv", ["crf_search.py", *map(str, [*names, *words])])
    crf_search.main()


@pytest.mark.slow
def test_a_search_writes_the_best_set(folders, monkeypatch, capsys):
    monkeypatch.setattr(crf_search, "PAD", 40)
    words = (
        "--w_bilateral 1:3:4 --sigma_xy 4 --sigma_rgb 20 --iterations 3 --w_gaussian 0.01".split()
    )
    run(folders, monkeypatch, *words, "--output", folders / "best.json")
    best = json.loads((folders / "best.json").read_text())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "w_bilateral 1, sigma_xy 4, sigma_rgb 20: mIoU" in lines[0]
    assert best["w_bilateral"] == 4 and best["mIoU"] == 1.0 and best["images"] == 2
    assert best["normalization"] == "pixel" and best["w_gaussian"] == 0.01


def remove_image(folder):
    (folder / "images" / "b.png").unlink()


def remove_logits(folder):
    for path in (folder / "logits").iterdir():
        path.unlink()


def other_array(folder):
    np.savez(folder / "logits" / "a.npz", scores=np.zeros((20, 30, 2)))


def other_size(folder):
    np.savez(folder / "logits" / "a.npz", logits=np.zeros((10, 15, 2), np.float32))


def other_ids(folder):
    Image.fromarray(np.full((20, 30), 7, np.uint8)).save(folder / "labels" / "a.png")


def no_labels(folder):
    for path in (folder / "labels").iterdir():
        path.unlink()
    (folder / "labels").rmdir()


@pytest.mark.parametrize(
    ("spoil", "words", "message"),
    [
        (remove_image, (), "has no image b for"),
        (remove_logits, (), "predict --save_logits"),
        (other_array, (), "has no array `logits`"),
        (other_size, (), "has logits (10, 15, 2), its image is (20, 30)"),
        (other_ids, (), "has the id 7: needs 0 to 1, or 255"),
        (no_labels, (), "no folder"),
        (None, ("--sigma_xy", "9:3"), "sigma_xy 9:3: needs FIRST:LAST"),
        (None, ("--w_bilateral", "x"), "w_bilateral x"),
        (None, ("--sigma_rgb", "0:4"), "above 0"),
    ],
)
def test_bad_input_is_one_message(folders, spoil, words, message, monkeypatch, capsys):
    if spoil:
        spoil(folders)
    with pytest.raises(SystemExit) as caught:
        run(folders, monkeypatch, *words)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("error: ") and message in error
    assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_what_it_writes_is_a_set_of_parameters_for_evaluation(folders, monkeypatch):
    words = "--w_bilateral 4 --sigma_xy 4 --sigma_rgb 20 --iterations 1".split()
    run(folders, monkeypatch, *words, "--output", folders / "best.json")
    given = crf_parameters(str(folders / "best.json"))
    assert given["sigma_xy"] == 4 and given["iterations"] == 1
    assert not {"mIoU", "images"} & given.keys()
