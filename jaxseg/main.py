"""The command line: `python -m jaxseg.main [VERB] ...`, also installed as `jaxseg`.

One verb a job; each is a function of plain arguments in a module of its own. Whatever the user can
mend ends in one message and exit code 2.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from jaxseg.errors import InputError, unknown

if TYPE_CHECKING:
    from ml_collections import ConfigDict


class Verb(NamedTuple):
    """A verb as --help shows it."""

    does: str
    example: str  # what to write after the verb


VERBS = {
    "train": Verb(
        does="Trains a network, or goes on with a run.",
        example="--config experiments/quickstart.py --workdir runs/quickstart",
    ),
    "eval": Verb(
        does="Scores a run on its validation split.",
        example="--workdir runs/quickstart",
    ),
    "predict": Verb(
        does="Labels images.",
        example="--workdir runs/quickstart --input photos/ cat.jpg --output labels/",
    ),
    "describe": Verb(
        does="Tells parameters, multiply-accumulates, shapes and memory.",
        example="--config experiments/unet.py --size 572,572",
    ),
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}. See python -m jaxseg.main --help")


def parser(verb: str) -> Parser:
    """The arguments of one verb."""
    does, example = VERBS[verb]
    prog = f"python -m jaxseg.main {verb}"
    p = Parser(prog, description=does, epilog=f"example: {prog} {example}", allow_abbrev=False)
    if verb in ("train", "describe"):
        p.add_argument("--config", metavar="FILE[:key=value,...]", required=verb == "train")
    p.add_argument("--workdir", type=Path, metavar="DIR", required=verb != "describe")
    if verb == "train":
        p.add_argument(
            "--dry_run", action="store_true", help="build everything, run one step, stop"
        )
    if verb == "eval":
        p.add_argument("--split", help="default: data.eval_split of the run")
    if verb == "predict":
        p.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE_OR_FOLDER")
        p.add_argument("--output", type=Path, required=True, metavar="DIR")
        p.add_argument("--save_logits", action="store_true", help="also NAME.npz, float32 [H,W,K]")
    if verb == "describe":
        p.add_argument("--size", metavar="H,W", help="default: the training crop")
        p.add_argument("--json", action="store_true", help="one JSON object")
    return p


def help_text() -> str:
    """What --help prints: the verbs with an example each."""
    lines = [
        "jaxseg: image segmentation in JAX\n",
        "python -m jaxseg.main [VERB] [--config FILE[:key=value,...]] --workdir DIR "
        "[--config.a.b=value]\n",
        "Verbs (train is the default), with an example each:",
        *(f"  {name} {verb.example}\n      {verb.does}" for name, verb in VERBS.items()),
        "\npython -m jaxseg.main VERB --help lists a verb's arguments.",
        "Every key that --config.a.b=value can set is explained in jaxseg/config.py.",
    ]
    return "\n".join(lines)


def resolve(argument: str, overrides: list[tuple[str, str]]) -> "ConfigDict":
    """The complete, locked, checked config of a file with its arguments and overrides."""
    from jaxseg import config as configs
    from jaxseg import models
    from jaxseg.data import catalog

    config = configs.load(argument)
    # First of all the names: what they name has the keys and the defaults of the rest.
    named = [pair for pair in overrides if pair[0] in ("model.name", "model.backbone.name")]
    configs.override(config, named)
    models.complete(config)
    configs.override(config, overrides)
    configs.check(config)
    if not config.model.num_classes:
        config.model.num_classes = len(catalog.classes(config.data.dataset, config.data.root))
    return config


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Takes --config.a.b=value out of argv. Raises InputError for one without "="."""
    rest, overrides = [], []
    for word in argv:
        if word.startswith("--config."):
            key, equals, value = word.removeprefix("--config.").partition("=")
            if not equals:
                raise InputError(f"{word} has no value: write {word}=VALUE, with the equals sign")
            overrides.append((key, value))
        else:
            rest.append(word)
    return rest, overrides


def run(argv: Sequence[str]) -> int:
    """Runs a command; returns its exit code. Raises InputError for what the user can mend."""
    rest, overrides = split_overrides(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return 0
    verb = rest.pop(0) if rest and not rest[0].startswith("-") else "train"
    if verb not in VERBS:
        raise unknown("verb", verb, VERBS)
    args = parser(verb).parse_args(rest)
    if overrides and not getattr(args, "config", None):
        raise InputError(
            f"--config.{overrides[0][0]} needs --config FILE: {verb} uses the run's own config"
        )

    # A word less from the compiler's C++ side; errors still show.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if verb == "train":
        from jaxseg.train import train

        return train(resolve(args.config, overrides), args.workdir, args.dry_run)
    if verb == "eval":
        from jaxseg.train import score

        return score(args.workdir, args.split)
    if verb == "predict":
        from jaxseg.predict import predict

        return predict(args.workdir, args.input, args.output, args.save_logits)

    from jaxseg.describe import describe

    if (args.config is None) == (args.workdir is None):
        raise InputError("describe needs --config FILE or --workdir DIR, one of them")
    config = resolve(args.config, overrides) if args.config else None
    return describe(config, args.workdir, parse_size(args.size), args.json)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """ "H,W" as (height, width). Raises InputError for anything else."""
    if text is None:
        return None
    try:
        height, width = (int(n) for n in text.split(","))
        if min(height, width) < 1:
            raise ValueError
    except ValueError:
        raise InputError(
            f"--size {text}: needs two positive integers H,W, such as 513,513"
        ) from None
    return height, width


def main() -> None:
    """Runs the command line and exits with its code.

    0: done. 1: the loss is not finite. 2: something to mend. 42: stopped by a signal, and saved.
    """
    try:
        code = run(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
