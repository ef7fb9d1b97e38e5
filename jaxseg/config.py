"""The configuration: the whole schema, and how a file, its arguments and the command line fill it.

An experiment is a Python file with `get_config(**arguments)`; it starts from `default()` and
assigns what its paper says. The sections `model` and `loss` have no keys of their own here: theirs
are the fields of the paper's `Model` and the keyword arguments of its `loss`, added by
`jaxseg.models.complete`, so that every number has one home. A config file is a program: run only
those that you trust.
"""

import ast
import importlib.util
import inspect
import json
import math
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ml_collections import ConfigDict

from jaxseg.errors import InputError, unknown

KINDS = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "text",
    tuple: "a tuple",
    ConfigDict: "a section",
}
# What only the host does to training images.
HOST_ONLY = "cat_max_ratio rotate elastic quarter_turns copy_paste blur border_weight".split()
HOST_ONLY += ["crop_on_objects", "objects"]
EVAL_CHOICES = {
    "mode": ("whole", "slide"),
    "blend": ("uniform", "gaussian"),
    "average": ("probabilities", "logits"),
}


def default() -> ConfigDict:
    """Every key once, with its unit. Locked: a misspelt key raises. `model` and `loss` are open."""
    config = ConfigDict()

    config.data = data = ConfigDict()
    data.dataset = "shapes"  # "shapes", a name under `root`, NAME:PATH, tfds:NAME, or a path
    data.root = ""  # folder that holds the named data sets; "" = environment variable JAXSEG_DATA
    data.train_split = "train"
    data.eval_split = "val"
    data.channels = 3  # 1 = grey, 3 = RGB; another number: as many as the files have
    data.mean = (123.675, 116.28, 103.53)  # per channel, 0..255; ImageNet's
    data.std = (58.395, 57.12, 57.375)  # per channel, 0..255; ImageNet's
    data.crop = (512, 512)  # height, width of a training example, pixels
    data.resize = (0, 0)  # long, short side to fit training images into; (0, 0) = their own
    data.scale = (1.0, 1.0)  # range of the random resize factor in training, after data.resize:
    # this is multi-scale training; evaluation sees images at their own size, or at eval.scales
    data.scale_step = 0.0  # only factors low, low + step, ... of that range; 0 = any
    data.cat_max_ratio = 1.0  # draw a crop anew (10 times) where a class has this share; 1 = off
    data.rotate = 0.0  # turn by up to this angle either way, degrees; 0 = off
    data.elastic = 0.0  # bend: standard deviation of a 3x3 grid's vectors, pixels; 0 = off
    data.quarter_turns = False  # turn by 0, 90, 180 or 270 degrees: images that have no up
    data.flip = True  # mirror left-right, probability 0.5
    data.flip_vertical = False  # mirror top-bottom, probability 0.5
    data.copy_paste = 0.0  # probability of objects from another image; needs object masks
    data.objects = 0  # slots for the objects of a training example; more: the smallest are dropped
    data.crop_on_objects = 0.0  # probability that a crop is drawn around a random object
    data.photometric = False  # brightness, contrast, saturation and hue jitter
    data.hue = 18.0  # largest turn of the hue in it, degrees
    data.blur = 0.0  # probability of a Gaussian blur, 5x5 pixels
    data.border_weight = 0.0  # U-Net's w0: how much pixels between two cells count more; 0 = off
    data.border_sigma = 5.0  # its sigma, pixels
    data.border_class = 1  # the class whose connected parts are the cells
    data.transform = ""  # "package.module:function" of one's own, (image, label) -> both; is run
    data.augment_on = "host"  # or "device": scale, crop, flips, photometric inside the step
    data.threads = 2  # host threads that read and augment
    data.workers = 0  # host processes that read and augment; 0 = threads only
    data.on_bad_example = "raise"  # or "skip": train on the next one, up to 0.1% of the examples

    config.model = ConfigDict(
        {"name": ""}
    )  # name: a file of jaxseg/models; the rest are its fields
    config.loss = ConfigDict()  # the keyword arguments of that file's `loss`

    config.optim = optim = ConfigDict()
    optim.name = "sgd"  # "sgd" (momentum, L2 decay in the gradient) or "adamw" (decoupled decay)
    optim.lr = 0.01  # base learning rate
    optim.momentum = 0.9  # sgd
    optim.betas = (0.9, 0.999)  # adamw
    optim.weight_decay = 1e-4  # not on biases and norm parameters
    optim.decay_all = False  # on them too, as torch does unless told
    optim.clip = 0.0  # largest global norm of the gradient; 0 = no clipping
    optim.warmup = 0  # steps of linear warm-up
    optim.power = 0.9  # lr = (base - min) * (1 - step / steps)^power + min; 0 = constant
    optim.min_lr = 0.0
    optim.drops = ()  # steps from which the rate is multiplied by drop_factor, once more each
    optim.drop_factor = 0.1
    optim.multipliers = ()  # (regex, factor) pairs on parameter paths, first match wins; 0 freezes

    config.train = train = ConfigDict()
    train.steps = 30_000  # optimizer steps
    train.batch = 16  # images a step, over all devices
    train.accumulate = 1  # split each batch into this many parts, whose mean losses are averaged
    train.accumulate_norm = "part"  # or "batch": batch norm as if not split, see jaxseg/remat.py
    train.remat = "none"  # or "blocks": keep blocks' inputs alone; a third more work, less memory
    train.seed = 0
    train.compute_dtype = "float32"  # or "bfloat16"; parameters, norms' statistics, losses stay f32
    # Decay of the parameters' moving average, used to evaluate; 0 = none. Step n takes at most
    # (1 + n) / (10 + n), so that the first weights are soon forgotten.
    train.ema = 0.0
    train.log_every = 50  # steps
    train.eval_every = 5_000  # steps; 0 = at the end only
    train.checkpoint_every = 1_000  # steps; 0 = at the end only
    train.keep = 3  # newest checkpoints kept
    # A loss leaps where it is above twice the median and above the median and so many median
    # deviations of the losses before; 0 = none does.
    train.spike = 6.0
    train.watchdog = 1800.0  # seconds without a step, batch or save that end a stuck run; 0 = none

    config.eval = evaluation = ConfigDict()
    evaluation.batch = 8  # images, or windows of few images, at a time, over all devices
    evaluation.buckets = 8  # shapes at most that images of many sizes are extended to, by mirroring
    evaluation.mode = "whole"  # or "slide": in windows, blended where they overlap
    evaluation.crop = (0, 0)  # of a window, labelled pixels; 0 = what a training crop labels
    evaluation.stride = (0, 0)  # from window to window, pixels; 0 = two thirds of the crop
    evaluation.blend = "uniform"  # or "gaussian": a window counts less towards its border
    evaluation.scales = (1.0,)  # resize factors of the input; predictions at the image's own size
    evaluation.flip = False  # also the mirror image of each
    evaluation.turns = False  # also each turned by 90, 180 and 270 degrees (U-Net, section 4)
    evaluation.average = "probabilities"  # or "logits": what windows, scales and views average
    evaluation.output_stride = 0  # of the backbone; 0 = as in training
    evaluation.resize = (0, 0)  # long, short side to fit images into that a network of objects
    # sees, such as (1333, 800); what it finds returns to their own size; (0, 0) = as they are
    evaluation.confidence = 0.5  # score from which objects are drawn and painted; AP counts all
    evaluation.crf = ""  # a set of parameters in jaxseg/ops/crf.py, or FILE.json; "" = no CRF
    evaluation.boundary = False  # boundary scores in training; `eval` has them unless told false
    evaluation.pictures = 8  # validation images drawn after each evaluation, and worst ones shown

    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # devices that share the batch; -1 = all that are left
    mesh.fsdp = 1  # devices that share parameters and optimizer state (and the batch)
    mesh.space = 1  # devices that share the rows of an image

    config.init = ConfigDict()
    config.init.workdir = ""  # start from this run's weights; a differing classifier is new
    config.init.backbone = ""  # a torchvision or timm file (.pth, .safetensors) for the backbone

    config.lock()
    config.model.unlock()
    config.loss.unlock()
    return config


