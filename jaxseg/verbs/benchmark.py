"""The verb `benchmark`: what a training step or the labels of a batch cost here, on noise."""

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxseg import models, sharding
from jaxseg.compiler import options
from jaxseg.data.colours import IGNORE
from jaxseg.errors import InputError, unknown
from jaxseg.inference import prepared
from jaxseg.macs import count_macs
from jaxseg.train import build, check_sizes, jit_step

MODES = ("train", "infer")
SECONDS, LEAST, MOST = 10.0, 5, 100  # of the measurement: time, or repetitions where they bind


class Work(NamedTuple):
    """A compiled program and its arguments, called again and again."""

    run: Callable[[], Any]  # one repetition; its result is ready when it returns
    compile_s: float  # seconds of tracing and compilation
    peak_bytes: int  # arguments, results and temporary arrays of the program, on one device
    bytes: float  # that the program reads and writes, as the compiler counts, on one device
    flops: float  # 2 a multiply-accumulate; training counts three forward passes


def benchmark(
    config: ConfigDict, mode: str, size: tuple[int, int] | None, batch: int, as_json: bool
) -> int:
    """Prints the cost of `mode` at `size` (H, W) and `batch` images; returns the exit code.

    Defaults: data.crop, and train.batch or eval.batch. Raises InputError for sizes that do not fit.
    """
    found = measure(configured(config, mode, size, batch), mode)
    if as_json:
        print(json.dumps(found))
        return 0
    for key, value in found.items():
        print(f"{key:20} {value:,.4g}" if isinstance(value, float) else f"{key:20} {value}")
    return 0


def configured(
    config: ConfigDict, mode: str, size: tuple[int, int] | None, batch: int
) -> ConfigDict:
    """A copy of a complete config with that crop and batch."""
    if mode not in MODES:
        raise unknown("--mode", mode, MODES)
    if batch < 0:
        raise InputError(f"--batch {batch}: needs a positive number of images")
    if not models.learns(config):
        raise InputError(f"{config.model.name} has no network: there is nothing to time")
    config = config.copy_and_resolve_references()
    if size:
        config.data.crop = size
    if batch:
        config["train" if mode == "train" else "eval"].batch = batch
    return config


def measure(config: ConfigDict, mode: str) -> dict[str, Any]:
    """The facts that the verb prints, of a config from `configured`."""
    work, images = prepare(config, mode), config["train" if mode == "train" else "eval"].batch
    seconds, devices = timed(work.run), jax.device_count()
    median = float(np.median(seconds))
    flops_peak, bytes_peak = peaks(config.train.compute_dtype)
    bound = max(work.flops / devices / flops_peak, work.bytes / bytes_peak)
    return {
        "model": config.model.name,
        "mode": mode,
        "size": list(config.data.crop),
        "batch": images,
        "dtype": config.train.compute_dtype,
        "device": f"{devices} x {jax.devices()[0].device_kind}",
        "images_per_s": images / median,
        "ms": 1e3 * median,
        "ms_p90": 1e3 * float(np.percentile(seconds, 90)),
        "repetitions": len(seconds),
        "compile_s": work.compile_s,
        "peak_bytes": work.peak_bytes,
        "flops": work.flops,
        "flops_per_s": work.flops / median,
        "bytes_per_s": work.bytes * devices / median,
        "peak_flops_per_s": flops_peak * devices,
        "peak_bytes_per_s": bytes_peak * devices,
        "flops_share": work.flops / devices / flops_peak / median,
        "roofline_share": bound / median,
    }


def prepare(config: ConfigDict, mode: str) -> Work:
    """The training step, or the labels of a batch, of a config from `configured`."""
    mesh = sharding.make_mesh(config.mesh)
    images = config["train" if mode == "train" else "eval"].batch
    if mode == "infer":  # of a batch that train.batch does not bind
        if images % sharding.batch_parts(mesh):
            raise InputError(
                f"eval.batch is {images}: must be divisible by {sharding.batch_parts(mesh)}, the "
                "devices along data and fsdp"
            )
        config.train.update(batch=images, accumulate=1)
    check_sizes(config, mesh)
    program = training if mode == "train" else inference
    work = program(config, mesh, synthetic(config, images))
    return work._replace(flops=images * (3 if mode == "train" else 1) * forward_flops(config))


