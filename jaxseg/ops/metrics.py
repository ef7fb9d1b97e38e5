"""Semantic segmentation scores from a confusion matrix.

Definitions: Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation",
CVPR 2015, section 5 (pixel accuracy, mean accuracy, mean IU, frequency weighted IU).
"""

import jax
import jax.numpy as jnp
import numpy as np


def confusion(
    prediction: jax.Array, label: jax.Array, num_classes: int, ignore: int = 255
) -> jax.Array:
    """Pixel counts, int32 [K,K]: row = truth, column = prediction.

    prediction, label: integers of one shape. Pixels whose label is `ignore`, or whose label or
    prediction is not in 0 .. K - 1, are not counted. One call counts fewer than 2^31 pixels; sum
    batches on the host in int64.
    """
    prediction, label = prediction.astype(jnp.int32), label.astype(jnp.int32)
    counted = label != ignore
    for index in (prediction, label):
        counted &= (index >= 0) & (index < num_classes)
    cells = num_classes**2
    cell = jnp.where(counted, label * num_classes + prediction, cells)  # the last bin is dropped
    counts = jnp.bincount(cell.ravel(), length=cells + 1)[:-1]
    return counts.reshape(num_classes, num_classes).astype(jnp.int32)


def scores(confusion: np.ndarray) -> dict:
    """Scores, as fractions, of a confusion matrix [K,K] (row = truth), in float64 on the host.

    IoU[k] = hits / (truth or predicted), None where class k is in neither truth nor prediction.
    Acc[k] = hits / truth, None where class k has no truth pixel.
    mIoU and mAcc are the means of those that are not None: a class that is only ever predicted
    lowers mIoU (its IoU is 0), one absent from both changes nothing.
    aAcc = all hits / all pixels; fwIoU = IoU weighted by truth pixels.
    No pixels at all gives None for every score, never NaN.
    """
    counts = np.asarray(confusion, np.float64)
    hit, truth = np.diag(counts), counts.sum(axis=1)
    union = truth + counts.sum(axis=0) - hit
    total = truth.sum()
    iou = [_ratio(h, u) for h, u in zip(hit, union, strict=True)]
    acc = [_ratio(h, t) for h, t in zip(hit, truth, strict=True)]
    weighted = sum(t * i for t, i in zip(truth, iou, strict=True) if t > 0)
    return {
        "mIoU": _mean(iou),
        "mAcc": _mean(acc),
        "aAcc": _ratio(hit.sum(), total),
        "fwIoU": _ratio(weighted, total),
        "IoU": iou,
        "Acc": acc,
    }


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole > 0 else None


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None
