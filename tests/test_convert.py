"""The verb `convert`, the hub, and a backbone to start from: what fits, and what is refused."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_parity import STORED, full_size, parity

from jaxseg import backbones, hub
from jaxseg.convert import convert
from jaxseg.errors import InputError
from jaxseg.main import run
from jaxseg.predict import Predictor
from jaxseg.pretrained import load_backbone

ARCH = "Unet/resnet18"


def weights(source=("smp"), arch=ARCH):
    return parity.random_state(json.loads(str(STORED[f"{source} {arch} shapes"])))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A file with random weights of smp's Unet on a ResNet-18, five classes."""
    path = tmp_path_factory.mktemp("weights") / "unet.npz"
    np.savez(path, **weights())
    return path


@pytest.fixture(scope="module")
def converted(checkpoint) -> Path:
    workdir = checkpoint.parent / "run"
    names = ["--source", "smp", "--arch", ARCH, "--checkpoint", str(checkpoint)]
    assert run(["convert", *names, "--workdir", str(workdir)]) == 0
    return workdir


def test_a_converted_run_predicts_what_the_library_does(converted):
    predictor = Predictor(converted)
    assert predictor.config.model.num_classes == 5 and len(predictor.classes) == 5
    height, width = parity.SIZES[0]
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    data = predictor.config.data
    x = (pixels - np.array(data.mean)) / np.array(data.std)
    parity_image = parity.image
    try:
        parity.image = lambda size: x[None].astype(np.float32)
        expected = full_size("smp", ARCH, (height, width))
    finally:
        parity.image = parity_image
    got = predictor(pixels).logits
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


def test_the_report_tells_what_was_mapped(checkpoint, tmp_path, capsys):
    assert convert("smp", ARCH, checkpoint, tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "missing 0" in out and "unused 0" in out and "re-initialised" not in out


def test_another_class_count_makes_a_new_classifier_and_says_so(checkpoint, tmp_path, capsys):
    assert convert("smp", ARCH, checkpoint, tmp_path / "run", num_classes=3) == 0
    out = capsys.readouterr().out
    assert "re-initialised, to be trained" in out and "classifier/kernel" in out
    assert Predictor(tmp_path / "run").config.model.num_classes == 3


@pytest.mark.parametrize(
    ("source", "arch", "message"),
    [
        ("keras", ARCH, "torchvision"),
        ("smp", "Unet/resnet81", "resnet18"),
        ("smp", "Unet/resnet34", "not a smp Unet/resnet34"),
        ("torchvision", "fcn_resnet50", "classifier.4.weight"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(source, arch, message, checkpoint, tmp_path):
    with pytest.raises(InputError, match=message):
        convert(source, arch, checkpoint, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_workdir_with_a_run_is_not_overwritten(checkpoint, converted):
    with pytest.raises(InputError, match="another --workdir"):
        convert("smp", ARCH, checkpoint, converted)


def test_an_array_of_another_shape_is_named(checkpoint, tmp_path):
    state = weights()
    state["decoder.blocks.0.conv1.0.weight"] = state["decoder.blocks.0.conv1.0.weight"][:7]
    path = tmp_path / "odd.npz"
    np.savez(path, **state)
    with pytest.raises(InputError, match=r"misfits 1: decoder.blocks.0.conv1.0.weight"):
        convert("smp", ARCH, path, tmp_path / "run")


def test_the_hub_knows_its_names_and_converts_once(checkpoint, tmp_path):
    assert {"torchvision/deeplabv3_resnet101", f"smp/{ARCH}"} <= set(hub.list())
    assert "unet.py:recipe=smp,backbone=resnet18" in hub.help(ARCH)
    predictor = hub.load(ARCH, checkpoint, tmp_path / "hub")
    again = hub.load(f"smp/{ARCH}", tmp_path / "gone.npz", tmp_path / "hub")
    assert predictor.step == again.step == 0
    with pytest.raises(InputError, match="Did you mean"):
        hub.help("torchvision/deeplabv3_resnet11")


def variables_of(name, **fields):
    """Zeros for a network whose backbone is `name`."""
    net = backbones.find(name)(**fields)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    tree = jax.eval_shape(partial(net.init, train=False), jax.random.key(0), image)
    tree = {k: {"backbone": v, "classifier": {"kernel": v}} for k, v in tree.items()}
    return jax.tree.map(lambda x: jnp.zeros(x.shape), tree)


def test_a_backbone_starts_from_a_file_of_another_library(tmp_path, capsys):
    state = {k.removeprefix("encoder."): v for k, v in weights().items() if "encoder." in k}
    path = tmp_path / "resnet18.npz"
    np.savez(path, **state, **{"fc.weight": np.ones((10, 512), np.float32)})
    filled = load_backbone(path, "resnet18", variables_of("resnet18"))
    kernel = filled["params"]["backbone"]["conv3"]["unit1"]["shortcut"]["conv"]["kernel"]
    theirs = state["layer2.0.downsample.0.weight"]
    np.testing.assert_array_equal(kernel, theirs.transpose(2, 3, 1, 0))
    assert not any(jnp.any(x) for x in jax.tree.leaves(filled["params"]["classifier"]))
    assert "unused: 1" in capsys.readouterr().out
    with pytest.raises(InputError, match="not a resnet34"):
        load_backbone(path, "resnet34", variables_of("resnet34"))
