"""UPSNet: its panoptic head, targets and post-processing against loops; a step, edge cases."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from networks import count, randomised, trace

from jaxseg import backbones
from jaxseg.backbones.layers import Conv
from jaxseg.models import maskrcnn, upsnet
from jaxseg.ops.losses import cross_entropy

K, THINGS = 5, (1, 3)
STUFF = (0, 2, 4)


def stretched(mask, box, y, x):
    """The mask [m,m] at the pixel (y, x), bilinear, clamped to its cells."""
    cells, value = len(mask), 0.0
    at = []
    for pixel, start, end in ((y, box[0], box[2]), (x, box[1], box[3])):
        at.append(np.clip((pixel + 0.5 - start) / (end - start) * cells - 0.5, 0, cells - 1))
    for i, j in np.ndindex(mask.shape):
        value += max(0, 1 - abs(at[0] - i)) * max(0, 1 - abs(at[1] - j)) * mask[i, j]
    return value


def reference_head(semantic, boxes, masks, kinds, things, stuff):
    """[h,w,S+N+1], -1e9 in empty slots."""
    h, w, _ = semantic.shape
    count, out = len(kinds), np.zeros((h, w, len(stuff) + len(kinds) + 1))
    for y, x in np.ndindex(h, w):
        out[y, x, : len(stuff)] = [semantic[y, x, k] for k in stuff]
        seen = []
        for n, (box, mask, kind) in enumerate(zip(boxes, masks, kinds, strict=True)):
            if kind <= 0:
                out[y, x, len(stuff) + n] = -1e9
                continue
            inside = box[0] < y + 1 and y < box[2] and box[1] < x + 1 and x < box[3]
            seen.append(semantic[y, x, things[kind - 1]] if inside else 0)
            out[y, x, len(stuff) + n] = seen[-1] + (stretched(mask, box, y, x) if inside else 0)
        best = max(semantic[y, x, k] for k in things)
        out[y, x, len(stuff) + count] = best - max(seen, default=0)
    return out


def given(seed=0, h=11, w=13):
    rng = np.random.default_rng(seed)
    semantic = rng.normal(size=(h, w, K)).astype(np.float32)
    boxes = np.array([[1.3, 2.0, 6.8, 9.5], [0, 0, 4, 4], [3.2, 1.1, 13, 8], [0, 0, 0, 0]])
    return semantic, boxes.astype(np.float32), rng.normal(size=(4, 6, 6)).astype(np.float32)


@pytest.mark.parametrize("kinds", [(1, 2, 2, -1), (2, 0, 0, 0), (-1, -1, -1, 0)])
def test_the_panoptic_head_against_loops(kinds):
    """With the unknown channel: several objects, one, none."""
    have = upsnet.panoptic_logits(*given(), jnp.array(kinds), K, THINGS)
    want = reference_head(*(a.astype(np.float64) for a in given()), kinds, THINGS, STUFF)
    np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)


def test_the_panoptic_head_without_stuff():
    semantic, boxes, masks = given()
    have = upsnet.panoptic_logits(semantic, boxes, masks, jnp.array([5, 1, -1, -1]), K, ())
    every = tuple(range(K))
    want = reference_head(semantic, boxes, masks, (5, 1, -1, -1), every, ())
    assert have.shape[-1] == 4 + 1
    np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)


def test_what_is_right_of_the_panoptic_logits():
    """Stuff, a kept object, a hidden one and a crowd (unknown), void."""
    label = np.array([[[0, 2, 4, 1], [1, 3, 3, 255]]], np.int32)
    masks = np.zeros((1, 3, 2, 4), np.uint8)
    masks[0, 0, 0, 3] = masks[0, 0, 1, 0] = masks[0, 2, 1, 1] = 1
    have = upsnet.panoptic_target(label, masks, np.array([[True, False, False]]), K, THINGS)
    np.testing.assert_array_equal(have, [[[0, 1, 2, 3], [3, 6, 6, -1]]])


def test_a_share_of_the_objects_is_shown():
    there = np.array([True, False, True, True, True, False, True, True, True, True, True, True])
    for i in range(5):
        shown = np.asarray(upsnet.show(0.7, jax.random.key(i), there))
        assert shown.sum() == 7 and not (shown & ~there).any()
    assert np.asarray(upsnet.show(0.7, jax.random.key(0), np.array([False, True]))).sum() == 1
    assert not np.asarray(upsnet.show(0.7, jax.random.key(0), np.zeros(3, bool))).any()


def test_masks_that_better_ones_of_their_kind_hold_are_dropped():
    masks = np.zeros((5, 4, 10), bool)
    masks[0, :, :5] = masks[1, :, 3:6] = masks[2, :, 3:6] = masks[4, :, :4] = True
    masks[1, :, 3:8] = True  # 8 of 20 pixels in the first: more than 0.3; 2 and 4 are of kind 2
    kinds = jnp.array([1, 1, 2, 2, 2])
    kept = upsnet.prune(masks, kinds, 2, 0.3)
    np.testing.assert_array_equal(kept, [True, False, True, False, True])


@pytest.mark.slow
def test_the_panoptic_map_of_hand_made_logits():
    """Background 0, an object of class 3, one of class 1 that looks like stuff 2, unknown pixels of
    class 1 outside of any box, and a little of stuff 4."""
    semantic = np.full((20, 24, K), -4.0, np.float32)
    semantic[..., 0] = 4
    for window, k in (
        (np.s_[2:10, 2:10], 3),
        (np.s_[2:10, 14:22], 2),
        (np.s_[14:18, 2:6], 1),
        (np.s_[19:, 20:], 4),
    ):
        semantic[window] = -4
        semantic[(*window, k)] = 4
    boxes = np.array([[2, 2, 10, 10], [2, 14, 10, 22], [0, 0, 0, 0]], np.float32)
    masks = np.full((3, 6, 6), 9.0, np.float32)
    kinds = jnp.array([2, 1, -1])
    options = {"num_classes": K, "things": THINGS, "overlap": 0.3}
    have = np.asarray(upsnet.unify(semantic, boxes, masks, kinds, **options))
    want = np.zeros((20, 24), int)
    want[2:10, 2:10] = 3001
    want[2:10, 14:22], want[14:18, 2:6], want[19:, 20:] = 2000, 255_000, 4000
    np.testing.assert_array_equal(have, want)


def test_what_a_box_holds_of_the_label():
    label = np.arange(6 * 8).reshape(6, 8).astype(np.int32)
    logits = np.random.default_rng(0).normal(size=(2, 2, K)).astype(np.float32)
    boxes = np.array([[0, 0, 6, 8], [1.0, 2.0, 2.0, 3.0], [0, 0, 6, 8]], np.float32)
    seen, truth = upsnet.roi_pixels(logits, label, boxes, np.array([True, True, False]))
    assert seen.shape == (3, 28, 28, K)
    assert set(np.unique(truth[0])) == set(range(48)) and truth[0, 0, 27] == 7
    assert (np.asarray(truth[1]) == label[1, 2]).all() and (np.asarray(truth[2]) == 255).all()


class Tiny(nn.Module):
    """Five convolutions with stride 2 as a backbone, quick to compile."""

    output_stride: int = 32

    @nn.compact
    def __call__(self, x, train):
        levels = {}
        for i in range(1, 6):
            x = levels[f"c{i}"] = nn.relu(Conv(8, 3, 2, name=f"conv{i}")(x))
        return levels


@pytest.fixture(scope="module")
def network():
    """(model, variables) of a tiny UPSNet."""
    model = upsnet.Model(
        *(K, Tiny(), THINGS),
        **{"features": 8, "box_features": 8, "mask_features": 8, "mask_convs": 1},
        **{"box_size": 3, "samples": 1},
        proposals=maskrcnn.Proposals((8, 16, 32, 64, 128), before=(16, 16), after=(16, 16)),
        detections=maskrcnn.Detections(rois=16, candidates=32, count=4),
        semantic=(6,),
        score=0.2,
    )
    return model, randomised(trace(model, (64, 64))[0])


def scene():
    masks = np.zeros((2, 3, 64, 64), np.uint8)
    masks[0, 0, 8:30, 8:40] = masks[0, 1, 34:60, 10:30] = 1
    label = np.zeros((2, 64, 64), np.int32)
    label[0][masks[0, 0] > 0], label[0][masks[0, 1] > 0], label[1, 40:] = 3, 1, 2
    boxes = np.zeros((2, 3, 4), np.float32)
    boxes[0, :2] = [[8, 8, 30, 40], [34, 10, 60, 30]]
    return {
        **{"label": label, "masks": masks, "boxes": boxes},
        **{"classes": np.array([[3, 1, -1], [-1] * 3], np.int32), "crowd": np.zeros((2, 3), bool)},
    }


FIELDS = {"num_classes": K, "things": THINGS, "aligned": True}


@pytest.mark.slow
def test_beside_mask_rcnn_it_has_the_semantic_heads_parameters():
    net = backbones.find("resnet50")()
    things = tuple(range(80))
    sizes = [count(trace(m.Model(133, net, things), (64, 64))[0]) for m in (upsnet, maskrcnn)]
    deformable = sum(
        9 * a * 18 + 18 + 9 * a * b + b for a, b in ((256, 256), (256, 128), (128, 128))
    )
    assert sizes[0] - sizes[1] == deformable + 512 * 133 + 133 + 2048 * 256 + 256


@pytest.mark.slow
def test_eight_devices_say_what_one_says():
    """The panoptic loss, its gradient and the panoptic map, one image a device."""
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    data = NamedSharding(mesh, PartitionSpec("data"))
    many = [np.stack(a) for a in zip(*(given(seed) for seed in range(8)), strict=True)]
    kinds = np.array([[1, 2, 2, -1], [-1] * 4] * 4)
    label = np.random.default_rng(0).integers(0, 8, (8, 11, 13))

    def run(semantic, boxes, masks, kinds, label):
        def value(semantic):
            head = jax.vmap(lambda *a: upsnet.panoptic_logits(*a, K, THINGS))
            return cross_entropy(head(semantic, boxes, masks, kinds), label, ignore=7)

        options = {"num_classes": K, "things": THINGS, "overlap": 0.3}
        found = jax.vmap(partial(upsnet.unify, **options))(semantic, boxes, masks, kinds)
        return *jax.value_and_grad(value)(semantic), found

    arrays = (*many, kinds, label)
    wants, haves = jax.jit(run)(*arrays), jax.jit(run, in_shardings=(data,) * 5)(*arrays)
    for want, have in zip(wants, haves, strict=True):
        np.testing.assert_allclose(want, have, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_its_loss_is_mask_rcnns_and_three_more(network):
    """One image with two objects, one without any; all gradients are finite, the offsets' too."""
    model, variables = network
    image = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    batch = scene()

    def run(params):
        state = {**variables, "params": params}
        outputs = model.apply(state, image, *model.inputs(batch), train=True)
        value, logs = upsnet.loss(outputs, batch, **FIELDS, keep=1.0)
        return value, (logs, outputs)

    (value, (logs, outputs)), slope = jax.jit(jax.value_and_grad(run, has_aux=True))(
        variables["params"]
    )
    plain, _ = maskrcnn.loss(outputs, batch, **FIELDS, box_beta=1.0)
    more = 0.2 * logs["semantic_loss"] + 0.04 * logs["roi_loss"] + 0.1 * logs["panoptic_loss"]
    np.testing.assert_allclose(value, plain + more, rtol=1e-5)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(slope))
    assert np.any(slope["semantic_head"]["deform1"]["offset"]["kernel"])
    assert outputs["semantic_logits"].shape == (2, 16, 16, K)
    assert outputs["object_masks"].shape == (2, 3, 28, 28)
    heads, targets = [], []
    for b in range(2):
        kinds = np.array([[2, 1, 0], [0, 0, 0]])[b]
        logits, masks = outputs["semantic_logits"][b], outputs["object_masks"][b]
        head = reference_head(logits, batch["boxes"][b] / 4, masks, kinds, THINGS, STUFF)
        heads.append(head)
        small = batch["label"][b, ::4, ::4]
        targets.append(np.select([small == 0, small == 2, small == 3, small == 1], [0, 1, 3, 4]))
    want = cross_entropy(jnp.asarray(heads), jnp.asarray(targets), ignore=-1)
    np.testing.assert_allclose(logs["panoptic_loss"], want, rtol=1e-4)


@pytest.mark.slow
def test_it_predicts_all_kinds_of_maps_for_any_size(network):
    model, variables = network
    image = np.random.default_rng(1).normal(size=(2, 50, 61, 3)).astype(np.float32)
    fields = {k: getattr(model, k) for k in ("mask_threshold", "overlap")}

    @jax.jit
    def run(variables):
        outputs = model.apply(variables, image, train=False)
        return upsnet.predict(outputs, image, **FIELDS, **fields)

    found = run(variables)
    shapes = {k: found[k].shape for k in ("semantic", "panoptic", "logits")}
    assert shapes == {"semantic": (2, 50, 61), "panoptic": (2, 50, 61), "logits": (2, 50, 61, K)}
    assert found["instances"]["masks"].shape == (2, 4, 50, 61)
    panoptic = np.asarray(found["panoptic"])
    assert panoptic.dtype == np.int32
    for value in np.unique(panoptic):
        k, number = divmod(int(value), 1000)
        assert (k in THINGS and number > 0) or (k in (*STUFF, 255) and number == 0)
