"""The command line: what it prints, and that every bad input ends in one clear message."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxseg import main

ROOT = Path(__file__).parent.parent
EXPERIMENT = """from jaxseg.config import default


def get_config(dataset: str = "shapes", padding: str = "same"):
    config = default()
    config.data.dataset = dataset
    config.data.crop = (32, 32)
    config.data.threads = 1
    config.model.update(name="unet", widths=(4, 8), padding=padding, dropout=0.0)
    config.train.update(steps=1, batch=8)
    return config
"""
ATROUS = EXPERIMENT.replace(
    'name="unet", widths=(4, 8), padding=padding, dropout=0.0',
    'name="deeplabv3plus", backbone={"name": "resnet18", "output_stride": 16}',
)
REMEMBERED = """from pathlib import Path

from jaxseg.config import from_json


def get_config(file: str):
    return from_json(Path(file).read_text())
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with three experiments: tiny.py, atrous.py, remembered.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JAXSEG_DATA", raising=False)
    texts = {"tiny": EXPERIMENT, "atrous": ATROUS, "remembered": REMEMBERED}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


@pytest.fixture
def fails(folder: Path, monkeypatch, capsys) -> Callable[..., str]:
    """Runs a command that must fail: exit code 2 and one short message, which it returns."""

    def run_command(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["jaxseg", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main.main()
        return _message(caught.value.code, capsys.readouterr().err)

    return run_command


def test_an_interrupt_is_no_traceback(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "run", interrupted)
    with pytest.raises(SystemExit) as caught:
        main.main()
    assert caught.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def _message(code: object, stderr: str) -> str:
    assert code == 2, stderr
    assert stderr.startswith("error: ") and stderr.count("error: ") == 1
    assert "Traceback" not in stderr and len(stderr.splitlines()) <= 12
    return stderr


def _train(config: str, *words: object) -> list[object]:
    return ["train", "--config", config, "--workdir", "run", *words]


def _contains(message: str, *words: str) -> None:
    assert [word for word in words if word not in message] == [], message


def _predict(*words: str) -> list[str]:
    return ["predict", "--workdir", "run", "--input", "a.png", "--output", "out", *words]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], ['unknown verb "trian"', 'Did you mean "train"?', "describe"]),
        (["train"], ["--config", "--workdir", "required"]),
        (["--config.train.steps=3"], ["--config", "required"]),
        (["train", "--config", "tiny.py"], ["--workdir", "required"]),
        (_train("none.py"), ["no config file none.py", "tiny.py"]),
        (_train("tiny.py", "--config.amp", "false"), ["--config.amp has no value", "=VALUE"]),
        (_train("tiny.py", "--config.optim.lr", "0.1"), ["--config.optim.lr=VALUE"]),
        (_train("tiny.py", "extra"), ["unrecognized arguments: extra", "--help"]),
        (_train("tiny.py", "--work", "x"), ["unrecognized arguments: --work x"]),
        (["train", "extra", *_train("tiny.py")[1:]], ["unrecognized arguments: extra"]),
        (_train("tiny.py", "--dryrun"), ["--dryrun. Did you mean --dry_run?", "main train --help"]),
        (["predict", "--workdir", "run"], ["--input, --output", "required"]),
        (
            ["eval", "--workdir", "run", "--config.train.steps=3"],
            ["train.steps", "run's own config", "eval.*"],
        ),
        (["eval"], ["eval needs --workdir", "--predictions"]),
        (["eval", "--workdir", "r", "--config", "tiny.py"], ["eval needs --workdir"]),
        (["eval", "--predictions", "p"], ["--workdir DIR or --config FILE"]),
        (_predict("--part", "0/2"), ["--part 0/2", "1/4"]),
        (_predict("--part", "3/2"), ["--part 3/2", "1/4"]),
        (_predict("--part", "two"), ["--part two", "1/4"]),
        (["describe"], ["--config FILE or --workdir DIR"]),
        (["describe", "--config", "tiny.py", "--workdir", "run"], ["one of them"]),
        (["describe", "--config", "tiny.py", "--size", "5"], ["--size 5", "513,513"]),
        (["describe", "--config", "tiny.py", "--size", "0,5"], ["--size 0,5", "positive"]),
        (["describe", "--config", "tiny.py", "--size=a,b"], ["--size a,b", "513,513"]),
    ],
)
def test_bad_words(fails, words, expected):
    _contains(fails(*words), *expected)


