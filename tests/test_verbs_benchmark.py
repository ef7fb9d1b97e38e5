"""The verb `benchmark`: its facts, for any experiment, and what it refuses."""

import json

import numpy as np
import pytest
from conftest import tiny_config

from jaxseg import main
from jaxseg.errors import InputError
from jaxseg.verbs import benchmark
from jaxseg.verbs.describe import network_facts


@pytest.fixture
def quick(monkeypatch):
    """Two repetitions of what is timed, and peaks that nobody measures."""
    monkeypatch.setattr(benchmark, "LEAST", 2)
    monkeypatch.setattr(benchmark, "MOST", 2)
    monkeypatch.setattr(benchmark, "peaks", lambda dtype: (1e12, 1e11))


@pytest.mark.parametrize("mode", benchmark.MODES)
def test_the_facts_of_a_mode(mode, quick, capsys):
    config = tiny_config()
    assert benchmark.benchmark(config, mode, (16, 24), 8, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["size"] == [16, 24] and found["batch"] == 8 and found["mode"] == mode
    macs = network_facts(config, (16, 24))["macs"]
    assert found["flops"] == 2 * macs * 8 * (3 if mode == "train" else 1)
    assert found["repetitions"] == 2 and found["compile_s"] > 0 and found["peak_bytes"] > 0
    assert 0 < found["ms"] <= found["ms_p90"] * (1 + 1e-9)
    seconds = found["ms"] / 1e3
    assert found["images_per_s"] == pytest.approx(8 / seconds)
    assert found["flops_per_s"] == pytest.approx(found["flops"] / seconds)
    share = found["flops"] / found["peak_flops_per_s"] / seconds
    assert found["flops_share"] == pytest.approx(share) and found["roofline_share"] >= share * 0.999
    assert config.data.crop == (32, 32)  # a copy was changed


def test_the_state_moves_on(quick):
    """Each repetition of a training step starts from the last one's state."""
    config = benchmark.configured(tiny_config(), "train", (16, 16), 8)
    work = benchmark.prepare(config, "train")
    losses = {float(work.run()) for _ in range(3)}
    assert len(losses) == 3 and all(np.isfinite(list(losses)))


def test_objects_of_noise(few_scenes):
    config = benchmark.configured(tiny_config(), "train", (16, 24), 2)
    with config.unlocked():
        config.data.objects = 3
    batch = benchmark.synthetic(config, 2)
    assert batch["masks"].shape == (2, 3, 16, 24) and batch["masks"].any((2, 3)).all()
    for image, slot in np.ndindex(2, 3):
        rows, cols = np.nonzero(batch["masks"][image, slot])
        box = [rows.min(), cols.min(), rows.max() + 1, cols.max() + 1]
        np.testing.assert_array_equal(batch["boxes"][image, slot], box)
    assert batch["classes"].min() >= 0 and not batch["crowd"].any()


def test_peaks_are_measured(monkeypatch):
    monkeypatch.setattr(benchmark, "MOST", 1)
    monkeypatch.setattr(benchmark, "LEAST", 1)
    flops, rate = benchmark.peaks("float32")
    assert flops > 1e8 and rate > 1e7  # any machine


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("guess", None, 0), 'mode "guess"'),
        (("train", None, -1), "--batch -1"),
        (("train", (15, 16), 8), "multiples of 2"),
        (("train", None, 3), "divisible by 8"),
        (("infer", None, 3), "divisible by 8"),
    ],
)
def test_what_does_not_fit_is_refused(words, expected):
    with pytest.raises(InputError, match=expected):
        mode = words[0]
        benchmark.prepare(benchmark.configured(tiny_config(), *words), mode)


def test_from_the_command_line(monkeypatch, capsys):
    asked = []

    def measure(config, mode):
        asked.append((config.data.crop, config.eval.batch, mode))
        return {"mode": mode, "images_per_s": 12.3456}

    monkeypatch.setattr(benchmark, "measure", measure)
    words = "--config experiments/quickstart.py --size 32,48 --batch 8 --mode infer".split()
    assert main.run(["benchmark", *words]) == 0
    assert asked == [((32, 48), 8, "infer")]
    assert "images_per_s         12.35" in capsys.readouterr().out
