"""Panoptic-DeepLab: published counts, its loss and its prediction against loops, edge cases."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from networks import count, trace
from test_ops_centres import discs

from jaxseg import backbones
from jaxseg.errors import InputError
from jaxseg.models import panoptic_deeplab as paper
from jaxseg.ops.losses import PixelLoss

SIZE, K, THINGS = (24, 33), 4, (1, 3)
FIELDS = {"num_classes": K, "things": THINGS, "align_corners": True}


@pytest.mark.parametrize(
    ("backbone", "fields", "classes", "parameters"),
    [
        ("resnet50", {}, 19, 54_973_702),
        ("resnet50", {}, 134, 55_003_257),
        ("resnet50", {"stem": "deep"}, 19, 54_973_702 + 123_776),
    ],
)
def test_it_has_the_published_number_of_parameters(backbone, fields, classes, parameters):
    net = backbones.find(backbone)(output_stride=32, **fields)
    variables, outputs = trace(paper.Model(classes, net), (65, 97))
    assert count(variables) == parameters
    shapes = {key: value.shape for key, value in outputs.items()}
    assert shapes == {
        "logits": (1, 17, 25, classes),
        "centre": (1, 17, 25, 1),
        "offset": (1, 17, 25, 2),
    }


@pytest.mark.slow
def test_three_levels_of_a_high_resolution_net():
    """The authors' HRNet decoders climb from the branch at stride 32: c4, c3, c2."""
    net = backbones.find("hrnet_w18_small")(output_stride=32)
    steps = {"levels": ("c4", "c3", "c2"), "semantic": (8, 6, 4), "instance": (6, 4, 2)}
    model = paper.Model(5, net, features=8, decoder=8, instance_decoder=6, **steps)
    variables, outputs = trace(model, (64, 96))
    assert outputs["offset"].shape == (1, 16, 24, 2)
    kernel = variables["params"]["instance_join_c4"]["pointwise"]["conv"]["kernel"]
    assert kernel.shape == (1, 1, 8 + 6, 6)


def scene():
    """Batch of two: four slots of which one is a crowd and one empty; then no object at all."""
    masks = np.zeros((2, 4, *SIZE), np.uint8)
    masks[0, :3] = discs([(7, 8), (14, 24), (20, 6)], (5, 7, 2))
    label = np.zeros((2, *SIZE), np.int32)
    for mask, k in zip(masks[0], (1, 3, 1), strict=False):
        label[0][mask > 0] = k
    label[0, 9:12, 14:16] = 3  # an object that found no slot
    label[:, 0], label[1, 3:9] = 255, 2
    classes = np.array([[1, 3, 1, -1], [-1] * 4], np.int32)
    crowd = np.zeros((2, 4), bool)
    crowd[0, 2] = True
    return {"label": label, "masks": masks, "classes": classes, "crowd": crowd}


def random_outputs(size=SIZE):
    rng = np.random.default_rng(0)
    draw = lambda c: rng.normal(size=(2, *size, c)).astype(np.float32)  # noqa: E731
    return {"logits": draw(K), "centre": draw(1), "offset": 4 * draw(2)}


@pytest.mark.slow
def test_the_loss_against_loops():
    batch, outputs = scene(), random_outputs()
    value, logs = paper.loss(outputs, batch, **FIELDS, small_area=60, sigma=2.0)
    semantic, centre, distance = [], [], []
    for b, y, x in np.ndindex(batch["label"].shape):
        k = batch["label"][b, y, x]
        if k == 255:
            continue
        z = outputs["logits"][b, y, x].astype(np.float64)
        mine = [n for n in range(3) if batch["masks"][b, n, y, x] and not batch["crowd"][b, n]]
        area = batch["masks"][b, mine[0]].sum() if mine else 60
        semantic.append((np.log(np.exp(z).sum()) - z[k]) * (3 if area < 60 else 1))
        if mine or k not in THINGS:
            bells = [0.0]
            for n in range(2):
                if batch["masks"][b, n].any():
                    away = np.round(np.argwhere(batch["masks"][b, n]).mean(0)) - (y, x)
                    bells += [np.exp(-(away**2).sum() / 8)] * int(np.abs(away).max() <= 7)
            centre.append((outputs["centre"][b, y, x, 0] - max(bells)) ** 2)
        if mine:
            aim = np.argwhere(batch["masks"][b, mine[0]]).mean(0) - (y, x)
            distance.append(np.abs(outputs["offset"][b, y, x] - aim).mean())
    hardest = sorted(semantic)[-int(0.2 * batch["label"].size) :]
    np.testing.assert_allclose(logs["semantic_loss"], np.mean(hardest), rtol=1e-5)
    np.testing.assert_allclose(logs["centre_loss"], np.mean(centre), rtol=1e-5)
    np.testing.assert_allclose(logs["offset_loss"], np.mean(distance), rtol=1e-5)
    total = np.mean(hardest) + 200 * np.mean(centre) + 0.01 * np.mean(distance)
    np.testing.assert_allclose(value, total, rtol=1e-5)


@pytest.mark.slow
def test_the_loss_of_an_ignored_batch_is_zero_with_a_zero_gradient():
    batch, outputs = scene(), random_outputs((7, 9))
    batch["label"][:] = 255
    value, slope = jax.value_and_grad(lambda o: paper.loss(o, batch, **FIELDS)[0])(outputs)
    assert value == 0 and not any(np.any(g) for g in jax.tree.leaves(slope))


