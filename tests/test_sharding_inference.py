"""One image over all devices: each holds a share of its rows, and the answer is that of one."""

from functools import partial

import jax
import numpy as np
import pytest
from conftest import tiny_config
from networks import randomised, trace

import jaxseg
from jaxseg import inference, models, sharding
from jaxseg.config import check, default


def atrous_config():
    """DeepLab v3 on MobileNetV2, corners aligned: images grow to sides of 16n + 1."""
    config = default()
    config.data.crop = (33, 33)
    config.model.update(name="deeplabv3", num_classes=8, features=8)
    config.model.backbone = {"name": "mobilenetv2", "output_stride": 16}
    models.complete(config)
    check(config)
    return config


def answers(config, image):
    """What one device and what eight say of an image [H,W,3], and the bytes eight need each."""
    model, _, _ = models.build(config)
    variables = randomised(trace(model, config.data.crop)[0])
    mesh = sharding.over_rows(sharding.make_mesh(default().mesh))
    alone, shared = (
        jax.jit(partial(inference.make_infer(config, m), size=image.shape[:2]))
        for m in (None, mesh)
    )
    one = alone.lower(variables, image[None]).compile()
    place = jax.device_put((variables, image[None]), sharding.replicated(mesh))
    eight = shared.lower(*place).compile()
    share = eight.memory_analysis().temp_size_in_bytes / one.memory_analysis().temp_size_in_bytes
    return one(variables, image[None]), eight(*place), share, eight.as_text()


def agree(config, size, tolerance=1e-5):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    one, eight, share, text = answers(config, image)
    scale = np.abs(one["logits"]).max()
    np.testing.assert_allclose(eight["logits"], one["logits"], rtol=1e-4, atol=tolerance * scale)
    assert (np.asarray(one["semantic"]) != np.asarray(eight["semantic"])).mean() < 1e-4
    assert "collective-permute" in text
    return share


def test_a_small_image_is_not_shared():
    config = tiny_config()
    image = np.zeros((64, 32, 3), np.uint8)
    _, _, _, text = answers(config, image)
    assert "collective-permute" not in text


def test_eight_devices_label_one_image_as_one_does(monkeypatch):
    monkeypatch.setattr(inference, "LARGE", 0)
    assert agree(tiny_config(), (256, 64)) < 0.5


@pytest.mark.slow
def test_rows_that_eight_does_not_divide(monkeypatch):
    monkeypatch.setattr(inference, "LARGE", 0)
    # In float32 either answer is 3e-4 of the largest logit from that in float64, where they agree
    # to 1e-13 of it: random weights amplify rounding through 50 layers.
    assert agree(atrous_config(), (515, 60), tolerance=1e-4) < 0.5


@pytest.mark.slow
def test_a_large_image():
    assert agree(tiny_config(), (4096, 1024)) < 0.3


@pytest.mark.slow
def test_a_predictor_labels_an_image_of_4096_by_4096_on_eight_devices_as_on_one(
    tiny_run, monkeypatch
):
    image = np.random.default_rng(0).integers(0, 256, (4096, 4096, 3)).astype(np.uint8)
    eight = jaxseg.load(tiny_run)(image).label
    monkeypatch.setattr(inference, "LARGE", 2**62)
    one = jaxseg.load(tiny_run)(image).label
    assert eight.shape == (4096, 4096) and len(np.unique(eight)) > 1
    assert (eight != one).mean() < 1e-6
