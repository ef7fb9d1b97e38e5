"""Data sets of one's own: plain folders, masks of colours, lists of files.

Here and in the other layout files, a function takes the place of a data set, a split and the label
table, and lists the split; its docstring is the tree that it expects, as a user is shown it.
"""

import csv
from functools import partial
from pathlib import Path

import numpy as np

from jaxseg.data.files import (
    find_images,
    open_image,
    read_colours,
    read_image,
    read_label,
    read_values,
    shown,
)
from jaxseg.data.sources import Listing, numbered_objects, part
from jaxseg.data.tables import Table
from jaxseg.errors import InputError


def folder(root: Path, split: str, table: Table, colours: bool = False) -> Listing:
    """A data set is a folder
    NAME/classes.json             {"names": ["sky", "road", ...]}, and "palette" if you like
    NAME/train/images/*.jpg
    NAME/train/masks/*.png        named like the images; pixel = class id, 255 = ignore
    NAME/train/instances/*.png    if objects are told apart: pixel = number of the object, 0 = none
    NAME/train/alphas/*.png       instead of masks, for two classes: grey, 0 = the first, white =
                                  the second, and between them both
    NAME/val/images/*.jpg
    NAME/val/masks/*.png"""
    images, masks = root / split / "images", root / split / "masks"
    soft = root / split / "alphas"
    if soft.is_dir() and not colours:
        masks = soft
    if images.is_dir() and not masks.is_dir():
        raise InputError(
            f"split {split!r} of {root} has images but no masks: it can be neither trained on nor "
            f"scored; label it with predict --input {images}"
        )
    if not images.is_dir() or not masks.is_dir():
        raise InputError(f"no split {split!r} in {root}: found {splits(root) or 'none'}.\n{TREE}")
    found = find_images(images)
    if not found:
        raise InputError(f"no images in {images}: needs files such as NAME.jpg or NAME.png")
    by_stem = {path.stem: path for path in find_images(masks)}
    labels = [by_stem.get(path.stem, masks / f"{path.stem}.png") for path in found]
    for one, other in zip(found, found[1:], strict=False):
        if one.stem == other.stem:
            raise InputError(f"{shown(one)} and {shown(other)} have one name: rename one of them")
    if masks == soft:
        if len(table.classes) != 2:
            raise InputError(
                f"{soft} holds soft masks, and there are {len(table.classes)} classes: needs two, "
                "the background and what is opaque"
            )
        return Listing(found, labels, _opaque, alpha=read_alpha, pattern="*")
    if table.instance_maps:
        return Listing(found, labels, _foreground, _numbered_foreground, pattern="*")
    if colours:
        label = partial(read_colours, ids=table.colours)
    else:
        label = partial(read_label, ids=table.ids)
    numbers = root / split / "instances"
    instances = partial(_paired, folder=numbers, label=label) if numbers.is_dir() else None
    return Listing(found, labels, label, instances, pattern="*")


TREE = folder.__doc__


def splits(root: Path) -> list[str]:
    """The splits of a plain folder: those of its folders that have images/."""
    return sorted(path.parent.name for path in root.glob("*/images") if path.is_dir())


def read_alpha(path: Path) -> np.ndarray:
    """float32 [H,W], 0..1: how much of each pixel is the second class, of grey of 8 or 16 bits."""
    mode = open_image(path, decode=False).mode
    if mode not in ("1", "L", "I") and not mode.startswith("I;16"):
        raise InputError(
            f"{shown(path)} is a picture of mode {mode}: a soft mask is grey. Where it has "
            "a channel of opacity, export that one alone"
        )
    return read_image(path, 1)[..., 0] / np.float32(255)


def _opaque(path: Path) -> np.ndarray:
    return (read_alpha(path) >= 0.5).astype(np.uint8)


def _foreground(path: Path) -> np.ndarray:
    return (read_values(path) > 0).astype(np.uint8)


def _numbered_foreground(path: Path) -> dict:
    numbers = read_values(path)
    return numbered_objects(numbers, (numbers > 0).astype(np.uint8))


def _paired(path: Path, folder: Path, label: partial) -> dict:
    place = folder / f"{path.stem}.png"
    return numbered_objects(read_values(place), label(path), path=place)


def colours(root: Path, split: str, table: Table) -> Listing:
    """A data set with masks of colours is a folder
    NAME/classes.json             {"names": ["sky", "road"], "palette": [[70, 130, 180], ...],
                                  "ignore": [[0, 0, 0]]}: every colour that the masks hold
    NAME/train/images/*.jpg
    NAME/train/masks/*.png        RGB, named like the images
    NAME/val/images/*.jpg
    NAME/val/masks/*.png"""
    return folder(root, split, table, colours=True)


def listed(root: Path, split: str, table: Table) -> Listing:
    """A list of images and masks is a file of comma-separated values with a first line that says
    image,mask,split
    photos/a.jpg,masks/a.png,train
    photos/b.jpg,masks/b.png,val
    with paths as seen from the file's own folder, which also holds classes.json. Without the
    column `split`, every fifth line is val and the others are train."""
    rows = _rows(root)
    if "split" in rows[0]:
        rows = [row for row in rows if row["split"] == split]
        if not rows:
            raise InputError(f"no split {split!r} in {root}: found {listed_splits(root)}")
    else:
        rows = part(rows, split)
    images, labels = ([root.parent / row[key] for row in rows] for key in ("image", "mask"))
    return Listing(images, labels, partial(read_label, ids=table.ids))


def listed_splits(root: Path) -> list[str]:
    """The splits of a list: those of its column `split`, else train and val."""
    rows = _rows(root)
    named = sorted({row["split"] for row in rows if row.get("split")})
    return named if "split" in rows[0] else ["train", "val"]


def _rows(root: Path) -> list[dict[str, str]]:
    """The lines of a list. Raises InputError where it is none."""
    if not root.is_file():
        raise InputError(f"{root} is no file.\n{listed.__doc__}")
    try:
        with root.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeError, csv.Error) as error:
        raise InputError(
            f"cannot read {root}: {error}. Needs comma-separated values in UTF-8"
        ) from error
    if not rows or not {"image", "mask"} <= rows[0].keys():
        raise InputError(f"{root} has no lines with image and mask.\n{listed.__doc__}")
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise InputError(
                f"line {number} of {root} has another number of values than the first line, "
                f"{len(rows[0]) - (None in rows[0])}: each has one of every column"
            )
    return rows