@pytest.mark.parametrize(
    ("config", "override", "expected"),
    [
        ("tiny.py", "optim.lrr=1.0", ["optim.lrr", 'Did you mean "lr"?']),
        ("tiny.py", "modle.name=unet", ['"modle"', 'Did you mean "model"?']),
        ("tiny.py", "model.widht=(4,8)", ['"widht"', 'Did you mean "widths"?']),
        ("tiny.py", "train.steps=ten", ["train.steps=ten", "an integer"]),
        ("tiny.py", "data.crop=512", ["data.crop=512", "a tuple", "(32, 32)"]),
        ("tiny.py", "optim.lr=-1.0", ["optim.lr is -1.0", "positive"]),
        ("tiny.py:datasett=x", "optim.lr=1.0", ['"datasett"', 'Did you mean "dataset"?']),
        ("tiny.py", "data.crop=(33,32)", ["(33, 32)", "multiples of 2", "(34, 32)"]),
        ("tiny.py:padding=valid", "data.crop=(33,32)", ["(33, 32)", "valid U-Net", "(34, 32)"]),
        ("tiny.py:padding=odd", "optim.lr=1.0", ['"odd"', "same, valid"]),
        ("atrous.py", "data.crop=(64,64)", ["(64, 64)", "16n + 1", "(65, 65)"]),
        ("atrous.py", "data.crop=(8,200)", ["(8, 200)", "(17, 193)"]),
        ("tiny.py", "model.name=unett", ['unknown model "unett"', 'Did you mean "unet"?']),
        ("tiny.py", "model.name=deeplabv3", ["deeplabv3", '"padding"']),
        ("atrous.py", "model.backbone.name=resnet19", ['"resnet19"', "resnet18"]),
        ("tiny.py", "model.norm.kind=layer", ['"layer"', "batch"]),
        ("tiny.py", "model.num_classes=5", ["is 5", "shapes has 8 classes", "disk"]),
        ("tiny.py", "loss.pixel.class_weights=(1.0,2.0)", ["2 class_weights", "8 classes"]),
        ("tiny.py", "train.batch=6", ["train.batch is 6", "divisible by 8"]),
        ("tiny.py", "mesh.fsdp=3", ["fsdp=3", "8 devices"]),
        ("tiny.py", "mesh.data=0", ["data=0", "8 devices"]),
        ("tiny.py", "optim.multipliers=(('(',1.0),)", ["optim.multipliers", "regex"]),
        ("tiny.py", "optim.multipliers=(('zzz',1.0),)", ["zzz", "match no parameter"]),
        ("tiny.py", "data.train_split=trian", ["'trian'", "train, val, test"]),
        ("tiny.py", "init.workdir=nowhere", ["no run in nowhere"]),
        ("tiny.py:dataset=nowhere", "optim.lr=1.0", ["nowhere", "JAXSEG_DATA", "classes.json"]),
    ],
)
def test_bad_values(fails, folder, config, override, expected):
    crop = [] if "crop" in override or "atrous" not in config else ["--config.data.crop=(33,33)"]
    message = fails(*_train(config, f"--config.{override}", *crop, "--dry_run"))
    _contains(message, *expected)
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stem=9x9", ['backbone.stem "9x9"', "7x7", "v1c"]),
        ("depth=19", ['backbone.depth "19"', "18", "34"]),
        ("output_stride=7", ['backbone.output_stride "7"', "8", "16"]),
    ],
)
def test_bad_values_of_a_backbone(fails, override, expected):
    command = ["describe", "--config", "atrous.py", f"--config.model.backbone.{override}"]
    _contains(fails(*command), *expected)


def test_misspelt_key_in_the_file(fails, folder):
    (folder / "typo.py").write_text(EXPERIMENT.replace("steps=1", "step=1"))
    message = fails(*_train("typo.py"))
    _contains(message, "typo.py:", 'unknown config key "step"', 'Did you mean "steps"?')
    assert len(message.splitlines()) == 1


def test_misspelt_field_of_the_model_in_the_file(fails, folder):
    (folder / "typo.py").write_text(EXPERIMENT.replace("widths=", "widhts="))
    _contains(fails(*_train("typo.py")), '"widhts"', 'Did you mean "widths"?')


