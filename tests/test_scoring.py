"""A truth in COCO's JSON scores what the official evaluation makes of the same files."""

import json
import shutil
from pathlib import Path

import numpy as np
import oracle
import pytest
from PIL import Image
from test_ops_average_precision import NAMES, official

from jaxseg.data import catalog, rle
from jaxseg.found import Found
from jaxseg.scoring import Objects, matches

SIZE = (130, 150)


@pytest.fixture(autouse=True)
def _oracle(monkeypatch):
    oracle.installed(monkeypatch)


def _truth(folder: Path) -> dict:
    """COCO's JSON, written, of twelve images of polygons whose area and box are not their pixels',
    some crowds, and two objects of less than a pixel."""
    rng, annotations, images = np.random.default_rng(0), [], []
    for number in range(1, 13):
        name = f"{number}.png"
        images.append({"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
        Image.new("L", SIZE[::-1]).save(folder / name)
        for _ in range(number % 5):
            x, y, w, h = rng.uniform(0, [90, 80, 70, 60]).round(2).tolist()
            crowd = rng.random() < 0.2
            polygon = [x, y, x + w, y + h / 3, x + w, y + h, x + w / 4, y + h]
            one = {"image_id": number, "category_id": int(rng.integers(1, 3)), "iscrowd": crowd}
            one |= {"segmentation": [polygon], "area": w * h * rng.uniform(0.2, 4)}
            one["bbox"] = [x - 2.7, y + 1.4, w * 1.1, h + 3.3]
            if crowd:
                runs = rle.encode(rle.decode([polygon], SIZE))
                one["segmentation"] = {**runs, "counts": rle.unpack(runs["counts"])}
            annotations.append({"id": len(annotations) + 1, **one})
    tiny = {"segmentation": [[3.2, 3.2, 3.4, 3.4, 3.2, 3.6]], "bbox": [3.2, 3.2, 0.2, 0.4]}
    for number in (2, 9):
        tiny |= {"id": len(annotations) + 1, "image_id": number, "category_id": 1}
        annotations.append({**tiny, "area": 0.04, "iscrowd": False})
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return content


def _guesses(source, seed: int = 0) -> list[dict]:
    """For each image what is found: true masks a bit off, others, and boxes that are not theirs."""
    rng, all_found = np.random.default_rng(seed), []
    for i in range(len(source)):
        truth, size = source[i]["instances"], source.size(i)
        which = rng.permutation(np.repeat(np.arange(len(truth["masks"])), 2))
        masks = [np.roll(truth["masks"][k], rng.integers(-3, 4, 2), (0, 1)) for k in which]
        boxes = truth["boxes"][which] + rng.uniform(-4, 4, (len(which), 4))
        classes = np.where(rng.random(len(which)) < 0.1, 1, truth["classes"][which])
        scores = rng.integers(1, 30, len(which)) / np.float32(30)
        masks = np.array(masks, bool).reshape(-1, *size)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        found = {"masks": masks, "scores": scores, "classes": classes.astype(int)}
        all_found.append({**found, "boxes": boxes})
    return all_found


def _ours(source, guesses: list[dict]) -> dict:
    config = oracle.config()
    config.model.things = source.classes.things
    tally = Objects(config, source.classes)
    for i, found in enumerate(guesses):
        tally.add(i, Found(source.size(i), instances=found), source[i])
    scores = tally.scores([])
    return {
        kind: [-1 if scores[start + name] is None else scores[start + name] for name in NAMES]
        for kind, start in (("segm", ""), ("bbox", "box_"))
    }


def _entries(dataset: str, guesses: list[dict], content: dict) -> list[dict]:
    """The same as COCO's results."""
    ids, entries = catalog.file_ids(dataset), []
    images = sorted(image["id"] for image in content["images"])
    for image, found in zip(images, guesses, strict=True):
        for mask, score, c, (y0, x0, y1, x1) in zip(
            *(found[key].tolist() for key in ("masks", "scores", "classes", "boxes")), strict=True
        ):
            one = {"image_id": image, "category_id": ids[c], "score": score}
            one["segmentation"] = rle.encode(np.array(mask))
            entries.append({**one, "bbox": [x0, y0, x1 - x0, y1 - y0]})
    return entries


@pytest.fixture
def written(tmp_path):
    """(data set, its JSON): the truth that is written here."""
    return f"coco_json:{tmp_path}", _truth(tmp_path)


@pytest.fixture
def sample(data_root, tmp_path):
    """The same of two real images: panoptic segments as run lengths, three of them crowds."""
    folder = data_root / "formats/coco_panoptic"
    if not folder.is_dir():
        pytest.skip("needs formats/coco_panoptic")
    file = folder / "annotations/panoptic_coco_detection_format.json"
    content = json.loads(file.read_text())
    for one in content["annotations"]:
        one["id"] += 1  # the official tool takes a truth of number 0 for none
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    shutil.copytree(folder / "val2017", tmp_path / "images")
    return f"coco_json:{tmp_path}", content


# What pycocotools 2.0.11 gives.
REFERENCE = {
    "written": {
        "segm": [
            *(0.205281836, 0.374756635, 0.177621446, 0.040352928, 0.421493399, 0.9),
            *(0.275454545, 0.416363636, 0.416363636, 0.175, 0.494642857, 0.9),
        ],
        "bbox": [
            *(0.25769015, 0.436154561, 0.283808969, 0.053230198, 0.570081066, 0.8),
            *(0.271363636, 0.432727273, 0.432727273, 0.158333333, 0.658928571, 0.8),
        ],
    },
    "sample": {
        "segm": [
            *(0.60838946, 0.89923388, 0.725951823, 0.190960175, 0.645320729, 0.810808581),
            *(0.486538462, 0.61673951, 0.694667832, 0.342592593, 0.753349673, 0.85),
        ],
        "bbox": [
            *(0.826306049, 0.945597611, 0.89738081, 0.561923691, 0.803773365, 0.958745875),
            *(0.644711538, 0.80625, 0.890166084, 0.651851852, 0.872058824, 1.0),
        ],
    },
}


@pytest.mark.parametrize("name", REFERENCE)
def test_areas_and_boxes_of_the_truth_are_the_annotations_own(name, request):
    source = catalog.open_split(request.getfixturevalue(name)[0], "all", instances=True)
    ours = _ours(source, _guesses(source))
    for kind, values in REFERENCE[name].items():
        np.testing.assert_allclose(ours[kind], values, atol=1e-6)


@pytest.mark.parametrize("name", REFERENCE)
def test_files_score_what_the_official_evaluation_gives(name, request):
    pytest.importorskip("pycocotools")
    dataset, content = request.getfixturevalue(name)
    source = catalog.open_split(dataset, "all", instances=True)
    guesses = _guesses(source)
    entries = _entries(dataset, guesses, content)
    for kind, values in _ours(source, guesses).items():
        np.testing.assert_allclose(values, official(content, entries, kind), atol=1e-6)


def test_what_the_truth_does_not_say_is_measured(written):
    source = catalog.open_split(written[0], "all", instances=True)
    truth, found = source[1]["instances"], _guesses(source)[1]
    bare = {key: truth[key] for key in ("masks", "classes", "crowd")}
    silent = {key: np.full_like(truth[key], np.nan) for key in ("areas", "boxes")}
    for one, other in zip(matches(found, bare), matches(found, {**bare, **silent}), strict=True):
        for c in one:
            for ours, theirs in zip(one[c], other[c], strict=True):
                np.testing.assert_array_equal(ours, theirs)
