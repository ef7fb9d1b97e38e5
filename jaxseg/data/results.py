"""Objects and panoptic maps in the forms that others read: COCO's results and panoptic PNGs with
their JSON, Cityscapes' masks with their lists, and maps of object numbers.

Lin et al. 2014; Kirillov et al., "Panoptic Segmentation", CVPR 2019; Cordts et al. 2016. Objects
are a dict of `masks` bool [n,H,W], `scores` [n], `classes` [n] and, from some networks, `boxes`
[n,4] (y0, x0, y1, x1, pixels). Class ids become those of the data set's own files by `ids`.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxseg.data import rle
from jaxseg.data.colours import IGNORE, Classes
from jaxseg.data.files import replacing
from jaxseg.data.objects import bounds
from jaxseg.errors import InputError

STEP = 1000  # a panoptic map holds class id * 1000 + the number of the object
VOID = IGNORE * STEP


def image_id(name: str) -> int | str:
    """What COCO's JSON calls the image: the number that its file is named by, else the name.

    A number is written plainly or, as COCO does, with twelve digits: 01 is a name.
    """
    plain = name.isdecimal() and name in (str(int(name)), f"{int(name):012}")
    return int(name) if plain else name


def take_id(taken: dict[int | str, str], name: str) -> int | str:
    """`image_id`, which is noted in `taken`. Raises InputError where another name has it."""
    place = image_id(name)
    other = taken.setdefault(place, name)
    if other != name:
        raise InputError(
            f"images {other} and {name} both are number {place} in COCO's JSON: rename one of them"
        )
    return place


def coco_results(name: str, objects: Mapping[str, np.ndarray], ids: Mapping[int, int]) -> list:
    """The entries of an image in COCO's results: image_id, category_id, bbox, segmentation, score.

    bbox: x, y, width, height, of `boxes` or else around the mask.
    """
    boxes = objects["boxes"] if "boxes" in objects else bounds(objects["masks"])
    entries = []
    for i, (y0, x0, y1, x1) in enumerate(np.float64(boxes).tolist()):
        entries.append(
            {
                "image_id": image_id(name),
                "category_id": ids[int(objects["classes"][i])],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "segmentation": rle.encode(objects["masks"][i]),
                "score": float(objects["scores"][i]),
            }
        )
    return entries


def coco_annotations(images: Sequence[dict], entries: Sequence[dict], classes: Classes) -> dict:
    """COCO's annotation JSON of results in class ids: what labelling tools open.

    images: `id`, `file_name`, `height` and `width` of each.
    """
    annotations = []
    for number, entry in enumerate(entries, start=1):
        area = sum(rle.unpack(entry["segmentation"]["counts"])[1::2])
        annotations.append({"id": number, **entry, "area": area, "iscrowd": 0})
    categories = [{"id": i, "name": name} for i, name in enumerate(classes.names)]
    return {"images": list(images), "annotations": annotations, "categories": categories}


def panoptic_entry(name: str, panoptic: np.ndarray, ids: Mapping[int, int]) -> dict[str, Any]:
    """The annotation of an image in COCO's panoptic JSON, for the PNG of `save_panoptic`."""
    segments = []
    for value in np.unique(panoptic).tolist():
        if value // STEP in ids:
            mask = panoptic == value
            y0, x0, y1, x1 = bounds(mask[None])[0].tolist()
            segments.append(
                {
                    "id": value + STEP,
                    "category_id": ids[value // STEP],
                    "area": int(np.count_nonzero(mask)),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "iscrowd": 0,
                }
            )
    return {"image_id": image_id(name), "file_name": f"{name}.png", "segments_info": segments}


def panoptic_json(entries: Sequence[dict], classes: Classes, ids: Mapping[int, int]) -> dict:
    """COCO's panoptic JSON."""
    categories = [
        {"id": ids[i], "name": name, "isthing": int(i in classes.things), "color": list(colour)}
        for i, (name, colour) in enumerate(zip(classes.names, classes.palette, strict=True))
    ]
    images = [{"id": e["image_id"], "file_name": e["file_name"]} for e in entries]
    return {"images": images, "annotations": list(entries), "categories": categories}


def save_panoptic(path: Path, panoptic: np.ndarray) -> None:
    """Writes a map int [H,W] as COCO does, R + 256 G + 65536 B = segment, 0 = void.

    The number of a segment is that of the map + 1000, so that none is 0.
    """
    segments = np.where(panoptic == VOID, 0, panoptic + STEP)
    colours = np.stack([segments >> shift & 255 for shift in (0, 8, 16)], axis=-1)
    Image.fromarray(colours.astype(np.uint8)).save(path, format="PNG")


def save_numbers(path: Path, numbers: np.ndarray) -> None:
    """Writes the numbers of objects int [H,W], 0 = none, as a grey PNG of 16 bits."""
    if numbers.max(initial=0) >= 2**16:
        raise InputError(f"{numbers.max()} objects in one image: a PNG can number {2**16 - 1}")
    Image.fromarray(numbers.astype(np.uint16)).save(path, format="PNG")


def save_json(path: Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    with replacing(path) as file:
        file.write_text(json.dumps(content) + "\n")


def save_cityscapes(
    folder: Path, name: str, objects: Mapping[str, np.ndarray], ids: Mapping[int, int]
) -> None:
    """Writes the objects of an image for Cityscapes' instance benchmark: FOLDER/NAME.txt, with a
    line "masks/NAME_0.png 26 0.98" for each, and these masks, 255 inside."""
    lines = []
    for i, (mask, c, score) in enumerate(
        zip(objects["masks"], objects["classes"], objects["scores"], strict=True)
    ):
        inside = f"masks/{name}_{i}.png"
        with replacing(folder / inside) as file:
            Image.fromarray(mask.astype(np.uint8) * 255).save(file, format="PNG")
        lines.append(f"{inside} {ids[int(c)]} {float(score):.6f}\n")
    with replacing(folder / f"{name}.txt") as file:
        file.write_text("".join(lines))


def to_panoptic(
    label: np.ndarray, instances: Mapping[str, np.ndarray], things: Collection[int]
) -> np.ndarray:
    """The panoptic map int32 [H,W] of a truth: label [H,W] and the `masks` [n,H,W], `classes` and
    `crowd` of its objects.

    A pixel of a thing that no object holds, and a crowd, has the number 0. Where objects overlap
    the later one is on top. Raises InputError for more than 999 objects of one class.
    """
    panoptic = label.astype(np.int32) * STEP
    masks, classes, crowd = (instances[key] for key in ("masks", "classes", "crowd"))
    counts: dict[int, int] = {}
    for mask, c, many in zip(masks.astype(bool), classes.tolist(), crowd.tolist(), strict=True):
        if c not in things:
            continue
        number = 0 if many else counts.get(c, 0) + 1
        if number >= STEP:
            raise InputError(
                f"an image has more than {STEP - 1} objects of class {c}, which a panoptic map "
                "cannot number: cut the image into parts"
            )
        counts[c] = max(number, counts.get(c, 0))
        panoptic[mask & (label != IGNORE)] = c * STEP + number
    return panoptic
