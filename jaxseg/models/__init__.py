"""The papers. One file each, found by its name; every one defines

- `Model(num_classes, ...)(image, train) -> dict of arrays`, a Linen module. image [B,H,W,C] is
  normalised. Optional methods: `fit(size)`, the input size that it needs to label an image of
  `size` (default: the same), `check()`, which raises InputError for fields that fit no image,
  `check_crop(size)`, which raises it for a crop that does not fit, and `inputs(batch) -> tuple`,
  what it is given after the image in training: two-stage networks train on regions that they
  choose with the truth in view;
- `loss(outputs, batch, *, ...) -> (scalar, dict of scalars)`, with a key for what it draws at
  random, `batch["rng"]`, in training;
- `predict(outputs, image, *, ...) -> dict` with `semantic` [B,h,w] int32 and `logits` [B,h,w,K]
  float32, where h, w is the input's size, or its centre where convolutions are valid.

A paper of objects has the field `things`, the class ids whose objects it tells apart, () for all;
outside the network classes have the data set's ids. Its batches have objects, see
`pipeline.train_batches`, and its `predict` gives any of `semantic`, with or without `logits`,
`instances` and `panoptic` int32 [B,h,w], class id * 1000 + the number of the object (from 1; 0 of
stuff), 255000 = void. `instances` has `masks` bool [B,M,h,w], `scores` float32 [B,M], `classes`
int32 [B,M], -1 = empty slot, and where the paper has them `boxes` float32 [B,M,4] (y0, x0, y1, x1,
pixels). h, w is the input's size.

The fields of `Model` are the schema of the config's section `model`, and those of a dataclass or a
backbone among them that of a section inside it. A keyword of `loss` or `predict` that is also a
field of `Model` takes that field's value; the other keywords of `loss` are the schema of the
section `loss`.

A paper without parameters, see `WITHOUT_PARAMETERS`, has no `loss` and no `predict`: its
`Model(...)(image)` takes one image on the host and returns int32 [H,W], regions without a class.
"""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict

from jaxseg import backbones
from jaxseg.errors import InputError, unknown

WITHOUT_PARAMETERS = ("classical",)  # nothing to train: the host computes regions


def names() -> list[str]:
    """The papers with a network."""
    modules = {m.name for m in pkgutil.iter_modules(__path__)}
    return sorted(modules - set(WITHOUT_PARAMETERS))


def paper(name: str) -> ModuleType:
    """The module of a paper, such as "unet". Raises InputError for another name."""
    if name not in (valid := [*names(), *WITHOUT_PARAMETERS]):
        raise unknown("model", name, valid)
    return importlib.import_module(f"jaxseg.models.{name}")


def complete(config: ConfigDict) -> None:
    """Adds, in place, the default of every field that `config.model` and `config.loss` leave out,
    and locks them.

    Raises InputError for a key that the paper's `Model` or `loss` does not have.
    """
    if "name" not in config.model:
        raise InputError(f"config.model has no name: needs one of {', '.join(names())}")
    module = paper(config.model.name)
    fields = _fields(module.Model)
    _fill(config.model, {"name": config.model.name, **fields}, f"model {config.model.name}")
    own = {}
    if learns(config):
        own = {k: v for k, v in _keywords(module.loss).items() if k not in fields}
    _fill(config.loss, own, f"loss of {config.model.name}")
    config.model.lock()
    config.loss.lock()


def learns(config: ConfigDict) -> bool:
    return config.model.name not in WITHOUT_PARAMETERS


def of_objects(config: ConfigDict) -> bool:
    """Whether the paper tells objects apart: its `Model` has the field `things`."""
    return "things" in config.model


def things(config: ConfigDict) -> tuple[int, ...]:
    """The class ids whose objects a paper of objects tells apart: all of them unless it says.

    An output that is of no class has -1 in config.model.things, and is left out here.
    """
    named = config.model.things or range(config.model.num_classes)
    return tuple(k for k in named if k >= 0)


def stuff_area(config: ConfigDict) -> int:
    """The pixels that a stuff class needs in an image, else it is void; 0: no paper of panoptic
    maps."""
    return config.model.stuff_area if "stuff_area" in config.model else 0


