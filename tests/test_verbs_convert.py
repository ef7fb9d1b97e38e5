"""The verb `convert` and the hub: what fits, and what is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_parity import STORED, full_size, live, parity

from jaxseg import hub, models, sharding
from jaxseg.errors import InputError
from jaxseg.main import run
from jaxseg.train import build
from jaxseg.verbs.convert import SOURCES, convert, network
from jaxseg.verbs.predict import Predictor

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_report_tells_what_was_mapped(checkpoint, tmp_path, capsys):
    assert convert("smp", ARCH, checkpoint, tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "missing 0" in out and "unused 0" in out and "re-initialised" not in out


@pytest.mark.slow
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


def test_a_network_of_one_sigmoid_is_refused(tmp_path):
    state = weights()
    for key in ("weight", "bias"):
        state[f"segmentation_head.0.{key}"] = state[f"segmentation_head.0.{key}"][:1]
    np.savez(tmp_path / "one.npz", **state)
    with pytest.raises(InputError, match="has one class, a sigmoid.*--num_classes 2 makes a new"):
        convert("smp", ARCH, tmp_path / "one.npz", tmp_path / "run")


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_hub_knows_its_names_and_converts_once(checkpoint, tmp_path):
    assert {"torchvision/deeplabv3_resnet101", f"smp/{ARCH}"} <= set(hub.list())
    assert "unet.py:recipe=smp,backbone=resnet18" in hub.help(ARCH)
    predictor = hub.load(ARCH, checkpoint, tmp_path / "hub")
    again = hub.load(f"smp/{ARCH}", tmp_path / "gone.npz", tmp_path / "hub")
    assert predictor.step == again.step == 0
    with pytest.raises(InputError, match="Did you mean"):
        hub.help("torchvision/deeplabv3_resnet11")


def saved(path, state):
    np.savez(path, **state)
    return path


def test_the_file_of_a_larger_network_is_refused(tmp_path):
    """A deeper encoder has every name of this one, and would fit without a word."""
    state = {**weights(), "encoder.layer1.2.conv1.weight": np.ones((64, 64, 3, 3), np.float32)}
    path = saved(tmp_path / "larger.npz", state)
    with pytest.raises(InputError, match=r"1 of the file have no place(.|\n)*layer1.2.conv1"):
        convert("smp", ARCH, path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_a_source_is_known_to_add_is_left_out(tmp_path):
    state = {**weights(), "classification_head.3.weight": np.ones((2, 512), np.float32)}
    assert convert("smp", ARCH, saved(tmp_path / "aux.npz", state), tmp_path / "run") == 0


def encoder():
    """A ResNet-18 as timm's files have it: with its classifier."""
    state = {k.removeprefix("encoder."): v for k, v in weights().items() if "encoder." in k}
    return {**state, "fc.weight": np.ones((10, 512), np.float32), "fc.bias": np.ones(10)}


@pytest.mark.parametrize("arch", ["resnet34", "resnet50"])
def test_only_the_head_may_be_new_where_the_source_has_none(arch, tmp_path):
    with pytest.raises(InputError, match=f"not a timm {arch}"):
        convert("timm", arch, saved(tmp_path / "resnet18.npz", encoder()), tmp_path / "run")


def test_help_and_readme_name_every_source(capsys):
    with pytest.raises(SystemExit):
        run(["convert", "--help"])
    said = capsys.readouterr().out
    assert all(re.search(rf"\b{source}\b", said) for source in SOURCES)
    names = {
        "smp": "segmentation_models.pytorch",
        "mmseg": "MMSegmentation",
        "mmdet": "MMDetection",
    }
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    sentence = readme[readme.index("Weights that ") : readme.index(" trained become a run")]
    assert all(names.get(source, source) in sentence for source in SOURCES)


@pytest.mark.slow
def test_a_classifier_of_timm_gets_a_new_head(tmp_path, capsys):
    path = saved(tmp_path / "resnet18.npz", encoder())
    assert convert("timm", "resnet18", path, tmp_path / "run", num_classes=3) == 0
    fresh = capsys.readouterr().out.split("re-initialised, to be trained: ")[1]
    assert "backbone/" not in fresh and "aspp/project" in fresh
    config = Predictor(tmp_path / "run").config
    assert config.model.num_classes == 3 and config.model.backbone.strides == "pytorch"


