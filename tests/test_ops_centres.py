"""Centres, offsets and grouping against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.ops import centres

SIZE = (24, 33)


def discs(points, radii, size=SIZE):
    """uint8 [n,H,W]."""
    y, x = np.mgrid[: size[0], : size[1]]
    return np.stack(
        [(y - p) ** 2 + (x - q) ** 2 <= r * r for (p, q), r in zip(points, radii, strict=True)]
    ).astype(np.uint8)


def reference_targets(masks, there, sigma):
    """One image; loops over objects and pixels."""
    heat, offset = np.zeros(masks.shape[1:]), np.zeros((*masks.shape[1:], 2))
    owner = np.full(masks.shape[1:], -1)
    for n in reversed(range(len(masks))):
        pixels = np.argwhere(masks[n])
        if not there[n] or not len(pixels):
            continue
        centre = pixels.mean(0)
        for at in np.ndindex(heat.shape):
            away = np.array(at) - np.round(centre)
            if np.abs(away).max() <= 3 * sigma + 1:
                heat[at] = max(heat[at], np.exp(-(away**2).sum() / (2 * sigma**2)))
        for at in map(tuple, pixels):
            owner[at], offset[at] = n, centre - at
    return heat, offset, owner


@pytest.mark.parametrize("sigma", [2.0, 8.0])
def test_targets_against_loops(sigma):
    """Objects that touch, overlap and leave the image, an empty mask and slots that are not there;
    in the second image no object at all."""
    points = [(5, 5), (8, 12), (20, 32), (12, 20), (15, 8)]
    masks = np.stack([discs(points, (4, 5, 6, 3.5, 2)), np.zeros((5, *SIZE), np.uint8)])
    masks[0, 4] = 0
    there = np.array([[True, True, True, False, True], [True] * 5])
    heat, offset, owner, area = jax.jit(centres.targets, static_argnums=2)(masks, there, sigma)
    for b in range(2):
        wants = reference_targets(masks[b], there[b], sigma)
        for have, want in zip((heat[b], offset[b], owner[b]), wants, strict=True):
            np.testing.assert_allclose(have, want, atol=2e-5)
    np.testing.assert_array_equal(area, masks.sum((2, 3)) * there)
    assert heat[0].max() == 1 and not heat[1].any() and (np.asarray(owner[1]) == -1).all()


def reference_peaks(heat, window, threshold, count):
    found, reach = [], window // 2
    for y, x in np.ndindex(heat.shape):
        near = heat[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
        if heat[y, x] > threshold and heat[y, x] == near.max():
            found.append((-heat[y, x], y, x))
    return [(y, x, -score) for score, y, x in sorted(found)[:count]]


@pytest.mark.parametrize(("window", "count"), [(3, 40), (7, 5), (7, 1000)])
def test_peaks_against_loops(window, count):
    """Fewer slots than peaks, more slots than pixels, ties."""
    heat = np.random.default_rng(0).uniform(-0.2, 1, (2, *SIZE)).astype(np.float32)
    heat[1] = np.round(heat[1], 1)
    points, scores = jax.jit(centres.peaks, static_argnums=(1, 2, 3))(heat, window, 0.1, count)
    assert points.shape == (2, count, 2) and scores.shape == (2, count)
    for b in range(2):
        want = reference_peaks(heat[b], window, 0.1, count)
        have = np.concatenate([points[b], scores[b][:, None]], axis=1)
        np.testing.assert_array_equal(have[: len(want)], np.array(want, np.float32))
        assert not np.asarray(scores[b])[len(want) :].any()


def test_pixels_join_the_centre_that_they_point_to():
    """One image with 6 centres, one with 2, one with none; random offsets, against loops."""
    rng = np.random.default_rng(0)
    offset = rng.normal(0, 6, (3, *SIZE, 2)).astype(np.float32)
    points = rng.integers(0, 24, (3, 6, 2)).astype(np.int32)
    there = np.arange(6) < np.array([6, 2, 0])[:, None]
    owner = np.asarray(jax.jit(centres.group)(offset, points, there))
    for b, y, x in np.ndindex(owner.shape):
        at = np.array([y, x]) + offset[b, y, x].astype(np.float64)
        distances = ((points[b][there[b]] - at) ** 2).sum(1)
        assert owner[b, y, x] == (distances.argmin() if len(distances) else -1)


@pytest.mark.slow
def test_two_discs_are_told_apart_by_their_own_targets():
    masks = discs([(8, 9), (10, 22)], (6, 7))[None]
    heat, offset, owner, _ = centres.targets(masks, np.ones((1, 2), bool), 4.0)
    points, scores = centres.peaks(heat, 7, 0.1, 20)
    assert (np.asarray(scores) > 0).sum() == 2
    found = np.where(np.asarray(owner) >= 0, centres.group(offset, points, scores > 0), -1)
    ours, truth = (np.asarray(found) == 0).sum(), np.asarray(owner)
    assert ours in ((truth == 0).sum(), (truth == 1).sum())
    assert len({(a, b) for a, b in zip(found.ravel(), truth.ravel(), strict=True)}) == 3


def reference_merge(semantic, owner, classes, is_thing):
    out = np.full(semantic.shape, 255_000)
    for at in np.ndindex(semantic.shape):
        if owner[at] >= 0:
            out[at] = classes[owner[at]] * 1000 + owner[at] + 1
        elif not is_thing[semantic[at]]:
            out[at] = semantic[at] * 1000
    return out


@pytest.mark.parametrize("things", [(1, 3), (), (0, 1, 2, 3)])
def test_votes_means_and_merging_against_loops(things):
    """Also without any thing, and without any stuff."""
    rng = np.random.default_rng(0)
    semantic = rng.integers(0, 4, (2, *SIZE)).astype(np.int32)
    semantic[:, :9] = 0
    is_thing = np.isin(np.arange(4), things)
    owner = np.where(is_thing[semantic], rng.integers(-1, 3, semantic.shape), -1).astype(np.int32)
    values = rng.random(semantic.shape).astype(np.float32)
    counts = np.asarray(centres.votes(owner, semantic, 4, 4))
    means = np.asarray(centres.means(values, owner, 4))
    for b, m, k in np.ndindex(counts.shape):
        assert counts[b, m, k] == ((owner[b] == m) & (semantic[b] == k)).sum()
        chosen = values[b][owner[b] == m].astype(np.float64)
        np.testing.assert_allclose(means[b, m], chosen.mean() if len(chosen) else 0, rtol=1e-5)
    classes = counts.argmax(-1).astype(np.int32)
    have = centres.merge(semantic, owner, classes, jnp.asarray(is_thing))
    assert have.dtype == jnp.int32
    for b in range(2):
        want = reference_merge(semantic[b], owner[b], classes[b], is_thing)
        np.testing.assert_array_equal(have[b], want)
