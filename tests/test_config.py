"""The configuration: what fills it, what it refuses, and that it survives its file."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from jaxseg import config as configs
from jaxseg import models
from jaxseg.errors import InputError

HEAD = "from typing import Literal\n\nfrom jaxseg.config import default\n\n\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes an experiment whose get_config has the given signature and lines; returns its path."""

    def write_config(*lines: str, signature: str = "") -> str:
        body = ["config = default()", *lines, "return config"]
        text = f"{HEAD}def get_config({signature}):\n" + "".join(f"    {b}\n" for b in body)
        path = tmp_path / "experiment.py"
        path.write_text(text)
        return str(path)

    return write_config


def _message(function: Callable, *arguments: object) -> str:
    """The message of the InputError that a call must end in: never more than one line here."""
    with pytest.raises(InputError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message
    return message


def _unet(**fields: object) -> ConfigDict:
    config = configs.default()
    config.model.update(name="unet", num_classes=3, **fields)
    return config


def test_default_is_locked_in_every_closed_section():
    config = configs.default()
    assert config.is_locked
    for name, section in config.items():
        if name in ("model", "loss"):
            continue
        with pytest.raises((AttributeError, KeyError), match="not exist"):
            section.misspelt = 1
    with pytest.raises(AttributeError):
        config.misspelt = 1


def test_default_passes_its_own_check():
    configs.check(configs.default())


def test_load_passes_arguments_of_each_type(write):
    path = write(
        "config.data.dataset = name",
        "config.optim.lr = lr",
        "config.train.steps = steps",
        "config.data.crop = crop",
        "config.data.flip = flip",
        signature="name='a', lr=0.5, steps=1, crop=(1, 2), flip=True",
    )
    config = configs.load(f"{path}:name=b,lr=2,steps=7,crop=(3,4),flip=false")
    assert config.data.dataset == "b"
    assert config.optim.lr == 2.0 and isinstance(config.optim.lr, float)
    assert config.train.steps == 7
    assert config.data.crop == (3, 4)
    assert config.data.flip is False
    assert configs.load(path).data.crop == (1, 2)


@pytest.mark.parametrize("crop", ["(3,4)", "[3,4]", "(3, 4)"])
def test_commas_in_brackets_do_not_split_arguments(write, crop):
    path = write(
        "config.data.crop = crop", "config.train.seed = b", signature="crop=(1, 2), b: int = 0"
    )
    config = configs.load(f"{path}:crop={crop},b=5")
    assert config.data.crop == (3, 4) and config.train.seed == 5


def test_load_names_the_valid_arguments(write):
    path = write(signature="dataset='a', width=1")
    message = _message(configs.load, f"{path}:datset=b")
    assert '"datset"' in message and 'Did you mean "dataset"?' in message and "width" in message


def test_load_needs_key_and_value(write):
    assert "write key=value" in _message(configs.load, f"{write(signature='a=1')}:a")


@pytest.mark.parametrize(
    ("default", "given", "needs"),
    [
        ("1", "x", "an integer"),
        ("1", "1.5", "an integer"),
        ("0.5", "fast", "a number"),
        ("True", "maybe", "True or False"),
        ("(1, 2)", "3", "a tuple"),
    ],
)
def test_load_refuses_arguments_of_another_type(write, default, given, needs):
    message = _message(configs.load, f"{write(signature=f'value={default}')}:value={given}")
    assert f"value={given}" in message and f"needs {needs}" in message


def test_load_refuses_what_a_literal_does_not_offer(write):
    path = write(signature="variant: Literal['original', 'same'] = 'same'")
    configs.load(f"{path}:variant=original")
    message = _message(configs.load, f"{path}:variant=sane")
    assert '"sane"' in message and 'Did you mean "same"?' in message and "original" in message


def test_load_of_a_missing_file_names_it_and_its_neighbours(write):
    neighbour = Path(write())
    message = _message(configs.load, str(neighbour.with_name("other.py")))
    assert "other.py" in message and "experiment.py" in message


@pytest.mark.parametrize("where", ["absolute", "relative", "dotted"])
def test_load_says_in_which_line_the_file_fails(write, monkeypatch, where):
    path = Path(write("config.train.steps = 1 // 0"))
    monkeypatch.chdir(path.parent)
    name = {"absolute": str(path), "relative": path.name, "dotted": f"./{path.name}"}[where]
    message = _message(configs.load, name)
    assert f"{path.name}:8: ZeroDivisionError" in message


def test_load_says_where_the_syntax_is_wrong(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("from jaxseg.config import default\n\ndef get_config(:\n")
    assert "broken.py:3: SyntaxError" in _message(configs.load, str(path))


def test_load_needs_get_config(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("config = 3\n")
    assert "empty.py has no get_config()" in _message(configs.load, str(path))


@pytest.mark.parametrize("line", ["config = 3", "config = type(config)()"])
def test_load_needs_a_config_that_started_from_default(write, line):
    assert "default()" in _message(configs.load, write(line))


@pytest.mark.parametrize(
    ("line", "wrong", "near"),
    [
        ("config.train.step = 3", "step", "steps"),
        ("config.traim.steps = 3", "traim", "train"),
        ("config['traim'].steps = 3", "traim", "train"),
        ("config.optim.update(warmpu=3)", "warmpu", "warmup"),
        ("config.optim['lrr'] = 0.1", "lrr", "lr"),
    ],
)
def test_misspelt_key_in_a_file_names_line_and_nearest_key(write, line, wrong, near):
    message = _message(configs.load, write(line))
    assert message.endswith(
        f'experiment.py:8: unknown config key "{wrong}". Did you mean "{near}"?'
    )


@pytest.mark.parametrize("line", ["config.optim.zzqq = 3", "config.zzqq.steps = 3"])
def test_strange_key_in_a_file_says_where_the_keys_are(write, line):
    message = _message(configs.load, write(line))
    assert 'experiment.py:8: unknown config key "zzqq"' in message
    assert "jaxseg/config.py" in message and len(message) < 300


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("config.optim.lr = 'fast'", "lr = fast is of type str: needs float"),
        ("config.train.steps = 1.5", "steps = 1.5 is of type float: needs int"),
        ("config.data.crop = 512", "crop = 512 is of type int: needs tuple"),
        ("config.data = 3", "data = 3 is of type int: needs ConfigDict"),
    ],
)
def test_wrong_type_in_a_file_is_said_in_one_line(write, line, words):
    assert _message(configs.load, write(line)).endswith(f"experiment.py:8: {words}")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.steps", "7", 7),
        ("optim.lr", "0.5", 0.5),
        ("optim.lr", "1e-3", 1e-3),
        ("optim.lr", "1", 1.0),
        ("data.flip", "false", False),
        ("data.flip", "True", True),
        ("data.dataset", "camvid", "camvid"),
        ("data.dataset", "2012", "2012"),
        ("data.root", "", ""),
        ("data.crop", "(3, 4)", (3, 4)),
        ("data.crop", "[3,4]", (3, 4)),
        ("data.crop", "3,4", (3, 4)),
        ("optim.multipliers", "((r'backbone', 0.1),)", (("backbone", 0.1),)),
        ("model.norm.kind", "batch", "batch"),
        ("model.widths", "(4, 8)", (4, 8)),
        ("mesh.data", "-1", -1),
    ],
)
def test_override_sets_each_type(key, text, value):
    config = _unet()
    models.complete(config)
    configs.override(config.lock(), [(key, text)])
    for part in key.split("."):
        config = config[part]
    assert config == value and type(config) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "needs"),
    [
        ("train.steps", "ten", "an integer"),
        ("train.steps", "1.5", "an integer"),
        ("train.steps", "True", "an integer"),
        ("optim.lr", "fast", "a number"),
        ("optim.lr", "nan", "a number"),
        ("optim.lr", "", "a number"),
        ("optim.lr", "9" * 400, "a number"),
        ("data.flip", "0", "True or False"),
        ("data.crop", "512", "a tuple"),
        ("data.crop", "(", "a tuple"),
    ],
)
def test_override_refuses_another_type(key, text, needs):
    message = _message(configs.override, configs.default(), [(key, text)])
    assert f"{key}={text}: needs {needs}, such as {key}=" in message


