"""Our Mask R-CNN computes what torchvision's does, from the same random weights.

Against stored values everywhere; live where torch and torchvision are there.
"""

import importlib.util
import json
import sys
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg import backbones, hub, models
from jaxseg.backbones.layers import Norm
from jaxseg.data import catalog
from jaxseg.models import maskrcnn
from jaxseg.ops.roi import level_of
from jaxseg.optim import path_of
from jaxseg.pretrained import flat
from jaxseg.verbs.convert import classes, network
from jaxseg.verbs.predict import Predictor
from jaxseg.weights import torchvision
from jaxseg.weights.names import fit

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "scripts"))
parity = importlib.import_module("parity_detection")

STORED = np.load(HERE / "references" / "detection.npz", allow_pickle=False)
CASES = [pytest.param(a, marks=[] if a == "small" else pytest.mark.slow) for a in parity.ARCHS]
TOLERANCE = 1e-4  # of the largest number
LIMITS = {"before": (100, 100), "after": (60, 60), "rounded": True}
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def build(arch, state):
    """Our network of that name, with few boxes."""
    detections = maskrcnn.Detections(score=0.03, count=30)
    if arch == "small":
        return maskrcnn.Model(
            *(5, backbones.find("resnet18")(norm=Norm("frozen"))),
            **{"features": 32, "box_features": 64, "mask_features": 32, "mask_convs": 2},
            **{"aligned": False, "canonical": parity.CANONICAL, "detections": detections},
            proposals=maskrcnn.Proposals(sizes=(16, 32, 64, 128, 256), **LIMITS),
        )
    model = models.build(network(torchvision, arch, state, 0, ""))[0]
    return model.clone(proposals=maskrcnn.Proposals(**LIMITS), detections=detections)


@cache
def ours(arch):
    """(network, variables, results): with the state that the names stand for."""
    shapes = json.loads(str(STORED[f"{arch} shapes"]))
    state = parity.random_weights(shapes)
    model = build(arch, state)
    image = jnp.asarray((parity.images() - MEAN) / STD, jnp.float32)
    target = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
    names = {name: value.shape for name, value in flat(target).items()}
    arrays, report = fit(state, torchvision.maskrcnn(), names)
    assert not report.missing and not report.unused and not report.misfits, report.text()
    variables = jax.tree_util.tree_map_with_path(lambda keys, _: arrays[path_of(keys)], target)
    seen = lambda module, _: type(module).__name__ in ("FPN", "RegionProposals", "BoxHead")  # noqa: E731

    @jax.jit
    def run(variables, image):
        outputs, kept = model.apply(variables, image, train=False, capture_intermediates=seen)
        inside = {key: value["__call__"][0] for key, value in kept["intermediates"].items()}
        fields = {k: getattr(model, k) for k in models._keywords(maskrcnn.predict)}
        return inside, maskrcnn.predict(outputs, image, **fields)["instances"], outputs["kinds"]

    return model, run(variables, image)


def stored_objects(arch, size):
    """Boxes, scores, labels and masks that the library found in images of that size."""
    kind = f"{arch} " if size == parity.SIZE else f"{arch} resized "
    found = {key: STORED[kind + key] for key in ("boxes", "scores", "labels")}
    shape = (*found["scores"].shape, *size)
    masks = np.unpackbits(STORED[f"{kind}masks"])[: np.prod(shape)]
    return {**found, "masks": masks.reshape(shape).astype(bool)}


