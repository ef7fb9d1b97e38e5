"""Random-access readers: `source[i]` is one example, read and checked.

An example is a dict: `image` [H,W,C] uint8 (float32 0..255, with fractions, from a source where any
image has more than 8 bits), `label` uint8 [H,W] with ids 0..K-1 or 255 = ignore, `name`; from a
source opened with instances=True also `instances`, see `objects`; from one of soft masks `alpha`
float32 [H,W], 0..1, how much of a pixel is class 1. A source has `classes`, `channels`,
`dtype` (of its images), `len()`, `source[i]` and `size(i)` (height, width, from a header; Records
reads the record for it, once); some also have `image_name(i)`, the name without the rest.

What data sets differ in is a Listing: which image goes with which label, and how one is read.
"""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxseg.data import shapes
from jaxseg.data.colours import IGNORE, Classes
from jaxseg.data.files import (
    IMAGE_SUFFIXES,
    Embedded,
    Page,
    image_size,
    is_deep,
    path_of,
    read_image,
    shown,
)
from jaxseg.errors import InputError


class Listing(NamedTuple):
    """One split, as the layout of its data set found it: label i belongs to image i."""

    images: list[Path | Page | Embedded]
    labels: list[Any]  # mostly paths; what the functions below read
    label: Callable[[Any], np.ndarray]  # -> uint8 [H,W] of ids
    instances: Callable[[Any], dict] | None = None  # -> see `objects`; None: has none
    alpha: Callable[[Any], np.ndarray] | None = None  # -> float32 [H,W], 0..1; None: has none
    pattern: str = ""  # of the masks among the files of their folders; "": there may be others


def objects(
    masks: Sequence[np.ndarray],
    classes: Sequence[int],
    crowd: Sequence[bool],
    size: tuple[int, int],
) -> dict[str, np.ndarray]:
    """The n objects of an example; they may overlap.

    masks: uint8 [n,H,W]. classes: int32 [n], ids as in the label. crowd: bool [n], true for a
    region of many that are not told apart. What says it itself, as COCO's JSON does, adds `areas`
    float64 [n], pixels, and `boxes` float64 [n,4] (y0, x0, y1, x1, pixels), NaN where it does not:
    an evaluation goes by them instead of the masks' own, as COCO's does.
    """
    stack = np.array(masks, np.uint8).reshape(len(masks), *size)
    return {"masks": stack, "classes": np.array(classes, np.int32), "crowd": np.array(crowd, bool)}


def numbered_objects(
    numbers: np.ndarray, label: np.ndarray, none: Sequence[int] = (0,), path: Path | None = None
) -> dict:
    """Objects [H,W] by number, except `none`; each has the class of most of its label's pixels.

    Raises InputError, which names `path`, where the label [H,W] has another size.
    """
    if numbers.shape != label.shape:
        where = shown(path) if path else "the map of objects"
        raise InputError(
            f"{where} is {numbers.shape} and the mask of its classes {label.shape} (height, "
            "width): they must be equal"
        )
    masks, classes = [], []
    for number in np.unique(numbers):
        mask = numbers == number
        pixels = np.bincount(label[mask], minlength=IGNORE)[:IGNORE]
        if number not in none and pixels.any():
            masks.append(mask)
            classes.append(int(pixels.argmax()))
    return objects(masks, classes, [False] * len(masks), label.shape)


