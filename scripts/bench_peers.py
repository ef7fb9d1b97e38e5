"""Each network beside the PyTorch network of the very same architecture, in one run.

    ./scripts/bench_peers.sh
    ./scripts/bench_peers.sh --networks unet segnet --sizes 256 --modes infer

Both take the same uint8 images and normalise them, on the same cores; blocks of repetitions
alternate, and the ratio is the median of torch's time over ours, above 1 where we are faster.
Training is forward, cross entropy at full size, backward and SGD with momentum; inference gives the
logits at full size. PyTorch runs eagerly in channels_last, with --compile also through
torch.compile, and the faster one counts. --kernels names the costliest of ours. Two other
comparisons, instead:

    ./scripts/bench_peers.sh --metrics    # the mean IoU beside torchmetrics'
    ./scripts/bench_peers.sh --loss       # a loss in blocks beside the plain one: memory and time
"""

import argparse
import collections
import contextlib
import glob
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from pairs import PAIRS, Pair
from parity import without_operators

from jaxseg import models, sharding
from jaxseg.compiler import options
from jaxseg.experiment import resolve
from jaxseg.ops import metrics, nll
from jaxseg.verbs import benchmark

CLASSES = 21
REST, BLOCK = 0.3, 3  # seconds, repetitions


def configured(pair: Pair, size: int, batch: int, mode: str, dtype: str):
    """Our config of a pair: 21 classes, plain SGD, inputs of size x size less the margin."""
    side = size - pair.margin
    overrides = {
        **{"model.num_classes": CLASSES, "optim.name": "sgd", "optim.multipliers": ()},
        **{"optim.lr": 1e-4, "optim.momentum": 0.9, "optim.clip": 0.0, "train.ema": 0.0},
        **{"data.border_weight": 0.0, "train.compute_dtype": dtype, "loss.pixel.reduction": "mean"},
        **{"loss.pixel.class_weights": (), **pair.overrides},
    }
    if "segnet" not in pair.config and "unet" not in pair.config:
        del overrides["loss.pixel.class_weights"]
    config = resolve(pair.config, [(key, str(value)) for key, value in overrides.items()])
    return benchmark.configured(config, mode, (side, side), batch)


def ours(config, mode: str) -> benchmark.Work:
    if mode == "train":
        return benchmark.prepare(config, mode)
    mesh, host = sharding.make_mesh(config.mesh), benchmark.synthetic(config, config.eval.batch)
    work = benchmark.inference(config, mesh, host, logits=True)
    return work._replace(flops=config.eval.batch * benchmark.forward_flops(config))


