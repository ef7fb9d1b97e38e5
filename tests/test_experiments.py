"""Every shipped experiment loads, locks, builds at its paper's size and traces a training step."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxseg import backbones, sharding
from jaxseg import config as configs
from jaxseg.data import catalog
from jaxseg.describe import count_macs, network_facts
from jaxseg.main import resolve
from jaxseg.train import build, check_sizes

FOLDER = Path(__file__).parents[1] / "experiments"
ARGUMENTS = {
    "quickstart": [""],
    "unet": [
        "",
        "variant=original,in_channels=1,num_classes=2",
        "variant=same,width=16",
        "dataset=camvid,variant=same",
        "dataset=isbi2012,variant=same",
    ],
    "deeplabv3": ["", "backbone=resnet50,output_stride=8,stem=deep"],
    "deeplabv3plus": ["", "backbone=resnet101,stem=deep", "dataset=camvid"],
}
CASES = [(name, arguments) for name, all_ in ARGUMENTS.items() for arguments in all_]


def load(name, arguments):
    path = FOLDER / f"{name}.py"
    return resolve(f"{path}:{arguments}" if arguments else str(path), [])


def test_every_experiment_is_tested_here():
    assert {p.stem for p in FOLDER.glob("*.py")} == ARGUMENTS.keys()


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_an_experiment_builds_and_traces_its_training_step(name, arguments):
    config = load(name, arguments)
    assert config.is_locked and config.model.is_locked and config.loss.is_locked
    assert config.model.num_classes == len(catalog.classes(config.data.dataset))
    mesh = sharding.make_mesh(config.mesh)
    if config.train.batch % jax.device_count():
        config.train.batch *= jax.device_count()
    check_sizes(config, mesh)
    target, _, step = build(config, mesh)
    shape = (config.train.batch, *config.data.crop)
    batch = {
        "image": jax.ShapeDtypeStruct((*shape, config.data.channels), jnp.uint8),
        "label": jax.ShapeDtypeStruct(shape, jnp.int32),
        "valid": jax.ShapeDtypeStruct(shape[:1], jnp.bool_),
    }
    state, logs = jax.eval_shape(step, target, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), target
    )
    assert {"loss", "lr", "grad_norm"} <= logs.keys()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_experiment_says_what_it_reproduces_and_how_to_run_it(name):
    text = (FOLDER / f"{name}.py").read_text()
    docstring = text.split('"""')[1]
    assert f"--config experiments/{name}.py" in docstring
    assert "Not run." in docstring or "Measured" in docstring


@pytest.mark.parametrize(
    ("name", "arguments", "size", "expected"),
    [
        (
            "unet",
            "variant=original,in_channels=1,num_classes=2",
            (572, 572),
            {"params": 31_030_658, "output_stride": 1},
        ),
        (
            "deeplabv3plus",
            "backbone=resnet101,stem=deep,num_classes=21",
            (513, 513),
            {"params": 59_468_085, "output_stride": 16},
        ),
    ],
)
def test_describe_gives_the_published_counts(name, arguments, size, expected):
    facts = network_facts(load(name, arguments), size)
    assert facts["params"] == facts["params_without_aux"] == expected["params"]
    assert facts["output_stride"] == expected["output_stride"]
    assert facts["train_memory_bytes"] > 16 * facts["params"]


def test_macs_of_the_unet_are_those_of_its_convolutions():
    """By hand, for two levels of widths 2 and 4 on an 8 x 8 image with one channel."""
    config = load("unet", "variant=same,in_channels=1,num_classes=2")
    configs.override(config, [("model.widths", "(2, 4)"), ("model.patch", "1")])
    top = 64 * 9 * (1 * 2 + 2 * 2 + 4 * 2 + 2 * 2) + 64 * 2 * 2
    bottom = 16 * 9 * (2 * 4 + 4 * 4) + 16 * 4 * (4 * 2)
    assert network_facts(config, (8, 8))["macs"] == top + bottom


@pytest.mark.parametrize(("depth", "macs"), [(50, 4_089_184_256), (101, 7_801_405_440)])
def test_macs_of_a_resnet_are_those_published_less_the_classifier(depth, macs):
    net = backbones.find(f"resnet{depth}")()
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(partial(net.init, train=False), jax.random.key(0), image)
    assert count_macs(net, variables, image)[0] == macs - 2048 * 1000


def test_the_kept_activations_grow_with_the_batch():
    config = load("unet", "variant=same,width=8")
    small = network_facts(config, (64, 64))["train_memory_bytes"]
    configs.override(config, [("train.batch", str(2 * config.train.batch))])
    assert 1.5 < network_facts(config, (64, 64))["train_memory_bytes"] / small < 2.1


def test_a_known_data_set_gives_its_class_count_without_its_files(monkeypatch):
    monkeypatch.delenv("JAXSEG_DATA", raising=False)
    assert load("deeplabv3plus", "dataset=camvid").model.num_classes == 11
