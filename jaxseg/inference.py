"""Inference: what a trained network says of images of any size, as `config.eval` asks.

An image is seen whole or through windows, at one or several scales, with its mirror image or
without; what these views say is averaged, and a dense CRF may follow. All of it is one function
with static shapes, under jit: a scan cuts the windows, labels and blends them.
"""

import inspect
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from jaxseg import models, sharding
from jaxseg.errors import InputError, unknown
from jaxseg.ops import crf
from jaxseg.ops.image import centre, normalise
from jaxseg.ops.resize import resize
from jaxseg.windows import Size, blended, mirror

SMALLEST = 1e-30  # probabilities below have no finite logarithm in float32, or nearly so
MOST_SIZES = 256  # that `buckets` compares in pairs; more are rounded up first
LARGE = 2**20  # pixels from which an image is worth the exchange of rows between devices
PLAIN = {"mode": "whole", "scales": (1.0,), "flip": False, "turns": False, "crf": ""}
NEUTRAL = ("batch", "buckets", "boundary", "pictures")  # keys of `eval` that change no label
OF_OBJECTS = ("resize", "confidence")  # those that only networks of objects know
FOUND = ("mIoU", "images")  # what scripts/crf_search.py writes beside the parameters that it found


def make_infer(config: ConfigDict, mesh: Mesh | None = None) -> Callable[..., dict]:
    """infer(variables, image, size, logits=True, extent=None): what the network says of image
    [B,h,w,C], 0..255, at `size` (H, W). A pure function.

    Returns `semantic` int32 [B,H,W], `finite` bool [B] (the network said no NaN and no infinity),
    and `logits` float32 [B,H,W,K]: logarithms of probabilities where these were averaged or a CRF
    followed. With logits=False they are left out, and windows at scale 1 without a CRF take memory
    for one row of windows, however large the image; other scales, a CRF, whole images and logits
    hold all of [B,H,W,K]. extent: int32 [B,2], the part of each image that a CRF shall look at,
    where the rest is padding.

    Where the network needs a larger input than it labels, the image is mirrored at its borders
    (U-Net, section 2: the overlap-tile strategy). Windows are split over the devices of `mesh`, and
    so are the images of a CRF where they divide by them. Raises InputError for settings that do not
    fit the network. Of a paper of objects, see `_objects`.
    """
    if models.of_objects(config):
        return _objects(config)
    if any(config.eval.resize):
        raise InputError(
            f"eval.resize is {config.eval.resize}, but {config.model.name} finds no objects: leave "
            "it (0, 0), and see eval.scales"
        )
    ask, network, fit = config.eval, *_network(config)
    window = windows(config, fit) if ask.mode == "slide" else None
    if mesh and mesh.shape["space"] > 1:
        network = _over_rows(network, mesh)
    refine = _crf(config, mesh)
    single = ask.scales == (1.0,) and not refine

    def score(variables: Any, x: jax.Array, labelled: Size, size: Size) -> jax.Array:
        """What is averaged of the centre `labelled` of x [N,h,w,C], at `size`: [N,*size,K]."""
        views = []
        for turns, step in itertools.product(range(4 if ask.turns else 1), (1, -1)[: 1 + ask.flip]):
            seen = jnp.rot90(x, turns, (1, 2))[:, :, ::step]
            view = network(variables, seen)["logits"][:, :, ::step]
            views.append(centre(jnp.rot90(view, -turns, (1, 2)), labelled))
        # A softmax would make a harmless 0 of -inf: NaN stays one, and tells.
        views = [jnp.where(jnp.isfinite(view), view, jnp.nan) for view in views]
        views = [resize(view, size) for view in views]
        if ask.average == "probabilities":
            views = [jax.nn.softmax(view, axis=-1) for view in views]
        return sum(views) / len(views)

    def slide(variables: Any, image: jax.Array, keep: bool) -> dict[str, jax.Array]:
        crop, stride = window
        label = partial(score, variables, labelled=crop, size=crop)
        return blended(label, image, crop, stride, fit(crop), ask, mesh, keep)

    def infer(
        variables: Any,
        image: jax.Array,
        size: Size,
        logits: bool = True,
        extent: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        have = image.shape[1:3]
        if window and _below(have, window[0]):
            raise _too_small(f"an image of {have}", window[0])
        if single and size == have and not (window or ask.flip or ask.turns):
            out = network(variables, mirror(image, fit(have)))
            out = {key: centre(value, have) for key, value in out.items()}
            out["finite"] = jnp.isfinite(out["logits"]).all((1, 2, 3))
            return out if logits else {k: v for k, v in out.items() if k != "logits"}
        if single and size == have and window and not logits:
            return slide(variables, image, keep=False)

        total = 0
        for scale in ask.scales:
            x = rescale(image, scale)
            seen = x.shape[1:3]
            if window:
                total += resize(slide(variables, x, keep=True)["scores"], size)
            else:
                total += score(variables, mirror(x, fit(seen)), seen, size)
        mean = total / len(ask.scales)
        finite = jnp.isfinite(mean).all((1, 2, 3))
        if ask.average == "probabilities":
            mean = jnp.log(jnp.maximum(mean, SMALLEST))
        if refine:
            mean = refine(mean, image, extent)
        out = {"semantic": jnp.argmax(mean, axis=-1).astype(jnp.int32), "finite": finite}
        return {**out, "logits": mean} if logits else out

    return infer


def _network(config: ConfigDict) -> tuple[Callable, Callable]:
    """network(variables, x): the paper's prediction for x [N,h,w,C], 0..255; and fit(size), the
    input size that it needs to label `size`."""
    model, _, predict = models.build(at_output_stride(config))

    def network(variables: Any, x: jax.Array) -> dict[str, jax.Array]:
        variables, x = prepared(config, variables, x)
        return predict(model.apply(variables, x, train=False), x)

    return network, model.fit if hasattr(model, "fit") else tuple


def prepared(config: ConfigDict, variables: dict, image: jax.Array) -> tuple[dict, jax.Array]:
    """What a network takes, in the dtype of computation: its variables and image [B,h,w,C], 0..255,
    normalised."""
    dtype = config.train.compute_dtype
    x = normalise(image, config.data.mean, config.data.std).astype(dtype)
    return {**variables, "params": cast(variables["params"], dtype)}, x


def _over_rows(network: Callable, mesh: Mesh) -> Callable:
    """The network, which sees a large image by the rows that each device along space holds."""

    def apply(variables: Any, x: jax.Array) -> dict[str, jax.Array]:
        return network(variables, sharding.spread_rows(x, mesh))

    shared = sharding.traced_on(mesh, apply)
    return lambda variables, x: (shared if x[0, ..., 0].size >= LARGE else network)(variables, x)


def _objects(config: ConfigDict) -> Callable[..., dict]:
    """`infer` of a paper of objects: what its `predict` says of image [B,h,w,C], at that size, and
    `finite`. The image is seen once and whole, grown by the mean where the network needs that."""
    ask = config.eval
    for key, plain in PLAIN.items():
        if ask[key] != plain:
            raise InputError(
                f"eval.{key} is {ask[key]!r}, but {config.model.name} tells objects apart and sees "
                f"an image once and whole: leave it {plain!r}"
            )
    model, _, predict = models.build(at_output_stride(config))

    def infer(
        variables: Any, image: jax.Array, size: Size, logits: bool = True, extent: Any = None
    ) -> dict[str, Any]:
        have = image.shape[1:3]
        need = model.fit(have) if hasattr(model, "fit") else have
        variables, x = prepared(config, variables, image)
        x = jnp.pad(x, [(0, 0), *((0, n - h) for n, h in zip(need, have, strict=True)), (0, 0)])
        outputs = model.apply(variables, x, train=False)
        out = {k: v for k, v in predict(outputs, x).items() if logits or k != "logits"}
        for key in out.keys() - {"instances"}:
            out[key] = out[key][:, : have[0], : have[1]]
        if "instances" in out:
            masks = out["instances"]["masks"][:, :, : have[0], : have[1]]
            out["instances"] = {**out["instances"], "masks": masks}
        return {**out, "finite": _numbers(outputs, len(image))}

    return infer


def _numbers(outputs: Any, batch: int) -> jax.Array:
    """bool [batch]: no output of an image is NaN. Infinity may be meant: no score at all."""
    fine = jnp.ones(batch, bool)
    for x in jax.tree.leaves(outputs):
        if jnp.issubdtype(x.dtype, jnp.floating):
            each = x.ndim and x.shape[0] == batch
            fine &= ~jnp.isnan(x).any(tuple(range(1, x.ndim)) if each else None)
    return fine


def settings(config: ConfigDict) -> dict[str, Any]:
    """What of config.eval decides a label, for the notes of files and reports."""
    other = NEUTRAL if models.of_objects(config) else NEUTRAL + OF_OBJECTS
    asked = {key: value for key, value in config.eval.items() if key not in other}
    return {**asked, "crf": crf_parameters(asked["crf"])} if _is_file(asked["crf"]) else asked


def _is_file(name: str) -> bool:
    return name.endswith(".json")


def crf_parameters(name: str) -> dict[str, Any]:
    """What `crf.mean_field` is given: a published set by name, or FILE.json of its parameters.

    Such a file may also hold what FOUND lists. Raises InputError for other names and files.
    """
    if not _is_file(name):
        if name not in crf.PARAMETERS:
            raise unknown("set of CRF parameters", name, [*crf.PARAMETERS, "FILE.json"])
        return crf.PARAMETERS[name]
    try:
        held = json.loads(Path(name).read_text())
        given = {key: value for key, value in held.items() if key not in FOUND}
    except FileNotFoundError:
        raise InputError(f"eval.crf: no file {name}") from None
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"eval.crf: {name} is no JSON object: {error}") from error
    keywords = inspect.signature(crf.mean_field).parameters
    known = {key: p for key, p in keywords.items() if p.kind == p.KEYWORD_ONLY and key != "valid"}
    for key in given:
        if key not in known:
            raise unknown(f"CRF parameter in {name}", key, known)
    missing = [key for key, p in known.items() if p.default is p.empty and key not in given]
    if missing:
        raise InputError(f"eval.crf: {name} lacks {', '.join(missing)}")
    return given


