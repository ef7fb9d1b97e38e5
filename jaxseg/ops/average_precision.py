"""Average precision of boxes and masks, as COCO counts it. On the host, in numpy.

Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014, and the rules of its official
evaluation: objects found are matched to true ones from the surest down, at ten thresholds of
intersection over union and in four ranges of area; crowd regions neither count nor punish.

An image is matched by itself, `match`; `scores` adds up any number of them.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxseg.ops.metrics import mean

IOUS = np.linspace(0.5, 0.95, 10)  # thresholds
RECALLS = np.linspace(0.0, 1.0, 101)  # where precision is read
AREAS = {"all": (0, 1e10), "S": (0, 32**2), "M": (32**2, 96**2), "L": (96**2, 1e10)}  # pixels
MOST = (1, 10, 100)  # objects of a class in an image that are looked at, the surest ones
LIMITS = np.array(list(AREAS.values()))


class Match(NamedTuple):
    """The objects of one class in one image: D found, the surest first; A areas, T thresholds."""

    scores: np.ndarray  # float [D]
    right: np.ndarray  # bool [A,T,D]: each is a true object, or part of a crowd
    void: np.ndarray  # bool [A,T,D]: and yet does not count: a crowd, or of another size
    truths: np.ndarray  # int [A]: true objects that count


def _overlaps(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The common area of boxes [D,4] and [G,4]: [D,G]."""
    low = np.maximum(found[:, None, :2], truth[None, :, :2])
    high = np.minimum(found[:, None, 2:], truth[None, :, 2:])
    return (high - low).clip(0).prod(-1)


def _ratios(
    common: np.ndarray, found: np.ndarray, truth: np.ndarray, crowd: np.ndarray
) -> np.ndarray:
    """Common area over union [D,G]; of a crowd region, over the area of what was found."""
    union = np.where(crowd[None], found[:, None], found[:, None] + truth[None] - common)
    return np.divide(common, union, out=np.zeros(common.shape), where=common > 0)


