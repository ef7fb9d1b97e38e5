"""scripts/bench_input.py runs to its end."""

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
def test_the_rate_of_check_counts_all_pairs(bench, tmp_path, monkeypatch):
    seen = []
    real = bench.inspect
    monkeypatch.setattr(bench, "inspect", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1])
    assert bench.checked(tmp_path, 12) > 0
    assert [facts["splits"]["train"]["images"] for facts in seen] == [12, 12]
