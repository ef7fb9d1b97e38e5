"""Foreign parameters to ours: names by rules, layouts by rank.

A rule is a pair (regex of a foreign module's name, path of ours); the first that matches the whole
name wins. The path is a template for `Match.expand`, or a function of the match. "a/x|a/y" offers
two: the first that the network has and that the array's rank fits. `Rolled(path, by)` is for
networks that concatenate in another order, so that the next kernel's input channels are in another
order too, and `Transposed(path)` for transposed convolutions.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Rolled(NamedTuple):
    """A kernel whose input channels have to be rolled so many places to the right."""

    path: str
    by: Callable[[int], int]  # of the number of input channels


class Transposed(NamedTuple):
    """The kernel of a transposed convolution, torch's [in,out,h,w]."""

    path: str


Rule = tuple[str, str | Callable[[re.Match], str | Rolled | Transposed]]
SILENT = ("num_batches_tracked",)  # of torch's batch norm: nothing that is needed
# Torch's name of an array and its rank -> collection and name here.
LEAVES = {
    ("weight", 4): ("params", "kernel"),
    ("weight", 2): ("params", "kernel"),
    ("weight", 1): ("params", "scale"),
    ("bias", 1): ("params", "bias"),
    ("running_mean", 1): ("batch_stats", "mean"),
    ("running_var", 1): ("batch_stats", "var"),
}


@dataclasses.dataclass
class Report:
    """What became of a foreign state."""

    mapped: dict[str, str] = dataclasses.field(default_factory=dict)  # our name -> theirs
    missing: list[str] = dataclasses.field(default_factory=list)  # our names
    unused: list[str] = dataclasses.field(default_factory=list)  # their names
    misfits: list[str] = dataclasses.field(default_factory=list)  # both, with their shapes

    def text(self) -> str:
        """The report as lines for people."""
        lines = [f"mapped {len(self.mapped)} arrays"]
        for title in ("missing", "unused", "misfits"):
            found = getattr(self, title)
            some = "; ".join(found[:6]) + ("; ..." if len(found) > 6 else "")
            lines.append(f"{title} {len(found)}" + (f": {some}" if found else ""))
        return "\n".join(lines)


def fit(
    state: dict[str, np.ndarray], rules: Sequence[Rule], shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, np.ndarray], Report]:
    """The arrays of `state` under our names and in our layout, float32, and what became of each.

    shapes: our name -> shape of all that the network has, such as "params/stem/conv/kernel" and
    "batch_stats/stem/norm/mean". An array of a wrong shape is reported, not taken.
    """
    compiled = [(re.compile(pattern), target) for pattern, target in rules]
    arrays, report = {}, Report()
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        if leaf in SILENT:
            continue
        target = _target(module, compiled)
        path = target if isinstance(target, str) else target.path
        collection, ending = LEAVES.get((leaf, value.ndim), ("", ""))
        places = [f"{option}/{ending}" for option in path.split("|")]
        # A frozen norm has its scale and bias among the statistics.
        options = [f"{c}/{place}" for place in places for c in (collection, "batch_stats")]
        ours = next((option for option in options if option in shapes), None)
        if ours is None:
            report.unused.append(name)
            continue
        if isinstance(target, Transposed) and value.ndim == 4:
            value = value.swapaxes(0, 1)
        value = layout(value, shapes[ours], target.by if isinstance(target, Rolled) else None)
        if value.shape != shapes[ours]:
            report.misfits.append(f"{name} {value.shape}, {ours} needs {shapes[ours]}")
            continue
        arrays[ours] = value.astype(np.float32)
        report.mapped[ours] = name
    report.missing = [path for path in shapes if path not in arrays]
    return arrays, report


def layout(
    value: np.ndarray, shape: tuple[int, ...], roll: Callable[[int], int] | None = None
) -> np.ndarray:
    """Torch's kernel [out,in,h,w] as [h,w,in,out], and a depthwise [C,1,h,w] as [h,w,1,C].

    A fully connected layer, [out,in * h * w], is a convolution over a whole map of `shape`.
    """
    if value.ndim == 2 and value.size == np.prod(shape):
        value = value.reshape(shape[3], shape[2], *shape[:2])
    if value.ndim == 4:
        value = value.transpose(2, 3, 1, 0)
        if roll:
            value = np.roll(value, roll(value.shape[2]), axis=2)
    return value


def _target(module: str, rules: list) -> str | Rolled | Transposed:
    for pattern, target in rules:
        if match := pattern.fullmatch(module):
            return target(match) if callable(target) else match.expand(target)
    return ""


def pair(theirs: str, ours: str) -> list[Rule]:
    """A convolution and its norm, numbered as in a torch Sequential: "x.0", "x.1"."""
    return [(rf"{theirs}\.0", f"{ours}/conv"), (rf"{theirs}\.1", f"{ours}/norm")]


def resnet(prefix: str = "", ours: str = "backbone/") -> list[Rule]:
    """torchvision's ResNet, and those that keep its names: timm, smp, MMSegmentation.

    prefix: regex of what stands before every name, such as r"backbone\\."; ours: the same here.
    """

    def unit(match: re.Match) -> str:
        stage, number, kind, index = match.groups()
        layer = "conv" if kind == "conv" else "norm"
        return f"{ours}conv{int(stage) + 1}/unit{int(number) + 1}/conv{index}/{layer}"

    def shortcut(match: re.Match) -> str:
        """Convolution 0 and norm 1, or 1 and 2 where an average pooling comes first."""
        stage, number = match.groups()
        path = f"{ours}conv{int(stage) + 1}/unit{int(number) + 1}/shortcut"
        return f"{path}/conv|{path}/norm"

    def stem(match: re.Match) -> str:
        """Three convolutions with a norm and a ReLU each: 0, 1, (2), 3, 4, (5), 6, 7."""
        index, layer = divmod(int(match[1]), 3)
        return f"{ours}stem{index + 1}/{('conv', 'norm')[layer]}"

    return [
        (rf"{prefix}layer(\d)\.(\d+)\.(conv|bn)(\d)", unit),
        (rf"{prefix}layer(\d)\.(\d+)\.downsample\.\d", shortcut),
        (rf"{prefix}conv1", f"{ours}stem/conv"),
        (rf"{prefix}bn1", f"{ours}stem/norm|{ours}stem3/norm"),
        (rf"{prefix}(?:conv1|stem)\.([013467])", stem),
    ]
