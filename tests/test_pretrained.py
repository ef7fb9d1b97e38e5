"""Backbones from files of other libraries: what fits, what is said aloud, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import EXPERIMENTS, trace
from test_parity import STORED, parity

from jaxseg import backbones, models
from jaxseg.errors import InputError
from jaxseg.experiment import resolve
from jaxseg.pretrained import differences, load_backbone
from jaxseg.train import load_variables, train
from jaxseg.weights import imagenet


def resnet18(**extra):
    """The arrays of a ResNet-18 under torchvision's names, random."""
    shapes = json.loads(str(STORED["smp Unet/resnet18 shapes"]))
    state = parity.random_state({k: v for k, v in shapes.items() if k.startswith("encoder.")})
    return {k.removeprefix("encoder."): v for k, v in state.items()} | extra


def saved(path, state):
    np.savez(path, **state)
    return path


def config_of(arguments, **overrides):
    name, _, rest = arguments.partition(":")
    pairs = [(key.replace("__", "."), value) for key, value in overrides.items()]
    return resolve(f"{EXPERIMENTS / name}:{rest}", pairs)


def zeros(name, **fields):
    """Variables of a network whose backbone is `name`, all zero."""
    net = backbones.find(name)(**fields)
    tree, _ = trace(net, (64, 64))
    tree = {k: {"backbone": v, "classifier": {"kernel": v}} for k, v in tree.items()}
    return jax.tree.map(lambda x: jnp.zeros(x.shape), tree)


PLAIN = "pspnet.py:recipe=mmseg,stem=7x7,backbone=resnet18"


def test_the_file_of_a_larger_network_is_refused(tmp_path):
    """It has every name of the smaller one, and would load without a word."""
    more = {"layer1.2.conv1.weight": np.ones((64, 64, 3, 3), np.float32)}  # ResNet-34's
    path = saved(tmp_path / "resnet34.npz", resnet18(**more))
    with pytest.raises(InputError, match=r"1 of the file have no place in it: layer1.2.conv1"):
        load_backbone(path, config_of(PLAIN), zeros("resnet18"))


@pytest.mark.parametrize("name", ["fc.weight", "fc.bias", "head.fc.weight", "classifier.1.bias"])
def test_a_classifier_in_the_file_is_left_out(name, tmp_path):
    path = saved(tmp_path / "resnet18.npz", resnet18(**{name: np.ones(3, np.float32)}))
    load_backbone(path, config_of(PLAIN), zeros("resnet18"))


def test_the_backbone_of_a_whole_network_is_found_in_its_file(tmp_path):
    state = {f"backbone.{k}": v for k, v in resnet18().items()}
    state["classifier.0.convs.0.0.weight"] = np.ones((4, 4, 1, 1), np.float32)
    path = saved(tmp_path / "network.npz", state)
    load_backbone(path, config_of(PLAIN), zeros("resnet18"))
    state["backbone.layer4.2.conv1.weight"] = np.ones((4, 4, 3, 3), np.float32)
    with pytest.raises(InputError, match="no place in it: backbone.layer4.2"):
        load_backbone(saved(path, state), config_of(PLAIN), zeros("resnet18"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (PLAIN, []),
        ("deeplabv3.py:backbone=resnet50", ["strides is tensorflow"]),
        ("deeplabv2.py:backbone=resnet50", ["strides is caffe", "data.mean and data.std"]),
        ("deeplabv3plus.py:backbone=mobilenetv2", ["data.mean and data.std"]),
        ("deeplabv3plus.py:backbone=xception65", []),
        ("deeplabv3plus.py:recipe=timm,backbone=mobilenetv3_large", []),
        ("segnet.py:", []),
        ("segnet.py:variant=basic", ["data.mean and data.std"]),
    ],
)
def test_other_strides_and_another_input_are_said_aloud(arguments, words):
    lines = differences(config_of(arguments))
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))


def test_what_differs_is_printed_at_load(tmp_path, capsys):
    path = saved(tmp_path / "resnet18.npz", resnet18())
    config = config_of("pspnet.py:backbone=resnet18,stem=7x7")
    load_backbone(path, config, zeros("resnet18"))
    assert "WARNING: model.backbone.strides is caffe" in capsys.readouterr().out


def vgg16_bn():
    """Random arrays under the names that torchvision's VGG-16 has, norms included."""
    names = [rule[0].replace("\\", "") for rule in imagenet.rules("vgg16_bn")]
    widths = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), *[(256, 256)] * 2]
    widths += [(256, 512), *[(512, 512)] * 5]
    state = {}
    for i, (before, after) in enumerate(widths):
        conv, norm = names[i], names[13 + i]
        state[f"{conv}.weight"] = np.full((after, before, 3, 3), i, np.float32)
        state[f"{conv}.bias"] = np.full(after, i, np.float32)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            state[f"{norm}.{leaf}"] = np.full(after, 100 + i, np.float32)
    return state


def test_segnet_starts_from_vgg16_with_batch_norm(tmp_path):
    config = config_of("segnet.py:")
    shapes, _ = trace(models.build(config)[0], (32, 32))
    path = saved(tmp_path / "vgg16_bn.npz", vgg16_bn())
    variables = load_backbone(path, config, jax.tree.map(lambda x: jnp.full(x.shape, -1.0), shapes))
    encoder = variables["params"]["backbone"]
    assert np.all(encoder["conv1_1"]["conv"]["kernel"] == 0)
    assert np.all(encoder["conv5_3"]["conv"]["kernel"] == 12)
    assert np.all(variables["batch_stats"]["backbone"]["conv5_3"]["norm"]["var"] == 112)
    assert np.all(variables["params"]["classifier"]["kernel"] == -1)


def test_a_network_without_a_backbone_says_what_to_do(tmp_path):
    config = config_of("unet.py:variant=same")
    with pytest.raises(InputError, match="unet has no backbone: set model.backbone.name"):
        load_backbone(tmp_path / "any.npz", config, {"params": {}})


@pytest.mark.slow
def test_training_starts_from_the_backbone_of_a_file(tmp_path, few_scenes, capsys):
    path = saved(tmp_path / "resnet18.npz", resnet18())
    overrides = {
        **{"data.dataset": "shapes", "data.crop": "(64,64)", "data.resize": "(0,0)"},
        **{"train.batch": "8", "train.steps": "1", "eval.pictures": "0", "optim.lr": "1e-9"},
        **{"optim.min_lr": "0.0", "init.backbone": str(path), "model.num_classes": "8"},
    }
    config = resolve(f"{EXPERIMENTS / 'pspnet.py'}:{PLAIN.partition(':')[2]}", [*overrides.items()])
    assert train(config, tmp_path / "run") == 0
    assert f"backbone resnet18 from {path}" in capsys.readouterr().out
    variables = load_variables(tmp_path / "run")[2]
    got = variables["params"]["backbone"]["conv2"]["unit1"]["conv1"]["conv"]["kernel"]
    want = resnet18()["layer1.0.conv1.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_allclose(got, want, atol=1e-6)
