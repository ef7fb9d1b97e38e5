"""What an evaluation came to, and the files and lines that tell it."""

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from jaxseg import plots
from jaxseg.data import pixels, scene
from jaxseg.data.colours import Classes, rgb, strip
from jaxseg.data.files import replacing
from jaxseg.data.results import to_panoptic
from jaxseg.data.scene import Scene
from jaxseg.data.transforms import fitted_size
from jaxseg.ops import boundary, metrics

PANEL = 360  # pixels, the longest side of an image in the sheet of the worst
# Lists with a number a class: column -> key of the scores.
COLUMNS = {key: key for key in ("IoU", "Acc", "Dice", "precision", "boundary_IoU")}
OBJECTS = ("AP", "AP50", "box_AP", "box_AP50", "PQ", "SQ", "RQ")
COLUMNS |= {key: f"class_{key}" for key in OBJECTS}
SHOWN = ("AP", "PQ", "IoU")  # columns of the table for people
OBJECT_POLICY = (
    "absent: a class without true objects has no AP, one in neither truth nor prediction no PQ, "
    "and is in no mean"
)


class Evaluation(NamedTuple):
    """The scores of a split, and what a report draws."""

    scores: dict[
        str, Any
    ]  # numbers, lists with a number a class, and `trimap`; None: no such score
    confusion: np.ndarray | None  # int64 [K,K], row = truth; None: no class for each pixel
    images: list[dict]  # name, mIoU, aAcc and, with boundaries, BF of each image; of objects AP, PQ
    drawn: dict[int, np.ndarray | Scene]  # predictions of the images to draw
    worst: dict[int, np.ndarray | Scene]  # predictions of those with the lowest rank, lowest first
    sizes: int  # distinct sizes of images
    compilations: int
    settings: dict | None = None  # `inference.settings` of what was scored; None: unknown
    rank: str = "mIoU"  # the score of an image by which the worst are found


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
    columns = {shown: scores[key] for shown, key in COLUMNS.items() if key in scores}
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
    summary["policy"] = policy(scores)
    with replacing(folder / "eval.json") as file:
        file.write_text(json.dumps(summary, indent=2) + "\n")

    rows = [{"id": i, "name": name, **per_class[i]} for i, name in enumerate(names)]
    for old in ("confusion.png", "trimap.png", "worst.png"):
        (folder / old).unlink(missing_ok=True)
    if result.confusion is not None:
        for row, count in zip(rows, result.confusion.sum(axis=1).tolist(), strict=True):
            row["pixels"] = count
        plots.confusion(result.confusion, names, folder / "confusion.png")
    _table_file(folder / "per_class.csv", rows)
    _table_file(folder / "per_image.csv", result.images)
    if "trimap" in scores:
        plots.trimap(boundary.TRIMAP, scores["trimap"], folder / "trimap.png")
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for old in pictures.glob("[0-9]*_*.png"):
        old.unlink()
    for number, (i, prediction) in enumerate(sorted(result.drawn.items())):
        example = source[i]
        picture = panels(example, prediction, source.classes)
        picture.save(pictures / f"{number}_{Path(example['name']).name}.png")
    if result.worst:
        sheet(result, source).save(folder / "worst.png")


def policy(scores: dict) -> str:
    """What the scores say of classes that are nowhere."""
    texts = {"IoU": metrics.POLICY, "class_AP": OBJECT_POLICY, "class_PQ": OBJECT_POLICY}
    return "; ".join(dict.fromkeys(text for key, text in texts.items() if key in scores))


def panels(
    example: dict, prediction: np.ndarray | Scene, classes: Classes, longest: int | None = None
) -> Image.Image:
    """image | truth | prediction, and of labels | error, with a legend; fitted into `longest`."""
    label = example["label"]
    size = fitted_size(label.shape, (longest, longest)) if longest else label.shape
    factor = tuple(n / have for n, have in zip(size, label.shape, strict=True))
    image = pixels.resample(rgb(example["image"]), (0, 0), factor, size)
    if isinstance(prediction, Scene):
        objects = example["instances"]
        if all(prediction.things):
            truth = scene.painted(objects, label.shape)
        else:
            truth = scene.of_panoptic(to_panoptic(label, objects, classes.things))
        shown = (scene.shrunk(one, size) for one in (truth, prediction))
        return scene.strip(image, *shown, classes)
    shown = pixels.nearest(np.stack([label, prediction]), (0, 0), factor, size)
    return strip(image, *shown, classes)


def place(workdir: Path, split: str, config: ConfigDict) -> Path:
    """Where the report on a split goes: that on the validation split lies in the workdir itself."""
    return workdir if split == config.data.eval_split else workdir / "eval" / split


def reported_step(folder: Path, split: str) -> int:
    """The step of the report in `folder` on that split; 0 where there is none, or it is damaged."""
    try:
        summary = json.loads((folder / "eval.json").read_text())
        return summary["step"] if summary["split"] == split else 0
    except (OSError, ValueError, KeyError):
        return 0


def _table_file(path: Path, rows: list[dict]) -> None:
    """A CSV file with a column a key; fractions to 6 digits, None as "absent"."""

    def shown(value: Any) -> Any:
        return "absent" if value is None else f"{value:.6f}" if type(value) is float else value

    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0])
        writer.writerows([shown(value) for value in row.values()] for row in rows)


def sheet(result: Evaluation, source: Any) -> Image.Image:
    """The worst images, one below the other: image, truth, prediction, error, and their score."""
    strips = []
    for i, prediction in result.worst.items():
        example = source[i]
        longest = min(PANEL, max(example["label"].shape))
        caption = f"{example['name']}   {result.rank} {result.images[i][result.rank]:.3f}"
        strips.append((caption, panels(example, prediction, source.classes, longest)))
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
    columns = {shown: scores[COLUMNS[shown]] for shown in SHOWN if COLUMNS[shown] in scores}
    lines = []
    for name, *values in zip(classes.names, *columns.values(), strict=True):
        cells = "  ".join("absent" if v is None else f"{v:.3f}" for v in values)
        lines.append(f"  {name:{width}}  {cells}")
    if any(None in column for column in columns.values()):
        lines.append(f"({policy(scores)})")
    if note:
        lines.append(f"({note})")
    groups = (
        ("PQ", "SQ", "RQ", "PQ_things", "PQ_stuff"),
        ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "AR1", "AR10", "AR100"),
        ("box_AP", "box_AP50", "box_AP75"),
        ("mIoU", "mAcc", "aAcc", "fwIoU", "mDice", "mBoundaryIoU", "BF", "MAD", "MSE", "SAD"),
    )
    for keys in groups:
        held = [f"{k} {scores[k]:.4f}" for k in keys if k in scores and scores[k] is not None]
        lines += ["  ".join(held)] if held else []
    return "\n".join([f"{', '.join(columns)} of each class:", *lines])