def synthetic(config: ConfigDict, images: int) -> dict[str, np.ndarray]:
    """A batch of noise as the pipeline would give it; the first rows of the labels are ignored.

    Its objects are rectangles of a sixteenth of the image, one in each slot.
    """
    rng, shape = np.random.default_rng(0), (images, *config.data.crop)
    label = rng.integers(0, config.model.num_classes, shape, np.int32)
    label[:, : max(1, shape[1] // 32)] = IGNORE
    batch = {"image": rng.integers(0, 256, (*shape, config.data.channels), np.uint8)}
    batch |= {"label": label, "valid": np.ones(images, bool)}
    if config.data.border_weight:
        batch["weight"] = np.ones(shape, np.float32)
    if slots := config.data.objects:
        things = config.model.things if "things" in config.model else ()
        things = np.array(things or range(config.model.num_classes), np.int32)
        side = np.maximum(1, np.array(shape[1:]) // 4)
        low = rng.integers(0, np.array(shape[1:]) - side + 1, (images, slots, 2))
        inside = [
            (np.arange(n) >= low[..., i, None]) & (np.arange(n) < low[..., i, None] + side[i])
            for i, n in enumerate(shape[1:])
        ]
        batch["masks"] = (inside[0][..., None] & inside[1][:, :, None]).astype(np.uint8)
        batch["classes"] = rng.choice(things, (images, slots)).astype(np.int32)
        batch["boxes"] = np.concatenate([low, low + side], -1).astype(np.float32)
        batch["crowd"] = np.zeros((images, slots), bool)
    return batch


def training(config: ConfigDict, mesh: Mesh, host: dict[str, np.ndarray]) -> Work:
    """The training step on that batch, again and again from the state it left."""
    config.data.augment_on = "host"  # the batch is augmented already
    _, init, step = build(config, mesh)
    state, batch = init(), sharding.put_batch(host, mesh)
    program, work = compiled(jit_step(step, state, batch, mesh), state, batch)

    def run() -> jax.Array:
        nonlocal state
        state, logs = program(state, batch)
        return jax.block_until_ready(logs["loss"])

    return work._replace(run=run)


def inference(
    config: ConfigDict, mesh: Mesh, host: dict[str, np.ndarray], logits: bool = False
) -> Work:
    """What `predict` gives but for logits; or these alone. The images are the network's input."""
    model, _, predict = models.build(config)
    _, init, _ = build(config, mesh)
    variables, batch = init().variables(), sharding.put_batch({"image": host["image"]}, mesh)

    def label(variables: Any, batch: dict[str, jax.Array]) -> Any:
        variables, x = prepared(config, variables, batch["image"])
        out = predict(model.apply(variables, x, train=False), x)
        return out["logits"] if logits else {k: v for k, v in out.items() if k != "logits"}

    program, work = compiled(jax.jit(sharding.traced_on(mesh, label)), variables, batch)
    return work._replace(run=lambda: jax.block_until_ready(program(variables, batch)))


def compiled(jitted: Any, *args: Any) -> tuple[Callable, Work]:
    """The program for these arguments, and what the compiler knows of it."""
    begin = time.perf_counter()
    program = jitted.lower(*args).compile(options())
    seconds = time.perf_counter() - begin
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}
    sizes = ("argument", "output", "temp")
    peak = sum(getattr(memory, f"{size}_size_in_bytes") for size in sizes) if memory else 0
    peak -= memory.alias_size_in_bytes if memory else 0
    return program, Work(lambda: None, seconds, peak, float(cost.get("bytes accessed", 0)), 0.0)


def forward_flops(config: ConfigDict) -> float:
    """Floating-point operations of one image's forward pass, in all convolutions."""
    model, _, _ = models.build(config)
    image = jax.ShapeDtypeStruct((1, *config.data.crop, config.data.channels), jnp.float32)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image)
    return 2.0 * count_macs(model, variables, image)[0]


def timed(run: Callable[[], Any], seconds: float = SECONDS) -> list[float]:
    """Seconds of each repetition, after one that is not counted."""
    run()
    taken, begin = [], time.perf_counter()
    while len(taken) < LEAST or (len(taken) < MOST and time.perf_counter() - begin < seconds):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return taken


def peaks(dtype: str) -> tuple[float, float]:
    """(FLOP/s of a large matrix product in `dtype`, bytes/s of a large copy), of one device."""
    large = jax.default_backend() != "cpu"
    n, length = (8192, 2**28) if large else (2048, 2**25)
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)  # as busy as real ones
    x = jnp.ones(length, jnp.float32)
    product = jax.jit(jnp.matmul, compiler_options=options())
    copy = jax.jit(lambda x: x + 1)
    fastest = [
        min(timed(lambda: jax.block_until_ready(product(a, a)), 1.0)),
        min(timed(lambda: jax.block_until_ready(copy(x)), 1.0)),
    ]
    return 2 * n**3 / fastest[0], 2 * x.nbytes / fastest[1]
