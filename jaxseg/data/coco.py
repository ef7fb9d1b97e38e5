"""COCO: instances, panoptic segments, COCO-Stuff; and anyone's annotations in COCO's JSON.

Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014; Caesar et al., "COCO-Stuff:
Thing and Stuff Classes in Context", CVPR 2018; Kirillov et al., "Panoptic Segmentation", CVPR 2019.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxseg.data import rle
from jaxseg.data.colours import IGNORE, Classes, voc_palette
from jaxseg.data.files import find_images, read_label, read_packed, shown, translate
from jaxseg.data.sources import Listing, objects, part
from jaxseg.data.tables import Table, check_names
from jaxseg.data.voc import below
from jaxseg.errors import InputError

YEARS = ("2017", "2014", "")
IDS = {"images": ("id",), "categories": ("id",), "annotations": ("image_id", "category_id")}


class Shape(NamedTuple):
    """One annotation."""

    id: int  # 0..K-1
    segmentation: Any
    crowd: bool
    area: float | None  # pixels; None: the annotation does not say
    box: list[float] | None  # x, y, width, height, pixels


class Annotated(NamedTuple):
    """The annotations of one image."""

    file: Path  # where they stand
    image: str
    size: tuple[int, int]  # height, width
    shapes: list[Shape]


def read_json(path: Path) -> dict:
    """Raises InputError where the file is not COCO's JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        for key, fields in IDS.items():
            if not all(isinstance(entry, dict) for entry in content[key]):
                raise TypeError(f"{key} must be a list of objects")
            for field in fields:
                kinds = {type(entry[field]) for entry in content[key] if field in entry}
                if not (kinds <= {int, float} or kinds == {str}):
                    raise TypeError(f"each {field} of {key} must be a number, or each a text")
        _ = [(category["id"], category["name"]) for category in content["categories"]]
        return content
    except OSError as error:
        raise InputError(f"cannot read {shown(path)}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{shown(path)} is not COCO's JSON: {error!r}") from error


def coco(root: Path, split: str, table: Table) -> Listing:
    """COCO as its archives unpack
    coco/annotations/instances_{train,val}2017.json
    coco/train2017/*.jpg        (or coco/images/train2017/*.jpg)
    coco/val2017/*.jpg"""
    file, folder = _parts(root, split, "annotations/instances_{}.json", coco.__doc__)
    content = read_json(file)
    unknown = {entry.get("category_id") for entry in content["annotations"]} - {*table.ids, None}
    if unknown:
        raise InputError(
            f"{shown(file)} has objects of category {min(unknown)}, which is none of COCO's: where "
            f"the categories are your own, the data set is coco_json:{root}"
        )
    return _instances(file, content, folder, table)


def coco_voc(root: Path, split: str, table: Table) -> Listing:
    """COCO, of whose objects those of Pascal VOC's classes are drawn, as its archives unpack
    coco_voc/annotations/instances_{train,val}2017.json
    coco_voc/train2017/*.jpg        (or coco_voc/images/train2017/*.jpg)
    coco_voc/val2017/*.jpg"""
    file, folder = _parts(root, split, "annotations/instances_{}.json", coco_voc.__doc__)
    return _instances(file, read_json(file), folder, table)


def _parts(root: Path, split: str, pattern: str, tree: str) -> tuple[Path, Path]:
    """(annotations, folder of images) of a split, with or without a year in its name."""
    for name in (split + year for year in YEARS):
        if (root / pattern.format(name)).exists():
            return root / pattern.format(name), below(root, name, f"images/{name}")
    raise InputError(f"no {root / pattern.format(split + YEARS[0])}.\n{tree}")


def _instances(
    file: Path, content: dict, folder: Path, table: Table, split: str | None = None
) -> Listing:
    """The images that a JSON file has; those without objects of the table are background."""
    shapes: dict[Any, list] = {}
    try:
        for entry in content["annotations"]:
            if entry["category_id"] in table.ids:
                shape = Shape(
                    table.ids[entry["category_id"]],
                    entry["segmentation"],
                    bool(entry.get("iscrowd", False)),
                    entry.get("area"),
                    entry.get("bbox"),
                )
                shapes.setdefault(entry["image_id"], []).append(shape)
        entries = sorted(content["images"], key=lambda entry: entry["id"])
        entries = part(entries, split) if split else entries
        labels = [
            Annotated(file, e["file_name"], (e["height"], e["width"]), shapes.get(e["id"], []))
            for e in entries
        ]
    except KeyError as error:
        raise InputError(f"{shown(file)}: an image or annotation lacks {error}") from error
    images = [folder / label.image for label in labels]
    return Listing(images, labels, _drawn, _instances_of)


