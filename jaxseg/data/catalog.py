"""Data sets by name: where they are, what their classes mean, and a reader for a split."""

import csv
import json
import os
from pathlib import Path

from jaxseg.data.colours import Classes, voc_palette
from jaxseg.data.sources import TREE, Folder, Shapes
from jaxseg.errors import InputError

LABELS = Path(__file__).parent / "labels"


def known() -> list[str]:
    """The data sets whose classes are known without their files."""
    return ["shapes", *sorted(p.stem for p in LABELS.glob("*.csv"))]


def classes(dataset: str, root: str = "") -> Classes:
    """The class table: of a known name, or of `classes.json` in the data set's folder."""
    if dataset == "shapes":
        return Shapes.classes
    if dataset in known():
        rows = list(csv.DictReader((LABELS / f"{dataset}.csv").read_text().splitlines()))
        colours = tuple((int(r["red"]), int(r["green"]), int(r["blue"])) for r in rows)
        return Classes(tuple(r["name"] for r in rows), colours)
    return read_classes(locate(dataset, root) / "classes.json")


def read_classes(path: Path) -> Classes:
    """Reads {"names": [...], "palette": [[r,g,b], ...]}; no palette: Pascal VOC's colours."""
    try:
        table = json.loads(path.read_text())
        if not isinstance(table["names"], list):
            raise TypeError("names is no list")
        names = tuple(str(name) for name in table["names"])
        palette = tuple(tuple(map(int, c)) for c in table.get("palette") or voc_palette(len(names)))
    except FileNotFoundError:
        raise InputError(f"no {path}.\n{TREE}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{path} must hold {{"names": ["sky", "road", ...]}}: {error!r}'
        ) from error
    if not 2 <= len(names) <= 255 or len(palette) != len(names):
        raise InputError(
            f"{path} has {len(names)} names and {len(palette)} colours: needs 2..255 of both"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{path} names {', '.join(twice)} more than once: needs unique names")
    odd = [c for c in palette if len(c) != 3 or not all(0 <= value <= 255 for value in c)]
    if odd:
        raise InputError(f"{path} has the colour {odd[0]}: needs three numbers 0..255 each")
    return Classes(names, palette)


def write_classes(path: Path, table: Classes) -> None:
    path.write_text(json.dumps({"names": table.names, "palette": table.palette}) + "\n")


def locate(dataset: str, root: str = "") -> Path:
    """The folder of a data set: its path, or its name under `root` or $JAXSEG_DATA.

    Raises InputError, with the tree that is needed, where there is none.
    """
    base = root or os.environ.get("JAXSEG_DATA", "")
    places = [Path(dataset).expanduser()] + ([Path(base).expanduser() / dataset] if base else [])
    for place in places:
        if place.is_dir():
            return place
    tried = " or ".join(str(p.absolute()) for p in places)
    where = "" if base else " Set JAXSEG_DATA to the folder that holds your data sets."
    raise InputError(f'data set "{dataset}" not found at {tried}.{where}\n{TREE}')


def open_split(dataset: str, split: str, root: str = "", channels: int = 3) -> Folder | Shapes:
    """The reader of one split. Raises InputError where the data set cannot be used."""
    if dataset == "shapes":
        return Shapes(split, channels)
    folder = locate(dataset, root)
    table = classes(dataset, root)
    own = folder / "classes.json"
    if own.is_file() and read_classes(own).names != table.names:
        raise InputError(
            f"{own} names {len(read_classes(own))} classes {read_classes(own).names}, "
            f"but {dataset} has {len(table)}: {table.names}. "
            "Give your own data set another folder name."
        )
    return Folder(folder, split, table, channels)
