"""Networks by the names that torch.hub and the model zoos use, with weights that you have.

jaxseg.hub.list()                                                  # all names
print(jaxseg.hub.help("torchvision/deeplabv3_resnet101"))
predictor = jaxseg.hub.load("torchvision/deeplabv3_resnet101", checkpoint="weights.pth")
result = predictor(image)                                          # uint8 [H,W,3]
"""

from pathlib import Path

from jaxseg import checkpoint as checkpoints
from jaxseg.convert import SOURCES, convert
from jaxseg.errors import unknown
from jaxseg.predict import Predictor


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

    workdir: where the converted run stays; "" = beside the file. It is converted once. Raises
    InputError for an unknown name, and for a file that is not of this network.
    """
    source, arch = _find(name)
    place = Path(workdir or f"{checkpoint}.jaxseg")
    if not checkpoints.exists(place):
        convert(source, arch, Path(checkpoint), place)
    return Predictor(place)


def _find(name: str) -> tuple[str, str]:
    """(source, arch); a bare "deeplabv3_resnet101" is found in the first source that has it."""
    names = list()
    full = name if name in names else next((n for n in names if n.split("/", 1)[1] == name), None)
    if full is None:
        raise unknown("network", name, names)
    source, arch = full.split("/", 1)
    return source, arch
