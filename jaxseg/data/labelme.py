"""labelme's annotations: shapes in one JSON file an image, drawn as labelme itself draws them."""

import base64
import io
import json
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from jaxseg.data.colours import IGNORE, Classes, voc_palette
from jaxseg.data.files import IMAGE_SUFFIXES, Embedded, shown
from jaxseg.data.sources import Listing, objects, part
from jaxseg.data.tables import Table, check_names, numbered, read_json
from jaxseg.errors import InputError

IGNORED, BACKGROUND = "__ignore__", "_background_"
LINE_WIDTH, POINT_RADIUS = 10, 5  # pixels, labelme's own


class Shapes(NamedTuple):
    """What one file holds."""

    size: tuple[int, int]  # height, width
    image: str  # as seen from the file
    shapes: list[dict]  # with `points` as pairs of finite floats, at least one


def labelme(root: Path, split: str, table: Table) -> Listing:
    """A folder of labelme's files
    NAME/labels.txt        names of classes, one a line: __ignore__ and _background_ first; or
                           classes.json, whose first class is the background
    NAME/train/*.json      with the images beside or inside them; without the folders train
    NAME/val/*.json        and val every fifth file anywhere below NAME is val, the rest train"""
    folder = root / split
    if folder.is_dir():
        files = sorted(folder.rglob("*.json"))
    else:
        if any((root / name).is_dir() for name in ("train", "val")):
            found = labelme_splits(root)
            raise InputError(f"no split {split!r} in {root}: found {found}.\n{labelme.__doc__}")
        files = sorted(p for p in root.rglob("*.json") if p.name != "classes.json")
        files = part(files, split)
    if not files:
        raise InputError(f"no JSON files in {root}.\n{labelme.__doc__}")
    images = [_image_of(file) for file in files]
    ids = {name: i for i, name in enumerate(table.classes.names)}
    return Listing(images, files, partial(_drawn, ids=ids), partial(_objects, ids=ids))


def labelme_splits(root: Path) -> list[str]:
    """Its folders that hold JSON files, where train or val is one; else train and val."""
    found = sorted({path.relative_to(root).parts[0] for path in root.glob("*/**/*.json")})
    return found if {"train", "val"} & set(found) else ["train", "val"]


def _image_of(file: Path) -> Path | Embedded:
    """The image of the same name beside the file, or the one that it names, or holds."""
    beside = (file.with_suffix(suffix) for suffix in IMAGE_SUFFIXES)
    found = next((path for path in beside if path.is_file()), None)
    if found:
        return found
    size, name, _ = read_shapes(file)
    named = file.parent / name
    if (named == file or not named.is_file()) and _embedded(file):
        return Embedded(file, size, _embedded)
    return named


def _embedded(file: Path) -> bytes:
    """The image that the file holds itself; nothing where it does not."""
    content = json.loads(file.read_text(encoding="utf-8"))
    try:
        return base64.b64decode(content.get("imageData") or "")
    except (ValueError, TypeError) as error:
        raise InputError(f"{shown(file)} holds an image that cannot be read: {error}") from error


