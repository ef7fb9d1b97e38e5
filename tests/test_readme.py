"""Every command and every line of Python in the README runs, in order, with few steps."""

import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxseg import main
from jaxseg.data import catalog

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, re.DOTALL)
SMALL = ("train.steps=1", "train.batch=8", "data.crop=(32,32)", "model.widths=(4,8)")


@pytest.fixture
def desk(tmp_path, monkeypatch, few_scenes):
    """An empty folder with the repository's experiments and a small data set, mydata."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / "mydata" / split / kind).mkdir(parents=True)
        for name in "ab":
            image = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / "mydata" / split / "images" / f"{name}.jpg")
            mask = rng.integers(0, 3, (40, 48), dtype=np.uint8)
            Image.fromarray(mask).save(tmp_path / "mydata" / split / "masks" / f"{name}.png")
    names = '{"names": ["background", "leaf", "stem"]}'
    (tmp_path / "mydata" / "classes.json").write_text(names)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def jaxseg_commands(text):
    return [line for line in text.splitlines() if line.startswith("python -m jaxseg.main")]


def run(line):
    words = shlex.split(line)[3:]
    trains = words[0].startswith("-") and "classical.py" not in line
    small = [f"--config.{change}" for change in SMALL] if trains else []
    return main.run(words + small)


@pytest.mark.slow
def test_the_commands_run_one_after_the_other(desk, capsys):
    commands = [line for kind, text in BLOCKS if kind == "bash" for line in jaxseg_commands(text)]
    needs_run = [c for c in commands if " --workdir runs/quickstart" in c and "--config" not in c]
    trains = [c for c in commands if c not in needs_run]
    assert len(commands) >= 8 and len(needs_run) >= 3
    for line in trains + needs_run:
        assert run(line) == 0, line
    labels = {p.name for p in (desk / "runs" / "mine" / "labels").iterdir()}
    assert labels >= {"a.png", "a_overlay.png", "b.png"}
    assert (desk / "runs" / "labels" / "a.npz").exists()


def test_the_commands_of_the_results_build_on_real_data(desk, data_root, monkeypatch, capsys):
    monkeypatch.setenv("JAXSEG_DATA", str(data_root))
    results = README.split("## Results")[1]
    commands = re.findall(r"`(python -m jaxseg\.main [^`]+)`", results)
    assert len(commands) >= 2
    for line in commands:
        assert run(f"{line} --dry_run") == 0, line
    assert capsys.readouterr().out.count("dry run: one ") == len(commands)


@pytest.mark.slow
def test_the_python_runs(desk, capsys):
    assert (
        run("python -m jaxseg.main --config experiments/quickstart.py --workdir runs/quickstart")
        == 0
    )
    capsys.readouterr()
    (code,) = (text for kind, text in BLOCKS if kind == "python")
    exec(compile(code, "README.md", "exec"), {})
    assert "(120, 90)" in capsys.readouterr().out


def test_the_scripts_named_exist_and_parse():
    named = set(re.findall(r"\./(scripts/\w+\.sh)", README))
    assert named >= {"scripts/quickstart.sh", "scripts/test.sh"}
    for script in [*named, "scripts/venv.sh", ".ci/run"]:
        subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_the_files_and_pictures_named_exist():
    for path in re.findall(r"\]\((\.github/[^)]+)\)", README):
        assert (ROOT / path).is_file(), path
    layout = README.split("## Layout")[1].split("```")[1]
    for name in re.findall(r"\b(\w+\.py)\b", layout):
        assert list((ROOT / "jaxseg").rglob(name)), name
    modules = {p.name for p in (ROOT / "jaxseg").glob("*.py")} - {"__init__.py", "errors.py"}
    assert modules <= set(re.findall(r"\b(\w+\.py)\b", layout))


def test_the_tests_that_hold_the_promises_exist():
    promises = README.split("What is promised")[1].split("| exit code")[0]
    named = re.findall(r"`(test_\w+\.py)`", promises)
    assert len(named) >= 9
    assert all((ROOT / "tests" / name).is_file() for name in named), named


def test_all_data_sets_are_named():
    text = README.split("Published data sets")[1].split("## The networks")[0]
    named = {name.split(":")[0] for name in re.findall(r"`([a-z_0-9]+(?::\S+)?)`", text)}
    assert named >= set(catalog.LAYOUTS) | set(catalog.OWN)
