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
from jaxseg.inference import buckets, make_infer
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
        """Labels one image, uint8 [H,W,C] of any size, C as in the run. It compiles once a size."""
        image, channels = np.asarray(image), self.config.data.channels
        if (
            image.dtype != np.uint8
            or image.ndim != 3
            or image.shape[2] != channels
            or not image.size
        ):
            raise InputError(
                f"an image of {image.dtype} {list(image.shape)}: "
                f"needs uint8 [H,W,{channels}], values 0..255"
            )
        return Result(image, *self.infer(image, image.shape[:2], logits=True), self.classes)

    def infer(
        self, image: np.ndarray, shape: tuple[int, int], logits: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """(label uint8 [H,W], logits float32 [H,W,K] or None) of image [H,W,C], 0..255.

        shape: what the image is extended to before. Raises InputError where the network's answer is
        not finite.
        """
        height, width = image.shape[:2]
        extent, image = np.array([[height, width]]), extend(image, shape)[None]
        out = self._infer(self.variables, image, size=shape, logits=logits, extent=extent)
        if not out["finite"][0]:
            raise InputError(
                "the network's answer is not finite (NaN or infinity): the checkpoint is broken, "
                "or train.compute_dtype too small for this image"
            )
        label = np.asarray(out["semantic"])[0, :height, :width].astype(np.uint8)
        return label, np.asarray(out["logits"])[0, :height, :width] if logits else None


def load(workdir: str | Path) -> Predictor:
    """The trained run in `workdir`, as a function of an image."""
    return Predictor(workdir)


class Formats(NamedTuple):
    """What is written of an image beside NAME.png (indexed) and NAME_overlay.png."""

    logits: bool = False  # NAME.npz, float32 `logits` [H,W,K]
    probabilities: bool = False  # NAME_probabilities.npz, float32 `probabilities` [H,W,K]

    def files(self, output: Path, name: str) -> dict[str, Path]:
        """Kind -> file of an image; the label, written last, tells that the others are there."""
        ends = {"overlay": "_overlay.png"}
        if self.logits:
            ends["logits"] = ".npz"
        if self.probabilities:
            ends["probabilities"] = "_probabilities.npz"
        return {kind: output / f"{name}{end}" for kind, end in {**ends, "label": ".png"}.items()}


PLAIN = Formats()
NEUTRAL = ("batch", "buckets", "boundary", "pictures")  # keys of `eval` that change no label


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
    with the same settings and not older than the image, is not labelled again.

    legend: also OUTPUT/legend.png, the classes' names and colours. part: (i, n), the i-th of n
    processes that share the images, from 1. overrides: of the run's config.
    """
    paths = collect(inputs)
    check_outputs(paths, output, formats, legend)
    predictor = Predictor(workdir, overrides)
    config = predictor.config
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {output}: {error.strerror}") from error
    if legend:
        save_legend(output / "legend.png", predictor.classes)
    sizes = {name: files.image_size(path) for name, path in paths.items()}
    fits = buckets(sizes.values(), config.eval.buckets)
    settings = {k: v for k, v in config.eval.items() if k not in NEUTRAL}
    note = {"step": predictor.step, "names": predictor.classes.names}
    note |= {"run": predictor.fingerprint, "eval": settings}
    mine = list(paths.items())[part[0] - 1 :: part[1]]
    progress, used = Progress(len(mine)), set()
    for name, path in mine:
        shape, written = fits[sizes[name]], formats.files(output, name)
        own = json.dumps({**note, "shape": shape})
        work = not complete(written, path, own)
        if work:
            used.add(shape)
            label_file(predictor, path, shape, written, own)
        progress.done(f"{path} -> {written['label']}" + ("" if work else " (is there)"), work)
    say(f"images: {len(mine)}, labelled: {progress.worked}, compilations: {len(used)}")
    return 0


def label_file(
    predictor: Predictor, path: Path, shape: tuple[int, int], written: dict[str, Path], note: str
) -> None:
    """Labels one image file, extended to `shape`, and writes the files of `Formats.files`."""
    image = files.read_image(path, predictor.config.data.channels)
    arrays = not written.keys().isdisjoint(("logits", "probabilities"))
    label, logits = predictor.infer(image, shape, arrays)
    for kind, file in written.items():
        with files.replacing(file) as temporary:
            if kind == "label":
                colours.save_label(temporary, label, predictor.classes, note)
            elif kind == "overlay":
                picture = Image.fromarray(overlay(image, label, predictor.classes))
                picture.save(temporary, format="PNG")
            else:
                values = logits if kind == "logits" else softmax(logits)
                with temporary.open("wb") as stream:
                    np.savez_compressed(stream, **{kind: values})


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis."""
    values = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return values / values.sum(axis=-1, keepdims=True)


def complete(written: dict[str, Path], path: Path, note: str) -> bool:
    """Whether all files of the image at `path` are there, by the run and settings of `note`."""
    try:
        since = path.stat().st_mtime
        newer = all(file.stat().st_mtime >= since for file in written.values())
        return newer and colours.read_note(written["label"]) == note
    except OSError:  # missing, or no picture
        return False


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
