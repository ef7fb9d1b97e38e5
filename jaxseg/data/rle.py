"""COCO's masks: run lengths and polygons, to the very pixels of the official tools.

Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014. Run lengths go down the columns.
"""

from typing import Any

import numpy as np

UPSCALED = 5  # the official tools draw a polygon's outline on a grid so many times finer
FAR = 10_000  # pixels beyond the image; what lies farther out is no place, but a mistake


def decode(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """bool [H,W] of an annotation: a list of polygons, or run lengths as numbers or as a string.

    Raises ValueError for anything else.
    """
    if isinstance(segmentation, list):
        if not segmentation:
            raise ValueError("it has no polygon, maybe a box alone")
        mask = np.zeros(size, bool)
        for polygon in segmentation:
            mask |= draw_polygon(np.array(polygon, float).reshape(-1, 2), size)
        return mask
    if list(segmentation["size"]) != list(size):
        raise ValueError(f"its size {segmentation['size']} is not the image's {list(size)}")
    counts = segmentation["counts"]
    return from_runs(unpack(counts) if isinstance(counts, str) else counts, size)


def encode(mask: np.ndarray) -> dict[str, Any]:
    """The annotation of a mask bool [H,W], as results have it: run lengths as a string."""
    flat = np.ascontiguousarray(mask.T, bool).ravel()
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    counts = np.diff(changes, prepend=0, append=flat.size).tolist()
    return {"size": list(mask.shape), "counts": pack(counts)}


def pack(counts: list[int]) -> str:
    """The inverse of `unpack`."""
    text = []
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            digit, value = value & 31, value >> 5
            more = value != (-1 if digit & 16 else 0)
            text.append(chr((digit | 32 * more) + 48))
    return "".join(text)


def from_runs(counts: list[int], size: tuple[int, int]) -> np.ndarray:
    """bool [H,W] of the lengths of alternate runs of 0 and 1, first of 0.

    Raises ValueError for a negative length, and where their sum is not the image's pixels.
    """
    if min(counts, default=0) < 0:
        raise ValueError(f"one of its runs is {min(counts)} pixels long: needs 0 or more")
    if sum(counts) != size[0] * size[1]:
        raise ValueError(f"its runs hold {sum(counts)} pixels, the image {size[0] * size[1]}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(size[::-1]).T


def unpack(text: str) -> list[int]:
    """The run lengths in COCO's string of six bits a character.

    Five bits each are a digit, lowest first; the sixth says that more follow. The last digit's
    highest bit is the sign. From the fourth on, a number is the difference to the one two before.
    """
    counts, value, shift = [], 0, 0
    for char in text:
        digit = ord(char) - 48
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value, shift = 0, 0
    return counts


def draw_polygon(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """bool [H,W] inside a polygon float [n,2] of x, y in pixels, filled as the official tools do.

    They walk the outline in steps of a fifth of a pixel and, where it crosses the middle of a
    column, note the row: from there down the column, inside and outside change places.
    Raises ValueError for a point that is no number, or `FAR` outside.
    """
    height, width = size
    strange = ~((points >= -FAR) & (points <= np.array([width, height]) + FAR)).all(1)
    if strange.any():
        x, y = points[strange][0].tolist()
        raise ValueError(f"it has a point at x {x:g}, y {y:g}, far outside of {width}x{height}")
    ends = (UPSCALED * points + 0.5).astype(int)  # the official conversion rounds towards zero
    steps = [_walk(a, b) for a, b in zip(ends, np.roll(ends, -1, axis=0), strict=True)]
    walk = np.concatenate(steps)
    before, after = walk[:-1], walk[1:]
    crosses = before[:, 0] != after[:, 0]
    before, after = before[crosses], after[crosses]
    x = (np.minimum(before[:, 0], after[:, 0]) + 0.5) / UPSCALED - 0.5
    y = (np.minimum(before[:, 1], after[:, 1]) + 0.5) / UPSCALED - 0.5
    middle = (x == np.floor(x)) & (x >= 0) & (x <= width - 1)
    row = np.ceil(y[middle].clip(0, height)).astype(int)
    changes = np.bincount(x[middle].astype(int) * height + row, minlength=height * width)
    inside = np.cumsum(changes[: height * width]) % 2 == 1
    return inside.reshape(width, height).T


def _walk(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The grid points [m,2] from start to end, one step along the longer axis each.

    The other coordinate is counted from the lower end of the longer axis, whichever way it goes.
    """
    lengths = np.abs(end - start)
    long = 0 if lengths[0] >= lengths[1] else 1
    back = start[long] > end[long]
    low, high = (end, start) if back else (start, end)
    along = np.arange(lengths[long] + 1)
    slope = (high[1 - long] - low[1 - long]) / max(lengths[long], 1)
    points = np.empty((len(along), 2), int)
    points[:, long] = low[long] + along
    points[:, 1 - long] = (low[1 - long] + slope * along + 0.5).astype(int)
    return points[::-1] if back else points
