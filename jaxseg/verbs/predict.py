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

from jaxseg import models, sharding
from jaxseg.compiler import options
from jaxseg.data import catalog, colours, files, pixels, scene
from jaxseg.data.pipeline import extend
from jaxseg.data.scene import Scene
from jaxseg.data.transforms import fitted_size
from jaxseg.errors import InputError
from jaxseg.found import Found, is_found, packed, unpacked
from jaxseg.inference import buckets, check_windows, make_infer, settings
from jaxseg.log import clock, say
from jaxseg.saver import gather, write_found
from jaxseg.train import load_variables

ROWS = 512  # of an image that are coloured at a time


@dataclasses.dataclass(frozen=True)
class Result:
    """What the network sees in one image."""

    image: np.ndarray  # uint8 [H,W,C]
    label: np.ndarray  # uint8 [H,W], class ids; 255 where a network of objects sees nothing
    logits: np.ndarray | None  # float32 [H,W,K]; None from a network of objects
    classes: colours.Classes
    instances: dict[str, np.ndarray] | None = None  # the surest first: `masks` bool [n,H,W],
    # `scores` float32 [n], `classes` int32 [n], and `boxes` float32 [n,4], y0, x0, y1, x1, of some
    panoptic: np.ndarray | None = None  # int32 [H,W], class id * 1000 + object, 255000 = void
    scene: Scene | None = None  # the objects, or panoptic segments, that are drawn

    @property
    def overlay(self) -> np.ndarray:
        """The classes' colours over the image, uint8 [H,W,3]; objects with borders and names."""
        if self.scene is not None:
            return scene.overlay(self.image, self.scene, self.classes)
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
        if self.config.eval.mode == "whole":  # windows go to the devices one by one instead
            mesh = sharding.over_rows(mesh)
        self.classes = catalog.read_classes(workdir / "classes.json")
        self.objects = models.of_objects(self.config)
        self._answer = _answer = make_infer(self.config, mesh)

        def infer(variables: Any, image: jax.Array, size: Any, logits: bool, extent: Any) -> dict:
            out = _answer(variables, image, size, logits, extent)
            return {**packed(out), "finite": out["finite"]} if is_found(out) else out

        self._infer = jax.jit(infer, static_argnames=("size", "logits"), compiler_options=options())

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
                f"needs uint8 [H,W,{channels}], values 0..255, uint16 0..65535 or float32 0..255, "
                "such as np.asarray(PIL.Image.open(FILE).convert('RGB'))"
            )
        if image.dtype == np.uint16:
            image = image.astype(np.float32) / 257  # as files are read
        if image.dtype == np.float32 and not np.isfinite(image).all():
            raise InputError("an image with NaN or infinity: needs numbers 0..255")
        if self.objects:
            found = self.find(image, self.seen(image.shape[:2]))
            shown, label = found.scene(self.config.eval.confidence), self.label(found)
            kept = (found.instances, found.panoptic)
            return Result(image, label, None, self.classes, *kept, shown)
        return Result(image, *self.infer(image, image.shape[:2], logits=True), self.classes)

    def seen(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (height, width) at which the network is shown an image of `size`."""
        return fitted_size(size, self.config.eval.resize) if self.objects else size

    def kinds(self) -> set[str]:
        """What a network of objects says: `semantic`, `instances`, `panoptic`."""
        size, data = self.config.data.crop, self.config.data
        image = jax.ShapeDtypeStruct((1, *size, data.channels), np.uint8)
        out = jax.eval_shape(lambda v, x: self._answer(v, x, size, False), self.variables, image)
        return set(out)

    def label(self, found: Found) -> np.ndarray:
        """uint8 [H,W] of class ids, see `Found.label`."""
        things, least = models.things(self.config), self.config.eval.confidence
        return found.label(self.classes, things, least)

    def find(self, image: np.ndarray, shape: tuple[int, int], name: object = "") -> Found:
        """What a network of objects finds in image [H,W,C], 0..255, as `infer` does for labels."""
        size, data = image.shape[:2], self.config.data
        seen = self.seen(size)
        factor = tuple(n / have for n, have in zip(seen, size, strict=True))
        image = extend(pixels.resample(image, (0, 0), factor, seen), shape, data.mean)[None]
        out = self._infer(self.variables, image, size=shape, logits=False, extent=None)
        self._check(out, name)
        return unpacked(jax.device_get(out), 0, seen, size, models.stuff_area(self.config))

    def _check(self, out: dict, name: object) -> None:
        if not out["finite"][0]:
            to = f" to {name}" if name else ""
            raise InputError(
                f"the network's answer{to} is not finite (NaN or infinity): the checkpoint is "
                "broken, or train.compute_dtype too small for this image"
            )

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
        self._check(out, name)
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
    "instances": "_instances.png",
    "panoptic": "_panoptic.png",
    "objects": "_objects.json",
    "label": ".png",
}


class Formats(NamedTuple):
    """What is written of an image beside NAME.png (indexed) and NAME_overlay.png."""

    logits: bool = False  # NAME.npz, float32 `logits` [H,W,K]
    probabilities: bool = False  # NAME_probabilities.npz, float32 `probabilities` [H,W,K]
    alpha: bool = False  # NAME_alpha.png, grey: the probability of class 1 of two
    instances: bool = False  # NAME_instances.png, grey of 16 bits: the number of the object, 0 none
    panoptic: bool = False  # NAME_panoptic.png, COCO's colours of segments
    objects: bool = False  # NAME_objects.json: what annotations.json and panoptic.json say of it

    def files(self, output: Path, name: str) -> dict[str, Path]:
        """Kind -> file of an image; the label, written last, tells that the others are there."""
        kinds = {"overlay": True, **self._asdict(), "label": True}
        return {k: output / f"{name}{ENDS[k]}" for k, wanted in kinds.items() if wanted}


PLAIN_KINDS = {"overlay", "label"}
PLAIN, EVERY = Formats(), Formats(*[True] * len(Formats._fields))


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

    Where a network tells objects apart, OUTPUT/annotations.json, COCO's, has all objects of all
    images that are there, and OUTPUT/panoptic.json, COCO's panoptic form, all segments.

    legend: also OUTPUT/legend.png, the classes' names and colours. part: (i, n), the i-th of n
    processes that share the images, from 1. overrides: of the run's config.
    """
    paths = collect(inputs)
    check_outputs(paths, output, formats, legend)
    predictor = Predictor(workdir, overrides)
    config = predictor.config
    formats = fitting(formats, predictor)
    check_outputs(paths, output, formats, legend)  # of a network of objects there are more
    sizes = {name: files.image_size(path) for name, path in paths.items()}
    check_windows(config, list(sizes.values()), list(paths.values()).__getitem__)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {output}: {error.strerror}") from error
    if legend:
        save_legend(output / "legend.png", predictor.classes)
    seen = {name: predictor.seen(size) for name, size in sizes.items()}
    fits = buckets(seen.values(), config.eval.buckets)
    deep = any(files.is_deep(path, config.data.channels) for path in paths.values())
    dtype = np.dtype(np.float32 if deep else np.uint8)  # one for all: each would compile anew
    note = {"step": predictor.step, "names": predictor.classes.names}
    note |= {"run": predictor.fingerprint, "eval": settings(config)}
    mine = list(paths.items())[part[0] - 1 :: part[1]]
    progress = Progress(len(mine))
    for name, path in mine:
        shape = fits[seen[name]]
        own = json.loads(json.dumps({**note, "shape": shape}))
        written, every = (f.files(output, name) for f in (formats, EVERY))
        good, old = standing(every, path, own)
        work = not written.keys() <= good
        if work:
            image = read(path, sizes[name], config.data.channels).astype(dtype, copy=False)
            own["kinds"] = sorted(good | written.keys())
            old = [every[kind] for kind in ("label", *(old - good - written.keys()))]
            label_image(predictor, path, image, shape, written, old, json.dumps(own))
        progress.done(f"{path} -> {written['label']}" + ("" if work else " (is there)"), work)
    if predictor.objects:
        own = [output / f"{name}{ENDS['objects']}" for name in paths]
        gather(output, own, predictor.classes, formats.panoptic)
    compilations = predictor._infer._cache_size()
    say(f"images: {len(mine)}, labelled: {progress.worked}, compilations: {compilations}")
    return 0


def fitting(formats: Formats, predictor: Predictor) -> Formats:
    """What is written of an image by that run. Raises InputError for what it cannot tell."""
    if formats.alpha and len(predictor.classes) != 2:
        raise InputError(
            "--save_alpha needs a run with two classes, background and foreground: this one has "
            f"{len(predictor.classes)}"
        )
    if not predictor.objects:
        return formats
    if formats != PLAIN:
        raise InputError(
            f"{predictor.config.model.name} tells objects apart and has no logits of pixels: leave "
            "--save_logits, --save_probabilities and --save_alpha out"
        )
    return Formats(instances=True, panoptic="panoptic" in predictor.kinds(), objects=True)


def label_image(
    predictor: Predictor,
    path: Path,
    image: np.ndarray,
    shape: tuple[int, int],
    written: dict[str, Path],
    old: list[Path],
    note: str,
) -> None:
    """Labels image [H,W,C], extended to `shape`, and writes its files; `old` ones go before.

    Without its label, the first of them, nothing of an image is taken for good, should this be
    interrupted.
    """
    found = predictor.find(image, shape, path) if predictor.objects else None
    if found is None:
        label, logits = predictor.infer(image, shape, not written.keys() <= PLAIN_KINDS, path)
    else:
        label, logits = predictor.label(found), None
    for file in old:
        file.unlink(missing_ok=True)
    if found is not None:
        least = predictor.config.eval.confidence
        write_found(written, path, image, found, found.scene(least), predictor.classes)
        written = {"label": written["label"]}
    write(written, image, label, logits, predictor.classes, note)


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
    if output.resolve() in {path.parent for path in inputs}:
        raise InputError(f"--output {output} is the images' own folder: labels would become images")
