"""The objects of an example, `instances`: `masks` uint8 [n,H,W], `classes` [n], `crowd` [n].

Some have more of each, see `sources.objects`, which only an evaluation looks at.
"""

from collections.abc import Collection

import numpy as np

from jaxseg.errors import InputError


def present(example: dict) -> dict:
    """The example without the objects of which nothing is left."""
    if "instances" not in example:
        return example
    kept = example["instances"]["masks"].any((1, 2))
    return {**example, "instances": {k: v[kept] for k, v in example["instances"].items()}}


def copy_paste(example: dict, other: dict, rng: np.random.Generator) -> dict:
    """Each object of `other`, with probability 1/2, laid over the example (Ghiasi et al. 2021).

    Both have one size. What the objects hide is gone; a crowd region is not pasted.
    """
    if "instances" not in example or "instances" not in other:
        raise InputError(
            "data.copy_paste needs a data set that tells objects apart: set it to 0 for this one"
        )
    mine, theirs = example["instances"], other["instances"]
    chosen = (rng.random(len(theirs["masks"])) < 0.5) & ~theirs["crowd"]
    pasted = {key: value[chosen] for key, value in theirs.items()}
    over = pasted["masks"].any(0)
    mine = {**mine, "masks": mine["masks"] * ~over}
    return present(
        {
            **example,
            "image": np.where(over[..., None], other["image"], example["image"]),
            "label": np.where(over, other["label"], example["label"]),
            "instances": {key: np.concatenate([mine[key], pasted[key]]) for key in mine},
        }
    )


def random_pixel(example: dict, rng: np.random.Generator) -> tuple[int, int] | None:
    """(y, x) of a pixel of an object, all objects being as likely; None where there are none."""
    if "instances" not in example:
        raise InputError(
            "data.crop_on_objects needs a data set that tells objects apart: set it to 0 for this "
            "one"
        )
    found = example["instances"]
    there = np.flatnonzero(found["masks"].any((1, 2)) & ~found["crowd"])
    if not len(there):
        return None
    pixels = np.argwhere(found["masks"][there[rng.integers(len(there))]])
    y, x = pixels[rng.integers(len(pixels))].tolist()
    return y, x


def bounds(masks: np.ndarray) -> np.ndarray:
    """int32 [n,4] of masks [n,H,W]: y0, x0, y1, x1, pixels, half open; 0 of empty ones."""
    boxes = np.zeros((len(masks), 4), np.int32)
    for axis in (0, 1):
        seen = masks.any(axis=2 - axis)  # [n,H], then [n,W]
        boxes[:, axis] = seen.argmax(1)
        boxes[:, axis + 2] = np.where(seen.any(1), seen.shape[1] - seen[:, ::-1].argmax(1), 0)
    return boxes


def of_classes(
    instances: dict[str, np.ndarray], classes: Collection[int], empty: bool = False
) -> dict:
    """Those objects whose class is one of `classes` and, unless `empty`, that have a pixel left."""
    kept = np.isin(instances["classes"], list(classes))
    if not empty:
        kept &= instances["masks"].any((1, 2))
    return {key: value[kept] for key, value in instances.items()}


def slots(instances: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """The objects in `count` slots, as a batch has them, all of which have a pixel: `masks` uint8
    [count,H,W], `classes` int32 [count], -1 = empty slot, `boxes` float32 [count,4] (y0, x0, y1,
    x1, pixels, half open) and `crowd` bool [count]; the rest is 0. `dropped`, int32: how many
    objects, the smallest, found no slot.
    """
    masks, classes, crowd = (instances[key] for key in ("masks", "classes", "crowd"))
    dropped = max(0, len(masks) - count)
    if dropped:
        largest = np.argsort(-masks.sum((1, 2), dtype=np.int64), kind="stable")[:count]
        kept = np.sort(largest)
        masks, classes, crowd = masks[kept], classes[kept], crowd[kept]
    fill = [(0, count - len(masks))]
    return {
        "masks": np.pad(masks, [*fill, (0, 0), (0, 0)]),
        "classes": np.pad(classes.astype(np.int32), fill, constant_values=-1),
        "boxes": np.pad(bounds(masks).astype(np.float32), [*fill, (0, 0)]),
        "crowd": np.pad(crowd.astype(bool), fill),
        "dropped": np.int32(dropped),
    }
