"""Panoptic quality against loops over pairs of masks, with void, crowds and ties."""

import numpy as np
import pytest

from jaxseg.data import results
from jaxseg.ops import panoptic_quality as pq

K, THINGS = 4, (1, 2)


def _brute(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[K,4] as `counts`, by sets of pixels."""
    pixels = {}
    for kind, panoptic in (("found", found), ("truth", truth)):
        for place, value in np.ndenumerate(panoptic):
            pixels.setdefault((kind, int(value)), set()).add(place)
    void = pixels.get(("truth", pq.VOID), set())
    guesses = {v: p for (kind, v), p in pixels.items() if kind == "found" and v != pq.VOID}
    truths = {v: p for (kind, v), p in pixels.items() if kind == "truth" and v != pq.VOID}
    crowds = {v: p for v, p in truths.items() if v // 1000 in THINGS and v % 1000 == 0}
    total, missed = np.zeros((K, 4)), set(truths) - set(crowds)
    for value, mine in guesses.items():
        c, right = value // 1000, False
        for other, theirs in truths.items():
            if other // 1000 == c and other not in crowds:
                common = len(mine & theirs)
                iou = common / len((mine | theirs) - (void - theirs))
                if iou > 0.5:
                    total[c] += (iou, 1, 0, 0)
                    missed.remove(other)
                    right = True
        excused = len(mine & void) + len(mine & crowds.get(c * 1000, set()))
        if not right and 2 * excused <= len(mine):
            total[c, 2] += 1
    for value in missed:
        total[value // 1000, 3] += 1
    return total


def _map(rng) -> np.ndarray:
    """Rectangles of stuff, things, crowds and void, 6x8."""
    values = [0, 3000, 1000, 1001, 1002, 2001, 2000, pq.VOID]
    panoptic = np.full((6, 8), rng.choice(values), np.int32)
    for _ in range(rng.integers(0, 5)):
        y, x = rng.integers(0, 6), rng.integers(0, 8)
        panoptic[y : y + rng.integers(1, 5), x : x + rng.integers(1, 6)] = rng.choice(values)
    return panoptic


def test_five_hundred_random_cases_are_those_of_brute_force():
    matched = ties = 0
    for seed in range(500):
        rng = np.random.default_rng(seed)
        truth = _map(rng)
        found = np.where(rng.random(truth.shape) < rng.choice([0, 0.1, 1]), _map(rng), truth)
        if seed % 5 == 0:  # a segment cut in two halves, each of IoU 0.5
            found = np.where((truth == 1001) & (np.arange(8) % 2 == 0), 1009, truth)
        expected = _brute(found, truth)
        np.testing.assert_allclose(pq.counts(found, truth, THINGS, K), expected, rtol=1e-12)
        matched += expected[:, 1].sum()
        ties += (found == 1009).sum() * 2 == (truth == 1001).sum() > 0
    assert matched > 500 and ties > 10


def test_a_perfect_map_scores_one_and_absent_classes_are_in_no_mean():
    truth = np.repeat(np.int32([[0, 1001, 1002, pq.VOID, 1000]]), 4, axis=0)
    excused = np.where(truth == pq.VOID, 1001, np.where(truth == 1000, 1003, truth))
    perfect = pq.scores(pq.counts(truth, truth, THINGS, K), THINGS)
    assert perfect["PQ"] == perfect["SQ"] == perfect["RQ"] == perfect["PQ_things"] == 1
    assert perfect["class_PQ"] == [1, 1, None, None] and perfect["PQ_stuff"] == 1
    assert pq.scores(pq.counts(excused, truth, THINGS, K), THINGS)["PQ"] == 1
    wrong = np.where(truth == 1000, 2001, truth)  # another class than the crowd's
    assert pq.counts(wrong, truth, THINGS, K)[:, 2:].tolist() == [[0, 0], [0, 0], [1, 0], [0, 0]]


def test_a_half_is_no_match_and_predicted_void_is_no_segment():
    truth = np.int32([[1001, 1001, 0, 0]])
    found = np.int32([[1001, pq.VOID, 0, 0]])
    result = pq.scores(pq.counts(found, truth, THINGS, K), THINGS)
    assert result["class_PQ"] == [1, 0, None, None] and result["class_SQ"] == [1, 0, None, None]
    assert result["PQ"] == 0.5 and result["PQ_stuff"] == 1 and result["PQ_things"] == 0


def test_nothing_at_all_has_no_score():
    void = np.full((3, 3), pq.VOID, np.int32)
    result = pq.scores(pq.counts(void, void, THINGS, K), THINGS)
    assert result["PQ"] is None and result["class_PQ"] == [None] * K


@pytest.mark.parametrize("name", ["STEP", "VOID"])
def test_maps_are_numbered_alike_everywhere(name):
    assert getattr(results, name) == getattr(pq, name)
