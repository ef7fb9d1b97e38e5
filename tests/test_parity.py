"""Our networks compute what the PyTorch libraries' do, from the same random weights.

Against stored values everywhere; live, and through a training step, where the libraries are there.
"""

import importlib.util
import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg import backbones, models
from jaxseg.backbones.layers import Norm
from jaxseg.optim import path_of
from jaxseg.pretrained import flat
from jaxseg.verbs.convert import SOURCES, network
from jaxseg.weights import imagenet
from jaxseg.weights.names import fit

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("parity", HERE.parent / "scripts" / "parity.py")
parity = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parity)

STORED = np.load(HERE / "references" / "parity.npz", allow_pickle=False)
ALL = [(source, arch) for source, archs in parity.CASES.items() for arch in archs]
QUICK = [("smp", "Unet/resnet18")]
CASES = [pytest.param(*c, marks=[] if c in QUICK else pytest.mark.slow) for c in ALL]
TOLERANCE = 1e-4  # of the largest logit
# Its logits are compared in float64: in float32 torch's own are 1.4e-4 from torch's in float64.
DOUBLE = ("deeplabv3_mobilenet_v3_large",)


@cache
def ours(source, arch):
    """(config, network, predict, variables): ours, with the state that the names stand for."""
    shapes = json.loads(str(STORED[f"{source} {arch} shapes"]))
    state = parity.random_state(shapes)
    config = network(SOURCES[source], arch, state, 0, "")
    model, _, predict = models.build(config)
    small = jnp.zeros((1, *parity.SIZES[0], 3))
    target = jax.eval_shape(lambda: model.init(jax.random.key(0), small, train=False))
    names = {name: value.shape for name, value in flat(target).items()}
    arrays, report = fit(state, SOURCES[source].rules(arch), names)
    assert not report.missing and not report.unused and not report.misfits, report.text()
    variables = jax.tree_util.tree_map_with_path(lambda keys, _: arrays[path_of(keys)], target)
    return config, model, predict, variables


def near(got, expected):
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


def full_size(source, arch, size):
    """Our logits [H,W,K] for the image of `size`."""
    _, model, predict, variables = ours(source, arch)
    with jax.enable_x64(arch in DOUBLE):
        dtype = np.float64 if arch in DOUBLE else np.float32
        image = jnp.asarray(parity.image(size), dtype)
        variables = jax.tree.map(lambda x: jnp.asarray(x, dtype), variables)
        run = jax.jit(lambda v, x: predict(model.apply(v, x, train=False), x)["logits"])
        return np.asarray(run(variables, image)[0])


@pytest.mark.parametrize(("source", "arch"), CASES)
def test_the_network_gives_the_librarys_stored_logits(source, arch):
    for size in parity.sizes(source, arch):
        expected = STORED[f"{source} {arch} {size[0]}x{size[1]}"]
        got = full_size(source, arch, size)[::13, ::13]
        near(got, expected)


@pytest.mark.filterwarnings("ignore")  # the libraries warn of each other
@pytest.mark.slow
@pytest.mark.parametrize(("source", "arch"), ALL)
def test_the_network_gives_the_librarys_logits_live(source, arch):
    net = live(source, arch)
    for size in parity.sizes(source, arch):
        expected = parity.logits(source, net, size)
        got = full_size(source, arch, size)
        near(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", parity.BACKBONES)
def test_a_backbone_gives_timms_features(name):
    """Xception too, whose separable modules no network above has."""
    ours, fields = parity.BACKBONES[name]
    fields = dict(fields)
    if "epsilon" in fields:
        fields["norm"] = Norm(epsilon=fields.pop("epsilon"))
    net = backbones.find(ours)(**fields)
    image = jnp.asarray(parity.image(parity.SIZES[1]))
    target = jax.eval_shape(lambda: net.init(jax.random.key(0), image, train=False))
    target = {key: {"backbone": tree} for key, tree in target.items()}
    state = parity.random_state(json.loads(str(STORED[f"timm {name} shapes"])))
    names = {key: value.shape for key, value in flat(target).items()}
    arrays, report = fit(state, imagenet.rules(ours), names)
    assert not report.missing and not report.misfits, report.text()
    filled = jax.tree_util.tree_map_with_path(lambda keys, _: arrays[path_of(keys)], target)
    variables = {key: tree["backbone"] for key, tree in filled.items()}
    got = jax.jit(lambda v, x: net.apply(v, x, train=False)["c5"])(variables, image)
    expected = STORED[f"timm {name}"]
    near(np.asarray(got[0])[..., ::64], expected)


@pytest.mark.filterwarnings("ignore")  # the libraries warn of each other
@pytest.mark.slow
@pytest.mark.parametrize(("source", "arch"), ALL)
def test_a_training_step_has_the_librarys_loss_and_gradients(source, arch):
    """Of the first and last layers, in float64: normalisation by the batch, ignored pixels, aux."""
    net = live(source, arch)
    size = parity.SIZES[0]
    expected, theirs = parity.training_step(source, net, size)
    config, _, _, variables = ours(source, arch)
    with config.unlocked():
        for key in ("dropout", "aux_dropout", "head_dropout"):
            if key in config.model:
                config.model[key] = 0.0
        if "aux_weight" in config.loss:
            config.loss.aux_weight = 0.4
        config.loss.pixel = {"name": "cross_entropy"}
        models.complete(config)
    model, loss, _ = models.build(config)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), variables["params"])
        stats = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), variables["batch_stats"])
        batch = {"label": jnp.asarray(parity.labels(size))}

        def objective(params):
            state = {"params": params, "batch_stats": stats}
            x = jnp.asarray(parity.images(size), jnp.float64)
            options = {"rngs": {"dropout": jax.random.key(0)}, "mutable": ["batch_stats"]}
            outputs, _ = model.apply(state, x, train=True, **options)
            return loss(outputs, batch)[0]

        value, gradient = jax.jit(jax.value_and_grad(objective))(params)
    assert abs(float(value) - expected) <= 1e-5 * expected
    shapes = {name: leaf.shape for name, leaf in flat({"params": params}).items()}
    arrays, _ = fit(theirs, SOURCES[source].rules(arch), shapes)
    names = [k for k in arrays if k.endswith("kernel")]
    first = [k for k in names if "stem" in k or "down0_1" in k][:1]
    last = [k for k in names if "classifier" in k and "aux" not in k][:1]
    for name in (*first, *last):
        got = np.asarray(flat({"params": gradient})[name])
        error = np.abs(got - arrays[name]).max() / np.abs(arrays[name]).max()
        assert error <= 1e-3, f"{name}: {error:.1e}"
    assert len(first) == len(last) == 1


def live(source, arch):
    """The library's network with its random weights, or a skip where the library is missing."""
    modules = {"torchvision": "torchvision", "smp": "segmentation_models_pytorch", "mmseg": "mmseg"}
    for name in ("torch", modules[source]):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: the stored values are compared with instead")
    return parity.fill(parity.network(source, arch))
