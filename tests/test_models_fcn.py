"""FCN against float64 NumPy with the crop offsets of the authors' prototxt files."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks as ref
import numpy as np
import pytest
from networks import assert_close, losses, random_run, randomised, trace

from jaxseg import backbones
from jaxseg.backbones import vgg
from jaxseg.errors import InputError
from jaxseg.models import fcn, segnet
from jaxseg.ops.losses import PixelLoss

NARROW = ((2,), (2, 3), (3,), (4, 4), (4,))
tiny_vgg = partial(vgg.Backbone, NARROW)


def fcn_reference(params, image, stride, at_once):
    """With the padding and the crop offsets of the authors' prototxt files."""
    x, pools = image, {}
    for stage, widths in enumerate(NARROW, 1):
        for i in range(1, len(widths) + 1):
            pad = 100 if (stage, i) == (1, 1) else 1
            x = ref.relu(ref.conv(x, params["backbone"][f"conv{stage}_{i}"]["conv"], pad=pad))
        pools[stage] = x = ref.max_pool(x, 2, 2)[0]
    x = ref.relu(ref.conv(ref.relu(ref.conv(x, params["fc6"])), params["fc7"]))
    x = ref.conv(x, params["score_fr"])

    def upscore(x, name, factor):
        learned = params.get(name, {"kernel": ref.bilinear_kernel(factor, x.shape[-1])})
        return ref.deconv(x, learned["kernel"], factor)

    skips = [(4, 5, 0.01, "upscore2"), (3, 9, 0.0001, "upscore_pool4")]
    for level, offset, scale, name in skips[: {32: 0, 16: 1, 8: 2}[stride]]:
        x = upscore(x, name, 2)
        skip = ref.conv(pools[level] * (scale if at_once else 1), params[f"score_pool{level}"])
        x = x + skip[offset : offset + x.shape[0], offset : offset + x.shape[1]]
    offset = {32: 19, 16: 27, 8: 31}[stride]
    x = upscore(x, f"upscore{stride}", stride)
    return x[offset : offset + image.shape[0], offset : offset + image.shape[1]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stride", "fields", "size"),
    [
        (32, {}, (13, 50)),
        (16, {}, (30, 17)),
        (8, {}, (24, 37)),
        (8, {"at_once": True}, (9, 12)),
        (8, {"upsampling": "learned"}, (11, 8)),
        (16, {"upsampling": "all"}, (10, 7)),
    ],
)
def test_fcn_is_the_arithmetic_of_the_authors_code(stride, fields, size):
    model = fcn.Model(3, tiny_vgg(), stride=stride, features=5, **fields)
    outputs, variables, image = random_run(model, size)
    learned = [name for name in variables["params"] if name.startswith("upscore")]
    expected = {"learned": ["upscore2", "upscore_pool4"], "all": ["upscore2", "upscore16"]}
    assert sorted(learned) == sorted(expected.get(model.upsampling, []))
    reference = fcn_reference(variables["params"], image, stride, model.at_once)
    assert_close(outputs["logits"], reference)


@pytest.mark.parametrize("size", [(1, 1), (31, 34), (500, 375)])
@pytest.mark.parametrize("stride", [32, 16, 8])
def test_fcn_labels_images_of_any_size(stride, size):
    _, outputs = trace(fcn.Model(3, tiny_vgg(), stride=stride, features=4), size)
    assert outputs["logits"].shape == (1, *size, 3)


def test_fcn_stands_on_a_resnet_too():
    net = backbones.find("resnet18")()
    _, outputs = trace(fcn.Model(3, net, features=4), (31, 34))
    assert outputs["logits"].shape == (1, 31, 34, 3)


def test_fcn_has_22x22_places_of_500_pixels_and_scores_16x16_of_them():
    sizes = {}

    def note(run, args, kwargs, context):
        y = run(*args, **kwargs)
        if context.module.name in ("fc6", "score_fr"):
            sizes[context.module.name] = (args[0].shape[1], y.shape[1])
        return y

    with nn.intercept_methods(note):
        trace(fcn.Model(3, tiny_vgg(), features=4), (500, 500))
    assert sizes == {"fc6": (22, 16), "score_fr": (16, 16)}


@pytest.mark.slow
def test_learned_upsampling_starts_as_the_fixed_one():
    image = jax.random.normal(jax.random.key(0), (1, 20, 30, 3))
    fixed = fcn.Model(3, tiny_vgg(), features=4)
    learned = fixed.clone(upsampling="all")
    variables = jax.jit(partial(learned.init, train=False))(jax.random.key(1), image)
    assert not variables["params"]["score_fr"]["kernel"].any()  # section 4.3
    weights = randomised(variables)["params"]
    kept = {k: v for k, v in variables["params"].items() if k.startswith("upscore")}
    ours, theirs = (
        jax.jit(partial(model.apply, train=False))({"params": {**weights, **kept}}, image)["logits"]
        for model in (learned, fixed)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jnp.abs(theirs).max()))


def test_fcn_refuses_what_it_is_not():
    for fields, said in (
        ({"stride": 4}, 'unknown model.stride "4"'),
        ({"upsampling": "fix"}, 'Did you mean "fixed"'),
    ):
        with pytest.raises(InputError, match=said):
            trace(fcn.Model(3, tiny_vgg(), **fields), (32, 32))
    with pytest.raises(InputError, match="backbone.output_stride 8: set 32"):
        trace(fcn.Model(3, tiny_vgg(output_stride=8)), (32, 32))
    with pytest.raises(InputError, match='unknown backbone.output_stride "7"'):
        trace(tiny_vgg(output_stride=7), (32, 32))


def test_the_loss_of_full_size_logits_is_summed_where_asked_and_predict_takes_the_largest():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(1, 5, 7, 3)), rng.integers(0, 3, (1, 5, 7))
    label[0, :2] = 255
    outputs, batch = {"logits": jnp.asarray(logits, jnp.bfloat16)}, {"label": label}
    logits = np.asarray(outputs["logits"], np.float64)
    total, pixels = ref.cross_entropy(logits, label)
    summed, _ = jax.jit(partial(fcn.loss, pixel=PixelLoss(reduction="sum")))(outputs, batch)
    mean, _ = jax.jit(segnet.loss)(outputs, batch)
    np.testing.assert_allclose([summed, mean], [total, total / pixels], rtol=1e-5)
    result = jax.jit(segnet.predict)(outputs, jnp.zeros((1, 5, 7, 3)))
    np.testing.assert_array_equal(result["semantic"], logits.argmax(-1))
    assert result["logits"].dtype == jnp.float32 and result["semantic"].dtype == jnp.int32


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"stride": 32}, {"stride": 8, "upsampling": "learned"}])
def test_fcn_learns(fields):
    model = fcn.Model(3, tiny_vgg(), features=8, dropout=0.0, **fields)
    values = losses(model, fcn.loss, (20, 30))
    assert values[0] == pytest.approx(np.log(3), rel=1e-4)  # scores start at zero
    assert values[-1] < 0.95 * values[0]
