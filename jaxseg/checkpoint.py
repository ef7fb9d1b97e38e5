"""Checkpoints by orbax, with what it lacks: a fingerprint that tells whether the bits are the same.

A checkpoint is the whole state under its step, which is also the position in the data. Orbax does
not notice flipped bits and takes a directory's name for a checkpoint, so `restore` reads from the
newest to the oldest and takes the first whose fingerprint is the one that was saved.
"""

import hashlib
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxseg.errors import InputError

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells each of its steps


def manager(workdir: Path, keep: int | None = None) -> ocp.CheckpointManager:
    """The manager of WORKDIR/checkpoints. Close it.

    With `keep`, the one that saves: it keeps the `keep` newest, and clears what an interrupted save
    left. Without, it disturbs no other process that is just saving there.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, cleanup_tmp_directories=bool(keep), enable_async_checkpointing=True
    )
    return ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)


def exists(workdir: Path) -> bool:
    return any(p.name.isdigit() for p in (workdir / "checkpoints").glob("*"))


def save(to: ocp.CheckpointManager, step: int, state: Any) -> str:
    """Starts to save `state` under `step` and returns its fingerprint."""
    digest = fingerprint(state)
    items = {
        "state": ocp.args.StandardSave(state),
        "meta": ocp.args.JsonSave({"fingerprint": digest}),
    }
    to.save(step, args=ocp.args.Composite(**items))
    return digest


def restore(source: ocp.CheckpointManager, target: Any) -> tuple[Any, int, str]:
    """(state, step, fingerprint) of the newest good checkpoint.

    target: the tree of jax.ShapeDtypeStruct, with shardings, that the state must have. A checkpoint
    that cannot be read, or whose fingerprint is not the saved one, is passed over aloud.
    Raises InputError where none is good.
    """
    steps = sorted(source.all_steps(), reverse=True)
    for step in steps:
        try:
            args = {"state": ocp.args.StandardRestore(target), "meta": ocp.args.JsonRestore()}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # orbax warns of its own defaults
                restored = source.restore(step, args=ocp.args.Composite(**args))
            saved, digest = restored.meta["fingerprint"], fingerprint(restored.state)
            if digest == saved:
                return restored.state, step, digest
            reason = f"its fingerprint is {digest}, saved was {saved}"
        except Exception as error:  # orbax raises many kinds for damaged files
            first = (str(error).splitlines() or [""])[0]
            reason = f"{type(error).__name__}: {first[:200]}"
        print(f"checkpoint {step} is damaged and passed over: {reason}", file=sys.stderr)
    raise InputError(
        f"none of the checkpoints {steps} in {source.directory} can be read: use another workdir, "
        "or a copy of this one from before the damage"
    )


def set_aside(workdir: Path, after: int) -> None:
    """Renames the (damaged) checkpoints later than `after`: orbax refuses to save beneath them.

    What is damaged is never deleted: N becomes N.damaged, or N.damaged2 and so on.
    """
    if jax.process_index():
        return
    for path in (workdir / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > after:
            names = (f"{path.name}.damaged{n}" for n in ("", *range(2, 1000)))
            free = next(name for name in names if not path.with_name(name).exists())
            path.rename(path.with_name(free))


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    """Per array: the sum of its 32-bit words, each times an odd number of its place, mod 2^32.

    Any single flipped bit changes it; how the array is sharded does not.
    """

    def checksum(x: jax.Array) -> jax.Array:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        words = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, unsigned)
        words = words.astype(jnp.uint32).reshape(-1)
        return jnp.sum(words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    return [checksum(x) for x in leaves]


def fingerprint(state: Any) -> str:
    """16 hex digits of the values of a tree of arrays, the same on every machine and mesh."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    sums = np.asarray(jax.device_get(_checksums([x for _, x in leaves])), np.uint32)
    text = [f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype}" for path, x in leaves]
    return hashlib.sha256("\n".join(text).encode() + sums.tobytes()).hexdigest()[:16]
