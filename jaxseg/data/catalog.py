"""Data sets by name: where they are, what their classes mean, and a reader for a split.

A data set is named by one of
    shapes                 the embedded one
    NAME                   a data set of LAYOUTS, in the folder NAME under `root` or $JAXSEG_DATA
    FOLDER                 a plain folder with classes.json, by its path or its name there
    tfds:NAME              a data set of TensorFlow Datasets in ArrayRecord files, see `records`
    LAYOUT:FOLDER          any of LAYOUTS at any place, such as voc2012:/data/VOCdevkit/VOC2012,
                           labelme:annotated, cvat:export, colours:masks, coco_json:export,
                           list:pairs.csv (a file)
Each FOLDER may be an archive, such as my_photos.zip or voc2012:VOCtrainval_11-May-2012.tar: it is
unpacked beside itself, once. The function of a layout says in its docstring which tree it expects.
A data set of LAYOUTS may also lie in the plain form, with classes.json.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from jaxseg.data import (
    archives,
    cityscapes,
    coco,
    colours,
    files,
    labelme,
    own,
    records,
    scenes,
    tables,
    voc,
)
from jaxseg.data.colours import Classes
from jaxseg.data.sources import Files, Listing, Shapes
from jaxseg.data.tables import Table
from jaxseg.data.tables import read_classes as read_classes  # what else knows a data set's classes
from jaxseg.data.tables import write_classes as write_classes
from jaxseg.errors import InputError, unknown


class Layout(NamedTuple):
    """How a data set lies on the disk."""

    listing: Callable[[Path, str, Table], Listing]
    table: str | Callable[[Path], Table]  # labels/TABLE.csv, or a function of the folder
    splits: tuple[str, ...] | Callable[[Path], list[str]] = ("train", "val")


def _json_table(root: Path) -> Table:
    folder = root if root.is_dir() else root.parent
    return tables.read_json(folder / "classes.json", own.TREE)


TESTED = ("train", "val", "test")
LAYOUTS = {
    "ade20k": Layout(scenes.ade20k, "ade20k"),
    "camvid": Layout(scenes.camvid, "camvid", TESTED),
    "camvid32": Layout(scenes.camvid32, "camvid32", TESTED),
    "cityscapes": Layout(cityscapes.cityscapes, "cityscapes"),
    "cityscapes_panoptic": Layout(cityscapes.cityscapes_panoptic, "cityscapes"),
    "coco": Layout(coco.coco, "coco"),
    "coco_voc": Layout(coco.coco_voc, "coco_voc"),  # VOC's classes alone: torchvision's labels
    "coco_panoptic": Layout(coco.coco_panoptic, "coco_panoptic"),
    "coco_stuff": Layout(coco.coco_stuff, "coco_stuff"),
    "isbi2012": Layout(scenes.isbi2012, "isbi2012"),
    "kitti": Layout(cityscapes.kitti, "cityscapes"),
    "nuclei": Layout(scenes.nuclei, "nuclei"),
    "pascal_context": Layout(voc.pascal_context, "pascal_context"),  # 59 classes
    "pascal_context60": Layout(voc.pascal_context, "pascal_context60"),  # and the background
    "pets": Layout(scenes.pets, "pets", ("train", "val", "test")),
    "sunrgbd": Layout(scenes.sunrgbd, "sunrgbd"),
    "voc2012": Layout(voc.voc2012, "voc2012"),
}
OWN = {
    "coco_json": Layout(coco.coco_json, coco.json_table, coco.json_splits),
    "colours": Layout(own.colours, _json_table, own.splits),
    "cvat": Layout(voc.cvat, voc.cvat_table, voc.cvat_splits),
    "labelme": Layout(labelme.labelme, labelme.labelme_table, labelme.labelme_splits),
    "list": Layout(own.listed, _json_table, own.listed_splits),
}
FOLDER = Layout(own.folder, _json_table, own.splits)
TFDS = "tfds:"


def resolve(dataset: str, root: str = "") -> tuple[Layout, Path]:
    """The layout of a data set, and its place.

    Raises InputError for an unknown layout, and, with the tree that is needed, for no data set.
    """
    prefix, colon, place = dataset.partition(":")
    if colon and len(prefix) > 1:  # one letter is a drive
        layouts = {**LAYOUTS, **OWN}
        if prefix not in layouts:
            raise unknown("layout of a data set", prefix, layouts)
        return layouts[prefix], locate(place, root, layouts[prefix].listing.__doc__)
    layout = LAYOUTS.get(dataset, FOLDER)
    place = locate(dataset, root, layout.listing.__doc__)
    if place.is_file():
        raise InputError(f"{place} is a file: a list of images is named list:{dataset}")
    return FOLDER if (place / "classes.json").is_file() else layout, place


def table(dataset: str, root: str = "") -> Table:
    """What the values in the label files of a data set mean."""
    layout, place = resolve(dataset, root)
    return tables.read_csv(layout.table) if isinstance(layout.table, str) else layout.table(place)


def classes(dataset: str, root: str = "") -> Classes:
    """The class table: of a known name, or of the data set's own files."""
    if dataset == "shapes":
        return Shapes.classes
    if dataset in LAYOUTS:
        return tables.read_csv(LAYOUTS[dataset].table).classes
    if dataset.startswith(TFDS):
        return records.classes(dataset.removeprefix(TFDS), root)
    return table(dataset, root).classes


