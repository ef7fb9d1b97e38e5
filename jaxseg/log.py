"""What a run says: lines or a progress line on stdout, metrics.jsonl, TensorBoard files."""

import contextlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxseg.data.files import replacing

SHOWN = ("PQ", "AP", "AP50", "mIoU", "mAcc", "aAcc")  # scores in the line of an evaluation


def say(text: str, end: str = "\n") -> None:
    """One line for the reader, from the first process only."""
    if jax.process_index() == 0:
        print(text, end=end, flush=True)


class Log:
    """The metrics of one run.

    `train` takes a step's numbers while the device still computes them; `flush`, called a step
    later, writes them. So the loop never waits for the step that runs.
    """

    def __init__(self, workdir: Path, start: int, steps: int, batch: int):
        """`start`: the step that the run continues from; records of later ones are dropped."""
        self.path, self.steps, self.batch = workdir / "metrics.jsonl", steps, batch
        self.writes = jax.process_index() == 0
        self.pending = None
        self.begin(start)
        self.board, self.terminal, self.warned = None, sys.stdout.isatty(), False
        if self.writes:
            with self.tolerated():
                self._open(workdir, start)

    def _open(self, workdir: Path, start: int) -> None:
        kept = self.path.read_text().splitlines() if start and self.path.exists() else []
        kept = [line for line in kept if _step(line) <= start]
        with replacing(self.path) as file:
            file.write_text("".join(f"{line}\n" for line in kept))
        if importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)

    def begin(self, step: int) -> None:
        """The rates of the next record count from now, after `step`."""
        self.step, self.time, self.waited = step, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def tolerated(self) -> Iterator[None]:
        """What fails inside costs records, not the run: the first time is told."""
        try:
            yield
        except Exception as error:  # TensorBoard's writer may raise anything
            if not self.warned:
                self.say(f"warning: metrics are lost, training goes on: {error}")
            self.warned = True

    def wait(self, batches: Any) -> Any:
        """The next batch; the time until it comes counts as waiting for data."""
        begin = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - begin
        return batch

    def train(self, step: int, values: dict[str, jax.Array]) -> None:
        """Takes the device's values of `step`; writes those of the record before."""
        self.flush()
        seconds, count = time.perf_counter() - self.time, step - self.step
        rates = {"images_per_s": count * self.batch / seconds, "data_wait": self.waited / seconds}
        self.pending = (step, values, rates)
        self.begin(step)

    def flush(self) -> None:
        """Writes the record that waits, if any."""
        if self.pending is None:
            return
        step, values, rates = self.pending
        self.pending = None
        values = {k: float(v) for k, v in jax.device_get(values).items() if k != "stop"}
        self.write("train", step, {**values, **rates})
        left = (self.steps - step) * self.batch / rates["images_per_s"]
        line = (
            f"step {step}/{self.steps}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
            f"{rates['images_per_s']:.1f} images/s  ETA {clock(left)}  "
            f"data wait {rates['data_wait']:.0%}"
        )
        if values.get("skipped"):
            line += f"  steps skipped {values['skipped']:.0f}"
        if self.terminal and self.writes:
            print(f"\r\033[K{line}", end="" if step < self.steps else "\n", flush=True)
        else:
            say(line)

    def eval(self, step: int, scores: dict[str, Any]) -> None:
        """Writes the totals of an evaluation."""
        self.flush()
        totals = {k: v for k, v in scores.items() if not isinstance(v, list)}
        self.write("eval", step, totals)
        keys = [key for key in SHOWN if totals.get(key) is not None]
        shown = "  ".join(f"{key} {totals[key]:.4f}" for key in keys)
        self.say(f"step {step}/{self.steps}  validation  {shown or 'no labelled pixel'}")

    def roll_back(self, step: int, to: int, reason: str) -> None:
        """Records that the run goes on from step `to`. The records between stay: they happened."""
        self.flush()
        self.write("roll-back", to, {"from": step, "reason": reason})
        self.say(f"step {step}: {reason}: rolled back to step {to}, with the batches that follow")
        self.begin(to)

    def say(self, text: str) -> None:
        """A line of its own, in place of the progress line of a terminal."""
        say(("\r\033[K" if self.terminal else "") + text)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what runs inside, such as an evaluation, out of the rates."""
        begin = time.perf_counter()
        yield
        self.time += time.perf_counter() - begin

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Adds a record to metrics.jsonl, and its numbers to TensorBoard.

        kind: "train", "eval", "checkpoint" or "roll-back".
        """
        if not self.writes:
            return
        with self.tolerated(), self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        with self.tolerated():
            for name, value in values.items() if self.board else ():
                if isinstance(value, int | float):
                    self.board.add_scalar(f"{kind}/{name}", value, step)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is None:
            self.flush()
        if self.board:
            with self.tolerated():
                self.board.close()


def _step(line: str) -> float:
    """The step of a record; infinite where a crash cut the line short."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def clock(seconds: float) -> str:
    """ "1:02:03" or "2:03"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
