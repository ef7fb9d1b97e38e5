"""The papers' networks: exact counts, sizes, and what their parts compute."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import EXPERIMENTS

from jaxseg import backbones, models
from jaxseg import config as configs
from jaxseg.backbones.fpn import FPN
from jaxseg.backbones.layers import Norm
from jaxseg.errors import InputError
from jaxseg.experiment import resolve
from jaxseg.models import (
    deeplabv1,
    deeplabv2,
    deeplabv3,
    deeplabv3plus,
    fcn,
    fcn_resnet,
    pspnet,
    unet,
)

DOUBLING = (64, 128, 256, 512, 1024)


def trace(model, size, channels=3):
    """(parameter count, output shapes), without computing anything."""
    image = jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image)
    outputs = jax.eval_shape(partial(model.apply, train=False), variables, image)
    return sum(x.size for x in jax.tree.leaves(variables["params"])), outputs


@pytest.mark.parametrize(
    ("channels", "classes", "parameters"),
    [(1, 2, 31_030_658), (3, 2, 31_031_810), (3, 19, 31_032_915), (3, 21, 31_033_045)],
)
def test_unet_has_the_published_number_of_parameters(channels, classes, parameters):
    count, outputs = trace(unet.Model(classes), (572, 572), channels)
    assert count == parameters
    assert outputs["logits"].shape == (1, 388, 388, classes)  # Fig. 1


def test_same_unet_counts_two_norm_parameters_for_each_bias():
    plain, _ = trace(unet.Model(2, padding="same"), (64, 64))
    normed, outputs = trace(unet.Model(2, padding="same", norm=Norm()), (64, 64))
    conv_channels = 2 * sum(DOUBLING) + 2 * sum(DOUBLING[:-1])
    assert normed - plain == conv_channels  # scale and bias in place of the bias
    assert outputs["logits"].shape == (1, 64, 64, 2)


@pytest.mark.parametrize("size", [188, 204, 572])
def test_valid_unet_labels_all_but_184_pixels(size):
    _, outputs = trace(unet.Model(2, widths=(2, 4, 8, 16, 32)), (size, size + 16), 1)
    assert outputs["logits"].shape == (1, size - 184, size + 16 - 184, 2)


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("widths", [(2, 4), (2, 4, 8, 16, 32)])
def test_unet_fit_is_the_smallest_input_that_covers_an_image(padding, patch, widths):
    model = unet.Model(2, widths=widths, padding=padding, patch=patch)

    def labelled(n):
        return trace(model, (n, n))[1]["logits"].shape[1]

    def fits(n):
        try:
            model.check_crop((n, n))
        except InputError:
            return False
        return True

    for want in (1, 16, 33):
        found = model.fit((want, want))[0]
        smaller = [n for n in range(1, found) if fits(n)]
        assert labelled(found) >= want
        assert not smaller or labelled(smaller[-1]) < want


def test_unet_at_an_invalid_size_names_the_nearest_valid_ones():
    with pytest.raises(InputError, match=r"use \(572, 572\) or \(588, 572\)"):
        trace(unet.Model(2), (580, 572), 1)
    with pytest.raises(InputError, match=r"multiples of 16.*use \(96, 96\) or \(112, 96\)"):
        unet.Model(2, padding="same").check_crop((100, 96))


@pytest.mark.slow
def test_valid_unet_sees_its_mirrored_border_as_the_paper_does():
    """The tile in the middle of a larger image is labelled as it is in the whole."""
    model = unet.Model(2, widths=(2, 4, 8), norm=Norm(kind="none"))
    image = jax.random.normal(jax.random.key(0), (1, 108, 108, 1))
    variables = model.init(jax.random.key(1), image, train=False)
    whole = model.apply(variables, image, train=False)["logits"]  # 68 pixels, from 20 on
    tile = model.apply(variables, image[:, 8:92, 16:100], train=False)["logits"]
    np.testing.assert_allclose(tile, whole[:, 8 : 8 + 44, 16 : 16 + 44], atol=1e-5)


def test_unet_loss_takes_the_labelled_centre():
    logits = jax.random.normal(jax.random.key(0), (1, 4, 4, 3))
    label = np.full((1, 8, 8), 2, np.int32)
    label[:, 2:6, 2:6] = 1
    value, logs = unet.loss({"logits": logits}, {"label": jnp.asarray(label)})
    expected = -jax.nn.log_softmax(logits)[..., 1].mean()
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert logs["loss"] == value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stem", "parameters"),
    [
        ("resnet101", "7x7", 58_040_661),
        ("resnet101", "deep", 58_164_437),
        ("resnet50", "7x7", 39_048_533),
        ("resnet50", "deep", 39_172_309),
    ],
)
def test_deeplabv3_has_the_published_number_of_parameters(name, stem, parameters):
    backbone = backbones.find(name)(stem=stem, output_stride=16)
    count, outputs = trace(deeplabv3.Model(21, backbone), (513, 513))
    assert count == parameters
    assert outputs["logits"].shape == (1, 33, 33, 21)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stem", "parameters"),
    [
        ("resnet101", "deep", 59_468_085),
        ("resnet50", "7x7", 59_468_085 - 123_776 - (42_500_160 - 23_508_032)),
    ],
)
def test_deeplabv3plus_has_the_published_number_of_parameters(name, stem, parameters):
    backbone = backbones.find(name)(stem=stem, output_stride=16)
    count, outputs = trace(deeplabv3plus.Model(21, backbone), (513, 513))
    assert count == parameters
    assert outputs["logits"].shape == (1, 129, 129, 21)


@pytest.mark.parametrize(("output_stride", "rates"), [(16, [6, 12, 18]), (8, [12, 24, 36])])
def test_aspp_rates_double_at_output_stride_8(output_stride, rates):
    from jaxseg.backbones.layers import ConvNorm

    found = []

    def note(run, args, kwargs, context):
        if isinstance(context.module, ConvNorm) and "atrous" in context.module.name:
            found.append(context.module.rate)
        return run(*args, **kwargs)

    backbone = backbones.find("resnet18")(output_stride=output_stride)
    with nn.intercept_methods(note):
        trace(deeplabv3.Model(21, backbone), (65, 65))
    assert found[:3] == rates


def test_the_cascade_doubles_its_rates_block_by_block():
    """Section 3.2: at output stride 16, block 4 to 7 at rates 2, 4, 8, 16, times the grid."""
    from jaxseg.backbones.resnet import Bottleneck

    found = {}

    def note(run, args, kwargs, context):
        if isinstance(context.module, Bottleneck):
            found["/".join(context.module.path)] = context.module.rate
        return run(*args, **kwargs)

    grid = {"multi_grid": (1, 2, 1), "strides": "tensorflow"}
    backbone = backbones.find("resnet50")(output_stride=16, **grid)
    with nn.intercept_methods(note):
        count, outputs = trace(deeplabv3.Model(21, backbone, cascade=3), (65, 65))
    assert [found[f"block{b}/unit1"] for b in (5, 6, 7)] == [4, 8, 16]
    assert [found[f"block7/unit{u}"] for u in (1, 2, 3)] == [16, 32, 16]
    assert outputs["logits"].shape == (1, 5, 5, 21)
    assert count == 63_671_360 + 2048 * 21 + 21  # backbone with block5 to block7, classifier


def test_a_valid_unet_has_no_head_whose_convolution_would_shrink_what_it_labels():
    for field in ("head", "aux"):
        unet.Model(2, padding="same", **{field: 8}).check_crop((64, 64))
        with pytest.raises(InputError, match='need model.padding="same"'):
            unet.Model(2, **{field: 8}).check_crop((572, 572))
        with pytest.raises(InputError, match='need model.padding="same"'):
            trace(unet.Model(2, **{field: 8}), (284, 284))


PYRAMIDS = ("maskrcnn", "solo", "solov2", "upsnet")
OF_OBJECTS = (*PYRAMIDS, "panoptic_deeplab")


def built(name, **fields):
    config = configs.default()
    config.model.update({"name": name, "num_classes": 5, "backbone": {"name": "resnet18"}})
    config.model.update(fields)
    models.complete(config)
    return models.build(config)[0]


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("maskrcnn", {"proposals": {"sizes": (8.0, 16.0)}}, "needs five sizes"),
        ("panoptic_deeplab", {"levels": ("c3", "c2", "c1")}, "as many numbers of channels as lev"),
        ("panoptic_deeplab", {"top_k": 1000}, "top_k is 1000: .* from 1 to 999"),
        ("panoptic_deeplab", {"top_k": 0}, "top_k is 0: .* from 1 to 999"),
        ("upsnet", {"detections": {"count": 1000}}, "count is 1000: .* at most 999"),
        ("pspnet", {"bins": ()}, r"bins is \(\): needs different numbers"),
        ("pspnet", {"bins": (1, 0)}, r"bins is \(1, 0\): needs different numbers"),
        ("pspnet", {"bins": (2, 2)}, r"bins is \(2, 2\): needs different numbers"),
        ("pspnet", {"norm": {"groups": 0}}, "norm.groups is 0"),
    ],
)
def test_fields_that_fit_no_image_are_refused_when_the_network_is_built(name, fields, message):
    with pytest.raises(InputError, match=message):
        built(name, **fields)


@pytest.mark.parametrize("name", OF_OBJECTS)
def test_things_are_classes(name):
    assert built(name, things=(1, 4)).things == (1, 4)
    for wrong in ((1, 99), (1, 1), (-2, 1), ("car",)):
        with pytest.raises(InputError, match=r"things is .*, of 5 classes: .* from 0 to 4"):
            built(name, things=wrong)


@pytest.mark.parametrize("name", [*PYRAMIDS, "fcn"])
def test_a_network_on_levels_at_all_strides_takes_no_other_output_stride(name):
    for backbone in ({"name": "resnet18", "output_stride": 8}, {"name": "hrnet_w18"}):
        with pytest.raises(InputError, match="set .*32"):
            built(name, backbone=backbone)
    path = EXPERIMENTS / f"{name}.py"
    for backbone in backbones.VARIANTS:  # its experiment asks them all for the right one
        config = resolve(f"{path}:backbone={backbone},num_classes=5", [])
        assert models.build(config)[0].backbone.output_stride == 32


@pytest.mark.slow
@pytest.mark.parametrize("name", PYRAMIDS)
@pytest.mark.parametrize("backbone", sorted(backbones.VARIANTS))
def test_any_backbone_carries_a_pyramid(name, backbone):
    arguments = f"dataset=shapes,variant=small,backbone={backbone}"
    model = models.build(resolve(f"{EXPERIMENTS / name}.py:{arguments}", []))[0]
    seen = {}

    def note(run, args, kwargs, context):
        out = run(*args, **kwargs)
        if isinstance(context.module, FPN) and context.method_name == "__call__":
            seen.update({key: x.shape[1:3] for key, x in out.items()})
        return out

    with nn.intercept_methods(note):
        trace(model, (96, 128))
    assert seen == {f"p{i}": (-(-96 // 2**i), 128 // 2**i) for i in range(2, 7)}


# Not SegNet, whose decoder mirrors VGG16, and those that find boxes or masks on a pyramid.
HEADS = sorted(set(models.names()) - {"segnet", *PYRAMIDS})
FIELDS = {
    "deeplabv2": {"scales": (1.0,)},
    "unet": {"padding": "same", "norm": Norm(), "widths": (8,) * 5},
}
FEW = ("resnet18", "vgg16")
MATRIX = [
    pytest.param(head, name, marks=[] if name in FEW else pytest.mark.slow)
    for head in HEADS
    for name in sorted(backbones.VARIANTS)
]


@pytest.mark.slow
@pytest.mark.parametrize(("head", "backbone"), MATRIX)
def test_any_backbone_goes_with_any_semantic_head(head, backbone):
    module = models.paper(head)
    net = backbones.find(backbone)(output_stride=32 if head in ("unet", "fcn") else 16)
    model = module.Model(num_classes=7, backbone=net, **FIELDS.get(head, {}))
    _, outputs = trace(model, (96, 128))
    image = jax.ShapeDtypeStruct((1, 96, 128, 3), jnp.float32)
    fields = {k: getattr(model, k) for k in models._keywords(module.predict)}
    result = jax.eval_shape(partial(module.predict, **fields), outputs, image)
    assert result["logits"].shape == (1, 96, 128, 7)


@pytest.mark.parametrize("size", [(60, 60), (61, 47)])
def test_pyramid_pooling_is_the_mean_of_the_parts_of_the_scene(size):
    """With an identity for its convolution: bins by torch's rule, floor and ceil of i n / bins."""
    x = np.random.default_rng(0).standard_normal((1, *size, 4)).astype(np.float32)
    net = pspnet.PyramidPooling((3,), 4, True, Norm(kind="none"))
    variables = net.init(jax.random.key(0), x, train=False)
    eye = {"pool3": {"conv": {"kernel": jnp.eye(4)[None, None], "bias": jnp.full(4, 100.0)}}}
    assert jax.tree.map(jnp.shape, eye) == jax.tree.map(jnp.shape, variables["params"])
    y = net.apply({"params": eye}, x, train=False)[..., 4:] - 100  # the bias passes the ReLU
    (h, w), rows = size, []
    for i in range(3):
        top, bottom = i * h // 3, -(-(i + 1) * h // 3)
        parts = [(j * w // 3, -(-(j + 1) * w // 3)) for j in range(3)]
        rows.append([x[0, top:bottom, a:b].mean((0, 1)) for a, b in parts])
    corners = y[0][np.ix_([0, h - 1], [0, w - 1])]  # aligned corners: the outer bins themselves
    np.testing.assert_allclose(corners, np.array(rows)[np.ix_([0, 2], [0, 2])], atol=1e-4)


def test_the_auxiliary_loss_is_added_with_its_weight():
    rng = np.random.default_rng(0)
    outputs = {
        "logits": jnp.asarray(rng.standard_normal((1, 3, 3, 4)), jnp.float32),
        "aux_logits": jnp.asarray(rng.standard_normal((1, 3, 3, 4)), jnp.float32),
    }
    label = jnp.asarray(rng.integers(0, 4, (1, 17, 17)), jnp.int32)
    value, logs = pspnet.loss(outputs, {"label": label}, align_corners=True, aux_weight=0.4)
    main, _ = pspnet.loss({"logits": outputs["logits"]}, {"label": label}, align_corners=True)
    aux, _ = pspnet.loss({"logits": outputs["aux_logits"]}, {"label": label}, align_corners=True)
    np.testing.assert_allclose(value, main + 0.4 * aux, rtol=1e-6)
    np.testing.assert_allclose(logs["main_loss"], main, rtol=1e-6)


def test_an_unknown_level_is_refused_with_the_valid_ones():
    backbone = backbones.find("resnet18")(output_stride=8)
    with pytest.raises(InputError, match="c1, c2, c3, c4, c5"):
        trace(pspnet.Model(5, backbone, source="c6"), (64, 64))


def test_deeplab_crops_must_meet_the_stride():
    model = deeplabv3.Model(21, backbones.find("resnet50")(output_stride=16))
    model.check_crop((513, 769))
    with pytest.raises(InputError, match=r"\(512, 512\).*16n \+ 1.*use \(513, 513\)"):
        model.check_crop((512, 512))
    halves = deeplabv3.Model(21, backbones.find("resnet50")(output_stride=16), align_corners=False)
    halves.check_crop((512, 512))
    with pytest.raises(InputError, match=r"multiples of 16.*use \(512, 512\)"):
        halves.check_crop((513, 513))


@pytest.mark.parametrize("align_corners", [True, False])
def test_deeplab_predicts_at_the_size_of_the_image(align_corners):
    outputs = {"logits": jax.random.normal(jax.random.key(0), (2, 5, 7, 4))}
    result = deeplabv3.predict(outputs, jnp.zeros((2, 33, 50, 3)), align_corners=align_corners)
    assert result["logits"].shape == (2, 33, 50, 4) and result["logits"].dtype == jnp.float32
    np.testing.assert_array_equal(result["semantic"], result["logits"].argmax(-1))


def test_every_paper_defines_the_contract():
    for name in models.names():
        module = models.paper(name)
        assert {"Model", "loss", "predict"} <= set(vars(module)), name
        assert "arXiv" in module.__doc__ and "Differs from the paper:" in module.__doc__, name


def test_networks_with_aligned_corners_enlarge_images_to_the_places_of_their_scores():
    """512 columns at stride 16 have scores at 0, 16, .. 496: aligned corners would stretch them."""
    net = partial(backbones.find("resnet18"), output_stride=16)
    for module in (deeplabv3, deeplabv3plus, pspnet, fcn_resnet):
        model = module.Model(5, net(), align_corners=True)
        assert model.fit((512, 1024)) == (513, 1025) and model.fit((513, 17)) == (513, 17)
        halves = module.Model(5, net(), align_corners=False)
        assert halves.fit((512, 1000)) == (512, 1000)
        multiples = module.Model(5, net(), align_corners=True, fit_corners=False)  # smp's
        assert multiples.fit((512, 1024)) == (512, 1024)
        multiples.check_crop((512, 1024))
        with pytest.raises(InputError, match=r"multiples of 16.*use \(512, 512\)"):
            multiples.check_crop((513, 513))


@pytest.mark.parametrize("recipe", ["paper", "smp"])
def test_a_recipes_own_crop_fits_its_network(recipe):
    for name in ("pspnet", "deeplabv3", "deeplabv3plus"):
        config = resolve(f"{EXPERIMENTS / name}.py:recipe={recipe},backbone=resnet18", [])
        models.build(config)[0].check_crop(config.data.crop)


def test_what_inference_says_of_an_image_of_any_size_stays_in_its_place():
    """Scores that say their own column, interpolated to all pixels, say those pixels' columns."""
    config = resolve(f"{EXPERIMENTS / 'deeplabv3'}.py:backbone=resnet18,num_classes=2", [])
    model = models.build(config)[0]
    size = model.fit((17, 512))
    columns = jnp.broadcast_to(jnp.arange(size[1]) * 1.0, size)[None, ..., None]
    scores = {"logits": columns[:, ::16, ::16]}  # each the column where it stands
    found = deeplabv3.predict(scores, jnp.zeros((1, *size, 3)), align_corners=True)["logits"]
    np.testing.assert_allclose(found, columns, atol=1e-3)


def test_a_level_of_a_mobilenets_block_can_be_pooled():
    net = backbones.find("mobilenetv3_large")(output_stride=16)
    model = pspnet.Model(5, net, source="block4", aux=0, pooled=4, features=4)
    assert model.output_stride == 8
    assert trace(model, (64, 64))[1]["logits"].shape == (1, 8, 8, 5)


@pytest.mark.slow
def test_every_papers_loss_of_an_ignored_batch_is_zero_with_a_zero_gradient():
    """With auxiliary logits where the network has them, by its own loss."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    batch = {"label": jnp.full((2, 17, 17), 255, jnp.int32)}
    small, full = draw(2, 3, 3, 4), draw(2, 17, 17, 4)
    cases = [
        (pspnet.loss, {"logits": small, "aux_logits": small + 1}, {"align_corners": True}),
        (deeplabv3plus.loss, {"logits": small, "aux_logits": small}, {"align_corners": False}),
        (unet.loss, {"logits": full, "aux_logits": small}, {}),
        (deeplabv1.loss, {"logits": small}, {}),
        (deeplabv2.loss, {"logits": small, "scale_1.0": small, "scale_0.5": small}, {}),
        (fcn.loss, {"logits": full}, {}),
    ]
    for loss, outputs, options in cases:
        value, slope = jax.value_and_grad(lambda o, f=loss, k=options: f(o, batch, **k)[0])(outputs)
        assert value == 0.0
        assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(slope))


def test_unets_loss_counts_border_pixels_as_often_as_the_map_says():
    """Eq. 1: the weighted mean, the map cropped to the labelled centre."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((1, 4, 4, 3)), jnp.float32)
    label = rng.integers(0, 3, (1, 8, 8)).astype(np.int32)
    weight = rng.uniform(1, 11, (1, 8, 8)).astype(np.float32)
    value, _ = unet.loss({"logits": logits}, {"label": jnp.asarray(label), "weight": weight})
    inner = label[:, 2:6, 2:6]
    each = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), inner[..., None], -1)[..., 0]
    plain, _ = unet.loss({"logits": logits}, {"label": jnp.asarray(label)})
    np.testing.assert_allclose(plain, each.mean(), rtol=1e-5)
    np.testing.assert_allclose(value, (each * weight[:, 2:6, 2:6]).mean(), rtol=1e-5)
