"""Prediction on a user's images: the two-line API and the verb `predict`.

predictor = jaxseg.load("runs/quickstart")
result = predictor(image)  # uint8 [H,W,3] of any size
"""

import dataclasses
import glob
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from jaxseg.data import catalog, colours, files
from jaxseg.data.pipeline import extend
from jaxseg.errors import InputError
from jaxseg.inference import buckets, check_windows, make_infer, settings
from jaxseg.log import clock, say
from jaxseg.train import load_variables

ROWS = 512  # of an image that are coloured at a time


@dataclasses.dataclass(frozen=True)
class Result:
    """What the network sees in one image."""

    image: np.ndarray  # uint8 [H,W,C]
    label: np.ndarray  # uint8 [H,W], class ids
    logits: np.ndarray  # float32 [H,W,K]
    classes: colours.Classes

    @property
    def overlay(self) -> np.ndarray:
        """The classes' colours over the image, uint8 [H,W,3]."""
        return overlay(self.image, self.label, self.classes)

    def save(self, path: str | Path) -> None:
        """Writes `label` as an indexed PNG in the data set's palette."""
        colours.save_label(Path(path), self.label, self.classes)


def overlay(image: np.ndarray, label: np.ndarray, classes: colours.Classes) -> np.ndarray:
    """`colours.overlay` in bands of rows, so that its memory is that of a band."""
    out = np.empty((*label.shape, 3), np.uint8)
    for top in range(0, len(label), ROWS):
        band = np.s_[top : top + ROWS]
        out[band] = colours.overlay(image[band], label[band], classes)
    return out


