"""DeepLab v1 and v2 against float64 NumPy: fields of view, multi-scale features, ASPP, fusion."""

from functools import partial

import jax
import jax.numpy as jnp
import networks as ref
import numpy as np
import pytest
from networks import assert_close, audit, experiment, losses, random_run, trace

from jaxseg import backbones
from jaxseg.backbones import vgg
from jaxseg.errors import InputError
from jaxseg.models import deeplabv1, deeplabv2

NARROW = ((2,), (2, 3), (3,), (4, 4), (4,))
atrous_vgg = partial(vgg.Backbone, NARROW, output_stride=8, pool=3)


def vgg_reference(params, image):
    """3x3 poolings padded by 1, the last two with stride 1; conv5 with rate 2."""
    x, pools = image, []
    for stage, widths in enumerate(NARROW, 1):
        rate = 2 if stage == 5 else 1
        for i in range(1, len(widths) + 1):
            x = ref.relu(ref.conv(x, params[f"conv{stage}_{i}"]["conv"], rate=rate, pad=rate))
        x = ref.max_pool(x, 3, 2 if stage < 4 else 1, 1)[0]
        pools.append(x)
    return pools


def fully_connected(x, params, pad, rate, branch=""):
    x = ref.relu(ref.conv(x, params[f"fc6{branch}"], rate=rate, pad=pad))
    return ref.relu(ref.conv(x, params[f"fc7{branch}"]))


# DeepLab v1


@pytest.mark.parametrize(
    ("fields", "pad", "size"),
    [
        ({}, 12, (33, 49)),
        ({"kernel": 7, "rate": 4, "average": False}, 12, (25, 41)),
        ({"kernel": 4, "rate": 4, "average": False}, 6, (41, 33)),
        ({"kernel": 4, "rate": 8, "average": False}, 12, (17, 57)),
        ({"multi_scale": 3}, 12, (33, 25)),
    ],
)
def test_deeplabv1_is_the_arithmetic_of_the_authors_code(fields, pad, size):
    """The paddings are those of the prototxt files."""
    model = deeplabv1.Model(3, atrous_vgg(), features=5, **fields)
    outputs, variables, image = random_run(model, size)
    params = variables["params"]
    *pools, x = vgg_reference(params["backbone"], image)
    x = ref.avg_pool(x, 3, 1) if model.average else x
    features = [fully_connected(x, params, pad, model.rate)]
    if model.multi_scale:
        names = ("image", "c1", "c2", "c3", "c4")
        for name, stride, y in zip(names, (8, 4, 2, 1, 1), (image, *pools), strict=True):
            y = ref.relu(ref.conv(y, params[f"{name}_1"], stride=stride, pad=1))
            features.append(ref.relu(ref.conv(y, params[f"{name}_2"])))
    logits = ref.conv(np.concatenate(features, -1), params["fc8"])
    assert logits.shape[:2] == tuple((n - 1) // 8 + 1 for n in size)
    assert_close(outputs["logits"], logits)


def test_deeplabv1_at_321_pixels_has_the_sizes_of_the_prototxt():
    _, outputs = trace(atrous_vgg(), (321, 321))
    assert [outputs[f"c{i}"].shape[1] for i in range(1, 6)] == [161, 81, 41, 41, 41]


def test_deeplabv1_compares_with_every_eighth_label():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(2, 3, 5, 4)), rng.integers(0, 4, (2, 17, 33))
    label[0, 8] = 255
    total, pixels = ref.cross_entropy(logits, label[:, ::8, ::8])
    assert pixels == 2 * 3 * 5 - 5
    value, _ = jax.jit(deeplabv1.loss)({"logits": logits}, {"label": label})
    np.testing.assert_allclose(value, total / pixels, rtol=1e-5)


@pytest.mark.parametrize("size", [(17, 33), (18, 40)])
def test_deeplabv1_predicts_by_bilinear_interpolation_between_the_corners(size):
    logits = np.random.default_rng(0).normal(size=(3, 5, 4))
    image = jnp.zeros((1, *size, 3))
    result = jax.jit(deeplabv1.predict)({"logits": logits[None]}, image)
    reference = ref.resize_corners(logits, size)
    assert_close(result["logits"][0], reference)
    np.testing.assert_array_equal(result["semantic"][0], reference.argmax(-1))
    np.testing.assert_allclose(result["logits"][0, -1, -1], logits[-1, -1], rtol=1e-6)


def test_deeplab_crops_and_inputs_have_scores_at_their_corners():
    for model in (deeplabv1.Model(3, atrous_vgg()), deeplabv2.Model(3, atrous_vgg())):
        model.check_crop((321, 513))
        assert model.fit((321, 513)) == (321, 513)
        assert model.fit((322, 500)) == (329, 505)
        assert model.fit((1, 8)) == (1, 9)
        with pytest.raises(InputError, match=r"\(320, 321\) .* 8n \+ 1.*use \(321, 321\)"):
            model.check_crop((320, 321))


def test_deeplabv1_keeps_its_stride_on_a_resnet():
    net = backbones.find("resnet18")(output_stride=8)
    _, outputs = trace(deeplabv1.Model(3, net, features=4, multi_scale=2), (65, 97))
    assert outputs["logits"].shape == (1, 9, 13, 3)


# DeepLab v2


def aspp_reference(x, params, rates):
    total = 0
    for i, rate in enumerate(rates, 1):
        if f"fc6_{i}" in params:
            y = fully_connected(x, params, rate, rate, f"_{i}")
            total = total + ref.conv(y, params[f"fc8_{i}"])
        else:
            total = total + ref.conv(x, params[f"fc8_{i}"], rate=rate, pad=rate)
    return total


