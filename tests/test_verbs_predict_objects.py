"""Prediction of networks of objects: the two-line API and the files that the verb writes."""

import json

import numpy as np
import oracle
import pytest
from PIL import Image

import jaxseg
from jaxseg.data import rle
from jaxseg.data.catalog import write_classes
from jaxseg.data.colours import read_note
from jaxseg.errors import InputError
from jaxseg.sharding import make_mesh
from jaxseg.verbs import predict as verb
from jaxseg.verbs.predict import Formats, predict

NAMES = ["scene0", "scene1", "scene2", "scene3"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function: the workdir of a run of the oracle, and a folder of its images."""
    oracle.installed(monkeypatch)

    def make(says: str, **asked):
        config = oracle.config(says, **asked)
        write_classes(tmp_path / "classes.json", oracle.CLASSES)
        loaded = (config, make_mesh(config.mesh), {"params": {"gain": np.float32(1)}}, 5, "abc")
        monkeypatch.setattr(verb, "load_variables", lambda *_: loaded)
        (tmp_path / "photos").mkdir()
        for example in map(oracle.Scenes(wrong=0.5).__getitem__, range(4)):
            Image.fromarray(example["image"]).save(tmp_path / f"photos/{example['name']}.png")
        return tmp_path

    return make


def _read(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_two_lines_give_the_objects(run):
    predictor, example = jaxseg.load(str(run("instances boxes"))), oracle.Scenes()[1]
    result = predictor(example["image"])
    found = oracle.answer(example)
    order = np.argsort(-found["scores"], kind="stable")
    np.testing.assert_array_equal(result.instances["masks"], found["masks"][order])
    np.testing.assert_array_equal(result.instances["boxes"], found["boxes"][order])
    np.testing.assert_array_equal(result.instances["classes"], found["classes"][order])
    assert result.panoptic is None and result.logits is None
    assert result.label.shape == result.overlay.shape[:2] == example["label"].shape
    assert (result.overlay != example["image"]).any()


def test_two_lines_give_the_panoptic_map(run):
    predictor, example = jaxseg.load(str(run("panoptic semantic"))), oracle.Scenes()[1]
    result = predictor(example["image"])
    np.testing.assert_array_equal(result.panoptic, oracle.answer(example)["panoptic"])
    np.testing.assert_array_equal(result.label, oracle.answer(example)["semantic"])
    assert result.instances is None
    assert predictor(example["image"].astype(np.float32)).panoptic.shape == (30, 30)


def test_an_image_seen_smaller_has_a_map_of_its_own_size(run):
    predictor = jaxseg.load(str(run("panoptic", resize=(20, 20))))
    assert predictor(oracle.Scenes()[0]["image"]).panoptic.shape == (24, 40)


def test_a_folder_becomes_maps_of_numbers_overlays_and_annotations(run):
    workdir = run("instances boxes panoptic", confidence=0.3)
    predict(workdir, [workdir / "photos"], workdir / "out", legend=True)
    out = workdir / "out"
    ends = (".png", "_overlay.png", "_instances.png", "_panoptic.png", "_objects.json")
    files = {f"{name}{end}" for name in NAMES for end in ends}
    assert {p.name for p in out.iterdir()} == files | {
        *("annotations.json", "panoptic.json", "legend.png")
    }
    whole = json.loads((out / "annotations.json").read_text())
    segments = json.loads((out / "panoptic.json").read_text())["annotations"]
    assert [image["file_name"] for image in whole["images"]] == [f"{n}.png" for n in NAMES]
    assert [c["name"] for c in whole["categories"]] == list(oracle.CLASSES.names)
    for number, name in enumerate(NAMES, start=1):
        found = oracle.answer({"image": _read(workdir / f"photos/{name}.png")})
        mine = [a for a in whole["annotations"] if a["image_id"] == number]
        assert sorted(a["score"] for a in mine) == pytest.approx(sorted(found["scores"]))
        for entry in mine:
            (i,) = np.flatnonzero(np.abs(found["scores"] - entry["score"]) < 1e-6)[:1]
            mask = rle.decode(entry["segmentation"], found["semantic"].shape)
            assert entry["area"] == mask.sum() and entry["category_id"] in (1, 2)
            assert mask.sum() == found["masks"][i].sum()
        numbers = _read(out / f"{name}_instances.png")
        assert numbers.dtype == np.uint16 and numbers.max() == len(found["masks"])
        assert ((numbers > 0) == (found["panoptic"] % 1000 > 0)).all()
        coded = _read(out / f"{name}_panoptic.png").astype(np.int64) @ [1, 256, 65536]
        np.testing.assert_array_equal(coded - 1000, found["panoptic"])
        (one,) = [s for s in segments if s["image_id"] == number]
        assert one["file_name"] == f"{name}_panoptic.png"
        assert {s["id"] for s in one["segments_info"]} == set(np.unique(coded).tolist())


def test_objects_below_the_confidence_are_not_painted(run):
    workdir = run("instances", confidence=0.6)
    predict(workdir, [workdir / "photos"], workdir / "out")
    found = oracle.answer({"image": _read(workdir / "photos/scene1.png")})
    sure = int((found["scores"] >= 0.6).sum())
    assert 0 < sure < len(found["scores"])
    assert _read(workdir / "out/scene1_instances.png").max() == sure
    held = json.loads((workdir / "out/scene1_objects.json").read_text())
    assert len(held["objects"]) == len(found["scores"])
    assert not (workdir / "out/panoptic.json").exists()


def test_what_is_there_is_not_made_again_and_is_still_gathered(run, capsys):
    workdir = run("instances")
    predict(workdir, [workdir / "photos"], workdir / "out", part=(1, 2))
    assert len(json.loads((workdir / "out/annotations.json").read_text())["images"]) == 2
    predict(workdir, [workdir / "photos"], workdir / "out")
    assert "labelled: 2" in capsys.readouterr().out
    assert len(json.loads((workdir / "out/annotations.json").read_text())["images"]) == 4
    note = json.loads(read_note(workdir / "out/scene0.png"))
    assert note["kinds"] == ["instances", "label", "objects", "overlay"]


def test_logits_of_a_network_of_objects_are_refused(run):
    workdir = run("instances")
    with pytest.raises(InputError, match="oracle tells objects apart and has no logits of pixels"):
        predict(workdir, [workdir / "photos"], workdir / "out", Formats(logits=True))
