"""Parameters and multiply-accumulates of whole networks, as their papers and libraries count them.

Beside the table of test_experiments.py: other sizes, classes, output strides, depths and heads.
"""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from networks import EXPERIMENTS, count, trace

from jaxseg import backbones, models
from jaxseg.experiment import resolve
from jaxseg.macs import count_macs
from jaxseg.optim import path_of

R50, R101, V2 = "backbone=resnet50", "backbone=resnet101", "backbone=mobilenetv2"
X65, X71 = "backbone=xception65", "backbone=xception71"
PLAIN, SEPARABLE = {"model.separable": "False"}, {"model.separable": "True"}
NO_DECODER = PLAIN | {"model.decoder": "()"}
TV, MM, SMP = "recipe=torchvision", "recipe=mmseg", "recipe=smp"
WIDE = (1025, 2049)  # Cityscapes
# Experiment, its arguments, overrides, size, classes, (parameters, without the auxiliary head),
# 1e9 MACs without it; None: not published.
TABLE = [
    ("deeplabv3plus", X65, PLAIN, 513, 21, (54_711_461,) * 2, 86.68),
    ("deeplabv3plus", f"{X65},output_stride=8", PLAIN, 513, 21, (54_711_461,) * 2, 248.78),
    ("deeplabv3plus", X65, NO_DECODER, 513, 21, (53_407_813,) * 2, 64.92),
    ("deeplabv3plus", f"{X65},output_stride=8", NO_DECODER, 513, 21, (53_407_813,) * 2, 227.04),
    ("deeplabv3plus", f"{R101},stem=deep", SEPARABLE, 513, 21, (45_812_037,) * 2, 65.17),
    ("deeplabv3plus", f"{R101},stem=deep,output_stride=32", {}, 513, 21, (59_468_085,) * 2, 73.17),
    ("deeplabv3plus", X65, {}, WIDE, 19, (41_054_899,) * 2, 418.38),
    ("deeplabv3plus", X71, {}, WIDE, 19, (43_477_323,) * 2, 513.04),
    ("deeplabv3plus", V2, {}, WIDE, 19, None, 21.233),
    ("unet", f"{SMP},backbone=resnet34", {}, 512, 21, (24_439_269,) * 2, 32.011),
    ("deeplabv3", f"{SMP},{R101}", {}, 512, 21, (58_630_997,) * 2, 241.157),
    ("deeplabv3plus", f"{SMP},{R50},output_stride=8", {}, 512, 21, (26_682_725,) * 2, 111.716),
    ("deeplabv3plus", f"{SMP},{R101}", {}, 512, 21, (45_674_853,) * 2, 56.04),
    ("pspnet", f"{SMP},{R101}", {}, 480, 21, (43_385_301,) * 2, None),
    ("fcn", f"{MM},{R101}", {}, 512, 19, (68_489_862, 66_125_171), 275.18),
    ("fcn", MM, {}, (512, 1024), 19, (49_497_734, 47_133_043), 395.20),
    (
        "fcn",
        f"{MM},output_stride=16",
        {"model.rate": "6"},
        512,
        19,
        (49_497_734, 47_133_043),
        57.85,
    ),
    ("fcn", f"{MM},stem=7x7", {}, 512, 19, (49_478_502, 47_113_811), 196.35),
    ("fcn", MM, {}, 512, 21, (49_499_274, None), None),
    ("pspnet", MM, {}, 512, 21, (48_977_034, None), None),
    ("pspnet", MM, {}, 512, 150, (49_076_364, None), None),
    ("deeplabv3", f"{MM},{R50}", {}, 512, 21, (68_114_570, None), None),
    ("deeplabv3", f"{MM},{R101}", {}, 512, 19, (87_105_158, 84_740_467), 347.12),
    ("deeplabv3", f"{MM},{R101},output_stride=16", {}, 512, 19, (87_105_158, 84_740_467), 95.23),
    ("deeplabv3plus", MM, {}, 512, 21, (43_591_418, None), None),
    ("deeplabv3plus", f"{MM},{R101}", {}, 512, 19, (62_582_006, 60_217_315), 253.74),
    ("deeplabv3plus", f"{MM},{R101},output_stride=16", {}, 512, 19, (62_582_006, None), 79.02),
    ("fcn", f"{MM},backbone=resnet18", {}, 512, 19, (12_822_342, 12_673_523), 55.43),
    ("pspnet", f"{MM},backbone=resnet18", {}, 512, 19, (12_790_086, 12_641_267), 54.23),
    ("deeplabv3", f"{MM},backbone=resnet18", {}, 512, 19, (13_986_374, 13_837_555), 59.93),
    ("deeplabv3plus", f"{MM},backbone=resnet18", {}, 512, 19, (12_468_962, 12_320_143), 54.19),
    ("deeplabv2", "", {"model.scales": "(1.0,)"}, 321, 19, (43_901_068,) * 2, None),
    ("deeplabv2", "", {"model.scales": "(1.0,)"}, 321, 171, (55_108_332,) * 2, None),
    ("pspnet", R50, {}, 473, 19, (49_080_038, 46_715_347), None),
    ("pspnet", R101, {}, 473, 19, (68_072_166, 65_707_475), None),
    ("pspnet", R101, {}, 473, 150, (68_173_036, 65_774_678), None),
]
AUXILIARY = [  # torchvision's own figures, 520 x 520, with the auxiliary head: 1e9 MACs
    ("fcn", R50, 152.717),
    ("fcn", R101, 232.738),
    ("deeplabv3", R50, 178.722),
    ("deeplabv3", R101, 258.743),
    ("deeplabv3", "backbone=mobilenetv3_large", 10.452),
]


