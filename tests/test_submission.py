"""Labels for a benchmark's server: the same labels, in its ids."""

import argparse
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxseg import main
from jaxseg.data import catalog
from jaxseg.errors import InputError

QUICKSTART = str(Path(__file__).parents[1] / "experiments" / "quickstart.py")
SMALL = (
    *("train.steps=1", "train.batch=8", "train.eval_every=0", "data.crop=(32,32)"),
    *("model.widths=(4,8)", "model.num_classes=19", "eval.pictures=1"),
)


def _city(root: Path, split: str) -> None:
    rng = np.random.default_rng(len(split))
    for part, name, values in (
        ("leftImg8bit", "leftImg8bit", rng.integers(0, 256, (32, 40, 3), np.uint8)),
        ("gtFine", "gtFine_labelIds", rng.integers(7, 34, (32, 40), np.uint8)),
    ):
        folder = root / part / split / "aachen"
        folder.mkdir(parents=True)
        Image.fromarray(values).save(folder / f"aachen_000000_000019_{name}.png")


@pytest.mark.slow
def test_predictions_are_written_in_the_ids_of_the_benchmark(tmp_path):
    for split in ("train", "val"):
        _city(tmp_path / "city", split)
    run, dataset = str(tmp_path / "run"), f"cityscapes:{tmp_path / 'city'}"
    changes = (*SMALL, f"data.dataset={dataset}")
    train = ["--config", QUICKSTART, "--workdir", run, *(f"--config.{c}" for c in changes)]
    assert main.run(train) == 0
    assert main.run(["eval", "--workdir", run, "--save_predictions", "--submission"]) == 0
    images = str(tmp_path / "city/leftImg8bit/val/aachen")
    command = ["predict", "--workdir", run, "--input", images, "--output", str(tmp_path / "out")]
    assert main.run([*command, "--legend", "--submission"]) == 0
    for folder in (tmp_path / "run/predictions/val", tmp_path / "out"):
        (path,) = (folder / "submission").rglob("*.png")
        label = np.asarray(Image.open(folder / path.relative_to(folder / "submission")))
        ids = np.asarray(Image.open(path))
        assert ids.dtype == np.uint8 and label.max() < 19 and ids.min() >= 7
        np.testing.assert_array_equal(ids, catalog.to_submission_ids(label, "cityscapes"))
    with pytest.raises(InputError, match="needs --save_predictions"):
        main.run(["eval", "--workdir", run, "--submission"])


@pytest.mark.parametrize(("process", "written"), [(0, 1), (1, 0)])
def test_of_several_processes_the_first_writes_for_the_server(
    tiny_run, tmp_path, monkeypatch, process, written
):
    folders = []
    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(catalog, "benchmark", lambda _: None)
    monkeypatch.setattr(catalog, "write_submission", lambda *words: folders.append(words))
    args = argparse.Namespace(submission=True, workdir=tiny_run)
    assert main.submitting(args, tmp_path, lambda: 0) == 0
    assert folders == [(tmp_path, "shapes")] * written


def test_a_data_set_without_a_server_is_named_before_anything_is_labelled(tiny_run, tmp_path):
    command = ["predict", "--workdir", str(tiny_run), "--input", str(tmp_path), "--submission"]
    with pytest.raises(InputError, match='unknown data set with a server "shapes"'):
        main.run([*command, "--output", str(tmp_path / "out")])
