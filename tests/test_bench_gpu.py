"""scripts/bench_gpu.py runs to its end at toy sizes, and without PyTorch."""

import argparse
import importlib.util
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxseg.verbs.benchmark import Work

PEERS = ("torch", "torchvision", "segmentation_models_pytorch", "timm")
MISSING = [name for name in PEERS if not importlib.util.find_spec(name)]  # not imported
SCRIPTS = Path(__file__).parent.parent / "scripts"
OWN = ("bench_gpu", "bench_peers", "bench_crf", "pairs", "torch_networks", "parity")


@pytest.fixture
def scripts(monkeypatch):
    """Where they are imported, each anew."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in OWN:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in OWN:
        sys.modules.pop(name, None)


def test_without_pytorch_ours_run_alone(monkeypatch, scripts):
    for name in PEERS:
        monkeypatch.setitem(sys.modules, name, None)  # its import fails
    bench = importlib.import_module("bench_gpu")
    work = Work(lambda: time.sleep(0.001), 0.0, 0, 0.0, 1e9)
    monkeypatch.setattr(bench, "ours", lambda *_: work)
    args = argparse.Namespace(dtype="float32", seconds=0.0, peak=1e12, kernels=False)
    found = bench.row("unet_same", 64, 2, "infer", args)
    assert found["images_per_s"] > 0 and np.isnan(found["ratio"])


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
@pytest.mark.filterwarnings("ignore")  # torch's warnings are its own
def test_toy_sizes(monkeypatch, scripts, capsys):
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


def bench_once(runs):
    for run in runs:
        run()
    return np.full((1, len(runs)), 0.1)
