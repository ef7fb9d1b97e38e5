"""The folder of a run: what it remembers of itself, all in plain files."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from jaxseg import checkpoint, models
from jaxseg import config as configs
from jaxseg.data import catalog, pixels
from jaxseg.data.colours import Classes
from jaxseg.data.files import replacing
from jaxseg.errors import InputError
from jaxseg.log import say

# A resumed run may change how it looks at itself and where it runs, not what it computes.
FREE = ("data.root", "data.threads", "data.workers", "eval.", "mesh.", "train.log_every")
FREE += ("data.on_bad_example", "train.eval_every", "train.checkpoint_every", "train.keep")
FREE += ("train.watchdog", "train.remat")
SHOWN = 8  # differing keys that a message lists


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Holds the workdir, against a second run in it, until the end or the process' death.

    Raises InputError that names process and host of the run that holds it.
    """
    problem, file = "", None
    if jax.process_index() == 0:
        try:
            file = _locked(workdir / "lock")
        except InputError as error:
            problem = str(error)
    if jax.process_count() > 1:  # all or none: the others would wait for the first
        text = np.frombuffer(problem.encode()[:1000].ljust(1000), np.uint8)
        text = multihost_utils.broadcast_one_to_all(text)
        problem = np.asarray(text).tobytes().decode(errors="replace").strip()
    if problem:
        raise InputError(problem)
    try:
        yield
    finally:
        if file:
            with contextlib.suppress(OSError):  # the workdir may be gone
                (workdir / "lock").unlink()
            file.close()


def _locked(path: Path) -> Any:
    """The locked file, with who holds it inside; the system unlocks it when that process ends."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            raise InputError(f"cannot write to workdir {path.parent}: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise InputError(
                f"{path.parent} is in use by {holder}: stop that run, or use another --workdir"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            say(f"warning: {path.parent} cannot be locked: start no second run in it")
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # the run that held it ended and removed it just now
    file.truncate(0)
    begin = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {begin}\n")
    file.flush()
    return file


def check_space(workdir: Path, size: int, keep: int) -> None:
    """Raises InputError unless the disk holds `keep` checkpoints of `size` bytes and one more."""
    there = sum(p.name.isdigit() for p in (workdir / "checkpoints").glob("*"))
    need, free = max(1, keep + 1 - there) * size, shutil.disk_usage(workdir).free
    if free < need:
        raise InputError(
            f"the disk of {workdir} has {free / 1e9:.2f} GB free: needs {need / 1e9:.2f} GB for "
            f"{keep} checkpoints and the one being written. Free some, or lower train.keep"
        )


def prepare(config: ConfigDict, workdir: Path, classes: Classes, count: int = 0) -> None:
    """Writes config.json, classes.json and env.json, or checks that the run there is this one.

    count: of the training examples; 0 where the run does not depend on it.
    """
    remembered = workdir / "config.json"
    if checkpoint.exists(workdir) and remembered.exists():
        old = load_config(workdir)
        same = configs.from_json(configs.to_json(config))  # a list in a file is a tuple there, too
        changed = [d for d in configs.differences(old, same) if not d.startswith(FREE)]
        if changed:
            more = f"and {len(changed) - SHOWN} more"
            changed = changed if len(changed) <= SHOWN else [*changed[:SHOWN], more]
            raise InputError(
                f"{workdir} holds a run of another config:\n  " + "\n  ".join(changed) + "\n"
                "Use the same values to resume it; or another --workdir, with "
                f"--config.init.workdir={workdir} to start from its weights."
            )
        check_data(workdir, classes, count)
        warn_of_changes(workdir)
    if jax.process_index():
        return
    try:
        with replacing(remembered) as file:
            file.write_text(configs.to_json(config))
        catalog.write_classes(workdir / "classes.json", classes)
        with replacing(workdir / "env.json") as file:
            known = {**environment(), "examples": count, "earlier": _earlier(workdir)}
            file.write_text(json.dumps(known, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write to workdir {workdir}: {error.strerror}") from error


def check_data(workdir: Path, classes: Classes, count: int) -> None:
    """Raises InputError where the run saw other classes or another number of training examples."""
    before = classes.names
    with contextlib.suppress(InputError, OSError):  # gone or damaged: nothing to compare with
        before = catalog.read_classes(workdir / "classes.json").names
    if before != classes.names:
        raise InputError(
            f"{workdir} holds a run on the classes {', '.join(before)}, and the data set has "
            f"{', '.join(classes.names)}: use another --workdir, or the data that it saw"
        )
    before = _known(workdir, "examples")
    if before and count and before != count:
        raise InputError(
            f"{workdir} holds a run on {before} training examples, and the data set has {count}: "
            "its order would be another. Use another --workdir, or the data that it saw"
        )


def _remembered(workdir: Path) -> dict[str, Any]:
    """What env.json says; {} where it is gone or damaged."""
    try:
        return json.loads((workdir / "env.json").read_text())
    except (OSError, ValueError):
        return {}


def _known(workdir: Path, key: str) -> Any:
    """What env.json says of something; None where it does not, or is gone or damaged."""
    return _remembered(workdir).get(key)


def _earlier(workdir: Path) -> list[dict[str, Any]]:
    """What env.json said of the run's earlier starts, oldest first; [] of a new run."""
    last = _remembered(workdir) if checkpoint.exists(workdir) else {}
    before = last.pop("earlier", [])
    return [*before, last] if last else []


def warn_of_changes(workdir: Path) -> None:
    """Says where the run went on with another library of pixels, jax or kind of device so far:
    these round differently."""
    now, before = environment(), _remembered(workdir)
    versions = before.get("versions", {})
    for what, old, new in (
        ("was augmented with", before.get("augmentation"), now["augmentation"]),
        ("ran with jax", versions.get("jax"), now["versions"]["jax"]),
        ("ran with jaxlib", versions.get("jaxlib"), now["versions"]["jaxlib"]),
        ("ran on", _kinds(before.get("devices")), _kinds(now["devices"])),
    ):
        if old not in (None, new):
            say(
                f"warning: this run {what} {old} and goes on with {new}, which rounds differently: "
                "it will not end with the same bits"
            )


def _kinds(devices: list[str] | None) -> str | None:
    return devices and ", ".join(sorted(set(devices)))


def environment() -> dict[str, Any]:
    """What a run depends on beside its config: versions, commit, machine, devices, command."""
    packages = (
        "jaxseg",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "numpy",
        "pillow",
    )
    clone, commit = Path(__file__).parents[1], None
    if (clone / ".git").exists():  # not that of a repository around an installed package
        git = ["git", "-C", str(clone), "describe", "--always", "--dirty"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "augmentation": pixels.BACKEND,
        "commit": commit,
        "platform": platform.platform(),
        "devices": [f"{d.platform} {d.device_kind}" for d in jax.devices()],
        "command": sys.argv,
    }


def load_config(workdir: Path) -> ConfigDict:
    """The config that a run remembers. Raises InputError where there is no run."""
    path = workdir / "config.json"
    if not path.is_file():
        raise InputError(
            f"no run in {workdir}: {path} is missing. Train one with --workdir {workdir}"
        )
    try:
        config = configs.from_json(path.read_text())
        for section, defaults in configs.default().items():  # keys younger than the run
            with config[section].unlocked():
                new = {k: v for k, v in defaults.items() if k not in config[section]}
                config[section].update(new)
        config.model.unlock()
        config.loss.unlock()
        models.complete(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is damaged: {reason}. Use another workdir") from error
    return config
