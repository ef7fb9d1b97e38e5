"""Likelihoods in blocks against the log-softmax of upsampled logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxseg.ops import nll as module
from jaxseg.ops.losses import PixelLoss
from jaxseg.ops.nll import upsampled_nll
from jaxseg.ops.resize import resize
from jaxseg.sharding import traced_on


@pytest.fixture
def blocks(monkeypatch):
    """Blocks of few columns, at any size."""
    monkeypatch.setattr(module, "WHOLE", 0)
    monkeypatch.setattr(module, "BLOCK", 2 * 17 * 4 * 5)


def data(small, large, classes=4, batch=2, dtype=np.float32):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(3 * rng.normal(size=(batch, *small, classes)), dtype)
    label = rng.integers(0, classes, (batch, *large))
    label[:, 1] = 255
    return logits, jnp.asarray(label, jnp.int32), jnp.asarray(rng.normal(size=label.shape), dtype)


def plain(logits, label, align_corners):
    p = jax.nn.log_softmax(resize(logits.astype(jnp.float32), label.shape[1:], align_corners))
    known = jnp.where(label == 255, 0, label)
    return jnp.where(label == 255, 0, -jnp.take_along_axis(p, known[..., None], -1)[..., 0])


@pytest.mark.parametrize(
    ("small", "large", "align_corners"),
    [
        ((4, 6), (16, 24), False),  # whole ratio; 24 columns in blocks of 5
        ((5, 4), (17, 13), True),  # corners meet
        pytest.param((5, 7), (17, 17), False, marks=pytest.mark.slow),  # any ratio
        pytest.param((9, 8), (4, 3), False, marks=pytest.mark.slow),  # fewer pixels
        ((1, 1), (3, 4), True),
    ],
)
def test_value_and_gradient(small, large, align_corners, blocks):
    logits, label, g = data(small, large)
    results = []
    for function in (upsampled_nll, plain):
        y, pull = jax.vjp(lambda x, f=function: f(x, label, align_corners), logits)
        results.append((y, *pull(g)))
    for have, want in zip(*results, strict=True):
        assert have.dtype == jnp.float32
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)


def test_bfloat16_logits_have_a_loss_in_float32(blocks):
    logits, label, _ = data((4, 6), (16, 24))
    low = logits.astype(jnp.bfloat16)
    value, slope = jax.value_and_grad(lambda x: upsampled_nll(x, label).sum())(low)
    expected, wanted = jax.value_and_grad(lambda x: plain(x, label, False).sum())(
        low.astype(jnp.float32)
    )
    assert value.dtype == jnp.float32 and slope.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.abs(slope.astype(jnp.float32) - wanted).max() <= 2**-7 * np.abs(wanted).max()


def test_ignored_logits_never_matter_and_wrong_labels_tell(blocks):
    logits, label, _ = data((4, 6), (16, 24))
    ignored = jnp.full_like(label, 255)
    value, slope = jax.value_and_grad(lambda x: upsampled_nll(x, ignored).sum())(
        logits.at[:].set(jnp.inf)
    )
    assert float(value) == 0 and bool((slope == 0).all())
    for wrong in (-1, 4):
        assert bool(jnp.isnan(upsampled_nll(logits, label.at[0, 0, 0].set(wrong))[0, 0, 0]))


def test_an_accelerator_takes_larger_blocks(monkeypatch):
    logits, label, g = data((4, 6), (16, 24))
    monkeypatch.setattr(module, "WHOLE", 0)
    monkeypatch.setattr(module, "BLOCK", 2 * 16 * 4)  # one column
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    y, pull = jax.vjp(lambda x: upsampled_nll(x, label), logits)
    want, there = jax.vjp(lambda x: plain(x, label, False), logits)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(*pull(g), *there(g), rtol=1e-5, atol=1e-5)
    text = str(jax.make_jaxpr(lambda x: upsampled_nll(x, label))(logits))
    assert "length=2" in text  # blocks of 16 columns


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cross_entropy", "top_k", "ohem", "focal", "dice", "lovasz"])
def test_every_loss_takes_small_logits(name, blocks):
    """Its value is that of upsampled ones, with weights and a map where it knows them."""
    logits, label, g = data((4, 6), (16, 24))
    loss = PixelLoss(name, class_weights=(1.0, 2.0, 0.5, 1.0), min_kept=20)
    args = (jnp.abs(g),) if name in ("cross_entropy", "top_k", "ohem", "focal") else ()
    full = resize(logits, label.shape[1:])
    have = jax.value_and_grad(lambda x: loss(x, label, *args))(logits)
    want = jax.value_and_grad(lambda x: loss(resize(x, label.shape[1:]), label, *args))(logits)
    assert full.shape[:3] == label.shape
    for a, b in zip(have, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_step_takes_a_third_of_the_memory():
    """Logits of a 1x1 convolution at stride 4, 150 classes."""
    x, kernel = jnp.zeros((1, 64, 64, 8)), jnp.zeros((8, 150))
    label = jnp.zeros((1, 256, 256), jnp.int32)

    def peak(whole):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "WHOLE", whole)
            patch.setattr(module, "BLOCK", 2**20)
            step = jax.jit(jax.grad(lambda k: upsampled_nll(x @ k, label).mean()))
            memory = step.lower(kernel).compile().memory_analysis()
        return memory.temp_size_in_bytes

    assert 3 * peak(0) < peak(2**40)


@pytest.mark.parametrize("height", [32, 20], ids=["whole ratio", "any ratio"])
def test_sharded_rows_stay_where_they_are(height, blocks):
    mesh = jax.make_mesh((2, 4), ("data", "space"), (AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, PartitionSpec("data", "space"))
    logits, label, _ = data((8, 6), (height, 24))

    def step(x, label):
        return jax.value_and_grad(lambda x: upsampled_nll(x, label).sum())(x)

    shared = traced_on(mesh, step)
    compiled = jax.jit(shared, in_shardings=(rows, rows)).lower(logits, label).compile()
    assert "all-gather" not in compiled.as_text()
    found = compiled(jax.device_put(logits, rows), jax.device_put(label, rows))
    for have, want in zip(found, jax.jit(step)(logits, label), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)
