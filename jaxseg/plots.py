"""Curves, trimaps and confusion matrices as PNG files, by matplotlib, without a screen."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np


def _figure(width: float, height: float):  # noqa: ANN202
    from matplotlib.figure import Figure  # slow to import, and only used here

    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def _records(metrics: Path) -> Iterator[dict]:
    """The records of metrics.jsonl; a line that a crash cut short is passed over."""
    for line in metrics.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def curves(metrics: Path, picture: Path, keys: Sequence[str]) -> None:
    """Loss and learning rate, and the validation scores `keys`, against the step, from
    metrics.jsonl."""
    records = list(_records(metrics))
    train = [r for r in records if r["kind"] == "train"]
    evals = [r for r in records if r["kind"] == "eval"]
    figure = _figure(11, 3.6)
    left, middle, right = figure.subplots(1, 3)
    steps = [r["step"] for r in train]
    dots = {"linewidth": 1, "marker": "o" if len(train) < 10 else ""}
    left.plot(steps, [r["loss"] for r in train], **dots)
    left.set(title="training loss", xlabel="step")
    middle.plot(steps, [r["lr"] for r in train], color="tab:green", **dots)
    middle.set(title="learning rate", xlabel="step", ylim=(0, None))
    for key in keys:
        points = [(r["step"], r[key]) for r in evals if key in r]
        if points:
            right.plot(*zip(*points, strict=True), marker="o", markersize=3, label=key)
    right.set(title="validation", xlabel="step", ylim=(0, 1))
    if evals:
        right.legend(loc="lower right")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.savefig(picture)


def confusion(matrix: np.ndarray, names: Sequence[str], picture: Path) -> None:
    """Each true class (row) as shares of the predicted ones (columns); matrix: counts [K,K]."""
    total = matrix.sum(axis=1, keepdims=True)
    share = np.divide(matrix, total, out=np.zeros(matrix.shape), where=total > 0)
    side = 1.8 + 0.4 * len(names) + 0.08 * max(map(len, names))  # inches; names stand on two sides
    figure = _figure(side + 0.6, side)
    axes = figure.subplots()
    figure.colorbar(axes.imshow(share, vmin=0, vmax=1, cmap="Blues"), shrink=0.8)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true", title="share of the true class")
    if len(names) <= 32:
        for i, j in np.argwhere(share >= 0.005):
            colour = "white" if share[i, j] > 0.5 else "black"
            axes.text(
                j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=7, color=colour
            )
    figure.savefig(picture)


def trimap(widths: Sequence[int], values: Sequence[float | None], picture: Path) -> None:
    """mIoU of the pixels near a boundary against the width of that band in pixels."""
    figure = _figure(5.2, 3.6)
    axes = figure.subplots()
    values = [float("nan") if value is None else 100 * value for value in values]
    axes.plot(widths, values, marker="o", markersize=3)
    axes.set(title="trimap", xlabel="width of the band, pixels", ylabel="mIoU, %", xlim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(picture)
