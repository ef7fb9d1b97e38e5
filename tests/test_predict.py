"""Prediction: the two-line API, the files that the verb writes, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jaxseg
from jaxseg.data.colours import colourise
from jaxseg.data.sources import Shapes
from jaxseg.errors import InputError
from jaxseg.predict import collect, predict

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
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.int64),
        np.zeros((0, 8, 3), np.uint8),
    ],
    ids=["flat", "grey", "rgba", "batch", "float", "int64", "empty"],
)
def test_other_arrays_are_refused_with_what_is_needed(predictor, image):
    with pytest.raises(InputError, match=r"needs uint8 \[H,W,3\], values 0\.\.255") as error:
        predictor(image)
    assert f"{image.dtype} {list(image.shape)}" in str(error.value)


def test_eval_scale_answers_at_the_size_of_the_image(tiny_run, predictor):
    scaled = jaxseg.load(tiny_run)
    scaled.config.eval.scale = 0.5
    result = scaled(_image((17, 23)))
    assert result.label.shape == (17, 23)
    np.testing.assert_array_equal(result.label, result.logits.argmax(-1))
    assert np.abs(result.logits - predictor(_image((17, 23))).logits).max() > 1e-3


def test_files_hold_the_ids_the_colours_and_the_logits(tiny_run, predictor, tmp_path, capsys):
    paths = [_save(tmp_path / "in" / f"{k}.png", size, k) for k, size in enumerate(SIZES)]
    output = tmp_path / "deep" / "out"
    assert predict(tiny_run, [tmp_path / "in"], output, save_logits=True) == 0
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
    assert f"4/4  {paths[3]} -> {output / '3.png'}" in capsys.readouterr().out


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
    predict(tiny_run, [tmp_path], tmp_path / "out", save_logits=True)
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


def test_an_image_named_like_anothers_overlay_is_refused(tmp_path):
    _save(tmp_path / "a.png")
    _save(tmp_path / "a_overlay.png")
    with pytest.raises(InputError, match=r"would both become a_overlay\.png"):
        collect([tmp_path])


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
