"""Mask R-CNN: its size, its losses and detections against loops, training without objects."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from networks import count, experiment, trace

from jaxseg import models
from jaxseg.backbones.layers import Conv, Norm
from jaxseg.errors import InputError
from jaxseg.macs import count_macs
from jaxseg.models import maskrcnn
from jaxseg.ops import boxes as ops
from jaxseg.ops.roi import crop_masks, level_of

SIZE, SLOTS = (50, 70), 4


class Backbone(nn.Module):
    """Five strided convolutions, one with a norm."""

    norm: Norm = Norm()
    output_stride: int = 32

    @nn.compact
    def __call__(self, x, train):
        levels = {}
        for i in range(1, 6):
            x = nn.relu(Conv(6, 3, 2, name=f"conv{i}")(x))
            x = self.norm(x, train) if i == 3 else x
            levels[f"c{i}"] = x
        return levels


def model(**fields):
    small = {"features": 8, "box_features": 16, "mask_features": 4, "mask_convs": 1}
    proposals = maskrcnn.Proposals((8, 16, 32, 64, 128), before=(40, 30), after=(24, 16))
    detections = maskrcnn.Detections(rois=16, candidates=40, count=7, score=0.1)
    own = {"num_classes": 5, "things": (1, 2, 4), "backbone": Backbone()}
    own |= {"proposals": proposals, "detections": detections, **small, "canonical": 16.0}
    return maskrcnn.Model(**{**own, **fields})


def scenes(batch, seed=0, objects=SLOTS):
    """Images of noise with `objects` bright rectangles, of which the last is a crowd."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(batch, *SIZE, 3)).astype(np.float32)
    truth = {
        "masks": np.zeros((batch, SLOTS, *SIZE), np.uint8),
        "classes": np.full((batch, SLOTS), -1, np.int32),
        "boxes": np.zeros((batch, SLOTS, 4), np.float32),
        "crowd": np.zeros((batch, SLOTS), bool),
    }
    for b, n in np.ndindex(batch, objects):
        y, x = rng.integers(0, 30), rng.integers(0, 40)
        h, w = rng.integers(8, 20, 2)
        truth["masks"][b, n, y : y + h, x : x + w] = 1
        truth["boxes"][b, n] = y, x, y + h, x + w
        truth["classes"][b, n] = (1, 2, 4)[rng.integers(3)]
        truth["crowd"][b, n] = n == 3
        image[b, y : y + h, x : x + w] += truth["classes"][b, n]
    return {"image": image, **truth, "rng": jax.random.key(seed)}


def objective(net, variables, batch):
    run = partial(net.apply, train=True, mutable=["batch_stats"])
    outputs, updated = run(variables, batch["image"], *net.inputs(batch))
    fields = {k: getattr(net, k) for k in ("num_classes", "things", "aligned")}
    value, logs = maskrcnn.loss(outputs, batch, **fields)
    return value, (logs, outputs, updated)


@pytest.fixture(scope="module")
def trained():
    """(network, variables, step(variables, batch) -> ((loss, ..), gradient))."""
    net = model()
    variables = jax.jit(partial(net.init, train=False))(jax.random.key(0), scenes(1)["image"])

    @jax.jit
    def step(variables, batch):
        def of(params):
            return objective(net, {**variables, "params": params}, batch)

        return jax.value_and_grad(of, has_aux=True)(variables["params"])

    return net, variables, step


@pytest.mark.parametrize(("norm", "expected"), [("frozen", 44_401_393), ("batch", 44_454_513)])
def test_the_published_count(norm, expected):
    """torchvision's, 91 outputs; its parts, in the issue's order."""
    net = experiment("maskrcnn", "num_classes=90")
    net = net.clone(backbone=net.backbone.clone(norm=Norm(norm)))
    variables, _ = trace(net, (64, 96))
    assert count(variables) == expected
    sizes = {key: count({"params": part}) for key, part in variables["params"].items()}
    assert sizes["fpn"] == 3_344_384 and sizes["rpn"] == 593_935
    assert sizes["box"] == 13_895_680 + 466_375 and sizes["mask"] == 2_360_320 + 285_787
    assert jax.tree.leaves(variables["batch_stats"])


