"""scripts/bench_growth.py: its points, and one of them measured and drawn."""

import importlib.util
import json
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "scripts" / "bench_growth.py"


@pytest.fixture
def bench():
    spec = importlib.util.spec_from_file_location("bench_growth", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_thing_grows_at_a_time(bench):
    fixed = {"side": 256, "batch": 1, "classes": 21, "devices": 1}
    assert bench.points("batch", (1, 4), fixed) == [fixed, {**fixed, "batch": 4}]
    shared = bench.points("devices", (1, 8), fixed)
    assert [p["devices"] for p in shared] == [1, 8] and {p["batch"] for p in shared} == {8}


def test_the_plot_is_drawn(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "apart", lambda p: {"ms": 10.0 * p["batch"], "peak_bytes": 10**8})
    bench.main(["--axes", "batch", "side", "--output", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert "batch       16    160.0 ms" in capsys.readouterr().out


def test_every_arrangement_of_eight_devices_has_a_row(bench, monkeypatch, capsys):
    seen, row = [], {"ms": 1.0, "peak_bytes": 10**9}
    monkeypatch.setattr(bench, "apart", lambda point: seen.append(point) or row)
    bench.main(["--meshes"])
    assert [p["devices"] for p in seen] == [1] + [8] * 6 and {p["batch"] for p in seen} == {8}
    out = capsys.readouterr().out
    assert "data=2 fsdp=1 space=4      1.0 ms   1.000 GB of a device" in out


@pytest.mark.slow
def test_a_point_in_its_own_process(bench):
    found = bench.apart({"side": 64, "batch": 2, "classes": 3, "devices": 2})
    assert found["ms"] > 0 and found["peak_bytes"] > 10**7
    with pytest.raises(RuntimeError, match="divisible by 2"):
        bench.apart(json.loads('{"side": 64, "batch": 3, "classes": 3, "devices": 2}'))
    rows = {"side": 64, "batch": 1, "classes": 3, "devices": 2, "mesh": (1, 1, 2)}
    assert bench.apart(rows)["peak_bytes"] > 10**7
