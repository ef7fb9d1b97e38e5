"""Boxes of objects: overlap, coding, anchors, matching, sampling and non-maximum suppression.

A box is (y0, x0, y1, x1) in pixels, float32 [...,4], half open: an image of H x W pixels is
(0, 0, H, W). All shapes are static: what is not there is marked, by a mask or by a score of -inf.
The functions take one image; `jax.vmap` takes a batch.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

SMALLEST = 1e-6  # pixels: what a side without length is taken for, where it divides
LARGEST = math.log(1000 / 16)  # of a coded size, before the exponential: Detectron's clip


def area(boxes: jax.Array) -> jax.Array:
    """Pixels of boxes [...,4] -> [...]; 0 where a side is negative."""
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return sides[..., 0] * sides[..., 1]


def intersection(a: jax.Array, b: jax.Array) -> jax.Array:
    """Pixels that boxes a [N,4] and b [M,4] share: [N,M]."""
    low = jnp.maximum(a[:, None, :2], b[None, :, :2])
    high = jnp.minimum(a[:, None, 2:], b[None, :, 2:])
    return area(jnp.concatenate([low, high], axis=-1))


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union of boxes a [N,4] and b [M,4]: [N,M]; 0 between two empty ones."""
    both = intersection(a, b)
    union = area(a)[:, None] + area(b)[None] - both
    return jnp.where(union > 0, both / jnp.where(union > 0, union, 1), 0)


def clip(boxes: jax.Array, size: tuple[int, int]) -> jax.Array:
    """boxes [...,4] cut off at the border of an image of size (H, W)."""
    return jnp.clip(boxes, 0, jnp.asarray((*size, *size), boxes.dtype))


def sides(boxes: jax.Array) -> jax.Array:
    """(height, width) of boxes [...,4]: [...,2]."""
    return boxes[..., 2:] - boxes[..., :2]


def encode(
    boxes: jax.Array, anchors: jax.Array, weights: tuple[float, ...] = (1, 1, 1, 1)
) -> jax.Array:
    """Boxes [...,4] as seen from anchors [...,4]: (tx, ty, tw, th) [...,4], x before y.

    The shift of the centre in sides of the anchor, and the logarithm of the ratio of sides, each
    times its weight. Girshick et al. 2014, arXiv:1311.2524, appendix C; the weights are Fast
    R-CNN's normalisation of the targets. Sides without length count as SMALLEST.
    """
    size, own = (jnp.maximum(sides(b), SMALLEST) for b in (boxes, anchors))
    shift = (boxes[..., :2] + size / 2 - anchors[..., :2] - own / 2) / own
    code = jnp.concatenate([shift[..., ::-1], jnp.log(size / own)[..., ::-1]], axis=-1)
    return code * jnp.asarray(weights, code.dtype)


def decode(
    codes: jax.Array, anchors: jax.Array, weights: tuple[float, ...] = (1, 1, 1, 1)
) -> jax.Array:
    """The inverse of `encode`: codes and anchors [...,4] -> boxes [...,4].

    A side grows at most 62.5 times, so that an untrained network makes no infinite boxes.
    """
    codes = codes / jnp.asarray(weights, codes.dtype)
    own = sides(anchors)
    centre = anchors[..., :2] + own / 2 + codes[..., 1::-1] * own
    half = jnp.exp(jnp.minimum(codes[..., :1:-1], LARGEST)) * own / 2
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def grid_anchors(
    grid: tuple[int, int],
    stride: tuple[int, int],
    size: float,
    ratios: tuple[float, ...],
    rounded: bool = False,
) -> np.ndarray:
    """The anchors of a map of `grid` (h, w) cells: float32 [h * w * len(ratios),4], row by row.
    stride: pixels from one cell to the next, down and right.

    Each has size x size pixels of area and one of the ratios, height / width, and is centred on the
    top left corner of its cell, as the released detectors have it. rounded: halves of sides to
    whole pixels, half to even (torchvision).
    """
    root = np.sqrt(np.asarray(ratios, np.float32))
    half = np.stack([root * size, size / root], axis=-1).astype(np.float32) / 2  # [A,2]
    half = half.round() if rounded else half
    places = (np.arange(n) * s for n, s in zip(grid, stride, strict=True))
    corner = np.stack(np.meshgrid(*places, indexing="ij"), axis=-1)
    corner = corner[:, :, None].astype(np.float32)  # [h,w,1,2]
    return np.concatenate([corner - half, corner + half], axis=-1).reshape(-1, 4)


