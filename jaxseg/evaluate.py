"""Inference and evaluation: the network on whole images, and the scores of a split."""

import csv
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

from jaxseg import models, plots, sharding
from jaxseg.data import catalog, pipeline
from jaxseg.data.colours import Classes, strip
from jaxseg.errors import InputError
from jaxseg.ops import metrics
from jaxseg.ops.image import centre, normalise
from jaxseg.ops.resize import resize


def cast(params: Any, dtype: str) -> Any:
    """Parameters in the dtype of computation: the layers, having none of their own, follow it."""
    return jax.tree.map(lambda p: p.astype(dtype), params)


def make_infer(config: ConfigDict) -> Callable[[Any, jax.Array, tuple[int, int]], dict]:
    """infer(variables, image, size): the prediction for image uint8 [B,h,w,C] at `size` (H, W).

    Returns `semantic` int32 [B,H,W] and `logits` float32 [B,H,W,K]. Where the network needs a
    larger input, the image is mirrored at its borders (U-Net, section 2).
    """
    model, _, predict = models.build(config)

    def infer(variables: Any, image: jax.Array, size: tuple[int, int]) -> dict[str, jax.Array]:
        have = image.shape[1:3]
        need = model.fit(have) if hasattr(model, "fit") else have
        before = [(n - h) // 2 for n, h in zip(need, have, strict=True)]
        pads = [(b, n - h - b) for b, n, h in zip(before, need, have, strict=True)]
        x = normalise(image, config.data.mean, config.data.std).astype(config.train.compute_dtype)
        x = jnp.pad(x, [(0, 0), *pads, (0, 0)], mode="symmetric")
        params = cast(variables["params"], config.train.compute_dtype)
        result = predict(model.apply({**variables, "params": params}, x, train=False), x)
        result = {key: centre(value, have) for key, value in result.items()}
        if size != have:
            logits = resize(result["logits"], size)
            result = {"semantic": jnp.argmax(logits, -1).astype(jnp.int32), "logits": logits}
        return result

    return infer


def make_eval_step(config: ConfigDict, mesh: Mesh) -> Callable:
    """(variables, batch) -> confusion [K,K] of the batch, and its predictions [B,H,W]; jitted."""
    infer = make_infer(config)

    @partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def eval_step(variables: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        label = batch["label"]
        semantic = infer(variables, batch["image"], label.shape[1:])["semantic"]
        return metrics.confusion(semantic, label, config.model.num_classes), semantic

    return eval_step


def open_source(config: ConfigDict, split: str) -> Any:
    """The reader of a split. Raises InputError where its class count is not the network's."""
    data = config.data
    source = catalog.open_split(data.dataset, split, data.root, data.channels)
    if len(source.classes) != config.model.num_classes:
        raise InputError(
            f"model.num_classes is {config.model.num_classes}, but {data.dataset} has "
            f"{len(source.classes)} classes ({', '.join(source.classes.names)}): "
            "set model.num_classes"
        )
    return source


def evaluate(
    eval_step: Callable, variables: Any, source: Any, config: ConfigDict, mesh: Mesh
) -> tuple[dict, np.ndarray, dict[int, np.ndarray]]:
    """(scores, confusion int64 [K,K], predictions of the images to draw) over a whole split."""
    parts = sharding.batch_parts(mesh)
    batch = -(-config.eval.batch // parts) * parts
    process = (jax.process_index(), jax.process_count())
    batches = pipeline.eval_batches(
        source, batch=batch, scale=config.eval.scale, threads=config.data.threads, process=process
    )
    confusion = np.zeros((config.model.num_classes,) * 2, np.int64)
    shown = set(np.linspace(0, len(source) - 1, min(config.eval.pictures, len(source)), dtype=int))
    drawn = {}
    for host in batches:
        index = host.pop("index")
        counts, semantic = eval_step(variables, sharding.put_batch(host, mesh))
        confusion += np.asarray(counts)
        for row in (r for r, i in enumerate(index) if i in shown):
            drawn[int(index[row])] = np.asarray(semantic[row])
    return metrics.scores(confusion), confusion, drawn


def report(
    workdir: Path,
    step: int,
    scores: dict,
    confusion: np.ndarray,
    drawn: dict,
    source: Any,
    split: str,
) -> None:
    """Writes eval.json, per_class.csv, confusion.png and pictures/ of one evaluation."""
    names = source.classes.names
    per_class = {
        n: {"IoU": i, "Acc": a} for n, i, a in zip(names, scores["IoU"], scores["Acc"], strict=True)
    }
    totals = {k: v for k, v in scores.items() if k not in ("IoU", "Acc")}
    summary = {
        "step": step,
        "split": split,
        "images": len(source),
        **totals,
        "per_class": per_class,
    }
    (workdir / "eval.json").write_text(json.dumps(summary, indent=2) + "\n")
    with (workdir / "per_class.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "name", "IoU", "Acc", "pixels"])
        for i, name in enumerate(names):
            values = (scores["IoU"][i], scores["Acc"][i])
            shown = ["absent" if v is None else f"{v:.6f}" for v in values]
            rows.writerow([i, name, *shown, int(confusion[i].sum())])
    plots.confusion(confusion, names, workdir / "confusion.png")
    pictures = workdir / "pictures"
    pictures.mkdir(exist_ok=True)
    for old in pictures.glob("[0-9]*_*.png"):
        old.unlink()
    for number, (i, prediction) in enumerate(sorted(drawn.items())):
        example = source[i]
        picture = strip(example["image"], example["label"], prediction, source.classes)
        picture.save(pictures / f"{number}_{example['name']}.png")


def table(scores: dict, classes: Classes) -> str:
    """The scores as lines for people; a class that is nowhere is called absent."""
    width = max(map(len, classes.names))
    lines = [
        f"  {name:{width}}  {'absent' if iou is None else f'{iou:.3f}'}"
        for name, iou in zip(classes.names, scores["IoU"], strict=True)
    ]
    total = "  ".join(
        f"{k} {scores[k]:.4f}" for k in ("mIoU", "mAcc", "aAcc") if scores[k] is not None
    )
    return "\n".join(["IoU of each class:", *lines, total])
