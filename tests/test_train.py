"""The training step and the loop: they learn, resume to the bit, and do not depend on the mesh."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image

from jaxseg import checkpoint, faults, models, sharding
from jaxseg import config as configs
from jaxseg import train as trainer
from jaxseg.data import sources
from jaxseg.errors import InputError
from jaxseg.evaluate import open_source, padding
from jaxseg.train import STOPPED, build, compile_step, load_variables, train, warm_start
from jaxseg.verbs.predict import Predictor


def small_config(**changes):
    """A tiny U-Net with batch norm on shapes, 32 x 32."""
    config = configs.default()
    config.data.crop = (32, 32)
    config.model.update(
        name="unet",
        num_classes=8,
        widths=(8, 16),
        padding="same",
        norm={"kind": "batch"},
        dropout=0.0,
    )
    config.optim.lr = 0.05
    config.train.update(steps=6, batch=8, log_every=1, checkpoint_every=0)
    config.eval.pictures = 2
    models.complete(config)
    configs.override(config, [(k.replace("__", "."), str(v)) for k, v in changes.items()])
    configs.check(config)
    return config


def deeplab_config(**changes):
    """Dilation, pooling, upsampling, batch norm: what a mesh could get wrong."""
    config = configs.default()
    config.data.crop = (65, 33)
    config.model.update(name="deeplabv3plus", num_classes=8, decoder=(16, 16))
    config.model.update(low_level=8, dropout=0.0)
    config.model.backbone = {"name": "resnet18", "output_stride": 8}
    config.optim.lr = 1e-3  # small: batch norm over few pixels amplifies rounding from step to step
    config.train.update(steps=3, batch=8)
    models.complete(config)
    configs.override(config, [(k.replace("__", "."), str(v)) for k, v in changes.items()])
    return config


def random_batch(config, seed=0):
    rng = np.random.default_rng(seed)
    shape = (config.train.batch, *config.data.crop)
    label = rng.integers(0, config.model.num_classes, shape, dtype=np.int32)
    label[rng.random(shape) < 0.1] = 255
    image = rng.integers(0, 256, (*shape, config.data.channels), dtype=np.uint8)
    return {"image": image, "label": label, "valid": np.ones(config.train.batch, bool)}


def run_steps(config, batches):
    """(state, the logs of each step) on the mesh of the config."""
    mesh = sharding.make_mesh(config.mesh)
    _, init, step = build(config, mesh)
    state, logs, compiled = init(), [], None
    for host in batches:
        batch = sharding.put_batch(host, mesh)
        compiled = compiled or compile_step(step, state, batch, mesh)
        state, values = compiled(state, batch)
        logs.append({k: float(v) for k, v in values.items()})
    return state, logs


@pytest.fixture
def few_scenes(monkeypatch):
    splits = {"train": (0, 24), "val": (1, 5), "test": (2, 3)}
    monkeypatch.setattr(sources.Shapes, "SPLITS", splits)


def test_one_batch_is_overfitted():
    config = small_config(train__steps=300, optim__name="adamw", optim__lr=0.02)
    scenes = [sources.Shapes("train", 3)[i] for i in range(8)]
    batch = {
        "image": np.stack([s["image"][32:64, 32:64] for s in scenes]),
        "label": np.stack([s["label"][32:64, 32:64] for s in scenes]).astype(np.int32),
        "valid": np.ones(8, bool),
    }
    _, logs = run_steps(config, [batch] * 300)
    assert logs[0]["loss"] > 1.0
    assert logs[-1]["loss"] < 0.05


@pytest.fixture(scope="module")
def on_one_device():
    """The logs of three steps of `deeplab_config` on a single device."""
    config = deeplab_config()
    sizes, auto = (1,) * len(sharding.AXES), (jax.sharding.AxisType.Auto,) * len(sharding.AXES)
    one = jax.make_mesh(sizes, sharding.AXES, axis_types=auto, devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda _: one)
        return run_steps(config, [random_batch(config, seed) for seed in range(3)])[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param({}, id="data8"),
        pytest.param({"mesh__fsdp": 4}, id="data2-fsdp4"),
    ],
)
def test_eight_devices_train_as_one(mesh, on_one_device, monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 256)  # so that fsdp shards these arrays too
    config = deeplab_config(**mesh)
    _, logs = run_steps(config, [random_batch(config, seed) for seed in range(3)])
    losses = [[x["loss"] for x in part] for part in (logs, on_one_device)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
def test_rows_over_space_train_as_one_device():
    config = small_config(mesh__data=2, mesh__space=4)
    batches = [random_batch(config, seed) for seed in range(3)]
    _, split = run_steps(config, batches)
    _, whole = run_steps(small_config(), batches)
    np.testing.assert_allclose([x["loss"] for x in split], [x["loss"] for x in whole], rtol=1e-5)


@pytest.mark.slow
def test_accumulation_equals_the_whole_batch_without_batch_norm():
    norm = {"model__norm__kind": "none", "optim__lr": 0.01}
    batches = [random_batch(small_config(train__batch=16), seed) for seed in range(2)]
    for batch in batches:  # equal numbers of labelled pixels, so that means of means are means
        batch["label"][batch["label"] == 255] = 0
    whole, a = run_steps(small_config(train__batch=16, **norm), batches)
    parts, b = run_steps(small_config(train__batch=16, train__accumulate=2, **norm), batches)
    np.testing.assert_allclose([x["loss"] for x in a], [x["loss"] for x in b], rtol=1e-5)
    for x, y in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_computes_near_float32_and_keeps_float32_parameters():
    batches = [random_batch(small_config(), seed) for seed in range(3)]
    _, full = run_steps(small_config(), batches)
    state, half = run_steps(small_config(train__compute_dtype="bfloat16"), batches)
    assert {x.dtype for x in jax.tree.leaves((state.params, state.batch_stats))} == {
        jnp.float32.dtype
    }
    losses = [[x["loss"] for x in logs] for logs in (full, half)]
    np.testing.assert_allclose(*losses, rtol=2e-2)
    assert losses[0] != losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", ["nan", "inf"])
@pytest.mark.parametrize("place", ["image", "loss", "grad"])
def test_a_step_that_is_not_finite_changes_no_weight(monkeypatch, place, number):
    """One pixel, the loss, or one array of the gradient."""
    monkeypatch.setenv("JAXSEG_TESTING", "1")
    monkeypatch.setenv("JAXSEG_FAULT", f"{number}_{place}@2")
    config = small_config(train__ema=0.9)
    good, bad = (faults.poison(random_batch(config), n) for n in (1, 2))
    mesh = sharding.make_mesh(config.mesh)
    _, init, step = build(config, mesh)
    step = jax.jit(step)
    state, _ = step(init(), sharding.put_batch(good, mesh))
    after, logs = step(state, sharding.put_batch(bad, mesh))
    assert np.isfinite(logs["loss"]) == (place == "grad")
    assert np.isfinite(logs["grad_norm"]) == (place == "loss")
    assert int(after.step) == int(state.step) + 1
    assert int(state.skipped) == 0 and int(after.skipped) == int(logs["skipped"]) == 1
    same = after.replace(step=state.step, skipped=state.skipped)
    assert checkpoint.fingerprint(same) == checkpoint.fingerprint(state)


@pytest.mark.slow
def test_the_logged_rate_is_the_one_applied_after_a_skipped_step():
    config = small_config(optim__weight_decay=0.0, optim__momentum=0.0, train__steps=4)
    good, bad = random_batch(config), random_batch(config)
    good["image"], bad["image"] = (b["image"].astype(np.float32) for b in (good, bad))
    bad["image"][0, 0, 0] = np.inf
    mesh = sharding.make_mesh(config.mesh)
    _, init, step = build(config, mesh)
    step = jax.jit(step)
    state, _ = step(init(), sharding.put_batch(bad, mesh))
    after, logs = step(state, sharding.put_batch(good, mesh))
    moved = jax.tree.map(jnp.subtract, after.params, state.params)
    length = jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(moved)))
    np.testing.assert_allclose(length, logs["lr"] * logs["grad_norm"], rtol=1e-4)
    assert float(logs["lr"]) == pytest.approx(config.optim.lr)  # the first that counts


@pytest.mark.slow
def test_frozen_parameters_have_no_part_in_clipping():
    plain = {"optim__weight_decay": 0.0, "optim__momentum": 0.0, "optim__clip": 1e-3}
    config = small_config(optim__multipliers=(("^down1_1/", 0.0),), **plain)
    mesh = sharding.make_mesh(config.mesh)
    _, init, step = build(config, mesh)
    before = init()
    after, logs = jax.jit(step)(before, sharding.put_batch(random_batch(config), mesh))
    moved = jax.tree.map(jnp.subtract, after.params, before.params)
    assert all((x == 0).all() for x in jax.tree.leaves(moved["down1_1"]))
    length = jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(moved)))
    np.testing.assert_allclose(length, logs["lr"] * config.optim.clip, rtol=1e-3)


def test_an_all_ignored_batch_gives_no_loss_and_no_nan():
    config = small_config()
    batch = random_batch(config)
    batch["label"][:] = 255
    state, logs = run_steps(config, [batch, batch])
    assert [x["loss"] for x in logs] == [0.0, 0.0]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_ema_is_the_moving_average_and_is_what_evaluation_uses():
    config = small_config(train__ema=0.15)
    mesh = sharding.make_mesh(config.mesh)
    _, init, step = build(config, mesh)
    step = jax.jit(step)
    states = [init()]
    for seed in range(3):
        states.append(step(states[-1], sharding.put_batch(random_batch(config, seed), mesh))[0])
    current = [{"params": s.params, "batch_stats": s.batch_stats} for s in states]
    expected = current[0]
    for decay, new in zip((1 / 10, 0.15, 0.15), current[1:], strict=True):  # 2 / 11 is more
        expected = jax.tree.map(lambda a, b, d=decay: d * a + (1 - d) * b, expected, new)
    for x, y in zip(jax.tree.leaves(states[-1].ema), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    assert states[-1].variables() is states[-1].ema


@pytest.mark.slow
def test_the_loop_never_waits_for_the_step_that_runs(tmp_path, few_scenes, monkeypatch):
    """Whatever the host reads of a step's logs, it reads after the next step was dispatched."""
    dispatched, seen, compile_step, device_get = [], [], trainer.compile_step, jax.device_get

    def compiled(*args):
        run = compile_step(*args)

        def step(state, batch):
            state, logs = run(state, batch)
            dispatched.append(logs)
            return state, logs

        return step

    def get(tree):
        for x in jax.tree.leaves(tree):
            of = [i for i, logs in enumerate(dispatched) if any(x is y for y in logs.values())]
            seen.extend((i, len(dispatched)) for i in of)
        return device_get(tree)

    monkeypatch.setattr(trainer, "compile_step", compiled)
    monkeypatch.setattr(jax, "device_get", get)
    config = small_config(train__log_every=1, train__eval_every=0)
    assert train(config, tmp_path / "run") == 0
    last = config.train.steps - 1
    assert {step for step, _ in seen} == set(range(last + 1))
    assert all(count >= step + 2 for step, count in seen if step < last)


