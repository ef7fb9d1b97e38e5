"""What a run remembers of itself."""

import json

import pytest
from conftest import tiny_config

from jaxseg.data import pixels
from jaxseg.data.colours import Classes, voc_palette
from jaxseg.errors import InputError
from jaxseg.workdir import environment, load_config, prepare, warn_of_backend

CLASSES = Classes(tuple("abcdefgh"), voc_palette(8))


def test_going_on_with_another_library_of_pixels_is_said(tmp_path, monkeypatch, capsys):
    warn_of_backend(tmp_path)  # a new run
    (tmp_path / "env.json").write_text(json.dumps(environment()))
    warn_of_backend(tmp_path)
    assert capsys.readouterr().out == ""
    other = {"opencv": "pillow", "pillow": "opencv"}[pixels.BACKEND]
    monkeypatch.setattr(pixels, "BACKEND", other)
    warn_of_backend(tmp_path)
    said = capsys.readouterr().out
    assert said.startswith("warning: ") and "pillow" in said and "opencv" in said


def test_a_run_that_recorded_no_library_is_not_warned_of(tmp_path, capsys):
    (tmp_path / "env.json").write_text("{}")
    warn_of_backend(tmp_path)
    assert capsys.readouterr().out == ""


def test_a_damaged_record_of_the_environment_stops_nothing(tmp_path, capsys):
    (tmp_path / "env.json").write_text('{"augmenta')
    warn_of_backend(tmp_path)
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
