"""scripts/bench_peers.py: the pairs are the same networks, and it runs to its end at toy sizes."""

import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
PEERS = ("torchvision", "segmentation_models_pytorch", "timm")  # not imported: see the script
if missing := [name for name in PEERS if not importlib.util.find_spec(name)]:
    pytest.skip(f"needs {', '.join(missing)}", allow_module_level=True)
SCRIPTS = Path(__file__).parent.parent / "scripts"
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's warnings are its own


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        module = importlib.import_module("bench_peers")
        module.without_operators()  # before any test imports torchvision
        yield module
        for name in ("bench_peers", "pairs", "torch_networks", "parity"):
            sys.modules.pop(name, None)


NAMES = (
    *("deeplabv3plus_r50", "fcn_r50", "deeplabv3_r50", "pspnet_r50", "deeplabv3plus_mobilenetv2"),
    *("deeplabv3plus_xception65", "unet", "unet_same", "segnet"),
    *("fcn_r101", "deeplabv3_r101", "deeplabv3plus_r101", "pspnet_r101"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_as_many_parameters(bench, name):
    pair = bench.PAIRS[name]
    config = bench.configured(pair, 64 if name != "unet" else 192, 1, "train", "float32")
    assert bench.check_parameters(pair, config) > 1_000_000


def test_all_pairs_are_known(bench):
    assert set(NAMES) == set(bench.PAIRS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_as_many_multiplications(bench, name):
    """torch's own count, of convolutions and products, is ours but for the pools' 1x1 maps."""
    from torch.utils.flop_counter import FlopCounterMode

    from jaxseg.verbs.benchmark import forward_flops

    pair = bench.PAIRS[name]
    config = bench.configured(pair, 64 if name != "unet" else 192, 1, "infer", "float32")
    with torch.device("meta"):
        net = pair.peer(bench.CLASSES).eval()
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 3, *config.data.crop))
    assert forward_flops(config) == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.slow
def test_a_table_of_one_network(bench, capsys):
    words = "--networks deeplabv3plus_mobilenetv2 --sizes 32 --batch 8 --seconds 0".split()
    bench.main(words)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[1:]] == ["train", "infer"]
    assert all(float(line.split()[5]) > 0 for line in lines[1:])


@pytest.mark.slow
def test_the_peer_is_compiled_for_its_sizes(bench, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: asked.append(options) or f)
    pair = bench.PAIRS["unet_same"]
    for mode in ("train", "infer"):
        config = bench.configured(pair, 32, 1, mode, "float32")
        bench.theirs(pair, config, mode, compiled=True)()
    assert asked == [{"dynamic": False}] * 2


@pytest.mark.slow
def test_the_loss_in_blocks_and_whole(bench, capsys, monkeypatch):
    monkeypatch.setattr(bench, "alternate", lambda runs, _: np.full((1, len(runs)), 0.1))
    bench.loss_in_blocks(0.0, classes=40, side=128, batch=8)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("ms in blocks" in line for line in lines)


def test_mean_iou_is_counted_alike(bench, capsys):
    """The script compares both confusion matrices before it times them."""
    pytest.importorskip("torchmetrics")
    bench.mean_iou(3, 0.0, size=(8, 10))
    assert "images/s" in capsys.readouterr().out and np.isfinite(jax.device_count())