def load(argument: str) -> ConfigDict:
    """Runs `get_config` of FILE[:key=value,...]. A Literal annotation lists an argument's choices.

    Raises InputError when the file or `get_config` is missing, an argument is unknown or of the
    wrong type, or the file itself fails.
    """
    name, _, rest = argument.partition(":")
    path = Path(name)
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.py"))
        valid = f" In that folder: {', '.join(near)}." if near else ""
        raise InputError(f"no config file {path}.{valid}")
    if path.suffix != ".py":
        raise InputError(
            f"{path} is no experiment: needs a Python file, such as experiments/unet.py"
        )
    try:
        spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise InputError(f"{path} has no get_config(): needs that function, to return a config")
        parameters = inspect.signature(module.get_config).parameters
        config = module.get_config(**_arguments(path, rest, parameters))
    except InputError:
        raise
    except Exception as error:
        frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError):  # it has no frame of its own
            frames.append((error.filename, error.lineno))
        lines = [line for file, line in frames if file and Path(file) == path.absolute()]
        where = f"{path}:{lines[-1]}" if lines else str(path)
        raise InputError(f"{where}: {_plain(error)}") from error
    if not isinstance(config, ConfigDict) or not all(section in config for section in default()):
        got = type(config).__name__
        raise InputError(f"{path}: get_config must fill and return default(), got another {got}")
    return config