def _masks(label: Annotated) -> list[np.ndarray]:
    try:
        return [rle.decode(shape.segmentation, label.size) for shape in label.shapes]
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise InputError(
            f"cannot read the segmentation of an object of {label.image} in {shown(label.file)}: "
            f"{error}"
        ) from error


def _drawn(label: Annotated) -> np.ndarray:
    """uint8 [H,W]. Pixels of two objects are ignored: COCO does not say which one is in front.

    So does torchvision's reference, whose published weights are scored on such labels.
    """
    drawn = np.zeros(label.size, np.uint8)
    count = np.zeros(label.size, np.uint16)
    for shape, mask in zip(label.shapes, _masks(label), strict=True):
        drawn[mask] = shape.id
        count += mask
    drawn[count > 1] = IGNORE
    return drawn


def _instances_of(label: Annotated) -> dict:
    shapes = label.shapes
    found = objects(_masks(label), [s.id for s in shapes], [s.crowd for s in shapes], label.size)
    count = len(shapes)
    try:  # None becomes NaN
        areas = np.array([s.area for s in shapes], np.float64).reshape(count)
        boxes = np.array([s.box or [None] * 4 for s in shapes], np.float64).reshape(count, 4)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(
            f"the area or bbox of an object of {label.image} in {shown(label.file)} is no number, "
            f"or not four: {error}. Leave them out where they are not known"
        ) from error
    x, y, width, height = boxes.T
    return {**found, "areas": areas, "boxes": np.stack([y, x, y + height, x + width], axis=1)}


def coco_json(root: Path, split: str, table: Table) -> Listing:
    """Annotations in COCO's JSON, as most tools export them
    NAME/annotations/instances_{train,val}.json       (also with a year), images in NAME/train; or
    NAME/{train,val}/_annotations.coco.json           images beside it; or
    NAME/annotations.json                             images in NAME or NAME/images; every fifth
                                                      is val, the rest train"""
    file, folder = _own_json(root, split)
    single, content = split if file == root / "annotations.json" else None, read_json(file)
    _check_categories(file, content, table)
    return _instances(file, content, folder, table, single)


def _check_categories(file: Path, content: dict, table: Table) -> None:
    """Raises InputError unless all categories of a file mean what they mean in the table."""
    entries = content["annotations"]
    names: dict = {entry["category_id"]: None for entry in entries if "category_id" in entry}
    names |= {c["id"]: str(c["name"]) for c in content["categories"]}
    for number, name in names.items():
        known = table.classes.names[table.ids[number]] if number in table.ids else None
        if name is None or name != known:
            raise InputError(
                f"category {number} is {name!r} in {shown(file)} and {known!r} in the file of the "
                "split train: all need one list of categories. Export them together"
            )


def _own_json(root: Path, split: str) -> tuple[Path, Path]:
    beside = root / split / "_annotations.coco.json"
    if beside.is_file():
        return beside, beside.parent
    if (root / "annotations.json").is_file():
        return root / "annotations.json", below(root, "images")
    return _parts(root, split, "annotations/instances_{}.json", coco_json.__doc__)


def json_splits(root: Path) -> list[str]:
    """The splits whose JSON file is there, without a year; of annotations.json train and val."""
    found = {path.parent.name for path in root.glob("*/_annotations.coco.json")}
    if (root / "annotations.json").is_file():
        found |= {"train", "val"}
    else:
        named = re.compile(rf"instances_(.+?)({'|'.join(YEARS)})\.json")
        files = [named.fullmatch(path.name) for path in root.glob("annotations/*.json")]
        found |= {match[1] for match in files if match}
    return sorted(found) or ["train", "val"]


