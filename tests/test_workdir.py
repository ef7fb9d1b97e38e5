"""What a run remembers of itself."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import tiny_config

from jaxseg.data import pixels
from jaxseg.data.colours import Classes, voc_palette
from jaxseg.errors import InputError
from jaxseg.workdir import check_space, environment, load_config, lock, prepare, warn_of_changes

CLASSES = Classes(tuple("abcdefgh"), voc_palette(8))


def test_going_on_with_another_library_of_pixels_is_said(tmp_path, monkeypatch, capsys):
    warn_of_changes(tmp_path)  # a new run
    (tmp_path / "env.json").write_text(json.dumps(environment()))
    warn_of_changes(tmp_path)
    assert capsys.readouterr().out == ""
    other = {"opencv": "pillow", "pillow": "opencv"}[pixels.BACKEND]
    monkeypatch.setattr(pixels, "BACKEND", other)
    warn_of_changes(tmp_path)
    said = capsys.readouterr().out
    assert said.startswith("warning: ") and "pillow" in said and "opencv" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"versions": {"jax": "0.1"}}, "ran with jax 0.1 and goes on with "),
        ({"versions": {"jaxlib": "0.1"}}, "ran with jaxlib 0.1 and goes on with "),
        ({"devices": ["gpu A", "gpu A"]}, "ran on gpu A and goes on with cpu "),
    ],
)
def test_going_on_with_another_jax_or_device_is_said(tmp_path, capsys, change, said):
    (tmp_path / "env.json").write_text(json.dumps({**environment(), **change}))
    warn_of_changes(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert said in line and "will not end with the same bits" in line


def test_the_environments_of_a_run_that_went_on_are_all_kept(ran):
    first = json.loads((ran / "env.json").read_text())
    assert first.pop("earlier") == []
    for count in (1, 2):
        prepare(tiny_config(), ran, CLASSES, 16)
        now = json.loads((ran / "env.json").read_text())
        assert now.pop("earlier") == [first] * count and now == first


def test_a_run_that_recorded_no_library_is_not_warned_of(tmp_path, capsys):
    (tmp_path / "env.json").write_text("{}")
    warn_of_changes(tmp_path)
    assert capsys.readouterr().out == ""


def test_a_damaged_record_of_the_environment_stops_nothing(tmp_path, capsys):
    (tmp_path / "env.json").write_text('{"augmenta')
    warn_of_changes(tmp_path)
    assert capsys.readouterr().out == ""


def test_a_run_remembers_its_config(tmp_path):
    config = tiny_config()
    prepare(config, tmp_path / "run", CLASSES)
    assert load_config(tmp_path / "run") == config
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "classes.json", "env.json"}  # and nothing half written


@pytest.mark.parametrize("dotted", ["train.ema", "model.up", "loss.aux_weight", "mesh"])
def test_keys_younger_than_a_run_take_their_defaults(tmp_path, dotted):
    prepare(tiny_config(), tmp_path, CLASSES)
    content = json.loads((tmp_path / "config.json").read_text())
    *sections, key = dotted.split(".")
    place = content
    for section in sections:
        place = place[section]
    del place[key]
    (tmp_path / "config.json").write_text(json.dumps(content))
    if dotted == "mesh":
        with pytest.raises(InputError, match="config.json is damaged: .*mesh"):
            load_config(tmp_path)
    else:
        assert load_config(tmp_path) == tiny_config()


def test_a_workdir_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to workdir"):
        prepare(tiny_config(), tmp_path / "file" / "run", CLASSES)


def test_the_commit_is_that_of_the_clone(monkeypatch, tmp_path):
    """An installed package inside somebody's repository does not record their commit."""
    monkeypatch.setattr("jaxseg.workdir.__file__", str(tmp_path / "site" / "jaxseg" / "workdir.py"))
    assert environment()["commit"] is None


def test_a_second_run_in_a_workdir_is_refused_with_the_first_named(tmp_path):
    begin = time.monotonic()
    with lock(tmp_path / "run"):
        who = f"process {os.getpid()} on {socket.gethostname()}, since 20"
        with pytest.raises(InputError, match=f"is in use by {who}.*another --workdir"):
            with lock(tmp_path / "run"):
                pass
    assert time.monotonic() - begin < 2
    with lock(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / "lock").exists()


def test_the_lock_of_a_run_that_was_killed_is_taken_over(tmp_path):
    code = (
        "import fcntl, sys, time\n"
        "file = open(sys.argv[1], 'a+')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "file.write('process 1 on elsewhere')\n"
        "file.flush()\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="in use by process 1 on elsewhere"), lock(tmp_path):
            pass
        other.kill()
    with lock(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / "lock").read_text()


def test_a_workdir_that_is_gone_at_the_end_is_no_error(tmp_path):
    with lock(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run")


def test_a_lock_needs_a_folder_that_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to workdir"), lock(tmp_path / "file"):
        pass


def test_space_is_asked_for_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "jaxseg.workdir.shutil.disk_usage", lambda _: SimpleNamespace(free=4_000_000_000)
    )
    check_space(tmp_path, 1_000_000_000, keep=3)
    with pytest.raises(InputError, match=r"has 4.00 GB free: needs 5.00 GB for 4 checkpoints"):
        check_space(tmp_path, 1_000_000_000, keep=4)
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)  # what is there needs no more room
    check_space(tmp_path, 1_000_000_000, keep=4)


@pytest.fixture
def ran(tmp_path):
    """A workdir that looks as if a run had saved something."""
    prepare(tiny_config(), tmp_path, CLASSES, 16)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("train.batch", 16, "train.batch.*8.*16"),
        ("train.seed", 1, "train.seed.*0.*1"),
        ("data.dataset", "elsewhere", "data.dataset.*shapes.*elsewhere"),
        ("model.num_classes", 9, "model.num_classes.*8.*9"),
    ],
)
def test_another_computation_is_refused_with_both_values(ran, key, value, named):
    config = tiny_config()
    section, name = key.split(".")
    config[section][name] = value
    with pytest.raises(InputError, match=named):
        prepare(config, ran, CLASSES, 16)


def test_other_classes_and_another_number_of_examples_are_refused(ran):
    other = Classes(tuple("abcdefgx"), voc_palette(8))
    with pytest.raises(InputError, match="classes a, .*h, and the data set has a, .*x"):
        prepare(tiny_config(), ran, other, 16)
    with pytest.raises(InputError, match="on 16 training examples, and the data set has 17"):
        prepare(tiny_config(), ran, CLASSES, 17)
    prepare(tiny_config(), ran, CLASSES, 16)


@pytest.mark.parametrize(
    ("key", "value"),
    [("mesh.fsdp", 2), ("data.workers", 2), ("train.keep", 9), ("train.watchdog", 5.0)],
)
def test_where_it_runs_and_how_it_looks_at_itself_may_change(ran, key, value):
    config = tiny_config()
    section, name = key.split(".")
    config[section][name] = value
    prepare(config, ran, CLASSES, 16)
