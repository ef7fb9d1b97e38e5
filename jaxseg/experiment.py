"""An experiment's file with its arguments and overrides, as the config of a run."""

from pathlib import Path

from ml_collections import ConfigDict

from jaxseg import config as configs
from jaxseg import models
from jaxseg.data import catalog
from jaxseg.errors import InputError


def resolve(argument: str, overrides: list[tuple[str, str]]) -> ConfigDict:
    """The complete, locked, checked config of FILE[:key=value,...] and overrides."""
    config = configs.load(argument)
    # First of all the names: what they name has the keys and the defaults of the rest.
    named = [pair for pair in overrides if pair[0] in ("model.name", "model.backbone.name")]
    if "backbone" not in config.model and "model.backbone.name" in dict(named):
        config.model.backbone = {"name": ""}
    configs.override(config, named)
    models.complete(config)
    configs.override(config, overrides)
    without_aux(config)
    configs.check(config)
    things = models.of_objects(config) and not config.model.things
    if things or not config.model.num_classes:
        classes = catalog.classes(config.data.dataset, config.data.root)
        config.model.num_classes = config.model.num_classes or len(classes)
        if things and config.model.num_classes == len(classes):
            config.model.things = classes.things
    return config


def without_aux(config: ConfigDict) -> None:
    """Drops, in place, the learning rates of an auxiliary head that is switched off."""
    if "aux" in config.model and not config.model.aux:
        rules = config.optim.multipliers
        config.optim.multipliers = tuple(
            rule for rule in rules if not str(rule).startswith("('^aux/'")
        )


def shipped(argument: str) -> str:
    """The path of an experiment that comes with jaxseg, "pspnet.py:recipe=mmseg", arguments kept.

    Raises InputError where the experiments were not installed.
    """
    package = Path(__file__).parent
    for folder in (package / "experiments", package.parent / "experiments"):
        if folder.is_dir():
            return str(folder / argument)
    raise InputError(f"no folder experiments beside or in {package}: install jaxseg from its clone")
