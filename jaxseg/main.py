"""The command line: `python -m jaxseg.main [VERB] ...`, also installed as `jaxseg`.

One verb a job; each is a function of plain arguments in a module of its own. Whatever the user can
mend ends in one message and exit code 2.
"""

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jaxseg.errors import EXIT, InputError, exit_code, interrupt, leave, translated, unknown


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
        does="Scores a run on its validation split, or another.",
        example="--workdir runs/quickstart",
    ),
    "predict": Verb(
        does="Labels images.",
        example="--workdir runs/quickstart --input photos/ cat.jpg --output labels/",
    ),
    "check": Verb(
        does="Reads all of a data set, counts classes and names what is wrong with it.",
        example="--data my_folder",
    ),
    "pack": Verb(
        does="Writes a data set as one of TensorFlow Datasets, in ArrayRecord files.",
        example="--dataset my_folder --output packed",
    ),
    "browse": Verb(
        does="Draws training examples, augmented, with their labels.",
        example="--config experiments/quickstart.py --output sheet.png",
    ),
    "convert": Verb(
        does="Makes a run of weights that another library trained.",
        example="--source torchvision --arch deeplabv3_resnet101 --checkpoint weights.pth "
        "--workdir runs/converted",
    ),
    "describe": Verb(
        does="Tells parameters, multiply-accumulates, shapes and memory.",
        example="--config experiments/unet.py --size 572,572",
    ),
    "benchmark": Verb(
        does="Times a training step or the labels of a batch, on noise.",
        example="--config experiments/deeplabv3plus.py --mode infer --size 513,513 --batch 4",
    ),
}


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are InputErrors that name the nearest flag."""

    def error(self, message: str) -> NoReturn:
        """Raises InputError."""
        word = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
        near = difflib.get_close_matches(word, self._option_string_actions, n=1)
        hint = f" Did you mean {near[0]}?" if near and word != message.split()[0] else ""
        raise InputError(f"{message}.{hint} See {self.prog} --help")


def parser(verb: str) -> Parser:
    """The arguments of one verb."""
    does, example = VERBS[verb]
    prog = f"python -m jaxseg.main {verb}"
    p = Parser(prog, description=does, epilog=f"example: {prog} {example}", allow_abbrev=False)
    if verb in ("train", "eval", "check", "browse", "describe", "benchmark"):
        required = verb in ("train", "browse", "benchmark")
        p.add_argument("--config", metavar="FILE[:key=value,...]", required=required)
    if verb not in ("check", "pack", "browse", "benchmark"):
        required = verb in ("train", "predict", "convert")
        p.add_argument("--workdir", type=Path, metavar="DIR", required=required)
    if verb in ("train", "eval"):
        several = p.add_argument_group(
            "one of several processes, each started with the same command"
        )
        several.add_argument("--coordinator", default="", metavar="HOST:PORT", help="of process 0")
        several.add_argument("--processes", type=int, default=0, metavar="N")
        several.add_argument("--process", type=int, default=-1, metavar="I", help="0 .. N - 1")
        several.add_argument(
            "--multihost",
            action="store_true",
            help="find all that out, on a Cloud TPU pod; SLURM, GKE and Open MPI need no flag",
        )
        several.add_argument(
            "--patience", type=float, default=300, metavar="S", help="seconds until all have come"
        )
    if verb == "train":
        p.add_argument(
            "--dry_run", action="store_true", help="build everything, run a step, evaluate a batch"
        )
    if verb == "eval":
        p.add_argument(
            "--split", help="default: data.eval_split; reports of others go to WORKDIR/eval/SPLIT"
        )
        p.add_argument(
            "--save_predictions",
            action="store_true",
            help="also WORKDIR/predictions/SPLIT/NAME.png, indexed",
        )
        p.add_argument(
            "--submission",
            action="store_true",
            help="with --save_predictions also submission/NAME.png, in the benchmark's ids",
        )
        p.add_argument(
            "--predictions",
            type=Path,
            metavar="DIR",
            help="score these PNGs, without a network; the data set is that of --workdir or "
            "--config, and the report goes into this folder",
        )
    if verb == "predict":
        p.add_argument(
            "--input",
            type=Path,
            nargs="+",
            required=True,
            metavar="FILE_OR_FOLDER",
            help="also patterns, in quotes, such as 'photos/**/*.jpg'",
        )
        p.add_argument("--output", type=Path, required=True, metavar="DIR")
        p.add_argument("--save_logits", action="store_true", help="also NAME.npz, float32 [H,W,K]")
        p.add_argument(
            "--save_probabilities",
            action="store_true",
            help="also NAME_probabilities.npz, float32 [H,W,K]",
        )
        p.add_argument(
            "--save_alpha",
            action="store_true",
            help="also NAME_alpha.png, grey: the probability of the second of two classes",
        )
        p.add_argument(
            "--legend", action="store_true", help="also legend.png, the classes' colours"
        )
        p.add_argument(
            "--submission",
            action="store_true",
            help="also submission/NAME.png, with the ids that the benchmark's server expects",
        )
        p.add_argument(
            "--part", default="1/1", metavar="I/N", help="as the I-th of N processes, from 1"
        )
    if verb == "check":
        p.add_argument("--data", metavar="NAME_OR_FOLDER", help="as data.dataset: all its splits")
        p.add_argument("--root", default="", metavar="DIR", help="as data.root, with --data")
        p.add_argument("--channels", type=int, default=3, help="as data.channels, with --data")
        p.add_argument("--json", action="store_true", help="one JSON object")
    if verb == "pack":
        p.add_argument("--dataset", required=True, metavar="NAME_OR_FOLDER", help="as data.dataset")
        p.add_argument("--output", type=Path, required=True, metavar="DIR")
        p.add_argument("--root", default="", metavar="DIR", help="as data.root")
        p.add_argument("--name", default="", help="default: that of the data set")
        p.add_argument("--splits", nargs="+", default=(), metavar="SPLIT", help="default: all")
        p.add_argument("--channels", type=int, default=3, help="1 = grey, 3 = RGB, the default")
        p.add_argument("--instances", action="store_true", help="objects too")
    if verb == "browse":
        p.add_argument("--output", type=Path, required=True, metavar="FILE.png")
        p.add_argument("--count", type=int, default=16, metavar="N", help="examples, 16 by default")
    if verb == "convert":
        p.add_argument("--source", required=True, help="torchvision, smp, mmseg, mmdet or timm")
        p.add_argument("--arch", required=True, help="as the source calls it")
        p.add_argument("--checkpoint", type=Path, required=True, metavar="FILE")
        p.add_argument(
            "--num_classes",
            type=int,
            default=0,
            help="default: the checkpoint's; another number makes a new classifier",
        )
        p.add_argument("--dataset", default="", help="whose classes they are")
    if verb == "describe":
        p.add_argument("--size", metavar="H,W", help="default: the training crop")
        p.add_argument(
            "--budget", metavar="16G", help="memory of a device, for the largest batch that fits"
        )
        p.add_argument("--json", action="store_true", help="one JSON object")
    if verb == "benchmark":
        p.add_argument("--mode", default="train", metavar="train|infer")
        p.add_argument("--size", metavar="H,W", help="of the network's input; default: data.crop")
        p.add_argument(
            "--batch", type=int, default=0, metavar="N", help="default: train.batch or eval.batch"
        )
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
        "jaxseg/config.py explains the keys of --config.a.b=value; those of model and loss are the",
        "fields of the paper's Model and the keywords of its loss, in jaxseg/models.",
    ]
    return "\n".join(lines)


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


def check_overrides(
    verb: str, args: argparse.Namespace, overrides: Sequence[tuple[str, str]]
) -> None:
    """Raises InputError for an override where there is no config that it could change."""
    if getattr(args, "config", None):
        return
    for key, _ in overrides:
        if verb in ("eval", "predict"):
            if key.startswith("eval."):
                continue
            why = f"{verb} uses the run's own config, in which eval.* alone can be set"
        elif "config" not in args:
            why = f"{verb} takes no config. See python -m jaxseg.main {verb} --help"
        elif getattr(args, "workdir", None):
            why = f"{verb} --workdir takes the run's own config. Leave it out, or use --config FILE"
        else:
            why = "needs --config FILE, the config that it changes"
        raise InputError(f"--config.{key}: {why}")


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
    check_overrides(verb, args, overrides)

    # A word less from the compiler's C++ side; errors still show.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from jaxseg.compiler import use_cache
    from jaxseg.experiment import resolve
    from jaxseg.models import learns
    from jaxseg.workdir import load_config

    if verb != "benchmark":  # which says how long compiling takes
        use_cache()
    if verb in ("train", "eval"):
        from jaxseg.config import flat
        from jaxseg.distributed import find, joined

        place = find(args.coordinator, args.processes, args.process, args.multihost)
        with joined(place, args.patience) as line:
            config = resolve(args.config, overrides) if verb == "train" else None
            if line:
                line.agree(
                    flat(config) if verb == "train" else {"split": args.split, **dict(overrides)}
                )
                line.start()
            return train(args, config) if verb == "train" else evaluate(args, overrides)
    if verb == "predict":
        from jaxseg.verbs.predict import Formats

        part = parse_part(args.part)
        if learns(load_config(args.workdir)):
            from jaxseg.verbs.predict import predict
        else:
            from jaxseg.verbs.regions import predict

        formats = Formats(args.save_logits, args.save_probabilities, args.save_alpha)
        labelled = partial(
            predict, args.workdir, args.input, args.output, formats, args.legend, part
        )
        return submitting(args, args.output, lambda: labelled(overrides))
    if verb == "check":
        from jaxseg.verbs.check import check

        if (args.config is None) == (args.data is None):
            raise InputError("check needs --config FILE or --data NAME_OR_FOLDER, one of them")
        if args.data:
            return check(args.data, [], args.root, args.channels, args.json)
        data = resolve(args.config, overrides).data
        splits = list(dict.fromkeys([data.train_split, data.eval_split]))
        return check(data.dataset, splits, data.root, data.channels, args.json)

    if verb == "pack":
        from jaxseg.verbs.pack import pack

        return pack(
            args.dataset,
            args.output,
            name=args.name,
            chosen=args.splits,
            root=args.root,
            channels=args.channels,
            instances=args.instances,
        )
    if verb == "browse":
        from jaxseg.verbs.browse import browse

        return browse(resolve(args.config, overrides), args.output, args.count)
    if verb == "convert":
        from jaxseg.verbs.convert import convert

        names = (args.source, args.arch, args.checkpoint, args.workdir)
        return convert(*names, args.num_classes, args.dataset)

    if verb == "benchmark":
        from jaxseg.verbs.benchmark import benchmark

        config, size = resolve(args.config, overrides), parse_size(args.size)
        return benchmark(config, args.mode, size, args.batch, args.json)

    from jaxseg.verbs.describe import describe

    if (args.config is None) == (args.workdir is None):
        raise InputError("describe needs --config FILE or --workdir DIR, one of them")
    config = resolve(args.config, overrides) if args.config else None
    size, budget = parse_size(args.size), parse_bytes(args.budget)
    return describe(config, args.workdir, size, args.json, budget)


def train(args: argparse.Namespace, config: Any) -> int:
    """The verb `train`: of a network, or of regions, which have nothing to learn."""
    from jaxseg.models import learns

    if learns(config):
        from jaxseg.train import train
    else:
        from jaxseg.verbs.regions import train

    return train(config, args.workdir, args.dry_run)


def evaluate(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    """The verb `eval`: of a run, or of saved predictions."""
    from jaxseg.models import learns
    from jaxseg.workdir import load_config

    if args.predictions is None:
        if args.workdir is None or args.config:
            raise InputError("eval needs --workdir DIR, or --predictions DIR of labels to score")
        if learns(load_config(args.workdir)):
            from jaxseg.verbs.score import score
        else:
            from jaxseg.verbs.regions import score

        split = args.split or load_config(args.workdir).data.eval_split
        if args.submission and not args.save_predictions:
            raise InputError("--submission needs --save_predictions: it writes them once more")
        scored = partial(score, args.workdir, args.split, args.save_predictions, overrides)
        return submitting(args, args.workdir / "predictions" / split, scored)

    if args.submission or args.save_predictions:
        word = "--submission" if args.submission else "--save_predictions"
        raise InputError(
            f"{word} needs a network's labels: --predictions scores those in a folder, and writes "
            "none. Leave one of them out"
        )
    from jaxseg.config import check, override
    from jaxseg.evaluate import rescore
    from jaxseg.experiment import resolve

    if (args.config is None) == (args.workdir is None):
        raise InputError(
            "eval --predictions needs --workdir DIR or --config FILE, one of them: for the data set"
        )
    if args.config:
        config = resolve(args.config, overrides)
    else:
        config = load_config(args.workdir)
        override(config, overrides)
        check(config)
    edges = config.eval.boundary or "eval.boundary" not in dict(overrides)
    return rescore(config, args.predictions, args.split, edges)


def submitting(args: argparse.Namespace, folder: Path, work: Callable[[], int]) -> int:
    """Does the work that labels images into a folder; with --submission for a server as well."""
    if not args.submission:
        return work()
    import jax

    from jaxseg.data import catalog
    from jaxseg.log import say
    from jaxseg.models import learns
    from jaxseg.workdir import load_config

    config = load_config(args.workdir)
    if not learns(config):
        raise InputError("--submission needs a network: regions have no classes")
    dataset = config.data.dataset
    catalog.benchmark(dataset)
    code = work()
    if jax.process_index() == 0:  # of several that share the folder
        say(f"for the server of {dataset}: {catalog.write_submission(folder, dataset)}")
    return code


def parse_part(text: str) -> tuple[int, int]:
    """ "I/N" as (i, n). Raises InputError unless 1 <= i <= n."""
    try:
        index, count = (int(n) for n in text.split("/"))
        if not 1 <= index <= count:
            raise ValueError
    except ValueError:
        raise InputError(f"--part {text}: needs I/N with 1 <= I <= N, such as 1/4") from None
    return index, count


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


def parse_bytes(text: str | None) -> int:
    """ "16G" as bytes, in powers of 1024; 0 for None. Raises InputError for anything else."""
    if text is None:
        return 0
    number, unit = (text[:-1], text[-1:].upper()) if text[-1:].isalpha() else (text, "")
    powers = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
    try:
        count = float(number) * 1024 ** powers[unit]
        if not 1 <= count < 2**63:
            raise ValueError
    except (ValueError, KeyError):
        raise InputError(f"--budget {text}: needs a memory size, such as 16G or 512M") from None
    return int(count)


def main() -> None:
    """Runs the command line and exits with its code.

    0: done. 1: a defect of jaxseg; `check` found errors. 2: something to mend. 42: stopped by a
    signal, and saved. 75: stuck, or a peer or worker died: the same command goes on. 76: training
    diverges. 130: interrupted where there was nothing to save.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not so under nohup
        signal.signal(signal.SIGINT, interrupt)
    try:
        code = run(sys.argv[1:])
    except (*EXIT, Exception) as problem:
        error = translated(problem)
        if not isinstance(error, tuple(EXIT)):
            raise
        text = f"error: {error}" if str(error) else "interrupted"
        print(text, file=sys.stderr)
        code = exit_code(error)
    leave(code)


if __name__ == "__main__":
    main()
