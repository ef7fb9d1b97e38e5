"""The life of a run: the signals that end it, and the watchdog that ends one that is stuck."""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxseg import faults
from jaxseg.errors import RESTART

STOPPED = 42  # exit code of a run that a signal stopped after it saved its step
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Stopped(Exception):
    """A signal asks the run to stop, where it waits for something that need not be finished."""


class Life:
    """While it is entered, signals are noted instead of killing, and progress is watched.

    A handler only notes the signal: whoever works looks at `signal` where it can stop. A SIGINT
    after the first signal kills at once. Without a `beat` for `seconds` (0: forever) the stacks of
    all threads go to stderr and the process exits with RESTART, whatever it waits for.
    """

    def __init__(
        self,
        seconds: float = 0,
        leave: Callable[[int], Any] = os._exit,
        signals: Sequence[int] = SIGNALS,
    ):
        """leave: ends the process. signals: those to note; the others do what they always do."""
        self.signal = ""  # the name of the last one that came
        self.seconds, self.leave = seconds, leave
        self.doing, self.last, self.ended = "start", time.monotonic(), threading.Event()
        self.signals, self.before = signals, {}

    def beat(self, doing: str) -> None:
        """Something was finished; `doing` is what comes now, for the message."""
        self.doing, self.last = doing, time.monotonic()

    def asked(self) -> bool:
        """Whether a signal came to this process."""
        return bool(self.signal)

    def check(self) -> None:
        """Raises Stopped where a signal came to any process; all must call it together."""
        asked = self.asked()
        if jax.process_count() > 1:
            asked = bool(multihost_utils.process_allgather(np.array(asked)).any())
        if asked:
            raise Stopped(self.name())

    def watched(self, step: Callable) -> Callable:
        """The eval_step; each call counts as progress, and raises Stopped after a signal."""

        def watched_step(*arguments: Any) -> Any:
            self.beat("an evaluation")
            faults.strike("eval")
            self.check()
            return step(*arguments)

        watched_step._cache_size = step._cache_size  # by which `evaluate` counts compilations
        return watched_step

    def marked(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch, with word to the other processes, if any, whether this one shall stop."""
        if jax.process_count() == 1:
            return batch
        return {**batch, "stop": np.full(len(batch["image"]), self.asked())}

    def name(self) -> str:
        return self.signal or "a signal to another process"

    def _note(self, number: int, _: Any) -> None:
        self.signal = signal.Signals(number).name
        if signal.SIGINT in self.before:
            signal.signal(signal.SIGINT, self.before[signal.SIGINT])

    def _watch(self) -> None:
        while not self.ended.wait(min(1, self.seconds / 4)):
            silent = time.monotonic() - self.last
            if silent > self.seconds:
                print(
                    f"\nerror: no progress for {silent:.0f} s (train.watchdog is {self.seconds:g}) "
                    f"in {self.doing}: this process or a peer is stuck. What each thread does:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(sys.__stderr__)
                print(f"exit {RESTART}: the same command goes on", file=sys.stderr, flush=True)
                self.leave(RESTART)
                return

    def __enter__(self) -> "Life":
        self.beat("start")
        try:
            for number in self.signals:
                if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                    self.before[number] = signal.signal(number, self._note)
        except ValueError:  # not the main thread, as in a notebook's executor: no handlers there
            pass
        if self.seconds > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.ended.set()
        for number, handler in self.before.items():
            signal.signal(number, handler)