@pytest.mark.parametrize(
    ("features", "scales", "size"),
    [
        (5, (1.0,), (41, 25)),
        (0, (1.0, 0.75, 0.5), (33, 65)),
        (4, (1.0, 0.5), (65, 33)),
    ],
)
def test_deeplabv2_is_a_sum_over_rates_and_a_maximum_over_scales(features, scales, size):
    rates = (2, 4, 8, 12)
    model = deeplabv2.Model(3, atrous_vgg(), rates=rates, features=features, scales=scales)
    outputs, variables, image = random_run(model, size)
    params, scored = variables["params"], {}
    for scale in scales:
        scaled = ref.resize_corners(image, [round((n - 1) * scale) + 1 for n in size])
        pools = vgg_reference(params["backbone"], scaled)
        scored[scale] = aspp_reference(pools[-1], params["aspp"], rates)
    first = scored[1.0]
    fused = np.max([ref.resize_corners(x, first.shape[:2]) for x in scored.values()], axis=0)
    assert_close(outputs["logits"], fused)
    for scale, logits in scored.items():
        if len(scales) > 1:
            assert_close(outputs[f"scale_{scale}"], logits)
    assert len(outputs) == (len(scales) + 1 if len(scales) > 1 else 1)


def test_deeplabv2_adds_the_loss_of_every_scale_and_of_the_maximum():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 4, (2, 33, 49))
    label[:, 8] = 255
    places = {  # spread from corner to corner
        "logits": (range(0, 33, 8), range(0, 49, 8)),
        "scale_1.0": (range(0, 33, 8), range(0, 49, 8)),
        "scale_0.75": ((0, 11, 21, 32), (0, 10, 19, 29, 38, 48)),
        "scale_0.5": ((0, 16, 32), (0, 16, 32, 48)),
    }
    outputs, total = {}, 0
    for name, (rows, cols) in places.items():
        outputs[name] = rng.normal(size=(2, len(rows), len(cols), 4))
        summed, pixels = ref.cross_entropy(outputs[name], label[:, rows][:, :, cols])
        total += summed / pixels
    value, logs = jax.jit(deeplabv2.loss)(outputs, {"label": label})
    np.testing.assert_allclose(value, total, rtol=1e-5)
    assert logs.keys() == {"loss", *(f"{name}_loss" for name in places)}


def test_deeplabv2_has_the_strides_and_rates_of_its_caffe_resnet():
    """Strides in the first 1x1 convolution, rate 2 in all of conv4 and 4 in all of conv5."""
    found = audit(experiment("deeplabv2", "num_classes=21").clone(scales=(1.0,)))
    expected = {"backbone/stem/conv": (2, 1)}
    for stage, units in ((2, 3), (3, 4), (4, 23), (5, 3)):
        for unit in range(1, units + 1):
            name = f"backbone/conv{stage}/unit{unit}"
            stride = 2 if (stage, unit) == (3, 1) else 1
            expected[f"{name}/conv1/conv"] = (stride, 1)
            expected[f"{name}/conv2/conv"] = (1, {4: 2, 5: 4}.get(stage, 1))
            expected[f"{name}/conv3/conv"] = (1, 1)
            if unit == 1:
                expected[f"{name}/shortcut/conv"] = (stride, 1)
    for i, rate in enumerate((6, 12, 18, 24), 1):
        expected[f"aspp/fc8_{i}"] = (1, rate)
    assert found == expected


def test_deeplabv2_runs_at_three_scales_with_one_set_of_weights():
    model = experiment("deeplabv2", "backbone=resnet18,num_classes=21")
    _, outputs = trace(model, (321, 321))
    assert {k: v.shape[1:3] for k, v in outputs.items()} == {
        "logits": (41, 41),
        "scale_1.0": (41, 41),
        "scale_0.75": (31, 31),
        "scale_0.5": (21, 21),
    }
    with pytest.raises(InputError, match=r"model.scales is \(0.5, 1.0\): the first must be 1.0"):
        trace(model.clone(scales=(0.5, 1.0)), (65, 65))


@pytest.mark.parametrize(
    ("arguments", "rates"),
    [("variant=aspp_s", (2, 4, 8, 12)), ("variant=aspp_l", (6, 12, 18, 24))],
)
def test_deeplabv2_on_vgg16_has_the_rates_of_section_4_1_2(arguments, rates):
    found = audit(experiment("deeplabv2", f"backbone=vgg16,{arguments},num_classes=21"))
    assert [found[f"aspp/fc6_{i}"] for i in range(1, 5)] == [(1, rate) for rate in rates]
    assert [found[f"backbone/conv5_{i}/conv"] for i in range(1, 4)] == [(1, 2)] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (deeplabv1.Model(3, atrous_vgg(), features=8, dropout=0.0), deeplabv1.loss),
        (deeplabv2.Model(3, atrous_vgg(), scales=(1.0, 0.5)), deeplabv2.loss),
    ],
)
def test_deeplab_learns(model, loss):
    values = losses(model, loss, (33, 41), steps=15)
    assert values[-1] < 0.9 * values[0]


def test_deeplabv1_takes_features_of_five_levels_alone():
    """MobileNet gives its blocks' maps too."""
    net = backbones.find("mobilenetv2")(output_stride=8)
    variables, outputs = trace(deeplabv1.Model(3, net, features=4, multi_scale=2), (65, 97))
    assert outputs["logits"].shape == (1, 9, 13, 3)
    branches = {name for name in variables["params"] if name.endswith("_2")}
    assert branches == {"image_2", "c1_2", "c2_2", "c3_2", "c4_2"}