def close(got, wanted):
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def compare(arch, expected, parts):
    """All steps of one network with the library's, of which `parts` are known."""
    model, (inside, found, kinds) = ours(arch)
    whole = np.s_[:]
    for key in ("p2", "p5", "p6"):
        close(np.asarray(inside["fpn"][key])[parts.get(key, whole)], expected[key])
    objectness, codes = inside["rpn"]
    close(np.asarray(objectness)[..., None][parts.get("objectness", whole)], expected["objectness"])
    close(np.asarray(codes)[parts.get("codes", whole)], expected["codes"])
    anchors, counts = model.anchors({k: x.shape[1:3] for k, x in inside["fpn"].items()})
    propose = partial(model.propose, anchors, counts, parity.SIZE, False)
    proposals, there = jax.jit(jax.vmap(propose))(objectness, codes)
    np.testing.assert_allclose(proposals, expected["proposals"], atol=1e-2)
    np.testing.assert_array_equal(there, expected["proposals"].any(-1))
    levels = np.where(there, level_of(expected["proposals"], canonical=model.canonical), 0)
    for step in (1, 9, 7):  # of RoIs and logits, those that are stored
        assert set(levels[:, ::step].flat) - {0} == ({2, 3, 4, 5} if arch == "small" else {2})
    align = partial(model.align, inside["fpn"], model.box_size)
    rois = np.asarray(jax.jit(align)(expected["proposals"]))
    rois = np.where(np.asarray(there)[..., None, None, None], rois, 0)
    close(rois[parts.get("rois", whole)], expected["rois"])
    logits = np.asarray(inside["box"][0]).reshape(*there.shape, -1)
    logits = np.where(np.asarray(there)[..., None], logits, 0)
    close(logits[parts.get("logits", whole)], expected["logits"])
    np.testing.assert_array_equal(np.maximum(kinds, 0), expected["labels"])
    assert (expected["labels"] > 0).sum() > 20
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-4)
    np.testing.assert_allclose(found["boxes"], expected["boxes"], atol=1e-2)
    differ = np.asarray(found["masks"]) != expected["masks"]
    assert differ.sum() <= 1e-4 * expected["masks"].sum() and expected["masks"].sum() > 1000


@pytest.mark.slow
@pytest.mark.parametrize("arch", CASES)
def test_every_step_gives_the_librarys_stored_values(arch):
    expected = {key: STORED[f"{arch} {key}"] for key in (*parity.PARTS, "proposals")}
    compare(arch, {**expected, **stored_objects(arch, parity.SIZE)}, parity.PARTS)


@pytest.mark.filterwarnings("ignore")  # the library's own
@pytest.mark.slow
@pytest.mark.parametrize("arch", parity.ARCHS)
def test_every_step_gives_the_librarys_values_live(arch):
    for name in ("torch", "torchvision"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: the stored values are compared with instead")
    compare(arch, parity.run(parity.network(arch)), {})


def test_a_detector_of_one_class_has_a_background_beside_it(tmp_path):
    state = {"roi_heads.box_predictor.cls_score.weight": np.zeros((2, 1024), np.float32)}
    config = network(torchvision, "maskrcnn_resnet50_fpn", state, 0, "")
    assert (config.model.num_classes, config.model.things) == (2, (1,))
    catalog.write_classes(tmp_path / "classes.json", classes(config))
    assert len(catalog.read_classes(tmp_path / "classes.json")) == 2


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The predictor of a converted run, with few boxes, for images of the parity's size."""
    arch, folder = "maskrcnn_resnet50_fpn", tmp_path_factory.mktemp("converted")
    state = parity.random_weights(json.loads(str(STORED[f"{arch} shapes"])))
    np.savez(folder / "weights.npz", **state)
    hub.load(f"torchvision/{arch}", folder / "weights.npz", folder / "run")
    few = {"eval.resize": "(120, 90)", "model.detections.score": "0.03"}
    few |= {"model.detections.count": "30", "model.proposals.before": "(100, 100)"}
    return Predictor(folder / "run", [*few.items(), ("model.proposals.after", "(60, 60)")])


# Size of the images, and what part of the masks' pixels may differ: those of resized images we draw
# at the size that the network sees, and the library at their own. Those of random weights, noise of
# a pixel or two, then differ by 0.38.
SIZES = [(parity.SIZE, 1e-4), (parity.SMALLER, 0.4)]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "differing"), SIZES)
def test_a_converted_run_finds_in_images_what_the_library_finds(size, differing, converted):
    """With COCO's classes: ten of the 91 outputs are of none."""
    assert len(converted.classes) == converted.config.model.num_classes == 81
    assert len(converted.config.model.things) == 90
    expected = stored_objects("maskrcnn_resnet50_fpn", size)
    classes = np.array([-1, *converted.config.model.things])[expected["labels"]]
    for i, image in enumerate(parity.images(size)):
        found, kept = converted(np.float32(255 * image)).instances, classes[i] >= 0
        want = {key: value[i][kept] for key, value in expected.items()}
        assert kept.sum() > 20
        np.testing.assert_array_equal(found["classes"], classes[i][kept])
        np.testing.assert_allclose(found["scores"], want["scores"], atol=1e-4)
        np.testing.assert_allclose(found["boxes"], want["boxes"], atol=1e-2)
        differ = found["masks"] != want["masks"]
        assert differ.sum() <= differing * want["masks"].sum()
