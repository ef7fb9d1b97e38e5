"""Random-access readers: `source[i]` is one example, read and checked.

An example is a dict: `image` [H,W,C] uint8 (float32 in 0..255 where the file has 16 bits), `label`
uint8 [H,W] with ids 0..K-1 or 255 = ignore, `name`; from a source opened with instances=True also
`instances`, see `objects`. A source has `classes`, `channels`, `len()`, `source[i]` and `size(i)`
(height, width, cheaply).

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
from jaxseg.data.files import IMAGE_SUFFIXES, Page, image_size, path_of, read_image, shown
from jaxseg.errors import InputError


class Listing(NamedTuple):
    """One split, as the layout of its data set found it: label i belongs to image i."""

    images: list[Path | Page]
    labels: list[Any]  # mostly paths; what the functions below read
    label: Callable[[Any], np.ndarray]  # -> uint8 [H,W] of ids
    instances: Callable[[Any], dict] | None = None  # -> see `objects`; None: has none


def objects(
    masks: Sequence[np.ndarray],
    classes: Sequence[int],
    crowd: Sequence[bool],
    size: tuple[int, int],
) -> dict[str, np.ndarray]:
    """The n objects of an example; they may overlap.

    masks: uint8 [n,H,W]. classes: int32 [n], ids as in the label. crowd: bool [n], true for a
    region of many that are not told apart.
    """
    stack = np.array(masks, np.uint8).reshape(len(masks), *size)
    return {"masks": stack, "classes": np.array(classes, np.int32), "crowd": np.array(crowd, bool)}


def numbered_objects(numbers: np.ndarray, label: np.ndarray, none: Sequence[int] = (0,)) -> dict:
    """Objects [H,W] by number, except `none`; each has the class of most of its label's pixels."""
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
        self.images, self.labels, self.read_label, self.read_instances = listing
        self.classes, self.channels, self.instances = classes, channels, instances
        if not self.images:
            raise InputError(f"no images: needs files ending in {', '.join(IMAGE_SUFFIXES)}")
        if instances and self.read_instances is None:
            raise InputError("this data set does not tell objects apart: it trains no instances")
        if complete:
            self._complete()

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
        return read_image(self.images[index], self.channels)

    def label(self, index: int) -> np.ndarray:
        return self.read_label(self.labels[index])

    def __getitem__(self, index: int) -> dict:
        image, label = self.image(index), self.label(index)
        if image.shape[:2] != label.shape:
            where = shown(self.mask(index) or Path("(in its annotations)"))
            raise InputError(
                f"image {shown(path_of(self.images[index]))} is {image.shape[:2]} and its mask "
                f"{where} {label.shape} (height, width): they must be equal"
            )
        example = {"image": image, "label": label, "name": self.images[index].stem}
        if self.instances:
            example["instances"] = self.read_instances(self.labels[index])
        return example

    def size(self, index: int) -> tuple[int, int]:
        """(height, width), from the header of the mask, or of the image where the mask is none."""
        mask = self.mask(index)
        picture = mask is not None and mask.suffix.lower() in IMAGE_SUFFIXES
        return image_size(mask if picture else self.images[index])


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
        self.classes, self.channels, self.size = source.classes, source.channels, source.size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        while True:
            if index not in self.bad:
                try:
                    return self.source[index]
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
            self.kept[index] = {"image": image, "label": label, "name": f"{index:05d}"}
            if self.instances:
                alone = [False] * len(scene["classes"])
                self.kept[index]["instances"] = objects(
                    scene["masks"], scene["classes"], alone, label.shape
                )
        return self.kept[index]

    def size(self, index: int) -> tuple[int, int]:
        return self[index]["label"].shape
