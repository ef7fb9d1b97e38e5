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


def _rectangle(rng, side: int) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    y, x = rng.integers(0, side - 8, 2)
    h, w = rng.integers(4, rng.choice([20, 60, 128] if side == SIDE else [60, 200, 200]), 2)
    mask[y : y + h, x : x + w] = True
    if rng.random() < 0.3:
        mask[y : y + h // 2, x : x + w // 2] = False
    return mask


def _moved(mask, rng) -> np.ndarray:
    return np.roll(mask, rng.integers(-4, 5, 2), (0, 1)) if rng.random() < 0.7 else mask


def _scene(seed: int, side: int = SIDE) -> tuple[dict, dict]:
    """(found, truth) of a random image: crowds, equal scores, empty masks, doubles, misses."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, 7))
    masks = [_rectangle(rng, side) for _ in range(count)]
    classes = rng.integers(1, 4, count)
    truth = {"masks": np.array(masks, bool).reshape(-1, side, side), "classes": classes}
    truth["crowd"] = rng.random(count) < 0.25
    which = [*range(count), *rng.integers(0, count, 5)] if count else []
    found = [_moved(masks[i], rng) for i in which] + [_rectangle(rng, side) for _ in range(3)]
    guessed = [classes[i] if rng.random() < 0.8 else rng.integers(1, 4) for i in which]
    found = {
        "masks": np.array(found[: rng.integers(0, 14)], bool).reshape(-1, side, side),
        "classes": np.array([*guessed, *rng.integers(1, 4, 3)]),
    }
    many = len(found["masks"])
    found["classes"] = found["classes"][:many]
    found["scores"] = np.float32(rng.integers(1, 6, many) / 6)  # many are equal
    if many > 2:
        found["masks"][1] = False
    return _measured(found, truth)


def _measured(*scenes: dict) -> tuple[dict, ...]:
    for scene in scenes:
        scene["bounds"], scene["areas"] = bounds(scene["masks"]), ap.mask_areas(scene["masks"])
    return scenes


def _crowded() -> tuple[dict, dict]:
    """120 objects of one class and as many guesses, some of them off; the last 20 do not count."""
    rng = np.random.default_rng(0)
    masks = np.zeros((120, SIDE, SIDE), bool)
    for i in range(120):
        y, x = 10 * (i // 12), 10 * (i % 12)
        masks[i, y : y + 8, x : x + 8] = True
    classes = np.ones(120, int)
    truth = {"masks": masks, "classes": classes, "crowd": np.arange(120) == 7}
    scores = rng.permutation(120) / np.float32(120)
    found = {"masks": np.array([_moved(mask, rng) for mask in masks]), "classes": classes}
    return _measured({**found, "scores": scores}, truth)


def _large() -> list:
    return [*(_scene(seed, 260) for seed in range(40)), _crowded()]


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


def official(content: dict, found: list[dict], kind: str) -> list[float]:
    """The scores NAMES of results `found` on a truth, COCO's JSON, as the official tool has them,
    -1 for none.

    kind: segm or bbox. Skips where it is not installed.
    """
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # The official tool takes the area of the box where there is one.
    other = {"bbox": "segmentation", "segm": "bbox"}[kind]
    found = [{k: v for k, v in one.items() if k != other} for one in found]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
        judge = COCOeval(coco, coco.loadRes(found), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats.tolist()


def _official(scenes: list, kind: str) -> list[float]:
    rle = pytest.importorskip("pycocotools.mask")
    truths, found = [], []
    for image, (guess, truth) in enumerate(scenes, start=1):
        for i in range(len(truth["masks"])):
            one = _annotation(truth, i, rle, image) | {"id": len(truths) + 1}
            one |= {"area": int(truth["masks"][i].sum()), "iscrowd": int(truth["crowd"][i])}
            truths.append(one)
        for i in range(len(guess["masks"])):
            found.append(_annotation(guess, i, rle, image) | {"score": float(guess["scores"][i])})
    sizes = [guess["masks"].shape[1:] for guess, _ in scenes]
    images = [{"id": i, "height": h, "width": w} for i, (h, w) in enumerate(sizes, start=1)]
    categories = [{"id": c, "name": str(c)} for c in CLASSES]
    content = {"images": images, "annotations": truths, "categories": categories}
    return official(content, found, kind)


# What pycocotools 2.0.11 gives for the scenes 0..39, and for those of `_large`.
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
LARGE = {
    "segm": [
        *(0.181545598, 0.262142951, 0.182797153, 0.10086404, 0.289723768, 0.51490099),
        *(0.151380725, 0.3587856, 0.446664388, 0.274693679, 0.621447246, 0.691746032),
    ],
    "bbox": [
        *(0.152735923, 0.207264485, 0.14683888, 0.109620049, 0.252843316, 0.283522405),
        *(0.136678059, 0.32705172, 0.412333105, 0.276740462, 0.577908497, 0.538888889),
    ],
}


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_forty_scenes_score_what_the_official_evaluation_gave(kind):
    ours = _ours([_scene(seed) for seed in range(40)], kind)
    for name, value in zip(NAMES, REFERENCE[kind], strict=True):
        assert ours[name] == (None if value is None else pytest.approx(value, abs=1e-9)), name


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_large_objects_and_many_score_what_the_official_evaluation_gave(kind):
    ours = _ours(_large(), kind)
    for name, value in zip(NAMES, LARGE[kind], strict=True):
        assert ours[name] == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_any_scenes_score_what_the_official_evaluation_gives(kind):
    pytest.importorskip("pycocotools")
    parts = [(0, 40), (40, 1), (50, 7), (60, 3), (70, 12)]
    small = [[_scene(seed) for seed in range(start, start + n)] for start, n in parts]
    for scenes in (*small, _large()):
        ours = _ours(scenes, kind)
        ours = [-1 if ours[name] is None else ours[name] for name in NAMES]
        np.testing.assert_allclose(ours, _official(scenes, kind), atol=1e-9)