def built(name, arguments, overrides, size):
    """(network, shapes of its variables, of its image)."""
    config = resolve(f"{EXPERIMENTS / name}.py:{arguments}", list(overrides.items()))
    model, _, _ = models.build(config)
    size = size if isinstance(size, tuple) else (size, size)
    image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    return model, jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image), image


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "overrides", "size", "classes", "parameters", "macs"), TABLE
)
def test_a_network_counts_as_published(name, arguments, overrides, size, classes, parameters, macs):
    """Parameters to the last one, multiply-accumulates to 0.1%."""
    arguments = f"{arguments},num_classes={classes}".lstrip(",")
    model, variables, image = built(name, arguments, overrides, size)
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    total = sum(x.size for _, x in leaves)
    aux = sum(x.size for path, x in leaves if path_of(path).startswith("aux"))
    for want, have in zip(parameters or (), (total, total - aux), strict=False):
        assert want in (None, have)
    if macs:
        assert count_macs(model, variables, image, "aux")[0] / 1e9 == pytest.approx(macs, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backbone", "macs"), AUXILIARY)
def test_torchvisions_networks_count_as_published_with_their_auxiliary_heads(name, backbone, macs):
    model, variables, image = built(name, f"{TV},{backbone},num_classes=21", {}, 520)
    assert count_macs(model, variables, image)[0] / 1e9 == pytest.approx(macs, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fields", "side", "macs", "after"),
    [  # 1e9 MACs of the ImageNet classifier, of which so many channels times 1000 come after
        ("resnet18", {}, 224, 1.814, 512),
        ("resnet34", {}, 224, 3.664, 512),
        # torchvision's 4.089 and 7.801 with the other stem, 112 x 112 x (28,512 - 9,408). The
        # 4.36 and 8.09 of a model zoo are not those of the convolutions alone.
        ("resnet50", {"stem": "v1c"}, 224, 4.329, 2048),
        ("resnet50", {"stem": "v1d"}, 224, 4.329, 2048),
        ("resnet101", {"stem": "v1c"}, 224, 8.041, 2048),
        ("mobilenetv2", {"last": 1280}, 224, 0.301, 1280),
        ("mobilenetv3_large", {}, 224, 0.217, 1280 * (960 + 1000) / 1000),
        ("xception41", {}, 299, 9.204, 2048),
        ("xception65", {}, 299, 13.853, 2048),
        ("xception71", {}, 299, 17.947, 2048),
    ],
)
def test_a_backbone_counts_as_published(name, fields, side, macs, after):
    net = backbones.find(name)(**fields)
    variables, _ = trace(net, (side, side))
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    whole = count_macs(net, variables, image)[0] + after * 1000
    assert whole / 1e9 == pytest.approx(macs, rel=5e-3)


@pytest.mark.parametrize(("backbone", "parameters"), [(R50, 63_671_360), (R101, 82_663_488)])
def test_the_cascade_counts_as_published(backbone, parameters):
    arguments = f"variant=cascade,{backbone},num_classes=21"
    _, variables, _ = built("deeplabv3", arguments, {}, 65)
    assert count(variables) - (2048 * 21 + 21) == parameters
