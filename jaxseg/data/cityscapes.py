"""Cityscapes and what shares its labels, KITTI semantics.

Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016; Alhaija
et al., "Augmented Reality Meets Computer Vision", IJCV 2018 (KITTI). Files hold ids, networks learn
the 19 train ids, servers want ids: `catalog.to_submission_ids`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxseg.data.coco import panoptic
from jaxseg.data.files import find_images, read_label, read_values, translate
from jaxseg.data.sources import Listing, objects, part
from jaxseg.data.tables import Table
from jaxseg.errors import InputError

KINDS = ("labelIds", "labelTrainIds", "instanceIds")  # the first that is there is read


def cityscapes(root: Path, split: str, table: Table) -> Listing:
    """Cityscapes as its archives leftImg8bit_trainvaltest and gtFine_trainvaltest unpack
    cityscapes/leftImg8bit/{train,val,test}/CITY/*_leftImg8bit.png
    cityscapes/gtFine/{train,val,test}/CITY/*_gtFine_labelIds.png      (or labelTrainIds)
    cityscapes/gtFine/{train,val,test}/CITY/*_gtFine_instanceIds.png   (enough alone)"""
    folder = root / "leftImg8bit" / split
    images = sorted(folder.glob("*/*_leftImg8bit.png"))
    if not images:
        raise InputError(f"no images in {folder}.\n{cityscapes.__doc__}")

    def labels(kind: str) -> list[Path]:
        names = (path.name.replace("leftImg8bit", f"gtFine_{kind}") for path in images)
        truth = root / "gtFine" / split
        return [truth / path.parent.name / n for path, n in zip(images, names, strict=True)]

    kind = next((kind for kind in KINDS if labels(kind)[0].is_file()), KINDS[0])
    label = partial(read_label, ids=table.ids)
    if kind == "labelTrainIds":
        label = partial(read_label, ids={i: i for i in table.ids.values()})
    if kind == "instanceIds":
        label = partial(_label, ids=table.ids, parts=_city_parts)
    instances = partial(_things, table=table, parts=_city_parts, place=_city_place)
    return Listing(images, labels(kind), label, instances, pattern=f"*_gtFine_{kind}.png")


def _city_parts(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids, numbers of objects) in instanceIds: 1000 * id + number, or the id of a group alone."""
    group = values < 1000
    return np.where(group, values, values // 1000), np.where(group, 0, values % 1000 + 1)


def _city_place(label: Path) -> Path:
    return label.with_name(f"{label.name.rpartition('_')[0]}_instanceIds.png")


def cityscapes_panoptic(root: Path, split: str, table: Table) -> Listing:
    """Cityscapes' panoptic labels, as csCreatePanopticImgs of its scripts writes them
    cityscapes_panoptic/leftImg8bit/{train,val}/CITY/*_leftImg8bit.png
    cityscapes_panoptic/gtFine/cityscapes_panoptic_{train,val}.json
    cityscapes_panoptic/gtFine/cityscapes_panoptic_{train,val}/*.png"""
    file = root / f"gtFine/cityscapes_panoptic_{split}.json"
    if not file.is_file():
        raise InputError(f"no {file}.\n{cityscapes_panoptic.__doc__}")

    def image_of(entry: dict[str, Any]) -> Path:
        frame = entry["image_id"]
        city = frame.split("_")[0]
        return root / "leftImg8bit" / split / city / f"{frame}_leftImg8bit.png"

    return panoptic(file, image_of, table)


def kitti(root: Path, split: str, table: Table) -> Listing:
    """KITTI semantics as data_semantics.zip unpacks; every fifth image is val, the rest train
    kitti/training/image_2/*.png
    kitti/training/semantic/*.png        ids of Cityscapes
    kitti/training/instance/*.png        256 * id + number of the object   (enough alone)"""
    folder = root / "training/image_2"
    if not folder.is_dir():
        raise InputError(f"no {folder}.\n{kitti.__doc__}")
    images = part(find_images(folder), split)
    truth, label = root / "training/semantic", partial(read_label, ids=table.ids)
    if not truth.is_dir():
        truth = root / "training/instance"
        label = partial(_label, ids=table.ids, parts=_kitti_parts)
    instances = partial(_things, table=table, parts=_kitti_parts, place=_kitti_place)
    masks = [truth / path.name for path in images]
    return Listing(images, masks, label, instances, pattern="*.png")


def _kitti_parts(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids, numbers of objects): 256 * id + number, where number 0 is a group."""
    return values // 256, values % 256


def _kitti_place(label: Path) -> Path:
    return label.parent.parent / "instance" / label.name


def _label(path: Path, ids: dict[int, int], parts: Callable) -> np.ndarray:
    return translate(parts(read_values(path).astype(np.int32))[0], ids, path)


def _things(path: Path, table: Table, parts: Callable, place: Callable) -> dict:
    """The objects of the classes that have some; a group of them is a crowd."""
    values = read_values(place(path)).astype(np.int32)
    found = np.unique(values)
    raw, numbers = parts(found)
    classes = translate(raw, table.ids, place(path))
    keep = np.isin(classes, table.classes.things)
    masks = [values == value for value in found[keep]]
    return objects(masks, classes[keep], numbers[keep] == 0, values.shape)