def locate(dataset: str, root: str = "", tree: str | None = own.TREE) -> Path:
    """The place of a data set: its path, or its name under `root` or $JAXSEG_DATA.

    Raises InputError, with the tree that is needed, where there is none.
    """
    base = root or os.environ.get("JAXSEG_DATA", "")
    places = [Path(dataset).expanduser()] + ([Path(base).expanduser() / dataset] if base else [])
    for place in places:
        if archives.is_archive(place):
            return _unpacked(place)
        if place.exists():
            return place
    tried = " or ".join(str(p.absolute()) for p in places)
    where = "" if base else " Set JAXSEG_DATA to the folder that holds your data sets."
    raise InputError(f'data set "{dataset}" not found at {tried}.{where}\n{tree}')


def _unpacked(archive: Path) -> Path:
    """The folder that an archive is unpacked into; or the plain data set that is all of it."""
    folder = archives.unpack(archive, archives.folder_of(archive))
    inside = [path for path in folder.iterdir() if not path.name.startswith(".")]
    plain = len(inside) == 1 and (inside[0] / "classes.json").is_file()
    return inside[0] if plain else folder


def splits(dataset: str, root: str = "") -> list[str]:
    """The splits of a data set, train first: of one's own all that it has, of LAYOUTS those that
    share no image (`open_split` also knows voc2012's trainval and trainaug)."""
    if dataset == "shapes":
        return list(Shapes.SPLITS)
    if dataset.startswith(TFDS):
        return records.splits(dataset.removeprefix(TFDS), root)
    layout, place = resolve(dataset, root)
    found = layout.splits(place) if callable(layout.splits) else layout.splits
    return sorted(found, key=lambda split: split != "train")


def open_split(
    dataset: str,
    split: str,
    root: str = "",
    channels: int = 3,
    instances: bool = False,
    complete: bool = True,
) -> Files | Shapes | records.Records:
    """The reader of one split; `instances` also reads its objects.

    Raises InputError where the data set cannot be used, and where `complete` and files are missing.
    """
    if dataset == "shapes":
        return Shapes(split, channels, instances)
    if dataset.startswith(TFDS):
        return records.Records(dataset.removeprefix(TFDS), split, root, channels, instances)
    layout, place = resolve(dataset, root)
    found = table(dataset, root)
    if dataset in LAYOUTS and found.classes.names != classes(dataset).names:
        raise InputError(
            f"{place / 'classes.json'} names {len(found.classes)} classes {found.classes.names}, "
            f"but {dataset} has {len(classes(dataset))}: {classes(dataset).names}. "
            "Give your own data set another folder name."
        )
    listing = layout.listing(place, split, found)
    return Files(listing, found.classes, channels, instances, complete)


def file_ids(dataset: str, root: str = "") -> dict[int, int]:
    """Class id -> what the data set's own files call it, such as COCO's category ids."""
    own = dataset != "shapes" and not dataset.startswith(TFDS)
    same = {i: i for i in range(len(classes(dataset, root)))}
    return same | (tables.file_ids(table(dataset, root)) if own else {})


def to_submission_ids(label: np.ndarray, dataset: str) -> np.ndarray:
    """Ids [H,W] 0..K-1 -> the values that the data set's own files and its server use."""
    return tables.to_values(label, benchmark(dataset))


def benchmark(dataset: str) -> Table:
    """The table of NAME or NAME:FOLDER. Raises InputError where its values are nobody else's."""
    name = dataset.partition(":")[0]
    if name not in LAYOUTS:
        raise unknown("data set with a server", name, LAYOUTS)
    return tables.read_csv(LAYOUTS[name].table)


def write_submission(folder: Path, dataset: str) -> Path:
    """Writes FOLDER/submission/NAME.png for each label FOLDER/NAME.png that jaxseg predicted, with
    the values that the server of the data set expects; returns that folder."""
    target = folder / "submission"
    for path in sorted(folder.rglob("*.png")):
        # Overlays and legends have no note.
        if target not in path.parents and colours.read_note(path):
            with files.replacing(target / path.relative_to(folder)) as written:
                values = to_submission_ids(files.read_values(path), dataset)
                Image.fromarray(values).save(written, format="PNG")
    return target
