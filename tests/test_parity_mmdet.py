"""SOLO and SOLOv2 compute what MMDetection's do, from the same random weights, image to objects.

Against stored values everywhere; live where mmdet is installed.
"""

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg import hub, models
from jaxseg.optim import path_of
from jaxseg.pretrained import flat
from jaxseg.verbs.convert import SOURCES, network
from jaxseg.verbs.predict import Predictor
from jaxseg.weights.names import fit

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "scripts"))
parity = importlib.import_module("parity_mmdet")

STORED = np.load(HERE / "references" / "mmdet.npz", allow_pickle=False)
QUICK = "solov2-light_r18_fpn"
CASES = [pytest.param(a, marks=[] if a == QUICK else pytest.mark.slow) for a in parity.ARCHS]
TOLERANCE = 1e-4  # of the largest value of a map
OBJECTS = ("masks", "labels", "scores")


def shapes_of(arch):
    return json.loads(str(STORED[f"{arch} shapes"]))


@cache
def ours(arch, dtype):
    """What our converted network says, as `parity.outputs` has it."""
    state = parity.random_weights(arch, shapes_of(arch))
    config = network(SOURCES["mmdet"], arch, state, 0, "")
    model, loss, predict = models.build(config)
    x = jnp.asarray(parity.image(parity.SIZE))
    target = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    names = {name: value.shape for name, value in flat(target).items()}
    arrays, report = fit(state, SOURCES["mmdet"].rules(arch), names)
    assert not report.missing and not report.unused and not report.misfits, report.text()
    variables = jax.tree_util.tree_map_with_path(lambda keys, _: arrays[path_of(keys)], target)
    masks, classes, boxes = parity.objects()
    batch = {"masks": masks, "classes": classes, "boxes": boxes}
    batch = {**batch, "crowd": np.zeros(len(classes), bool)}

    @jax.jit
    def run(variables, x):
        variables, x = jax.tree.map(lambda a: a.astype(dtype), (variables, x))
        outputs = model.apply(variables, x, train=False)
        losses = loss(outputs, jax.tree.map(lambda a: jnp.asarray(a)[None], batch))[1]
        return outputs, losses, predict(outputs, x)["instances"]

    with jax.enable_x64(dtype == np.float64):
        outputs, losses, found = jax.tree.map(np.asarray, run(variables, x))
        drawn = maps(outputs)
    assert losses["dropped"] == 0
    there = found["classes"][0] >= 0
    kept = {key: value[0][there] for key, value in found.items()}
    return {
        **drawn,
        **{"masks": kept["masks"], "scores": kept["scores"], "labels": kept["classes"]},
        "losses": np.array([losses["category_loss"], 3 * losses["mask_loss"]]),
    }


def maps(outputs):
    """Our outputs as theirs: the masks of all cells of SOLO, of the features and kernels."""
    arrays = {k: v[0] for k, v in outputs.items() if v.ndim == 4 and "features" not in k}
    for level in range(2, 7):
        if f"biases{level}" in outputs:
            y = outputs[f"features{level}"] @ outputs[f"kernels{level}"].T
            size = (2 * y.shape[1], 2 * y.shape[2], y.shape[3])
            y = jax.image.resize(y[0], size, "bilinear", antialias=False)
            arrays[f"masks{level}"] = np.asarray(y) + outputs[f"biases{level}"]
    if "mask_features" in outputs:
        arrays["mask_features"] = outputs["mask_features"][0]
    return arrays


def agree(arch, expected, part):
    """Maps and losses in float32, and all in float64, where the same pixels are in a mask.

    A mask holds what is above 0.5, and of the random ones' many pixels some are so near that
    float32's last bit, which differs by processor, decides; a small mask's score then differs.
    """
    compare(part(ours(arch, np.float64)), expected)
    drawn = {key: value for key, value in expected.items() if key not in OBJECTS}
    got = part(ours(arch, np.float32))
    compare({key: got[key] for key in drawn}, drawn)


def compare(got, expected):
    assert got.keys() == expected.keys()
    for key, want in expected.items():
        have = got[key]
        assert have.shape == want.shape, key
        if key == "masks":
            assert (have != want).mean() <= 1e-4
        elif key == "labels":
            np.testing.assert_array_equal(have, want)
        else:
            largest = np.abs(want).max()
            assert np.abs(have - want).max() <= TOLERANCE * largest, key


@pytest.mark.slow
@pytest.mark.parametrize("arch", CASES)
def test_the_network_gives_mmdets_stored_maps_losses_and_objects(arch):
    expected = {k.partition(" ")[2]: v for k, v in STORED.items() if k.startswith(f"{arch} ")}
    del expected["shapes"]
    assert len(expected["scores"]) >= 10
    agree(arch, expected, parity.thinned)


@pytest.mark.filterwarnings("ignore")  # the libraries warn of each other
@pytest.mark.slow
@pytest.mark.parametrize("arch", parity.ARCHS)
def test_the_network_gives_mmdets_maps_losses_and_objects_live(arch):
    pytest.importorskip("mmdet")
    net = parity.network(arch)
    assert shapes_of(arch) == {k: list(v) for k, v in parity.shapes_of(net).items()}
    agree(arch, parity.outputs(net), dict)


@pytest.mark.slow
def test_a_converted_run_finds_in_the_image_what_mmdet_finds(tmp_path):
    state = parity.random_weights(QUICK, shapes_of(QUICK))
    np.savez(tmp_path / "weights.npz", **state)
    hub.load(f"mmdet/{QUICK}", tmp_path / "weights.npz", tmp_path / "run")
    predictor = Predictor(tmp_path / "run", [("eval.resize", f"{parity.SIZE[::-1]}")])
    data = predictor.config.data
    image = np.float32(parity.image(parity.SIZE)[0] * data.std + data.mean)
    found = predictor(image).instances
    got = {"masks": found["masks"][:, ::4, ::4], "scores": found["scores"]}
    got["labels"] = found["classes"]
    compare(got, {key: STORED[f"{QUICK} {key}"] for key in got})
