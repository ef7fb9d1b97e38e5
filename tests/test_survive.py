"""A whole run against faults, in this process: what it promises, it does."""

import json
import os
import re
import signal
import threading
import time

import jax
import numpy as np
import pytest
from processes import tidy

from jaxseg import checkpoint, config, main, models, sharding
from jaxseg import faults as rehearsals
from jaxseg.errors import InputError, RestartError
from jaxseg.life import STOPPED
from jaxseg.train import load_variables, train


def small(**changes):
    """A U-Net whose steps take milliseconds, for 12 steps, saved every second one."""
    result = config.default()
    result.data.update(crop=(16, 16), threads=1)
    result.model.update(name="unet", num_classes=8, widths=(4, 4), padding="same", dropout=0.0)
    result.train.update(steps=12, batch=8, log_every=1, eval_every=0, checkpoint_every=2, ema=0.9)
    result.eval.update(batch=8, pictures=1)
    models.complete(result)
    config.override(result, [(k.replace("__", "."), str(v)) for k, v in changes.items()])
    return result.lock()


@pytest.fixture(autouse=True)
def quick(few_scenes):
    """Every test here trains on few scenes."""


@pytest.fixture
def faults(monkeypatch):
    def ask(text):
        monkeypatch.setenv("JAXSEG_TESTING", "1")
        monkeypatch.setenv("JAXSEG_FAULT", text)

    return ask


