"""Evaluation: the scores of a split, of a network or of predictions that were saved."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxseg import config as configs
from jaxseg import sharding
from jaxseg.data import catalog, pipeline
from jaxseg.data.colours import IGNORE, Classes, read_note, save_label
from jaxseg.data.files import read_label, replacing
from jaxseg.errors import InputError
from jaxseg.inference import buckets, check_windows, make_infer, settings
from jaxseg.log import say
from jaxseg.ops import boundary, matting, metrics
from jaxseg.report import Evaluation, report, table


def make_eval_step(
    config: ConfigDict, mesh: Mesh, infer: Callable | None = None, edges: bool | None = None
) -> Callable:
    """(variables, batch) -> `counts` of each image, `semantic` [B,H,W], `finite`, `index`; jitted.

    infer: in place of the network's. edges: count near boundaries too; None: as eval.boundary says.
    """
    infer, classes = infer or make_infer(config, mesh), config.model.num_classes
    edges = config.eval.boundary if edges is None else edges

    @partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def eval_step(variables: Any, batch: dict[str, jax.Array]) -> dict[str, Any]:
        label = batch["label"]
        soft = "alpha" in batch
        out = infer(variables, batch["image"], label.shape[1:], soft, batch["size"])
        counts = {"confusion": metrics.confusions(out["semantic"], label, classes)}
        if soft and "logits" in out:  # regions have none
            counts["alpha"] = matting.sums(out["logits"], batch["alpha"], label)
        if edges:
            counts |= boundary.counts(out["semantic"], label, batch["size"], classes)
        semantic = out["semantic"].astype(jnp.uint8 if classes <= IGNORE else jnp.int32)
        return {
            "counts": counts,
            "semantic": semantic,
            "finite": out["finite"],
            "index": batch["index"],
        }

    return eval_step


def open_source(config: ConfigDict, split: str, classes: Classes | None = None) -> Any:
    """The reader of a split. Raises InputError where its classes are not the network's.

    classes: those that the run was trained on.
    """
    data = config.data
    objects = split == data.train_split and max(data.copy_paste, data.crop_on_objects) > 0
    source = catalog.open_split(data.dataset, split, data.root, data.channels, objects)
    names = source.classes.names
    if len(names) != config.model.num_classes:
        raise InputError(
            f"model.num_classes is {config.model.num_classes}, but {data.dataset} has "
            f"{len(names)} classes ({', '.join(names)}): set model.num_classes"
        )
    check_classes(source.classes, classes.names if classes else names, "the run")
    return source


def check_classes(classes: Classes, names: tuple[str, ...], whose: str) -> None:
    """Raises InputError where `names` are not those of the data set's classes, in their order."""
    if tuple(names) == classes.names:
        return
    differing = [
        f"{i} is {theirs!r} there and {ours!r} here"
        for i, (theirs, ours) in enumerate(zip(names, classes.names, strict=False))
        if theirs != ours
    ]
    counts = f"{len(names)} classes there and {len(classes)} here"
    raise InputError(
        f"the classes of {whose} are not those of the data set: {(differing or [counts])[0]}. "
        "Use the data set, or the table of classes, that it was made with"
    )