@pytest.mark.slow
def test_the_published_multiply_accumulates():
    """134.38e9 of an 800 x 800 image in which nothing is found, so that no mask is drawn."""
    net = experiment("maskrcnn", "recipe=torchvision")
    variables, _ = trace(net, (64, 64))
    image = jax.ShapeDtypeStruct((1, 800, 800, 3), jnp.float32)
    total = count_macs(net, variables, image)[0]
    masks = 100 * (14**2 * (4 * 9 * 256**2 + 4 * 256**2) + 28**2 * 256 * 91)
    assert (total - masks) / 1e9 == pytest.approx(134.38, abs=0.01)


@pytest.mark.slow
def test_other_sizes_of_network_and_image():
    net = experiment("maskrcnn", "backbone=resnet101,num_classes=80")
    _, outputs = trace(net, (33, 1000))
    assert outputs["boxes"].shape == (1, 100, 4) and outputs["mask_logits"].shape[1:3] == (100, 28)


@pytest.mark.slow
def test_a_step_learns_of_objects_and_updates_the_norm(trained):
    net, variables, step = trained
    (value, (logs, outputs, updated)), slope = step(variables, scenes(2))
    assert np.isfinite(value) and logs["positives"] >= 3  # true boxes are among the RoIs
    assert all(np.asarray(g).any() for g in jax.tree.leaves(slope))
    assert (updated["batch_stats"]["backbone"]["norm"]["mean"] != 0).any()
    positive, index = (np.asarray(outputs[k]) for k in ("positive", "index"))
    assert positive.sum(1).max() <= 4 and not positive[:, 4:].any()  # a quarter of 16, first
    assert (index[positive] != 3).all()  # a crowd
    assert np.asarray(outputs["counts"]).all()
    assert len(np.unique(level_of(outputs["rois"], canonical=net.canonical))) >= 3


@pytest.mark.slow
def test_images_without_objects_have_a_finite_loss_and_nothing_is_compiled_again(trained):
    _, variables, step = trained
    before = step._cache_size()
    for seed, objects in ((1, 0), (2, 1), (3, 4)):
        (value, (logs, *_)), slope = step(variables, scenes(2, seed, objects))
        assert np.isfinite(value) and all(np.isfinite(x).all() for x in jax.tree.leaves(slope))
        if not objects:
            for key in ("positives", "proposal_loss", "box_loss", "mask_loss"):
                assert logs[key] == 0
            assert logs["class_loss"] > 0 and logs["objectness_loss"] > 0
    assert step._cache_size() == max(before, 1)


@pytest.mark.slow
def test_another_key_draws_other_rois(trained):
    _, variables, step = trained
    batch = scenes(2)
    first, again, other = (
        step(variables, {**batch, "rng": jax.random.key(k)})[0][1][1]["rois"] for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.slow
def test_devices_that_share_the_batch_get_the_same_loss_and_gradient(trained):
    _, variables, step = trained
    batch = scenes(8)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    spread = {
        key: jax.device_put(
            x, NamedSharding(mesh, PartitionSpec() if key == "rng" else PartitionSpec("data"))
        )
        for key, x in batch.items()
    }
    held = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
    (value, _), slope = step(variables, batch)
    (shared, _), spread_slope = step(held, spread)
    np.testing.assert_allclose(shared, value, rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (slope, spread_slope)), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-4 * np.abs(a).max() + 1e-7)


@pytest.fixture(scope="module")
def prediction(trained):
    """run(variables, image) -> instances, with more slots than are filled."""
    net = trained[0].clone(detections=maskrcnn.Detections(candidates=48, count=48, score=0.1))
    fields = {k: getattr(net, k) for k in models._keywords(maskrcnn.predict)}

    @jax.jit
    def run(variables, image):
        outputs = net.apply(variables, image, train=False)
        return maskrcnn.predict(outputs, image, **fields)["instances"]

    return run


@pytest.mark.slow
def test_predictions_of_any_number_of_objects_are_compiled_once(trained, prediction):
    numbers = set()
    for seed, objects in ((0, 4), (1, 0), (2, 1)):
        found = prediction(trained[1], scenes(2, seed, objects)["image"])
        assert found["masks"].shape == (2, 48, *SIZE) and found["masks"].dtype == bool
        classes = np.asarray(found["classes"])
        assert classes.dtype == np.int32 and set(np.unique(classes)) <= {-1, 1, 2, 4}
        there = classes >= 0
        assert there.any() and (np.asarray(found["scores"])[there] > 0.1).all()
        assert not np.asarray(found["masks"])[~there].any()
        boxes = np.asarray(found["boxes"])
        assert boxes.min() >= 0 and (boxes[..., 2:] <= SIZE).all()
        numbers |= set(there.sum(1).tolist())
    assert len(numbers) > 1
    assert prediction._cache_size() == 1


