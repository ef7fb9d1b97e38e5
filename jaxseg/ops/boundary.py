"""Scores near the boundaries of objects: counts under jit that add up, and what they come to.

- Boundary IoU (Cheng et al., CVPR 2021, arXiv:2103.16562): the IoU of the two bands that lie inside
  the true and the predicted region of a class within 2 % of the image's diagonal of its outline.
  The image's border is an outline too. Distances are in steps of 3x3 erosion, as in the authors'
  code; bands are counted over the whole data set, as IoU is.
- Boundary F1 (BF: Csurka et al., BMVC 2013; SegNet, arXiv:1511.00561, section 4): contour pixels of
  a class match where the other contour of that class is within 0.75 % of the diagonal (Euclidean);
  F1 of precision and recall, mean over the classes with a true contour, then over images.
- Trimap (Kohli et al. 2009; DeepLab v3+, arXiv:1802.02611, section 4.4): mIoU of the pixels within
  1 .. 40 pixels of a change of the true label; where objects have a void contour this is the
  dilated void of DeepLab v3+.

Ignored pixels are a class of their own in both truth and prediction and never counted, so that a
perfect prediction has 1 in all three. Where images of a batch end before its shape, `size` says.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.ops import metrics

TRIMAP = (1, 2, 3, 4, 6, 8, 12, 16, 20, 25, 30, 35, 40)  # widths of the band, pixels
FOUR = ((0, 1), (1, 0))  # half of the neighbours: the others are the same pairs seen from there
EIGHT = (*FOUR, (1, 1), (1, -1))


def counts(
    prediction: jax.Array,
    label: jax.Array,
    size: jax.Array,
    num_classes: int,
    ignore: int = 255,
) -> dict[str, jax.Array]:
    """What the scores need of each image, int32.

    prediction, label: ids [B,H,W]; size: int32 [B,2], height and width of each image, whose pixels
    are the first ones of its rows and columns.
    Returns `bands` [B,3,K], pixels of each class in both bands, the true and the predicted one;
    `contours` [B,4,K], matched and all contour pixels of the prediction, then of the truth; and
    `rings` [B,3,W,K], hits, true and predicted pixels whose distance is above the trimap's width
    before and at most this one.
    """
    row, column = (jax.lax.broadcasted_iota(jnp.int32, label.shape, axis) for axis in (1, 2))
    height, width = size[:, 0, None, None], size[:, 1, None, None]
    inside = (row < height) & (column < width)
    void = ~inside | (label == ignore)
    truth, predicted = (jnp.where(void, ignore, x.astype(jnp.int32)) for x in (label, prediction))

    square = jnp.sum(size * size, axis=1)[:, None, None]  # of the diagonal
    radius = jnp.maximum(1, jnp.round(jnp.sqrt(square.astype(jnp.float32)) / 50)).astype(jnp.int32)
    border = jnp.minimum(
        jnp.minimum(row + 1, height - row), jnp.minimum(column + 1, width - column)
    )
    most = max(1, round(math.hypot(*label.shape[1:]) / 50))
    to_truth = 1 + distance(changes(truth, inside, EIGHT), max(most, TRIMAP[-1]))
    to_predicted = 1 + distance(changes(predicted, inside, EIGHT), most)
    in_truth, in_predicted = (
        (jnp.minimum(to, border) <= radius) & ~void for to in (to_truth, to_predicted)
    )
    hit = truth == predicted
    bands = [(in_truth & in_predicted & hit, truth), (in_truth, truth), (in_predicted, predicted)]

    outlines = [changes(x, inside, FOUR) & ~void for x in (predicted, truth)]
    marks = [jnp.where(o, x, -1) for o, x in zip(outlines, (predicted, truth), strict=True)]
    # 0.75 % squared is 9 / 160000; in two parts, since 9 times the square may pass int32
    reach = square // 160_000 * 9 + square % 160_000 * 9 // 160_000
    most = (label.shape[1] ** 2 + label.shape[2] ** 2) * 9 // 160_000
    found = _near(*marks, reach, most, num_classes)
    contours = []
    for outline, match, x in zip(outlines, found, (predicted, truth), strict=True):
        contours += [(outline & match, x), (outline, x)]

    ring = jnp.searchsorted(jnp.asarray(TRIMAP), to_truth)  # == len(TRIMAP): too far
    rings = [(~void & hit, truth), (~void, truth), (~void, predicted)]
    return {
        "bands": _per_class(bands, num_classes),
        "contours": _per_class(contours, num_classes),
        "rings": _per_class(rings, num_classes, ring, len(TRIMAP)),
    }


def changes(label: jax.Array, inside: jax.Array, pairs: tuple) -> jax.Array:
    """bool [B,H,W]: pixels of label [B,H,W] with a neighbour of another label inside the image."""
    changed = jnp.zeros(label.shape, bool)
    for down, right in pairs:
        other, there = (_shift(x, -down, -right) for x in (label, inside))
        differs = (label != other) & inside & there
        changed |= differs | _shift(differs, down, right)
    return changed


def distance(mask: jax.Array, most: int) -> jax.Array:
    """Steps of a king from each pixel of bool [B,H,W] to the nearest True one, at most `most`."""

    def step(_: int, state: tuple) -> tuple:
        reached, steps = state
        for down, right in FOUR:  # along one axis, then the other: a 3x3 square
            reached |= _shift(reached, down, right) | _shift(reached, -down, -right)
        return reached, steps + ~reached

    start = (mask, (~mask).astype(jnp.int32))
    return jax.lax.fori_loop(1, most, step, start)[1] if most else jnp.zeros(mask.shape, jnp.int32)


def _shift(x: jax.Array, down: int, right: int) -> jax.Array:
    """x [B,H,W] moved by so many pixels; what comes in is 0 or False."""
    pads = [(0, 0, 0), (down, -down, 0), (right, -right, 0)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), pads)


def _near(
    ours: jax.Array, theirs: jax.Array, reach: jax.Array, most: int, num_classes: int
) -> tuple[jax.Array, jax.Array]:
    """Whether each marked pixel of one has the same mark of the other near, bool [B,H,W] twice.

    ours, theirs: marks [B,H,W], -1 = none. reach: int32 [B,1,1], the largest squared
    distance, at most `most`. The classes are bits of a word, 32 in each, so that all spread at
    once.
    """

    def look(word: jax.Array, found: tuple) -> tuple:
        mine, other = (_bits(marks, word, num_classes) for marks in (ours, theirs))
        return (
            found[0] | (mine & _spread(other, reach, most) != 0),
            found[1] | (other & _spread(mine, reach, most) != 0),
        )

    nothing = jnp.zeros(ours.shape, bool)
    return jax.lax.fori_loop(0, -(-num_classes // 32), look, (nothing, nothing))


def _bits(marks: jax.Array, word: jax.Array, num_classes: int) -> jax.Array:
    """uint32 [B,H,W]: bit k where marks [B,H,W] are class 32 word + k."""
    bit = marks - 32 * word
    held = (bit >= 0) & (bit < 32) & (marks < num_classes)
    return jnp.where(held, jnp.uint32(1) << jnp.where(held, bit, 0).astype(jnp.uint32), 0)


def _spread(x: jax.Array, reach: jax.Array, most: int) -> jax.Array:
    """The union of uint32 [B,H,W] over the disk around each pixel, of squared radius `reach`.

    A disk is a pile of rectangles 2w + 1 wide and 2h + 1 high, whose corners (w, h) are the steps
    of a walk along its rim, from (0, radius) to (radius, 0). On the way, `wide` holds x spread by w
    to either side, and `out` the rectangles so far, that have yet to spread by h up and down. So
    the disk takes about 4 radii of shifts by a pixel, whatever the classes.
    """

    def step(_: int, state: tuple) -> tuple:
        wide, out, w, h = state
        fits = (w + 1) ** 2 + h**2 <= reach
        wider = wide | _shift(wide, 0, 1) | _shift(wide, 0, -1)
        higher = out | _shift(out, 1, 0) | _shift(out, -1, 0)
        wide = jnp.where(fits, wider, wide)
        out = jnp.where(fits, out | wider, jnp.where(h > 0, higher, out))
        return wide, out, w + fits, jnp.where(fits, h, jnp.maximum(h - 1, 0))

    radius = jnp.sqrt(reach.astype(jnp.float32)).astype(jnp.int32)  # exact: far below 2^24
    start = (x, x, jnp.zeros_like(radius), radius)
    return jax.lax.fori_loop(0, 2 * math.isqrt(most), step, start)[1]


def _per_class(
    items: list[tuple[jax.Array, jax.Array]],
    num_classes: int,
    group: jax.Array | int = 0,
    groups: int = 1,
) -> jax.Array:
    """int32 [B,n,K] of n pairs (mask, classes) [B,H,W], or [B,n,groups,K] by `group` [B,H,W]."""

    def count(mask: jax.Array, classes: jax.Array) -> jax.Array:
        kept = mask & (group < groups) & (classes >= 0) & (classes < num_classes)
        return metrics.histograms(group * num_classes + classes, kept, groups * num_classes)

    table = jnp.stack([count(*item) for item in items], axis=1)
    return table if groups == 1 else table.reshape(*table.shape[:2], groups, num_classes)


def scores(bands: np.ndarray, rings: np.ndarray) -> dict:
    """Boundary IoU of each class and their mean, and the trimap's mIoU at each width of TRIMAP.

    bands [3,K] and rings [3,W,K]: the sums over all images. None where nothing is counted.
    """
    both, truth, predicted = np.asarray(bands, np.float64)
    iou = metrics.ratios(both, truth + predicted - both)
    trimap = []
    for hit, true, found in np.cumsum(np.asarray(rings, np.float64), axis=1).swapaxes(0, 1):
        trimap.append(metrics.mean(metrics.ratios(hit, true + found - hit)))
    return {"mBoundaryIoU": metrics.mean(iou), "boundary_IoU": iou, "trimap": trimap}


def image_f1(contours: np.ndarray) -> float | None:
    """SegNet's BF of one image, from its contours [4,K]; None where the truth has no contour."""
    matched, predicted, matched_truth, truth = np.asarray(contours, np.float64)
    precision, recall = metrics.ratios(matched, predicted), metrics.ratios(matched_truth, truth)
    values = []
    for p, r in zip(precision, recall, strict=True):
        if r is not None:
            values.append(2 * p * r / (p + r) if p and r else 0.0)
    return metrics.mean(values)
