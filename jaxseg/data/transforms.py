"""Augmentation on the host: each transform is a plain function of an example.

An example has `image` [H,W,C], uint8 or float32 0..255, and `label` uint8 [H,W]; where objects are
told apart also `instances`, a dict of `masks` uint8 [n,H,W], `classes` int32 [n] and `crowd` bool
[n]; where masks are soft also `alpha` float32 [H,W], 0..1. All stay aligned. The order, the
same for every experiment, is in `augment`.
"""

import importlib
import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxseg.data import pixels
from jaxseg.data.colours import IGNORE
from jaxseg.data.elastic import NODES, displacement
from jaxseg.data.objects import copy_paste, present, random_pixel
from jaxseg.errors import InputError

CROP_TRIES = 10  # for cat_max_ratio


class Window(NamedTuple):
    """Which part of an image becomes how much of the crop."""

    start: tuple[int, int]  # top, left; pixels of the image
    factor: tuple[float, float]  # of the resize, vertically and horizontally
    size: tuple[int, int]  # height, width after it; less than the crop where the image is small


def augment(
    example: dict,
    rng: np.random.Generator,
    data: ConfigDict,
    another: Callable[[np.random.Generator], dict] | None = None,
    classes: int = IGNORE,
) -> dict:
    """An example of size data.crop, as section `config.data` asks.

    another: draws a second example, of which copy_paste takes objects. classes: how many there are.
    """
    out = place(example, rng, data)
    if data.copy_paste and rng.random() < data.copy_paste:
        out = copy_paste(out, place(another(rng), rng, data), rng)
    if data.photometric:
        out["image"] = photometric(out["image"], rng, data.hue)
    if data.blur and rng.random() < data.blur:
        out["image"] = pixels.blur(out["image"])
    if data.transform:
        return own_transform(out, data.transform, classes, rng)
    return {**out, "image": np.ascontiguousarray(out["image"])}


def place(example: dict, rng: np.random.Generator, data: ConfigDict) -> dict:
    """All that moves pixels: quarter turns, resize, scale, crop, rotation, elastic, flips, pad."""
    if data.quarter_turns:
        example = quarter_turn(example, int(rng.integers(4)))
    label = example["label"]
    factor = fit(label.shape, data.resize) * draw_scale(rng, data.scale, data.scale_step)
    target = None
    if data.crop_on_objects and rng.random() < data.crop_on_objects:
        target = random_pixel(example, rng)
    window = draw_window(rng, label, factor, data.crop, data.cat_max_ratio, target)
    if data.rotate or data.elastic:
        angle = rng.uniform(-data.rotate, data.rotate)
        vectors = rng.normal(0, data.elastic, (2, NODES, NODES))
        out = deform(example, window, data.crop, angle, vectors, data.mean)
    else:
        out = pad(cut(example, window), data.crop, data.mean)
    if data.flip and rng.random() < 0.5:
        out = mirror(out)
    if data.flip_vertical and rng.random() < 0.5:
        out = _each(out, lambda x: x[::-1], lambda ids: ids[..., ::-1, :])
    return present(out)


def fit(size: tuple[int, int], box: tuple[int, int]) -> float:
    """How much an image may grow within a box (long side, short side), in pixels; (0, 0): 1."""
    return min(max(box) / max(size), min(box) / min(size)) if any(box) else 1.0


