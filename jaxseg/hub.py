"""Networks by the names that torch.hub and the model zoos use, with weights that you have.

jaxseg.hub.list()                                                  # all names
print(jaxseg.hub.help("torchvision/deeplabv3_resnet101"))
predictor = jaxseg.hub.load("torchvision/deeplabv3_resnet101", checkpoint="weights.pth")
result = predictor(image)                                          # uint8 [H,W,3]
"""

import json
from pathlib import Path

from jaxseg import checkpoint as checkpoints
from jaxseg.errors import InputError, unknown
from jaxseg.verbs.convert import ORIGIN, SOURCES, convert, digest
from jaxseg.verbs.predict import Predictor


def list() -> list[str]:
    """Every name: SOURCE/ARCH, such as "smp/Unet/resnet50"."""
    return [f"{source}/{arch}" for source, table in SOURCES.items() for arch in table.ARCHS]


def help(name: str) -> str:
    """What a name stands for: the source, and the experiment that builds the same network."""
    source, arch = _find(name)
    table = SOURCES[source]
    return f"{table.__doc__}\n\n{name} is experiments/{table.ARCHS[arch]}"


def load(name: str, checkpoint: str | Path, workdir: str | Path = "") -> Predictor:
    """The network `name` with the weights in the file `checkpoint`, as a function of an image.

    workdir: where the converted run stays; "" = beside the file. It is converted once; afterwards
    the file may be gone. Raises InputError for an unknown name, for a file that is not of this
    network, and for a workdir with the run of another network or file.
    """
    source, arch = _find(name)
    file = Path(checkpoint)
    place = Path(workdir or f"{file}.jaxseg")
    if checkpoints.exists(place):
        _check_origin(place, source, arch, file)
    else:
        convert(source, arch, file, place)
    return Predictor(place)


def _check_origin(place: Path, source: str, arch: str, file: Path) -> None:
    """Raises InputError unless the run in `place` is this network with the weights of this file."""
    record = place / ORIGIN
    have = json.loads(record.read_text()) if record.is_file() else {}
    want = {"source": source, "arch": arch}
    if file.is_file():
        want["sha256"] = digest(file)
    if any(key not in have or have[key] != value for key, value in want.items()):
        there = f"{have['source']}/{have['arch']} of another file" if have else "another run"
        if have and (have["source"], have["arch"]) != (source, arch):
            there = f"{have['source']}/{have['arch']}"
        raise InputError(
            f"{place} holds {there}, asked for {source}/{arch} of {file}: give another workdir, or "
            "remove that folder"
        )


def _find(name: str) -> tuple[str, str]:
    """(source, arch); a bare "deeplabv3_resnet101" is found in the first source that has it."""
    names = list()
    full = name if name in names else next((n for n in names if n.split("/", 1)[1] == name), None)
    if full is None:
        raise unknown("network", name, names)
    source, arch = full.split("/", 1)
    return source, arch
