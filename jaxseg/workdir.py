"""The folder of a run: what it remembers of itself, all in plain files."""

import contextlib
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
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
SHOWN = 8  # differing keys that a message lists


def prepare(config: ConfigDict, workdir: Path, classes: Classes) -> None:
    """Writes config.json, classes.json and env.json, or checks that the run there is this one."""
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
                "Use another --workdir, or the same values to resume it."
            )
        warn_of_backend(workdir)
    if jax.process_index():
        return
    try:
        with replacing(remembered) as file:
            file.write_text(configs.to_json(config))
        catalog.write_classes(workdir / "classes.json", classes)
        with replacing(workdir / "env.json") as file:
            file.write_text(json.dumps(environment(), indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write to workdir {workdir}: {error.strerror}") from error


def warn_of_backend(workdir: Path) -> None:
    """Says where the run was augmented by another library, which rounds differently."""
    try:
        before = json.loads((workdir / "env.json").read_text()).get("augmentation")
    except (OSError, ValueError):  # gone or damaged: nothing to compare with
        before = None
    if before not in (None, pixels.BACKEND):
        say(
            f"warning: this run was augmented with {before} and goes on with {pixels.BACKEND}, "
            "which rounds differently: it will not end with the same bits"
        )


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
