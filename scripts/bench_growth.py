"""Time and memory of a training step as image area, batch, classes and devices grow: one plot.

    python scripts/bench_growth.py --output growth.png
    python scripts/bench_growth.py --meshes    # a table instead: eight devices in each arrangement

The network is DeepLab v3+ on MobileNetV2. Devices are those that there are, or on a CPU forced
ones, which share its cores: a perfect program takes the same time on any number of them. Each point
runs in a process of its own.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

AXES = {
    "side": (256, 512, 1024, 2048),  # pixels of a square image
    "batch": (1, 2, 4, 8, 16),
    "classes": (2, 8, 32, 128, 512),
    "devices": (1, 2, 4, 8),
}
FIXED = {"side": 256, "batch": 1, "classes": 21, "devices": 1}
MESHES = [  # data, fsdp, space
    *((1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8)),
    *((2, 2, 2), (4, 2, 1), (2, 1, 4)),
]


def measure(
    side: int, batch: int, classes: int, devices: int, mesh: Sequence[int] | None = None
) -> dict:
    """ms and peak_bytes of a device, in this process, which must have so many devices.

    mesh: data, fsdp and space; None: all devices along data.
    """
    from jaxseg.experiment import resolve
    from jaxseg.verbs import benchmark

    data, fsdp, space = mesh or (devices, 1, 1)
    given = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.space": space}
    given["model.num_classes"] = classes
    argument = "experiments/deeplabv3plus.py:recipe=smp,backbone=mobilenetv2"
    config = resolve(argument, [(key, str(value)) for key, value in given.items()])
    config = benchmark.configured(config, "train", (side, side), batch)
    work = benchmark.prepare(config, "train")
    seconds = sorted(benchmark.timed(work.run, 5.0))
    return {"ms": 1e3 * seconds[len(seconds) // 2], "peak_bytes": work.peak_bytes}


def apart(point: dict) -> dict:
    """`measure` in a process with that many devices."""
    forced = f"--xla_force_host_platform_device_count={point['devices']}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {forced}"
    words = [sys.executable, __file__, "--point", json.dumps(point)]
    env = {**os.environ, "XLA_FLAGS": flags.strip()}
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{point}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def points(axis: str, values: Sequence[int], fixed: dict) -> list[dict]:
    """One point a value; with several devices the batch has an image for each of the most."""
    start = {**fixed, "batch": max(values)} if axis == "devices" else fixed
    return [{**start, axis: value} for value in values]


def by_mesh(fixed: dict) -> None:
    """Prints the rows of MESHES, at a batch that all of them divide."""
    for mesh in MESHES:
        point = {**fixed, "batch": 8 * fixed["batch"], "devices": math.prod(mesh), "mesh": mesh}
        row = apart(point)
        print(f"data={mesh[0]} fsdp={mesh[1]} space={mesh[2]}{_text(row)}", flush=True)


def _text(row: dict) -> str:
    return f"{row['ms']:9.1f} ms {row['peak_bytes'] / 1e9:7.3f} GB of a device"


def plot(found: dict[str, list[tuple[dict, dict]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    figure, panels = plt.subplots(
        2, len(found), figsize=(3.2 * len(found), 5), sharex="col", squeeze=False
    )
    for column, (axis, rows) in zip(panels.T, found.items(), strict=True):
        names = [point[axis] for point, _ in rows]
        x = [name**2 for name in names] if axis == "side" else names  # by pixels
        for panel, key, unit in zip(column, ("ms", "peak_bytes"), (1, 1e9), strict=True):
            y = [row[key] / unit for _, row in rows]
            panel.loglog(x, y, "o-")
            panel.set_ylim(min(y) / 1.5, max(15 * min(y), 1.5 * max(y)))  # a decade at least
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            panel.minorticks_off()
        panel.set_xticks(x, names)
        panel.set_xlabel(axis)
    panels[0, 0].set_ylabel("ms a step")
    panels[1, 0].set_ylabel("GB of a device")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("growth.png"))
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    for axis, values in AXES.items():
        parser.add_argument(f"--{axis}", type=int, nargs="+", default=values)
    parser.add_argument("--fixed", type=json.loads, default=FIXED, help="what does not grow")
    parser.add_argument("--meshes", action="store_true", help="only the arrangements of a mesh")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.point:
        print(json.dumps(measure(**args.point)))
        return
    if args.meshes:
        by_mesh(args.fixed)
        return
    found = {}
    for axis in args.axes:
        found[axis] = []
        for point in points(axis, getattr(args, axis), args.fixed):
            row = apart(point)
            found[axis].append((point, row))
            print(f"{axis:8}{point[axis]:6}{_text(row)}", flush=True)
    plot(found, args.output)
    print(f"drawn in {args.output}")


if __name__ == "__main__":
    main()