@pytest.mark.slow
def test_a_backbone_named_on_the_command_line_is_the_one_that_is_built(folder, capsys):
    def params(*words: str) -> int:
        command = ["describe", "--config", "atrous.py", "--size", "33,33", "--json", *words]
        assert main.run(command) == 0
        return json.loads(capsys.readouterr().out)["params"]

    assert params("--config.model.backbone.name=resnet34") - params() == 10_108_160


def _mask(path: Path, size: tuple[int, int], values: dict[int, int]) -> None:
    """A grey mask of 0 with `values` (id -> number of pixels) in its first pixels."""
    label = np.zeros(size, np.uint8)
    label.flat[: sum(values.values())] = np.repeat(list(values), list(values.values()))
    Image.fromarray(label).save(path)


def _strange_ids(data: Path) -> None:
    _mask(data / "train/masks/03.png", (40, 48), {7: 5, 200: 1})


def _strange_ids_in_validation(data: Path) -> None:
    _mask(data / "val/masks/01.png", (40, 48), {3: 2, 255: 9})


def _other_size(data: Path) -> None:
    _mask(data / "train/masks/03.png", (20, 48), {})


def _no_mask(data: Path) -> None:
    (data / "train/masks/03.png").unlink()


def _truncated_image(data: Path) -> None:
    image = data / "train/images/03.png"
    image.write_bytes(image.read_bytes()[:500])


def _text_for_an_image(data: Path) -> None:
    (data / "train/images/03.png").write_text("not a picture")


def _colour_mask(data: Path) -> None:
    Image.new("RGB", (48, 40)).save(data / "train/masks/03.png")


def _no_images(data: Path) -> None:
    for image in (data / "train/images").iterdir():
        image.unlink()


def _no_validation(data: Path) -> None:
    shutil.rmtree(data / "val")


def _no_classes(data: Path) -> None:
    (data / "classes.json").unlink()


def _broken_classes(data: Path) -> None:
    (data / "classes.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_strange_ids, ["03.png", "7 (5 pixels)", "200 (1 pixels)", "0..2", "255"]),
        (_strange_ids_in_validation, ["val/masks/01.png", "3 (2 pixels)", "0..2"]),
        (_other_size, ["03.png", "(40, 48)", "(20, 48)"]),
        (_no_mask, ["train/masks/03.png", "1 of 8"]),
        (_truncated_image, ["train/images/03.png", "500 bytes", "truncated"]),
        (_text_for_an_image, ["train/images/03.png", "cannot read"]),
        (_colour_mask, ["train/masks/03.png", "RGB", "class ids"]),
        (_no_images, ["no images in data/train/images", ".png"]),
        (_no_validation, ["'val'", "train", "masks"]),
        (_no_classes, ["data/classes.json", '"names"']),
        (_broken_classes, ["data/classes.json", '"names"']),
    ],
)
def test_bad_data(fails, folder, write_folder, spoil, expected):
    spoil(write_folder(folder / "data"))
    _contains(fails(*_train("tiny.py:dataset=data")), *expected)


def test_bad_data_in_a_worker_process(fails, folder, write_folder):
    _strange_ids(write_folder(folder / "data"))
    message = fails(*_train("tiny.py:dataset=data", "--config.data.workers=1", "--dry_run"))
    _contains(message, "train/masks/03.png", "7 (5 pixels)")


def test_class_count_of_the_model_and_of_the_data_set(fails, folder, write_folder):
    write_folder(folder / "data")
    message = fails(*_train("tiny.py:dataset=data", "--config.model.num_classes=4"))
    _contains(message, "model.num_classes is 4", "data has 3 classes", "sky, road, car")


