"""The log: records, what a resumed run keeps, and writers that fail."""

import importlib.machinery
import json
import math
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxseg.log import Log, clock


def _values(loss: float, grad_norm: float = 2.0, skipped: int = 0) -> dict:
    values = {"loss": loss, "lr": 0.5, "grad_norm": grad_norm, "skipped": skipped}
    return {key: jnp.float32(value) for key, value in values.items()}


def _records(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _write(workdir: Path, start: int, last: int) -> None:
    with Log(workdir, start=start, steps=last, batch=4) as log:
        for step in range(start + 1, last + 1):
            log.train(step, _values(step / 8))


def test_every_step_becomes_a_record_and_a_line(tmp_path, capsys):
    _write(tmp_path, 0, 3)
    records = _records(tmp_path)
    assert [r["step"] for r in records] == [1, 2, 3]
    for record in records:
        assert record["kind"] == "train" and record["loss"] == record["step"] / 8
        assert record["lr"] == 0.5 and record["grad_norm"] == 2.0
        assert record["images_per_s"] > 0 and 0 <= record["data_wait"] <= 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("step 2/3  loss 0.2500  lr 5.00e-01")
    assert all(word in lines[1] for word in ("images/s", "ETA", "data wait"))


def test_a_record_is_written_when_the_next_one_comes(tmp_path):
    with Log(tmp_path, start=0, steps=3, batch=4) as log:
        log.train(1, _values(1))
        assert _records(tmp_path) == []
        log.train(2, _values(1))
        assert [r["step"] for r in _records(tmp_path)] == [1]
    assert [r["step"] for r in _records(tmp_path)] == [1, 2]


def test_an_evaluation_is_recorded_after_the_steps_before_it(tmp_path, capsys):
    scores = {"mIoU": 0.5, "mAcc": None, "aAcc": 0.75, "IoU": [0.5, None], "Acc": [1.0, None]}
    with Log(tmp_path, start=0, steps=2, batch=4) as log:
        log.train(1, _values(1))
        log.eval(1, scores)
    train, evaluation = _records(tmp_path)
    assert (train["kind"], train["step"]) == ("train", 1)
    assert evaluation == {"kind": "eval", "step": 1, "mIoU": 0.5, "mAcc": None, "aAcc": 0.75}
    assert "step 1/2  validation  mIoU 0.5000  aAcc 0.7500" in capsys.readouterr().out


def test_a_resumed_run_drops_the_records_after_its_start(tmp_path):
    _write(tmp_path, 0, 5)
    _write(tmp_path, 3, 6)
    assert [r["step"] for r in _records(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_run_from_the_start_begins_a_new_file(tmp_path):
    _write(tmp_path, 0, 5)
    _write(tmp_path, 0, 2)
    assert [r["step"] for r in _records(tmp_path)] == [1, 2]


def test_a_line_that_a_crash_cut_short_does_not_stop_a_resumed_run(tmp_path):
    _write(tmp_path, 0, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    _write(tmp_path, 3, 4)
    assert [r["step"] for r in _records(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_recorded_as_any_other(tmp_path, loss, capsys):
    with Log(tmp_path, start=0, steps=9, batch=4) as log:
        log.train(1, _values(1.0))
        log.train(2, _values(loss))
    assert repr(_records(tmp_path)[1]["loss"]) == repr(loss)
    assert f"step 2/9  loss {loss:.4f}" in capsys.readouterr().out


def test_a_roll_back_is_a_record_after_those_of_the_bad_steps(tmp_path, capsys):
    with Log(tmp_path, start=0, steps=9, batch=4) as log:
        log.train(7, _values(math.nan))
        log.roll_back(7, 4, "the loss is nan")
        log.train(5, _values(1.0))
    train, back, after = _records(tmp_path)
    assert (train["step"], after["step"], after["images_per_s"] > 0) == (7, 5, True)
    assert back == {"kind": "roll-back", "step": 4, "from": 7, "reason": "the loss is nan"}
    assert "step 7: the loss is nan: rolled back to step 4" in capsys.readouterr().out


def test_skipped_steps_are_told(tmp_path, capsys):
    with Log(tmp_path, start=0, steps=2, batch=4) as log:
        log.train(1, _values(1.0))
        log.train(2, _values(1.0, skipped=3))
    first, second = capsys.readouterr().out.splitlines()
    assert "skipped" not in first and second.endswith("steps skipped 3")


def test_a_terminal_has_one_line_that_changes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    scores = {"mIoU": 0.5, "mAcc": 0.5, "aAcc": 0.5}
    with Log(tmp_path, start=0, steps=2, batch=4) as log:
        log.train(1, _values(1.0))
        log.train(2, _values(0.5))
        log.eval(2, scores)
    out = capsys.readouterr().out
    clear = "\r\033[K"
    assert out.startswith(f"{clear}step 1/2  loss 1.0000")
    assert f"{clear}step 2/2  loss 0.5000" in out and f"{clear}step 2/2  validation" in out
    assert out.count("\n") == 2 and all(word in out for word in ("ETA", "images/s", "data wait"))


def test_tensorboard_gets_the_same_numbers(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            assert folder == str(tmp_path / "tensorboard") and purge_step == 1

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    module = types.ModuleType("tensorboardX", "stands for the real one")
    module.SummaryWriter = Writer
    module.__spec__ = importlib.machinery.ModuleSpec("tensorboardX", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    with Log(tmp_path, start=0, steps=1, batch=4) as log:
        log.train(1, _values(1.5))
        log.eval(1, {"mIoU": 0.25, "mAcc": None, "aAcc": 0.5})
    assert ("train/loss", 1.5, 1) in written and ("eval/mIoU", 0.25, 1) in written
    assert "eval/mAcc" not in {item[0] for item in written} and written[-1] == "closed"


class _Broken:
    """A writer for TensorBoard that cannot write."""

    def add_scalar(self, *_):
        raise OSError("the board is full")

    def close(self):
        raise OSError("the board is full")


def test_a_broken_writer_is_told_once_and_the_records_go_on(tmp_path, capsys):
    with Log(tmp_path, start=0, steps=3, batch=4) as log:
        log.board = _Broken()
        for step in (1, 2, 3):
            log.train(step, _values(1.0))
    assert [r["step"] for r in _records(tmp_path)] == [1, 2, 3]
    out = capsys.readouterr().out
    assert out.count("metrics are lost, training goes on: the board is full") == 1


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    with Log(tmp_path, start=0, steps=2, batch=4) as log:
        log.train(1, _values(1.0))
        log.train(2, _values(0.5))
    out = capsys.readouterr().out
    assert out.count("metrics are lost") == 1 and "step 2/2  loss 0.5000" in out


def test_an_error_inside_is_not_replaced_by_the_record_that_waits(tmp_path):
    with pytest.raises(KeyError), Log(tmp_path, start=0, steps=2, batch=4) as log:
        log.train(1, _values(math.nan))
        raise KeyError("inside")


def test_waiting_counts_only_the_time_for_data_and_pauses_count_for_nothing(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("jaxseg.log.time.perf_counter", lambda: now[0])

    def batches():
        while True:
            now[0] += 1
            yield "batch"

    stream = batches()
    with Log(tmp_path, start=0, steps=2, batch=4) as log:
        assert log.wait(stream) == "batch"
        now[0] += 3
        log.train(1, _values(1))
        with log.paused():
            now[0] += 50
        log.wait(stream)
        now[0] += 1
        log.train(2, _values(1))
    first, second = _records(tmp_path)
    assert (first["images_per_s"], first["data_wait"]) == (1.0, 0.25)
    assert (second["images_per_s"], second["data_wait"]) == (2.0, 0.5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (123, "2:03"),
        (3599.7, "1:00:00"),
        (93784, "26:03:04"),
    ],
)
def test_clock(seconds, text):
    assert clock(seconds) == text
