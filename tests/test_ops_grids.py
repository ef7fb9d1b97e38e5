"""SOLO's grids against loops on random objects, and the slots of positives."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.ops.grids import assign, choose, coordinates, mass_centres, own, shrink

SIZE = (64, 96)


def random_objects(seed, count=12):
    """(masks uint8 [N,H,W], boxes [N,4]): blobs of many sizes, some at the edge."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    centre, radius = rng.uniform(0, SIZE, (count, 2)), rng.uniform(1.5, 30, (count, 2))
    distance = [
        ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2
        for (cy, cx), (ry, rx) in zip(centre, radius, strict=True)
    ]
    masks = (np.array(distance) < 1) & (rng.random((count, *SIZE)) < 0.9)
    masks[:, 30, 40] = True  # none is empty, the centre of mass is moved
    boxes = np.zeros((count, 4), np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box[:] = rows[0], cols[0], rows[-1] + 1, cols[-1] + 1
    return masks.astype(np.uint8), boxes


def brute_force(masks, boxes, counted, grid, scales, centre):
    """(owner [S,S], pairs of objects and cells), in the plainest words of the paper."""
    owner, pairs = np.full((grid, grid), -1), set()
    for n, (mask, box) in enumerate(zip(masks, boxes, strict=True)):
        height, width = box[2] - box[0], box[3] - box[1]
        if not counted[n] or not scales[0] <= math.sqrt(height * width) <= scales[1]:
            continue
        mean = np.argwhere(mask).mean(0)
        ranges = []
        for axis, (side, length) in enumerate(zip((height, width), SIZE, strict=True)):
            middle, low, high = (
                math.floor((mean[axis] + d * centre * side / 2) * grid / length) for d in (0, -1, 1)
            )
            first, last = max(low, middle - 1, 0), min(high, middle + 1, grid - 1)
            ranges.append(range(first, last + 1))
        for i in ranges[0]:
            for j in ranges[1]:
                owner[i, j] = n
                pairs.add((n, i * grid + j))
    return owner, pairs


@pytest.mark.parametrize(
    ("grid", "scales", "centre"), [(40, (1, 30), 0.2), (12, (20, 60), 0.2), (9, (1, 200), 1.0)]
)
def test_assignment_against_loops(grid, scales, centre):
    data = [random_objects(seed) for seed in range(3)]
    masks, boxes = (np.stack(x) for x in zip(*data, strict=True))
    counted = np.random.default_rng(9).random(boxes.shape[:2]) < 0.8

    @jax.jit
    def run(masks, boxes, counted):
        owner, cells, positive = assign(
            mass_centres(masks), boxes, counted, grid, scales, SIZE, centre
        )
        return owner, cells, positive, own(owner, cells, positive)

    for b, (owner, cells, positive, kept) in enumerate(
        zip(*run(masks, boxes, counted), strict=True)
    ):
        expected, pairs = brute_force(masks[b], boxes[b], counted[b], grid, scales, centre)
        np.testing.assert_array_equal(owner, expected)
        n, k = np.nonzero(positive)
        got = list(zip(n.tolist(), np.asarray(cells)[n, k].tolist(), strict=True))
        assert len(got) == len(set(got)) and set(got) == pairs
        n, k = np.nonzero(kept)
        got = set(zip(n.tolist(), np.asarray(cells)[n, k].tolist(), strict=True))
        assert got == {(int(n), c) for c, n in enumerate(expected.ravel()) if n >= 0}
        assert len(pairs) > 4


@pytest.mark.slow
def test_an_object_outside_every_range_and_no_objects_give_no_cell():
    masks, boxes = random_objects(0, 2)
    centres = mass_centres(masks)[None]
    counted = np.ones((1, 2), bool)
    for scales, flags in (((200, 300), counted), ((1, 100), ~counted)):
        owner, _, positive = assign(centres, boxes[None], flags, 6, scales, SIZE)
        assert (owner == -1).all() and not positive.any()


def test_the_centre_of_nothing_is_finite():
    assert mass_centres(np.zeros((2, 4, 5), np.uint8)).tolist() == [[0, 0], [0, 0]]


def test_slots_take_all_while_they_last_and_then_thin_evenly():
    flags = np.zeros((4, 20), bool)
    flags[0, [3, 7, 19]] = True
    flags[1, :] = True
    flags[2, 5:13] = True
    places, used = jax.jit(choose, static_argnums=1)(flags, 5)
    assert used.tolist() == [[True] * 3 + [False] * 2, [True] * 5, [True] * 5, [False] * 5]
    assert places[0, :3].tolist() == [3, 7, 19]
    assert places[1].tolist() == [0, 4, 8, 12, 16]
    assert places[2].tolist() == [5, 6, 8, 9, 11]  # ranks 0, 1, 3, 4, 6 of 8
    assert (places >= 0).all() and (places < 20).all()
    more, used = choose(jnp.asarray(flags[:1]), 30)  # more slots than places
    assert more.shape == (1, 30) and used.sum() == 3


@pytest.mark.parametrize("step", [4, 8])
def test_masks_shrink_by_the_four_pixels_in_the_middle(step):
    masks = np.random.default_rng(0).integers(0, 2, (2, 3, 16, 32), np.uint8)
    got = shrink(jnp.asarray(masks), (16 // step, 32 // step))
    for i, j in np.ndindex(16 // step, 32 // step):
        top, left = step * i + step // 2 - 1, step * j + step // 2 - 1
        four = masks[:, :, top : top + 2, left : left + 2].sum((2, 3))
        np.testing.assert_array_equal(got[:, :, i, j], four >= 2)


def test_coordinates_run_from_edge_to_edge():
    xy = np.asarray(coordinates(jnp.zeros((2, 3, 5, 7))))
    assert xy.shape == (2, 3, 5, 2)
    np.testing.assert_allclose(xy[1, 0, :, 0], [-1, -0.5, 0, 0.5, 1])
    np.testing.assert_allclose(xy[0, :, 4, 1], [-1, 0, 1])
