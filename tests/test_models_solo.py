"""SOLO and SOLOv2: published counts, losses and objects by hand, edge cases, devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from networks import EXPERIMENTS, count, experiment, trace

from jaxseg import backbones, models, sharding
from jaxseg.errors import InputError
from jaxseg.evaluate import open_source
from jaxseg.experiment import resolve
from jaxseg.models import solo, solov2
from jaxseg.models.solo import LEVELS, Select
from jaxseg.ops.mask_losses import sigmoid_focal
from jaxseg.optim import make_optimizer
from jaxseg.train import build, init_state, jit_step, open_batches

SIZE, K, THINGS = (64, 96), 5, (1, 4)  # two categories
GRIDS = (6, 5, 4, 3, 2)
RANGES = ((1, 24), (16, 40), (30, 64), (50, 90), (80, 200))
FIELDS = {"num_classes": K, "things": THINGS}
CELLS = {"grids": GRIDS, "ranges": RANGES, "centre": 0.2}
PAPERS = {"vanilla": solo, "decoupled": solo, "v2": solov2}


def all_but(*slow):
    """The papers' kinds, those named among the slow tests: what takes long is to compile them."""
    return [pytest.param(k, marks=[pytest.mark.slow] if k in slow else []) for k in PAPERS]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant", "parameters", "shapes"),
    [
        ("solo", "", 36_301_232, {"features2": (1, 8, 12, 256), "kernels2": (1600, 256)}),
        ("solo", "variant=decoupled,", 40_028_560, {"x4": (1, 8, 12, 24)}),
        ("solov2", "", 46_592_912, {"mask_features": (1, 16, 24, 256)}),
        ("solov2", "variant=light,", 31_340_560, {"mask_features": (1, 16, 24, 128)}),
    ],
)
def test_a_network_has_the_published_number_of_parameters(name, variant, parameters, shapes):
    variables, outputs = trace(experiment(name, f"{variant}num_classes=80"), (64, 96))
    assert count(variables) == parameters
    assert outputs["categories2"].shape == (1, 40, 40, 80)
    assert outputs["categories6"].shape == (1, 12, 12, 80)
    assert {key: outputs[key].shape for key in shapes} == shapes


