"""When training goes wrong: steps that are not finite, and losses that leap and stay high."""

import math
import statistics
from collections import deque
from typing import Any

import jax

DIVERGED = 76  # exit code of a run that rolled back LIMIT times without getting further
IN_A_ROW = 5  # bad steps after which a run rolls back
LIMIT = 3  # roll-backs without a checkpoint beyond the trouble
WINDOW = 128  # losses that a leap is measured against


class Guard:
    """Looks at the loss of every step, one step late, so that nobody waits for the one that runs.

    A step is bad where its loss or gradient is not finite (it changed nothing), or where the loss
    leapt: over the median of the last 128 by more than `spike` median deviations, and twice as
    large. One such loss is a hard batch; IN_A_ROW of them are weights that broke.
    """

    def __init__(self, spike: float = 6.0):
        """spike: 0 = losses may leap."""
        self.spike, self.losses = spike, deque(maxlen=WINDOW)
        self.bad = self.rolls = self.beyond = 0

    def look(self, logs: dict[str, Any] | None) -> tuple[str, bool]:
        """(what is wrong with a step or "", whether a process was asked to stop) by its logs."""
        if logs is None:
            return "", False
        keys = ("loss", "grad_norm", "stop")
        seen = jax.device_get({key: logs[key] for key in keys if key in logs})
        if seen.get("stop"):
            return "", True
        loss = float(seen["loss"])
        wrong = self._wrong(loss, float(seen["grad_norm"]))
        self.bad = self.bad + 1 if wrong else 0
        if not wrong:
            self.losses.append(loss)
        return wrong, False

    def _wrong(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient's norm is {norm}"
        if not self.spike or len(self.losses) < WINDOW:
            return ""
        median = statistics.median(self.losses)
        deviation = statistics.median(abs(x - median) for x in self.losses)
        high = loss > max(median + self.spike * deviation, median + abs(median))
        return f"the loss leapt to {loss:.4g}, the median is {median:.4g}" if high else ""

    @property
    def spent(self) -> bool:
        return self.bad >= IN_A_ROW

    def roll(self, step: int, wrong: str) -> int:
        """The newest step whose state can be good, at bad step `step`; counts the roll-back.

        The update before the first bad step may be what broke it. Raises FloatingPointError where
        LIMIT roll-backs did not help.
        """
        if self.rolls == LIMIT:
            raise FloatingPointError(
                f"{wrong} at step {step}, for the {IN_A_ROW}th step in a row, after {LIMIT} "
                "roll-backs: training diverges. The checkpoints are good. Lower optim.lr, set "
                "optim.clip, or look at the images."
            )
        good = max(0, step - self.bad - 1)
        self.rolls, self.beyond, self.bad = self.rolls + 1, step, 0
        return good

    def saved(self, step: int) -> None:
        """A checkpoint beyond the trouble: what comes is new trouble."""
        if step > self.beyond:
            self.rolls = 0
