"""What an evaluation came to, and the files and lines that tell it."""

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from jaxseg import plots
from jaxseg.data import pixels
from jaxseg.data.colours import Classes, rgb, strip
from jaxseg.data.files import replacing
from jaxseg.data.transforms import fitted_size
from jaxseg.ops import boundary, metrics

PANEL = 360  # pixels, the longest side of an image in the sheet of the worst


class Evaluation(NamedTuple):
    """The scores of a split, and what a report draws."""

    scores: dict[
        str, Any
    ]  # numbers, lists with a number a class, and `trimap`; None: no such score
    confusion: np.ndarray  # int64 [K,K], row = truth
    images: list[dict]  # name, mIoU, aAcc and, with boundaries, BF of each image
    drawn: dict[int, np.ndarray]  # predictions of the images to draw
    worst: dict[int, np.ndarray]  # predictions of those with the lowest mIoU, lowest first
    sizes: int  # distinct sizes of images
    compilations: int
    settings: dict | None = None  # `inference.settings` of what was scored; None: unknown


def report(
    folder: Path,
    step: int | None,
    result: Evaluation,
    source: Any,
    split: str,
    notes: dict[str, Any] | None = None,
) -> None:
    """Writes eval.json, per_class.csv, per_image.csv, confusion.png, worst.png and pictures/ of one
    evaluation and, where boundaries were scored, trimap.png.

    notes: what else eval.json should say of this evaluation.
    """
    scores, names = result.scores, source.classes.names
    lists = {"IoU": "IoU", "Acc": "Acc", "Dice": "Dice", "precision": "precision", "recall": "Acc"}
    if "boundary_IoU" in scores:
        lists["boundary_IoU"] = "boundary_IoU"
    columns = {shown: scores[key] for shown, key in lists.items()}
    per_class = [
        dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
    ]
    summary = {"step": step, "split": split, "images": len(source), "eval": result.settings}
    summary |= notes or {}
    summary |= {key: value for key, value in scores.items() if not isinstance(value, list)}
    if "trimap" in scores:
        summary["trimap"] = dict(zip(map(str, boundary.TRIMAP), scores["trimap"], strict=True))
    summary["per_class"] = dict(zip(names, per_class, strict=True))
    summary["worst"] = [result.images[i] for i in result.worst]
    summary["policy"] = metrics.POLICY
    with replacing(folder / "eval.json") as file:
        file.write_text(json.dumps(summary, indent=2) + "\n")

    pixels = result.confusion.sum(axis=1).tolist()
    rows = [
        {"id": i, "name": name, **per_class[i], "pixels": pixels[i]} for i, name in enumerate(names)
    ]
    _table_file(folder / "per_class.csv", rows)
    _table_file(folder / "per_image.csv", result.images)
    plots.confusion(result.confusion, names, folder / "confusion.png")
    for old in ("trimap.png", "worst.png"):
        (folder / old).unlink(missing_ok=True)
    if "trimap" in scores:
        plots.trimap(boundary.TRIMAP, scores["trimap"], folder / "trimap.png")
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for old in pictures.glob("[0-9]*_*.png"):
        old.unlink()
    for number, (i, prediction) in enumerate(sorted(result.drawn.items())):
        example = source[i]
        picture = strip(example["image"], example["label"], prediction, source.classes)
        picture.save(pictures / f"{number}_{Path(example['name']).name}.png")
    if result.worst:
        sheet(result, source).save(folder / "worst.png")


def reported_step(folder: Path) -> int | None:
    """The step of the report in `folder`; None where there is none, or it is damaged."""
    try:
        return json.loads((folder / "eval.json").read_text())["step"]
    except (OSError, ValueError, KeyError):
        return None


def _table_file(path: Path, rows: list[dict]) -> None:
    """A CSV file with a column a key; fractions to 6 digits, None as "absent"."""

    def shown(value: Any) -> Any:
        return "absent" if value is None else f"{value:.6f}" if type(value) is float else value

    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0])
        writer.writerows([shown(value) for value in row.values()] for row in rows)


def sheet(result: Evaluation, source: Any) -> Image.Image:
    """The worst images, one below the other: image, truth, prediction, error, and their mIoU."""
    strips = []
    for i, prediction in result.worst.items():
        example = source[i]
        longest = min(PANEL, max(prediction.shape))
        size = fitted_size(prediction.shape, (longest, longest))
        factor = tuple(n / have for n, have in zip(size, prediction.shape, strict=True))
        image = pixels.resample(rgb(example["image"]), (0, 0), factor, size)
        labels = np.stack([example["label"], prediction])
        truth, found = pixels.nearest(labels, (0, 0), factor, size)
        caption = f"{example['name']}   mIoU {result.images[i]['mIoU']:.3f}"
        strips.append((caption, strip(image, truth, found, source.classes)))
    width = max(picture.width for _, picture in strips)
    page = Image.new("RGB", (width, sum(picture.height + 26 for _, picture in strips)), "white")
    top = 0
    for caption, picture in strips:
        ImageDraw.Draw(page).text((4, top + 8), caption, fill="black")
        page.paste(picture, (0, top + 24))
        top += picture.height + 26
    return page


def table(scores: dict, classes: Classes, note: str = "") -> str:
    """The scores as lines for people; a class that is nowhere is called absent.

    note: what a reader must know of these scores.
    """
    width = max(map(len, classes.names))
    lines = [
        f"  {name:{width}}  {'absent' if iou is None else f'{iou:.3f}'}"
        for name, iou in zip(classes.names, scores["IoU"], strict=True)
    ]
    if None in scores["IoU"]:
        lines.append(f"({metrics.POLICY})")
    if note:
        lines.append(f"({note})")
    keys = ("mIoU", "mAcc", "aAcc", "fwIoU", "mDice", "mBoundaryIoU", "BF", "MAD", "MSE", "SAD")
    total = "  ".join(f"{k} {scores[k]:.4f}" for k in keys if k in scores and scores[k] is not None)
    return "\n".join(["IoU of each class:", *lines, total])
