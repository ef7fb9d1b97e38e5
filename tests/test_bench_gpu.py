"""scripts/bench_gpu.py runs to its end at toy sizes."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

PEERS = ("torch", "torchvision", "segmentation_models_pytorch")  # not imported: see the script
if missing := [name for name in PEERS if not importlib.util.find_spec(name)]:
    pytest.skip(f"needs {', '.join(missing)}", allow_module_level=True)
SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's warnings are its own
def test_toy_sizes(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    bench = importlib.import_module("bench_gpu")
    monkeypatch.setattr(bench.benchmark, "peaks", lambda dtype: (1e12, 1e11))
    monkeypatch.setattr(bench, "alternate", lambda runs, _: bench_once(runs))
    bench.main(["--toy"])
    out = capsys.readouterr().out
    for mode in ("train", "infer"):
        assert re.search(rf"deeplabv3plus_mobilenetv2 +64 +8 {mode} +\d+\.\d +\d+\.\d%", out)
    assert re.search(r"\d ms +\d+ x \S+", out) and "exact CRF, 32x24" in out
    monkeypatch.setattr(bench, "row", lambda *_: (_ for _ in ()).throw(RuntimeError("out of it")))
    bench.main(["--toy", "--modes", "train"])
    assert "train  out of it" in capsys.readouterr().out
    for name in ("bench_gpu", "bench_peers", "bench_crf", "torch_networks", "parity"):
        sys.modules.pop(name, None)


def bench_once(runs):
    import numpy as np

    for run in runs:
        run()
    return np.full((1, len(runs)), 0.1)
