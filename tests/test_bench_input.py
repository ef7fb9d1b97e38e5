"""scripts/bench_input.py runs to its end, and check is as quick as it says."""

import importlib.util
import re
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "scripts" / "bench_input.py"


@pytest.fixture
def bench():
    spec = importlib.util.spec_from_file_location("bench_input", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_stage_has_a_rate(bench, capsys, monkeypatch):
    monkeypatch.setattr(bench, "peers", lambda *_: None)  # torch's warnings are its own
    bench.main(["--seconds", "0.02"])
    out = capsys.readouterr().out
    for stage in ("decode image and label", "scale, crop, flip", "photometric", "all", "2 workers"):
        found = re.search(rf"{stage} +(\d+) images/s", out)
        assert found and int(found[1]) > 10, stage


@pytest.mark.slow
def test_check_reads_many_pairs_a_second(bench, tmp_path):
    assert bench.checked(tmp_path, 60) >= 75  # half of what two idle cores do at least