def fitted_size(size: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) of an image in that box."""
    return tuple(max(1, round(n * fit(size, box))) for n in size)


def fitted(example: dict, box: tuple[int, int]) -> dict:
    """The whole example, as large as a box (long side, short side) allows."""
    have = example["label"].shape
    size = fitted_size(have, box)
    factor = tuple(n / h for n, h in zip(size, have, strict=True))
    return cut(example, Window((0, 0), factor, size))


def draw_scale(rng: np.random.Generator, scale: tuple[float, float], step: float) -> float:
    """Uniform in `scale`, or among low, low + step, ... up to high."""
    low, high = scale
    if not step:
        return rng.uniform(low, high)
    return low + step * int(rng.integers(scale_steps(scale, step)))


def scale_steps(scale: tuple[float, float], step: float) -> int:
    """How many factors low, low + step, ... are not above high."""
    return math.floor((scale[1] - scale[0]) / step + 1e-6) + 1


def draw_window(
    rng: np.random.Generator,
    label: np.ndarray,
    factor: float,
    crop: tuple[int, int],
    cat_max_ratio: float,
    target: tuple[int, int] | None = None,
) -> Window:
    """A random window of label [H,W] that becomes `crop` when resized, whole where it is smaller.

    cat_max_ratio: another is drawn, up to ten times, while the crop holds fewer than two classes or
    one of them has this share or more of what is not ignored. target: a pixel that it contains.
    """
    size, factors, starts = [], [], []
    for axis, (have, want) in enumerate(zip(label.shape, crop, strict=True)):
        size.append(min(want, max(1, round(have * factor))))
        factors.append(max(factor, size[-1] / have))  # whole images are fitted to whole pixels
        seen = size[-1] / factors[-1]  # pixels of the image
        low, high = 0, math.floor(have - seen + 1e-6)
        if target is not None:
            low = min(high, max(0, math.ceil(target[axis] + 1 - seen)))
            high = min(high, target[axis])
        starts.append((low, high))

    def draw() -> Window:
        start = tuple(int(rng.integers(low, high + 1)) for low, high in starts)
        return Window(start, tuple(factors), tuple(size))

    window = draw()
    if cat_max_ratio < 1:
        for _ in range(CROP_TRIES):
            if balanced(pixels.nearest(label, *window), cat_max_ratio):
                break
            window = draw()
    return window


def balanced(label: np.ndarray, cat_max_ratio: float) -> bool:
    """Whether a label has two classes or more, and none with cat_max_ratio of its pixels."""
    counts = np.bincount(label.ravel(), minlength=IGNORE + 1)[:IGNORE]
    return np.count_nonzero(counts) > 1 and counts.max() < cat_max_ratio * counts.sum()


def cut(example: dict, window: Window) -> dict:
    """The window of an example, at window.size."""
    return _each(
        example,
        lambda image: pixels.resample(image, *window),
        lambda ids: pixels.nearest(ids, *window),
    )


def pad(example: dict, crop: tuple[int, int], mean: tuple[float, ...]) -> dict:
    """The example with the mean, label 255 and no objects below it and on its right."""
    height, width = example["label"].shape
    if (height, width) == tuple(crop):
        return example
    image = np.empty((*crop, example["image"].shape[2]), example["image"].dtype)
    image[:height, :width] = example["image"]
    image[height:] = image[:, width:] = _fill(mean, image.dtype)
    pads = [(0, crop[0] - height), (0, crop[1] - width)]
    label = np.pad(example["label"], pads, constant_values=IGNORE)
    out = {**example, "image": image, "label": label}
    if "alpha" in example:
        out["alpha"] = np.pad(example["alpha"], pads)
    if "instances" in example:
        masks = np.pad(example["instances"]["masks"], [(0, 0), *pads])
        out["instances"] = {**example["instances"], "masks": masks}
    return out


def deform(
    example: dict,
    window: Window,
    crop: tuple[int, int],
    angle: float,
    vectors: np.ndarray,
    mean: tuple[float, ...],
) -> dict:
    """The window turned about the centre of the crop and bent, at size `crop`, in one resampling.

    angle: degrees, anticlockwise. vectors: [2,3,3], see `elastic`; how far (y, x) from a pixel of
    the crop its value is taken, in pixels of the crop. Beyond the image: mean, 255 and no objects.
    """
    moved = displacement(vectors, crop)
    y, x = (
        np.arange(n, dtype=np.float32).reshape(shape) + d - (n - 1) / 2
        for n, shape, d in zip(crop, ((-1, 1), (1, -1)), moved, strict=True)
    )
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    y, x = cos * y + sin * x, -sin * y + cos * x
    # Edges at whole numbers from here on: pixel i of the image lies between i and i + 1.
    y, x = (
        start + (at + np.float32(n / 2)) / np.float32(factor)
        for start, factor, at, n in zip(window.start, window.factor, (y, x), crop, strict=True)
    )
    height, width = example["label"].shape
    outside = (y < 0) | (y >= height) | (x < 0) | (x >= width)
    row, column = (
        (at + np.float32(pixels.TIE)).astype(np.int64).clip(0, n - 1)
        for at, n in ((y, height), (x, width))
    )
    out = _each(
        example,
        lambda image: pixels.warp(image, y - np.float32(0.5), x - np.float32(0.5)),
        lambda ids: ids[..., row, column],
    )
    out["image"][outside] = _fill(mean, out["image"].dtype)
    out["label"][outside] = IGNORE
    if "alpha" in out:
        out["alpha"][outside] = 0
    if "instances" in out:
        out["instances"]["masks"][:, outside] = 0
    return out


def quarter_turn(example: dict, turns: int) -> dict:
    """The example turned anticlockwise by `turns` times 90 degrees."""
    return _each(example, lambda x: np.rot90(x, turns), lambda x: np.rot90(x, turns, (-2, -1)))


def mirror(example: dict) -> dict:
    """The example, left to right."""
    return _each(example, pixels.mirror, lambda ids: ids[..., ::-1])


class Colour(NamedTuple):
    """What `distort` does; the defaults leave an image as it is."""

    brightness: float = 0.0  # added, of 0..255
    contrast: float = 1.0  # factor of every value
    saturation: float = 1.0  # factor
    hue: float = 0.0  # degrees
    contrast_first: bool = True  # before saturation and hue, or after them


def photometric(image: np.ndarray, rng: np.random.Generator, most: float = 18.0) -> np.ndarray:
    """SSD's distortion (Liu et al. 2016): brightness +-32, contrast and saturation 0.5 to 1.5, hue
    +-`most` degrees, SSD's 18, each with probability 1/2; contrast comes before or after the
    colours.

    (Where hue is kept in 8 bits, a unit is two degrees: toolboxes that turn it by 18 turn twice
    as far.)
    """
    on = rng.random(5) < 0.5
    drawn = Colour(
        rng.uniform(-32, 32) if on[0] else 0.0,
        rng.uniform(0.5, 1.5) if on[1] else 1.0,
        rng.uniform(0.5, 1.5) if on[2] else 1.0,
        rng.uniform(-most, most) if on[3] else 0.0,
        bool(on[4]),
    )
    return distort(image, drawn)


def distort(image: np.ndarray, colour: Colour) -> np.ndarray:
    """image [H,W,C] with other colours; saturation and hue are of images of 3 channels."""
    brightness, contrast, saturation, hue, contrast_first = colour
    coloured = image.shape[2] == 3 and (saturation != 1 or hue != 0)
    first = contrast if contrast_first or not coloured else 1.0
    if brightness or first != 1:
        image = pixels.brighten(image, brightness, first)
    if coloured:
        image = pixels.turn_colours(image, saturation, hue)
        if contrast != first:
            image = pixels.brighten(image, 0.0, contrast)
    return image


def own_transform(
    example: dict, name: str, classes: int, rng: np.random.Generator | None = None
) -> dict:
    """The example with what the user's function `name` makes of its image and label.

    name: "package.module:function", imported by its name and run: it is code, like a config file.
    It is called as f(image, label), with `rng` too where its third parameter is called so, is given
    copies, comes last, sees no objects, and must keep shapes and types, and the label to ids below
    `classes` or 255. Raises InputError where it does not, or raises anything.
    """
    function, old = find_transform(name), (example["image"], example["label"])
    where = f"data.transform {name} on {example.get('name', 'an example')}"
    try:
        wants = list(inspect.signature(function).parameters)[2:3] == ["rng"]
        new = function(*(part.copy() for part in old), *([rng] if wants else []))
        image, label = (np.asarray(part) for part in new)
    except Exception as error:  # whatever the function raises, or a result that is no pair
        raise InputError(f"{where}: {type(error).__name__}: {error}") from error
    for key, ours, theirs in zip(("image", "label"), old, (image, label), strict=True):
        if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            raise InputError(
                f"{where} made {key} {theirs.dtype} {list(theirs.shape)} of "
                f"{ours.dtype} {list(ours.shape)}: needs to keep shape and type"
            )
    strange = label[(label >= classes) & (label != IGNORE)]
    if strange.size:
        raise InputError(
            f"{where} made a label with ids such as {strange[0]} ({strange.size} pixels): needs "
            f"0..{classes - 1}, or {IGNORE} = ignore"
        )
    return {**example, "image": image, "label": label}


def find_transform(name: str) -> Callable:
    """The function of "package.module:function". Raises InputError where there is none."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f'data.transform "{name}": {error}. Needs "package.module:function", importable from '
            "where the command runs"
        ) from error


def _each(example: dict, image: Callable, ids: Callable) -> dict:
    """`image` applied to the image and to alpha, `ids` to the label and to the masks."""
    out = {**example, "image": image(example["image"]), "label": ids(example["label"])}
    if "alpha" in example:
        out["alpha"] = image(example["alpha"][..., None])[..., 0]
    if "instances" in example:
        masks = ids(example["instances"]["masks"])
        out["instances"] = {**example["instances"], "masks": masks}
    return out


def _fill(mean: tuple[float, ...], dtype: np.dtype) -> np.ndarray:
    return np.round(mean).astype(dtype)