def records(workdir, kind="train"):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def end(workdir):
    """(step, fingerprint) of the newest checkpoint."""
    return load_variables(workdir)[3:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The end of a run that nothing befell."""
    from conftest import FEW_SCENES

    from jaxseg.data.sources import Shapes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shapes, "SPLITS", FEW_SCENES)
        workdir = tmp_path_factory.mktemp("whole")
        assert train(small(), workdir) == 0
        return end(workdir)


def signal_after(workdir, step, name):
    """Sends a signal to this process a second after the record of a step."""
    while not (workdir / "metrics.jsonl").exists() or len(records(workdir)) < step:
        time.sleep(0.1)
    time.sleep(1)
    os.kill(os.getpid(), getattr(signal, name))


SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
STEPS = {"start": 0, "compile": 0, "5": 4, "save": 2, "eval": 4}  # place -> the step it saves
QUICK = {("SIGINT", "int@compile")}
PHASES = [
    (name, f"{name[3:].lower()}@{place}", step) for name in SIGNALS for place, step in STEPS.items()
]
PHASES = [
    pytest.param(*p, marks=() if p[:2] in QUICK else pytest.mark.slow)
    for p in [*PHASES, *((name, "stall@6", 5) for name in SIGNALS[1:])]
]
PHASES.append(("SIGTERM", "stall@6", 5))


@pytest.mark.parametrize(("name", "fault", "step"), PHASES)
def test_a_signal_in_any_phase_saves_the_step_and_the_rest_is_the_same(
    tmp_path, faults, capsys, monkeypatch, whole, name, fault, step
):
    real = rehearsals.strike

    def once(place):  # a second interrupt is obeyed at once
        real(place)
        if rehearsals.due(place):
            faults("")

    monkeypatch.setattr(rehearsals, "strike", once)
    faults(fault)
    evals = {"train__eval_every": 4 if "eval" in fault else 0}
    begin = time.monotonic()
    if "stall" in fault:
        threading.Thread(target=signal_after, args=(tmp_path, 4, name)).start()
    assert train(small(**evals), tmp_path) == STOPPED
    assert time.monotonic() - begin < 30
    assert f"{name}: saved step {step} in" in capsys.readouterr().out
    logged = {r["step"]: r["fingerprint"] for r in records(tmp_path, "checkpoint")}
    assert end(tmp_path) == (step, logged[step])
    faults("")
    assert train(small(**evals), tmp_path) == 0
    assert f"resuming at step {step}, fingerprint {logged[step]}" in capsys.readouterr().out
    assert end(tmp_path) == whole
    assert [r["step"] for r in records(tmp_path)] == list(range(1, 13))
    scored = [4, 8, 12] if "eval" in fault else [12]
    assert [r["step"] for r in records(tmp_path, "eval")] == scored


def test_steps_that_are_not_finite_change_nothing(tmp_path, faults):
    faults("nan_image@2,nan_loss@3,nan_grad@4-5")
    assert train(small(), tmp_path) == 0
    found = records(tmp_path)
    assert [r["skipped"] for r in found] == [0, 1, 2, 3, 4] + [4] * 7
    bad = [not np.isfinite([r["loss"], r["grad_norm"]]).all() for r in found]
    assert bad == [False] + [True] * 4 + [False] * 7
    # Step 2 looked at the weights of step 1, and so did step 6: they are those of saves 2 and 4.
    assert records(tmp_path, "roll-back") == []


@pytest.mark.slow
def test_five_in_a_row_roll_back_and_the_run_goes_on_with_other_batches(tmp_path, faults, capsys):
    faults("nan_grad@7-11")
    assert train(small(), tmp_path / "a") == 0
    (back,) = records(tmp_path / "a", "roll-back")
    assert (back["from"], back["step"]) == (11, 4) and "norm is nan" in back["reason"]
    order = [r["step"] for r in records(tmp_path / "a")]
    assert order == [*range(1, 12), *range(5, 13)]  # and the bad ones are told
    aside = {p.name for p in (tmp_path / "a" / "checkpoints").iterdir()}
    assert {"6.rolled_back", "12"} <= aside
    assert checkpoint.position(tmp_path / "a", 12) == 20
    faults("nan_grad@7-11,term@17")  # stopped after the roll-back, it goes on the same way
    assert train(small(), tmp_path / "b") == STOPPED
    assert end(tmp_path / "b")[0] == 8 and checkpoint.position(tmp_path / "b", 8) == 16
    faults("")
    assert train(small(), tmp_path / "b") == 0
    assert end(tmp_path / "a") == end(tmp_path / "b")


def test_a_run_that_stays_broken_ends_after_three_roll_backs(tmp_path, faults):
    faults("nan_loss@3-60")
    with pytest.raises(FloatingPointError, match="after 3 roll-backs: training diverges"):
        train(small(), tmp_path)
    assert [r["step"] for r in records(tmp_path, "roll-back")] == [0, 0, 0]
    assert sum(not np.isfinite(r["loss"]) for r in records(tmp_path)) >= 4 * 5
    assert not checkpoint.exists(tmp_path)  # those of broken steps are aside


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("mend it"), 2),
        (RestartError("a peer is gone"), 75),
        (FloatingPointError("training diverges"), 76),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code):
    def run(_):
        raise error

    monkeypatch.setattr(main, "run", run)
    monkeypatch.setattr(threading.Timer, "start", lambda _: None)
    with pytest.raises(SystemExit) as caught:
        main.main()
    assert caught.value.code == code and capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.slow
def test_a_loss_that_leaps_is_seen_and_rolled_back_and_the_run_recovers(tmp_path, faults, capsys):
    options = {"train__steps": 260, "train__checkpoint_every": 20, "data__flip": False}
    faults("")
    assert train(small(**options), tmp_path / "clean") == 0
    faults("spike@150")
    assert train(small(**options), tmp_path / "spiked") == 0
    told = re.findall(r"step (\d+): the loss leapt", capsys.readouterr().out)
    assert 150 <= int(told[0]) <= 150 + 2
    (back,) = records(tmp_path / "spiked", "roll-back")
    assert back["step"] == 140 and back["from"] <= 150 + 6 and "leapt" in back["reason"]
    clean, spiked = (
        np.mean([r["loss"] for r in records(tmp_path / run)][-60:]) for run in ("clean", "spiked")
    )
    assert spiked < 1.05 * clean


LONGER = {"train__steps": 40, "train__checkpoint_every": 10, "data__flip": False}


@pytest.fixture
def soon(monkeypatch):
    """A leap is measured against few losses."""
    monkeypatch.setattr("jaxseg.guard.WINDOW", 16)


@pytest.mark.slow
@pytest.mark.parametrize("spike", [38, 39])
def test_a_leap_in_the_last_steps_is_rolled_back(tmp_path, faults, soon, spike):
    faults(f"spike@{spike}")
    assert train(small(**LONGER), tmp_path) == 0
    (back,) = records(tmp_path, "roll-back")
    assert (back["from"], back["step"]) == (40, 30) and "leapt" in back["reason"]
    losses = [r["loss"] for r in records(tmp_path)]
    assert end(tmp_path)[0] == 40 and losses[-1] < 2 * np.median(losses[-16:])
    assert max(losses[-8:]) < 2 * np.median(losses[-16:])


@pytest.mark.slow
def test_one_leap_in_the_last_step_does_not_begin_a_run_anew(tmp_path, faults, soon, capsys):
    faults("spike@39")
    assert train(small(**LONGER | {"train__checkpoint_every": 0}), tmp_path) == 0
    assert end(tmp_path)[0] == 40 and not records(tmp_path, "roll-back")
    assert "step 40: the loss leapt" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "every", "good"),
    [("spike@33,term@37", 10, 30), ("spike@33,term@35", 17, 17), ("spike@33,term@35", 33, 0)],
)
def test_a_signal_amid_a_leap_leaves_the_last_good_step_as_the_newest(
    tmp_path, faults, soon, capsys, fault, every, good
):
    """Also where the leap is in the very last step, and the step before it was saved."""
    config = small(**LONGER | {"train__checkpoint_every": every})
    faults(fault)
    assert train(config, tmp_path) == STOPPED
    said = f"the loss has leapt, so nothing was saved; the newest good step is {good} in"
    assert f"SIGTERM: {said}" in capsys.readouterr().out
    assert checkpoint.exists(tmp_path) == bool(good)
    assert not good or end(tmp_path)[0] == good
    faults("")
    assert train(config, tmp_path) == 0
    assert f"resuming at step {good}" in capsys.readouterr().out or not good


@pytest.mark.slow
def test_a_run_that_diverges_says_how_to_go_on_and_that_works(tmp_path, faults, capsys):
    faults("nan_loss@18-90")
    with pytest.raises(FloatingPointError, match="lower optim.lr") as caught:
        train(small(train__steps=40, train__checkpoint_every=4), tmp_path / "a")
    (old,) = re.findall(r"--config\.init\.workdir=(\S+)", str(caught.value))
    faults("")
    rate = small().optim.lr / 10
    assert train(small(init__workdir=old, optim__lr=rate), tmp_path / "b") == 0
    assert re.search(r"(\d+) of \1 arrays from .*a; new: none", capsys.readouterr().out)


def test_a_signal_while_the_data_set_is_indexed_is_noted(tmp_path, monkeypatch, capsys):
    import jaxseg.train as module

    real, lost = module.open_source, []

    def opening(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(module, "open_source", opening)
    before = signal.signal(signal.SIGTERM, lambda *_: lost.append(1))
    try:
        assert train(small(), tmp_path) == STOPPED and not lost
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "SIGTERM: saved step 0 in" in capsys.readouterr().out


@pytest.mark.slow
def test_metrics_that_cannot_be_written_cost_no_score(tmp_path, capsys, whole):
    (tmp_path / "metrics.jsonl").mkdir()
    assert train(small(train__eval_every=6), tmp_path) == 0
    assert capsys.readouterr().out.count("metrics are lost, training goes on") == 1
    assert json.loads((tmp_path / "eval.json").read_text())["step"] == 12
    assert end(tmp_path) == whole


def test_windows_that_do_not_fit_are_told_before_the_first_step(tmp_path):
    config = small(eval__mode="slide", eval__crop="(512, 512)")
    for dry_run in (True, False):
        with pytest.raises(InputError, match="an image of .* smaller than one window"):
            train(config, tmp_path / "run", dry_run)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_dry_run_evaluates_one_batch(tmp_path, monkeypatch, capsys):
    import jaxseg.train as module

    real, seen = module.evaluate, []

    def evaluate(*arguments):
        seen.append(len(arguments[2]))
        return real(*arguments)

    monkeypatch.setattr(module, "evaluate", evaluate)
    assert train(small(eval__batch=3), tmp_path / "run", dry_run=True) == 0
    assert seen == [3] and "one batch of the evaluation" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_save_that_fails_is_told_and_the_next_one_works(tmp_path, monkeypatch, capfd, whole):
    real, failed = checkpoint.save, []

    def save(manager, step, *rest):
        if step in (4, 6):
            failed.append(step)
            raise OSError(28, "No space left on device")
        return real(manager, step, *rest)

    monkeypatch.setattr(checkpoint, "save", save)
    assert train(small(), tmp_path) == 0
    assert failed == [4, 6]
    err = capfd.readouterr().err
    assert all(f"checkpoint {step} could not be saved: OSError" in err for step in failed)
    assert {r["step"] for r in records(tmp_path, "checkpoint")} == {2, 8, 10, 12}
    assert end(tmp_path) == whole


def test_a_last_save_that_fails_is_an_error(tmp_path, faults):
    faults("full@save")
    with pytest.raises(InputError, match="checkpoint 12 could not be saved.*the same command"):
        train(small(), tmp_path)


@pytest.mark.slow
def test_an_evaluation_that_fails_ends_the_run_with_its_error_after_the_weights_are_saved(
    tmp_path, monkeypatch, capsys, whole
):
    import jaxseg.train as module

    def broken(*_):
        raise InputError("no such image")

    monkeypatch.setattr(module, "evaluate", broken)
    with pytest.raises(InputError, match="no such image"):
        train(small(train__eval_every=4), tmp_path)
    assert capsys.readouterr().out.count("the evaluation failed, training goes on") == 3
    assert end(tmp_path) == whole


def test_a_second_run_in_the_workdir_is_refused_while_the_first_runs(tmp_path, monkeypatch):
    from jaxseg import log

    real, refused = log.Log.wait, []

    def wait(self, batches):
        if not refused:
            with pytest.raises(InputError, match="is in use by process") as caught:
                train(small(), tmp_path)
            refused.append(caught)
        return real(self, batches)

    monkeypatch.setattr(log.Log, "wait", wait)
    assert train(small(), tmp_path) == 0 and refused


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["one", pytest.param("space", marks=pytest.mark.slow)])
def test_another_mesh_or_device_count_goes_on_from_the_same_state(
    tmp_path, faults, monkeypatch, capsys, mesh
):
    kinds = (jax.sharding.AxisType.Auto,) * len(sharding.AXES)
    sizes = (1,) * len(kinds)
    one = jax.make_mesh(sizes, sharding.AXES, axis_types=kinds, devices=jax.devices()[:1])
    same = {"model__norm__kind": "none", "optim__lr": 1e-3}
    faults("term@7")
    assert train(small(**same), tmp_path) == STOPPED
    digest = end(tmp_path)[1]
    losses = []
    for changes in ({}, {"mesh__data": 2, "mesh__space": 4} if mesh == "space" else {}):
        faults("term@9")
        if mesh == "one" and losses:
            monkeypatch.setattr(sharding, "make_mesh", lambda _: one)
        assert train(small(**same, **changes), tmp_path) == STOPPED
        assert f"resuming at step 6, fingerprint {digest}" in capsys.readouterr().out
        losses.append([r["loss"] for r in records(tmp_path)][6:8])
        checkpoint.set_aside(tmp_path, after=6)
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
def test_a_thousand_steps_compile_nothing_and_leave_nothing(tmp_path, monkeypatch):
    from jaxseg import log

    compiled, alive, real = [], [], log.Log.train

    def count(name, _, **__):
        if "backend_compile" in name:
            compiled.append(name)

    def note(self, step, values):
        real(self, step, values)
        alive.append((len(compiled), len(jax.live_arrays()), time.perf_counter()))

    monkeypatch.setattr(log.Log, "train", note)
    jax.monitoring.register_event_duration_secs_listener(count)
    options = {"train__checkpoint_every": 0, "train__steps": 1000, "train__ema": 0.0}
    tidy()
    assert train(small(**options), tmp_path) == 0
    compilations, arrays, times = map(np.array, zip(*alive, strict=True))
    assert len(alive) == 1000 and compiled
    assert compilations[1] == compilations[998]
    assert arrays[2:998].min() == arrays[2:998].max()
    seconds = np.diff(times)[2:]
    assert np.quantile(seconds, 0.99) < 5 * np.median(seconds)
