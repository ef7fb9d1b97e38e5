"""When training goes wrong: steps that are not finite, and losses that leap and stay high."""

import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import jax

IN_A_ROW = 5  # bad steps after which a run rolls back
LIMIT = 3  # roll-backs without a checkpoint beyond the trouble
WINDOW = 128  # losses that a leap is measured against


class Guard:
    """Looks at the loss of every step, one step late, so that nobody waits for the one that runs.

    A step is bad where its loss or gradient is not finite (it changed nothing), or where the loss
    leapt: over the median of the last 128 by more than `spike` median deviations, and twice as
    large. One such loss is a hard batch; IN_A_ROW of them are weights that broke.
    """

    def __init__(self, spike: float = 6.0, workdir: Path | str = "DIR"):
        """spike: 0 = losses may leap. workdir: of the run, for what to do where it diverges."""
        self.spike, self.workdir, self.losses = spike, workdir, deque(maxlen=WINDOW)
        self.bad = self.rolls = self.beyond = 0
        self.leaps = 0  # of the bad steps in a row those that leapt: the weights may be broken
        self.kept = False  # whether there is a checkpoint

    def look(self, logs: dict[str, Any] | None) -> tuple[str, bool]:
        """(what is wrong with a step or "", whether a process was asked to stop) by its logs."""
        if logs is None:
            return "", False
        keys = ("loss", "grad_norm", "stop")
        seen = jax.device_get({key: logs[key] for key in keys if key in logs})
        if seen.get("stop"):
            return "", True
        loss, norm = float(seen["loss"]), float(seen["grad_norm"])
        wrong = self._wrong(loss, norm)
        self.bad = self.bad + 1 if wrong else 0
        self.leaps = self.leaps + math.isfinite(loss + norm) if wrong else 0
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

    @property
    def broken(self) -> bool:
        """Whether a run that ends here should not keep its weights. After one leap it goes back to
        a checkpoint, but not to the beginning: that was more likely a hard batch."""
        return self.leaps > 1 or (self.leaps == 1 and self.kept)

    def good(self, step: int) -> int:
        """The newest step whose state can be good, at bad step `step`: the update before the first
        bad step may be what broke it."""
        return max(0, step - self.bad - 1)

    def roll(self, step: int, wrong: str) -> int:
        """`good(step)`; counts roll-backs. Raises FloatingPointError where LIMIT did not help."""
        if self.rolls == LIMIT:
            raise FloatingPointError(
                f"{wrong} at step {step}, bad steps in a row: {self.bad}, after {LIMIT} "
                "roll-backs: training diverges. Look at the images, or train in a new --workdir "
                "with a lower optim.lr or with optim.clip: there, --config.init.workdir="
                f"{self.workdir} begins with the newest checkpoint's weights, if one is left"
            )
        good = self.good(step)
        self.rolls, self.beyond, self.bad, self.leaps = self.rolls + 1, step, 0, 0
        return good

    def saved(self, step: int) -> None:
        """A checkpoint, beyond the trouble: what comes is new trouble."""
        self.kept = True
        if step > self.beyond:
            self.rolls = 0
