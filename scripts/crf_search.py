"""Searches the dense CRF's parameters on saved logits, coarse to fine, as DeepLab did.

    python -m jaxseg.main predict --workdir runs/x --input val/images --output logits --save_logits
    python scripts/crf_search.py --logits logits --images val/images --labels val/masks \
        --output best.json
    python -m jaxseg.main eval --workdir runs/x --config.eval.crf=best.json

DeepLab v1 (section 5.2) and v2 cross-validate w_bilateral, sigma_xy and sigma_rgb on 100 images of
the validation set, with the Gaussian term fixed at weight 3 and 3 pixels and 10 iterations. Here,
every other value of each range comes first; then the neighbours of the best set, again and again,
until none is better. Files belong together by name: NAME.npz with `logits` [H,W,K], the image, and
a mask of ids with 255 for pixels that do not count.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.data.files import find_images, read_image, read_values
from jaxseg.errors import InputError
from jaxseg.ops.crf import METHODS, NORMALIZATIONS, mean_field
from jaxseg.ops.metrics import confusion, scores

RANGES = {"w_bilateral": "3:6", "sigma_xy": "30:10:100", "sigma_rgb": "3:6"}
PAD = 128  # images are padded to a multiple, so that most share one compiled program

Example = tuple[Path, Path, Path]  # logits, image, label


def find_examples(logits: Path, images: Path, labels: Path, limit: int) -> list[Example]:
    """The files that belong together, the first `limit` by name. Raises InputError for gaps."""
    for folder in (logits, images, labels):
        if not folder.is_dir():
            raise InputError(f"no folder {folder}")
    image_of, label_of = ({p.stem: p for p in find_images(f)} for f in (images, labels))
    paths = [p for p in sorted(logits.glob("*.npz")) if not p.stem.endswith("_probabilities")]
    paths = paths[:limit]
    if not paths:
        raise InputError(f"{logits} has no NAME.npz: make them with predict --save_logits")
    for path in paths:
        for kind, files, folder in (("image", image_of, images), ("label", label_of, labels)):
            if path.stem not in files:
                raise InputError(f"{folder} has no {kind} {path.stem} for {path}")
    return [(path, image_of[path.stem], label_of[path.stem]) for path in paths]


def read_example(example: Example) -> dict[str, np.ndarray]:
    """unary float32 [H,W,K], image uint8 [H,W,3], label uint8 [H,W], valid bool [H,W]; padded.

    Raises InputError for a file without logits, sizes that differ, and ids that are no class.
    """
    path, image, label = example[0], read_image(example[1], 3), read_values(example[2])
    try:
        with np.load(path, allow_pickle=False) as data:
            logits = data["logits"].astype(np.float32)
    except (KeyError, ValueError, OSError) as error:
        raise InputError(f"{path} has no array `logits`: {error}") from error
    if logits.ndim != 3 or {image.shape[:2], label.shape} != {logits.shape[:2]}:
        raise InputError(
            f"{path} has logits {logits.shape}, its image is {image.shape[:2]} and its label "
            f"{label.shape}: needs (H, W, K) with the same H and W"
        )
    if image.dtype != np.uint8:
        raise InputError(f"image {example[1]} has 16 bits a channel: needs 8")
    strange = np.setdiff1d(label, [*range(logits.shape[2]), 255])
    if strange.size:
        raise InputError(
            f"label {example[2]} has the id {strange[0]}: needs 0 to {logits.shape[2] - 1}, or 255"
        )
    arrays = {
        "unary": np.asarray(-jax.nn.log_softmax(logits)),
        "image": image,
        "label": label.astype(np.uint8),
        "valid": np.ones(label.shape, bool),
    }
    pads = [(0, -side % PAD) for side in label.shape]
    fill = {"label": 255}
    return {
        key: np.pad(a, (*pads, *[(0, 0)] * (a.ndim - 2)), constant_values=fill.get(key, 0))
        for key, a in arrays.items()
    }


@partial(jax.jit, static_argnames=("iterations", "normalization", "method"))
def count(
    example: dict[str, jax.Array], searched: dict[str, jax.Array], **fixed: float | str
) -> jax.Array:
    """The confusion matrix int32 [K,K] of one image after its CRF."""
    q = mean_field(example["unary"], example["image"], valid=example["valid"], **searched, **fixed)
    return confusion(q.argmax(-1), example["label"], q.shape[-1])


def search(
    axes: dict[str, Sequence[float]], score: Callable[[dict[str, float]], float]
) -> tuple[dict[str, float], float, int]:
    """The best point of a grid, coarse to fine: (point, its score, how many were scored)."""
    seen: dict[tuple[int, ...], float] = {}

    def best_of(indices: itertools.product) -> tuple[int, ...]:
        for index in indices:
            if index not in seen:
                values = (axis[i] for axis, i in zip(axes.values(), index, strict=True))
                seen[index] = score(dict(zip(axes, values, strict=True)))
        return max(seen, key=seen.get)

    sizes = [len(axis) for axis in axes.values()]
    best = best_of(itertools.product(*(range(0, n, 2) for n in sizes)))
    while True:
        near = [range(max(i - 1, 0), min(i + 2, n)) for i, n in zip(best, sizes, strict=True)]
        better = best_of(itertools.product(*near))
        if better == best:
            point = {name: axis[i] for (name, axis), i in zip(axes.items(), best, strict=True)}
            return point, seen[best], len(seen)
        best = better


def parse_range(name: str, text: str) -> list[float]:
    """ "3:6" as [3, 4, 5, 6], "30:10:100" as [30, 40, .., 100]; "4" as [4]."""
    try:
        numbers = [float(part) for part in text.split(":")]
        first, step, last = {1: numbers * 3, 2: [*numbers[:1], 1.0, *numbers[1:]]}.get(
            len(numbers), numbers
        )
        if min(numbers) <= 0 or last < first:
            raise ValueError
    except ValueError:
        raise InputError(
            f"{name} {text}: needs FIRST:LAST or FIRST:STEP:LAST, above 0, such as {RANGES[name]}"
        ) from None
    return [first + step * i for i in range(int((last - first) / step + 1e-6) + 1)]


def run(args: argparse.Namespace) -> None:
    """Searches, prints every point, and writes the best one as JSON."""
    axes = {name: parse_range(name, getattr(args, name)) for name in RANGES}
    examples = find_examples(args.logits, args.images, args.labels, args.limit)
    fixed = {name: getattr(args, name) for name in ("w_gaussian", "sigma_gamma", "iterations")}
    fixed |= {"normalization": args.normalization, "method": args.method}

    def score(point: dict[str, float]) -> float:
        searched = {name: jnp.float32(value) for name, value in point.items()}
        total = sum(
            np.asarray(count(read_example(example), searched, **fixed), np.int64)
            for example in examples
        )
        value = scores(total)["mIoU"]
        if value is None:
            raise InputError(f"{args.labels}: every pixel is 255, nothing to score")
        settings = ", ".join(f"{name} {number:g}" for name, number in point.items())
        print(f"{settings}: mIoU {100 * value:.2f}", flush=True)
        return value

    best, value, scored = search(axes, score)
    result = best | fixed | {"mIoU": value, "images": len(examples)}
    print(f"best of {scored}: {json.dumps(result)}")
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--logits", type=Path, required=True, help="folder of NAME.npz")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=100, help="images, the first by name")
    for name, text in RANGES.items():
        parser.add_argument(f"--{name}", default=text, help=f"range, default {text}")
    parser.add_argument("--w_gaussian", type=float, default=3.0)
    parser.add_argument("--sigma_gamma", type=float, default=3.0)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--normalization", choices=NORMALIZATIONS, default="pixel")
    parser.add_argument("--method", choices=METHODS, help="default: as mean_field")
    parser.add_argument("--output", type=Path, help="a JSON file for the best set")
    try:
        run(parser.parse_args())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