@pytest.mark.parametrize(
    ("key", "near", "valid"),
    [
        ("optim.lrr", "lr", "momentum"),
        ("otpim.lr", "optim", "train"),
        ("train.checkpointevery", "checkpoint_every", "eval_every"),
    ],
)
def test_override_of_an_unknown_key_names_the_nearest(key, near, valid):
    message = _message(configs.override, configs.default(), [(key, "1")])
    assert key in message and f'Did you mean "{near}"?' in message and valid in message


def test_override_sets_values_not_sections():
    config = configs.default()
    assert "data is a section" in _message(configs.override, config, [("data", "1")])
    assert "crop is a value" in _message(configs.override, config, [("data.crop.height", "1")])
    for key in ("", "data.", ".crop"):
        assert "unknown config key" in _message(configs.override, config, [(key, "1")])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.crop", (512,)),
        ("data.crop", (512, 0)),
        ("data.crop", (512.0, 512.0)),
        ("data.scale", (2.0, 0.5)),
        ("data.scale", (0.0, 1.0)),
        ("data.scale", (1.0,)),
        ("data.scale", ("a", 1.0)),
        ("data.channels", 0),
        ("data.mean", (0.0,)),
        ("data.mean", ("a", 0.0, 0.0)),
        ("data.std", (1.0, 1.0)),
        ("data.std", (1.0, 0.0, 1.0)),
        ("data.std", (1.0, float("nan"), 1.0)),
        ("data.threads", 0),
        ("data.workers", -1),
        ("data.on_bad_example", "ignore"),
        ("optim.name", "adam"),
        ("optim.lr", 0.0),
        ("optim.lr", -1.0),
        ("optim.lr", float("inf")),
        ("optim.lr", float("nan")),
        ("optim.min_lr", 1.0),
        ("optim.min_lr", -1.0),
        ("optim.momentum", 1.0),
        ("optim.betas", (0.9,)),
        ("optim.betas", (0.9, 1.0)),
        ("optim.betas", (0.9, "x")),
        ("data.resize", (2048,)),
        ("data.resize", (2048, 0)),
        ("data.resize", (2048.0, 512.0)),
        ("data.scale_step", -0.25),
        ("data.cat_max_ratio", 0.0),
        ("data.cat_max_ratio", 1.1),
        ("data.rotate", -1.0),
        ("data.rotate", 181.0),
        ("data.elastic", -1.0),
        ("data.copy_paste", 1.5),
        ("data.blur", -0.1),
        ("data.transform", "my_transforms"),
        ("data.transform", "my_transforms:f()"),
        ("data.augment_on", "gpu"),
        ("optim.weight_decay", -1.0),
        ("optim.clip", -1.0),
        ("optim.warmup", -1),
        ("optim.drops", (0,)),
        ("optim.drops", (2000.0,)),
        ("optim.drop_factor", 0.0),
        ("optim.power", -1.0),
        ("train.steps", 0),
        ("train.steps", None),
        ("train.steps", True),
        ("train.batch", 0),
        ("train.accumulate", 0),
        ("train.accumulate", 3),
        ("train.seed", -1),
        ("train.seed", 2**32),
        ("train.log_every", 0),
        ("train.keep", 0),
        ("train.eval_every", -1),
        ("train.checkpoint_every", -1),
        ("train.ema", 1.0),
        ("train.ema", -0.1),
        ("train.compute_dtype", "float16"),
        ("eval.batch", 0),
        ("eval.buckets", 0),
        ("eval.scales", ()),
        ("eval.scales", (1.0, 0.0)),
        ("eval.scales", ("1",)),
        ("eval.mode", "sliding"),
        ("eval.crop", (512,)),
        ("eval.crop", (-1, 512)),
        ("eval.stride", (1.5, 2)),
        ("eval.blend", "linear"),
        ("eval.average", "logit"),
        ("eval.output_stride", -8),
        ("eval.pictures", -1),
    ],
)
def test_check_refuses_what_no_run_could_use(key, value):
    config = configs.default()
    section, name = key.split(".")
    with config.ignore_type():
        config[section][name] = value
    message = _message(configs.check, config)
    blamed = "train.batch" if key == "train.accumulate" and value == 3 else key
    got = config.train.batch if blamed == "train.batch" and key != blamed else value
    assert message.startswith(f"{blamed} is {got!r}: ")
    assert re.search(r"needs|must", message)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.scale", (0.5, 0.5)),
        ("data.mean", (0, 0, 0)),
        ("optim.momentum", 0.0),
        ("optim.power", 0.0),
        ("train.seed", 2**32 - 1),
        ("train.eval_every", 0),
        ("eval.pictures", 0),
        ("eval.scales", (0.5, 1, 1.75)),
        ("eval.crop", (0, 713)),
    ],
)
def test_check_accepts_the_edges(key, value):
    config = configs.default()
    section, name = key.split(".")
    config[section][name] = value
    configs.check(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rotate", 10.0), ("elastic", 10.0), ("quarter_turns", True), ("blur", 0.5)]
    + [("copy_paste", 0.5), ("cat_max_ratio", 0.75)],
)
def test_check_refuses_on_the_device_what_only_the_host_does(key, value):
    config = configs.default()
    config.data[key] = value
    configs.check(config)
    config.data.augment_on = "device"
    with pytest.raises(InputError, match=f"data.{key} is .* data.augment_on is device"):
        configs.check(config)


