"""Label tables: what the values in a data set's label files mean, as ids 0..K-1 or 255 = ignore."""

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxseg.data.colours import IGNORE, Classes, voc_palette
from jaxseg.data.files import replacing
from jaxseg.errors import InputError

LABELS = Path(__file__).parent / "labels"
CLASSES_JSON = """{"names": ["sky", "road", ...]}, and where they are needed
    "palette": [[70, 130, 180], [128, 64, 128], ...]  a colour for each class
    "values": [0, 255, ...]        what the masks hold for each class, if not 0, 1, 2, ...
    "ignore": [[0, 0, 0], ...]     colours (or values) of the masks that count nowhere
    "things": ["car", ...]         classes whose objects are told apart
    "instance_maps": true          the masks hold numbers of objects, all of the class names[1]"""


@dataclasses.dataclass(frozen=True)
class Table:
    """The classes of a data set, and the id of every value that its label files hold."""

    classes: Classes
    ids: dict[int, int]  # value in the files -> 0..K-1, or 255 = ignore
    ignored_colours: tuple[tuple[int, int, int], ...] = ()
    instance_maps: bool = False  # the files hold numbers of objects, 0 = none

    @property
    def colours(self) -> dict[tuple[int, int, int], int]:
        """The id of every colour, for masks that are drawn in colours.

        Raises InputError where two classes have one colour: a mask could not tell them apart.
        """
        names = self.classes.names
        ids = dict.fromkeys(self.ignored_colours, IGNORE)
        for i, colour in enumerate(self.classes.palette):
            if colour in ids:
                other = "ignored" if ids[colour] == IGNORE else names[ids[colour]]
                raise InputError(
                    f"the colour {colour} is {other} and {names[i]}: masks of colours need a "
                    "colour of its own for each class"
                )
            ids[colour] = i
        return ids


def numbered(classes: Classes) -> Table:
    """The table of masks whose values are the ids."""
    return Table(classes, {i: i for i in range(len(classes))})


def read_csv(name: str) -> Table:
    """The table labels/NAME.csv: a row for each value of the files, several may share a class.

    `thing` is 1 for classes whose objects the data set tells apart.
    """
    with (LABELS / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    ids = {int(row["id"]): int(row["train_id"]) for row in rows}
    colours = [(int(row["red"]), int(row["green"]), int(row["blue"])) for row in rows]
    used, ignored = {}, []
    for row, colour in zip(rows, colours, strict=True):
        if int(row["train_id"]) == IGNORE:
            ignored.append(colour)
        else:
            used.setdefault(int(row["train_id"]), (row["name"], colour, row["thing"] == "1"))
    names, palette, things = zip(*(used[i] for i in sorted(used)), strict=True)
    classes = Classes(names, palette, tuple(i for i, thing in enumerate(things) if thing))
    return Table(classes, ids, tuple(ignored))


def read_json(path: Path, missing: str) -> Table:
    """The table in a classes.json: CLASSES_JSON says what it holds.

    No palette: Pascal VOC's colours. Raises InputError, with the text `missing` where there is no
    such file.
    """
    try:
        table = json.loads(path.read_text())
        if not isinstance(table, dict) or not isinstance(table["names"], list):
            raise TypeError("there is no list of names")
        names = tuple(str(name) for name in table["names"])
        palette = tuple(tuple(map(int, c)) for c in table.get("palette") or voc_palette(len(names)))
        values = tuple(map(int, table.get("values") or range(len(names))))
        ignore = table.get("ignore") or []
        things = tuple(names.index(name) for name in table.get("things") or ())
        colours = tuple(tuple(map(int, c)) for c in ignore if isinstance(c, list))
        ignored = {int(value): IGNORE for value in ignore if not isinstance(value, list)}
    except FileNotFoundError:
        raise InputError(f"no {path}.\n{missing}") from None
    except KeyError as error:
        raise InputError(f"{path} must hold {CLASSES_JSON}\nbut has no {error}") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} must hold {CLASSES_JSON}\nbut: {error}") from error
    check_names(path, names, palette)
    if len(values) != len(names) or len(set(values)) != len(values) or set(values) & set(ignored):
        raise InputError(
            f'{path} has the "values" {values} for {len(names)} names: needs one for each, all '
            "different, and none of them ignored"
        )
    maps = bool(table.get("instance_maps", False))
    classes = Classes(names, palette, (1,) if maps else things)
    ids = {value: i for i, value in enumerate(values)}
    return Table(classes, ids | ignored, colours, maps)


def check_names(path: Path, names: Sequence[str], palette: Sequence[tuple[int, ...]]) -> None:
    """Raises InputError unless there are 2..255 different names and as many colours."""
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


def read_classes(path: Path) -> Classes:
    """The classes in a classes.json. Raises InputError where it cannot be used."""
    return read_json(path, f"It holds {CLASSES_JSON}").classes


def write_classes(path: Path, classes: Classes) -> None:
    """Writes a classes.json."""
    things = {"things": [classes.names[i] for i in classes.things]} if classes.things else {}
    content = {"names": classes.names, "palette": classes.palette, **things}
    with replacing(path) as file:
        file.write_text(json.dumps(content) + "\n")


def file_ids(table: Table) -> dict[int, int]:
    """Class id -> the value in the data set's own files, the first where it has several."""
    return {i: value for value, i in reversed(table.ids.items()) if i != IGNORE}


def to_values(label: np.ndarray, table: Table) -> np.ndarray:
    """Ids [H,W] -> what the data set's own label files hold: what an evaluation server wants.

    Of several values with one id the first of the table stands for all; 255 becomes the first
    ignored one.
    """
    values = np.full(256, -1, np.int32)
    for value, i in reversed(table.ids.items()):
        values[i] = value
    if values[IGNORE] < 0:
        values[IGNORE] = IGNORE
    result = values[label]
    if (result < 0).any():
        raise InputError(f"the label holds ids that are none of {len(table.classes)} classes")
    return result.astype(np.uint8 if values.max() < 256 else np.uint16)
