"""Evaluation of networks of objects: AP, PQ and mIoU of what each image alone holds, and files."""

import json
import shutil

import jax
import numpy as np
import oracle
import pytest
from networks import EXPERIMENTS
from PIL import Image

from jaxseg import models
from jaxseg.data import results, rle
from jaxseg.errors import InputError
from jaxseg.evaluate import evaluate, make_eval_step, open_source, score_given
from jaxseg.experiment import resolve
from jaxseg.inference import make_infer
from jaxseg.ops import average_precision, metrics, panoptic_quality
from jaxseg.report import report, table
from jaxseg.saver import Saver
from jaxseg.scoring import confusion, matches
from jaxseg.sharding import make_mesh, replicated

EVERYTHING = "instances boxes panoptic semantic"


@pytest.fixture(autouse=True)
def _oracle(monkeypatch):
    oracle.installed(monkeypatch)


def _evaluate(config, source, save=None):
    mesh = make_mesh(config.mesh)
    variables = jax.device_put({"params": {"gain": np.float32(1)}}, replicated(mesh))
    return evaluate(make_eval_step(config, mesh), variables, source, config, mesh, save)


def _expected(source) -> dict:
    masks, boxes, segments, pixels = [], [], 0, 0
    for example in map(source.__getitem__, range(len(source))):
        found = oracle.answer(example)
        both = matches(found, example["instances"])
        masks.append(both[0])
        boxes.append(both[1])
        truth = results.to_panoptic(example["label"], example["instances"], (1, 2))
        segments = segments + panoptic_quality.counts(found["panoptic"], truth, (1, 2), 4)
        pixels = pixels + confusion(found["semantic"], example["label"], 4)
    box = average_precision.scores(boxes, (1, 2), 4)
    return {
        **average_precision.scores(masks, (1, 2), 4),
        **{"box_AP": box["AP"], "box_AP50": box["AP50"], "class_box_AP": box["class_AP"]},
        **panoptic_quality.scores(segments, (1, 2)),
        **metrics.scores(pixels),
    }


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        oracle.installed(patch)
        config, source = oracle.config(EVERYTHING), oracle.Scenes(wrong=0.6)
        folder = tmp_path_factory.mktemp("run")
        save = Saver(folder / "predictions", 3, source.classes, {})
        result = _evaluate(config, source, save)
    report(folder, 3, result, source, "val")
    return result, folder, source


def test_scores_are_those_of_each_image_at_its_own_size(evaluated):
    result, _, source = evaluated
    expected = _expected(source)
    for key, value in expected.items():
        if key != "IoU":
            assert result.scores[key] == pytest.approx(value, abs=1e-12), key
    assert 0 < expected["AP"] < 1 and 0 < expected["PQ"] < 1 and 0 < expected["mIoU"] < 1
    assert expected["AP"] != expected["box_AP"]
    assert (result.sizes, result.compilations) == (4, 2)
    assert result.confusion.sum() == sum(h * w for h, w in oracle.SIZES)


@pytest.mark.parametrize("says", ["instances boxes", "instances", "panoptic", "panoptic semantic"])
def test_metrics_are_those_of_the_answers_that_there_are(says):
    source = oracle.Scenes()
    result = _evaluate(oracle.config(says, pictures=1), source)
    expected = {"instances": ["AP"], "boxes": ["box_AP"], "panoptic": ["PQ"], "semantic": ["mIoU"]}
    for key, scores in expected.items():
        for score in scores:
            assert (result.scores[score] == 1) if key in says else (score not in result.scores)
    assert result.rank == ("PQ" if "panoptic" in says else "AP")
    assert len(result.worst) == 1
    text = table(result.scores, source.classes)
    assert f"{result.rank} 1.0000" in text and "absent" in text or "panoptic" in says


def test_an_image_seen_larger_is_scored_at_its_own_size():
    source = oracle.Scenes(step=200, most=1)
    config = oracle.config(EVERYTHING, step=200, resize=(60, 60))
    result = _evaluate(config, source)
    assert result.scores["AP50"] == 1 and result.scores["AP"] > 0.8
    assert result.scores["AR100"] > 0.8
    assert {tuple(scene.numbers.shape) for scene in result.drawn.values()} <= set(oracle.SIZES)