@pytest.mark.slow
def test_a_run_whose_parameters_are_shared_is_loaded_so(tmp_path, few_scenes, monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 256)
    config = small_config(mesh__fsdp=4, train__steps=1)
    assert train(config, tmp_path / "run") == 0
    _, mesh, variables, _, _ = load_variables(tmp_path / "run")
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "space": 1}
    shared = [x for x in jax.tree.leaves(variables) if not x.sharding.is_fully_replicated]
    assert shared and all(x.addressable_shards[0].data.size * 4 == x.size for x in shared)
    label = Predictor(tmp_path / "run")(np.zeros((20, 37, 3), np.uint8)).label
    assert label.shape == (20, 37)
    text = (tmp_path / "run" / "config.json").read_text()
    (tmp_path / "run" / "config.json").write_text(text.replace('"fsdp": 4', '"fsdp": 3'))
    assert load_variables(tmp_path / "run")[1].shape["fsdp"] == 1


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def fingerprint_of(workdir):
    return load_variables(workdir)[3:]


def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(tmp_path, few_scenes, monkeypatch):
    """24 scenes of 8 a step: six steps cross an epoch's end; the run stops inside it."""
    assert train(small_config(train__ema=0.9), tmp_path / "whole") == 0
    from jaxseg import log

    real = log.Log.wait

    def wait(self, batches):
        if self.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(self, batches)

    monkeypatch.setattr(log.Log, "wait", wait)
    assert train(small_config(train__ema=0.9), tmp_path / "parts") == STOPPED
    monkeypatch.setattr(log.Log, "wait", real)
    stopped_at, _ = fingerprint_of(tmp_path / "parts")
    assert 3 <= stopped_at < 6
    assert train(small_config(train__ema=0.9, data__threads=1), tmp_path / "parts") == 0
    assert fingerprint_of(tmp_path / "parts") == fingerprint_of(tmp_path / "whole")
    records = [
        [(r["step"], r["loss"]) for r in metrics_of(tmp_path / run) if r["kind"] == "train"]
        for run in ("whole", "parts")
    ]
    assert records[0] == records[1]
    assert [step for step, _ in records[0]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_signal_in_an_evaluation_ends_it_and_saves_the_step(tmp_path, few_scenes, monkeypatch):
    import jaxseg.train as module

    real = module.evaluate

    def evaluate(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(module, "evaluate", evaluate)
    config = small_config(train__eval_every=3)
    assert train(config, tmp_path / "parts") == STOPPED
    assert fingerprint_of(tmp_path / "parts")[0] == 3
    monkeypatch.setattr(module, "evaluate", real)
    assert train(config, tmp_path / "parts") == 0
    assert train(config, tmp_path / "whole") == 0
    assert fingerprint_of(tmp_path / "parts") == fingerprint_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_killed_in_its_last_evaluation_is_reported_when_resumed(
    tmp_path, few_scenes, monkeypatch, capsys
):
    import jaxseg.train as module

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            train(small_config(), tmp_path)
    assert not (tmp_path / "eval.json").exists()
    assert train(small_config(), tmp_path) == 0
    assert json.loads((tmp_path / "eval.json").read_text())["step"] == 6
    assert (tmp_path / "curves.png").is_file() and "is finished" in capsys.readouterr().out
    assert [r["step"] for r in metrics_of(tmp_path) if r["kind"] == "eval"] == [6]
    records = (tmp_path / "metrics.jsonl").read_bytes()
    assert train(small_config(), tmp_path) == 0  # once
    assert (tmp_path / "metrics.jsonl").read_bytes() == records


def test_a_run_leaves_plain_files(tmp_path, few_scenes, capsys):
    assert train(small_config(train__eval_every=3), tmp_path) == 0
    names = {p.name for p in tmp_path.iterdir()}
    expected = {
        "config.json",
        "env.json",
        "metrics.jsonl",
        "eval.json",
        "curves.png",
        "confusion.png",
    }
    assert expected | {"per_class.csv", "pictures", "checkpoints"} <= names
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
    env = json.loads((tmp_path / "env.json").read_text())
    assert {"versions", "commit", "devices"} <= env.keys()
    evals = [r for r in metrics_of(tmp_path) if r["kind"] == "eval"]
    assert [r["step"] for r in evals] == [3, 6]
    score = json.loads((tmp_path / "eval.json").read_text())
    assert 0 <= score["mIoU"] <= 1 and len(score["per_class"]) == 8
    out = capsys.readouterr().out
    assert "compiling ..." in out and "s, once" in out and "images/s" in out and "ETA" in out
    assert train(small_config(train__eval_every=3), tmp_path) == 0
    assert "is finished, at step 6" in capsys.readouterr().out


@pytest.mark.slow
def test_a_warm_start_takes_what_fits_and_names_the_rest(tmp_path, few_scenes, capsys):
    assert train(small_config(train__steps=1), tmp_path / "first") == 0
    config = small_config(train__steps=1, init__workdir=tmp_path / "first", optim__lr=1e-9)
    assert train(config, tmp_path / "second") == 0
    assert "0 of" not in (out := capsys.readouterr().out) and "new: none" in out
    params = [load_variables(tmp_path / run)[2]["params"] for run in ("first", "second")]
    for a, b in zip(*map(jax.tree.leaves, params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    wider = small_config(train__steps=1, model__widths=(4, 12), init__workdir=tmp_path / "first")
    assert train(wider, tmp_path / "third") == 0
    assert "1 of 34 arrays" in (out := capsys.readouterr().out)
    assert "classifier/kernel, down0_1/conv/kernel" in out
    with pytest.raises(InputError, match="none of its parameters fits"):
        warm_start(tmp_path / "first", {"params": {"head": {"kernel": jnp.zeros(3)}}})


@pytest.mark.slow
def test_the_moving_average_starts_from_the_weights_that_a_run_starts_from(tmp_path, few_scenes):
    assert train(small_config(train__steps=1), tmp_path / "first") == 0
    start = load_variables(tmp_path / "first")[2]["params"]
    options = {"train__ema": 0.999, "optim__lr": 1e-9, "train__steps": 1}
    config = small_config(**options, init__workdir=tmp_path / "first")
    assert train(config, tmp_path / "second") == 0
    average = load_variables(tmp_path / "second")[2]["params"]
    for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(average), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_batch_must_divide_over_the_devices(tmp_path):
    with pytest.raises(InputError, match="train.batch is 12: must be divisible by 8"):
        train(small_config(train__batch=12), tmp_path)
    with pytest.raises(InputError, match="data.crop has 36 rows"):
        train(small_config(mesh__data=1, mesh__space=8, data__crop=(36, 32)), tmp_path)


@pytest.mark.parametrize(
    ("values", "words"), [((0, 255), '"values"'), ((255,), "nothing to learn")]
)
def test_masks_of_white_are_told_before_anything_is_compiled(write_folder, tmp_path, values, words):
    data = write_folder(tmp_path / "data", names=("ground", "plant"))
    for path in (data / "train" / "masks").iterdir():
        label = np.full((40, 48), values[-1], np.uint8)
        label[:20] = values[0]
        Image.fromarray(label).save(path)
    config = tiny_config().unlock()
    config.data.dataset, config.model.num_classes = str(data), 2
    with pytest.raises(InputError, match=words):
        train(config.lock(), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_crops_that_are_mostly_padding_are_said():
    config, source = tiny_config().unlock(), open_source(tiny_config(), "val")
    assert padding(config, source) == ""  # scenes are larger than the crop
    config.data.crop = (400, 400)
    side = source.size(0)
    said = f"images are small, such as {side[0]}x{side[1]}: "
    assert padding(config, source).startswith(said) and "data.crop" in padding(config, source)