def _crf(config: ConfigDict, mesh: Mesh | None) -> Callable | None:
    """refine(logits [B,H,W,K], image [B,h,w,C], extent) -> logits after eval.crf; None without."""
    name, classes = config.eval.crf, config.model.num_classes
    if not name:
        return None
    if config.data.channels not in (1, 3):
        raise InputError(
            f"eval.crf compares colours, and data.channels is {config.data.channels}: needs 1 or 3"
        )
    given = crf_parameters(name)
    crf.check(classes, given)
    given = {key: np.float32(v) if isinstance(v, list) else v for key, v in given.items()}
    field = jax.vmap(lambda u, c, v: crf.mean_field(u, c, valid=v, **given))

    def refine(logits: jax.Array, image: jax.Array, extent: jax.Array | None) -> jax.Array:
        batch, height, width, _ = logits.shape
        colours = resize(image.astype(jnp.float32), (height, width), antialias=True)
        colours = jnp.broadcast_to(colours.round(), (batch, height, width, 3)).astype(jnp.uint8)
        extent = jnp.array([[height, width]] * batch) if extent is None else extent
        row, column = jnp.arange(height)[:, None], jnp.arange(width)
        valid = (row < extent[:, 0, None, None]) & (column < extent[:, 1, None, None])
        unary = -jnp.maximum(jax.nn.log_softmax(logits), jnp.log(SMALLEST))
        each = field
        if mesh and batch % sharding.batch_parts(mesh) == 0:
            # Left to itself the loop over images runs on every device, over all of them.
            over = P(("data", "fsdp"))
            each = jax.shard_map(
                field, mesh=mesh, in_specs=(over,) * 3, out_specs=over, check_vma=False
            )
        return jnp.log(jnp.maximum(each(unary, colours, valid), SMALLEST))

    return refine