def test_json_round_trip_is_equal_with_its_tuples():
    config = _unet(norm={"kind": "batch"}, widths=(4, 8))
    config.optim.multipliers = (("backbone", 0.1), ("head", 2.0))
    models.complete(config)
    again = configs.from_json(configs.to_json(config))
    assert again == config and again.is_locked
    assert again.to_dict() == config.to_dict()
    assert again.data.crop == (512, 512) and isinstance(again.data.crop, tuple)
    assert again.optim.multipliers == (("backbone", 0.1), ("head", 2.0))
    assert isinstance(again.model.norm, ConfigDict)
    assert configs.differences(config, again) == []


def test_differences_name_key_and_both_values():
    old, new = _unet(), _unet()
    new.optim.lr, new.data.crop, new.model.norm = 0.5, (8, 8), {"kind": "none"}
    assert configs.differences(old, new) == [
        "data.crop: (512, 512) -> (8, 8)",
        "model.norm.kind: None -> 'none'",
        "optim.lr: 0.01 -> 0.5",
    ]


def test_complete_adds_the_defaults_of_the_paper():
    config = _unet(padding="same")
    models.complete(config)
    assert config.model.padding == "same"
    assert config.model.widths == (64, 128, 256, 512, 1024)
    assert config.model.norm.kind == "none"
    assert config.loss.pixel.class_weights == ()


