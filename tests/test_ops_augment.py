"""Augmentation on the device: the host's, replayed; and the same distribution."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from ml_collections import ConfigDict

from jaxseg import config as configs
from jaxseg import sharding
from jaxseg.data import catalog, pipeline, pixels, transforms
from jaxseg.data.colours import IGNORE
from jaxseg.ops import augment
from jaxseg.train import augment_batch, train

MEAN = (101.4, 51.6, 7.0)


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """The host in numpy and Pillow: OpenCV keeps hues in 8 bits."""
    monkeypatch.setattr(pixels, "cv2", None)


_place = jax.jit(augment.place, static_argnums=(4, 5))
_distort = jax.jit(augment.distort)


def _example(size: tuple[int, int], channels: int = 3, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-size[0] // 4), -(-size[1] // 4), channels))
    image = coarse.repeat(4, 0).repeat(4, 1)[: size[0], : size[1]]
    image = (image * 0.9 + rng.normal(10, 5, image.shape)).clip(0, 255).astype(np.uint8)
    label = rng.integers(0, 5, size).astype(np.uint8)
    return {"image": image, "label": label}


def _numbers(
    factor: float,
    window: transforms.Window,
    flips: tuple[bool, bool],
    colour: transforms.Colour,
) -> augment.Draw:
    *values, first = colour
    return augment.Draw(
        jnp.float32(factor),
        jnp.array(window.start, jnp.int32),
        jnp.array(flips),
        *map(jnp.float32, values),
        jnp.array(first),
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("size", [(61, 84), (40, 40), (9, 70), (25, 20)])
@pytest.mark.parametrize("factor", [0.31, 0.5, 0.8, 1.0, 1.43, 2.0])
def test_the_same_numbers_make_the_hosts_example(size, factor, dtype):
    crop, flips = (25, 32), (True, factor > 0.7)
    colour = transforms.Colour(-12.5, 1.3, 0.7, 13.0, factor > 1)
    example = _example(size)
    example["image"] = example["image"].astype(dtype)
    rng = np.random.default_rng(1)
    window = transforms.draw_window(rng, example["label"], factor, crop, 1.0)
    host = transforms.pad(transforms.cut(example, window), crop, MEAN)
    want_image, want_label = host["image"][::-1], host["label"][::-1]
    if flips[1]:
        want_image, want_label = want_image[:, ::-1], want_label[:, ::-1]

    stage = transforms.pad(example, (70, 90), MEAN)  # as the pipeline delivers it
    numbers = _numbers(factor, window, flips, colour)
    label = jnp.asarray(stage["label"], jnp.int32)
    image, label = _place(stage["image"], label, jnp.array(size), numbers, crop, MEAN)
    assert image.dtype == dtype and label.dtype == jnp.int32
    np.testing.assert_array_equal(label, want_label)
    # The host rounds bytes after each axis.
    _assert_close(image, want_image, 1 if dtype == np.uint8 else 0.01)

    image = _distort(jnp.asarray(want_image), numbers)
    assert image.dtype == dtype
    _assert_close(image, transforms.distort(want_image, colour), 2 if dtype == np.uint8 else 0.01)


def _assert_close(ours: jax.Array, theirs: np.ndarray, tolerance: float) -> None:
    difference = np.abs(np.asarray(ours, np.float64) - theirs)
    assert difference.max() <= tolerance and difference.mean() < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("step", [0.0, 0.25])
def test_its_numbers_are_distributed_as_the_hosts(step):
    size, crop, scale, count = (60, 83), (40, 50), (0.5, 2.0), 4000
    drawn = jax.vmap(
        partial(
            augment.draw,
            size=jnp.array(size),
            crop=crop,
            scale=scale,
            scale_step=step,
            flips=(False, True),
            photometric=True,
        )
    )(jax.random.split(jax.random.key(0), count))
    rng, label = np.random.default_rng(0), np.zeros(size, np.uint8)
    factors = [transforms.draw_scale(rng, scale, step) for _ in range(count)]
    starts = [transforms.draw_window(rng, label, f, crop, 1.0).start for f in factors]
    _assert_same_quantiles(drawn.factor, factors, 0.06)
    for axis in (0, 1):
        _assert_same_quantiles(drawn.start[:, axis], np.array(starts)[:, axis], 2.01)
    assert not drawn.flip[:, 0].any() and 0.46 < drawn.flip[:, 1].mean() < 0.54
    for values, neutral, low, high in (
        (drawn.brightness, 0, -32, 32),
        (drawn.contrast, 1, 0.5, 1.5),
        (drawn.saturation, 1, 0.5, 1.5),
        (drawn.hue, 0, -18, 18),
    ):
        values = np.asarray(values)
        assert 0.46 < (values == neutral).mean() < 0.54
        assert low <= values.min() and values.max() <= high
        spread = values[values != neutral].std()
        assert spread == pytest.approx((high - low) / 12**0.5, rel=0.04)
    assert 0.46 < drawn.contrast_first.mean() < 0.54


def test_hue_turns_as_far_as_it_is_told():
    """MMSegmentation's recipe has 36 degrees, and 0 is off."""
    options = {"crop": (8, 8), "scale": (1.0, 1.0), "scale_step": 0.0, "flips": (False, False)}
    keys = jax.random.split(jax.random.key(0), 1000)
    for hue in (36.0, 0.0):
        draw = partial(augment.draw, size=jnp.array((8, 8)), photometric=True, hue=hue, **options)
        drawn = np.asarray(jax.vmap(draw)(keys).hue)
        assert -hue <= drawn.min() <= -0.95 * hue and 0.95 * hue <= drawn.max() <= hue