def _arguments(path: Path, text: str, parameters: dict[str, inspect.Parameter]) -> dict[str, Any]:
    values = {}
    for item in filter(None, _split(text)):
        key, equals, value = item.partition("=")
        if not equals:
            raise InputError(f'config argument "{item}" of {path}: write key=value')
        if key not in parameters:
            raise unknown(f"argument of {path}", key, parameters)
        values[key] = parse(key, value, parameters[key].default)
        annotation = parameters[key].annotation
        choices = get_args(annotation) if get_origin(annotation) is Literal else (values[key],)
        if values[key] not in choices:
            raise unknown(f"{key} of {path}", value, filter(None, map(str, choices)))
    return values


def _split(text: str) -> Iterator[str]:
    """Splits at the commas that stand outside brackets."""
    depth, part = 0, ""
    for char in text:
        depth += (char in "([") - (char in ")]")
        if char == "," and not depth:
            yield part
            part = ""
        else:
            part += char
    yield part


def _plain(error: Exception) -> str:
    """What a config file raised, in one line; ml_collections explains itself in several."""
    text = str(error.args[0] if error.args else error).strip()
    if isinstance(error, (AttributeError, KeyError)):
        near = re.search(r'Did you mean "(.+?)" instead of "(.+?)"\?', text)
        if near:
            return f'unknown config key "{near[2]}". Did you mean "{near[1]}"?'
        far = re.search(r"""Key "(\w+)" does not exist|^["']+(\w+)["']+$""", text)
        if far:
            key = far[1] or far[2]
            return f'unknown config key "{key}": default() in jaxseg/config.py has all of them'
    kind = r"<class '(?:\w+\.)*(\w+)'>"
    cast = rf"field '(.+?)' .*?\. (.*) is of original type {kind} .* type {kind}"
    wrong = re.search(cast, text) if isinstance(error, TypeError) else None
    if wrong:
        return f"{wrong[1]} = {wrong[2]} is of type {wrong[3]}: needs {wrong[4]}"
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def override(config: ConfigDict, assignments: list[tuple[str, str]]) -> None:
    """Sets dotted keys from text, in place, each to the type that it has.

    Raises InputError for an unknown key (with the nearest one) and for text of another type.
    """
    for dotted, text in assignments:
        section, keys = config, dotted.split(".")
        for key in keys[:-1]:
            section = _member(section, key, dotted)
            if not isinstance(section, ConfigDict):
                raise InputError(f"config key {dotted}: {key} is a value, not a section")
        value = _member(section, keys[-1], dotted)
        if isinstance(value, ConfigDict):
            raise InputError(f"{dotted} is a section: set one of its keys ({', '.join(value)})")
        with section.ignore_type():
            section[keys[-1]] = parse(dotted, text, value)