def test_complete_takes_what_a_backbone_is_from_its_name():
    config = configs.default()
    config.model.update(name="deeplabv3plus", num_classes=3, backbone={"name": "resnet101"})
    models.complete(config)
    assert config.model.backbone.depth == 101 and config.model.backbone.norm.kind == "batch"


@pytest.mark.parametrize(
    ("section", "value", "wrong", "near"),
    [
        ("model", {"name": "unett"}, "unett", "unet"),
        ("model", {"widhts": (4, 8)}, "widhts", "widths"),
        ("model", {"norm": {"knd": "batch"}}, "knd", "kind"),
        ("loss", {"pixel": {"class_weight": (1.0,)}}, "class_weight", "class_weights"),
    ],
)
def test_complete_refuses_unknown_keys(section, value, wrong, near):
    config = _unet()
    config[section].update(value)
    message = _message(models.complete, config)
    assert f'"{wrong}"' in message and f'Did you mean "{near}"?' in message


@pytest.mark.parametrize(
    ("backbone", "wrong", "near"),
    [
        ({"name": "resnett50"}, "resnett50", "resnet50"),
        ({"name": "resnet50", "output_strid": 8}, "output_strid", "output_stride"),
        ({"name": "resnet50", "norm": {"momentun": 0.9}}, "momentun", "momentum"),
    ],
)
def test_complete_refuses_unknown_backbones_and_their_keys(backbone, wrong, near):
    config = configs.default()
    config.model.update(name="deeplabv3plus", num_classes=3, backbone=backbone)
    message = _message(models.complete, config)
    assert f'"{wrong}"' in message and f'Did you mean "{near}"?' in message


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("loss", {"name": "dice"}),
        ("model", {"norm": {"name": "batch"}}),
        ("model", {"backbone": {"name": "resnet18", "norm": {"name": "batch"}}}),
    ],
)
def test_complete_refuses_a_name_where_nothing_is_named(section, value):
    config = _unet()
    config[section].update(value)
    assert "unknown key of " in _message(models.complete, config)
    named = _unet(backbone={"name": "resnet18"}, padding="same")
    named.loss.pixel = {"name": "focal"}
    models.complete(named)
    assert (named.model.name, named.model.backbone.name) == ("unet", "resnet18")