@pytest.mark.slow
def test_devices_that_share_the_batch_predict_the_same(trained, prediction):
    image = scenes(8)["image"]
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    spread = jax.device_put(image, NamedSharding(mesh, PartitionSpec("data")))
    held = jax.device_put(trained[1], NamedSharding(mesh, PartitionSpec()))
    one, many = prediction(trained[1], image), prediction(held, spread)
    assert not many["scores"].sharding.is_fully_replicated
    np.testing.assert_array_equal(many["classes"], one["classes"])
    np.testing.assert_allclose(many["scores"], one["scores"], atol=1e-5)
    np.testing.assert_allclose(many["boxes"], one["boxes"], atol=1e-3)
    differ = np.asarray(many["masks"]) != np.asarray(one["masks"])
    assert differ.sum() <= 1e-4 * np.asarray(one["masks"]).sum() > 0


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_detections_against_loops():
    net, rng = model(), np.random.default_rng(0)
    low = rng.uniform(0, 40, (16, 2))
    rois = np.concatenate([low, low + rng.uniform(4, 25, (16, 2))], axis=1).astype(np.float32)
    there = np.arange(16) < 12
    logits = (2 * rng.normal(size=(16, 4))).astype(np.float32)
    codes = rng.normal(size=(16, 4, 4)).astype(np.float32)
    got = jax.jit(partial(net.detect, SIZE))(rois, there, logits, codes)
    scores, found = softmax(logits.astype(float)), []
    for kind in (1, 2, 3):
        boxes = np.asarray(ops.clip(ops.decode(codes[:, kind], rois, maskrcnn.BOX_WEIGHTS), SIZE))
        overlap, stays = np.asarray(ops.iou(boxes, boxes)), []
        for i in np.argsort(-scores[:, kind]):
            if there[i] and scores[i, kind] > 0.1 and all(overlap[i, j] <= 0.5 for j in stays):
                stays.append(i)
        found += [(scores[i, kind], kind, boxes[i]) for i in stays]
    found = sorted(found, key=lambda one: -one[0])[:7]
    np.testing.assert_allclose(got["scores"][: len(found)], [f[0] for f in found], rtol=1e-5)
    np.testing.assert_array_equal(got["kinds"][: len(found)], [f[1] for f in found])
    np.testing.assert_allclose(got["boxes"][: len(found)], [f[2] for f in found], rtol=1e-5)
    nothing = jax.jit(partial(net.detect, SIZE))(rois, there & False, logits, codes)
    assert (np.asarray(nothing["kinds"]) == -1).all() and not np.asarray(nothing["boxes"]).any()


def test_losses_of_rois_against_loops():
    rng = np.random.default_rng(0)
    batch = {k: x[0] for k, x in scenes(1).items() if k in ("boxes", "masks")}
    kind = np.array([2, 1, 3, 0])
    index = np.array([2, 0, 0, 1, 0, 0])
    rois = (batch["boxes"][index] + rng.normal(size=(6, 4))).astype(np.float32)
    drawn = {"rois": rois, "index": index}
    drawn["positive"] = np.array([True, True, False, False, False, False])
    drawn["counts"] = np.array([True, True, True, True, False, False])
    logits, codes = rng.normal(size=(6, 4)), rng.normal(size=(6, 4, 4))
    mask_logits = rng.normal(size=(3, 5, 5, 4))
    run = jax.jit(partial(maskrcnn.roi_losses, True, 0.5))
    got = run(batch, kind, drawn, logits, codes, mask_logits)
    log_p = np.log(softmax(logits))
    labels = [3, 2, 0, 0]
    np.testing.assert_allclose(got["class"], -sum(log_p[r, k] for r, k in enumerate(labels)), 1e-5)
    box = mask = 0.0
    for r in (0, 1):
        target = np.asarray(ops.encode(batch["boxes"][index[r]], rois[r], maskrcnn.BOX_WEIGHTS))
        wrong = np.abs(codes[r, labels[r]] - target)
        box += np.where(wrong < 0.5, wrong**2, wrong - 0.25).sum()
        shape = np.asarray(crop_masks(batch["masks"], index[r : r + 1], rois[r : r + 1], 5))[0]
        p = 1 / (1 + np.exp(-mask_logits[r, ..., labels[r]]))
        mask -= (shape * np.log(p) + (1 - shape) * np.log(1 - p)).mean()
    np.testing.assert_allclose(got["box"], box, rtol=1e-4)
    np.testing.assert_allclose(got["mask"], mask, rtol=1e-4)
    assert (got["rois"], got["positives"]) == (4, 2)