def test_class_count_defaults_to_that_of_the_data_set(folder, write_folder, capsys):
    write_folder(folder / "data", ("sky", "road", "car", "sign"))
    assert main.run(["describe", "--config", "tiny.py:dataset=data", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outputs"]["logits"] == [1, 32, 32, 4]


@pytest.mark.parametrize("verb", ["eval", "describe", "predict"])
def test_no_run_in_the_workdir(fails, verb):
    more = ["--input", "tiny.py", "--output", "out"] if verb == "predict" else []
    message = fails(verb, "--workdir", "nowhere", *more)
    _contains(message, "no run in nowhere", "config.json", "--workdir")


@pytest.mark.parametrize("verb", ["eval", "describe"])
def test_a_run_without_checkpoint(fails, folder, tiny_run, verb):
    (folder / "run").mkdir()
    shutil.copy(tiny_run / "config.json", folder / "run")
    _contains(fails(verb, "--workdir", "run"), "no checkpoint in run/checkpoints", "train")


def test_a_run_with_a_damaged_config(fails, folder, tiny_run):
    shutil.copytree(tiny_run, "run")
    (folder / "run" / "config.json").write_text('{"data": ')
    _contains(fails("eval", "--workdir", "run"), "run/config.json", "damaged")


def test_workdir_that_is_a_file(fails):
    message = fails("train", "--config", "tiny.py", "--workdir", "tiny.py")
    _contains(message, "cannot write to workdir tiny.py")


def test_workdir_of_another_config(fails, tiny_run):
    shutil.copytree(tiny_run, "run")
    remembered = f"remembered.py:file={tiny_run / 'config.json'}"
    message = fails(
        *_train(remembered, "--config.optim.lr=0.5", "--config.train.seed=7"),
        "--config.data.threads=2",
    )
    _contains(message, "run holds a run of another config", "--workdir")
    assert message.splitlines()[1:3] == ["  optim.lr: 0.01 -> 0.5", "  train.seed: 0 -> 7"]
    assert "threads" not in message


def test_workdir_of_a_very_different_config(fails, folder, tiny_run):
    shutil.copytree(tiny_run, "run")
    _contains(fails(*_train("atrous.py", "--config.data.crop=(33,33)")), "data.crop", "more")
    assert json.loads((folder / "run/config.json").read_text())["model"]["name"] == "unet"


def test_the_same_command_finds_its_finished_run(folder, tiny_run, few_scenes, capsys):
    shutil.copytree(tiny_run, "run")
    remembered = f"remembered.py:file={tiny_run / 'config.json'}"
    assert main.run(_train(remembered, "--config.train.log_every=2")) == 0
    assert "run is finished, at step 3" in capsys.readouterr().out


def test_predict_on_a_folder_without_images(fails, folder, tiny_run):
    message = fails("predict", "--workdir", tiny_run, "--input", folder, "--output", "out")
    _contains(message, f"no images in folder {folder}", ".png")
    assert not (folder / "out").exists()


def test_predict_on_a_missing_path(fails, tiny_run):
    message = fails("predict", "--workdir", tiny_run, "--input", "gone.png", "--output", "out")
    _contains(message, "no such image or folder: gone.png")


def test_predict_on_what_is_no_image(fails, tiny_run):
    message = fails("predict", "--workdir", tiny_run, "--input", "tiny.py", "--output", "out")
    _contains(message, "cannot read image tiny.py")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("mode=sliding", ["eval.mode is 'sliding'", "'whole' or 'slide'"]),
        ("scales=()", ["eval.scales is ()", "positive"]),
        ("scales=(0.0,)", ["eval.scales is (0.0,)", "positive"]),
        ("flip=maybe", ["eval.flip=maybe", "True or False"]),
        ("filp=true", ["eval.filp", 'Did you mean "flip"?']),
        ("output_stride=8", ["eval.output_stride is 8", "unet has no backbone"]),
        ("crf=largefow", ['"largefow"', 'Did you mean "largefov"?']),
    ],
)
@pytest.mark.parametrize("verb", ["eval", "predict"])
def test_bad_settings_of_an_evaluation(fails, folder, tiny_run, verb, setting, expected):
    Image.new("RGB", (20, 20)).save(folder / "a.png")
    more = ["--input", "a.png", "--output", "out"] if verb == "predict" else []
    _contains(fails(verb, "--workdir", tiny_run, *more, f"--config.eval.{setting}"), *expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["crop=(16,16)", "stride=(17,16)"], ["(17, 16)", "above the window (16, 16)"]),
        (["crop=(64,64)"], ["image of (20, 24) is smaller than one window of (64, 64)", "whole"]),
    ],
)
def test_bad_windows(fails, folder, tiny_run, settings, expected):
    Image.new("RGB", (24, 20)).save(folder / "a.png")
    words = [f"--config.eval.{setting}" for setting in ("mode=slide", *settings)]
    message = fails(
        *("predict", "--workdir", tiny_run, "--input", "a.png", "--output", "out"), *words
    )
    _contains(message, *expected)


def test_eval_on_a_split_without_labels(fails, folder, write_folder, capsys):
    data = write_folder(folder / "data")
    assert main.run(_train("tiny.py:dataset=data")) == 0
    (data / "test" / "images").mkdir(parents=True)
    shutil.copy(data / "val/images/00.png", data / "test/images/00.png")
    capsys.readouterr()
    message = fails("eval", "--workdir", "run", "--split", "test")
    _contains(message, "test", "masks")


