"""COCO's AP: equal to the official evaluation, and where that is not installed to what it gave."""

import contextlib
import io

import numpy as np
import pytest

from jaxseg.data.objects import bounds
from jaxseg.ops import average_precision as ap

NAMES = "AP AP50 AP75 AP_S AP_M AP_L AR1 AR10 AR100 AR_S AR_M AR_L".split()
CLASSES = (1, 2, 3, 5)  # of 6; class 5 is nowhere
SIDE = 130


def _rectangle(rng) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    y, x = rng.integers(0, SIDE - 8, 2)
    h, w = rng.integers(4, rng.choice([20, 60, 128]), 2)
    mask[y : y + h, x : x + w] = True
    if rng.random() < 0.3:
        mask[y : y + h // 2, x : x + w // 2] = False
    return mask


def _moved(mask, rng) -> np.ndarray:
    return np.roll(mask, rng.integers(-4, 5, 2), (0, 1)) if rng.random() < 0.7 else mask


def _scene(seed: int) -> tuple[dict, dict]:
    """(found, truth) of a random image: crowds, equal scores, empty masks, doubles, misses."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, 7))
    masks = [_rectangle(rng) for _ in range(count)]
    classes = rng.integers(1, 4, count)
    truth = {"masks": np.array(masks, bool).reshape(-1, SIDE, SIDE), "classes": classes}
    truth["crowd"] = rng.random(count) < 0.25
    which = [*range(count), *rng.integers(0, count, 5)] if count else []
    found = [_moved(masks[i], rng) for i in which] + [_rectangle(rng) for _ in range(3)]
    guessed = [classes[i] if rng.random() < 0.8 else rng.integers(1, 4) for i in which]
    found = {
        "masks": np.array(found[: rng.integers(0, 14)], bool).reshape(-1, SIDE, SIDE),
        "classes": np.array([*guessed, *rng.integers(1, 4, 3)]),
    }
    many = len(found["masks"])
    found["classes"] = found["classes"][:many]
    found["scores"] = np.float32(rng.integers(1, 6, many) / 6)  # many are equal
    if many > 2:
        found["masks"][1] = False
    for scene in (found, truth):
        scene["bounds"], scene["areas"] = bounds(scene["masks"]), ap.mask_areas(scene["masks"])
    return found, truth


def _ours(scenes: list, kind: str) -> dict:
    matches = []
    for found, truth in scenes:
        if kind == "bbox":
            ious = ap.box_ious(found["bounds"], truth["bounds"], truth["crowd"])
            found = {**found, "areas": ap.box_areas(found["bounds"])}
        else:
            ious = ap.mask_ious(found, truth)
        matches.append(ap.match(found, truth, ious))
    return ap.scores(matches, CLASSES, 6)


def _annotation(scene: dict, i: int, rle, image: int) -> dict:
    y0, x0, y1, x1 = scene["bounds"][i].tolist()
    return {
        "image_id": image,
        "category_id": int(scene["classes"][i]),
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "segmentation": rle.encode(np.asfortranarray(scene["masks"][i].astype(np.uint8))),
    }


def _official(scenes: list, kind: str) -> list[float]:
    rle = pytest.importorskip("pycocotools.mask")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truths, found = [], []
    for image, (guess, truth) in enumerate(scenes, start=1):
        for i in range(len(truth["masks"])):
            one = _annotation(truth, i, rle, image) | {"id": len(truths) + 1}
            one |= {"area": int(truth["masks"][i].sum()), "iscrowd": int(truth["crowd"][i])}
            truths.append(one)
        for i in range(len(guess["masks"])):
            one = _annotation(guess, i, rle, image) | {"score": float(guess["scores"][i])}
            # The official tool takes the area of the box where there is one.
            other = {"bbox": "segmentation", "segm": "bbox"}[kind]
            found.append({k: v for k, v in one.items() if k != other})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        images = [{"id": i + 1, "height": SIDE, "width": SIDE} for i in range(len(scenes))]
        categories = [{"id": c, "name": str(c)} for c in CLASSES]
        coco.dataset = {"images": images, "annotations": truths, "categories": categories}
        coco.createIndex()
        judge = COCOeval(coco, coco.loadRes(found), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats.tolist()


# What pycocotools 2.0.11 gives for the scenes 0..39.
REFERENCE = {
    "segm": [
        *(0.13594095, 0.213903362, 0.133919585, 0.065251252, 0.374099806, None),
        *(0.146616541, 0.407393484, 0.407393484, 0.297987262, 0.617989418, None),
    ],
    "bbox": [
        *(0.123666747, 0.179321041, 0.121152807, 0.077155451, 0.299737346, None),
        *(0.154887218, 0.397719298, 0.397719298, 0.29048863, 0.608587709, None),
    ],
}


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_forty_scenes_score_what_the_official_evaluation_gave(kind):
    ours = _ours([_scene(seed) for seed in range(40)], kind)
    for name, value in zip(NAMES, REFERENCE[kind], strict=True):
        assert ours[name] == (None if value is None else pytest.approx(value, abs=1e-9)), name


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_any_scenes_score_what_the_official_evaluation_gives(kind):
    pytest.importorskip("pycocotools")
    for start, count in [(0, 40), (40, 1), (50, 7), (60, 3), (70, 12)]:
        scenes = [_scene(seed) for seed in range(start, start + count)]
        ours = _ours(scenes, kind)
        ours = [-1 if ours[name] is None else ours[name] for name in NAMES]
        np.testing.assert_allclose(ours, _official(scenes, kind), atol=1e-9)
