"""The papers. One file each, found by its name; every one defines

- `Model(num_classes, ...)(image, train) -> dict of arrays`, a Linen module. image [B,H,W,C] is
  normalised. Optional methods: `fit(size)`, the input size that it needs to label an image of
  `size` (default: the same), and `check_crop(size)`, which raises InputError for a crop that does
  not fit;
- `loss(outputs, batch, *, ...) -> (scalar, dict of scalars)`;
- `predict(outputs, image, *, ...) -> dict` with `semantic` [B,h,w] int32 and `logits` [B,h,w,K]
  float32, where h, w is the input's size, or its centre where convolutions are valid.

The fields of `Model` are the schema of the config's section `model`. A keyword of `loss` or
`predict` that is also a field of `Model` takes that field's value; the other keywords of `loss` are
the schema of the section `loss`.
"""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict

from jaxseg import backbones
from jaxseg.errors import InputError, unknown


def names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def paper(name: str) -> ModuleType:
    """The module of a paper, such as "unet". Raises InputError for another name."""
    if name not in names():
        raise unknown("model", name, names())
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
    _fill(config.model, fields, f"model {config.model.name}")
    own = {k: v for k, v in _keywords(module.loss).items() if k not in fields}
    _fill(config.loss, own, f"loss of {config.model.name}")
    config.model.lock()
    config.loss.lock()


def build(config: ConfigDict) -> tuple[nn.Module, Callable, Callable]:
    """The network, `loss(outputs, batch)` and `predict(outputs, image)` of a completed config."""
    module = paper(config.model.name)
    fields = {key: value for key, value in config.model.items() if key != "name"}
    bound = {**config.loss, **fields}

    def bind(function: Callable) -> Callable:
        return partial(function, **{k: bound[k] for k in _keywords(function)})

    return _construct(module.Model, fields), bind(module.loss), bind(module.predict)


def _fields(constructor: Callable) -> dict[str, Any]:
    """Field -> default of a Linen module or a partial of one; None where it has no default."""
    given = getattr(constructor, "keywords", {})
    fields = dataclasses.fields(getattr(constructor, "func", constructor))
    defaults = {
        f.name: given.get(f.name, f.default) for f in fields if f.name not in ("parent", "name")
    }
    return {k: None if v is dataclasses.MISSING else v for k, v in defaults.items()}


def _keywords(function: Callable) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _fill(section: ConfigDict, defaults: dict[str, Any], owner: str) -> None:
    for key in section:
        if key not in defaults and key != "name":
            raise unknown(f"key of {owner}:", key, defaults)
    for key, value in defaults.items():
        nested = key == "backbone" or dataclasses.is_dataclass(value)
        given = section[key] if key in section else ConfigDict() if nested else value
        if nested:
            if not isinstance(given, ConfigDict) or key == "backbone" and "name" not in given:
                example = '{"name": "resnet50"}' if key == "backbone" else dataclasses.asdict(value)
                raise InputError(f"{owner}: {key} is {given!r}: needs a section, such as {example}")
            inner = (
                _fields(backbones.find(given.name))
                if key == "backbone"
                else dataclasses.asdict(value)
            )
            _fill(given, inner, f"{owner}, {key}")
        elif isinstance(value, tuple) and isinstance(given, list):
            given = tuple(given)
        elif isinstance(value, float) and type(given) is int:
            given = float(given)
        elif value is not None and type(given) is not type(value):
            raise InputError(f"{owner}: {key} is {given!r}: needs a {type(value).__name__}")
        section[key] = given


def _construct(constructor: Callable, fields: dict[str, Any]) -> nn.Module:
    """Calls `constructor` with the fields, nested sections turned into what they configure."""
    defaults, values = _fields(constructor), {}
    for key, value in fields.items():
        if key == "backbone":
            inner = {k: v for k, v in value.items() if k != "name"}
            value = _construct(backbones.find(value.name), inner)
        elif dataclasses.is_dataclass(defaults[key]):
            value = type(defaults[key])(**value)
        values[key] = value
    return constructor(**values)
