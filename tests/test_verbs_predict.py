"""Prediction: the two-line API, the files that the verb writes, and what it refuses."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxseg
from jaxseg.data.colours import colourise, read_note
from jaxseg.data.sources import Shapes
from jaxseg.errors import InputError
from jaxseg.verbs.predict import PLAIN, Formats, Predictor, collect, predict

ARRAYS = Formats(logits=True)
SIZES = [(17, 23), (32, 32), (1, 1), (40, 5)]


def _image(size: tuple[int, int], seed: int = 0, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, channels), np.uint8)


def _save(path: Path, size: tuple[int, int] = (17, 23), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_image(size, seed)).save(path)
    return path


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.fixture(scope="module")
def predictor(tiny_run):
    return jaxseg.load(str(tiny_run))


def test_a_loaded_run_knows_its_step_classes_and_config(predictor):
    assert predictor.step == predictor.config.train.steps == 3
    assert predictor.classes == Shapes.classes


@pytest.mark.parametrize("size", SIZES)
def test_two_lines_label_an_image_of_any_size(predictor, size):
    image = _image(size)
    result = predictor(image)
    assert result.label.shape == size and result.label.dtype == np.uint8
    assert result.logits.shape == (*size, 8) and result.logits.dtype == np.float32
    np.testing.assert_array_equal(result.label, result.logits.argmax(-1))
    assert result.overlay.shape == (*size, 3) and result.overlay.dtype == np.uint8
    assert np.isfinite(result.logits).all()
    np.testing.assert_array_equal(result.image, image)


def test_predictions_depend_on_the_image(predictor):
    assert (predictor(_image((17, 23))).logits != predictor(_image((17, 23), 1)).logits).any()


def test_a_mirrored_view_is_an_image_too(predictor):
    image = _image((17, 23))
    expected = predictor(np.ascontiguousarray(image[:, ::-1])).logits
    np.testing.assert_array_equal(predictor(image[:, ::-1]).logits, expected)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 1), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((1, 8, 8, 3), np.uint8),
        np.zeros((8, 8, 3), np.float64),
        np.zeros((8, 8, 3), np.int64),
        np.zeros((0, 8, 3), np.uint8),
    ],
    ids=["flat", "grey", "rgba", "batch", "float", "int64", "empty"],
)
def test_other_arrays_are_refused_with_what_is_needed(predictor, image):
    with pytest.raises(InputError, match=r"needs uint8 \[H,W,3\], values 0\.\.255") as error:
        predictor(image)
    assert f"{image.dtype} {list(image.shape)}" in str(error.value)


def test_settings_of_the_evaluation_can_be_others(tiny_run, predictor):
    scaled = Predictor(tiny_run, [("eval.scales", "(0.5,)")])
    result = scaled(_image((17, 23)))
    assert result.label.shape == (17, 23)
    np.testing.assert_array_equal(result.label, result.logits.argmax(-1))
    assert np.abs(result.logits - predictor(_image((17, 23))).logits).max() > 1e-3


def test_files_hold_the_ids_the_colours_and_the_logits(tiny_run, predictor, tmp_path, capsys):
    paths = [_save(tmp_path / "in" / f"{k}.png", size, k) for k, size in enumerate(SIZES)]
    output = tmp_path / "deep" / "out"
    assert predict(tiny_run, [tmp_path / "in"], output, ARRAYS) == 0
    names = [f"{k}{end}" for k in range(len(SIZES)) for end in (".npz", ".png", "_overlay.png")]
    assert sorted(p.name for p in output.iterdir()) == sorted(names)
    for k, (path, size) in enumerate(zip(paths, SIZES, strict=True)):
        result = predictor(_read(path))
        with Image.open(output / f"{k}.png") as picture:
            assert picture.mode == "P" and picture.size == size[::-1]
            shown = np.asarray(picture.convert("RGB"))
        np.testing.assert_array_equal(_read(output / f"{k}.png"), result.label)
        np.testing.assert_array_equal(shown, colourise(result.label, predictor.classes))
        np.testing.assert_array_equal(_read(output / f"{k}_overlay.png"), result.overlay)
        with np.load(output / f"{k}.npz") as stored:
            assert list(stored) == ["logits"] and stored["logits"].dtype == np.float32
            np.testing.assert_array_equal(stored["logits"], result.logits)
    said = capsys.readouterr().out
    assert f"4/4  {paths[3]} -> {output / '3.png'}" in said
    assert "images: 4, labelled: 4, compilations: 4" in said


def test_without_save_logits_there_are_none(tiny_run, tmp_path):
    predict(tiny_run, [_save(tmp_path / "a.png")], tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "a_overlay.png"]


def test_grey_transparent_and_rotated_files_are_converted(tiny_run, predictor, tmp_path):
    image = _image((17, 23))
    grey, exif = Image.fromarray(image).convert("L"), Image.Exif()
    exif[0x112] = 6  # the camera was held upright
    grey.save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([image, image[..., 0]])).save(tmp_path / "clear.png")
    Image.fromarray(image).save(tmp_path / "rotated.png", exif=exif)
    predict(tiny_run, [tmp_path], tmp_path / "out", ARRAYS)
    expected = {
        "grey": np.repeat(np.asarray(grey)[..., None], 3, axis=2),
        "clear": image,
        "rotated": np.ascontiguousarray(np.rot90(image, -1)),
    }
    for name, pixels in expected.items():
        with np.load(tmp_path / "out" / f"{name}.npz") as stored:
            np.testing.assert_array_equal(stored["logits"], predictor(pixels).logits)


def test_files_and_folders_mix_and_repeat(tmp_path):
    a, b = _save(tmp_path / "in" / "a.png"), _save(tmp_path / "in" / "b.jpg")
    c = _save(tmp_path / "c.png")
    (tmp_path / "in" / "notes.txt").touch()
    assert collect([c, tmp_path / "in", a]) == {"c": c, "a": a, "b": b}


def test_two_images_of_one_name_are_refused(tmp_path):
    a, b = _save(tmp_path / "one" / "a.png"), _save(tmp_path / "two" / "a.jpg")
    with pytest.raises(InputError, match=rf"{a} and {b} would both become a\.png"):
        collect([a, b])


def test_patterns_are_the_images_that_match(tmp_path):
    a, b = _save(tmp_path / "one" / "a.png"), _save(tmp_path / "two" / "deep" / "b.jpg")
    (tmp_path / "one" / "a.txt").touch()
    assert collect([tmp_path / "**" / "*.*"]) == {"a": a, "b": b}
    assert collect([tmp_path / "o?e" / "*"]) == {"a": a}
    with pytest.raises(InputError, match=r"no images match .*\*\.tif: needs files ending in \.jpg"):
        collect([tmp_path / "*.tif"])


@pytest.mark.parametrize("other", ["a_overlay", "legend"])
def test_an_image_whose_labels_would_be_another_output_is_refused(tiny_run, tmp_path, other):
    _save(tmp_path / "in" / "a.png")
    _save(tmp_path / "in" / f"{other}.png")
    with pytest.raises(InputError, match=rf"would both become {other}\.png"):
        predict(tiny_run, [tmp_path / "in"], tmp_path / "out", legend=True)
    assert not (tmp_path / "out").exists()


def test_labels_do_not_land_among_the_images(tiny_run, tmp_path):
    path = _save(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="is the images' own folder: labels would become images"):
        predict(tiny_run, [path], tmp_path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a.png", "a_overlay.png"])
def test_inputs_are_never_overwritten(tiny_run, tmp_path, name):
    path = _save(tmp_path / name)
    others = [_save(tmp_path / "other" / "a.png")] if name != "a.png" else []
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"would (be overwritten|both become)"):
        predict(tiny_run, [path, *others], tmp_path / "other" / "..")
    assert path.read_bytes() == before


def test_a_folder_without_images_is_refused(tiny_run, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").touch()
    with pytest.raises(InputError, match=r"no images in folder .*in: needs files ending in \.jpg"):
        predict(tiny_run, [tmp_path / "in"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_input_is_named(tiny_run, tmp_path):
    with pytest.raises(InputError, match=r"no such image or folder: .*nowhere\.png"):
        predict(tiny_run, [tmp_path / "nowhere.png"], tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>", b"\x89PNG\r\n\x1a\n\0\0"])
def test_an_unreadable_image_is_named(tiny_run, tmp_path, content):
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read image .*broken\.png"):
        predict(tiny_run, [tmp_path / "broken.png"], tmp_path / "out")


def test_an_output_that_is_a_file_is_refused(tiny_run, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match=r"cannot write to .*out"):
        predict(tiny_run, [_save(tmp_path / "a.png")], tmp_path / "out")


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no run in .*config\.json is missing"):
        jaxseg.load(tmp_path)


def test_probabilities_are_the_softmax_of_the_logits(tiny_run, predictor, tmp_path):
    image = _save(tmp_path / "a.png")
    predict(tiny_run, [image], tmp_path / "out", Formats(probabilities=True))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *("a.png", "a_overlay.png", "a_probabilities.npz"),
    ]
    with np.load(tmp_path / "out" / "a_probabilities.npz") as stored:
        found = stored["probabilities"]
    expected = np.exp(predictor(_read(image)).logits.astype(np.float64))
    expected /= expected.sum(-1, keepdims=True)
    assert found.dtype == np.float32 and np.abs(found - expected).max() < 1e-6


def test_the_legend_shows_every_colour(tiny_run, predictor, tmp_path):
    predict(tiny_run, [_save(tmp_path / "a.png")], tmp_path / "out", legend=True)
    shown = {tuple(c) for c in _read(tmp_path / "out" / "legend.png").reshape(-1, 3).tolist()}
    assert set(predictor.classes.palette) <= shown


def _times(output: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in output.iterdir()}


@pytest.fixture
def done(tiny_run, tmp_path) -> tuple[Path, Path]:
    """(inputs, outputs) of a finished prediction of three images, a second ago."""
    for name in ("a", "b", "c"):
        _save(tmp_path / "in" / f"{name}.png")
    predict(tiny_run, [tmp_path / "in"], tmp_path / "out")
    for path in [*(tmp_path / "in").iterdir(), *(tmp_path / "out").iterdir()]:
        os.utime(path, ns=(10**18, 10**18))
    return tmp_path / "in", tmp_path / "out"


def _redone(done: tuple[Path, Path], *args, **options) -> set[str]:
    """The files that another prediction writes."""
    before = _times(done[1])
    predict(*args, **options)
    return {name for name, at in _times(done[1]).items() if at != before.get(name)}


def test_what_is_there_is_not_labelled_again(tiny_run, done, capsys):
    capsys.readouterr()
    assert _redone(done, tiny_run, [done[0]], done[1]) == set()
    said = capsys.readouterr().out
    assert "(is there)" in said and "images: 3, labelled: 0, compilations: 0" in said


@pytest.mark.parametrize("lost", ["b.png", "b_overlay.png"])
def test_a_stopped_prediction_goes_on_with_the_images_that_are_missing(tiny_run, done, lost):
    (done[1] / lost).unlink()
    assert _redone(done, tiny_run, [done[0]], done[1]) == {"b.png", "b_overlay.png"}


def test_an_image_that_is_newer_than_its_labels_is_labelled_again(tiny_run, done):
    os.utime(done[0] / "c.png")
    assert _redone(done, tiny_run, [done[0]], done[1]) == {"c.png", "c_overlay.png"}


def test_labels_of_other_settings_or_of_unknown_origin_are_made_again(tiny_run, done):
    Image.fromarray(_image((17, 23))).save(done[1] / "a.png")
    os.utime(done[1] / "a.png", ns=(10**18, 10**18))
    assert _redone(done, tiny_run, [done[0]], done[1]) == {"a.png", "a_overlay.png"}
    every = {f"{name}{end}" for name in "abc" for end in (".png", "_overlay.png")}
    flipped = {"overrides": [("eval.flip", "true")]}
    assert _redone(done, tiny_run, [done[0]], done[1], **flipped) == every
    assert _redone(done, tiny_run, [done[0]], done[1], **flipped) == set()
    slower = [*flipped["overrides"], ("eval.batch", "3")]
    assert _redone(done, tiny_run, [done[0]], done[1], overrides=slower) == set()


def test_a_format_that_is_missing_is_added(tiny_run, done):
    redone = _redone(done, tiny_run, [done[0] / "a.png"], done[1], ARRAYS)
    assert redone == {"a.npz", "a.png", "a_overlay.png"}


def test_processes_share_the_images(tiny_run, tmp_path):
    for name in "abcde":
        _save(tmp_path / "in" / f"{name}.png")
    seen = []
    for i in (1, 2):
        output = tmp_path / f"out{i}"
        predict(tiny_run, [tmp_path / "in"], output, part=(i, 2))
        seen.append(sorted(p.stem for p in output.glob("?.png")))
    assert seen == [["a", "c", "e"], ["b", "d"]]


def test_nothing_half_written_is_left_where_writing_fails(tiny_run, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("jaxseg.verbs.predict.colours.save_label", fail)
    with pytest.raises(OSError, match="disk full"):
        predict(tiny_run, [_save(tmp_path / "a.png")], tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a_overlay.png"]


def test_many_sizes_share_few_shapes(tiny_run, predictor, tmp_path, capsys):
    sizes = [(20 + i, 30 - i) for i in range(5)]
    for i, size in enumerate(sizes):
        _save(tmp_path / "in" / f"{i}.png", size, i)
    two = [("eval.buckets", "2")]
    predict(tiny_run, [tmp_path / "in"], tmp_path / "out", ARRAYS, overrides=two)
    assert "images: 5, labelled: 5, compilations: 2" in capsys.readouterr().out
    for i, size in enumerate(sizes):
        height, width = json.loads(read_note(tmp_path / "out" / f"{i}.png"))["shape"]
        grown = np.pad(
            _image(size, i), [(0, height - size[0]), (0, width - size[1]), (0, 0)], "symmetric"
        )
        expected = predictor(grown).logits[: size[0], : size[1]]
        with np.load(tmp_path / "out" / f"{i}.npz") as stored:
            np.testing.assert_array_equal(stored["logits"], expected)
        np.testing.assert_array_equal(_read(tmp_path / "out" / f"{i}.png"), expected.argmax(-1))


def test_an_answer_that_is_not_finite_is_refused(tiny_run):
    predictor = Predictor(tiny_run)
    predictor.variables["params"]["classifier"]["bias"] *= jnp.nan
    with pytest.raises(InputError, match="answer is not finite"):
        predictor(_image((17, 23)))


def test_windows_label_an_image_larger_than_they_are(tiny_run, predictor):
    asked = [("eval.mode", "slide"), ("eval.crop", "(16,16)"), ("eval.stride", "(8,8)")]
    windows, image = Predictor(tiny_run, asked), _image((50, 70))
    result = windows(image)
    label, logits = windows.infer(image, (50, 70), logits=False)
    assert logits is None and result.label.shape == (50, 70)
    np.testing.assert_array_equal(label, result.label)
    assert np.mean(result.label == predictor(image).label) > 0.5


def test_a_run_from_before_the_settings_takes_their_defaults(tiny_run, predictor, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["eval"] = {"batch": 8, "scale": 1.0, "pictures": 2}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    old = jaxseg.load(tmp_path / "run")
    assert old.config.eval.mode == "whole" and old.config.eval.batch == 8
    np.testing.assert_array_equal(old(_image((9, 9))).logits, predictor(_image((9, 9))).logits)


FLIP = {"overrides": [("eval.flip", "true")]}


def test_logits_of_another_step_or_other_settings_are_never_taken_for_those_of_now(
    tiny_run, tmp_path, capsys
):
    image, out = _save(tmp_path / "a.png"), tmp_path / "out"
    every = Formats(logits=True, probabilities=True)
    predict(tiny_run, [image], out, every)
    predict(tiny_run, [image], out, **FLIP)  # as after more training: the label alone is of now
    assert sorted(p.name for p in out.iterdir()) == ["a.png", "a_overlay.png"]
    predict(tiny_run, [image], out, every, **FLIP)
    expected = Predictor(tiny_run, **FLIP)(_read(image)).logits
    with np.load(out / "a.npz") as stored:
        np.testing.assert_array_equal(stored["logits"], expected)
    assert "labelled: 1" in capsys.readouterr().out.splitlines()[-1]


def test_an_interrupted_prediction_leaves_no_label_over_files_of_others(
    tiny_run, tmp_path, monkeypatch
):
    image, out = _save(tmp_path / "a.png"), tmp_path / "out"
    predict(tiny_run, [image], out, ARRAYS)
    with monkeypatch.context() as patch:
        patch.setattr("jaxseg.verbs.predict.colours.save_label", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            predict(tiny_run, [image], out, ARRAYS, **FLIP)
    predict(tiny_run, [image], out, ARRAYS)
    with np.load(out / "a.npz") as stored:
        np.testing.assert_array_equal(stored["logits"], Predictor(tiny_run)(_read(image)).logits)


def test_formats_of_the_same_settings_add_up(tiny_run, tmp_path, capsys):
    image, out = _save(tmp_path / "a.png"), tmp_path / "out"
    both = Formats(logits=True, probabilities=True)
    for formats, work in ((ARRAYS, 1), (Formats(probabilities=True), 1), (both, 0), (PLAIN, 0)):
        predict(tiny_run, [image], out, formats)
        assert f"labelled: {work}" in capsys.readouterr().out
    assert (out / "a.npz").exists() and (out / "a_probabilities.npz").exists()


def test_an_answer_that_is_not_finite_is_refused_with_the_image(tiny_run, tmp_path, monkeypatch):
    class Broken(Predictor):
        def __init__(self, *args):
            super().__init__(*args)
            self.variables["params"]["classifier"]["bias"] *= jnp.nan

    monkeypatch.setattr("jaxseg.verbs.predict.Predictor", Broken)
    with pytest.raises(InputError, match=r"answer to .*/a\.png is not finite \(NaN"):
        predict(tiny_run, [_save(tmp_path / "a.png")], tmp_path / "out")


@pytest.mark.parametrize("buckets", ["8", "1"])
def test_an_image_smaller_than_a_window_is_named_before_any_is_labelled(
    tiny_run, tmp_path, buckets
):
    """In a bucket of larger images, too."""
    _save(tmp_path / "in" / "a.png", (40, 40))
    _save(tmp_path / "in" / "b.png", (9, 8))
    asked = [("eval.mode", "slide"), ("eval.crop", "(16,16)"), ("eval.buckets", buckets)]
    with pytest.raises(InputError, match=r"in/b\.png: an image of \(9, 8\) is smaller than"):
        predict(tiny_run, [tmp_path / "in"], tmp_path / "out", overrides=asked)
    assert not (tmp_path / "out").exists()


def test_a_file_whose_pixels_are_not_as_many_as_its_header_says_is_named(
    tiny_run, tmp_path, monkeypatch
):
    monkeypatch.setattr("jaxseg.verbs.predict.files.image_size", lambda path: (23, 17))
    message = r"a\.png has \(17, 23\) pixels \(height, width\), but its header says \(23, 17\)"
    with pytest.raises(InputError, match=message):
        predict(tiny_run, [_save(tmp_path / "a.png")], tmp_path / "out")


def test_images_of_8_and_16_bits_compile_once_and_say_what_they_say_alone(
    tiny_run, tmp_path, capsys
):
    _save(tmp_path / "in" / "a.png")
    deep = np.random.default_rng(0).integers(0, 65536, (17, 23), np.uint16)
    Image.fromarray(deep).save(tmp_path / "in" / "b.png")
    predict(tiny_run, [tmp_path / "in"], tmp_path / "out", ARRAYS)
    assert "images: 2, labelled: 2, compilations: 1" in capsys.readouterr().out
    for name in "ab":
        predict(tiny_run, [tmp_path / "in" / f"{name}.png"], tmp_path / "alone", ARRAYS)
        with (
            np.load(tmp_path / "out" / f"{name}.npz") as x,
            np.load(tmp_path / "alone" / f"{name}.npz") as y,
        ):
            np.testing.assert_allclose(x["logits"], y["logits"], atol=1e-5)


def test_a_terminal_shows_one_line_that_changes(tiny_run, tmp_path, monkeypatch, capsys):
    for name in "ab":
        _save(tmp_path / "in" / f"{name}.png")
    predict(tiny_run, [tmp_path / "in" / "a.png"], tmp_path / "out")
    capsys.readouterr()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    predict(tiny_run, [tmp_path / "in"], tmp_path / "out")
    first, last, _ = capsys.readouterr().out.split("\n")
    pattern = r"\r\x1b\[K2/2  .*b\.png -> .*out/b\.png  [\d.]+ images/s  ETA 0:00"
    assert re.fullmatch(pattern, first) and last.startswith("images: 2, labelled: 1")
