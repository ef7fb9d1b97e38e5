"""Every shipped experiment loads, locks, builds at its paper's size and traces a training step."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg import backbones, models, sharding
from jaxseg import config as configs
from jaxseg.data import catalog
from jaxseg.data.sources import Shapes
from jaxseg.experiment import resolve
from jaxseg.macs import count_macs
from jaxseg.optim import make_optimizer, path_of
from jaxseg.train import build, check_sizes, init_state
from jaxseg.verbs.describe import network_facts

FOLDER = Path(__file__).parents[1] / "experiments"
ARGUMENTS = {
    "fcn": [
        *("", "variant=32s,dataset=camvid", "upsampling=all"),
        *("recipe=torchvision", "recipe=mmseg"),
    ],
    "segnet": ["", "variant=basic", "dataset=voc2012"],
    "deeplabv1": ["", "variant=7x7", "variant=4x4", "variant=msc"],
    "deeplabv2": ["", "backbone=vgg16,variant=aspp_s", "backbone=resnet50,dataset=camvid"],
    "quickstart": [""],
    "unet": [
        "",
        "variant=original,in_channels=1,num_classes=2",
        "variant=same,width=16",
        "dataset=camvid,variant=same",
        "dataset=isbi2012,variant=same",
        "recipe=smp,backbone=mobilenetv2",
        "recipe=mmseg",
    ],
    "pspnet": ["", "dataset=cityscapes", "recipe=mmseg", "recipe=smp"],
    "deeplabv3": [
        *("", "backbone=resnet50,output_stride=8,stem=deep", "variant=cascade,backbone=resnet50"),
        *("recipe=torchvision,backbone=mobilenetv3_large", "recipe=smp", "recipe=mmseg"),
    ],
    "deeplabv3plus": [
        *("", "backbone=resnet101,stem=deep", "dataset=camvid", "backbone=xception65"),
        *("backbone=mobilenetv2", "recipe=smp", "recipe=mmseg"),
    ],
    "maskrcnn": [
        *("", "dataset=shapes,variant=small", "dataset=nuclei,variant=small"),
        *("backbone=resnet101", "recipe=torchvision"),
    ],
    "solo": [
        *("", "variant=decoupled", "variant=decoupled_light", "recipe=mmdet"),
        *("dataset=shapes,variant=small", "dataset=nuclei,variant=small"),
    ],
    "solov2": [
        *("", "variant=light", "recipe=mmdet"),
        *("dataset=shapes,variant=small", "dataset=nuclei,variant=small"),
    ],
    "panoptic_deeplab": [
        *("", "dataset=coco_panoptic,stem=deep", "backbone=xception71,output_stride=16"),
        *("dataset=shapes,variant=small", "dataset=nuclei,variant=small"),
        "backbone=hrnet_w18_small",
    ],
    "upsnet": ["", "dataset=cityscapes_panoptic", "dataset=shapes,variant=small"],
}
WITHOUT_PARAMETERS = models.WITHOUT_PARAMETERS  # test_verbs_regions.py runs them
LONG = ("deeplabv2", "deeplabv3", "maskrcnn", "solo", "panoptic_deeplab", "upsnet")  # to trace
CASES = [
    pytest.param(name, arguments, marks=pytest.mark.slow if arguments or name in LONG else [])
    for name, all_ in ARGUMENTS.items()
    for arguments in all_
]


def load(name, arguments):
    path = FOLDER / f"{name}.py"
    return resolve(f"{path}:{arguments}" if arguments else str(path), [])


def test_every_experiment_is_tested_here():
    assert {p.stem for p in FOLDER.glob("*.py")} == ARGUMENTS.keys() | set(WITHOUT_PARAMETERS)


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
    if config.data.objects:
        slots = (shape[0], config.data.objects)
        batch |= {
            "masks": jax.ShapeDtypeStruct((*slots, *shape[1:]), jnp.uint8),
            "classes": jax.ShapeDtypeStruct(slots, jnp.int32),
            "boxes": jax.ShapeDtypeStruct((*slots, 4), jnp.float32),
            "crowd": jax.ShapeDtypeStruct(slots, jnp.bool_),
        }
    state, logs = jax.eval_shape(step, target, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), target
    )
    assert {"loss", "lr", "grad_norm"} <= logs.keys()


@pytest.mark.parametrize("name", [*ARGUMENTS, *WITHOUT_PARAMETERS])
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
        pytest.param(
            *("deeplabv3plus", "backbone=resnet101,stem=deep,num_classes=21", (513, 513)),
            {"params": 59_468_085, "output_stride": 16},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_describe_gives_the_published_counts(name, arguments, size, expected):
    facts = network_facts(load(name, arguments), size)
    assert facts["params"] == facts["params_without_aux"] == expected["params"]
    assert facts["output_stride"] == expected["output_stride"]
    assert facts["train_memory_bytes"] > 16 * facts["params"]


R50, R101 = "backbone=resnet50", "backbone=resnet101"
# Experiment, arguments, size, parameters with and without the auxiliary head, 1e9 MACs without it.
PUBLISHED = [
    ("deeplabv3", f"{R101},stem=7x7", 513, (58_040_661,) * 2, None),
    ("deeplabv3", f"{R101},stem=deep", 513, (58_164_437,) * 2, 76.05),
    ("deeplabv3", f"{R101},stem=deep,output_stride=8", 513, (58_164_437,) * 2, 252.25),
    ("deeplabv3", f"{R101},stem=deep,output_stride=32", 513, (58_164_437,) * 2, 51.41),
    ("deeplabv3", f"{R50},stem=7x7", 513, (39_048_533,) * 2, None),
    ("deeplabv3", f"{R50},stem=deep", 513, (39_172_309,) * 2, None),
    ("deeplabv3plus", "backbone=xception65", 513, (41_055_413,) * 2, 54.04),
    ("deeplabv3plus", "backbone=xception65,output_stride=8", 513, (41_055_413,) * 2, 176.85),
    ("deeplabv3plus", f"{R101},stem=deep", 513, (59_468_085,) * 2, 97.81),
    ("deeplabv3plus", f"{R101},stem=deep,output_stride=8", 513, (59_468_085,) * 2, 273.99),
    ("deeplabv3plus", "backbone=mobilenetv2", 513, (2_113_557,) * 2, 2.741),
    ("deeplabv3plus", "backbone=mobilenetv2,output_stride=8", 513, (2_113_557,) * 2, 8.826),
    ("pspnet", R50, 473, (49_081_578, 46_716_373), None),
    ("pspnet", R101, 473, (68_073_706, 65_708_501), None),
    ("fcn", f"recipe=torchvision,{R50}", 520, (35_322_218, 32_957_013), 142.726),
    ("fcn", f"recipe=torchvision,{R101}", 520, (54_314_346, 51_949_141), 222.747),
    ("deeplabv3", f"recipe=torchvision,{R50}", 520, (42_004_074, 39_638_869), 168.731),
    ("deeplabv3", f"recipe=torchvision,{R101}", 520, (60_996_202, 58_630_997), 248.752),
    (
        *("deeplabv3", "recipe=torchvision,backbone=mobilenetv3_large", 520),
        *((11_029_328, 11_025_477), None),
    ),
    ("unet", f"recipe=smp,{R50}", 512, (32_524_005,) * 2, 43.285),
    ("pspnet", f"recipe=smp,{R50}", 480, (24_393_173,) * 2, 10.567),
    ("deeplabv3", f"recipe=smp,{R50}", 512, (39_638_869,) * 2, 163.579),
    ("deeplabv3plus", f"recipe=smp,{R50}", 512, (26_682_725,) * 2, 36.645),
    ("deeplabv3plus", "recipe=smp,backbone=mobilenetv2", 512, (4_383_653,) * 2, 6.009),
]
CITYSCAPES = [  # MMSegmentation's own figures, 19 classes
    ("fcn", "recipe=mmseg", 512, (49_497_734, 47_133_043), 197.60),
    ("pspnet", "recipe=mmseg", 512, (48_975_494, 46_610_803), 178.32),
    ("pspnet", f"recipe=mmseg,{R101}", 512, (67_967_622, 65_602_931), 255.90),
    ("deeplabv3", f"recipe=mmseg,{R50}", 512, (68_113_030, 65_748_339), 269.54),
    ("deeplabv3plus", "recipe=mmseg", 512, (43_589_878, 41_225_187), 176.16),
    ("unet", "recipe=mmseg", 512, (29_062_886, 28_987_795), 202.64),
]
CASES_OF_SIZE = [(*case, 21) for case in PUBLISHED] + [(*case, 19) for case in CITYSCAPES]
ADE20K = ("pspnet", R50, 473, (49_180_908, 46_782_550), None, 150)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "side", "parameters", "macs", "classes"), [*CASES_OF_SIZE, ADE20K]
)
def test_a_network_is_as_large_as_published(name, arguments, side, parameters, macs, classes):
    """Parameters to the last one, multiply-accumulates to 0.1%."""
    config = load(name, f"{arguments},num_classes={classes}")
    model, _, _ = models.build(config)
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image)
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    total = sum(x.size for _, x in leaves)
    aux = sum(x.size for path, x in leaves if path_of(path).startswith("aux"))
    assert (total, total - aux) == parameters
    if macs:
        assert count_macs(model, variables, image, "aux")[0] / 1e9 == pytest.approx(macs, rel=1e-3)


LEARNING = [
    ("fcn", "variant=8s_at_once,backbone=resnet18"),  # its border makes VGG-16 slow
    ("fcn", "recipe=torchvision,backbone=resnet18"),
    ("unet", "variant=same,width=8"),
    ("segnet", "variant=basic"),
    ("deeplabv1", ""),
    ("deeplabv2", "backbone=resnet18"),
    ("pspnet", "backbone=resnet18"),
    ("deeplabv3", "backbone=resnet18"),
    ("deeplabv3plus", "backbone=mobilenetv2"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments"), LEARNING)
def test_an_experiment_learns_in_its_first_20_steps(name, arguments):
    """On two scenes of 65 x 65 pixels, with AdamW: the papers' rates are for their batches."""
    config = load(name, ",".join(filter(None, [arguments, "dataset=shapes", "num_classes=8"])))
    small = {
        **{"data.crop": "(64, 64)" if name in ("unet", "segnet") else "(65, 65)"},
        **{"train.batch": "2", "train.steps": "20", "loss.pixel.reduction": "mean"},
        **{"optim.name": "adamw", "optim.lr": "1e-3", "optim.multipliers": "()"},
        **{"optim.warmup": "0", "optim.clip": "1.0", "optim.drops": "()"},
    }
    if name == "fcn" and "recipe" not in arguments:
        small["model.features"] = "64"  # of fc6 and fc7, which hold most of the parameters
    configs.override(config, list(small.items()))
    target, _, step = build(config, sharding.make_mesh(config.mesh))
    model, _, _ = models.build(config)
    tx = make_optimizer(config.optim, config.train.steps, target.params)
    state = jax.jit(partial(init_state, config, model, tx))()  # on one device
    step, losses = jax.jit(step), []
    scenes = [Shapes("train", 3)[k] for k in range(2)]
    rows = slice(0, config.data.crop[0])
    batch = {
        "image": np.stack([scene["image"][rows, rows] for scene in scenes]),
        "label": np.stack([scene["label"][rows, rows] for scene in scenes]).astype(np.int32),
        "valid": np.ones(2, bool),
    }
    for _ in range(20):
        state, logs = step(state, batch)
        losses.append(float(logs["loss"]))
    assert np.isfinite(losses).all() and np.mean(losses[-4:]) < np.mean(losses[:4])


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


@pytest.mark.slow
def test_the_kept_activations_grow_with_the_batch():
    config = load("unet", "variant=same,width=8")
    small = network_facts(config, (64, 64))["train_memory_bytes"]
    configs.override(config, [("train.batch", str(2 * config.train.batch))])
    assert 1.5 < network_facts(config, (64, 64))["train_memory_bytes"] / small < 2.1


def test_a_known_data_set_gives_its_class_count_without_its_files(monkeypatch):
    monkeypatch.delenv("JAXSEG_DATA", raising=False)
    assert load("deeplabv3plus", "dataset=camvid").model.num_classes == 11
