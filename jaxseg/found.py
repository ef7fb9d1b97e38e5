"""What a network of objects finds in an image, from the device back to the image's own size."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxseg.data import pixels
from jaxseg.data.colours import IGNORE, Classes
from jaxseg.data.objects import bounds
from jaxseg.data.scene import Scene, of_panoptic, painted
from jaxseg.ops.panoptic_quality import STEP, VOID

KINDS = ("semantic", "instances", "panoptic")


class Found(NamedTuple):
    """Of one image, at its own size; None where the network does not say it."""

    size: tuple[int, int]  # H, W
    semantic: np.ndarray | None = None  # uint8 [H,W]
    instances: dict[str, np.ndarray] | None = None  # the surest first: `masks` bool [n,H,W],
    # `scores` float32 [n], `classes` int32 [n] and, where there are some, `boxes` float32 [n,4]
    panoptic: np.ndarray | None = None  # int32 [H,W], class id * 1000 + number, 255000 = void

    def scene(self, least: float) -> Scene:
        """What is drawn: the panoptic segments, or else the objects with at least that score."""
        if self.panoptic is not None:
            return of_panoptic(self.panoptic)
        return painted(self.instances, self.size, least)

    def label(self, classes: Classes, things: tuple[int, ...], least: float) -> np.ndarray:
        """uint8 [H,W] of class ids: the semantic label, or else the classes of the scene. Where the
        scene has nothing, it is the only class that has no objects, or 255."""
        if self.semantic is not None:
            return self.semantic
        label = self.scene(least).label
        rest = [i for i in range(len(classes)) if i not in things]
        return np.where(label == IGNORE, np.uint8(rest[0]), label) if len(rest) == 1 else label


def is_found(out: dict[str, Any]) -> bool:
    """Whether an answer of `infer` has objects."""
    return "instances" in out or "panoptic" in out


def packed(out: dict[str, Any]) -> dict[str, Any]:
    """What of an answer goes to the host: the masks as bits [B,M,h,ceil(w/8)], no logits."""
    kept = {key: out[key] for key in KINDS if key in out}
    if "semantic" in kept:
        kept["semantic"] = kept["semantic"].astype(jnp.uint8)
    if "instances" in kept:
        bits = jnp.packbits(kept["instances"]["masks"], axis=-1)
        kept["instances"] = {**kept["instances"], "masks": bits}
    return kept


def unpacked(
    kept: dict[str, Any],
    row: int,
    seen: tuple[int, int],
    size: tuple[int, int],
    stuff_area: int = 0,
) -> Found:
    """One image of a batch of `packed` answers, on the host.

    seen: how much of what the network saw is the image (height, width), the rest having been added;
    size: the image's own, to which that is resized. Empty slots are left out, and what was found
    outside the image. Masks are resized bilinearly, ids to the nearest. Fewer pixels than
    `stuff_area` of a panoptic map's stuff class, at the image's own size, are void.
    """
    factor = tuple(n / have for n, have in zip(size, seen, strict=True))
    maps = {
        key: kept[key][row, : seen[0], : seen[1]] for key in ("semantic", "panoptic") if key in kept
    }
    maps = {key: pixels.nearest(ids, (0, 0), factor, size) for key, ids in maps.items()}
    if "panoptic" in maps:
        maps["panoptic"] = without_small_stuff(maps["panoptic"], stuff_area)
    if "instances" not in kept:
        return Found(size, **maps)
    one = {key: np.asarray(value[row]) for key, value in kept["instances"].items()}
    slots = np.flatnonzero(one["classes"] >= 0)
    order = slots[np.argsort(-one["scores"][slots], kind="stable")]
    one = {key: value[order] for key, value in one.items()}
    masks = np.unpackbits(one["masks"][:, : seen[0]], axis=-1, count=seen[1]).view(bool)
    if seen != size:
        masks = np.array([resized(mask, factor, size) for mask in masks], bool).reshape(-1, *size)
    one["masks"] = masks
    if "boxes" in one:
        limits = np.float32([*size, *size])
        one["boxes"] = (one["boxes"] * np.float32([*factor, *factor])).clip(0, limits)
        there = (one["boxes"][:, 2:] > one["boxes"][:, :2]).all(1)
    else:
        there = one["masks"].any((1, 2))
    return Found(size, instances={key: value[there] for key, value in one.items()}, **maps)


def without_small_stuff(panoptic: np.ndarray, area: int) -> np.ndarray:
    """A map [H,W] of class id * 1000 + number in which stuff, number 0, of fewer pixels is void."""
    classes, number = np.divmod(panoptic, STEP)
    small = np.bincount(classes[number == 0], minlength=VOID // STEP) < area
    return np.where((number == 0) & small[classes], VOID, panoptic).astype(panoptic.dtype)


def resized(mask: np.ndarray, factor: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
    """A mask bool [h,w] at another size: where its bilinear interpolation is at least a half."""
    out, grey, window = np.zeros(size, bool), mask.astype(np.float32), []
    (*first, y1, x1) = bounds(mask[None])[0].tolist()
    for axis, (low, high) in enumerate(zip(first, (y1, x1), strict=True)):
        start = max(0, math.floor((low - 0.5) * factor[axis]))  # beyond, all is 0
        stop = min(size[axis], math.ceil((high + 0.5) * factor[axis]))
        last = mask.shape[axis] - 1
        at = ((np.arange(start, stop) + 0.5) / factor[axis] - 0.5).clip(0, last)
        before = at.astype(np.int64)
        share = np.expand_dims(np.float32(at - before), 1 - axis)
        after = np.minimum(before + 1, last)
        grey = grey.take(before, axis) * (1 - share) + grey.take(after, axis) * share
        window.append(slice(start, stop))
    out[tuple(window)] = grey >= 0.5
    return out