def test_a_split_without_objects_has_no_ap_and_no_nan():
    result = _evaluate(oracle.config(EVERYTHING), oracle.Scenes(most=0))
    assert result.scores["AP"] is None and result.scores["class_AP"] == [None] * 4
    assert result.scores["PQ"] == result.scores["PQ_stuff"] == 1
    assert result.scores["PQ_things"] is None


def test_the_report_has_every_score_and_pictures(evaluated):
    result, folder, source = evaluated
    summary = json.loads((folder / "eval.json").read_text())
    for key in ("AP", "AP50", "box_AP", "PQ", "SQ", "RQ", "PQ_things", "mIoU"):
        assert summary[key] == result.scores[key]
    assert summary["per_class"]["cat"]["AP"] == result.scores["class_AP"][1]
    assert summary["per_class"]["sky"]["AP"] is None and summary["per_class"]["sky"]["PQ"] > 0
    assert summary["worst"][0]["PQ"] == min(image["PQ"] for image in result.images)
    names = {path.name for path in folder.iterdir()}
    assert {"confusion.png", "worst.png", "per_class.csv", "per_image.csv"} <= names
    assert len(list((folder / "pictures").glob("*.png"))) == 2
    lines = table(result.scores, source.classes).splitlines()
    assert lines[0] == "AP, PQ, IoU of each class:"


def test_saved_predictions_are_what_was_found(evaluated):
    _, folder, source = evaluated
    folder = folder / "predictions"
    entries = json.loads((folder / "results.json").read_text())
    boxes = json.loads((folder / "boxes.json").read_text())
    assert len(boxes) == len(entries) and "bbox" not in entries[0]
    whole = json.loads((folder / "panoptic.json").read_text())
    for index in range(len(source)):
        found = oracle.answer(source[index])
        mine = [{**box, **e} for e, box in zip(entries, boxes, strict=True)]
        mine = [entry for entry in mine if entry["image_id"] == f"scene{index}"]
        order = np.argsort(-found["scores"], kind="stable")
        assert [entry["category_id"] for entry in mine] == found["classes"][order].tolist()
        for entry, i in zip(mine, order, strict=True):
            mask = rle.decode(entry["segmentation"], source.size(index))
            np.testing.assert_array_equal(mask, found["masks"][i])
            y0, x0, y1, x1 = found["boxes"][i].tolist()
            assert entry["bbox"] == [x0, y0, x1 - x0, y1 - y0]
        with Image.open(folder / "panoptic" / f"scene{index}.png") as picture:
            segments = np.asarray(picture, np.int64) @ [1, 256, 65536]
        np.testing.assert_array_equal(segments - 1000, found["panoptic"])
        (entry,) = [e for e in whole["annotations"] if e["image_id"] == f"scene{index}"]
        for segment in entry["segments_info"]:
            assert segment["area"] == (segments == segment["id"]).sum() > 0
            assert segment["category_id"] == segment["id"] // 1000 - 1
        with Image.open(folder / f"scene{index}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), found["semantic"])
    things = [c["id"] for c in whole["categories"] if c["isthing"]]
    assert things == [1, 2]


def test_saved_predictions_score_the_same(evaluated, tmp_path):
    result, folder, source = evaluated
    config = oracle.config(EVERYTHING)
    again = score_given(config, folder / "predictions", source)
    for key, value in result.scores.items():
        assert again.scores[key] == pytest.approx(value, abs=1e-12), key
    assert list(again.worst) == list(result.worst) and again.images == result.images
    shutil.copytree(folder / "predictions", tmp_path, dirs_exist_ok=True)
    entries = json.loads((tmp_path / "results.json").read_text())
    entries[0]["segmentation"]["size"] = [5, 5]
    (tmp_path / "results.json").write_text(json.dumps(entries))
    with pytest.raises(InputError, match=r"image scene\d cannot be read.*is not the image's"):
        score_given(config, tmp_path, source)
    entries[0]["category_id"] = 77
    (tmp_path / "results.json").write_text(json.dumps(entries))
    with pytest.raises(InputError, match="cannot be read"):
        score_given(config, tmp_path, source)


@pytest.mark.parametrize("says", ["instances boxes", "instances"])
def test_a_network_that_finds_nothing_scores_the_same_again(says, tmp_path):
    class Blank(oracle.Scenes):
        def __getitem__(self, index: int) -> dict:
            example = super().__getitem__(index)
            return {**example, "image": np.zeros_like(example["image"])}

    source, config = Blank(), oracle.config(says)
    result = _evaluate(config, source, Saver(tmp_path, 3, source.classes, {}))
    assert json.loads((tmp_path / "results.json").read_text()) == []
    again = score_given(config, tmp_path, source).scores
    assert again == result.scores and again["AP"] == 0
    assert ("box_AP" in again) == ("boxes" in says) == (tmp_path / "boxes.json").exists()


def test_boxes_that_are_not_of_the_results_are_refused(evaluated, tmp_path):
    _, folder, source = evaluated
    shutil.copytree(folder / "predictions", tmp_path, dirs_exist_ok=True)
    boxes = json.loads((tmp_path / "boxes.json").read_text())
    (tmp_path / "boxes.json").write_text(json.dumps(boxes[1:]))
    with pytest.raises(InputError, match=r"boxes\.json holds \d+ boxes and results\.json \d+ obj"):
        score_given(oracle.config(EVERYTHING), tmp_path, source)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mode": "slide"}, "eval.mode is 'slide', but oracle tells objects apart"),
        ({"flip": True}, "sees an image once and whole: leave it False"),
        ({"scales": (1.0, 2.0)}, "eval.scales"),
    ],
)
def test_settings_of_semantic_networks_are_refused(setting, message):
    with pytest.raises(InputError, match=message):
        make_infer(oracle.config(**setting))


