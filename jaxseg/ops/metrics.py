"""Semantic segmentation scores from a confusion matrix.

Definitions: Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation",
CVPR 2015, section 5 (pixel accuracy, mean accuracy, mean IU, frequency weighted IU). Counts are
integers that add up over pixels, images, batches and processes; `scores` turns their sum into
fractions.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

POLICY = (
    "absent: a class in neither truth nor prediction has no score (null) and is in no mean; one "
    "that is only predicted has IoU and Dice 0"
)


def histograms(cells: jax.Array, counted: jax.Array, bins: int) -> jax.Array:
    """int32 [B,bins]: of each image, how many `counted` pixels lie in each of the cells.

    cells: integers [B,...], 0 .. bins - 1 where counted is True. Fewer than 2^31 pixels a call.
    """
    images = jnp.arange(len(cells)).reshape(-1, *[1] * (cells.ndim - 1))
    place = jnp.where(counted, cells, bins) + images * (bins + 1)  # the last one is dropped
    counts = jnp.bincount(place.ravel(), length=len(cells) * (bins + 1))
    return counts.reshape(len(cells), bins + 1)[:, :-1].astype(jnp.int32)


def confusions(
    prediction: jax.Array, label: jax.Array, num_classes: int, ignore: int = 255
) -> jax.Array:
    """Pixel counts of each image, int32 [B,K,K]: row = truth, column = prediction.

    prediction, label: integers of one shape [B,...]. Pixels whose label is `ignore`, or whose label
    or prediction is not in 0 .. K - 1, are not counted. Sum batches on the host in int64.
    """
    prediction, label = prediction.astype(jnp.int32), label.astype(jnp.int32)
    counted = label != ignore
    for index in (prediction, label):
        counted &= (index >= 0) & (index < num_classes)
    counts = histograms(label * num_classes + prediction, counted, num_classes**2)
    return counts.reshape(-1, num_classes, num_classes)


def confusion(
    prediction: jax.Array, label: jax.Array, num_classes: int, ignore: int = 255
) -> jax.Array:
    """`confusions` of one image, or of all pixels of arrays of any shape: int32 [K,K]."""
    return confusions(prediction[None], label[None], num_classes, ignore)[0]


def scores(confusion: np.ndarray) -> dict:
    """Scores, as fractions, of a confusion matrix [K,K] (row = truth), in float64 on the host.

    Of each class, with hits, its pixels of truth and the pixels predicted as it:

    - IoU = hits / (truth or predicted), Dice = F1 = 2 hits / (truth + predicted); None where the
      class is in neither truth nor prediction, 0 where it is only predicted;
    - Acc = recall = hits / truth, None without truth; precision = hits / predicted, None where it
      is never predicted.

    mIoU, mDice, mAcc and mPrecision are the means of those that are not None. mAcc_binary is the
    other mean accuracy in use: each class against the rest, (hits + pixels of neither) / all, over
    the classes that have an IoU. aAcc = all hits / all pixels; fwIoU = IoU weighted by truth.
    No pixels at all gives None for every score, never NaN.
    """
    counts = np.asarray(confusion, np.float64)
    hit, truth, predicted = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    union, total = truth + predicted - hit, truth.sum()
    iou, dice = ratios(hit, union), ratios(2 * hit, truth + predicted)
    recall, precision = ratios(hit, truth), ratios(hit, predicted)
    right = [(total - u + h) / total if u > 0 else None for h, u in zip(hit, union, strict=True)]
    weighted = sum(t * i for t, i in zip(truth, iou, strict=True) if t > 0)
    return {
        "mIoU": mean(iou),
        "mAcc": mean(recall),
        "mAcc_binary": mean(right),
        "aAcc": ratio(hit.sum(), total),
        "fwIoU": ratio(weighted, total),
        "mDice": mean(dice),
        "mPrecision": mean(precision),
        "IoU": iou,
        "Acc": recall,
        "Dice": dice,
        "precision": precision,
    }


def ratio(part: float, whole: float) -> float | None:
    """part / whole, or None where there is no whole."""
    return float(part / whole) if whole > 0 else None


def ratios(parts: Iterable[float], wholes: Iterable[float]) -> list[float | None]:
    return [ratio(part, whole) for part, whole in zip(parts, wholes, strict=True)]


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of what is not None; None where nothing is left."""
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None