class Predictor:
    """A trained run, ready to label images. Attributes: config, classes, step, fingerprint."""

    def __init__(self, workdir: str | Path, overrides: Sequence[tuple[str, str]] = ()):
        """Loads the newest good checkpoint. Raises InputError where there is no run.

        overrides: of the run's config, (dotted key, text), such as ("eval.flip", "true").
        """
        workdir = Path(workdir)
        loaded = load_variables(workdir, overrides)
        self.config, mesh, self.variables, self.step, self.fingerprint = loaded
        self.classes = catalog.read_classes(workdir / "classes.json")
        self._infer = jax.jit(make_infer(self.config, mesh), static_argnames=("size", "logits"))

    def __call__(self, image: np.ndarray) -> Result:
        """Labels one image [H,W,C] of any size, C as in the run: uint8, uint16 or float32 0..255.

        It compiles once a size and type.
        """
        image, channels = np.asarray(image), self.config.data.channels
        if (
            image.dtype not in (np.uint8, np.uint16, np.float32)
            or image.ndim != 3
            or image.shape[2] != channels
            or not image.size
        ):
            raise InputError(
                f"an image of {image.dtype} {list(image.shape)}: "
                f"needs uint8 [H,W,{channels}], values 0..255, or uint16 or float32 0..255"
            )
        if image.dtype == np.uint16:
            image = image.astype(np.float32) / 257  # as files are read
        if image.dtype == np.float32 and not np.isfinite(image).all():
            raise InputError("an image with NaN or infinity: needs numbers 0..255")
        return Result(image, *self.infer(image, image.shape[:2], logits=True), self.classes)

    def infer(
        self, image: np.ndarray, shape: tuple[int, int], logits: bool, name: object = ""
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """(label uint8 [H,W], logits float32 [H,W,K] or None) of image [H,W,C], 0..255.

        shape: what the image is extended to before. name: what a message calls it. Raises
        InputError where the network's answer is not finite.
        """
        height, width = image.shape[:2]
        extent, image = np.array([[height, width]]), extend(image, shape)[None]
        out = self._infer(self.variables, image, size=shape, logits=logits, extent=extent)
        if not out["finite"][0]:
            to = f" to {name}" if name else ""
            raise InputError(
                f"the network's answer{to} is not finite (NaN or infinity): the checkpoint is "
                "broken, or train.compute_dtype too small for this image"
            )
        label = np.asarray(out["semantic"])[0, :height, :width].astype(np.uint8)
        return label, np.asarray(out["logits"])[0, :height, :width] if logits else None


def load(workdir: str | Path) -> Predictor:
    """The trained run in `workdir`, as a function of an image."""
    return Predictor(workdir)


ENDS = {
    "overlay": "_overlay.png",
    "logits": ".npz",
    "probabilities": "_probabilities.npz",
    "alpha": "_alpha.png",
    "label": ".png",
}


class Formats(NamedTuple):
    """What is written of an image beside NAME.png (indexed) and NAME_overlay.png."""

    logits: bool = False  # NAME.npz, float32 `logits` [H,W,K]
    probabilities: bool = False  # NAME_probabilities.npz, float32 `probabilities` [H,W,K]
    alpha: bool = False  # NAME_alpha.png, grey: the probability of class 1 of two

    def files(self, output: Path, name: str) -> dict[str, Path]:
        """Kind -> file of an image; the label, written last, tells that the others are there."""
        kinds = {"overlay": True, **self._asdict(), "label": True}
        return {k: output / f"{name}{ENDS[k]}" for k, wanted in kinds.items() if wanted}


PLAIN, EVERY = Formats(), Formats(logits=True, probabilities=True, alpha=True)


def predict(
    workdir: Path,
    inputs: Sequence[Path],
    output: Path,
    formats: Formats = PLAIN,
    legend: bool = False,
    part: tuple[int, int] = (1, 1),
    overrides: Sequence[tuple[str, str]] = (),
) -> int:
    """Labels image files, the images of folders and those that patterns match; the exit code.

    Every file appears whole or not at all. An image whose files are there, written by the same run
    with the same settings and not older than the image, is not labelled again. In windows, the
    memory is a few times that of the image and its label, and what the network holds of eval.batch
    windows; logits and probabilities, other scales and a CRF hold [H,W,K].

    legend: also OUTPUT/legend.png, the classes' names and colours. part: (i, n), the i-th of n
    processes that share the images, from 1. overrides: of the run's config.
    """
    paths = collect(inputs)
    check_outputs(paths, output, formats, legend)
    predictor = Predictor(workdir, overrides)
    config = predictor.config
    if formats.alpha and len(predictor.classes) != 2:
        raise InputError(
            f"--save_alpha needs a run with two classes, background and foreground: {workdir} has "
            f"{len(predictor.classes)}"
        )
    sizes = {name: files.image_size(path) for name, path in paths.items()}
    check_windows(config, list(sizes.values()), list(paths.values()).__getitem__)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {output}: {error.strerror}") from error
    if legend:
        save_legend(output / "legend.png", predictor.classes)
    fits = buckets(sizes.values(), config.eval.buckets)
    deep = any(files.is_deep(path, config.data.channels) for path in paths.values())
    dtype = np.dtype(np.float32 if deep else np.uint8)  # one for all: each would compile anew
    note = {"step": predictor.step, "names": predictor.classes.names}
    note |= {"run": predictor.fingerprint, "eval": settings(config)}
    mine = list(paths.items())[part[0] - 1 :: part[1]]
    progress = Progress(len(mine))
    for name, path in mine:
        own = json.loads(json.dumps({**note, "shape": fits[sizes[name]]}))
        written, every = (f.files(output, name) for f in (formats, EVERY))
        good, old = standing(every, path, own)
        work = not written.keys() <= good
        if work:
            image = read(path, sizes[name], config.data.channels)
            shape, arrays = fits[sizes[name]], formats != PLAIN
            label, logits = predictor.infer(image.astype(dtype, copy=False), shape, arrays, path)
            # Without its label nothing of an image is taken for good, should this be interrupted.
            for kind in ("label", *(old - good - written.keys())):
                every[kind].unlink(missing_ok=True)
            own["kinds"] = sorted(good | written.keys())
            write(written, image, label, logits, predictor.classes, json.dumps(own))
        progress.done(f"{path} -> {written['label']}" + ("" if work else " (is there)"), work)
    compilations = predictor._infer._cache_size()
    say(f"images: {len(mine)}, labelled: {progress.worked}, compilations: {compilations}")
    return 0


def read(path: Path, size: tuple[int, int], channels: int) -> np.ndarray:
    """The image [H,W,channels] of a file. Raises InputError where it has not the header's size."""
    image = files.read_image(path, channels)
    if image.shape[:2] != size:
        raise InputError(
            f"image {files.shown(path)} has {image.shape[:2]} pixels (height, width), but its "
            f"header says {size}: the file is damaged. Export it again"
        )
    return image


def write(
    written: dict[str, Path],
    image: np.ndarray,
    label: np.ndarray,
    logits: np.ndarray | None,
    classes: colours.Classes,
    note: str,
) -> None:
    """Writes the files of an image, kind -> file, in their order."""
    for kind, file in written.items():
        with files.replacing(file) as temporary:
            if kind == "label":
                colours.save_label(temporary, label, classes, note)
            elif kind in ("overlay", "alpha"):
                if kind == "overlay":
                    pixels = overlay(image, label, classes)
                else:
                    pixels = (255 * softmax(logits)[..., 1]).round().astype(np.uint8)
                Image.fromarray(pixels).save(temporary, format="PNG")
            else:
                values = logits if kind == "logits" else softmax(logits)
                with temporary.open("wb") as stream:
                    np.savez_compressed(stream, **{kind: values})


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis."""
    values = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return values / values.sum(axis=-1, keepdims=True)


def standing(every: dict[str, Path], path: Path, note: dict) -> tuple[set[str], set[str]]:
    """(kinds of files that are good, kinds that the label was written with) of the image at `path`.

    Good are those that its label says were written with it, by the run and settings of `note`, if
    none of both is older than the image.
    """
    try:
        held = json.loads(colours.read_note(every["label"]))
        old, since = set(held.pop("kinds")), path.stat().st_mtime
        good = {k for k in old if every[k].is_file() and every[k].stat().st_mtime >= since}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # missing, or of others
        return set(), set()
    return (good if held == note and "label" in good else set()), old


def save_legend(path: Path, classes: colours.Classes) -> None:
    """Writes a picture of the classes' names and colours."""
    with files.replacing(path) as temporary:
        colours.legend(classes, range(len(classes)), width=640).save(temporary, format="PNG")


class Progress:
    """A line for each image, or on a terminal one line that changes."""

    def __init__(self, total: int):
        self.total, self.seen, self.worked = total, 0, 0
        self.begin, self.terminal = time.perf_counter(), sys.stdout.isatty()

    def done(self, text: str, work: bool) -> None:
        """Counts an image; work: it was labelled, and was not there already."""
        self.seen += 1
        self.worked += work
        line = f"{self.seen}/{self.total}  {text}"
        if not self.terminal:
            say(line)
        elif work:
            rate = self.worked / (time.perf_counter() - self.begin)
            left = clock((self.total - self.seen) / rate)
            say(f"\r\033[K{line}  {rate:.1f} images/s  ETA {left}", end="")
        if self.terminal and self.seen == self.total:
            say("")


def collect(inputs: Sequence[Path]) -> dict[str, Path]:
    """Output name -> image file, for files, folders and patterns such as photos/**/*.jpg.

    Raises InputError where one has no image, and for two images of one name.
    """
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside, what = files.find_images(path), f"no images in folder {path}"
        elif path.is_file():
            inside, what = [path], ""
        elif glob.has_magic(str(path)):
            matches = map(Path, sorted(glob.glob(str(path), recursive=True)))
            inside = [m for m in matches if m.suffix.lower() in files.IMAGE_SUFFIXES]
            what = f"no images match {path}"
        else:
            raise InputError(f"no such image or folder: {path}")
        if not inside:
            raise InputError(f"{what}: needs files ending in {', '.join(files.IMAGE_SUFFIXES)}")
        found += inside
    names: dict[str, Path] = {}
    for path in found:
        if names.setdefault(path.stem, path) != path:
            raise InputError(
                f"{names[path.stem]} and {path} would both become {path.stem}.png: "
                "predict them into different --output folders"
            )
    return names


def check_outputs(paths: dict[str, Path], output: Path, formats: Formats, legend: bool) -> None:
    """Raises InputError where a file would be written over an input or over another output."""
    inputs = {path.resolve() for path in paths.values()}
    owners: dict[Path, Any] = {output / "legend.png": "the legend"} if legend else {}
    for name, path in paths.items():
        for written in formats.files(output, name).values():
            if written in owners:
                raise InputError(
                    f"{owners[written]} and {path} would both become {written.name}: "
                    "predict them into different --output folders"
                )
            if written.resolve() in inputs:
                raise InputError(f"{written} is an input and would be overwritten: change --output")
            owners[written] = path
