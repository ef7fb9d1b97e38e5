"""Panoptic quality. Kirillov et al., "Panoptic Segmentation", CVPR 2019, section 4.

A panoptic map is int [H,W]: class id * 1000 + the number of the object, from 1; of a class whose
regions are not told apart, stuff, the number is 0; 255000 is void. In the truth the number 0 of a
class of things is a crowd region: objects of that class that are not told apart. On the host.
"""

from collections.abc import Collection
from typing import Any

import numpy as np

from jaxseg.ops.metrics import mean, ratio, ratios

STEP = 1000  # numbers of objects below it
VOID = 255 * STEP


def counts(
    found: np.ndarray, truth: np.ndarray, things: Collection[int], num_classes: int
) -> np.ndarray:
    """float64 [K,4] of one image's maps: for each class the IoUs of its matches added up, how many
    segments match, how many that were found do not, and how many true ones.

    Two segments of one class match where their IoU is above 0.5, strictly; pixels that are void in
    the truth are in no union. A found segment without a match is no mistake where more than half of
    it is void, or a crowd of its class; a crowd region itself is never missed.
    """
    segments, mine = np.unique(found, return_inverse=True)
    truths, theirs = np.unique(truth, return_inverse=True)
    shape = (len(segments), len(truths))
    common = np.bincount(mine.ravel() * shape[1] + theirs.ravel(), minlength=shape[0] * shape[1])
    common = common.reshape(shape).astype(np.float64)  # [P,G]
    area, true_area = common.sum(1), common.sum(0)
    classes, true_classes = segments // STEP, truths // STEP
    void = true_classes >= num_classes
    crowd = (truths % STEP == 0) & np.isin(true_classes, list(things)) & ~void
    lost = common[:, void].sum(1)  # [P]
    same = classes[:, None] == true_classes
    union = area[:, None] + true_area - common - lost[:, None]
    comparable = same & ~(crowd | void) & (classes < num_classes)[:, None]
    iou = np.divide(common, union, out=np.zeros(shape), where=comparable & (union > 0))
    matched = iou > 0.5
    excused = lost + (common * (same & crowd)).sum(1)
    wrong = ~matched.any(1) & (excused <= 0.5 * area) & (classes < num_classes)
    missed = ~matched.any(0) & ~crowd & ~void

    result = np.zeros((num_classes, 4))
    pairs = np.argwhere(matched)
    np.add.at(result[:, 0], true_classes[pairs[:, 1]], iou[matched])
    np.add.at(result[:, 1], true_classes[pairs[:, 1]], 1)
    np.add.at(result[:, 2], classes[wrong], 1)
    np.add.at(result[:, 3], true_classes[missed], 1)
    return result


def scores(total: np.ndarray, things: Collection[int]) -> dict[str, Any]:
    """PQ = SQ * RQ, SQ = the mean IoU of matches, RQ = F1 of segments; of `counts` added up.

    Of each the mean over all classes, with `_things` or `_stuff` over those, and lists `class_PQ`,
    `class_SQ`, `class_RQ` of K. A class in neither truth nor prediction has None and is in no mean;
    one without a match has SQ 0.
    """
    iou, right, wrong, missed = np.asarray(total, np.float64).T
    weight = right + wrong / 2 + missed / 2
    each = {"PQ": ratios(iou, weight), "RQ": ratios(right, weight)}
    each["SQ"] = [
        (ratio(i, r) or 0.0) if w > 0 else None for i, r, w in zip(iou, right, weight, strict=True)
    ]
    result: dict[str, Any] = {}
    groups = {"": range(len(iou)), "_things": things}
    groups["_stuff"] = [c for c in range(len(iou)) if c not in things]
    for end, group in groups.items():
        result |= {key + end: mean(each[key][c] for c in group) for key in ("PQ", "SQ", "RQ")}
    return result | {f"class_{key}": each[key] for key in ("PQ", "SQ", "RQ")}