def _assert_same_quantiles(ours, theirs, tolerance: float) -> None:
    at = np.linspace(0, 1, 21)
    a, b = np.quantile(np.asarray(ours), at), np.quantile(np.asarray(theirs), at)
    assert np.abs(a - b).max() <= tolerance


def test_its_examples_are_distributed_as_the_hosts():
    data = _data()
    example, count = _example((48, 64)), 400
    rng = np.random.default_rng(0)
    host = [transforms.augment(example, rng, data) for _ in range(count)]
    device = _augment(_staged([example] * count), jax.random.key(0))
    for key in ("image", "label"):
        ours, theirs = np.asarray(device[key]), np.stack([h[key] for h in host])
        for channel in range(3 if key == "image" else 1):
            a, b = (x[..., channel] if key == "image" else x for x in (ours, theirs))
            bins = np.arange(0, 257, 16) if key == "image" else np.array([0, 1, 2, 3, 4, 5, 256])
            a, b = (np.histogram(x, bins)[0] / x.size for x in (a, b))
            assert np.abs(a - b).sum() < 0.1
    assert (np.asarray(device["label"]) == IGNORE).any()


def _data() -> ConfigDict:
    data = configs.default().data
    data.update(crop=(40, 50), scale=(0.5, 2.0), photometric=True, flip_vertical=True, mean=MEAN)
    return data


def _staged(examples: list[dict], shape: tuple[int, int] = (48, 64)) -> dict:
    padded = [transforms.pad(example, shape, MEAN) for example in examples]
    return {
        "image": jnp.stack([e["image"] for e in padded]),
        "label": jnp.stack([e["label"].astype(np.int32) for e in padded]),
        "size": jnp.array([e["label"].shape for e in examples]),
        "position": jnp.arange(len(examples), dtype=jnp.uint32),
        "valid": jnp.ones(len(examples), bool),
    }


@jax.jit
def _augment(batch: dict, rng: jax.Array) -> dict:
    options = {k: _data()[k] for k in ("crop", "mean", "scale", "flip_vertical", "photometric")}
    return augment.augment(batch, rng, **options)


