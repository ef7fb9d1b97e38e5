"""VGG-16: counts, strides, rates and fields of view; and the counts of the papers on it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import audit, count, experiment, trace

from jaxseg import backbones
from jaxseg.backbones import vgg
from jaxseg.errors import InputError
from jaxseg.macs import count_macs
from jaxseg.models import deeplabv1, pspnet

NARROW = ((2,), (2, 3), (3,), (4, 4), (4,))
ONES = ((1,) * 2, (1,) * 2, (1,) * 3, (1,) * 3, (1,) * 3)


def test_vgg16_has_the_published_parameters_and_macs():
    classifier = 25_088 * 4096 + 4096 * 4096 + 4096 * 1000
    for name, norms in (("vgg16", 0), ("vgg16_bn", 2 * 4224)):
        net = backbones.find(name)()
        variables, _ = trace(net, (224, 224))
        assert count(variables) == 14_714_688 + norms
        image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
        assert count_macs(net, variables, image)[0] == 15_470_264_320 - classifier


@pytest.mark.parametrize("pool", [2, 3])
@pytest.mark.parametrize("output_stride", [2, 4, 8, 16, 32])
def test_vgg_strides_are_2_to_32_capped_at_the_output_stride(output_stride, pool):
    for size in ((65, 97), (64, 96), (1, 2)):
        _, outputs = trace(vgg.Backbone(NARROW, output_stride, pool), size)
        for level in range(1, 6):
            stride = min(2**level, output_stride)
            assert outputs[f"c{level}"].shape[1:3] == tuple(-(-n // stride) for n in size)


@pytest.mark.parametrize(
    ("output_stride", "rates"),
    [(32, (1, 1, 1, 1, 1)), (16, (1, 1, 1, 1, 1)), (8, (1, 1, 1, 1, 2)), (4, (1, 1, 1, 2, 4))],
)
def test_vgg_past_the_cap_dilates_the_stages_after_a_pooling(output_stride, rates):
    found = audit(vgg.Backbone(output_stride=output_stride))
    expected = {
        f"conv{stage}_{i}/conv": (1, rate)
        for stage, (widths, rate) in enumerate(zip(vgg.WIDTHS, rates, strict=True), 1)
        for i in range(1, len(widths) + 1)
    }
    assert found == expected


def field_of_view(model, length):
    """How many pixels along an axis change a score in the middle: an impulse at each, in turn."""
    image = jnp.eye(length)[:, :, None, None]
    shapes, _ = trace(model, (length, 1), channels=1)
    ones = jax.tree.map(lambda x: jnp.full(x.shape, float(x.ndim > 1)), shapes)  # biases are 0
    logits = jax.jit(partial(model.apply, train=False))(ones, image)["logits"]
    seen = np.flatnonzero(logits[:, logits.shape[1] // 2, 0, 0])
    assert len(seen) == seen[-1] - seen[0] + 1 and 0 < seen[0] and seen[-1] < length - 1
    return len(seen)


def test_the_field_of_view_of_the_whole_vgg16_is_404_pixels():
    """DeepLab v1, section 3.2: with a first fully connected layer of 7x7 taps."""
    model = deeplabv1.Model(2, vgg.Backbone(ONES), kernel=7, rate=1, features=1, average=False)
    assert field_of_view(model, 513) == 404


@pytest.mark.parametrize(("kernel", "rate", "average"), [(3, 12, True), (7, 4, False)])
def test_the_field_of_view_of_deeplabv1_is_that_of_its_kernels_strides_and_rates(
    kernel, rate, average
):
    net = vgg.Backbone(ONES, output_stride=8, pool=3)
    model = deeplabv1.Model(2, net, kernel, rate, features=1, average=average)
    plain, halved, dilated = (3, 1, 1), (3, 2, 1), (3, 1, 2)  # kernel, stride, rate
    layers = [plain, plain, halved, plain, plain, halved, plain, plain, plain, halved]
    layers += [plain, plain, plain, plain, dilated, dilated, dilated, plain]  # conv4 to pool5
    layers += [plain] * average + [(kernel, 1, rate)]
    field, jump = 1, 1
    for taps, stride, spread in layers:
        field += (taps - 1) * spread * jump
        jump *= stride
    assert field_of_view(model, 641) == field


def test_vgg_carries_any_head():
    model = pspnet.Model(3, vgg.Backbone(NARROW, output_stride=8), features=4, pooled=2, aux=2)
    _, outputs = trace(model, (65, 97))
    assert outputs["logits"].shape == (1, 9, 13, 3) == outputs["aux_logits"].shape


def test_vgg_refuses_strides_and_poolings_it_cannot_give():
    with pytest.raises(InputError, match='unknown backbone.output_stride "7"'):
        trace(vgg.Backbone(output_stride=7), (32, 32))
    with pytest.raises(InputError, match='unknown backbone.pool "4"'):
        trace(vgg.Backbone(pool=4), (32, 32))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "parameters"),
    [
        ("fcn", "variant=32s", 134_346_581),
        ("fcn", "variant=16s", 134_357_354),
        ("fcn", "variant=8s", 134_362_751),
        ("fcn", "variant=8s_at_once", 134_362_751),
        ("fcn", "variant=8s,upsampling=learned", 134_362_751 + 2 * 4 * 4 * 21 * 21),
        ("fcn", "variant=32s,upsampling=all", 134_346_581 + 1_806_336),
        ("fcn", "recipe=torchvision,backbone=resnet50", 35_322_218),
        ("fcn", "recipe=torchvision,backbone=resnet101", 54_314_346),
        ("fcn", "recipe=mmseg,num_classes=19", 49_497_734),
        ("segnet", "num_classes=11", 29_449_355),
        ("segnet", "num_classes=12", 29_449_932),
        ("segnet", "", 29_455_125),
        ("segnet", "variant=basic,num_classes=11", 1_416_587),
        ("deeplabv1", "", 20_505_429),
        ("deeplabv1", "variant=7x7", 134_346_581),
        ("deeplabv1", "variant=4x4", 65_140_565),
        # 3x3 to 128 of the image and c1 to c4, 1x1 to 128 of each, 640 more inputs of fc8
        (
            "deeplabv1",
            "variant=msc",
            20_505_429
            + 128 * (9 * (3 + 64 + 128 + 256 + 512) + 5)
            + 5 * 128 * (128 + 1)
            + 640 * 21,
        ),
        ("deeplabv2", "backbone=vgg16,variant=aspp_s", 37_877_652),
        ("deeplabv2", "backbone=vgg16,variant=aspp_l", 37_877_652),
        ("deeplabv2", "", 44_048_532),
        ("deeplabv2", "num_classes=182", 55_919_384),
    ],
)
def test_the_networks_have_the_published_number_of_parameters(name, arguments, parameters):
    if "num_classes" not in arguments:
        arguments = f"{arguments},num_classes=21".lstrip(",")
    model = experiment(name, arguments)
    if name == "deeplabv2":
        model = model.clone(scales=(1.0,))  # as many weights
    assert count(trace(model, (9, 9))[0]) == parameters


def test_what_the_auxiliary_head_of_an_fcn_on_a_resnet_counts():
    for arguments, without in (
        ("recipe=torchvision,num_classes=21", 32_957_013),
        ("recipe=mmseg,num_classes=19", 47_133_043),
    ):
        variables, outputs = trace(experiment("fcn", arguments), (64, 64))
        del variables["params"]["aux"]
        assert count(variables) == without and outputs["aux_logits"].shape[1:3] == (8, 8)
