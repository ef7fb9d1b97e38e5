"""Blocks that are computed again: less is kept, the numbers stay; norms over a batch in parts."""

import jax
import numpy as np
import pytest
from conftest import tiny_config

from jaxseg import config as configs
from jaxseg import models, train
from jaxseg.errors import InputError

STEPS = 3


def setting(**changes):
    config = tiny_config()
    with config.unlocked():
        config.model.norm.kind = "batch"
        config.train.update(batch=16, **changes)
        config.optim.lr = 0.05
    return config


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        label = np.repeat(rng.integers(0, 8, (16, 2, 32)), 16, 1).astype(np.int32)
        label[:3, :20] = 255  # parts of the batch have other numbers of pixels that count
        image = 30 * label[..., None] % 256 + rng.integers(0, 30, (16, 32, 32, 3))
        yield {"image": image.clip(0, 255).astype(np.uint8), "label": label}


@pytest.fixture(scope="module")
def whole():
    return losses(setting())


def losses(config):
    state, step = start(config)
    values = []
    for batch in batches():
        state, logs = step(state, batch)
        values.append(float(logs["loss"]))
    return np.array(values), jax.device_get(state.batch_stats)


def start(config):
    """(fresh state, train_step to call) on one device."""
    model, loss, _ = models.build(config)
    shapes = jax.eval_shape(
        lambda key: model.init(key, np.zeros((1, 32, 32, 3), np.float32), train=False),
        jax.random.key(0),
    )
    tx = train.make_optimizer(config.optim, config.train.steps, shapes["params"])
    given = {"config": config, "model": model, "loss": loss, "tx": tx}
    state = jax.jit(lambda: train.init_state(config, model, tx))()
    return state, jax.jit(lambda state, batch: train.train_step(state, batch, **given))


@pytest.mark.slow
def test_blocks_computed_again_change_no_number(whole):
    expected, stats = whole
    found, again = losses(setting(remat="blocks"))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), again, stats)


@pytest.mark.slow
def test_a_batch_in_parts_has_the_norms_and_losses_of_the_whole(whole):
    """1 x 16 = 2 x 8 = 8 x 2; without the option the norms of two images differ."""
    expected, stats = whole
    found, parts = losses(setting(accumulate=8, accumulate_norm="batch"))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), parts, stats)
    batch = next(batches())
    texts = []
    for accumulate in (2, 8):
        state, step = start(setting(accumulate=accumulate, accumulate_norm="batch"))
        texts.append(step.lower(state, batch).as_text())
    assert texts[0] == texts[1]
    alone, _ = losses(setting(accumulate=8))
    assert abs(alone[0] / expected[0] - 1) > 1e-3


@pytest.mark.parametrize("key", ["remat", "accumulate_norm"])
def test_other_words_are_refused(key):
    config = configs.default()
    with pytest.raises(InputError, match=f"train.{key} is 'all': needs "):
        config.train[key] = "all"
        configs.check(config)