@pytest.mark.slow
def test_saved_predictions_score_the_same_without_a_checkpoint(
    folder, tiny_run, few_scenes, capsys
):
    shutil.copytree(tiny_run, "run")
    assert main.run(["eval", "--workdir", "run", "--save_predictions"]) == 0
    said = capsys.readouterr().out
    assert "(sizes: 1, compilations: 1)" in said and "mIoU" in said
    first = (folder / "run/eval.json").read_text()
    shutil.rmtree("run/checkpoints")
    saved = Path("run/predictions/val")
    assert main.run(["eval", "--workdir", "run", "--predictions", str(saved)]) == 0
    assert (saved / "eval.json").read_text() == first
    (saved / "eval.json").unlink()
    remembered = f"remembered.py:file={tiny_run / 'config.json'}"
    assert main.run(["eval", "--config", remembered, "--predictions", str(saved)]) == 0
    assert (saved / "eval.json").read_text() == first


def test_eval_on_an_unknown_split(fails, tiny_run):
    message = fails("eval", "--workdir", tiny_run, "--split", "tset")
    _contains(message, "'tset'", "train, val, test")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_shows_the_verbs_with_an_example_each(words, capsys):
    assert main.run(words) == 0
    lines = capsys.readouterr().out.splitlines()
    for verb in ("train", "eval", "predict", "describe"):
        example = [line for line in lines if line.split()[:1] == [verb]]
        assert len(example) == 1 and "--" in example[0]


@pytest.mark.parametrize("verb", main.VERBS)
def test_help_of_a_verb_lists_its_arguments(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main.run([verb, "--help"])
    out, example = capsys.readouterr().out, main.VERBS[verb].example
    assert caught.value.code == 0 and all(w in out for w in example.split() if w[:2] == "--")


def test_describe_prints_one_json_object(folder, capsys):
    assert main.run(["describe", "--config", "tiny.py", "--size", "64,48", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts.keys() >= {"params", "params_without_aux", "macs", "output_stride", "outputs"}
    assert facts["params"] == facts["params_without_aux"] == 1752
    assert facts["output_stride"] == 1 and facts["outputs"] == {"logits": [1, 64, 48, 8]}
    assert "step" not in facts


def test_macs_grow_with_the_size(folder, capsys):
    def macs(size: str) -> int:
        assert main.run(["describe", "--config", "tiny.py", "--size", size, "--json"]) == 0
        return json.loads(capsys.readouterr().out)["macs"]

    # 3x3 convolutions 3-4-4, 8-4-4 beside the skip, classifier; a quarter: 4-8-8, 2x2 up.
    a_pixel = 9 * (3 * 4 + 4 * 4 + 8 * 4 + 4 * 4) + 4 * 8
    a_quarter = 9 * (4 * 8 + 8 * 8) + 4 * 8 * 4
    assert macs("32,32") == 32 * 32 * a_pixel + 16 * 16 * a_quarter
    assert macs("64,32") == 2 * macs("32,32")


def test_describe_of_a_run_has_step_and_fingerprint(tiny_run, capsys):
    assert main.run(["describe", "--workdir", str(tiny_run), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["step"] == 3 and facts["params"] == 1752
    assert len(facts["fingerprint"]) == 16 and int(facts["fingerprint"], 16) >= 0


def test_describe_without_json_is_for_people(folder, capsys):
    assert main.run(["describe", "--config", "tiny.py"]) == 0
    assert "params               1,752" in capsys.readouterr().out.splitlines()


def test_dry_run_runs_one_step_and_leaves_nothing(folder, few_scenes, capsys):
    before = sorted(folder.iterdir())
    assert main.run(_train("tiny.py", "--dry_run")) == 0
    assert "dry run: one step, loss" in capsys.readouterr().out
    assert sorted(p for p in folder.iterdir() if p.name != "__pycache__") == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["segment", "--workdir", "run"], 'unknown verb "segment"'),
        (["--config", "experiments/none.py", "--workdir", "run"], "no config file"),
    ],
)
def test_exit_code_of_the_process(words, expected):
    command = [sys.executable, "-m", "jaxseg.main", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert expected in _message(done.returncode, done.stderr) and not done.stdout
