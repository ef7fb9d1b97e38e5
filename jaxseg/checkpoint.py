"""Checkpoints by orbax, with what it lacks: a fingerprint that tells whether the bits are the same.

A checkpoint is the whole state under its step, which is also the position in the data. Orbax does
not notice flipped bits and takes a directory's name for a checkpoint, so `restore` reads from the
newest to the oldest and takes the first whose fingerprint is the one that was saved.
"""

import contextlib
import hashlib
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxseg import faults
from jaxseg.errors import InputError, RestartError, of_the_machine

TRIES = 20  # of a reader beside a run
logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells each of its steps


def manager(workdir: Path, keep: int | None = None) -> ocp.CheckpointManager:
    """The manager of WORKDIR/checkpoints. Close it.

    With `keep`, the one that saves: it keeps the `keep` newest, and clears what an interrupted save
    left. Without, it disturbs no other process that is just saving there.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, cleanup_tmp_directories=bool(keep), enable_async_checkpointing=True
    )
    folder = (workdir / "checkpoints").absolute()
    return _again(lambda: ocp.CheckpointManager(folder, options=options))


def _again(look: Callable[[], Any]) -> Any:
    """What `look` gives, once more where a run deleted meanwhile what it looks at."""
    for _ in range(TRIES):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return look()
    return look()


def exists(workdir: Path, until: int | None = None) -> bool:
    """Whether there is any checkpoint, of those not later than `until`."""
    steps = [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
    return any(until is None or step <= until for step in steps)


def save(to: ocp.CheckpointManager, step: int, state: Any, position: int | None = None) -> str:
    """Starts to save `state` under `step` and returns its fingerprint.

    position: batches drawn so far, where that is not the step. Raises RestartError where the
    processes of a run do not hold the same state.
    """
    digest = fingerprint(state)
    check_same(digest, step)
    position = step if position is None else position
    meta = {"fingerprint": digest, "position": position, "seal": seal(digest, position)}
    items = {"state": ocp.args.StandardSave(state), "meta": ocp.args.JsonSave(meta)}
    to.save(step, args=ocp.args.Composite(**items))
    return digest


def check_same(digest: str, step: int) -> None:
    """Raises RestartError unless all processes have this fingerprint."""
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(bytes.fromhex(digest), np.uint8)
    found = [row.tobytes().hex() for row in multihost_utils.process_allgather(mine)]
    if len(set(found)) > 1:
        raise RestartError(
            f"the processes hold different states at step {step}, fingerprints {', '.join(found)} "
            "in their order: a device computes wrongly. Nothing was saved; the same command goes "
            "on from the checkpoint before"
        )


class Saver:
    """Saves a run's states while it goes on; a save that fails is told and costs no older one.

    The next save is tried as if nothing had been. Where processes save together, one that fails
    raises instead: InputError where the system refused it, as a full disk does, else RestartError.
    """

    def __init__(self, workdir: Path, keep: int):
        self.workdir, self.keep = workdir, keep
        self.saving: int | None = None  # the step of the save that runs
        self.error = ""  # why the last save failed
        self.manager: ocp.CheckpointManager | None = manager(workdir, keep)

    def save(self, step: int, state: Any, position: int | None = None) -> str | None:
        """Starts to save; the fingerprint, or None where it failed at once.

        A step that is there already is left as it is.
        """
        self.settle(wait=True)
        try:
            faults.strike("save")
            self._probe()
            self.manager = self.manager or manager(self.workdir, self.keep)
            if step in self.manager.all_steps():
                return fingerprint(state)
            digest = save(self.manager, step, state, position)
        except RestartError:
            raise
        except Exception as error:  # orbax raises many kinds
            return self._failed(step, error)
        self.saving, self.error = step, ""
        return digest

    def settle(self, wait: bool = False) -> None:
        """Tells of a save that has failed by now; `wait`: until the one that runs has ended."""
        if self.saving is None or not (wait or not self.manager.is_saving_in_progress()):
            return
        step, self.saving = self.saving, None
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            self._failed(step, error)

    def finish(self) -> None:
        """Waits for the last save. Raises InputError where it failed."""
        self.settle(wait=True)
        if self.error:
            raise InputError(
                f"{self.error}. Mend that, and the same command goes on from the newest checkpoint"
            )

    def roll_back(self, target: Any, good: int) -> tuple[Any, int]:
        """(state, step) of the newest good checkpoint not later than step `good`; (None, 0): none.

        Later ones are set aside.
        """
        self.settle(wait=True)
        self._drop()
        state, step = None, 0
        if exists(self.workdir, good):
            with manager(self.workdir) as reader:
                state, step, _ = restore(reader, target, good)
        set_aside(self.workdir, after=step if state else -1, why="rolled_back")
        return state, step

    def close(self) -> None:
        """Waits for what is being saved."""
        self.settle(wait=True)
        self._drop()

    def _probe(self) -> None:
        """Raises OSError where no folder can be made: orbax would leave threads that wait for it.

        A folder that is gone is made again.
        """
        if jax.process_index() == 0:
            probe = self.workdir / "checkpoints" / ".probe"
            probe.mkdir(parents=True, exist_ok=True)
            probe.rmdir()

    def _drop(self) -> None:
        if self.manager:
            with contextlib.suppress(Exception):  # of a save that failed, told already
                self.manager.close()
        self.manager = None

    def _failed(self, step: int, error: Exception) -> None:
        first = (str(error).splitlines() or [""])[0]
        self.error = f"checkpoint {step} could not be saved: {type(error).__name__}: {first[:300]}"
        if jax.process_count() > 1:
            kind = InputError if of_the_machine(error) else RestartError
            raise kind(self.error) from error
        print(f"{self.error}. Older ones stay; the next is tried in its turn", file=sys.stderr)
        self._drop()
        for left in (self.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(left, ignore_errors=True)  # what it takes may be what the next one needs


def seal(digest: str, position: int) -> str:
    """Of what is saved beside the state, so that a flipped bit shows there too."""
    return hashlib.sha256(f"{digest} {position}".encode()).hexdigest()[:16]


def position(workdir: Path, step: int) -> int:
    """How many batches the run had drawn when it saved `step`."""
    try:
        meta = json.loads((workdir / "checkpoints" / str(step) / "meta/metadata").read_text())
        return meta.get("position", step)
    except (OSError, ValueError):
        return step


def restore(
    source: ocp.CheckpointManager, target: Any, until: int | None = None
) -> tuple[Any, int, str]:
    """(state, step, fingerprint) of the newest good checkpoint, of those not later than `until`.

    target: the tree of jax.ShapeDtypeStruct, with shardings, that the state must have. A checkpoint
    that cannot be read, or whose fingerprint is not the saved one, is passed over aloud; one that
    the run deleted meanwhile, in silence. Raises InputError where none is good.
    """
    tried, foreign = [], []
    while True:
        _again(source.reload)  # a run that goes on meanwhile saves new ones and deletes old ones
        left = [s for s in source.all_steps() if s not in tried and (until is None or s <= until)]
        if not left:
            break
        step = max(left)
        tried.append(step)
        try:
            args = {"state": ocp.args.StandardRestore(target), "meta": ocp.args.JsonRestore()}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # orbax warns of its own defaults
                restored = source.restore(step, args=ocp.args.Composite(**args))
            meta, digest = restored.meta, fingerprint(restored.state)
            sealed = meta["seal"] == seal(meta["fingerprint"], meta["position"])
            if sealed and digest == meta["fingerprint"]:
                return restored.state, step, digest
            reason = "its fingerprint and position in the data were changed"
            if sealed:
                reason = f"its fingerprint is {digest}, saved was {meta['fingerprint']}"
        except Exception as error:  # orbax raises many kinds for damaged files
            first = (str(error).splitlines() or [""])[0]
            reason = f"{type(error).__name__}: {first[:200]}"
        folder = Path(source.directory) / str(step)
        if folder.exists():
            other, what = _difference(folder, target), "is damaged"
            if other:
                reason, what = other, "was saved by another network or version of jaxseg"
                foreign.append(step)
            print(f"checkpoint {step} {what} and passed over: {reason}", file=sys.stderr)
    why = "or a copy of this one from before the damage"
    if foreign:
        why = f"or the network and the version of jaxseg that saved {foreign}"
    raise InputError(
        f"none of the checkpoints {tried} in {source.directory} can be read: use another workdir, "
        f"{why}"
    )


def _difference(folder: Path, target: Any) -> str:
    """The first array that is in one alone of a checkpoint and `target`, or of another shape there;
    "" where all agree, or what the checkpoint says of itself cannot be read."""
    try:
        tree = ocp.StandardCheckpointer().metadata(folder / "state").item_metadata.tree
    except Exception:  # orbax raises many kinds
        return ""
    saved, asked = (
        {k: x.shape for k, x in ocp.tree.to_flat_dict(t, sep="/").items() if hasattr(x, "shape")}
        for t in (tree, target)
    )
    for key in sorted(saved.keys() | asked.keys()):
        have, need = saved.get(key, "missing"), asked.get(key, "missing")
        if have != need:
            return f"{key} is {have} there and {need} here"
    return ""


def set_aside(workdir: Path, after: int, why: str = "damaged") -> None:
    """Renames the checkpoints later than `after`: orbax refuses to save beneath them.

    Nothing is deleted: N becomes N.damaged, or N.damaged2 and so on.
    """
    if jax.process_index() == 0 and (workdir / "checkpoints").is_dir():
        for path in (workdir / "checkpoints").iterdir():
            if path.name.isdigit() and int(path.name) > after:
                names = (f"{path.name}.{why}{n}" for n in ("", *range(2, 1000)))
                free = next(name for name in names if not path.with_name(name).exists())
                path.rename(path.with_name(free))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("set aside")


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