def _member(section: ConfigDict, key: str, dotted: str) -> Any:
    if key not in section:
        raise unknown(f"config key {dotted}:", key, section)
    return section[key]


def parse(key: str, text: str, like: Any) -> Any:
    """`text` as a value of the type of `like`; where that is None, as a literal or else a string.

    Raises InputError naming `key`, the text and the type that it needs.
    """
    if isinstance(like, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if isinstance(like, tuple) and isinstance(value, list):
        value = tuple(value)
    if isinstance(like, float) and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if like is None or like is inspect.Parameter.empty or type(value) is type(like):
        return value
    example = f"{like!r}" if like != () else "(1.0, 2.0)"
    raise InputError(f"{key}={text}: needs {KINDS[type(like)]}, such as {key}={example}")


def check(config: ConfigDict) -> None:
    """Raises InputError for numbers that no run could use."""

    def need(holds: bool, key: str, rule: str) -> None:
        if not holds:
            value = config
            for part in key.split("."):
                value = value[part]
            raise InputError(f"{key} is {value!r}: {rule}")

    def numbers(values: tuple, count: int) -> bool:
        real = all(type(n) in (int, float) and math.isfinite(n) for n in values)
        return len(values) == count and real

    for name, section in default().items():
        for key, like in section.items():
            value = config[name][key]
            need(type(value) is type(like), f"{name}.{key}", f"needs {KINDS[type(like)]}")
            finite = not isinstance(value, float) or math.isfinite(value)
            need(finite, f"{name}.{key}", "needs a finite number")

    data, optim, train = config.data, config.optim, config.train
    pair = len(data.crop) == 2 and all(type(n) is int and n > 0 for n in data.crop)
    need(pair, "data.crop", "needs two positive integers (height, width), such as (512, 512)")
    need(
        numbers(data.scale, 2) and 0 < data.scale[0] <= data.scale[1],
        "data.scale",
        "needs two numbers, 0 < low <= high",
    )
    check_augmentation(data, need)
    need(data.channels >= 1, "data.channels", "needs 1 (grey), 3 (RGB) or what the files have")
    for key in ("mean", "std"):
        need(
            numbers(data[key], data.channels),
            f"data.{key}",
            f"needs {data.channels} numbers, one a channel",
        )
    need(min(data.std) > 0, "data.std", "needs positive numbers")
    need(data.threads >= 1, "data.threads", "needs at least 1")
    need(data.workers >= 0, "data.workers", "needs 0 or more")
    known = not data.border_weight or config.model.name == "unet"
    need(known, "data.border_weight", "needs 0: only the loss of unet knows it")
    policies = ("raise", "skip")
    need(data.on_bad_example in policies, "data.on_bad_example", 'needs "raise" or "skip"')
    need(optim.name in ("sgd", "adamw"), "optim.name", 'needs "sgd" or "adamw"')
    need(optim.lr > 0, "optim.lr", "needs a positive number")
    need(0 <= optim.min_lr <= optim.lr, "optim.min_lr", f"needs 0 <= min_lr <= lr ({optim.lr})")
    for key in ("weight_decay", "clip", "warmup", "power"):
        need(optim[key] >= 0, f"optim.{key}", "needs 0 or more")
    need(
        all(type(n) is int and n > 0 for n in optim.drops),
        "optim.drops",
        "needs positive integers, such as (2000, 4000)",
    )
    need(0 < optim.drop_factor <= 1, "optim.drop_factor", "needs 0 < factor <= 1")
    need(0 <= optim.momentum < 1, "optim.momentum", "needs 0 <= momentum < 1")
    need(
        numbers(optim.betas, 2) and all(0 <= beta < 1 for beta in optim.betas),
        "optim.betas",
        "needs two numbers, 0 <= beta < 1",
    )
    for key in ("steps", "batch", "accumulate", "log_every", "keep"):
        need(train[key] >= 1, f"train.{key}", "needs at least 1")
    for key in ("eval_every", "checkpoint_every"):
        need(train[key] >= 0, f"train.{key}", "needs 0 (at the end only) or more")
    need(
        train.batch % train.accumulate == 0,
        "train.batch",
        f"must be divisible by train.accumulate ({train.accumulate})",
    )
    need(0 <= train.seed < 2**32, "train.seed", "needs 0 .. 2**32 - 1")
    need(0 <= train.ema < 1, "train.ema", "needs 0 <= decay < 1")
    need(
        train.compute_dtype in ("float32", "bfloat16"),
        "train.compute_dtype",
        'needs "float32" or "bfloat16"',
    )
    for key, words in {"accumulate_norm": ("part", "batch"), "remat": ("none", "blocks")}.items():
        need(train[key] in words, f"train.{key}", "needs " + " or ".join(map(repr, words)))
    for key in ("batch", "buckets"):
        need(config.eval[key] >= 1, f"eval.{key}", "needs at least 1")
    scales = config.eval.scales
    need(
        bool(scales) and numbers(scales, len(scales)) and min(scales) > 0,
        "eval.scales",
        "needs one or more positive numbers, such as (1.0,)",
    )
    for key in ("crop", "stride"):
        pair = config.eval[key]
        need(
            len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair),
            f"eval.{key}",
            "needs two integers (height, width), 0 for the default",
        )
    for key, words in EVAL_CHOICES.items():
        need(config.eval[key] in words, f"eval.{key}", "needs " + " or ".join(map(repr, words)))
    need(config.eval.output_stride >= 0, "eval.output_stride", "needs 0 (as in training) or more")
    need(config.eval.pictures >= 0, "eval.pictures", "needs 0 or more")
    need(0 <= config.eval.confidence <= 1, "eval.confidence", "needs a score, 0..1")
    check_box(config.eval.resize, "eval.resize", need)