@pytest.mark.slow
def test_an_example_depends_on_the_key_and_its_place_alone():
    examples = [_example((48, 64), seed=i) for i in range(4)]
    whole = _augment(_staged(examples), jax.random.key(3))
    again = _augment(_staged(examples), jax.random.key(3))
    part = _augment(_staged(examples[:2]), jax.random.key(3))
    other = _augment(_staged(examples), jax.random.key(4))
    assert set(whole) == {"image", "label", "valid"}
    np.testing.assert_array_equal(whole["image"], again["image"])
    np.testing.assert_array_equal(whole["label"][:2], part["label"])
    difference = whole["image"][:2].astype(int) - part["image"].astype(int)
    assert jnp.abs(difference).max() <= 1  # another shape is compiled anew
    assert (whole["image"] != other["image"]).any()


def test_equal_examples_of_a_batch_are_augmented_differently():
    out = _augment(_staged([_example((48, 64))] * 4), jax.random.key(0))
    assert len({np.asarray(image).tobytes() for image in out["image"]}) == 4


@pytest.mark.parametrize("channels", [1, 4])
def test_images_without_colours_go_through(channels):
    batch = _staged([_example((48, 64), seed=i) for i in range(2)])
    batch["image"] = jnp.repeat(batch["image"][..., :1], channels, axis=3)
    mean = (9.0,) * channels
    options = {"crop": (8, 9), "mean": mean, "photometric": True}
    out = jax.jit(partial(augment.augment, **options))(batch, jax.random.key(0))
    assert out["image"].shape == (2, 8, 9, channels) and out["image"].dtype == jnp.uint8
    assert (out["image"] == out["image"][..., :1]).all()


@pytest.mark.slow
def test_a_step_is_replayed_on_any_mesh():
    config = configs.default()
    config.data.update(augment_on="device", crop=(16, 24), scale=(0.5, 2.0), photometric=True)
    batch = _staged([_example((48, 64), seed=i) for i in range(8)])
    alone = jax.jit(lambda batch, step: augment_batch(batch, step, config))(batch, 7)
    config.mesh.update(data=2, fsdp=2, space=2)
    placed = sharding.put_batch(batch, sharding.make_mesh(config.mesh))
    step = jax.jit(lambda batch, step: augment_batch(batch, step, config))
    out, other = step(placed, 7), step(placed, 8)
    np.testing.assert_array_equal(out["label"], alone["label"])
    assert np.abs(np.asarray(out["image"], int) - np.asarray(alone["image"], int)).max() <= 1
    assert (np.asarray(other["label"]) != np.asarray(alone["label"])).any()


def test_the_host_augments_by_default():
    batch = _staged([_example((48, 64))])
    assert augment_batch(batch, 0, configs.default()) is batch


@pytest.mark.slow
def test_a_run_can_augment_on_the_device(few_scenes, tmp_path, capsys):
    config = tiny_config()
    config.data.update(augment_on="device", scale=(0.5, 2.0), photometric=True)
    assert train(config, tmp_path / "run", dry_run=True) == 0
    assert "dry run: one step, loss" in capsys.readouterr().out


def test_the_position_in_the_stream_decides_whichever_process_holds_it(few_scenes):
    data = _data()
    data.augment_on = "device"
    source = catalog.open_split("shapes", "train")

    def batches(process: tuple[int, int]) -> list[dict]:
        stream = pipeline.train_batches(source, data, batch=8, seed=5, start=2, process=process)
        with contextlib.closing(stream):
            return [next(stream) for _ in range(2)]

    whole, parts = batches((0, 1)), [batches((p, 2)) for p in range(2)]
    for number, one in enumerate(whole):
        assert one["position"].tolist() == list(range(16 + 8 * number, 24 + 8 * number))
        joined = {key: np.concatenate([part[number][key] for part in parts]) for key in one}
        assert joined["position"].tolist() != one["position"].tolist()  # process after process
        rows = np.argsort(joined["position"])
        alone, both = (_augment(batch, jax.random.key(3)) for batch in (one, joined))
        for key in ("image", "label"):
            np.testing.assert_array_equal(alone[key], np.asarray(both[key])[rows])