@pytest.mark.parametrize(("rounded", "last"), [(False, (768, 1024)), (True, (732, 1024))])
def test_anchors_stand_where_the_library_has_them(rounded, last):
    """13 rows over 800 pixels: 64 apart, or in torchvision 61; both are 64 apart along 1088."""
    grids = {"p2": (200, 272), "p3": (100, 136), "p4": (50, 68), "p5": (25, 34), "p6": (13, 17)}
    model = maskrcnn.Model(3, nn.Module(), proposals=maskrcnn.Proposals(rounded=rounded))
    anchors, counts = model.anchors(grids)
    assert counts == [3 * h * w for h, w in grids.values()]
    middle = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert tuple(middle[-1]) == last and tuple(middle[counts[0] - 1]) == (796, 1084)


@pytest.mark.parametrize(
    "fields", [{"sizes": (32.0, 64.0)}, {"ratios": ()}, {"before": (16,)}, {"after": (16, 0)}]
)
def test_proposals_that_fit_no_pyramid_are_refused(fields):
    (name, value), *_ = fields.items()
    said = re.escape(f"{name}={value}") + ".*: needs five sizes .* two numbers of boxes"
    with pytest.raises(InputError, match=said):
        maskrcnn.Proposals(**fields)


def test_losses_of_anchors_against_loops():
    """More are asked for than there are: all count, but for those between the thresholds."""
    rng = np.random.default_rng(0)
    truth = scenes(1)
    anchors = ops.grid_anchors((6, 8), (8, 8), 14, (1.0,))
    kind = np.array([1, 2, 1, 0])
    objectness, codes = rng.normal(size=48), rng.normal(size=(48, 4))
    run = jax.jit(partial(maskrcnn.anchor_losses, jnp.asarray(anchors), 96, 0.0))
    got = run(jax.random.key(0), truth["boxes"][0], kind, objectness, codes)
    overlap = np.asarray(ops.iou(truth["boxes"][0][:3], anchors))
    best = (overlap == overlap.max(1, keepdims=True)).any(0)
    said = box = number = 0
    for a in range(48):
        positive = best[a] or overlap[:, a].max() >= 0.7
        if not positive and overlap[:, a].max() >= 0.3:
            continue
        p = 1 / (1 + np.exp(-objectness[a]))
        said -= np.log(p if positive else 1 - p)
        number += 1
        if positive:
            own = truth["boxes"][0][overlap[:, a].argmax()]
            box += np.abs(codes[a] - np.asarray(ops.encode(own, anchors[a]))).sum()
    np.testing.assert_allclose(got["objectness"], said, rtol=1e-5)
    np.testing.assert_allclose(got["proposal"], box, rtol=1e-4)
    assert got["anchors"] == number < 48


def test_classes_are_numbered_in_the_order_of_things():
    batch = {
        "classes": np.array([[4, 1, 3, -1, 2]]),
        "crowd": np.array([[False, False, False, False, True]]),
    }
    assert maskrcnn.thing(batch, 5, (1, 2, 4)).tolist() == [[3, 1, 0, 0, 0]]
    assert maskrcnn.thing(batch, 5, ()).tolist() == [[5, 2, 4, 0, 0]]
    assert maskrcnn.thing(batch, 5, (1, -1, 4)).tolist() == [[3, 1, 0, 0, 0]]  # one of no class


@pytest.mark.slow
def test_it_computes_in_bfloat16(trained):
    net, variables, _ = trained
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["params"])
    batch = scenes(1)
    batch["image"] = batch["image"].astype(jnp.bfloat16)
    value, (_, outputs, _) = jax.eval_shape(
        partial(objective, net), {**variables, "params": low}, batch
    )
    assert value.dtype == jnp.float32 == outputs["logits"].dtype
