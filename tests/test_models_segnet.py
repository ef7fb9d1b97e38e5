"""SegNet and SegNet-Basic against float64 NumPy that remembers the rows and columns of maxima."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks as ref
import numpy as np
import pytest
from networks import assert_close, experiment, losses, random_run, trace

from jaxseg import backbones
from jaxseg.errors import InputError
from jaxseg.models import segnet


def lrn(image):
    """Caffe's LRN over 5 channels, alpha 1e-4, beta 0.75."""
    out = np.zeros_like(image)
    for c in range(image.shape[-1]):
        around = image[..., max(c - 2, 0) : c + 3]
        out[..., c] = image[..., c] / (1 + 1e-4 / 5 * (around**2).sum(-1)) ** 0.75
    return out


def segnet_reference(variables, image, model):
    params, stats = variables["params"], variables["batch_stats"]

    def conv_norm(x, *path):
        layer, mean = params, stats
        for key in path:
            layer, mean = layer[key], mean[key]
        y = ref.conv(x, layer["conv"], pad=model.kernel // 2)
        return ref.batch_norm(y, layer["norm"], mean["norm"])

    x, places = lrn(image) if model.local_norm else image, []
    for stage, widths in enumerate(model.encoder, 1):
        for i in range(1, len(widths) + 1):
            x = ref.relu(conv_norm(x, "backbone", f"conv{stage}_{i}"))
        before = x.shape[:2]
        x, rows, cols = ref.max_pool(x, 2, 2)
        places.append((rows, cols, before))
    for stage in range(len(model.encoder), 0, -1):
        x = ref.max_unpool(x, *places[stage - 1])
        names = [n for n in sorted(params, reverse=True) if n.startswith(f"conv{stage}_")]
        for name in names:  # conv2_2_d comes before conv2_1_d
            x = conv_norm(x, name)
            x = ref.relu(x) if model.decoder_act else x
    return ref.conv(x, params["classifier"], pad=model.classifier_kernel // 2)


SMALL = {"encoder": ((2, 3), (3, 4), (4,)), "decoder": ((4,), (4, 3), (3,))}
BASIC = {
    "encoder": ((3,),) * 2,
    "decoder": ((3,),) * 2,
    "kernel": 7,
    "decoder_act": False,
    "classifier_kernel": 1,
    "local_norm": True,
}


@pytest.mark.parametrize("size", [(9, 14), (16, 11)])
@pytest.mark.parametrize("fields", [SMALL, BASIC])
def test_segnet_is_convolutions_and_unpooling_to_where_the_maxima_were(fields, size):
    model = segnet.Model(3, **fields)
    outputs, variables, image = random_run(model, size)
    assert_close(outputs["logits"], segnet_reference(variables, image, model))


def test_segnet_unpools_camvid_to_the_sizes_that_were_pooled():
    sizes = []

    def note(run, args, kwargs, context):
        y = run(*args, **kwargs)
        if isinstance(context.module, segnet.Encoder):
            sizes.extend(size for _, size in y[1])
            assert y[0].shape[1:3] == (12, 15)
        return y

    model = experiment("segnet", "num_classes=11")
    with nn.intercept_methods(note):
        _, outputs = trace(model, (360, 480))
    assert sizes[:5] == [(360, 480), (180, 240), (90, 120), (45, 60), (23, 30)]
    assert outputs["logits"].shape == (1, 360, 480, 11)


def test_the_encoder_of_segnet_takes_the_weights_of_vgg16_bn():
    variables, _ = trace(segnet.Model(3), (32, 32))
    backbone, _ = trace(backbones.find("vgg16_bn")(), (32, 32))
    for kind in ("params", "batch_stats"):
        ours, theirs = variables[kind]["backbone"], backbone[kind]
        assert jax.tree.map(lambda x: x.shape, ours) == jax.tree.map(lambda x: x.shape, theirs)


def test_local_response_norm_is_caffes_also_in_bfloat16():
    image = np.random.default_rng(0).uniform(0, 255, (2, 3, 4, 7)).astype(np.float32)
    reference = np.stack([lrn(x.astype(np.float64)) for x in image])
    np.testing.assert_allclose(segnet.local_response_norm(jnp.asarray(image)), reference, rtol=1e-5)
    half = segnet.local_response_norm(jnp.asarray(image, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), reference, rtol=2e-2)


def test_segnet_needs_as_many_decoder_stages_as_encoder_stages():
    with pytest.raises(InputError, match="5 stages and model.decoder 1"):
        trace(segnet.Model(3, decoder=((4,),)), (32, 32))


def test_dropout_is_after_the_third_stage_and_the_later_ones_on_both_sides():
    found = []

    def note(run, args, kwargs, context):
        if isinstance(context.module, nn.Dropout):
            found.append((context.module.rate, args[0].shape[1]))
        return run(*args, **kwargs)

    model = segnet.Model(3, encoder=((2,),) * 5, decoder=((2,),) * 5, dropout=0.5)
    with nn.intercept_methods(note):
        trace(model, (64, 64))
    after_pools = [(0.0, 32), (0.0, 16), (0.5, 8), (0.5, 4), (0.5, 2)]
    in_decoder = [(0.5, 4), (0.5, 8), (0.5, 16), (0.0, 32), (0.0, 64)]
    assert found[:10] == after_pools + in_decoder


@pytest.mark.slow
def test_segnet_learns():
    values = losses(segnet.Model(3, **SMALL), segnet.loss, (15, 22))
    assert values[-1] < 0.8 * values[0]