def segmenter(config: ConfigDict) -> Callable:
    """`regions(image)` of a completed config of a paper without parameters.

    Raises InputError for fields that no image could be segmented with.
    """
    fields = {key: value for key, value in config.model.items() if key != "name"}
    return paper(config.model.name).Model(**fields)


def build(config: ConfigDict) -> tuple[nn.Module, Callable, Callable]:
    """The network, `loss(outputs, batch)` and `predict(outputs, image)` of a completed config.

    Raises InputError for fields that fit no image, and for things that are no classes.
    """
    if not learns(config):
        raise InputError(
            f"{config.model.name} has no network and no parameters: it knows the verbs train, "
            "which only scores it, eval and predict"
        )
    if of_objects(config):
        _check_things(config.model.things, config.model.num_classes)
    module = paper(config.model.name)
    fields = {key: value for key, value in config.model.items() if key != "name"}
    own = {k: v for k, v in _keywords(module.loss).items() if k not in fields}
    bound = {**_values(own, config.loss), **fields}

    def bind(function: Callable) -> Callable:
        return partial(function, **{k: bound[k] for k in _keywords(function)})

    model = module.Model(**_values(_fields(module.Model), fields))
    if hasattr(model, "check"):
        model.check()
    return model, bind(module.loss), bind(module.predict)


def _check_things(ids: tuple[int, ...], num_classes: int) -> None:
    named = [k for k in ids if k != -1]
    ours = all(type(k) is int and 0 <= k < num_classes for k in named)
    if not ours or len(set(named)) < len(named):
        raise InputError(
            f"model.things is {ids}, of {num_classes} classes: needs different class ids from 0 to "
            f"{num_classes - 1}, -1 for an output of no class, or () for all classes"
        )


def _fields(constructor: Callable) -> dict[str, Any]:
    """Field -> default of a Linen module or a partial of one; MISSING where it has no default."""
    given = getattr(constructor, "keywords", {})
    fields = dataclasses.fields(getattr(constructor, "func", constructor))
    return {
        f.name: given.get(f.name, f.default) for f in fields if f.name not in ("parent", "name")
    }


def _keywords(function: Callable) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _fill(section: ConfigDict, defaults: dict[str, Any], owner: str) -> None:
    """Gives `section` every key of `defaults`; a key with keys of its own is a section too."""
    for key in section:
        if key not in defaults:
            raise unknown(f"key of {owner}:", key, defaults)
    for key, default in defaults.items():
        if key == "backbone" or dataclasses.is_dataclass(default):
            given = section[key] if key in section else ConfigDict()
            if not isinstance(given, ConfigDict):
                raise InputError(f"{owner}: {key} is {given!r}: needs a section of keys and values")
            _fill(given, _inner(key, default, given, owner), f"{owner}, {key}")
        else:
            given = section[key] if key in section else default
            given = _like(given, default, f"{owner}: {key}")
        section[key] = given


def _inner(key: str, default: Any, given: ConfigDict, owner: str) -> dict[str, Any]:
    """The keys of a section, with their defaults: a dataclass's fields or a backbone's."""
    if key != "backbone":
        return dataclasses.asdict(default)
    if "name" in given and given.name:
        return {"name": given.name, **_fields(backbones.find(given.name))}
    if default is dataclasses.MISSING:
        raise InputError(f'{owner}: no backbone: needs a section, such as {{"name": "resnet50"}}')
    return {"name": ""}


def _like(value: Any, default: Any, key: str) -> Any:
    """`value` in the type of `default`. Raises InputError where it cannot be."""
    if default is dataclasses.MISSING:
        return None if value is default else value
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(value)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if default is not None and type(value) is not type(default):
        raise InputError(f"{key} is {value!r}: needs a {type(default).__name__}")
    return value


def _values(defaults: dict[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    """What a section stands for: nested ones become the backbone or dataclass they configure."""
    values = {}
    for key, value in section.items():
        if key == "backbone":
            constructor = backbones.find(value.name) if value.name else None
            inner = {k: v for k, v in value.items() if k != "name"}
            value = constructor and constructor(**_values(_fields(constructor), inner))
        elif dataclasses.is_dataclass(defaults[key]):
            value = type(defaults[key])(**value)
        values[key] = value
    return values