@pytest.mark.parametrize("name", ["maskrcnn", "solo", "solov2", "upsnet"])
def test_a_pyramid_is_not_evaluated_at_another_output_stride(name):
    path = f"{EXPERIMENTS / name}.py:dataset=shapes,variant=small"
    make_infer(resolve(path, [("eval.output_stride", "32")]))
    with pytest.raises(InputError, match="output stride 8: set .* eval.output_stride=0"):
        make_infer(resolve(path, [("eval.output_stride", "8")]))


def test_an_experiment_takes_its_things_from_the_data_set(tmp_path):
    text = "from jaxseg.config import default\ndef get_config():\n    c = default()\n"
    text += "    c.model.update(name='oracle', num_classes=0)\n    return c\n"
    (tmp_path / "own.py").write_text(text)
    config = resolve(str(tmp_path / "own.py"), [("data.objects", "7")])
    assert config.model.things == tuple(range(1, 8)) and config.model.num_classes == 8
    given = resolve(str(tmp_path / "own.py"), [("model.num_classes", "8")])
    assert given.model.things == tuple(range(1, 8))
    other = resolve(str(tmp_path / "own.py"), [("model.num_classes", "5")])
    assert other.model.things == () and models.things(other) == tuple(range(5))


def test_what_a_paper_of_objects_needs_of_its_data_is_said(few_scenes, write_folder, tmp_path):
    config = oracle.config()
    config.model.update(num_classes=8, things=tuple(range(1, 8)))
    assert "instances" in open_source(config, "train")[0]
    config.data.objects = 0
    assert "instances" in open_source(config, "val")[0]
    with pytest.raises(InputError, match="data.objects is 0, and oracle learns objects"):
        open_source(config, "train")
    config.data.dataset, config.model.num_classes = str(write_folder(tmp_path / "own")), 3
    with pytest.raises(InputError, match="does not tell objects apart"):
        open_source(config, "val")
    (tmp_path / "own" / "val" / "instances").mkdir()
    with pytest.raises(InputError, match="name them in its classes.json"):
        open_source(config, "val")
