"""RoIAlign, its gradient, masks cut out and put back, against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.ops import roi

STRIDES = [4, 8]
SHAPES = [(12, 16), (6, 8)]  # of an image of 48 x 64 pixels
BOXES = np.array(
    [
        [3.3, 5.1, 30.2, 47.9],
        [0, 0, 48, 64],  # the whole image
        [-9, -20, 12, 8],  # beyond the border, more than a cell
        [40, 50, 70, 90],
        [10, 10, 10.4, 10.2],  # smaller than a cell
        [20, 20, 20, 20],  # a point
        [100, 100, 120, 130],  # outside
        [1.5, 2.5, 47, 9],
    ],
    np.float32,
)
LEVEL = np.array([0, 1, 0, 1, 0, 1, 0, 1], np.int32)


def maps(channels=3):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(*shape, channels)).astype(np.float32) for shape in SHAPES]


def point(x, at):
    """Bilinear; beyond the map by more than a cell 0, else the border. [C]."""
    shape = np.array(x.shape[:2])
    if (np.array(at) < -1).any() or (np.array(at) > shape).any():
        return np.zeros(x.shape[2])
    at = np.clip(at, 0, shape - 1)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, shape - 1)
    (p, q), result = at - low, 0
    for i, u in ((low[0], 1 - p), (high[0], p)):
        for j, v in ((low[1], 1 - q), (high[1], q)):
            result = result + u * v * x[i, j].astype(float)
    return result


def reference(levels, strides, boxes, level, size, samples, aligned):
    out = np.zeros((len(boxes), size, size, levels[0].shape[2]))
    for r, p, q in np.ndindex(out.shape[:3]):
        box = boxes[r].astype(float) / strides[level[r]] - (0.5 if aligned else 0)
        side = box[2:] - box[:2]
        side = side if aligned else np.maximum(side, 1)
        for i, j in np.ndindex(samples, samples):
            part = np.array([p + (i + 0.5) / samples, q + (j + 0.5) / samples]) / size
            out[r, p, q] += point(levels[level[r]], box[:2] + part * side) / samples**2
    return out


@pytest.fixture(params=["gathered", "by products"])
def form(request, monkeypatch):
    monkeypatch.setattr(roi, "SMALL", 0 if request.param == "gathered" else 10**9)


@pytest.mark.parametrize(("aligned", "samples"), [(True, 2), (False, 2), (True, 1)])
def test_against_loops(form, aligned, samples):
    got = jax.jit(lambda x: roi.roi_align(x, STRIDES, BOXES, LEVEL, 3, samples, aligned))(maps())
    wanted = reference(maps(), STRIDES, BOXES, LEVEL, 3, samples, aligned)
    np.testing.assert_allclose(got, wanted, atol=2e-5)
    assert not np.asarray(got[6]).any()  # the box outside


@pytest.mark.slow
def test_gradient(form):
    """It is linear in the features: the gradient of each is its weight in the sum."""
    g = np.random.default_rng(1).normal(size=(len(BOXES), 2, 2, 1))

    def total(levels):
        return (roi.roi_align(levels, STRIDES, BOXES, LEVEL, 2) * g).sum()

    got = jax.jit(jax.grad(total))(maps(1))
    for k, shape in enumerate(SHAPES):
        for at in ((0, 0), (2, 3), (5, 7), (shape[0] - 1, shape[1] - 1)):
            unit = [np.zeros((*s, 1), np.float32) for s in SHAPES]
            unit[k][at] = 1
            wanted = (reference(unit, STRIDES, BOXES, LEVEL, 2, 2, True) * g).sum()
            np.testing.assert_allclose(got[k][at][0], wanted, atol=1e-5)
    assert not any(
        np.asarray(
            jax.grad(lambda b: roi.roi_align(maps(), STRIDES, b, LEVEL, 2).sum())(BOXES)
        ).ravel()
    )


@pytest.mark.slow
def test_a_ramp_stays_a_ramp(form):
    """Values that say their own pixel: aligned, a bin's is the pixel at its centre."""
    ramp = np.arange(16.0, dtype=np.float32)[None, :, None] * 4 + 2 + np.zeros((12, 16, 1))
    box = np.array([[8.0, 9, 36, 51]], np.float32)
    x = roi.roi_align([ramp.astype(np.float32)], [4], box, np.zeros(1, np.int32), 7)
    np.testing.assert_allclose(x[0, 3, :, 0], 9 + 6 * (np.arange(7) + 0.5), rtol=1e-5)