def test_the_loss_without_objects_in_the_batch_says_what_to_set():
    with pytest.raises(InputError, match="data.objects"):
        paper.loss(random_outputs(), {"label": scene()["label"]}, **FIELDS)


POST = {"nms": 7, "threshold": 0.1, "top_k": 6, "detections": 5}


def perfect(batch, sharp=9.0):
    """Outputs that say the truth."""
    there = (batch["classes"] >= 0) & ~batch["crowd"]
    heat, offset, _, _ = paper.centres.targets(batch["masks"], there, 2.0)
    label = np.where(batch["label"] == 255, 0, batch["label"])
    return {"logits": sharp * jax.nn.one_hot(label, K), "centre": heat[..., None], "offset": offset}


@pytest.mark.slow
def test_true_outputs_give_the_true_panoptic_map_and_objects():
    batch = scene()
    found = paper.predict(perfect(batch), jnp.zeros((2, *SIZE, 3)), **FIELDS, **POST)
    panoptic, objects = np.asarray(found["panoptic"]), jax.tree.map(np.asarray, found["instances"])
    label = np.where(batch["label"] == 255, 0, batch["label"])
    np.testing.assert_array_equal(found["semantic"], label)
    sure = np.exp(9) / (np.exp(9) + K - 1)
    for n, k in ((0, 1), (1, 3)):
        ids = np.unique(panoptic[0][batch["masks"][0, n] > 0])
        assert len(ids) == 1 and ids[0] // 1000 == k and ids[0] % 1000 > 0
        slot = np.flatnonzero(objects["classes"][0] == k)[0]
        assert not (objects["masks"][0, slot] < batch["masks"][0, n]).any()
        np.testing.assert_allclose(objects["scores"][0, slot], sure, rtol=0.1)
    assert (panoptic[label == 0] == 0).all() and (panoptic[label == 2] == 2000).all()
    assert (objects["classes"][0] >= 0).sum() == 2 and (objects["classes"][1] == -1).all()
    assert not objects["masks"][1].any() and not objects["scores"][1].any()
    assert objects["masks"].shape == (2, 5, *SIZE)


def test_things_without_a_centre_are_void():
    outputs = perfect(scene())
    outputs["centre"] = outputs["centre"].at[0].set(0)
    found = paper.predict(outputs, jnp.zeros((2, *SIZE, 3)), **FIELDS, **POST)
    panoptic, semantic = np.asarray(found["panoptic"]), np.asarray(found["semantic"])
    thing = np.isin(semantic, THINGS)
    np.testing.assert_array_equal(panoptic, np.where(thing, 255_000, semantic * 1000))
    assert thing[0].any() and not thing[1].any()


def test_all_classes_may_be_things_and_slots_may_be_fewer_than_objects():
    batch, every = scene(), {**FIELDS, "things": ()}
    few = {**POST, "top_k": 1, "detections": 5}
    found = paper.predict(perfect(batch), jnp.zeros((2, *SIZE, 3)), **every, **few)
    panoptic = np.asarray(found["panoptic"])
    assert len(np.unique(panoptic[0])) == 1  # the one centre takes all pixels
    assert (panoptic[1] == 255_000).all() and found["instances"]["masks"].shape[1] == 1
    value, _ = paper.loss(random_outputs(), batch, **every)
    assert np.isfinite(value)


def test_a_class_is_the_majority_of_its_pixels():
    batch = scene()
    outputs = perfect(batch)
    outputs["logits"] = np.array(outputs["logits"])
    outputs["logits"][0, 10:12, 8:12] = 9 * np.eye(K)[3]  # the lower part of the first disc
    found = paper.predict(outputs, jnp.zeros((2, *SIZE, 3)), **FIELDS, **POST)
    ids = np.unique(np.asarray(found["panoptic"])[0][batch["masks"][0, 0] > 0])
    assert len(ids) == 1 and ids[0] // 1000 == 1


@pytest.mark.slow
def test_eight_devices_say_what_one_says():
    """Loss, gradients and prediction, the batch over four devices and rows over two."""
    mesh = jax.make_mesh((4, 2), ("data", "space"), (AxisType.Auto,) * 2)
    data, rows = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], ["data", "space"])
    )
    batch, outputs = scene(), random_outputs((12, 17))
    batch = jax.tree.map(lambda x: np.concatenate([x, x[::-1]]), batch)
    outputs = jax.tree.map(lambda x: np.concatenate([x, 0.5 * x]), outputs)
    loss = partial(paper.loss, **FIELDS, pixel=PixelLoss("top_k"))

    def run(outputs, batch):
        value, slope = jax.value_and_grad(lambda o: loss(o, batch)[0])(outputs)
        image = jnp.zeros((4, *SIZE, 3))
        found = paper.predict({**outputs, "centre": outputs["centre"]}, image, **FIELDS, **POST)
        return value, slope, found["panoptic"], found["instances"]

    places = ({k: rows for k in outputs}, {k: rows if k == "label" else data for k in batch})
    one, many = jax.jit(run)(outputs, batch), jax.jit(run, in_shardings=places)(outputs, batch)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)