def theirs(
    pair: Pair, config, mode: str, compiled: bool = False, device: str = "cpu"
) -> Callable[[], None]:
    """One repetition of the peer's work."""
    import torch
    import torch.nn.functional as F

    bf16 = config.train.compute_dtype == "bfloat16"
    torch.manual_seed(0)
    torch.compiler.reset()  # else later networks meet the limit of recompilations
    net = pair.peer(CLASSES).to(device, memory_format=torch.channels_last)
    batch = config["train" if mode == "train" else "eval"].batch
    host = benchmark.synthetic(config, batch)
    image = torch.from_numpy(host["image"]).to(device)
    label = torch.from_numpy(host["label"]).long().to(device)
    mean, std = (torch.tensor(config.data[key], device=device) for key in ("mean", "std"))

    def forward(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        x = ((image.float() - mean) / std).permute(0, 3, 1, 2)  # NHWC is channels_last
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            y = net(x)
        y = (y["out"] if isinstance(y, dict) else y).float()
        cut = "unet" in pair.config or y.shape[2:] == size
        return y if cut else F.interpolate(y, size=size, mode="bilinear", align_corners=False)

    def objective(image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        y = forward(image, label.shape[1:])
        edge = (label.shape[1] - y.shape[2]) // 2
        label = label[:, edge : edge + y.shape[2], edge : edge + y.shape[3]]
        return F.cross_entropy(y, label, ignore_index=255)

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    if mode == "infer":
        net.eval()
        run = torch.compile(forward, dynamic=False) if compiled else forward

        def once() -> None:
            with torch.inference_mode():
                run(image, image.shape[1:3])
            wait()

        return once
    net.train()
    rule = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-4, "fused": True}
    optimizer = torch.optim.SGD(net.parameters(), **rule)
    run = torch.compile(objective, dynamic=False) if compiled else objective

    def once() -> None:
        optimizer.zero_grad(set_to_none=True)
        run(image, label).backward()
        optimizer.step()
        wait()

    return once


def check_parameters(pair: Pair, config) -> int:
    """The number of parameters. Raises ValueError where the two sides do not have as many."""
    model, _, _ = models.build(config)
    image = jax.ShapeDtypeStruct((1, *config.data.crop, config.data.channels), np.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    have = sum(x.size for x in jax.tree.leaves(shapes["params"]))
    want = sum(p.numel() for p in pair.peer(CLASSES).parameters())
    if have != want:
        raise ValueError(f"{pair.config}: {have:,} parameters, the peer has {want:,}")
    return have


def alternate(runs: Sequence[Callable], seconds: float, least: int = 5) -> np.ndarray:
    """Seconds of a repetition [n, runs]: of BLOCK in a row, after one that is not counted, the
    median; one block of each in turn.

    So both are measured at work. After a pause a program first finds its memory given back to the
    system; and before each block is a rest, since OpenMP's threads, which PyTorch's are, wait for
    more work in a loop that takes a core from what runs next.
    """
    taken, begin = [], time.perf_counter()
    while len(taken) < least or time.perf_counter() - begin < seconds:
        row = []
        for run in runs:
            time.sleep(REST)
            times = []
            for _ in range(BLOCK + 1):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            row.append(np.median(times[1:]))
        taken.append(row)
    return np.array(taken)


@contextlib.contextmanager
def apart(point: dict) -> Iterator[Callable[[], None]]:
    """One repetition of the peer's work, in a process of its own: in one, each side finds the
    memory that it uses again and again given back to the system by the other."""
    words = [sys.executable, __file__, "--peer", json.dumps(point)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:

        def once() -> None:
            child.stdin.write("\n")
            child.stdin.flush()
            if not child.stdout.readline():
                raise RuntimeError(f"the peer of {point['name']} ended")

        yield once
        child.stdin.close()


def serve(name: str, size: int, batch: int, mode: str, dtype: str, compiled: bool) -> None:
    """The other side of `apart`: a repetition for every line."""
    run = theirs(PAIRS[name], configured(PAIRS[name], size, batch, mode, dtype), mode, compiled)
    for _ in sys.stdin:
        run()
        print("done", flush=True)


def compare(name: str, size: int, mode: str, args: argparse.Namespace) -> dict:
    """One row of the table."""
    pair = PAIRS[name]
    config = configured(pair, size, args.batch, mode, args.dtype)
    parameters = check_parameters(pair, config)
    work = ours(config, mode)
    point = {"name": name, "size": size, "batch": args.batch, "mode": mode, "dtype": args.dtype}
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(apart({**point, "compiled": False}))]
        runs += [stack.enter_context(apart({**point, "compiled": True}))] if args.compile else []
        taken = alternate([work.run, *runs], args.seconds)
    peer = 1 + int(np.median(taken[:, 1:], axis=0).argmin())
    found = {
        **{"network": name, "size": size, "batch": args.batch, "mode": mode},
        **{"parameters": parameters, "ms": 1e3 * float(np.median(taken[:, 0]))},
        **{"torch_ms": 1e3 * float(np.median(taken[:, peer])), "repetitions": len(taken)},
        **{"torch": "compile" if peer == 2 else "eager", "compile_s": work.compile_s},
        **{"peak_bytes": work.peak_bytes, "gflops_per_s": 0.0},
    }
    found["gflops_per_s"] = work.flops / found["ms"] / 1e6
    found["ratio"] = float(np.median(taken[:, peer] / taken[:, 0]))
    found["kernels"] = kernels(work.run) if args.kernels else []
    return found


def kernels(run: Callable, count: int = 12, repetitions: int = 3) -> list[tuple[str, float, int]]:
    """(name, milliseconds, calls) of one repetition's costliest kernels, by the profiler."""
    total, calls = collections.Counter(), collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repetitions):
                run()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        for plane in jax.profiler.ProfileData.from_file(path).planes:
            for event in (event for line in plane.lines for event in line.events):
                if operation := dict(event.stats).get("hlo_op"):
                    name = operation if event.name == operation else f"{operation} ({event.name})"
                    total[name] += event.duration_ns
                    calls[name] += 1
    return [
        (name, ns / 1e6 / repetitions, calls[name] // repetitions)
        for name, ns in total.most_common(count)
    ]


def mean_iou(images: int, seconds: float, size: tuple[int, int] = (360, 480)) -> None:
    """Images a second of the confusion matrix of 11 classes: ours and torchmetrics'.

    validate_args=False: torchmetrics' look for values out of range is left out, though ours has it.
    """
    import torch

    without_operators()  # torchmetrics imports torchvision
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    rng, classes = np.random.default_rng(0), 11
    truth = rng.integers(0, classes + 1, (images, *size), np.int32)
    truth = np.where(truth == classes, 255, truth)
    said = rng.integers(0, classes, truth.shape, np.int32)
    a, b = jax.device_put(said), jax.device_put(truth)
    p, t = torch.from_numpy(said), torch.from_numpy(truth)
    count = jax.jit(lambda a, b: metrics.confusions(a, b, classes), compiler_options=options())

    def peer() -> torch.Tensor:
        return multiclass_confusion_matrix(p, t, classes, ignore_index=255, validate_args=False)

    assert (np.asarray(count(a, b)).sum(0) == peer().numpy()).all()
    taken = alternate([lambda: jax.block_until_ready(count(a, b)), peer], seconds)
    rates = images / np.median(taken, axis=0)
    print(f"mean IoU of {size[1]}x{size[0]}, 11 classes: {rates[0]:.0f} images/s, torchmetrics")
    print(f"{rates[1]:.0f}; ratio {np.median(taken[:, 1] / taken[:, 0]):.2f}")


def loss_in_blocks(seconds: float, classes: int = 150, side: int = 512, batch: int = 1) -> None:
    """Memory and time of cross entropy at full size and of its gradient: blocks, and whole.

    Of logits at stride 4 alone, as DeepLab v3+ gives them; then of its training step.
    """
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(batch, side // 4, side // 4, classes)), jnp.float32)
    label = jnp.asarray(rng.integers(0, classes, (batch, side, side)), jnp.int32)

    def alone() -> benchmark.Work:
        step = jax.value_and_grad(lambda x: nll.upsampled_nll(x, label).mean())
        program, work = benchmark.compiled(jax.jit(step), logits)
        return work._replace(run=lambda: jax.block_until_ready(program(logits)))

    def whole_step() -> benchmark.Work:
        config = configured(PAIRS["deeplabv3plus_r50"], side, batch, "train", "float32")
        config.model.num_classes = classes
        return benchmark.prepare(config, "train")

    for name, prepare in (("the loss alone", alone), ("a step of DeepLab v3+ R50", whole_step)):
        works = []
        for whole in (nll.WHOLE, 2**40):
            with mock.patch.object(nll, "WHOLE", whole):
                works.append(prepare())
            jax.clear_caches()
        taken = alternate([work.run for work in works], seconds)
        blocks, plain = works
        print(
            f"{name}, {classes} classes, {side}x{side}: {blocks.peak_bytes / 2**20:.0f} MiB and "
            f"{1e3 * np.median(taken[:, 0]):.0f} ms in blocks, {plain.peak_bytes / 2**20:.0f} MiB "
            f"and {1e3 * np.median(taken[:, 1]):.0f} ms whole; time ratio "
            f"{np.median(taken[:, 0] / taken[:, 1]):.2f}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    small = [name for name in PAIRS if "r101" not in name]
    parser.add_argument("--networks", nargs="+", choices=PAIRS, default=small)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--modes", nargs="+", choices=benchmark.MODES, default=benchmark.MODES)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each row")
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--kernels", action="store_true", help="our costliest ones")
    parser.add_argument("--metrics", action="store_true", help="only the mean IoU")
    parser.add_argument("--loss", action="store_true", help="only the loss in blocks")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    parser.add_argument("--peer", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    import torch  # not at the top: bench_gpu.py runs without it

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if args.peer:
        serve(**args.peer)
        return
    if args.metrics:
        mean_iou(1000, args.seconds)
        return
    if args.loss:
        loss_in_blocks(args.seconds)
        return
    head = f"{'network':27}{'size':>5} {'mode':6}{'ms':>8}{'torch':>8} {'ratio':>6}{'GFLOP/s':>9}"
    print("" if args.json else head, flush=True)
    for name in args.networks:
        for size in args.sizes:
            for mode in args.modes:
                row = compare(name, size, mode, args)
                jax.clear_caches()
                text = (
                    f"{name:27}{size:5} {mode:6}{row['ms']:8.0f}{row['torch_ms']:8.0f} "
                    f"{row['ratio']:6.2f}{row['gflops_per_s']:9.0f}"
                )
                print(json.dumps(row) if args.json else text, flush=True)
                for kernel, ms, calls in [] if args.json else row["kernels"]:
                    print(f"    {ms:9.3f} ms {calls:4} x {kernel}")


if __name__ == "__main__":
    main()
