"""What a run remembers of itself."""

import json

from jaxseg.data import pixels
from jaxseg.workdir import environment, warn_of_backend


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
