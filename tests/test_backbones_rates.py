"""Strides, rates and taps of the backbones, and their arithmetic in float64."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks as ref
import numpy as np
import pytest
from networks import assert_close, audit, trace

from jaxseg import backbones
from jaxseg.backbones import resnet, xception
from jaxseg.backbones.layers import Norm
from jaxseg.errors import InputError


def depthwise(name, **fields):
    """(stride, rate) of each block's depthwise convolution, from block 1 on."""
    found = audit(backbones.find(name)(**fields), (64, 64))
    blocks = sorted({int(k.split("/")[0][5:]) for k in found if k.startswith("block")})
    return [found[f"block{i}/depthwise"] for i in blocks]


ONE, TWO, TAKEN = (1, 1), (1, 2), (2, 1)
V2 = [ONE, TAKEN, ONE, TAKEN, ONE, ONE]  # blocks 1 to 6, as they are at every output stride from 8


@pytest.mark.parametrize(
    ("contract", "output_stride", "rest"),
    [
        (False, 32, [TAKEN, *[ONE] * 6, TAKEN, *[ONE] * 3]),
        (True, 32, [TAKEN, *[ONE] * 6, TAKEN, *[ONE] * 3]),
        (False, 16, [TAKEN, *[ONE] * 6, *[TWO] * 4]),
        (True, 16, [TAKEN, *[ONE] * 6, ONE, *[TWO] * 3]),
        (False, 8, [*[TWO] * 7, *[(1, 4)] * 4]),
        (True, 8, [ONE, *[TWO] * 6, TWO, *[(1, 4)] * 3]),
    ],
)
def test_mobilenetv2_dilates_by_the_conventions_of_both_codes(contract, output_stride, rest):
    """TensorFlow's: the block that lost its stride runs at the old rate, those after it at the new.
    MMSegmentation's D8: dilations (1, 1, 1, 2, 2, 4, 4) of whole stages."""
    assert depthwise("mobilenetv2", output_stride=output_stride, contract=contract) == V2 + rest


@pytest.mark.parametrize(
    ("contract", "last"), [(False, [(1, 2)] * 3), (True, [(1, 1), (1, 2), (1, 2)])]
)
def test_mobilenetv3_dilates_its_last_three_blocks(contract, last):
    found = depthwise("mobilenetv3_large", output_stride=16, contract=contract)
    assert len(found) == 15 and found[-3:] == last
    assert [i for i, (stride, _) in enumerate(found, 1) if stride == 2] == [2, 4, 7]


def test_the_papers_networks_take_tensorflows_convention_and_the_libraries_theirs():
    for name in ("deeplabv3", "deeplabv3plus"):
        arguments = "backbone=mobilenetv2,num_classes=5"
        assert ref.experiment(name, arguments).backbone.contract
        assert not ref.experiment(name, f"recipe=smp,{arguments}").backbone.contract
        assert not ref.experiment(name, f"recipe=mmseg,{arguments}").backbone.contract


def test_the_strides_of_mobilenets_blocks():
    net = backbones.find("mobilenetv3_large")(output_stride=16)
    _, outputs = trace(net, (64, 64))
    assert net.block_strides == {
        name: 64 // value.shape[1] for name, value in outputs.items() if name.startswith("block")
    }


@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        ("pytorch", {2: 1, 3: 2, 4: 2, 5: 1}),
        ("caffe", {2: 1, 3: 2, 4: 2, 5: 1}),
        ("tensorflow", {2: 1, 3: 1, 4: 1, 5: 1}),  # the unit with the stride has no projection
    ],
)
def test_a_stages_first_shortcut_takes_its_stride(strides, expected):
    found = audit(backbones.find("resnet50")(output_stride=16, strides=strides))
    assert {stage: found[f"conv{stage}/unit1/shortcut/conv"] for stage in (2, 3, 4, 5)} == {
        stage: (stride, 1) for stage, stride in expected.items()
    }
    assert len([name for name in found if "shortcut" in name]) == 4


def layer(x, params, stats, name, stride=1, rate=1, pad=0):
    """A convolution and its norm."""
    y = ref.conv(x, params[name]["conv"], stride, rate, pad)
    return ref.batch_norm(y, params[name]["norm"], stats[name]["norm"])


def bottleneck(x, params, stats, stride, rate):
    """Stride and rate in the 3x3 convolution, the identity subsampled."""
    y = ref.relu(layer(x, params, stats, "conv1"))
    y = ref.relu(layer(y, params, stats, "conv2", stride, rate, rate))
    y = layer(y, params, stats, "conv3")
    if "shortcut" in params:
        return ref.relu(layer(x, params, stats, "shortcut", stride) + y)
    return ref.relu(x[::stride, ::stride] + y)