def evaluate(
    eval_step: Callable,
    variables: Any,
    source: Any,
    config: ConfigDict,
    mesh: Mesh,
    save: Callable[[str, np.ndarray], None] | None = None,
) -> Evaluation:
    """Every image of a source once, in batches of at most eval.buckets shapes.

    save: called with the name and the prediction [h,w] of each image, in the first process.
    Raises InputError for a source without images and for logits that are not finite.
    """
    if not len(source):
        raise InputError("the split has no images: choose another")
    sizes = [source.size(i) for i in range(len(source))]
    if not isinstance(source, Saved):  # which needs no network, and so no windows
        check_windows(config, sizes, partial(image_name, source))
    fits = buckets(sizes, config.eval.buckets)
    compiled = getattr(eval_step, "_cache_size", lambda: 0)
    before = compiled()
    parts = sharding.batch_parts(mesh)
    batches = pipeline.eval_batches(
        source,
        batch=-(-config.eval.batch // parts) * parts,
        shapes=[fits[size] for size in sizes],
        threads=config.data.threads,
        process=(jax.process_index(), jax.process_count()),
    )
    many = min(config.eval.pictures, len(source))
    shown = set(np.linspace(0, len(source) - 1, many, dtype=int).tolist())
    totals, images, drawn, worst = {}, {}, {}, {}
    for host in batches:
        names = dict(zip(host["index"].tolist(), host.pop("name"), strict=True))
        out = jax.device_get(eval_step(variables, sharding.put_batch(host, mesh)))
        rows = {i: row for row, i in enumerate(out["index"].tolist()) if i >= 0}
        names |= {i: image_name(source, i) for i in rows if i not in names}  # of other processes
        broken = [names[i] for i, row in rows.items() if not out["finite"][row]]
        if broken:
            raise InputError(
                f"the network's answer to {', '.join(broken)} is not finite (NaN or infinity): the "
                "checkpoint or the image is broken, or train.compute_dtype too small for them"
            )
        for key, value in out["counts"].items():
            wide = np.float64 if value.dtype.kind == "f" else np.int64
            totals[key] = totals.get(key, 0) + value.sum(axis=0, dtype=wide)
        labels = {}
        for i, row in rows.items():
            height, width = sizes[i]
            labels[i] = out["semantic"][row, :height, :width]
            counts = {key: value[row] for key, value in out["counts"].items()}
            images[i] = {"name": names[i], **image_scores(counts)}
            if save and jax.process_index() == 0:
                save(names[i], labels[i])
        drawn |= {i: label.copy() for i, label in labels.items() if i in shown}
        labels |= worst
        scored = [(images[i]["mIoU"], i) for i in labels if images[i]["mIoU"] is not None]
        worst = {i: labels[i].copy() for _, i in sorted(scored)[:many]}
    images = [images[i] for i in sorted(images)]
    return Evaluation(
        scores=split_scores(totals, images),
        confusion=totals["confusion"],
        images=images,
        drawn=drawn,
        worst=worst,
        sizes=len(fits),
        compilations=compiled() - before,
        settings=settings(config),
    )


def image_name(source: Any, index: int) -> str:
    """The name of an image, without reading it where the source can tell."""
    if hasattr(source, "image_name"):
        return source.image_name(index)
    return source[index]["name"]


def image_scores(counts: dict[str, np.ndarray]) -> dict[str, float | None]:
    """mIoU, aAcc and, where boundaries were counted, BF of one image."""
    scores = metrics.scores(counts["confusion"])
    scores = {key: scores[key] for key in ("mIoU", "aAcc")}
    return scores | ({"BF": boundary.image_f1(counts["contours"])} if "contours" in counts else {})


def split_scores(totals: dict[str, np.ndarray], images: list[dict]) -> dict[str, Any]:
    """The scores of the summed counts, and the means of the images' own."""
    scores = metrics.scores(totals["confusion"])
    for key in ("mIoU", "aAcc"):
        scores[f"image_{key}"] = metrics.mean(image[key] for image in images)
    if "alpha" in totals:
        scores |= matting.scores(totals["alpha"], len(images))
    if "bands" in totals:
        scores |= boundary.scores(totals["bands"], totals["rings"])
        scores["BF"] = metrics.mean(image["BF"] for image in images)
    return scores


class Saved:
    """Saved predictions as a source: its images are the ids [h,w,1] that were predicted.

    The files are FOLDER/NAME.png, as `eval --save_predictions` writes them, or of any other
    origin: indexed or grey, pixel value = class id.
    """

    channels = 1

    def __init__(self, folder: Path, source: Any):
        """Raises InputError where the first prediction is missing or of other classes."""
        self.folder, self.source, self.classes = folder, source, source.classes
        self.size, self.image_name = source.size, partial(image_name, source)
        self.note = _note(self._path(self.image_name(0))) if len(source) else {}
        self.step = self.note.get("step")
        if "names" in self.note:
            check_classes(self.classes, self.note["names"], str(folder))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        example = self.source[index]
        path = self._path(example["name"])
        found = read_label(path, {i: i for i in range(len(self.classes))})
        if found.shape != example["label"].shape:
            raise InputError(
                f"prediction {path} is {found.shape} and its truth {example['label'].shape} "
                "(height, width): they must be equal"
            )
        if (found == IGNORE).any():
            raise InputError(f"prediction {path} holds {IGNORE}: needs a class for every pixel")
        if _note(path) != self.note:
            other = self._path(self.image_name(0))
            raise InputError(
                f"{other} and {path} are not of one prediction: "
                f"{_difference(self.note, _note(path))}. "
                "Score the files of one run, step and settings, in a folder of their own"
            )
        return {**example, "image": found[..., None]}

    def _path(self, name: str) -> Path:
        path = self.folder / f"{name}.png"
        if not path.is_file():
            raise InputError(
                f"no prediction {path}: needs one PNG for each of the {len(self)} images, named "
                "like them"
            )
        return path


def _note(path: Path) -> dict:
    """What a prediction says of its origin; {} where it says nothing."""
    try:
        note = json.loads(read_note(path) or "{}")
    except (OSError, ValueError):  # no picture, which reading it will tell
        return {}
    return {key: note[key] for key in ("step", "names", "run", "eval") if key in note}


def _difference(one: dict, other: dict) -> str:
    key = next(key for key in [*one, *other] if one.get(key) != other.get(key))
    return f"{key} is {one.get(key)} and {other.get(key)}"


def labels_given(_: Any, image: jax.Array, *__: Any) -> dict[str, jax.Array]:
    """In place of a network's `infer`, where the images are ids [B,h,w,1]: these are the labels."""
    return {"semantic": image[..., 0].astype(jnp.int32), "finite": jnp.ones(len(image), bool)}


def rescore(config: ConfigDict, folder: Path, split: str | None = None, edges: bool = True) -> int:
    """The verb `eval` on saved predictions, without a network: reports into their folder.

    edges: boundary scores too.
    """
    split, mesh = split or config.data.eval_split, sharding.make_mesh(configs.default().mesh)
    source = open_source(config, split)
    saved = Saved(folder, source)
    step = make_eval_step(config, mesh, labels_given, edges)
    result = evaluate(step, {}, saved, config, mesh)._replace(settings=saved.note.get("eval"))
    if jax.process_index() == 0:
        report(folder, saved.step, result, source, split)
    say(table(result.scores, source.classes))
    say(f"{len(source)} predictions of {split}; details in {folder / 'eval.json'}")
    return 0


def saver(
    folder: Path, step: int, classes: Classes, asked: dict | None = None
) -> Callable[[str, np.ndarray], None]:
    """save(name, label): writes FOLDER/NAME.png, indexed, with the step, the classes and, where
    given, the `settings` that were asked for inside."""
    note = json.dumps({"step": step, "names": classes.names, "eval": asked})
    written = set()

    def save(name: str, label: np.ndarray) -> None:
        if name in written:
            raise InputError(f"two images are named {name}: their predictions have no place")
        written.add(name)
        with replacing(folder / f"{name}.png") as file:
            save_label(file, label, classes, note)

    return save