def check_box(box: tuple, key: str, need: Callable[[bool, str, str], None]) -> None:
    """The rule of `check` for a box that images are fitted into."""
    pair = len(box) == 2 and all(type(n) is int for n in box)
    need(
        pair and (box == (0, 0) or min(box) > 0),
        key,
        "needs two positive integers (long, short side), such as (2048, 512), or (0, 0)",
    )


def check_augmentation(data: ConfigDict, need: Callable[[bool, str, str], None]) -> None:
    """The rules of `check` for what happens to training images beside the crop and the scale."""
    check_box(data.resize, "data.resize", need)
    need(data.objects >= 0, "data.objects", "needs 0 (none) or more")
    for key in ("scale_step", "rotate", "elastic", "border_weight", "hue"):
        need(data[key] >= 0, f"data.{key}", "needs 0 (off) or more")
    need(data.border_sigma > 0, "data.border_sigma", "needs a positive number")
    need(data.rotate <= 180, "data.rotate", "needs at most 180 degrees")
    need(data.hue <= 180, "data.hue", "needs at most 180 degrees")
    need(0 < data.cat_max_ratio <= 1, "data.cat_max_ratio", "needs 0 < share <= 1 (off)")
    for key in ("copy_paste", "crop_on_objects", "blur"):
        need(0 <= data[key] <= 1, f"data.{key}", "needs a probability, 0..1")
    named = re.fullmatch(r"([\w.]+:\w+)?", data.transform)
    need(bool(named), "data.transform", 'needs "package.module:function", or "" for none')
    need(data.augment_on in ("host", "device"), "data.augment_on", 'needs "host" or "device"')
    if data.augment_on == "device":
        for key in HOST_ONLY:
            rule = "needs its default where data.augment_on is device, which cannot do it"
            need(data[key] == default().data[key], f"data.{key}", rule)


def to_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """The locked config of `to_json`; JSON's lists are tuples again."""

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: tuples(v) for k, v in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return ConfigDict(tuples(json.loads(text))).lock()


def flat(section: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, of all sections inside."""
    leaves = {}
    for key, value in section.items():
        inner = isinstance(value, ConfigDict)
        leaves |= flat(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return leaves


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """One line, "key: old -> new", for each key in which two configs differ."""
    a, b = flat(old), flat(new)
    keys = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in keys]