class Files:
    """The source of a Listing."""

    def __init__(
        self,
        listing: Listing,
        classes: Classes,
        channels: int = 3,
        instances: bool = False,
        complete: bool = True,
    ):
        """Raises InputError where `complete` and files are missing, or there are no images."""
        self.images, self.labels, self.read_label, self.read_instances, *rest = listing
        self.read_alpha, self.pattern = rest
        self.soft = self.read_alpha is not None
        self.classes, self.channels, self.instances = classes, channels, instances
        if not self.images:
            raise InputError(f"no images: needs files ending in {', '.join(IMAGE_SUFFIXES)}")
        if instances and self.read_instances is None:
            raise InputError("this data set does not tell objects apart: it trains no instances")
        if complete:
            self._complete()
        places = {path_of(place): place for place in self.images}.values()
        deep = any(is_deep(place, channels) for place in places)
        self.dtype = np.dtype(np.float32 if deep else np.uint8)

    def _complete(self) -> None:
        images = [path_of(image) for image in self.images]
        masks = [self.mask(i) for i in range(len(self))]
        missing = absent([*images, *filter(None, masks)])
        gone = [path for path in images if path in missing]
        bare = [pair for pair in zip(images, masks, strict=True) if pair[1] in missing]
        if gone:
            raise InputError(
                f"{len(gone)} of {len(self)} images are missing, such as {shown(gone[0])}"
            )
        if bare:
            image, mask = map(shown, bare[0])
            raise InputError(
                f"{len(bare)} of {len(self)} images have no mask, such as {image}: needs {mask}"
            )

    def mask(self, index: int) -> Path | None:
        """The file or folder of a label; None where it is one of many in a larger file."""
        path = path_of(self.labels[index])
        return path if isinstance(path, Path) else None

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> np.ndarray:
        """[H,W,C]. Raises InputError where it cannot be read."""
        image = read_image(self.images[index], self.channels)
        if image.dtype != self.dtype and self.dtype == np.uint8:
            raise InputError(
                f"image {shown(path_of(self.images[index]))} has more than 8 bits, though its name "
                "ends like those that have 8: give it the suffix of its format"
            )
        return image.astype(self.dtype, copy=False)

    def label(self, index: int) -> np.ndarray:
        """uint8 [H,W]. Raises InputError where it is missing or cannot be read."""
        mask = self.mask(index)
        if mask and not mask.exists():
            image = shown(path_of(self.images[index]))
            raise InputError(f"image {image} has no mask: needs {shown(mask)}")
        return self.read_label(self.labels[index])

    def check_size(self, index: int, image: np.ndarray, label: np.ndarray) -> None:
        """Raises InputError unless image [H,W,C] and label [H,W] are of one size."""
        if image.shape[:2] != label.shape:
            where = shown(self.mask(index) or Path("(in its annotations)"))
            raise InputError(
                f"image {shown(path_of(self.images[index]))} is {image.shape[:2]} and its mask "
                f"{where} {label.shape} (height, width): they must be equal"
            )

    def __getitem__(self, index: int) -> dict:
        image, label = self.image(index), self.label(index)
        self.check_size(index, image, label)
        example = {"image": image, "label": label, "name": self.images[index].stem}
        if self.soft:
            example["alpha"] = self.read_alpha(self.labels[index])
        if self.instances:
            example["instances"] = self.objects(index, label)
        return example

    def objects(self, index: int, label: np.ndarray) -> dict:
        """The instances, as `objects` makes them. Raises InputError where they cannot be read."""
        found = self.read_instances(self.labels[index])
        if found["masks"].shape[1:] != label.shape:
            raise InputError(
                f"the objects of image {shown(path_of(self.images[index]))} are masks of "
                f"{found['masks'].shape[1:]} and its label is {label.shape} (height, width): they "
                "must be equal"
            )
        return found

    def size(self, index: int) -> tuple[int, int]:
        """(height, width), from the header of the mask, or of the image where the mask is none."""
        mask = self.mask(index)
        picture = mask is not None and mask.suffix.lower() in IMAGE_SUFFIXES
        return image_size(mask, upright=False) if picture else image_size(self.images[index])

    def image_name(self, index: int) -> str:
        return self.images[index].stem


def absent(paths: Sequence[Path]) -> set[Path]:
    """Those that are not there. Each folder is listed once, which is quick for many files."""
    folders = {path.parent for path in paths}
    present = {f: set(os.listdir(f)) if f.is_dir() else set() for f in folders}
    return {path for path in paths if path.name not in present[path.parent]}


