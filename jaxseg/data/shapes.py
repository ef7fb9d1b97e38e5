"""Shapes: an endless, download-free data set of textured scenes with exact labels.

A scene is a function of ``(seed, index)`` alone. Every silhouette is a *signed distance*: a
function that is negative inside the shape, positive outside, and measured in radii of the shape.
The label asks for its sign at the pixel's centre, the image uses its size to soften the edge.

Colour, texture and lighting are drawn independently of the class, so that only the outline
tells a star from a disk.
"""

import math
from typing import NamedTuple

import numpy as np

RADII = (7.0, 15.0)  # pixels, in a scene whose shorter side measures REFERENCE_SIDE
REFERENCE_SIDE = 96
COUNT = (6, 12)  # fewest and most objects in a scene
MIN_PIXELS = 12  # an object shows at least so many pixels ...
MIN_VISIBLE = 0.8  # ... and at least this part of its silhouette
TILT = 0.18  # objects lean by up to 20 degrees either way: the tangent of half of that
REACH = 1.3  # no silhouette extends further than so many radii from its centre


def _length(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sqrt(u * u + v * v)


def _along(count: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Project points on `count` directions spread evenly round the circle: [count, ...]."""
    angles = [2 * math.pi * k / count for k in range(count)]
    # Rounded, because the last bits of a sine differ between platforms.
    return np.stack([round(math.cos(a), 9) * u + round(math.sin(a), 9) * v for a in angles])


def _disk(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _length(u, v) - 0.95


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - 0.85


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _along(3, u, v).max(axis=0) - 0.62


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # A pentagram is where at most one of the five sides of its pentagon has been crossed.
    return np.sort(_along(5, u, v), axis=0)[-2] - 0.4


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(u, v) - 0.36, np.maximum(u, v) - 1.0)


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(_length(u, v) - 0.76) - 0.24


def _crescent(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(_length(u, v) - 1.0, 0.8 - _length(u - 0.55, v))


SILHOUETTES = {
    "disk": _disk,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "crescent": _crescent,
}
CLASSES: tuple[str, ...] = ("background", *SILHOUETTES)
PALETTE: tuple[tuple[int, int, int], ...] = (
    (0, 0, 0),
    (230, 60, 60),
    (60, 130, 245),
    (60, 190, 80),
    (250, 210, 50),
    (170, 85, 220),
    (60, 215, 220),
    (250, 145, 40),
)


class _Thing(NamedTuple):
    """An object in its window, a pair of slices of the scene; the arrays are float64 [h, w]."""

    class_id: int
    window: tuple[slice, slice]
    u: np.ndarray  # the object's own coordinates, in radii
    v: np.ndarray
    distance: np.ndarray  # from its outline, in pixels, negative inside


def scene(seed: int, index: int, size: tuple[int, int] = (96, 96)) -> dict[str, np.ndarray]:
    """Draw scene number `index` of the endless data set called `seed`.

    Args:
        seed: which data set, not negative; give training and validation different ones.
        index: which of its scenes, not negative.
        size: (H, W) in pixels, both at least 16; objects grow with the shorter side.

    Returns:
        A dictionary that describes N objects, sorted from the farthest to the nearest:
            image: uint8 [H, W, 3], RGB.
            label: uint8 [H, W], at each pixel the class of the object on top, 0 for none.
            boxes: float32 [N, 4], (y0, x0, y1, x1) in pixels, half-open, round what is visible.
            classes: int32 [N], places in `CLASSES`.
            masks: uint8 [N, H, W], 1 where the object is visible; no two of them overlap.
    """
    height, width = size
    rng = np.random.default_rng([seed, index])
    things = _arrange(rng, height, width)

    canvas = _background(rng, height, width)
    owner = np.zeros(size, np.uint8)
    for number, thing in enumerate(things, start=1):
        rows, cols = thing.window
        _paint(rng, canvas[:, rows, cols], thing)
        owner[rows, cols][thing.distance < 0] = number

    masks = owner == np.arange(1, len(things) + 1)[:, None, None]
    classes = np.array([thing.class_id for thing in things], np.int32)
    return {
        "image": _expose(rng, canvas),
        "label": np.concatenate([[0], classes]).astype(np.uint8)[owner],
        "boxes": np.array([_box(mask) for mask in masks], np.float32).reshape(-1, 4),
        "classes": classes,
        "masks": masks.astype(np.uint8),
    }


def _arrange(rng: np.random.Generator, height: int, width: int) -> list[_Thing]:
    """Place the objects, farthest first, none of them mostly hidden."""
    count = rng.integers(COUNT[0], COUNT[1] + 1)
    free = np.ones((height, width), bool)
    things = []
    # From the nearest to the farthest, so that what is visible of an object is known at once and
    # one that would be mostly hidden is never drawn. The number of attempts bounds the search.
    for _ in range(4 * COUNT[1]):
        thing = _random_thing(rng, height, width)
        inside = thing.distance < 0
        visible = np.count_nonzero(inside & free[thing.window])
        if visible >= max(MIN_PIXELS, MIN_VISIBLE * np.count_nonzero(inside)):
            free[thing.window][inside] = False
            things.append(thing)
        if len(things) == count:
            break
    return things[::-1]


def _random_thing(rng: np.random.Generator, height: int, width: int) -> _Thing:
    class_id = int(rng.integers(1, len(CLASSES)))
    radius = rng.uniform(*RADII) * min(height, width) / REFERENCE_SIDE
    margin = 0.8 * radius
    cy, cx = rng.uniform(margin, height - margin), rng.uniform(margin, width - margin)
    rows, cols = _span(cy, REACH * radius, height), _span(cx, REACH * radius, width)

    y = (np.arange(rows.start, rows.stop)[:, None] + 0.5 - cy) / radius
    x = (np.arange(cols.start, cols.stop)[None, :] + 0.5 - cx) / radius
    v, u = _rotate(rng, y, x, TILT)  # the silhouettes' axis of symmetry, u, stands upright
    distance = SILHOUETTES[CLASSES[class_id]](u, v) * radius
    return _Thing(class_id, (rows, cols), u, v, distance)


def _span(centre: float, reach: float, length: int) -> slice:
    return slice(max(0, math.floor(centre - reach)), min(length, math.ceil(centre + reach)))


def _rotate(
    rng: np.random.Generator, y: np.ndarray, x: np.ndarray, most: float = 1.0
) -> tuple[np.ndarray, ...]:
    """Turn [h, 1] rows and [1, w] columns by a random angle into two [h, w] coordinates.

    most: the tangent of half the largest angle; 1 is a quarter turn either way.
    """
    # The tangent of half the angle gives its cosine and sine by arithmetic that is exactly
    # reproducible on every machine.
    t = rng.uniform(-most, most)
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    return cos * x + sin * y, cos * y - sin * x


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A muted colour with clouds and a faint pattern: float64 [3, H, W], about 0..1."""
    # Channels first while drawing: NumPy is slow at loops over a last axis of only three.
    clouds = rng.uniform(-0.12, 0.12, (3, 5, 5))
    clouds = _stretch(_stretch(clouds, width).swapaxes(1, 2), height)
    period = rng.uniform(6, 16)
    y, x = np.arange(height)[:, None] / period, np.arange(width)[None, :] / period
    tint = rng.uniform(-0.08, 0.08, (3, 1, 1))
    base = rng.uniform(0.3, 0.7) + rng.uniform(-0.1, 0.1, (3, 1, 1))
    return base + clouds + tint * _pattern(rng, y, x)


def _stretch(knots: np.ndarray, length: int) -> np.ndarray:
    """Interpolate [C, K, M] smoothly along its middle axis: [C, length, M]."""
    place = (np.arange(length) + 0.5) / length * (knots.shape[1] - 1)
    left = place.astype(int)
    t = (place - left)[:, None]
    t = t * t * (3 - 2 * t)
    return knots[:, left] + np.diff(knots, axis=1)[:, left] * t


def _pattern(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Soft stripes or checks of period 1 at a random angle: [h, w] in -1..1."""
    a, b = _rotate(rng, y, x)
    return _wave(a) * _wave(b) if rng.random() < 0.5 else _wave(a)


def _wave(t: np.ndarray) -> np.ndarray:
    """A triangle wave of period 1 in -1..1."""
    return 4 * np.abs(t - np.floor(t) - 0.5) - 1


def _paint(rng: np.random.Generator, canvas: np.ndarray, thing: _Thing) -> None:
    """Draw the object over `canvas`, its window of the scene, float64 [3, h, w], in place."""
    # Of a few random colours, the one whose nearest neighbour in the window is farthest away:
    # an object always stands out, whatever it lies on, and its class has no say in it.
    colours = rng.uniform(0, 1, (3, 12, 1))
    behind = canvas[:, ::4, ::4].reshape(3, 1, -1)
    gaps = ((behind - colours) ** 2).sum(axis=0).min(axis=-1)
    colour = colours[:, gaps.argmax(), :, None]

    rows, cols = thing.distance.shape
    period = rng.uniform(4, 10)
    y, x = np.arange(rows)[:, None] / period, np.arange(cols)[None, :] / period
    shading = 1 + 0.15 * thing.u + rng.uniform(0, 0.08) * _pattern(rng, y, x)
    cover = np.clip(0.5 - thing.distance, 0, 1)
    canvas += cover * (shading * colour - canvas)


def _expose(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Light the float64 [3, H, W] from one side, add sensor noise: uint8 [H, W, 3]."""
    height, width = canvas.shape[1:]
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None, :]
    light = 1 + rng.uniform(0, 0.2) * _rotate(rng, y, x)[0]
    noise = rng.uniform(-0.04, 0.04, canvas.shape)
    levels = np.rint(255 * np.clip(canvas * light + noise, 0, 1)).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(1, 2, 0))


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The (y0, x0, y1, x1) that just holds the set pixels of a bool [H, W], half-open."""
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return rows[0], cols[0], rows[-1] + 1, cols[-1] + 1
