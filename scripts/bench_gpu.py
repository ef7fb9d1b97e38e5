"""Training and inference on an accelerator: share of its peak, beside torch.compile, and kernels.

    python scripts/bench_gpu.py                    # realistic sizes, bfloat16: 84 rows
    python scripts/bench_gpu.py --sizes 512 --batches 16    # 14 of them
    python scripts/bench_gpu.py --kernels          # also the kernels that take the longest
    python scripts/bench_gpu.py --toy              # minutes on a CPU: shows that it runs

MFU is the share of the measured peak of a large matrix product; training counts three forward
passes. Where PyTorch, torchvision, segmentation_models_pytorch and timm are installed, and torch
has CUDA, the network of the same architecture runs in turns with ours, compiled, in channels_last
under autocast; elsewhere ours runs alone. A row that fails, for want of memory, says so and the
next one follows. At the end the exact dense CRF of 500x375, 21 classes. Sides of 768 stand for 769,
of which segmentation_models.pytorch's encoders and our networks without aligned corners are no
multiple.
"""

import argparse
import importlib.util
import os
import time
from collections.abc import Sequence

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too

import jax  # noqa: E402
import numpy as np  # noqa: E402
from bench_crf import make_input  # noqa: E402
from bench_peers import (  # noqa: E402
    alternate,
    check_parameters,
    configured,
    kernels,
    ours,
    theirs,
)
from pairs import PAIRS  # noqa: E402

from jaxseg.ops.crf import PARAMETERS, mean_field  # noqa: E402
from jaxseg.verbs import benchmark  # noqa: E402

NETWORKS = (
    *("fcn_r101", "deeplabv3_r101", "deeplabv3plus_r50", "deeplabv3plus_r101"),
    *("deeplabv3plus_xception65", "pspnet_r101", "unet_same"),
)


PEERS = ("torch", "torchvision", "segmentation_models_pytorch", "timm")


def there() -> bool:
    """Whether the peers can be built."""
    return all(importlib.util.find_spec(name) for name in PEERS)


def row(name: str, size: int, batch: int, mode: str, args: argparse.Namespace) -> dict:
    """Measures one network; with its kernels where asked."""
    pair = PAIRS[name]
    config = configured(pair, size, batch, mode, args.dtype)
    work = ours(config, mode)
    runs = [work.run]
    if there():
        import torch

        check_parameters(pair, config)
        if torch.cuda.is_available():
            torch.backends.cudnn.benchmark = True
            torch.cuda.empty_cache()  # what the row before held
            runs.append(theirs(pair, config, mode, compiled=True, device="cuda"))
    taken = alternate(runs, args.seconds)
    median = np.median(taken, axis=0)
    found = {
        **{"network": name, "size": size, "batch": batch, "mode": mode},
        **{"images_per_s": batch / median[0], "ms": 1e3 * median[0]},
        **{"mfu": work.flops / median[0] / args.peak, "compile_s": work.compile_s},
        **{"peak_gb": work.peak_bytes / 1e9, "ratio": float("nan")},
    }
    if len(runs) > 1:
        found["ratio"] = float(np.median(taken[:, 1] / taken[:, 0]))
    found["kernels"] = kernels(work.run) if args.kernels else []
    return found


def crf(size: tuple[int, int], seconds: float, iterations: int = 10) -> float:
    """Seconds of the exact mean field, 21 classes."""
    data = make_input(None, size, 21)
    settings = PARAMETERS["deeplabv2"] | {"iterations": iterations}
    image, unary = jax.device_put(data["image"]), jax.device_put(data["unary"])
    run = jax.jit(lambda u, x: mean_field(u, x, **settings, method="exact"))
    taken = benchmark.timed(lambda: jax.block_until_ready(run(unary, image)), seconds)
    return float(np.median(taken))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=PAIRS, default=NETWORKS)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 768])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--modes", nargs="+", choices=benchmark.MODES, default=benchmark.MODES)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each row")
    parser.add_argument("--kernels", action="store_true", help="print the costliest ones")
    parser.add_argument("--toy", action="store_true", help="tiny, for a CPU")
    args = parser.parse_args(argv)
    if args.toy:
        args.networks, args.sizes, args.batches = ["deeplabv3plus_mobilenetv2"], [64], [8]
        args.seconds, args.kernels = 0.0, True
    args.peak, memory = benchmark.peaks(args.dtype)
    args.peak *= jax.device_count()
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    peers = "no peers"
    if there():
        import torch

        peers = f"torch {torch.__version__}"
    print(f"{device}, jax {jax.__version__}, {peers}, {args.dtype}")
    print(f"measured on one: {args.peak / 1e12:.3g} TFLOP/s, {memory / 1e9:.4g} GB/s")
    begin = time.perf_counter()
    print(
        f"{'network':27}{'size':>5}{'batch':>6} {'mode':6}{'images/s':>9}{'MFU':>6}  over torch"
        f"{'ms':>9}{'GB':>6}{'compile s':>10}"
    )
    for name in args.networks:
        for size in args.sizes:
            for batch in args.batches:
                for mode in args.modes:
                    head = f"{name:27}{size:5}{batch:6} {mode:6}"
                    try:
                        found = row(name, size, batch, mode, args)
                    except (RuntimeError, ValueError) as error:  # memory, of either library
                        print(f"{head} {str(error).splitlines()[0]}", flush=True)
                        continue
                    finally:
                        jax.clear_caches()
                    print(
                        f"{head}{found['images_per_s']:9.1f}{found['mfu']:6.1%}"
                        f"{found['ratio']:12.2f}{found['ms']:9.1f}{found['peak_gb']:6.1f}"
                        f"{found['compile_s']:10.0f}",
                        flush=True,
                    )
                    for kernel, ms, calls in found["kernels"]:
                        print(f"    {ms:9.3f} ms {calls:4} x {kernel}")
    size = (24, 32) if args.toy else (375, 500)
    print(f"exact CRF, {size[1]}x{size[0]}, 10 iterations: {crf(size, args.seconds):.3f} s")
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