class SkipBad:
    """A source in which an example that cannot be read is replaced by the next that can.

    What replaces what depends on the files alone, so the stream of examples stays the same
    whatever reads it. Every process counts for itself: it names the first 20, and where more than
    0.1% of the examples are bad it stops with the InputError of the last.
    """

    NAMED, SHARE = 20, 0.001

    def __init__(self, source: Any):
        self.source, self.bad = source, {}
        self.classes, self.channels = source.classes, source.channels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        return self._first(index, self.source.__getitem__)

    def size(self, index: int) -> tuple[int, int]:
        return self._first(index, self.source.size)

    def _first(self, index: int, read: Callable[[int], Any]) -> Any:
        """What `read` gives of the first that can be read from `index` on."""
        while True:
            if index not in self.bad:
                try:
                    return read(index)
                except InputError as error:
                    self._count(index, error)
            index = (index + 1) % len(self)

    def _count(self, index: int, error: InputError) -> None:
        self.bad[index] = str(error)
        count, total = len(self.bad), len(self)
        if count > self.SHARE * total:
            raise InputError(
                f"{count} of {total} examples cannot be read, more than {self.SHARE:.1%}: mend "
                f"them before training (the verb check names all). The last: {error}"
            ) from error
        if count <= self.NAMED:
            logging.getLogger(__name__).warning("skipped bad example %d: %s", count, error)

    def summary(self) -> str:
        """How many examples this process skipped; "" for none."""
        count = len(self.bad)
        return f"{count} of {len(self)} examples cannot be read: skipped" if count else ""


class First:
    """The first `count` examples of a source, which is like it in all else."""

    def __init__(self, source: Any, count: int):
        self.source, self.count = source, min(count, len(source))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        return self.source[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


def part(items: Sequence[Any], split: str) -> list[Any]:
    """The share of a split where a data set has no splits of its own: val is every fifth item."""
    shares = {
        "all": items,
        "train": [item for i, item in enumerate(items) if i % 5 != 4],
        "val": items[4::5],
    }
    if split not in shares:
        raise InputError(
            f"no split {split!r}: it has no splits of its own, so train is four fifths, val "
            "every fifth, and all is both"
        )
    return list(shares[split])


class Shapes:
    """The embedded data set: scenes of `shapes.scene`, drawn when first asked for, then kept."""

    SPLITS = {"train": (0, 2048), "val": (1, 256), "test": (2, 256)}  # seed, number of scenes
    classes = Classes(shapes.CLASSES, shapes.PALETTE, tuple(range(1, len(shapes.CLASSES))))
    dtype = np.dtype(np.uint8)

    def __init__(self, split: str, channels: int = 3, instances: bool = False):
        if split not in self.SPLITS:
            raise InputError(f"no split {split!r} in shapes: it has {', '.join(self.SPLITS)}")
        if channels not in (1, 3):
            raise InputError(f"data.channels is {channels}: shapes has 1 (grey) or 3 (RGB)")
        self.seed, self.count = self.SPLITS[split]
        self.channels, self.instances, self.kept = channels, instances, {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        if index not in self.kept:
            scene = shapes.scene(self.seed, index)
            image, label = scene["image"], scene["label"]
            if self.channels == 1:
                image = np.asarray(Image.fromarray(image).convert("L"))[..., None]
            example = {"image": image, "label": label, "name": self.image_name(index)}
            if self.instances:
                alone = [False] * len(scene["classes"])
                found = objects(scene["masks"], scene["classes"], alone, label.shape)
                example["instances"] = found
            self.kept[index] = example  # whole: other threads read it
        return self.kept[index]

    def size(self, index: int) -> tuple[int, int]:
        return self[index]["label"].shape

    def image_name(self, index: int) -> str:
        return f"{index:05d}"