def test_tensorflows_strides_are_the_arithmetic_of_resnet_v1_beta():
    """Output stride 16, multi-grid (1, 2, 4): the stride of a stage sits in its last unit, and the
    features at the old stride are those before it."""
    grid = {"strides": "tensorflow", "multi_grid": (1, 2, 4), "output_stride": 16}
    outputs, wide, image = ref.random_run(resnet.Backbone(depth=50, **grid), (33, 49))
    params, stats = wide["params"], wide["batch_stats"]
    x = ref.relu(layer(image, params, stats, "stem", 2, 1, 3))
    expected = {"c1": x}
    x = np.pad(x, ((1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    h, w = ((n - 3) // 2 + 1 for n in x.shape[:2])
    taps = [x[i : i + 2 * h - 1 : 2, j : j + 2 * w - 1 : 2] for i, j in np.ndindex(3, 3)]
    x = np.max(taps, axis=0)
    plans = {
        "conv2": [(1, 1), (1, 1), (2, 1)],
        "conv3": [(1, 1), (1, 1), (1, 1), (2, 1)],
        "conv4": [(1, 1)] * 6,
        "conv5": [(1, 2), (1, 4), (1, 8)],
    }
    for stage, plan in plans.items():
        for unit, (stride, rate) in enumerate(plan, 1):
            before = x
            x = bottleneck(
                x, params[stage][f"unit{unit}"], stats[stage][f"unit{unit}"], stride, rate
            )
        expected[f"c{stage[4]}"] = before if stride > 1 else x
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(outputs[name], value)


class Both(nn.Module):
    """A module of Xception, its two outputs by name."""

    module: nn.Module

    @nn.compact
    def __call__(self, image, train):
        y, before = self.module(image, train)
        return {"output": y, "tap": before}


def separable(x, params, stats, stride, rate, after):
    """Depthwise with its norm, pointwise with its norm; ReLU after both where `after`."""
    kernel = params["depthwise"]["kernel"][:, :, 0]  # [3,3,C]
    x = np.pad(x, ((rate, rate), (rate, rate), (0, 0)))
    h, w = ((n - 2 * rate - 1) // stride + 1 for n in x.shape[:2])
    y = np.zeros((h, w, x.shape[2]))
    for i, j in np.ndindex(3, 3):
        rows = slice(i * rate, i * rate + stride * (h - 1) + 1, stride)
        cols = slice(j * rate, j * rate + stride * (w - 1) + 1, stride)
        y += x[rows, cols] * kernel[i, j]
    y = ref.batch_norm(y, params["inner_norm"], stats["inner_norm"], 1e-3)
    y = ref.relu(y) if after else y
    point = params["pointwise"]
    y = ref.conv(y, point["conv"])
    y = ref.batch_norm(y, point["norm"], stats["pointwise"]["norm"], 1e-3)
    return ref.relu(y) if after else y


@pytest.mark.parametrize(
    ("stride", "rate", "shortcut", "after"),
    [(2, 1, "conv", False), (1, 2, "conv", False), (1, 2, "sum", False), (1, 4, "none", True)],
)
def test_a_module_of_xception_is_three_separable_convolutions(stride, rate, shortcut, after):
    features = (4, 5, 3) if shortcut == "sum" else (4, 5, 6)
    norm = Norm(epsilon=1e-3)
    module = xception.Module(features, stride, rate, norm, shortcut, relu_after=after)
    outputs, wide, image = ref.random_run(Both(module), (17, 12))
    params, stats = (wide[key]["module"] for key in ("params", "batch_stats"))
    x = image
    for i in (1, 2, 3):
        tap = x
        last = stride if i == 3 else 1
        y = x if after else ref.relu(x)
        names = f"separable{i}"
        x = separable(y, params[names], stats[names], last, rate, after)
    if shortcut == "sum":
        x = x + image
    if shortcut == "conv":
        y = ref.conv(image, params["shortcut"]["conv"], stride)
        x = x + ref.batch_norm(y, params["shortcut"]["norm"], stats["shortcut"]["norm"], 1e-3)
    assert_close(outputs["output"], x)
    assert_close(outputs["tap"], tap)  # before the strided convolution, and before its ReLU


def seen(rates):
    """Which pixels along a row the middle output of a stage of these rates depends on."""
    unit = partial(resnet.Bottleneck, norm=Norm(kind="none"))
    stage = resnet.Stage(unit, 4, tuple((1, rate) for rate in rates))
    image = jnp.ones((1, 1, 81, 4))
    variables = jax.eval_shape(partial(stage.init, train=False), jax.random.key(0), image)
    ones = jax.tree.map(lambda x: jnp.full(x.shape, 0.1), variables)  # nothing cancels
    middle = lambda x: stage.apply(ones, x, train=False)[0][0, 0, 40].sum()  # noqa: E731
    return np.flatnonzero(np.asarray(jax.grad(middle)(image)).sum((0, 1, 3))) - 40


def test_rates_with_a_common_factor_leave_holes_and_hybrid_ones_do_not():
    """Gridding, by gradient: rates 2, 2, 2 see every other pixel. Wang et al. 2018, section 3.2."""
    assert seen((2, 2, 2)).tolist() == list(range(-6, 7, 2))
    assert seen((1, 2, 5)).tolist() == list(range(-8, 9))
    assert seen((1, 2, 5, 9)).tolist() == list(range(-17, 18))


def test_hybrid_rates_are_given_to_the_units_of_conv4_and_conv5_in_turn():
    hybrid = {"hybrid": ((1, 2, 5, 9), (5, 9, 17)), "output_stride": 8}
    found = audit(backbones.find("resnet50")(**hybrid))
    rates = [found[f"conv4/unit{i}/conv2/conv"][1] for i in range(1, 7)]
    assert rates == [1, 2, 5, 9, 1, 2]
    assert [found[f"conv5/unit{i}/conv2/conv"][1] for i in range(1, 4)] == [5, 9, 17]
    assert found["conv3/unit1/conv2/conv"] == (2, 1)
    with pytest.raises(InputError, match="backbone.hybrid.*needs the rates of conv4 and of conv5"):
        audit(backbones.find("resnet50")(hybrid=((1, 2, 5),)))


def test_the_second_convolution_of_a_basic_unit_may_stay_undilated():
    """MMSegmentation's BasicBlock dilates its first convolution alone."""
    found = audit(backbones.find("resnet18")(output_stride=8, contract=True, second_rate=False))
    units = [f"conv{stage}/unit{unit}" for stage in (4, 5) for unit in (1, 2)]
    assert [found[f"{unit}/conv1/conv"][1] for unit in units] == [1, 2, 2, 4]
    assert [found[f"{unit}/conv2/conv"][1] for unit in units] == [1, 1, 1, 1]