def json_table(root: Path) -> Table:
    """The table of a JSON's categories: by id, after the background unless they have it."""
    categories = sorted(read_json(_own_json(root, "train")[0])["categories"], key=lambda c: c["id"])
    names = [str(category["name"]) for category in categories]
    first = 0 if names and names[0].strip("_").lower() == "background" else 1
    names = ["background"] * first + names
    check_names(root, names, voc_palette(len(names)))
    ids = {category["id"]: i for i, category in enumerate(categories, start=first)}
    classes = Classes(tuple(names), voc_palette(len(names)), tuple(range(1, len(names))))
    return Table(classes, ids)


def coco_stuff(root: Path, split: str, table: Table) -> Listing:
    """COCO-Stuff 164k: the images of COCO and stuffthingmaps_trainval2017.zip
    coco_stuff/images/{train,val}2017/*.jpg         (or coco_stuff/{train,val}2017/*.jpg)
    coco_stuff/annotations/{train,val}2017/*.png    value = category - 1, 255 = unlabelled
        (or coco_stuff/stuffthingmaps/{train,val}2017/*.png)"""
    folders = ("annotations", "stuffthingmaps")  # the first may hold COCO's JSON files alone
    there = [f for f in folders for year in YEARS if (root / f / (split + year)).is_dir()]
    maps = there[0] if there else folders[0]
    masks, folder = _parts(root, split, f"{maps}/{{}}", coco_stuff.__doc__)
    labels = [path for path in find_images(masks) if path.stem.isdigit()]
    images = [folder / f"{path.stem}.jpg" for path in labels]
    return Listing(images, labels, partial(read_label, ids=table.ids))


class Segmented(NamedTuple):
    """A panoptic label: a picture of segment numbers, and what they are."""

    path: Path
    segments: dict[int, tuple[int, bool]]  # number -> id 0..K-1 or 255, crowd


def coco_panoptic(root: Path, split: str, table: Table) -> Listing:
    """COCO panoptic as its archives unpack
    coco_panoptic/annotations/panoptic_{train,val}2017.json
    coco_panoptic/annotations/panoptic_{train,val}2017/*.png    R + 256 G + 65536 B = segment
    coco_panoptic/{train,val}2017/*.jpg"""
    file, folder = _parts(root, split, "annotations/panoptic_{}.json", coco_panoptic.__doc__)
    return panoptic(file, lambda entry: folder / f"{Path(entry['file_name']).stem}.jpg", table)


def panoptic(file: Path, image_of: Callable[[dict], Path], table: Table) -> Listing:
    """A panoptic JSON with the folder of PNGs of the same name beside it.

    Raises InputError where it is none, and for a category that the table lacks.
    """
    images, labels = [], []
    try:
        for entry in json.loads(file.read_text())["annotations"]:
            segments = {}
            for segment in entry["segments_info"]:
                category, crowd = segment["category_id"], bool(segment["iscrowd"])
                if category not in table.ids:
                    raise InputError(
                        f"{shown(file)} has a segment of category {category} in "
                        f"{entry['file_name']}, which is none of the data set's "
                        f"{len(table.ids)}: give it one of theirs, or leave the segment out"
                    )
                segments[segment["id"]] = (table.ids[category], crowd)
            images.append(image_of(entry))
            labels.append(Segmented(file.with_suffix("") / entry["file_name"], segments))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{shown(file)} is not COCO's panoptic JSON: {error!r}") from error
    things = frozenset(table.classes.things)
    return Listing(images, labels, _panoptic_label, partial(_panoptic_objects, things=things))


def read_segments(path: Path) -> np.ndarray:
    """int32 [H,W]: the segment numbers in a panoptic PNG, 0 = none."""
    packed = read_packed(path)
    return (packed >> 16) | (packed & 0xFF00) | (packed & 255) << 16


def _panoptic_label(label: Segmented) -> np.ndarray:
    ids = {0: IGNORE} | {number: i for number, (i, _) in label.segments.items()}
    return translate(read_segments(label.path), ids, label.path)


def _panoptic_objects(label: Segmented, things: frozenset[int]) -> dict:
    numbers = read_segments(label.path)
    found = [(n, i, crowd) for n, (i, crowd) in label.segments.items() if i in things]
    masks = [numbers == n for n, _, _ in found]
    return objects(masks, [i for _, i, _ in found], [c for *_, c in found], numbers.shape)
