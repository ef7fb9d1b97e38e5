"""Faults on purpose, to rehearse what a run survives: JAXSEG_FAULT=kill@20,nan_loss@7-11.

Read only where JAXSEG_TESTING is 1. A fault is KIND@PLACE, or KIND@PLACE:pN for process N alone.
PLACE is the number of a batch, from 1, which is the step until a run rolls back; FIRST-LAST; or one
of PHASES. Kinds: kill, term, int, usr1 and hup are signals to itself; hang stops the run; stall
stops its data; full makes a save fail. nan_image, nan_loss, nan_grad and spike, at batches alone,
are a pixel, the loss or the gradient that is NaN, and a gradient 10,000 times too large.
"""

import contextlib
import errno
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.errors import InputError

PHASES = ("start", "compile", "eval", "save")
STRIKES = ("kill", "term", "int", "usr1", "hup", "hang", "stall", "full")
FOREVER = 1e6  # seconds
POISONS = ("nan_image", "nan_loss", "nan_grad", "spike")


class Fault(NamedTuple):
    """What strikes, and at which batches or in which phase."""

    kind: str
    first: int
    last: int
    phase: str  # "" where it strikes at batches


def faults() -> list[Fault]:
    """Those asked for of this process. Raises InputError for what is none."""
    text = os.environ.get("JAXSEG_FAULT", "") if os.environ.get("JAXSEG_TESTING") == "1" else ""
    found = []
    for item in filter(None, text.split(",")):
        match = re.fullmatch(r"(\w+)@(?:(\d+)(?:-(\d+))?|([a-z]+))(?::p(\d+))?", item)
        kind, first, last, phase, process = match.groups() if match else ("",) * 5
        known = kind in STRIKES or (kind in POISONS and not phase)
        if not known or (phase and phase not in PHASES):
            raise InputError(
                f"JAXSEG_FAULT {item}: needs KIND@STEP, KIND@FIRST-LAST or KIND@PHASE, and "
                f"perhaps :pN. Kinds: {', '.join(STRIKES + POISONS)}; phases: {', '.join(PHASES)}"
            )
        if process is None or int(process) == jax.process_index():
            low = int(first or 0)
            found.append(Fault(kind, low, int(last or low), phase or ""))
    return found


def due(place: int | str) -> set[str]:
    """The kinds that strike at a batch or in a phase."""
    found = faults()
    if isinstance(place, str):
        return {f.kind for f in found if f.phase == place}
    return {f.kind for f in found if not f.phase and f.first <= place <= f.last}


def strike(place: int | str) -> None:
    """Does what is asked for here; nothing, unless this is a rehearsal."""
    for kind in due(place):
        if kind == "hang":
            time.sleep(FOREVER)
        elif kind == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif kind in STRIKES and kind != "stall":
            signal.raise_signal(getattr(signal, f"SIG{kind.upper()}"))


def stalled(batches: Iterator[Any], first: int) -> Iterator[Any]:
    """The batches from number `first` on; in a rehearsal of stalls they stop coming there."""
    if "stall" not in {f.kind for f in faults()}:
        return batches

    def read() -> Iterator[Any]:
        with contextlib.closing(batches):
            for number, batch in enumerate(batches, first):
                if "stall" in due(number):
                    time.sleep(FOREVER)
                yield batch

    return read()


def poison(batch: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """The batch; in a rehearsal of POISONS with what is due added, see `poisoned`."""
    kinds, now = {f.kind for f in faults()}, due(number)
    if not kinds & set(POISONS):
        return batch
    if "nan_image" in kinds:
        image = batch["image"].astype(np.float32)
        image[0, 0, 0, 0] = np.nan if "nan_image" in now else image[0, 0, 0, 0]
        batch = {**batch, "image": image}
    added = np.nan if "nan_loss" in now else 0.0
    factor = np.nan if "nan_grad" in now else 1e4 if "spike" in now else 1.0
    rows = len(batch["image"])
    return {**batch, "fault": np.tile(np.float32([added, factor]), (rows, 1))}


@jax.custom_vjp
def _scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    """x, with a gradient `factor` times its own."""
    return x


_scaled.defvjp(
    lambda x, factor: (x, factor), lambda factor, grad: (grad * factor, jnp.zeros_like(factor))
)


def poisoned(loss: Callable) -> Callable:
    """The loss; in a rehearsal one that obeys batch["fault"] [B,2]: a summand and the gradient's
    factor."""
    if not {f.kind for f in faults()} & set(POISONS):
        return loss

    def wrapped(outputs: Any, batch: dict, **options: Any) -> tuple:
        added, factor = batch["fault"].max(axis=0)  # NaN where any is

        def scaled(x: jax.Array) -> jax.Array:
            number = jnp.issubdtype(x.dtype, jnp.floating)
            return _scaled(x, factor.astype(x.dtype)) if number else x

        value, logs = loss(jax.tree.map(scaled, outputs), batch, **options)
        return value + added, {**logs, "loss": logs["loss"] + added}

    return wrapped