@pytest.mark.parametrize("arch", SOURCES["timm"].ARCHS)
def test_timms_backbones_keep_their_strides_norms_and_input(arch):
    config = network(SOURCES["timm"], arch, {}, 0, "")
    backbone = config.model.backbone
    if "strides" in backbone:
        assert backbone.strides == "pytorch" and backbone.multi_grid == (1, 1, 1)
    inception = arch.startswith("xception")
    assert backbone.norm.epsilon == (1e-3 if inception else 1e-5)
    assert config.data.mean == ((127.5,) * 3 if inception else (123.675, 116.28, 103.53))
    assert config.data.std == ((127.5,) * 3 if inception else (58.395, 57.12, 57.375))
    models.build(config)


SEGMENTERS = [a for a in SOURCES["torchvision"].ARCHS if a not in SOURCES["torchvision"].DETECTORS]


@pytest.mark.slow
@pytest.mark.parametrize("arch", SEGMENTERS)
def test_a_network_of_torchvision_without_its_auxiliary_head_builds(arch):
    """aux_loss=False: no rule of the optimizer may ask for the head's parameters."""
    config = network(SOURCES["torchvision"], arch, {"classifier.4.weight": np.ones((21, 1))}, 0, "")
    assert config.model.aux == 0 and config.optim.multipliers == ()
    target, _, _ = build(config, sharding.make_mesh(config.mesh))
    assert "aux" not in target.params


@pytest.mark.slow
def test_a_state_of_torchvision_without_its_auxiliary_head_converts(tmp_path):
    arch = "deeplabv3_mobilenet_v3_large"
    state = {k: v for k, v in weights("torchvision", arch).items() if "aux" not in k}
    path = saved(tmp_path / "plain.npz", state)
    assert convert("torchvision", arch, path, tmp_path / "run") == 0
    assert Predictor(tmp_path / "run").config.model.aux == 0
    assert run(["describe", "--workdir", str(tmp_path / "run"), "--json"]) == 0


@pytest.mark.slow
def test_the_hub_tells_networks_and_files_apart(checkpoint, tmp_path):
    place = tmp_path / "hub"
    hub.load(ARCH, checkpoint, place)
    with pytest.raises(InputError, match=rf"holds smp/{ARCH}, asked for smp/PSPNet/resnet18"):
        hub.load("smp/PSPNet/resnet18", checkpoint, place)
    other = saved(tmp_path / "other.npz", {**weights(), "one.num_batches_tracked": np.ones(())})
    with pytest.raises(InputError, match=rf"holds smp/{ARCH} of another file"):
        hub.load(ARCH, other, place)
    hub.load(ARCH, checkpoint, place)


def test_the_hub_needs_no_import_of_its_own():
    code = "import sys, jaxseg; assert 'jax' not in sys.modules; print(len(jaxseg.hub.list()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(hub.list())


@pytest.mark.filterwarnings("ignore")  # the library warns of itself
@pytest.mark.slow
def test_a_file_that_torch_saved_gives_torchvisions_own_output(tmp_path):
    """From the .pth to predict's logits, through the command line, against the library live."""
    arch = "deeplabv3_resnet101"
    net = live("torchvision", arch)
    import torch

    height, width = 65, 97
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    x = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    x = torch.from_numpy(x.transpose(2, 0, 1)[None])
    with torch.no_grad():
        scale = 10 / net.double()(x)["out"].abs().max()  # random weights have logits of any size
        last = net.classifier[4]
        last.weight *= scale
        last.bias *= scale
        expected = net(x)["out"][0].numpy().transpose(1, 2, 0)
    torch.save(net.float().state_dict(), tmp_path / "weights.pth")

    workdir, labels = str(tmp_path / "run"), tmp_path / "labels"
    names = ["--source", "torchvision", "--arch", arch, "--workdir", workdir]
    assert run(["convert", *names, "--checkpoint", str(tmp_path / "weights.pth")]) == 0
    images = ["--input", str(tmp_path / "image.png"), "--output", str(labels), "--save_logits"]
    assert run(["predict", "--workdir", workdir, *images]) == 0
    got = np.load(labels / "image.npz")["logits"]
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=1e-3)