def cast(params: Any, dtype: str) -> Any:
    """Parameters in the dtype of computation: the layers, having none of their own, follow it."""
    return jax.tree.map(lambda p: p.astype(dtype), params)


def at_output_stride(config: ConfigDict) -> ConfigDict:
    """The config whose network works at eval.output_stride: other rates, the same parameters."""
    stride = config.eval.output_stride
    if not stride:
        return config
    if "backbone" not in config.model or "output_stride" not in config.model.backbone:
        raise InputError(
            f"eval.output_stride is {stride}, but {config.model.name} has no backbone whose output "
            "stride could be another: leave it 0"
        )
    config = config.copy_and_resolve_references()
    config.model.backbone.output_stride = stride
    return config


def windows(config: ConfigDict, fit: Callable[[Size], Size]) -> tuple[Size, Size]:
    """(crop, stride) of the windows, in labelled pixels.

    A crop of 0 is the largest that the network labels from a training crop's pixels; a stride of 0
    is PSPNet's, two thirds of the crop. Raises InputError for a stride above the crop, and where
    the training crop is too small to label a pixel.
    """
    ask, train = config.eval, config.data.crop
    largest = tuple(
        _largest(n, lambda c, axis=axis: fit((c, c))[axis]) for axis, n in enumerate(train)
    )
    crop = tuple(c or most for c, most in zip(ask.crop, largest, strict=True))
    if min(crop) < 1:
        raise InputError(
            f"no window fits data.crop {train}: the network needs {fit((1, 1))} to label one "
            "pixel. Set eval.crop"
        )
    stride = tuple(s or -(-2 * c // 3) for s, c in zip(ask.stride, crop, strict=True))
    if any(s > c for s, c in zip(stride, crop, strict=True)):
        raise InputError(
            f"eval.stride {stride} is above the window {crop}: the pixels between windows would "
            f"have no label. Use at most {crop}, or 0 for two thirds"
        )
    return crop, stride


def _largest(most: int, needs: Callable[[int], int]) -> int:
    """The largest crop that `needs` at most `most` pixels; 0 where none does."""
    return next((c for c in range(most, 0, -1) if needs(c) <= most), 0)


def check_windows(config: ConfigDict, sizes: Sequence[Size], name: Callable[[int], object]) -> None:
    """Raises InputError for an image smaller than one window; name: what to call the i-th."""
    if config.eval.mode == "slide":
        crop, _ = windows(config, _network(config)[1])
        for i, size in enumerate(sizes):
            if _below(size, crop):
                raise _too_small(f"{name(i)}: an image of {size}", crop)


def _below(size: Size, crop: Size) -> bool:
    return all(n < c for n, c in zip(size, crop, strict=True))


def _too_small(what: str, crop: Size) -> InputError:
    return InputError(
        f"{what} is smaller than one window of {crop}: use eval.mode=whole, or a smaller eval.crop"
    )


def rescale(image: jax.Array, scale: float) -> jax.Array:
    """image [B,h,w,C] -> float32 at `scale`, bilinear, antialiased where smaller as in training."""
    size = tuple(max(1, round(n * scale)) for n in image.shape[1:3])
    if size == image.shape[1:3]:
        return image
    return resize(image.astype(jnp.float32), size, antialias=True)


def buckets(sizes: Iterable[Size], most: int) -> dict[Size, Size]:
    """The shape that images of each size are extended to: at most `most` shapes in all.

    Up to `most` sizes stay as they are. Beyond, the two groups of sizes whose common shape adds the
    fewest pixels, over all images, become one, again and again.
    """
    counts = Counter(sizes)
    if len(counts) <= most:
        return {size: size for size in counts}
    step = 1
    while len({_round_up(size, step) for size in counts}) > MOST_SIZES:
        step *= 2
    merged: Counter[Size] = Counter()
    for size, count in counts.items():
        merged[_round_up(size, step)] += count
    shapes = np.array(sorted(merged), np.int64)  # [n,2]
    number = np.array([merged[tuple(map(int, shape))] for shape in shapes])
    while len(shapes) > most:
        hull = np.maximum(shapes[:, None], shapes[None])
        pixels = shapes.prod(1) * number
        added = hull.prod(2) * (number[:, None] + number) - pixels[:, None] - pixels
        np.fill_diagonal(added, np.iinfo(np.int64).max)
        i, j = np.unravel_index(np.argmin(added), added.shape)
        shapes[i], number[i] = hull[i, j], number[i] + number[j]
        shapes, number = np.delete(shapes, j, axis=0), np.delete(number, j)
    fits = {}
    for size in counts:
        covering = shapes[(shapes >= size).all(1)]
        fits[size] = tuple(map(int, covering[np.argmin(covering.prod(1))]))
    return fits


def _round_up(size: Size, step: int) -> Size:
    return tuple(-(-n // step) * step for n in size)
