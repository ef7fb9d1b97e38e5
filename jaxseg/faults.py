"""Faults on purpose, to rehearse what a run survives: JAXSEG_FAULT=kill@20,nan_loss@7-11.

Read only where JAXSEG_TESTING is 1. A fault is KIND@PLACE, or KIND@PLACE:pN for process N alone.
PLACE is the number of a batch, from 1, which is the step until a run rolls back; FIRST-LAST; or one
of PHASES. Kinds: kill, term, int, usr1 and hup are signals to itself; hang stops the run; stall
stops its data; full makes a save fail. The others are at batches alone: nan_image, nan_loss and
nan_grad a pixel, the loss or one array of the gradient that is NaN; inf_image, inf_loss and
inf_grad the same, infinite; spike a gradient 10,000 times too large; flip one bit of a parameter.
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
POISONS = ("nan_image", "nan_loss", "nan_grad", "inf_image", "inf_loss", "inf_grad", "spike")
NUMBERS = {"nan": np.nan, "inf": np.inf}
AT_BATCHES = (*POISONS, "flip")


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
        known = kind in STRIKES or (kind in AT_BATCHES and not phase)
        if not known or (phase and phase not in PHASES):
            raise InputError(
                f"JAXSEG_FAULT {item}: needs KIND@STEP, KIND@FIRST-LAST or KIND@PHASE, and "
                f"perhaps :pN. Kinds: {', '.join(STRIKES + AT_BATCHES)}; phases: "
                f"{', '.join(PHASES)}"
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

    def value(where: str, default: float) -> float:
        return next((v for n, v in NUMBERS.items() if f"{n}_{where}" in now), default)

    if kinds & {"nan_image", "inf_image"}:
        image = batch["image"].astype(np.float32)
        image[0, 0, 0, 0] = value("image", image[0, 0, 0, 0])
        batch = {**batch, "image": image}
    fault = np.float32([value("loss", 0.0), value("grad", 1e4 if "spike" in now else 1.0)])
    return {**batch, "fault": np.tile(fault, (len(batch["image"]), 1))}


def spoiled(grads: Any, batch: dict[str, jax.Array]) -> Any:
    """The gradients; in a rehearsal of POISONS with the batch's factor, see `poisoned`, in place of
    the first array where it is not finite. All else stays to the bit."""
    if "fault" not in batch:
        return grads
    factor = batch["fault"].mean(axis=0)[1]
    (first, *rest), tree = jax.tree.flatten(grads)
    return tree.unflatten([jnp.where(jnp.isfinite(factor), first, factor), *rest])


def flipped(state: Any, number: int) -> Any:
    """The TrainState; in a rehearsal with one bit of this process' first parameter changed, as a
    device leaves it that computes wrongly."""
    if "flip" not in due(number):
        return state
    (first, *rest), tree = jax.tree.flatten(state.params)
    shards = []
    for shard in first.addressable_shards:
        data = np.array(shard.data)
        data.reshape(-1).view(np.uint32)[0] ^= 1 << 20
        shards.append(jax.device_put(data, shard.device))
    changed = jax.make_array_from_single_device_arrays(first.shape, first.sharding, shards)
    return state.replace(params=tree.unflatten([changed, *rest]))


@jax.custom_vjp
def _scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    """x, with a gradient `factor` times its own."""
    return x


_scaled.defvjp(
    lambda x, factor: (x, factor), lambda factor, grad: (grad * factor, jnp.zeros_like(factor))
)


def poisoned(loss: Callable) -> Callable:
    """The loss; in a rehearsal one that obeys batch["fault"] [B,2]: a summand and the gradient's
    factor, which `spoiled` obeys where it is not finite."""
    if not {f.kind for f in faults()} & set(POISONS):
        return loss

    def wrapped(outputs: Any, batch: dict, **options: Any) -> tuple:
        added, factor = batch["fault"].mean(axis=0)  # exact; a maximum may lose a NaN
        factor = jnp.where(jnp.isfinite(factor), factor, 1.0)

        def scaled(x: jax.Array) -> jax.Array:
            number = jnp.issubdtype(x.dtype, jnp.floating)
            return _scaled(x, factor.astype(x.dtype)) if number else x

        value, logs = loss(jax.tree.map(scaled, outputs), batch, **options)
        return value + added, {**logs, "loss": logs["loss"] + added}

    return wrapped
