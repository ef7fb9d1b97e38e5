"""Seconds of the dense CRF beside pydensecrf2's, in turns on the same input; see bench_crf.sh.

    python scripts/bench_crf.py --peer .venv-crf/bin/python --image photo.jpg

Ours includes everything but the compilation: checks, lattices, iterations. The other's includes its
set-up likewise. pydensecrf runs on one core, ours on as many as the process may use.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def make_input(image: str | None, size: tuple[int, int], classes: int) -> dict[str, np.ndarray]:
    """An image uint8 [H,W,3], and -log P float32 [H,W,K] of random blocks.

    Without a file: blurred colours and noise, with about as many lattice vertices as a photograph.
    """
    from PIL import Image

    rng = np.random.default_rng(0)
    height, width = size
    if image:
        photo = Image.open(image).convert("RGB").resize((width, height))
    else:
        coarse = Image.fromarray(rng.integers(0, 256, (height // 40, width // 40, 3), np.uint8))
        photo = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        photo = (photo + rng.normal(0, 6, photo.shape)).clip(0, 255).astype(np.uint8)
    logits = 2 * rng.normal(size=(height // 15 + 1, width // 15 + 1, classes))
    logits = logits.repeat(15, 0).repeat(15, 1)[:height, :width]
    unary = np.log(np.exp(logits).sum(-1, keepdims=True)) - logits
    return {"image": np.array(photo), "unary": unary.astype(np.float32)}


def ours(unary: np.ndarray, image: np.ndarray, parameters: dict) -> Callable[[], np.ndarray]:
    """A call that runs the mean field on the CPU and returns Q."""
    from jaxseg.ops.crf import mean_field

    return lambda: np.asarray(mean_field(unary, image, **parameters, method="permutohedral"))


def theirs(unary: np.ndarray, image: np.ndarray, parameters: dict) -> Callable[[], np.ndarray]:
    """The same through pydensecrf."""
    from pydensecrf import densecrf

    height, width, classes = unary.shape
    energy = np.ascontiguousarray(unary.reshape(-1, classes).T)
    kinds = {"symmetric": densecrf.NORMALIZE_SYMMETRIC, "pixel": densecrf.NORMALIZE_AFTER}
    p, normalization = parameters, kinds[parameters["normalization"]]

    def run() -> np.ndarray:
        crf = densecrf.DenseCRF2D(width, height, classes)
        crf.setUnaryEnergy(energy)
        crf.addPairwiseGaussian(
            sxy=p["sigma_gamma"], compat=p["w_gaussian"], normalization=normalization
        )
        crf.addPairwiseBilateral(
            sxy=p["sigma_xy"],
            srgb=p["sigma_rgb"],
            rgbim=image,
            compat=p["w_bilateral"],
            normalization=normalization,
        )
        q = np.array(crf.inference(p["iterations"]))
        return q.reshape(classes, height, width).transpose(1, 2, 0)

    return run


def serve(folder: Path, parameters: dict) -> None:
    """In the other environment: one run a line of standard input, its seconds as the answer."""
    with np.load(folder / "input.npz", allow_pickle=False) as data:
        run = theirs(data["unary"], data["image"], parameters)
    for _ in sys.stdin:
        begin = time.perf_counter()
        q = run()
        print(time.perf_counter() - begin, flush=True)
        np.save(folder / "theirs.npy", q)


def compare(args: argparse.Namespace, folder: Path, name: str) -> None:
    """Prints the times of one parameter set, the two in turns, and how far the labels agree."""
    from jaxseg.ops.crf import PARAMETERS

    parameters = PARAMETERS[name] | {"iterations": args.iterations}
    with np.load(folder / "input.npz", allow_pickle=False) as data:
        run = ours(data["unary"], data["image"], parameters)
    command = [args.peer, __file__, "--serve", str(folder)]
    command += [f"--set={key}={value}" for key, value in parameters.items()]
    begin = time.perf_counter()
    run()
    first = time.perf_counter() - begin
    times: dict[str, list[float]] = {"jaxseg": [], "pydensecrf2": []}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as peer:
        for _ in range(args.repeats):
            begin = time.perf_counter()
            q = run()
            times["jaxseg"].append(time.perf_counter() - begin)
            peer.stdin.write("\n")
            peer.stdin.flush()
            times["pydensecrf2"].append(float(peer.stdout.readline()))
    print(f"{name}: {', '.join(f'{key} {value}' for key, value in parameters.items())}")
    for key, seconds in times.items():
        print(f"  {key:12} median {np.median(seconds):.3f} s, {min(seconds):.3f} to ", end="")
        print(f"{max(seconds):.3f}")
    ratio = np.median(times["jaxseg"]) / np.median(times["pydensecrf2"])
    agree = (q.argmax(-1) == np.load(folder / "theirs.npy", allow_pickle=False).argmax(-1)).mean()
    print(f"  ratio {ratio:.2f}; {agree:.2%} of the labels agree; first call {first:.1f} s")


def number(text: str) -> int | float | str:
    """A value of --set."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="the Python that has pydensecrf2")
    parser.add_argument("--image", help="a photograph; without, one made up")
    parser.add_argument("--size", type=int, nargs=2, default=(375, 500), metavar=("H", "W"))
    parser.add_argument("--classes", type=int, default=21)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--parameters", nargs="+", default=["pydensecrf", "largefov", "deeplabv2"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--set", action="append", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        pairs = (pair.split("=") for pair in args.set)
        serve(Path(args.serve), {key: number(value) for key, value in pairs})
        return
    if not args.peer:
        parser.error("--peer is needed: run scripts/bench_crf.sh")
    with tempfile.TemporaryDirectory() as name:
        np.savez(Path(name) / "input.npz", **make_input(args.image, args.size, args.classes))
        cores = os.cpu_count()
        print(f"{args.size[0]}x{args.size[1]}, {args.classes} classes, {cores} cores")
        for parameters in args.parameters:
            compare(args, Path(name), parameters)


if __name__ == "__main__":
    main()
