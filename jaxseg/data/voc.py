"""Pascal VOC 2012 with SBD's extra labels, Pascal Context, and CVAT's masks: one tree, three uses.

Everingham et al., "The Pascal Visual Object Classes Challenge", IJCV 2010; Hariharan et al.,
"Semantic Contours from Inverse Detectors", ICCV 2011 (SBD); Mottaghi et al., "The Role of Context
for Object Detection and Semantic Segmentation in the Wild", CVPR 2014.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxseg.data.colours import IGNORE, Classes
from jaxseg.data.files import (
    find_images,
    open_mask,
    read_colours,
    read_label,
    read_packed,
    read_values,
    shown,
    translate,
)
from jaxseg.data.sources import Listing, numbered_objects, objects, part
from jaxseg.data.tables import Table, check_names, read_csv
from jaxseg.errors import InputError


def below(root: Path, *names: str) -> Path:
    """The first of these folders that is in `root`; `root` itself where none is."""
    return next((root / name for name in names if (root / name).is_dir()), root)


def read_list(path: Path, tree: str | None) -> list[str]:
    """The first word of every line. Raises InputError, with the tree, where there is no file."""
    if not path.is_file():
        raise InputError(f"no {path}.\n{tree}")
    return [line.split()[0] for line in path.read_text().splitlines() if line.strip()]


def read_mat(path: Path, key: str) -> Any:
    """A variable of a Matlab file."""
    from scipy.io import loadmat  # takes a moment to import, and few data sets need it

    try:
        return loadmat(path)[key]
    except FileNotFoundError:
        raise InputError(f"no label {shown(path)}") from None
    except Exception as error:  # scipy raises many kinds for broken files
        raise InputError(f"cannot read {key} in {shown(path)}: {error}") from error


def voc2012(root: Path, split: str, table: Table) -> Listing:
    """Pascal VOC 2012 as its archive unpacks, and SBD (benchmark.tgz) beside it for trainaug
    voc2012/VOCdevkit/VOC2012/JPEGImages/*.jpg
    voc2012/VOCdevkit/VOC2012/SegmentationClass/*.png       palette, 255 = border
    voc2012/VOCdevkit/VOC2012/SegmentationObject/*.png
    voc2012/VOCdevkit/VOC2012/ImageSets/Segmentation/{train,val,trainval}.txt
    voc2012/benchmark_RELEASE/dataset/{img,cls,inst}        trainaug: 10,582 images; or
    voc2012/VOCdevkit/VOC2012/SegmentationClassAug/*.png    the same as images of ids"""
    voc = below(root, "VOCdevkit/VOC2012", "VOC2012")
    sbd = below(root, "benchmark_RELEASE/dataset", "sbd")
    lists = voc / "ImageSets/Segmentation"
    if split == "trainaug" and not (lists / "trainaug.txt").is_file():
        if not (sbd / "train.txt").is_file():
            raise InputError(
                f"no {sbd / 'train.txt'}: trainaug needs SBD beside VOC 2012; "
                f"--config.data.train_split=train takes VOC's own images.\n{voc2012.__doc__}"
            )
        parts = [sbd / "train.txt", sbd / "val.txt", lists / "train.txt"]
        every = {name for path in parts for name in read_list(path, voc2012.__doc__)}
        names = sorted(every - set(read_list(lists / "val.txt", voc2012.__doc__)))
    else:
        names = read_list(lists / f"{split}.txt", voc2012.__doc__)
    own, extra = (_stems(voc / f"SegmentationClass{which}") for which in ("", "Aug"))
    images, labels = [], []
    for name in names:
        folder = "SegmentationClass" if name in own or name not in extra else "SegmentationClassAug"
        from_sbd = name not in own and name not in extra and split == "trainaug"
        labels.append(sbd / f"cls/{name}.mat" if from_sbd else voc / folder / f"{name}.png")
        images.append(voc / f"JPEGImages/{name}.jpg")
    return Listing(images, labels, partial(_voc_label, ids=table.ids), _voc_objects)


def _stems(folder: Path) -> set[str]:
    return {path.stem for path in folder.iterdir()} if folder.is_dir() else set()


def _voc_label(path: Path, ids: dict[int, int]) -> np.ndarray:
    if path.suffix != ".mat":
        return read_label(path, ids)
    return translate(read_mat(path, "GTcls")["Segmentation"][0, 0], ids, path)


def _voc_objects(path: Path) -> dict:
    if path.suffix == ".mat":
        truth = read_mat(path.parent.parent / "inst" / path.name, "GTinst")
        numbers, classes = truth["Segmentation"][0, 0], truth["Categories"][0, 0].ravel().tolist()
        masks = [numbers == number for number in range(1, len(classes) + 1)]
        return objects(masks, classes, [False] * len(classes), numbers.shape)
    place = path.parent.parent / "SegmentationObject" / path.name
    numbers = read_values(place)
    return numbered_objects(numbers, read_values(path), none=(0, IGNORE), path=place)


def pascal_context(root: Path, split: str, table: Table) -> Listing:
    """Pascal Context: the images of VOC 2010, and one of the three forms of its labels
    pascal_context/VOCdevkit/VOC2010/JPEGImages/*.jpg
    pascal_context/VOCdevkit/VOC2010/ImageSets/SegmentationContext/{train,val}.txt
        (or ImageSets/Main/{train,val}.txt, of which the images without labels are left out)
    pascal_context/trainval/*.mat             LabelMap of 459 classes; or
    pascal_context/59_context_labels/*.png    0 = other, then in the order of 59_labels.txt; or
    pascal_context/VOCdevkit/VOC2010/SegmentationClassContext/*.png    in order of the alphabet"""
    voc = below(root, "VOCdevkit/VOC2010", "VOC2010")
    # The table has the ids of the 459 classes, which are in order of the alphabet.
    other = table.ids[0]
    by_train_id = sorted(i for value, i in table.ids.items() if value)
    by_alphabet = [i for value, i in sorted(table.ids.items()) if value]
    forms = (
        (root / "59_context_labels", ".png", by_train_id),
        (voc / "SegmentationClassContext", ".png", by_alphabet),
        (root / "trainval", ".mat", None),
    )
    labels, suffix, order = next((form for form in forms if form[0].is_dir()), (None, "", None))
    if labels is None:
        raise InputError(f"no labels in {root}.\n{pascal_context.__doc__}")
    official = voc / f"ImageSets/SegmentationContext/{split}.txt"
    names = read_list(
        official if official.is_file() else voc / f"ImageSets/Main/{split}.txt",
        pascal_context.__doc__,
    )
    if not official.is_file():
        there = _stems(labels)
        names = [name for name in names if name in there]
    ids = dict.fromkeys(range(460), other) | table.ids
    if order is not None:
        ids = {0: other} | {position: i for position, i in enumerate(order, start=1)}
    images = [voc / f"JPEGImages/{name}.jpg" for name in names]
    places = [labels / f"{name}{suffix}" for name in names]
    return Listing(images, places, partial(_context_label, ids=ids))


def _context_label(path: Path, ids: dict[int, int]) -> np.ndarray:
    values = read_mat(path, "LabelMap") if path.suffix == ".mat" else read_values(path)
    return translate(values, ids, path)


def cvat(root: Path, split: str, table: Table) -> Listing:
    """CVAT's export "Segmentation mask", with the images put beside the masks
    NAME/labelmap.txt                        name:red,green,blue:: in every line
    NAME/ImageSets/Segmentation/*.txt        default.txt: every fifth image is val, the rest train
    NAME/JPEGImages/*.jpg
    NAME/SegmentationClass/*.png
    NAME/SegmentationObject/*.png            if objects are told apart"""
    lists = root / "ImageSets/Segmentation"
    if (lists / f"{split}.txt").is_file():
        names = _lines(lists / f"{split}.txt")
    elif (lists / "default.txt").is_file():
        names = part(sorted(_lines(lists / "default.txt")), split)
    else:
        raise InputError(f"no {lists / split}.txt and no default.txt there.\n{cvat.__doc__}")
    pictures = below(root, "JPEGImages", "images")
    by_stem = {path.stem: path for path in find_images(pictures)}
    images = [by_stem.get(Path(name).name, pictures / f"{name}.jpg") for name in names]
    labels = [root / f"SegmentationClass/{name}.png" for name in names]
    label = partial(_cvat_label, table=table)
    return Listing(images, labels, label, partial(_cvat_objects, root=root, label=label))


def cvat_splits(root: Path) -> list[str]:
    """The image lists that are there; of default.txt alone train and val."""
    found = sorted(path.stem for path in (root / "ImageSets/Segmentation").glob("*.txt"))
    return found if set(found) - {"default"} else ["train", "val"]


def _lines(path: Path) -> list[str]:
    """The names of an image list; they may hold spaces."""
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def _cvat_label(path: Path, table: Table) -> np.ndarray:
    if open_mask(path).mode == "L":  # one channel: places in labelmap.txt
        return read_label(path, table.ids)
    return read_colours(path, table.colours)


def _cvat_objects(path: Path, root: Path, label: partial) -> dict:
    place = root / "SegmentationObject" / path.relative_to(root / "SegmentationClass")
    return numbered_objects(read_packed(place), label(path), path=place)


def cvat_table(root: Path) -> Table:
    """The table in labelmap.txt; without the file, Pascal VOC's."""
    path = root / "labelmap.txt"
    if not path.is_file():
        return read_csv("voc2012")
    rows = [line.split(":") for line in _lines(path) if not line.startswith("#")]
    try:
        names = [row[0] for row in rows]
        palette = [tuple(map(int, row[1].split(","))) for row in rows]
    except (IndexError, ValueError) as error:
        raise InputError(f"{path} must hold lines such as road:128,64,128:: but: {error}") from None
    check_names(path, names, palette)
    things = tuple(i for i, name in enumerate(names) if name != "background")
    ids = {i: i for i in range(len(names))}
    return Table(Classes(tuple(names), tuple(palette), things), ids)
