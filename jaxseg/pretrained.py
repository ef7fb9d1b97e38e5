"""Weights that a run starts from: an ImageNet backbone in a file of another library."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxseg.errors import InputError
from jaxseg.log import say
from jaxseg.optim import path_of
from jaxseg.weights import files, imagenet
from jaxseg.weights.names import fit


def load_backbone(path: Path, name: str, variables: dict[str, Any]) -> dict[str, Any]:
    """`variables` (params and batch_stats) with the backbone's arrays from a file.

    name: our backbone, such as "resnet50". Says what became of the file. Raises InputError, with
    the report, where an array of the backbone is missing or of another shape.
    """
    shapes = {key: value.shape for key, value in flat(variables).items()}
    rules = imagenet.rules(name, prefix=r"(?:module\.|backbone\.|encoder\.)?")
    arrays, report = fit(files.read(path), rules, shapes)
    lost = [key for key in report.missing if key.split("/")[1] == "backbone"]
    if lost:
        raise InputError(
            f"{path} is not a {name} of torchvision or timm: {len(lost)} of its arrays are missing "
            f"or of another shape.\n{report.text()}\nCheck the backbone's name and its stem."
        )
    say(f"backbone {name} from {path}: {len(arrays)} arrays; unused: {len(report.unused)}")
    return filled(variables, arrays)


def flat(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, such as "params/stem/conv/kernel"."""
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def filled(tree: Any, arrays: dict[str, np.ndarray]) -> Any:
    """A tree of arrays with those of `arrays`, by path, in place of its own, sharded like them."""

    def take(keys: tuple, value: jax.Array) -> jax.Array:
        array = arrays.get(path_of(keys))
        return value if array is None else jax.device_put(array, value.sharding)

    return jax.tree_util.tree_map_with_path(take, tree)