def match(
    truth: jax.Array,
    there: jax.Array,
    boxes: jax.Array,
    high: float,
    low: float,
    best_too: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which of the true boxes [N,4], those that are `there` bool [N], each of boxes [A,4] shows.

    Returns int32 [A], the true box that overlaps it most, the first of equals (0 without any); bool
    [A], positive, of IoU `high` and more; and bool [A], negative, of IoU below `low`. Those between
    are neither. best_too: the boxes that overlap a true one most of all are positive too, however
    little (Ren et al. 2015, arXiv:1506.01497, section 3.1.2), if they overlap it at all.
    """
    if not truth.shape[0]:
        none = jnp.zeros(boxes.shape[0], bool)
        return none.astype(jnp.int32), none, ~none
    overlap = jnp.where(there[:, None], iou(truth, boxes), -1)  # [N,A]
    most = overlap.max(0)
    positive = most >= high
    if best_too:
        best = overlap.max(1, keepdims=True)
        positive |= ((overlap == best) & (best > 0)).any(0)
    return overlap.argmax(0).astype(jnp.int32), positive, (most < low) & ~positive


def sample(
    rng: jax.Array, positive: jax.Array, negative: jax.Array, count: int, share: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`count` random places of positive and negative, bool [A]; at most share * count positive.

    Where positives are few, negatives take their place. Returns int32 [count] places, positive ones
    first; bool [count], whether that place is positive; and bool [count], whether it counts: fewer
    than `count` do where there are not enough.
    """
    draw = jax.random.uniform(rng, positive.shape)
    most = min(int(count * share), len(draw))
    value, place = jax.lax.top_k(jnp.where(positive, draw, -1), most)
    chosen = jnp.zeros_like(positive).at[place].set(value >= 0)
    key = jnp.where(chosen, 2 + draw, jnp.where(negative & ~positive, draw, -1))
    value, place = jax.lax.top_k(key, min(count, len(draw)))
    missing = count - len(place)
    value = jnp.pad(value, (0, missing), constant_values=-1)
    return jnp.pad(place, (0, missing)), value >= 2, value >= 0


def nms(
    boxes: jax.Array, scores: jax.Array, threshold: float, group: jax.Array | None = None
) -> jax.Array:
    """Greedy non-maximum suppression of boxes [N,4] by scores [N]: bool [N], what stays.

    From the highest score down, a box stays where no box that stayed before overlaps it by an IoU
    above `threshold`; of equal scores the first comes first. Scores of -inf stay never. group: int
    [N]; only boxes of the same group suppress each other.

    Greedy choice is the one solution of "a box stays if no better one that stays overlaps it", and
    repeating that rule for all boxes at once from any start finds it: the best box is right after
    one round, the k best are after k. Chains of overlaps are short, so few rounds do.
    """
    order = jnp.argsort(-scores, stable=True)
    boxes, there = boxes[order], scores[order] > -jnp.inf
    rank = jnp.arange(len(order))
    over = (iou(boxes, boxes) > threshold) & (rank[:, None] < rank)
    if group is not None:
        over &= group[order][:, None] == group[order]

    def repeat(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        _, stays = state
        return stays, there & ~(over & stays[:, None]).any(0)

    start = (jnp.zeros_like(there), there)
    _, stays = jax.lax.while_loop(lambda s: (s[0] != s[1]).any(), repeat, start)
    return jnp.zeros_like(there).at[order].set(stays)


def top(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` highest of scores [N], and where they are: float [count], int32 [count].

    Slots beyond N have score -inf and place 0.
    """
    value, place = jax.lax.top_k(scores, min(count, len(scores)))
    missing = (0, count - len(place))
    return jnp.pad(value, missing, constant_values=-jnp.inf), jnp.pad(place, missing)
