"""The verb `convert`: weights that another library trained, as a run that predict and eval take."""

import hashlib
import json
import re
from functools import partial
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxseg import checkpoint, sharding
from jaxseg.data import catalog
from jaxseg.data.colours import Classes, voc_palette
from jaxseg.errors import InputError, unknown
from jaxseg.experiment import resolve, shipped
from jaxseg.log import say
from jaxseg.pretrained import filled, flat
from jaxseg.train import build
from jaxseg.weights import files, mmdet, mmseg, smp, timm, torchvision
from jaxseg.weights.names import Report, fit
from jaxseg.workdir import prepare

SOURCES: dict[str, ModuleType] = {
    "torchvision": torchvision,
    "smp": smp,
    "mmseg": mmseg,
    "mmdet": mmdet,
    "timm": timm,
}
ORIGIN = "origin.json"  # in the workdir: source, arch and digest of the file


def convert(
    source: str, arch: str, path: Path, workdir: Path, num_classes: int = 0, dataset: str = ""
) -> int:
    """Writes a run at step 0 with the weights in `path`, and says what became of each array.

    arch: as the source calls it. num_classes: 0 = the checkpoint's; another number makes the
    classifier new, aloud. dataset: whose classes they are; "" = that of the arch's experiment.
    Raises InputError, with the report, where anything but the classifier does not fit.
    """
    if source not in SOURCES:
        raise unknown("source", source, SOURCES)
    table = SOURCES[source]
    if arch not in table.ARCHS:
        raise unknown(f"arch of {source}", arch, table.ARCHS)
    if checkpoint.exists(workdir):
        raise InputError(f"{workdir} holds a run already: use another --workdir")
    state = files.read(path)
    config = network(table, arch, state, num_classes, dataset)

    mesh = sharding.make_mesh(config.mesh)
    target, init, _ = build(config, mesh)
    shapes = flat({"params": target.params, "batch_stats": target.batch_stats})
    arrays, report = fit(state, table.rules(arch), {k: v.shape for k, v in shapes.items()})
    fresh = [name for name in report.missing if may_be_new(name, table, bool(num_classes))]
    say(f"{source} {arch}: {report.text()}")
    accept(report, fresh, table.IGNORED, f"{source} {arch}", path)
    if fresh:
        say(f"re-initialised, to be trained: {', '.join(fresh)}")

    # Where the file has all weights none is drawn, and an optimizer begins with zeros.
    blank = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), target)
    new = init() if fresh else blank()
    new = new.holding(filled({"params": new.params, "batch_stats": new.batch_stats}, arrays))
    prepare(config, workdir, classes(config))
    origin = {"source": source, "arch": arch, "sha256": digest(path)}
    (workdir / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")
    with checkpoint.manager(workdir, keep=1) as manager:
        checkpoint.save(manager, 0, new)
    say(f"{workdir}: {config.model.name}, {config.model.num_classes} classes; predict uses it")
    return 0


def network(
    table: ModuleType, arch: str, state: dict[str, np.ndarray], num_classes: int, dataset: str
) -> ConfigDict:
    """The config of an arch, with as many classes, and the auxiliary head, that the state has."""
    overrides = []
    detectors = getattr(table, "DETECTORS", {})
    if table.CLASSIFIER:
        name = f"{detectors[arch][0] if arch in detectors else table.CLASSIFIER[0]}.weight"
        if name not in state:
            raise InputError(
                f"the checkpoint has no {name}, the classifier of {arch}: it holds "
                f"{', '.join(list(state)[:4])}, ... Is it of another --arch or --source?"
            )
        if arch in detectors:
            outputs = state[name].shape[0]
            if num_classes or outputs != detectors[arch][1]:  # else those of the data set
                num_classes = num_classes or outputs - getattr(table, "BACKGROUND", 1)
                one = num_classes == 1  # a table of classes has two or more: the first is none
                num_classes += one
                overrides.append(("model.things", "(1,)" if one else "()"))
        else:
            num_classes = num_classes or state[name].shape[0]
            if num_classes < 2:
                raise InputError(
                    "the checkpoint has one class, a sigmoid: networks here have two or more, with "
                    "a softmax; --num_classes 2 makes a new classifier"
                )
            if not any(name.startswith("aux") for name in state):
                overrides.append(("model.aux", "0"))
    overrides.append(("model.num_classes", str(num_classes)))
    if dataset:
        overrides.append(("data.dataset", dataset))
    return resolve(shipped(table.ARCHS[arch]), overrides)


def classes(config: ConfigDict) -> Classes:
    """The class table of the config's data set where it fits the network, else plain numbers."""
    count = config.model.num_classes
    try:
        table = catalog.classes(config.data.dataset, config.data.root)
    except InputError:
        table = None
    if table and len(table) == count:
        return table
    return Classes(tuple(f"class_{i}" for i in range(count)), voc_palette(count))


def may_be_new(name: str, table: ModuleType, another_count: bool) -> bool:
    """Whether one of our arrays may be missing: the classifiers', where another class count is
    asked for; all of the head, where the source's networks have none."""
    if not table.CLASSIFIER:
        return name.split("/")[1] != "backbone"
    last = ("classifier", "aux_classifier", "box/regressor")
    return another_count and name.rpartition("/")[0].endswith(last)


def accept(report: Report, fresh: list[str], ignored: str, network: str, path: Path) -> None:
    """Raises InputError where arrays are missing that may not be new, or have no place.

    An array without a place is a sign of a larger network, whose others would all fit. ignored: a
    regex of names that need none.
    """
    missing = [name for name in report.missing if name not in fresh]
    extra = [name for name in report.unused if not re.fullmatch(ignored, name)]
    if not missing and not extra:
        return
    raise InputError(
        f"{path} is not a {network}: {len(missing)} arrays are missing or of another shape, and "
        f"{len(extra)} of the file have no place in it.\n{report.text()}\n"
        "Check --arch; --num_classes N makes a new classifier."
    )


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
