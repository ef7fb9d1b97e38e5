"""Weights that a run starts from: an ImageNet backbone in a file of another library."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxseg.config import default
from jaxseg.errors import InputError
from jaxseg.log import say
from jaxseg.optim import path_of
from jaxseg.weights import files, imagenet
from jaxseg.weights.names import fit

PREFIX = r"(?:module\.|backbone\.|encoder\.)?"


def load_backbone(path: Path, config: ConfigDict, variables: dict[str, Any]) -> dict[str, Any]:
    """`variables` (params and batch_stats) of a completed config with the backbone's arrays of a
    file: of the backbone alone, or of a network that calls it "backbone." or "encoder.".

    Says what became of the file, and where the config's network or input is not that of the
    weights. Raises InputError, with the report, where an array of the backbone is missing or of
    another shape, where the file has arrays of a larger one, and for a network without a backbone.
    """
    name = backbone_name(config, variables)
    shapes = {key: value.shape for key, value in flat(variables).items()}
    state = files.read(path)
    arrays, report = fit(state, imagenet.rules(name, PREFIX), shapes)
    lost = [key for key in report.missing if key.split("/")[1] == "backbone"]
    extra = [key for key in report.unused if not ignorable(key, name, state)]
    if lost or extra:
        raise InputError(
            f"{path} is not a {name} of torchvision or timm: {len(lost)} of its arrays are missing "
            f"or of another shape, and {len(extra)} of the file have no place in it"
            f"{': ' + ', '.join(extra[:4]) if extra else ''}.\n{report.text()}\n"
            "Check the backbone's name and its stem."
        )
    say(f"backbone {name} from {path}: {len(arrays)} arrays; unused: {len(report.unused)}")
    for line in differences(config):
        say(f"WARNING: {line}")
    return filled(variables, arrays)


def backbone_name(config: ConfigDict, variables: dict[str, Any]) -> str:
    """Ours, such as "resnet50"; "vgg16_bn" for SegNet, whose encoder it is."""
    name = config.model.backbone.name if "backbone" in config.model else ""
    if not name and "conv1_1" in variables["params"].get("backbone", {}):
        return "vgg16_bn"
    if not name:
        raise InputError(
            f"init.backbone is {config.init.backbone}, but this {config.model.name} has no "
            "backbone: set model.backbone.name where it can have one, or start from a run of the "
            "same network with init.workdir"
        )
    return name


def ignorable(key: str, name: str, state: dict[str, np.ndarray]) -> bool:
    """Whether an array of a file need not have a place in the backbone `name`: a classifier's, or
    that of a head, where the file is a whole network's."""
    inside = re.match(r"(backbone|encoder)\.", key)
    if not inside and any(re.match(r"(backbone|encoder)\.", other) for other in state):
        return True
    known = imagenet.CLASSIFIERS + (f"|{imagenet.LAST}" if name == "mobilenetv2" else "")
    return bool(re.fullmatch(f"{PREFIX}(?:{known})", key))


def differences(config: ConfigDict) -> list[str]:
    """In what the config differs from the networks and inputs of torchvision and timm: one line
    each, for the weights fit nevertheless."""
    lines, data, ours = [], config.data, default().data
    backbone = config.model.backbone if "backbone" in config.model else {"name": "vgg16_bn"}
    if "strides" in backbone and backbone["strides"] != "pytorch":
        lines.append(
            f"model.backbone.strides is {backbone['strides']}: the ResNets of torchvision and "
            "timm were trained with pytorch, strides in the 3x3 of a stage's first unit"
        )
    inception = (127.5, 127.5, 127.5)
    xception = backbone["name"].startswith("xception")
    mean, std = (inception, inception) if xception else (ours.mean, ours.std)
    if data.channels == 3 and not (
        np.allclose(data.mean, mean, atol=1) and np.allclose(data.std, std, atol=1)
    ):
        lines.append(
            f"data.mean and data.std are {data.mean} and {data.std}: such weights were "
            f"trained with {mean} and {std}"
        )
    return lines


def flat(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, such as "params/stem/conv/kernel"."""
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def filled(tree: Any, arrays: dict[str, np.ndarray]) -> Any:
    """A tree of arrays with those of `arrays`, by path, in place of its own, sharded like them."""

    def take(keys: tuple, value: jax.Array) -> jax.Array:
        array = arrays.get(path_of(keys))
        return value if array is None else jax.device_put(array, value.sharding)

    return jax.tree_util.tree_map_with_path(take, tree)