def random_outputs(kind, batch=2):
    """What a network of two categories with eight channels would say of images of SIZE."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    outputs = {}
    for level, grid, stride in zip(LEVELS, GRIDS, solo.STRIDES, strict=True):
        h, w = SIZE[0] // stride, SIZE[1] // stride
        outputs[f"categories{level}"] = draw(batch, grid, grid, 2)
        if kind == "vanilla":
            outputs[f"features{level}"] = draw(batch, h, w, 8)
            outputs[f"kernels{level}"], outputs[f"biases{level}"] = draw(grid**2, 8), draw(grid**2)
        elif kind == "decoupled":
            outputs |= {f"{axis}{level}": draw(batch, 2 * h, 2 * w, grid) + 1 for axis in "xy"}
        else:
            outputs[f"kernels{level}"] = draw(batch, grid, grid, 8)
    if kind == "v2":
        outputs["mask_features"] = draw(batch, SIZE[0] // 4, SIZE[1] // 4, 8)
    return outputs


def scene(batch=2):
    """Boxes of things in images of even number; a crowd, a class that is no thing, empty slots."""
    boxes = np.array([(8, 8, 28, 30), (20, 40, 60, 90), (2, 60, 16, 80), (40, 4, 60, 20)])
    masks = np.zeros((batch, 5, *SIZE), np.uint8)
    classes = np.full((batch, 5), -1, np.int32)
    for n, (top, left, bottom, right) in enumerate(boxes):
        masks[::2, n, top:bottom, left:right] = 1
    classes[::2, :4] = (1, 4, 1, 3)
    crowd = np.zeros((batch, 5), bool)
    crowd[:, 2] = True
    extents = np.zeros((batch, 5, 4), np.float32)
    extents[::2, :4] = boxes
    return {"masks": masks, "classes": classes, "boxes": extents, "crowd": crowd}


def loss_of(kind, **more):
    return partial(PAPERS[kind].loss, **FIELDS, **CELLS, **more)


def prediction_of(kind, select):
    return partial(PAPERS[kind].predict, **FIELDS, select=select)


@pytest.mark.slow
@pytest.mark.parametrize("kind", all_but("decoupled"))
def test_losses_are_finite_with_and_without_objects_and_count_what_is_dropped(kind):
    outputs = random_outputs(kind)
    run = jax.jit(jax.value_and_grad(loss_of(kind), has_aux=True))
    few = jax.jit(loss_of(kind, positives=1))
    batch = scene()
    nothing = {**batch, "classes": np.full_like(batch["classes"], -1)}
    only_others = {**nothing, "classes": np.where(batch["classes"] == 3, 3, -1)}
    (value, logs), slope = run(outputs, batch)
    assert np.isfinite(value) and all(np.isfinite(x).all() for x in jax.tree.leaves(slope))
    assert logs["positives"] > 3 and logs["dropped"] == 0 and 0 < logs["mask_loss"] < 1
    assert abs(value - logs["category_loss"] - 3 * logs["mask_loss"]) < 1e-5
    assert not np.asarray(slope["categories2"][1]).max() <= 0  # background has a slope too
    for empty in (nothing, only_others):
        (value, logs), slope = run(outputs, empty)
        assert logs["positives"] == logs["mask_loss"] == logs["dropped"] == 0
        logits = np.concatenate([outputs[f"categories{i}"].ravel() for i in LEVELS])
        expected = np.asarray(sigmoid_focal(logits, np.zeros(logits.shape, bool))).sum()
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))
    assert run._cache_size() == 1
    value, logs = few(outputs, batch)
    assert np.isfinite(value) and logs["dropped"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", all_but("vanilla", "decoupled"))
def test_eight_devices_compute_what_one_does(kind):
    outputs, batch = random_outputs(kind, 8), scene(8)
    predict = prediction_of(kind, Select(candidates=20, objects=5, score=0.2))

    def step(outputs, batch):
        value, slope = jax.value_and_grad(lambda x: loss_of(kind)(x, batch)[0])(outputs)
        return value, slope, predict(outputs, jnp.zeros((8, *SIZE, 3)))

    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    whole, parts = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    place = lambda x: jax.device_put(x, parts if x.shape[0] == 8 else whole)  # noqa: E731
    one = jax.jit(step)(outputs, batch)
    many = jax.jit(step)(*jax.tree.map(place, (outputs, batch)))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["solo", "solov2"])
def test_a_training_step_on_eight_devices_is_that_of_one(name):
    """By the gradients themselves: of AdamW's first step only their signs matter."""
    plain = {"optim.name": "sgd", "optim.lr": "1.0", "optim.warmup": "0", "data.crop": "(64, 64)"}
    config = resolve(f"{EXPERIMENTS / name}.py:dataset=shapes,variant=small", [*plain.items()])
    batch = next(open_batches(config, open_source(config, "train")))
    ends = []
    for number in (1, 8):
        devices = np.array(jax.devices()[:number]).reshape(-1, 1, 1)
        mesh = Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
        _, init, step = build(config, mesh)
        state, placed = init(), sharding.put_batch(batch, mesh)
        start = jax.device_get(state.params)
        state, logs = jit_step(step, state, placed, mesh)(state, placed)
        end = jax.device_get(state)
        ends.append((logs["loss"], end.batch_stats, jax.tree.map(np.subtract, end.params, start)))
    (value, stats, moves), (shared, shared_stats, shared_moves) = ends
    np.testing.assert_allclose(shared, value, rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (stats, shared_stats)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
    one, many = (
        np.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (moves, shared_moves)
    )
    # Batch norm over a few pixels magnifies what rounding differs: 0.0026 of SOLO.
    assert np.linalg.norm(many - one) < 0.01 * np.linalg.norm(one)


def test_an_object_is_found_where_its_cell_says_so():
    """SOLOv2, whose features are the masks themselves: the kernel of a cell picks one."""
    outputs = {k: np.zeros_like(v) for k, v in random_outputs("v2").items()}
    for level in LEVELS:
        outputs[f"categories{level}"] -= 9
    masks = np.full((2, 16, 24, 8), -9, np.float32)
    masks[0, 2:9, 3:11, 0] = masks[0, 3:9, 3:11, 1] = masks[0, 10:15, 12:20, 2] = 9
    masks[0, 0, 0, 3] = 9  # smaller than its level's stride
    outputs["mask_features"] = masks
    sure, less = 3.0, 2.0
    for level, cell, category, logit, kernel in [
        *((2, (1, 1), 1, sure, 0), (3, (1, 1), 1, less, 1)),  # the same object twice
        *((3, (4, 4), 0, less, 2), (4, (3, 0), 0, sure, 3)),
    ]:
        outputs[f"categories{level}"][0, *cell, category] = logit
        outputs[f"kernels{level}"][0, *cell, kernel] = 1
    run = jax.jit(prediction_of("v2", Select(candidates=10**6, objects=6)))
    image = np.zeros((2, *SIZE, 3), np.float32)
    found = jax.tree.map(np.asarray, run(outputs, image)["instances"])
    assert found["classes"].tolist() == [[4, 1, 4, -1, -1, -1], [-1] * 6]
    p, iou = (lambda x: 1 / (1 + np.exp(-x))), 6 / 7
    again = p(less) * np.exp(-2 * iou**2)
    np.testing.assert_allclose(found["scores"][0, :3], [p(sure), p(less), again], atol=1e-3)
    assert not found["scores"][0, 3:].any() and not found["scores"][1].any()
    assert found["masks"].shape == (2, 6, *SIZE) and found["masks"].dtype == bool
    rows, cols = np.nonzero(found["masks"][0, 0])
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (8, 35, 12, 43)
    assert not found["masks"][0, 3:].any() and not found["masks"][1].any()
    run(random_outputs("v2"), image)
    assert run._cache_size() == 1


def test_sizes_that_fit():
    net = backbones.find("resnet18")()
    model = solo.Model(K, net)
    assert model.fit((64, 96)) == (64, 96) and model.fit((65, 1)) == (96, 32)
    model.check_crop((64, 96))
    square = solov2.Model(K, net, square=True)
    assert square.fit((65, 40)) == (96, 96)
    for one, crop in ((model, (64, 100)), (square, (64, 96))):
        with pytest.raises(InputError, match="multiples of 32: use"):
            one.check_crop(crop)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: solo.Model(K, backbones.find("resnet18")(), masks="best"), "decoupled_light"),
        (lambda: solov2.Model(K, backbones.find("resnet18")(), grids=(4, 3)), "five numbers"),
        (lambda: solo.Model(K, backbones.find("hrnet_w18")()), "output stride 4: set .*=32"),
        (lambda: solov2.Model(K, backbones.find("hrnet_w18")()), "output stride 4: set .*=32"),
        (lambda: Select(kernel="cubic"), "gaussian"),
        (lambda: Select(objects=0), "at least 1"),
    ],
)
def test_fields_that_no_network_could_use_are_refused(build, message):
    with pytest.raises(InputError, match=message):
        trace(build(), SIZE)


def test_a_batch_without_objects_slots_is_refused():
    with pytest.raises(InputError, match="data.objects"):
        loss_of("v2")(random_outputs("v2"), {"label": np.zeros((2, *SIZE), np.int32)})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["solo", "solov2"])
def test_the_small_variant_learns_two_scenes(name):
    fixed = {"train.batch": "2", "train.steps": "20", "optim.warmup": "0", "data.flip": "False"}
    path = f"{EXPERIMENTS / name}.py:dataset=shapes,variant=small"
    config = resolve(path, [*fixed.items(), ("data.scale", "(1.0, 1.0)")])
    assert config.model.things == tuple(range(1, 8)) and config.model.num_classes == 8
    target, _, step = build(config, sharding.make_mesh(config.mesh))
    tx = make_optimizer(config.optim, config.train.steps, target.params)
    state, step = init_state(config, models.build(config)[0], tx), jax.jit(step)
    batch = next(open_batches(config, open_source(config, "train")))
    losses = []
    for _ in range(20):
        state, logs = step(state, batch)
        losses.append(float(logs["loss"]))
        assert logs["positives"] > 10 and logs["dropped"] == 0
    assert np.isfinite(losses).all() and np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