def read_shapes(file: Path) -> Shapes:
    """Raises InputError where the file is not labelme's."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        size = (int(content["imageHeight"]), int(content["imageWidth"]))
        image = content["imagePath"].replace("\\", "/")
        for shape in content["shapes"]:
            shape["points"] = [(float(x), float(y)) for x, y in shape["points"]]
            shape["label"], shape["points"][0]
            if not np.isfinite(shape["points"]).all():
                raise ValueError(f"a point of {shape['label']} is no number")
        return Shapes(size, image, content["shapes"])
    except OSError as error:
        raise InputError(f"cannot read {shown(file)}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise InputError(f"{shown(file)} is not labelme's JSON: {error!r}") from error


def _id(file: Path, name: str, ids: dict[str, int]) -> int:
    if name == IGNORED:
        return IGNORE
    if name not in ids:
        raise InputError(
            f'{shown(file)} has a shape labelled "{name}": the classes are {", ".join(ids)}'
        )
    return ids[name]


def _drawn(file: Path, ids: dict[str, int]) -> np.ndarray:
    """uint8 [H,W]: a later shape lies over an earlier one, and the first class is all the rest."""
    size, _, shapes = read_shapes(file)
    label = np.zeros(size, np.uint8)
    for shape in shapes:
        label[draw(file, shape, size)] = _id(file, shape["label"], ids)
    return label


def _objects(file: Path, ids: dict[str, int]) -> dict:
    """Shapes of one label and group_id are one object; each keeps what no later shape hides."""
    size, _, shapes = read_shapes(file)
    owner = np.full(size, -1, np.int32)
    found: dict[tuple, int] = {}
    for number, shape in enumerate(shapes):
        group = shape.get("group_id")
        key = (shape["label"], number if group is None else ("group", group))
        owner[draw(file, shape, size)] = found.setdefault(key, len(found))
    kept = [(n, _id(file, key[0], ids)) for key, n in found.items()]
    kept = [(owner == n, i) for n, i in kept if i not in (0, IGNORE) and (owner == n).any()]
    return objects([m for m, _ in kept], [i for _, i in kept], [False] * len(kept), size)


def draw(file: Path, shape: dict, size: tuple[int, int]) -> np.ndarray:
    """bool [H,W] of a shape. Raises InputError for a kind that labelme did not have."""
    kind, points = shape.get("shape_type") or "polygon", list(map(tuple, shape["points"]))
    if kind == "mask":
        return _pasted(file, shape, size)
    picture = Image.new("1", size[::-1])
    pen = ImageDraw.Draw(picture)
    needs = {"polygon": 3, "rectangle": 2, "circle": 2, "line": 2, "linestrip": 2, "point": 1}
    if kind not in needs or len(points) < needs[kind]:
        raise InputError(
            f"{shown(file)} has a {kind} of {len(points)} points: needs one of "
            + ", ".join(f"{name} (at least {n})" for name, n in needs.items())
            + ", mask"
        )
    if kind == "polygon":
        pen.polygon(points, fill=1, outline=1)
    elif kind == "rectangle":
        (x0, y0), (x1, y1) = points[:2]
        pen.rectangle((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), fill=1, outline=1)
    elif kind in ("line", "linestrip"):
        pen.line(points, fill=1, width=LINE_WIDTH)
    else:
        x, y = points[0]
        radius = math.dist(*points[:2]) if kind == "circle" else POINT_RADIUS
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1, outline=1)
    return np.asarray(picture)


def _pasted(file: Path, shape: dict, size: tuple[int, int]) -> np.ndarray:
    """A mask's own little picture, at the place of its first point."""
    try:
        inside = np.asarray(Image.open(io.BytesIO(base64.b64decode(shape["mask"])))) > 0
        x, y = (int(value) for value in shape["points"][0])
        mask = np.zeros(size, bool)
        room = mask[y : y + inside.shape[0], x : x + inside.shape[1]]
        room[:] = inside[: room.shape[0], : room.shape[1]]
    except Exception as error:  # Pillow raises many kinds for broken pictures
        raise InputError(f"{shown(file)} has a mask that cannot be read: {error}") from error
    return mask


def labelme_table(root: Path) -> Table:
    """The table in labels.txt, or else in classes.json."""
    path = root / "labels.txt"
    if not path.is_file():
        return read_json(root / "classes.json", labelme.__doc__)
    names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    names = [name for name in names if name != IGNORED]
    if BACKGROUND not in names:
        names.insert(0, BACKGROUND)
    names.sort(key=lambda name: name != BACKGROUND)  # stable: the background first
    palette = voc_palette(len(names))
    check_names(path, names, palette)
    return numbered(Classes(tuple(names), palette, tuple(range(1, len(names)))))
