"""The objects of an example, `instances`: `masks` uint8 [n,H,W], `classes` [n], `crowd` [n]."""

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