def box_ious(found: np.ndarray, truth: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """float64 [D,G] of boxes [D,4] and [G,4], (y0, x0, y1, x1). crowd: bool [G], see `_ratios`."""
    found, truth = np.float64(found).reshape(-1, 4), np.float64(truth).reshape(-1, 4)
    return _ratios(_overlaps(found, truth), box_areas(found), box_areas(truth), crowd)


def box_areas(boxes: np.ndarray) -> np.ndarray:
    """float64 [n] of boxes [n,4]."""
    boxes = np.float64(boxes).reshape(-1, 4)
    return (boxes[:, 2:] - boxes[:, :2]).prod(-1)


def mask_ious(found: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> np.ndarray:
    """float64 [D,G] of masks, 0 between classes.

    Both have `masks` bool [n,H,W], `classes` [n], `areas` [n] and `bounds` int [n,4], the boxes
    (y0, x0, y1, x1) around the masks; truth has `crowd` bool [G], see `_ratios`.
    """
    here, there = found["bounds"], truth["bounds"]
    common = _overlaps(here, there).astype(np.float64)
    common[found["classes"][:, None] != truth["classes"]] = 0
    for d, g in np.argwhere(common).tolist():  # only where both boxes lie is looked at
        y0, x0 = np.maximum(here[d, :2], there[g, :2]).tolist()
        y1, x1 = np.minimum(here[d, 2:], there[g, 2:]).tolist()
        part = np.s_[y0:y1, x0:x1]
        common[d, g] = np.count_nonzero(found["masks"][d][part] & truth["masks"][g][part])
    return _ratios(common, found["areas"], truth["areas"], truth["crowd"])


def mask_areas(masks: np.ndarray) -> np.ndarray:
    """Pixels of masks [n,H,W]: float64 [n]."""
    return np.array([np.count_nonzero(mask) for mask in masks], np.float64)


def match(found: dict[str, np.ndarray], truth: dict[str, np.ndarray], ious: np.ndarray) -> dict:
    """Class -> Match, of one image.

    found: `scores`, `classes` and `areas` (pixels) [D]. truth: `classes`, `areas` and `crowd` [G].
    ious: [D,G], see `mask_ious` and `box_ious`; only those within a class are read.
    """
    result = {}
    for c in sorted({*found["classes"].tolist(), *truth["classes"].tolist()}):
        mine, theirs = np.flatnonzero(found["classes"] == c), truth["classes"] == c
        order = mine[np.argsort(-found["scores"][mine], kind="stable")][: MOST[-1]]
        result[c] = _match(
            found["scores"][order].astype(np.float64),
            found["areas"][order],
            truth["areas"][theirs],
            truth["crowd"][theirs],
            ious[order][:, theirs],
        )
    return result


def _outside(areas: np.ndarray) -> np.ndarray:
    """bool [A,n]: whether each area is outside each range; both ends are inside."""
    return (areas < LIMITS[:, :1]) | (areas > LIMITS[:, 1:])


def _match(
    scores: np.ndarray, found: np.ndarray, truth: np.ndarray, crowd: np.ndarray, ious: np.ndarray
) -> Match:
    void_truth = crowd | _outside(truth)  # [A,G]
    size = (len(AREAS), len(IOUS))
    right = np.zeros((*size, len(scores)), bool)
    void = np.zeros((*size, len(scores)), bool)
    free = np.ones((*size, len(truth)), bool)
    least = np.minimum(IOUS, 1 - 1e-10)[:, None]
    for d in np.flatnonzero((ious >= IOUS[0]).any(1)) if len(truth) else ():
        open_ = free & (ious[d] >= least)  # [A,T,G]
        counts = open_ & ~void_truth[:, None]
        use = np.where(counts.any(-1, keepdims=True), counts, open_)  # what counts goes first
        # Of equal ones the last is taken.
        best = len(truth) - 1 - np.where(use, ious[d], -1)[..., ::-1].argmax(-1)
        hit = use.any(-1)
        right[..., d] = hit
        void[..., d] = hit & np.take_along_axis(void_truth, best, axis=1)
        taken = (np.arange(len(truth)) == best[..., None]) & hit[..., None]
        free &= ~taken | crowd
    void |= ~right & _outside(found)[:, None]
    return Match(scores, right, void, (~void_truth).sum(1))


def scores(images: Sequence[dict[int, Match]], classes: Iterable[int], count: int) -> dict:
    """AP (over all thresholds), AP50, AP75, AP_S, AP_M, AP_L, AR1, AR10, AR100, AR_S, AR_M, AR_L:
    means over those of `classes` that have true objects, None where none has.

    Also `class_AP` and `class_AP50`, lists of `count` values a class, None where it has no true
    object or is none of `classes`. images: of `match`, in the order of the data set, by which
    objects of one score are ranked.
    """
    classes = list(classes)
    precision, recall = {}, {}
    for c in classes:
        held = [image[c] for image in images if c in image]
        for most in MOST:
            precision[c, most], recall[c, most] = _curve(held, most)

    def total(table: dict, area: str, most: int = MOST[-1], iou: int | None = None) -> float | None:
        part = [table[c, most][list(AREAS).index(area)] for c in classes]  # [T,R] or [T] each
        part = np.array(part if iou is None else [x[iou] for x in part])
        return mean(part[part > -1])

    def each(iou: int | None) -> list[float | None]:
        values: list[float | None] = [None] * count
        for c in classes:
            part = precision[c, MOST[-1]][0]
            part = part if iou is None else part[iou]
            values[c] = mean(part[part > -1])
        return values

    result: dict[str, Any] = {"AP": total(precision, "all")}
    result |= {"AP50": total(precision, "all", iou=0), "AP75": total(precision, "all", iou=5)}
    result |= {f"AP_{area}": total(precision, area) for area in ("S", "M", "L")}
    result |= {f"AR{most}": total(recall, "all", most) for most in MOST}
    result |= {f"AR_{area}": total(recall, area) for area in ("S", "M", "L")}
    return {**result, "class_AP": each(None), "class_AP50": each(0)}


def _curve(held: Sequence[Match], most: int) -> tuple[np.ndarray, np.ndarray]:
    """(precision [A,T,R], recall [A,T]) of one class; -1 where it has no true object."""
    size = (len(AREAS), len(IOUS))
    precision, recall = np.full((*size, len(RECALLS)), -1.0), np.full(size, -1.0)
    truths = sum((m.truths for m in held), np.zeros(len(AREAS), np.int64))
    if not truths.any():
        return precision, recall
    order = np.argsort(-np.concatenate([m.scores[:most] for m in held]), kind="stable")
    right, void = (
        np.concatenate([m[k][..., :most] for m in held], axis=-1)[..., order] for k in (1, 2)
    )
    hits = np.cumsum(right & ~void, axis=-1, dtype=np.float64)
    misses = np.cumsum(~right & ~void, axis=-1, dtype=np.float64)
    for a in np.flatnonzero(truths):
        share = hits[a] / truths[a]
        pure = hits[a] / (hits[a] + misses[a] + np.spacing(1))
        pure = np.maximum.accumulate(pure[:, ::-1], axis=1)[:, ::-1]
        recall[a] = share[:, -1] if len(order) else 0
        precision[a] = 0
        for t in range(len(IOUS)):
            at = np.searchsorted(share[t], RECALLS, side="left")
            precision[a, t, at < len(order)] = pure[t, at[at < len(order)]]
    return precision, recall


def image_score(found: dict[int, Match]) -> float | None:
    """AP of one image: the mean over the classes that it has; None where it has no object."""
    curves = (_curve([one], MOST[-1])[0][0] for one in found.values() if one.truths[0])
    return mean(float(precision.mean()) for precision in curves)
