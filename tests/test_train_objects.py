"""A network of objects is trained, scored and scored again by the same verbs as any other."""

import json

import numpy as np
import oracle
import pytest
from networks import EXPERIMENTS

from jaxseg.data import shapes
from jaxseg.experiment import resolve
from jaxseg.main import run
from jaxseg.train import train


@pytest.fixture
def trained(monkeypatch, few_scenes, tmp_path):
    oracle.installed(monkeypatch)
    config = oracle.config("instances boxes panoptic semantic", batch=8)
    config.data.update(crop=(32, 32), objects=2)
    config.model.update(num_classes=8, things=tuple(range(1, 8)))
    config.train.update(steps=3, batch=8, log_every=1, eval_every=0, checkpoint_every=0)
    config.eval.resize = (64, 64)
    assert train(config.lock(), tmp_path / "run") == 0
    return tmp_path / "run"


def test_a_run_of_a_network_of_objects(trained, capsys, caplog):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert len({line["drawn"] for line in steps}) == 3  # another key a step
    assert all(np.isfinite(line["loss"]) for line in steps)
    (scores,) = [line for line in lines if line["kind"] == "eval"]
    assert {"AP", "AP50", "box_AP", "PQ", "SQ", "RQ", "mIoU"} <= scores.keys()
    assert (trained / "curves.png").exists() and (trained / "worst.png").exists()

    assert run(["eval", "--workdir", str(trained), "--save_predictions"]) == 0
    assert "PQ 0." in capsys.readouterr().out
    summary = json.loads((trained / "eval.json").read_text())
    assert summary["PQ"] == pytest.approx(scores["PQ"], abs=1e-9) and summary["images"] == 8
    saved = trained / "predictions" / "val"
    entries = json.loads((saved / "panoptic.json").read_text())["annotations"]
    assert len(entries) == 8 and (saved / "results.json").exists()
    assert len(list((saved / "panoptic").iterdir())) == 8


TINY = {
    "maskrcnn": {"features": 8, "box_features": 16, "mask_features": 8, "mask_convs": 1},
    "solo": {"features": 16, "fpn": 16, "convs": 1},
    "solov2": {"features": 16, "fpn": 16, "convs": 1, "embedding": 16, "mask_features": 16},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_a_data_set_without_objects_is_trained_on_and_has_no_ap(
    name, monkeypatch, few_scenes, tmp_path
):
    scene = shapes.scene

    def empty(*args):
        kept = scene(*args)
        none = {key: kept[key][:0] for key in ("masks", "classes", "boxes")}
        return {**kept, **none, "label": np.zeros_like(kept["label"])}

    monkeypatch.setattr(shapes, "scene", empty)
    fixed = {"data.crop": "(64, 64)", "data.threads": "1", "train.steps": "2", "train.batch": "8"}
    fixed |= {"train.log_every": "1", "train.checkpoint_every": "0", "optim.warmup": "0"}
    fixed |= {f"model.{key}": str(value) for key, value in TINY[name].items()}
    config = resolve(f"{EXPERIMENTS / name}.py:dataset=shapes,variant=small", [*fixed.items()])
    assert train(config, tmp_path) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert len(steps) == 2 and steps[-1]["skipped"] == 0
    assert all(np.isfinite(line["loss"]) and line["positives"] == 0 for line in steps)
    (scores,) = [line for line in lines if line["kind"] == "eval"]
    assert "AP" in scores and scores["AP"] is None and scores["AP50"] is None
    summary = json.loads((tmp_path / "eval.json").read_text())
    assert summary["AP"] is None and summary["images"] == 8
