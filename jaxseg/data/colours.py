"""Labels as colours: class tables, palette PNGs, overlays and the strips that a run draws."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

IGNORE = 255  # the label of pixels that count in no loss and no metric
IGNORE_COLOUR = (224, 224, 192)  # Pascal VOC draws its void so
GAP = 4  # pixels between panels


@dataclasses.dataclass(frozen=True)
class Classes:
    """What the class ids 0..K-1 of a data set mean: a name and a colour each."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    things: tuple[int, ...] = ()  # the ids whose objects are told apart

    def __len__(self) -> int:
        return len(self.names)


def voc_palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """Pascal VOC's colours: the id's bits, dealt to red, green and blue from the top bit down."""

    def colour(index: int) -> tuple[int, int, int]:
        return tuple(
            sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8))
            for channel in range(3)
        )

    return tuple(map(colour, range(count)))


def colourise(label: np.ndarray, classes: Classes) -> np.ndarray:
    """label [H,W] of ids or 255 -> RGB uint8 [H,W,3]."""
    return _table(classes)[label]


def overlay(
    image: np.ndarray, label: np.ndarray, classes: Classes, alpha: float = 0.5
) -> np.ndarray:
    """The label's colours laid over image uint8 [H,W,C] -> uint8 [H,W,3]."""
    mixed = (1 - alpha) * rgb(image) + alpha * colourise(label, classes)
    return mixed.round().astype(np.uint8)


def rgb(image: np.ndarray) -> np.ndarray:
    """image [H,W,C], 0..255 -> uint8 [H,W,3]: grey below three channels, else the first three."""
    shown = image[..., :3] if image.shape[2] >= 3 else image[..., :1]
    if shown.dtype != np.uint8:
        shown = shown.round().clip(0, 255).astype(np.uint8)
    return np.broadcast_to(shown, (*image.shape[:2], 3))


def save_label(path: Path, label: np.ndarray, classes: Classes, note: str = "") -> None:
    """Writes label [H,W] as an indexed PNG: pixel values are the ids, viewers show the colours.

    note: kept in the file, as its text chunk "jaxseg".
    """
    picture = Image.frombytes("P", label.shape[::-1], label.astype(np.uint8).tobytes())
    picture.putpalette(_table(classes).tobytes())
    info = PngInfo()
    if note:
        info.add_text("jaxseg", note)
    picture.save(path, format="PNG", pnginfo=info)


def read_note(path: Path) -> str:
    """The note that `save_label` kept in a file, or "" where there is none."""
    with Image.open(path) as picture:
        return picture.info.get("jaxseg", "")


def _table(classes: Classes) -> np.ndarray:
    """The colour of every byte, uint8 [256,3]; what is no class is drawn as ignored."""
    table = np.full((256, 3), IGNORE_COLOUR, np.uint8)
    table[: len(classes)] = classes.palette
    return table


def strip(
    image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, classes: Classes
) -> Image.Image:
    """image | truth | prediction | error, side by side, with a legend of the classes below.

    Errors are red on the darkened image; ignored pixels are shown as right.
    """
    wrong = (truth != prediction) & (truth != IGNORE)
    error = np.where(wrong[..., None], np.uint8((230, 40, 40)), rgb(image) // 3)
    panels = [rgb(image), colourise(truth, classes), colourise(prediction, classes), error]
    ids = sorted(set(np.unique(truth)) | set(np.unique(prediction)))
    return side_by_side(list(map(enlarged, panels)), ids, classes)


def enlarged(picture: np.ndarray) -> np.ndarray:
    """A picture [H,W,...] or map, as many times as large as makes a small one easy to see."""
    zoom = max(1, round(200 / picture.shape[0]))
    return picture.repeat(zoom, axis=0).repeat(zoom, axis=1)


def side_by_side(panels: Sequence[np.ndarray], ids: Sequence[int], classes: Classes) -> Image.Image:
    """Panels uint8 [H,W,3] in a row, with a legend of the classes `ids`, if any, below."""
    gap = np.full((panels[0].shape[0], GAP, 3), 255, np.uint8)
    row = np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1)
    if not ids:
        return Image.fromarray(row)
    return Image.fromarray(np.concatenate([row, legend(classes, ids, row.shape[1])]))


def legend(classes: Classes, ids: Sequence[int], width: int) -> Image.Image:
    """A picture [h,width] that names the colours of the given ids."""
    names = [(classes.names[i] if i < len(classes) else "ignore", i) for i in ids]
    cell = 24 + 7 * max(len(name) for name, _ in names)
    columns = max(1, width // cell)
    picture = Image.new("RGB", (width, 18 * -(-len(names) // columns) + 6), "white")
    draw = ImageDraw.Draw(picture)
    for index, (name, i) in enumerate(names):
        x, y = 4 + cell * (index % columns), 4 + 18 * (index // columns)
        colour = classes.palette[i] if i < len(classes) else IGNORE_COLOUR
        draw.rectangle((x, y, x + 12, y + 12), fill=tuple(colour), outline="black")
        draw.text((x + 17, y), name, fill="black")
    return picture