def test_levels_of_the_pyramid():
    sides = np.array([1, 111, 113, 223, 224, 447, 449, 5000.0])
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], axis=1).astype(np.float32)
    assert roi.level_of(boxes).tolist() == [2, 2, 3, 3, 4, 4, 5, 5]
    assert roi.level_of(boxes, canonical=112.0).tolist() == [2, 3, 4, 4, 5, 5, 5, 5]
    assert roi.level_of(np.array([[5.0, 5, 5, 90]], np.float32)).tolist() == [2]  # no area


def test_masks_are_cut_out_as_features_are():
    rng = np.random.default_rng(2)
    masks = (rng.random((4, 20, 30)) < 0.5).astype(np.uint8)
    boxes = np.array([[2, 3, 17, 28], [-5, -5, 9, 9], [0, 0, 20, 30]], np.float32)
    index = np.array([3, 0, 1], np.int32)
    for aligned in (True, False):
        got = roi.crop_masks(masks, index, boxes, 5, 2, aligned)
        stack = masks[index].transpose(1, 2, 0)
        wanted = reference([stack], [1], boxes, [0, 0, 0], 5, 2, aligned)
        np.testing.assert_allclose(got, [wanted[k, ..., k] for k in range(3)], atol=1e-5)


def test_a_mask_cut_out_and_put_back_is_itself():
    mask = np.zeros((1, 40, 50), np.uint8)
    mask[0, 10:30, 12:40] = 1
    mask[0, 15:20, 12:20] = 0
    box = np.array([[10.0, 12, 30, 40]], np.float32)
    small = roi.crop_masks(mask, np.zeros(1, np.int32), box, 28)
    back = np.asarray(roi.paste(small, box, (40, 50), whole=False)) >= 0.5
    assert (back == mask).mean() > 0.998
    outside = mask == 0
    assert not back[outside][np.arange(50)].any()


@pytest.mark.parametrize("whole", [True, False])
def test_pasting_against_loops(whole):
    rng = np.random.default_rng(3)
    masks = rng.random((5, 6, 6)).astype(np.float32)
    boxes = np.array(
        [[3.2, 4.7, 15.9, 20.1], [-6.3, -2, 8, 9.5], [14, 20, 40, 60], [5, 5, 5.2, 5.3], [0] * 4],
        np.float32,
    )
    got = np.asarray(roi.paste(masks, boxes, (18, 25), whole))
    for mask, box, image in zip(masks.astype(float), boxes.astype(float), got, strict=True):
        (y0, x0, y1, x1), n = box, 6
        if whole:
            mask, n = np.pad(mask, 1), 8
            cy, cx, h, w = (y0 + y1) / 2, (x0 + x1) / 2, (y1 - y0) * 4 / 6, (x1 - x0) * 4 / 6
            y0, x0, y1, x1 = (int(v) for v in (cy - h, cx - w, cy + h, cx + w))
            y1, x1 = y1 + 1, x1 + 1
        for y, x in np.ndindex(image.shape):
            v = (y + 0.5 - y0) / max(y1 - y0, 1e-6) * n - 0.5
            u = (x + 0.5 - x0) / max(x1 - x0, 1e-6) * n - 0.5
            if whole:
                inside = y0 <= y < y1 and x0 <= x < x1
                wanted = point(mask[..., None], np.clip([v, u], 0, n - 1))[0] if inside else 0
            else:
                ring = np.pad(mask, 1)[..., None]
                near = -1 < v < n and -1 < u < n
                wanted = point(ring, [v + 1, u + 1])[0] if near else 0
            np.testing.assert_allclose(image[y, x], wanted, atol=1e-4)


@pytest.mark.slow
def test_bfloat16_features():
    levels = [jnp.asarray(x, jnp.bfloat16) for x in maps()]
    x = roi.roi_align(levels, STRIDES, BOXES, LEVEL, 3)
    assert x.dtype == jnp.bfloat16
    exact = roi.roi_align(maps(), STRIDES, BOXES, LEVEL, 3)
    np.testing.assert_allclose(np.asarray(x, np.float32), exact, atol=0.06)
