"""The verbs `eval` and `predict` as they are called: what they write, in how much memory."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image
from test_verbs_predict import _read, _save

import jaxseg
from jaxseg.errors import RESTART, InputError
from jaxseg.life import Life
from jaxseg.main import run
from jaxseg.ops import crf
from jaxseg.train import train
from jaxseg.verbs.predict import Predictor, predict


@pytest.fixture(scope="module")
def predictor(tiny_run):
    return jaxseg.load(str(tiny_run))


def _verb(*words: object) -> None:
    assert run(["predict", *map(str, words)]) == 0


def test_the_verb_writes_probabilities_a_legend_and_its_part(tiny_run, predictor, tmp_path):
    for name in "abc":
        _save(tmp_path / "in" / f"{name}.png")
    where = ("--workdir", tiny_run, "--input", tmp_path / "in", "--output", tmp_path / "out")
    _verb(*where, "--save_probabilities", "--legend", "--part", "2/2")
    names = ["b.png", "b_overlay.png", "b_probabilities.npz", "legend.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    expected = predictor(_read(tmp_path / "in" / "b.png")).label
    np.testing.assert_array_equal(_read(tmp_path / "out" / "b.png"), expected)


@pytest.mark.slow
def test_two_processes_fill_one_folder_at_the_same_time(tiny_run, tmp_path):
    for k in range(7):
        _save(tmp_path / "in" / f"{k}.png", seed=k)
    where = ["--workdir", tiny_run, "--input", tmp_path / "in", "--output", tmp_path / "out"]
    command = [sys.executable, "-m", "jaxseg.main", "predict", *where, "--legend", "--part"]
    environment = {**os.environ, "XLA_FLAGS": ""}
    processes = [
        subprocess.Popen(
            [*map(str, command), f"{i}/2"], env=environment, stdout=subprocess.PIPE, text=True
        )
        for i in (1, 2)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [("images: 4" in said[0]), ("images: 3" in said[1])] == [True, True]
    names = [f"{k}{end}" for k in range(7) for end in (".png", "_overlay.png")]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*names, "legend.png"])
    predict(tiny_run, [tmp_path / "in"], tmp_path / "again")
    for k in range(7):
        ours, theirs = (_read(tmp_path / folder / f"{k}.png") for folder in ("out", "again"))
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_the_verbs_use_a_crf(tiny_run, few_scenes, tmp_path):
    given = crf.PARAMETERS["pydensecrf"] | {"iterations": 1}
    (tmp_path / "crf.json").write_text(json.dumps(given))
    shutil.copytree(tiny_run, tmp_path / "run")
    asked = f"--config.eval.crf={tmp_path / 'crf.json'}"
    workdir = ["--workdir", str(tmp_path / "run")]
    assert run(["eval", *workdir, asked, "--config.eval.boundary=false"]) == 0
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["eval"]["crf"] == given
    image = _save(tmp_path / "a.png")
    _verb(*workdir, "--input", image, "--output", tmp_path / "out", "--save_logits", asked)
    logits = Predictor(tiny_run)(_read(image)).logits
    expected = crf.mean_field(-jax.nn.log_softmax(logits), _read(image), **given)
    with np.load(tmp_path / "out" / "a.npz") as stored:
        np.testing.assert_allclose(np.exp(stored["logits"]), expected, atol=1e-4)
    np.testing.assert_array_equal(_read(tmp_path / "out" / "a.png"), expected.argmax(-1))


@pytest.mark.slow
def test_four_channels_of_8_and_16_bits_go_through_both_verbs(tmp_path, write_folder):
    """RGBA files and arrays of 16 bits, the first of which hold what the arrays do."""
    folder = write_folder(tmp_path / "mine", train=2, val=2)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        images = folder / split / "images"
        for i, old in enumerate(sorted(images.iterdir())):
            old.unlink()
            image = rng.integers(0, 256, (40, 48, 4), np.uint8)
            if i:
                np.save(old.with_suffix(".npy"), image.astype(np.uint16) * 257)
            else:
                Image.fromarray(image, "RGBA").save(old)
    config = tiny_config().unlock()
    config.data.update(dataset=str(folder), channels=4, mean=(120.0,) * 4, std=(60.0,) * 4)
    config.model.num_classes = 3
    config.train.update(steps=1, batch=8)
    assert train(config.lock(), tmp_path / "run") == 0
    assert run(["eval", "--workdir", str(tmp_path / "run"), "--save_predictions"]) == 0
    _verb("--workdir", tmp_path / "run", "--input", folder / "val/images", "--output", tmp_path)
    for name in ("00", "01"):
        saved = _read(tmp_path / "run" / "predictions" / "val" / f"{name}.png")
        np.testing.assert_array_equal(_read(tmp_path / f"{name}.png"), saved)


# The peak is the kernel's VmHWM: getrusage's counts the process that started this one, too.
LARGE = """
import re, sys
from pathlib import Path
from jaxseg.verbs.predict import predict
run, image, output = map(Path, sys.argv[1:])
asked = [("eval.mode", "slide"), ("eval.crop", "(512, 512)"), ("eval.stride", "(512, 512)")]
asked += [("eval.batch", "2")]  # windows at a time, whose features the network holds
predict(run, [image], output, overrides=asked)
status = Path("/proc/self/status").read_text()
print("peak", re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])
"""


@pytest.mark.slow
def test_an_image_of_8192x8192_takes_less_than_3_gb(tiny_run, predictor, tmp_path):
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs Linux's /proc to measure the peak")
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1024, 1024, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    np.save(tmp_path / "large.npy", image)
    command = [sys.executable, "-c", LARGE, tiny_run, tmp_path / "large.npy", tmp_path / "out"]
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, check=True
    )
    peak = int(done.stdout.split()[-1]) * 1024
    print(f"peak {peak / 1e9:.2f} GB")
    assert peak < 3e9
    label = _read(tmp_path / "out" / "large.png")
    assert label.shape == (8192, 8192)
    for row, column in ((0, 0), (7, 3), (15, 15)):
        at = np.s_[512 * row : 512 * (row + 1), 512 * column : 512 * (column + 1)]
        np.testing.assert_array_equal(label[at], predictor(image[at]).label)


def test_another_split_leaves_the_report_on_the_validation_split(
    tiny_run, few_scenes, tmp_path, capsys
):
    shutil.copytree(tiny_run, tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    assert run(["eval", "--workdir", str(tmp_path / "run"), "--split", "test"]) == 0
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()} == before
    folder = tmp_path / "run" / "eval" / "test"
    assert json.loads((folder / "eval.json").read_text())["split"] == "test"
    assert list((folder / "pictures").iterdir()) and (folder / "per_class.csv").is_file()
    assert f"details in {folder / 'eval.json'}" in capsys.readouterr().out


@pytest.mark.slow
def test_an_evaluation_that_is_stuck_ends_restartably(
    tiny_run, few_scenes, tmp_path, monkeypatch, capfd
):
    shutil.copytree(tiny_run, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    content = json.loads(path.read_text())
    content["train"]["watchdog"] = 2.0
    path.write_text(json.dumps(content))
    codes = []
    monkeypatch.setattr("jaxseg.verbs.score.Life", partial(Life, leave=codes.append))
    monkeypatch.setattr("jaxseg.faults.FOREVER", 5)
    monkeypatch.setattr("sys.__stderr__", open(2, "w", closefd=False))
    monkeypatch.setenv("JAXSEG_TESTING", "1")
    monkeypatch.setenv("JAXSEG_FAULT", "hang@eval")
    assert run(["eval", "--workdir", str(tmp_path / "run")]) == 0  # it goes on, having ended
    assert codes == [RESTART]
    err = capfd.readouterr().err
    assert "in an evaluation: this process or a peer is stuck" in err and "in strike" in err


@pytest.mark.parametrize("word", ["--submission", "--save_predictions"])
def test_what_saved_predictions_cannot_be_asked_for_is_refused(tiny_run, tmp_path, word):
    words = ["eval", "--predictions", str(tmp_path), "--workdir", str(tiny_run), word]
    with pytest.raises(InputError, match=f"{word} needs a network's labels"):
        run(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("pack --dataset shapes --output p", "pack takes no config. See .* pack --help"),
        ("convert --source smp --arch a --checkpoint c --workdir w", "convert takes no config"),
        ("check --data shapes", "needs --config FILE, the config that it changes"),
        ("describe --workdir w", "describe --workdir takes the run's own config"),
        ("eval --workdir w", r"eval uses the run's own config, in which eval\.\* alone"),
        ("predict --workdir w --input a --output b", r"predict uses .* in which eval\.\* alone"),
    ],
)
def test_an_override_without_a_config_says_why(words, said):
    with pytest.raises(InputError, match=rf"^--config\.data\.root: {said}"):
        run([*words.split(), "--config.data.root=x"])


def test_settings_for_saved_predictions_are_checked_too(tiny_run, tmp_path):
    words = ["eval", "--predictions", str(tmp_path), "--workdir", str(tiny_run)]
    with pytest.raises(InputError, match="eval.buckets is 0: needs at least 1"):
        run([*words, "--config.eval.buckets=0"])
