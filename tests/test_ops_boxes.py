"""Boxes against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.ops import boxes as ops

SIZE = (40, 60)


def draw(rng, count):
    """Boxes inside and across the border, large and small; a few without area."""
    low = rng.uniform(-10, 50, (count, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.5, 30, (count, 2))], axis=1)
    boxes[: count // 8, 3] = boxes[: count // 8, 1]
    return boxes.astype(np.float32)


def area(box):
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def iou(a, b):
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    both = area([*low, *high])
    union = area(a) + area(b) - both
    return both / union if union > 0 else 0.0


def ious(a, b):
    return np.array([[iou(p, q) for q in b.astype(float)] for p in a.astype(float)])


def test_overlap_against_loops():
    rng = np.random.default_rng(0)
    a, b = draw(rng, 16), draw(rng, 24)
    np.testing.assert_allclose(ops.iou(a, b), ious(a, b), atol=1e-6)
    assert ops.iou(a[:1], a[:1])[0, 0] == 0  # a side of 0: nothing overlaps itself
    np.testing.assert_allclose(ops.area(a), [area(x) for x in a], rtol=1e-6)
    backwards = np.array([5.0, 5, 2, 2])
    assert ops.area(backwards) == 0
    clipped = np.asarray(ops.clip(a, SIZE))
    assert clipped.min() >= 0 and (clipped[:, 2:] <= SIZE).all()
    inside = (a[:, :2] >= 0).all(1) & (a[:, 2:] <= SIZE).all(1)
    np.testing.assert_array_equal(clipped[inside], a[inside])


def test_codes_against_the_formula_and_back():
    rng = np.random.default_rng(1)
    boxes, anchors = draw(rng, 40)[5:], draw(rng, 40)[5:]
    weights = (10.0, 10.0, 5.0, 5.0)
    got = np.asarray(ops.encode(boxes, anchors, weights))
    for (y0, x0, y1, x1), (a0, b0, a1, b1), code in zip(boxes, anchors, got, strict=True):
        wanted = [
            10 * ((x0 + x1) / 2 - (b0 + b1) / 2) / (b1 - b0),
            10 * ((y0 + y1) / 2 - (a0 + a1) / 2) / (a1 - a0),
            5 * np.log((x1 - x0) / (b1 - b0)),
            5 * np.log((y1 - y0) / (a1 - a0)),
        ]
        np.testing.assert_allclose(code, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ops.decode(got, anchors, weights), boxes, atol=1e-3)


def test_degenerate_boxes_have_finite_codes_and_large_codes_finite_boxes():
    flat = np.array([[3.0, 3, 3, 9]], np.float32)
    assert np.isfinite(ops.encode(flat, flat)).all()
    assert np.isfinite(jax.grad(lambda x: ops.encode(x, flat).sum())(flat)).all()
    grown = ops.decode(np.full((1, 4), 1e4, np.float32), np.array([[0.0, 0, 8, 8]]))
    np.testing.assert_allclose(ops.sides(grown), [[500, 500]], rtol=1e-4)


@pytest.mark.parametrize("rounded", [False, True])
def test_anchors_have_their_area_ratio_and_place(rounded):
    ratios = (0.5, 1.0, 2.0)
    found = ops.grid_anchors((3, 2), (8, 9), 32, ratios, rounded).reshape(3, 2, 3, 4)
    for y, x, k in np.ndindex(3, 2, 3):
        y0, x0, y1, x1 = found[y, x, k]
        assert ((y0 + y1) / 2, (x0 + x1) / 2) == (8 * y, 9 * x)
        if not rounded:
            np.testing.assert_allclose((y1 - y0) * (x1 - x0), 32**2, rtol=1e-5)
            np.testing.assert_allclose((y1 - y0) / (x1 - x0), ratios[k], rtol=1e-5)
    if rounded:  # torchvision's: 45.25 x 22.63 -> -23, -11, 23, 11 (x first)
        np.testing.assert_array_equal(found[0, 0, 0], [-11, -23, 11, 23])


def reference_match(truth, there, boxes, high, low, best_too):
    overlap = ious(truth, boxes)
    best = overlap.max(1) if len(boxes) else None
    result = []
    for a in range(len(boxes)):
        mine = [overlap[n, a] if there[n] else -1 for n in range(len(truth))]
        index, most = int(np.argmax(mine)), max(mine)
        best_of = any(
            there[n] and best[n] > 0 and abs(overlap[n, a] - best[n]) < 1e-9
            for n in range(len(truth))
        )
        positive = most >= high or (best_too and best_of)
        result.append((index, positive, most < low and not positive))
    return map(np.array, zip(*result, strict=True))


@pytest.mark.parametrize("best_too", [False, True])
def test_matching_against_loops(best_too):
    rng = np.random.default_rng(2)
    truth, boxes = draw(rng, 10)[2:], draw(rng, 60)
    boxes[3:5] = truth[1]  # two that tie for the best
    there = np.array([True, True, False, True, True, False, True, True])
    got = jax.jit(ops.match, static_argnums=(3, 4, 5))(truth, there, boxes, 0.5, 0.3, best_too)
    wanted = reference_match(truth, there, boxes, 0.5, 0.3, best_too)
    for have, want in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(have, want)
    assert got[1].sum() > 2 and got[2].sum() > 10 and not (got[1] & got[2]).any()


def test_without_a_true_box_all_is_background():
    boxes = draw(np.random.default_rng(3), 20)
    for truth, there in ((boxes[:3], np.zeros(3, bool)), (boxes[:0], np.zeros(0, bool))):
        index, positive, negative = ops.match(truth, there, boxes, 0.7, 0.3, best_too=True)
        assert not positive.any() and negative.all() and not index.any()
    far = np.array([[1000.0, 1000, 1010, 1010]], np.float32)  # overlaps none: not the best of any
    _, positive, negative = ops.match(far, np.ones(1, bool), boxes, 0.7, 0.3, best_too=True)
    assert not positive.any() and negative.all()


@pytest.mark.parametrize(
    ("positives", "negatives", "wanted"),
    [(40, 50, (8, 8)), (3, 50, (3, 13)), (40, 2, (8, 2)), (0, 0, (0, 0)), (0, 90, (0, 16))],
)
def test_a_sample_holds_the_share_and_is_filled_with_negatives(positives, negatives, wanted):
    kind = np.zeros(100, int)
    kind[:positives], kind[100 - negatives :] = 1, -1
    run = jax.jit(ops.sample, static_argnums=(3, 4))
    drawn = set()
    for seed in range(3):
        place, positive, counts = map(
            np.asarray, run(jax.random.key(seed), kind == 1, kind == -1, 16, 0.5)
        )
        assert (positive.sum(), (counts & ~positive).sum()) == wanted
        assert (kind[place[positive]] == 1).all() and (kind[place[counts & ~positive]] == -1).all()
        assert len(set(place[counts])) == counts.sum()  # none twice
        assert not positive[positive.sum() :].any() and not (positive & ~counts).any()
        drawn |= set(place[counts])
    assert len(drawn) > sum(wanted) or not sum(wanted) or negatives == 2


def test_a_sample_larger_than_what_there_is():
    place, positive, counts = ops.sample(
        jax.random.key(0), np.array([True, False]), np.array([False, True]), 8, 0.5
    )
    assert place.shape == (8,) and positive.sum() == 1 and counts.sum() == 2


def reference_nms(boxes, scores, threshold, group):
    stays = []
    for i in np.argsort(-scores, kind="stable"):
        same = [j for j in stays if group[j] == group[i]]
        if scores[i] > -np.inf and all(iou(boxes[i], boxes[j]) <= threshold for j in same):
            stays.append(i)
    return np.isin(np.arange(len(boxes)), stays)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("groups", [1, 3])
def test_suppression_against_loops(threshold, groups):
    run = jax.jit(ops.nms)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        boxes, scores = draw(rng, 60), rng.random(60).astype(np.float32)
        scores[:6], scores[10:13] = -np.inf, 0.5  # not there; equal ones
        group = rng.integers(0, groups, 60)
        got = run(boxes, scores, threshold, group)
        np.testing.assert_array_equal(got, reference_nms(boxes, scores, threshold, group))


def test_a_chain_of_overlaps_is_resolved_to_its_end():
    """Each suppresses the next, if it stays: every other one does."""
    left = np.arange(50.0) * 4
    boxes = np.stack([0 * left, left, 0 * left + 10, left + 10], axis=1).astype(np.float32)
    stays = jax.jit(ops.nms)(boxes, -np.arange(50.0, dtype=np.float32), 0.3)
    np.testing.assert_array_equal(stays, np.arange(50) % 2 == 0)


def test_nothing_to_suppress():
    boxes = np.zeros((3, 4), np.float32)
    assert not ops.nms(boxes, np.full(3, -np.inf, np.float32), 0.5).any()
    assert ops.nms(boxes, np.ones(3, np.float32), 0.5).all()  # empty boxes overlap nothing


def test_the_top_of_fewer_has_empty_slots():
    value, place = ops.top(jnp.array([1.0, 3.0, -jnp.inf]), 5)
    assert value.tolist() == [3, 1] + [-np.inf] * 3 and place.tolist()[:2] == [1, 0]
    assert ops.top(jnp.array([1.0, 3.0]), 1)[1].tolist() == [1]
