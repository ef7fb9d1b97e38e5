"""The verb check: right counts of good data, and every bad file by its name and with the reason."""

import hashlib
import json
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data_files import _tiff as write_tiff

from jaxseg import main
from jaxseg.data import catalog
from jaxseg.data.colours import Classes, save_label, voc_palette
from jaxseg.data.files import shown
from jaxseg.errors import InputError
from jaxseg.verbs.check import inspect, median_frequency

NAMES = ("sky", "road", "car")
SIZE = (20, 24)


@pytest.fixture
def folder(tmp_path, write_folder) -> Path:
    """Three images of train, two of val; the first row of every mask is ignored."""
    return write_folder(tmp_path / "mine", NAMES, size=SIZE, train=3, val=2)


def _photo(seed: int = 9, size: tuple[int, int] = SIZE) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return Image.fromarray(noise)


def _replace(folder: Path, picture: Image.Image, name: str = "01.png", **options) -> Path:
    """Puts another image in the place of train/images/01.png."""
    (folder / "train/images/01.png").unlink()
    path = folder / "train/images" / name
    picture.save(path, **options)
    if path.stem != "01":
        (folder / "train/masks/01.png").rename(folder / "train/masks" / f"{path.stem}.png")
    return path


def _cut(path: Path, end: int) -> Path:
    path.write_bytes(path.read_bytes()[:end])
    return path


def _half(path: Path) -> Path:
    return _cut(path, path.stat().st_size // 2)


def _flip(path: Path) -> Path:
    """Flips one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    return path


def _text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def _html(folder: Path) -> Path:
    """What a failed download leaves."""
    return _text(_replace(folder, _photo(), "01.jpg"), "<!DOCTYPE html>")


def _resized(folder: Path, size: tuple[int, int]) -> Path:
    """An image of another size with its mask."""
    Image.fromarray(np.ones(size, np.uint8)).save(folder / "train/masks/01.png")
    return _replace(folder, _photo(size=size))


def _bomb(folder: Path) -> Path:
    """A PNG of 400 megapixels, as its header says."""
    path = _replace(folder, Image.new("1", (8, 8)))
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    content = path.read_bytes()
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    return path


def _turned(folder: Path) -> Path:
    exif = Image.Exif()
    exif[0x112] = 6
    return _replace(folder, _photo(size=SIZE[::-1]), "01.jpg", exif=exif)


def _known(folder: Path) -> Path:
    """A JPEG with a flipped bit that still decodes, in a folder that knows its files."""
    path = _replace(folder, _photo(), "01.jpg", quality=90)
    (folder / "SHA256SUMS").write_text(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  train/images/01.jpg\n"
    )
    return _flip(path)


GREY16 = Image.fromarray(np.arange(480, dtype=np.uint16).reshape(SIZE) * 100)
TWO = {"save_all": True, "append_images": [_photo(1)]}
# What is done to one image of train, the kind of finding, and its words.
IMAGES: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "truncated JPEG": (lambda f: _half(_replace(f, _photo(), "01.jpg")), "errors", "cannot read"),
    "truncated PNG": (lambda f: _half(_replace(f, _photo())), "errors", "cannot read"),
    "PNG without its end": (
        lambda f: _cut(_replace(f, _photo()), -8),
        "warnings",
        "does not end as it should",
    ),
    "0 bytes": (lambda f: _cut(f / "train/images/01.png", 0), "errors", r"\(0 bytes\)"),
    "JPEG of 0 bytes": (
        lambda f: _cut(_replace(f, _photo(), "01.jpg"), 0),
        "errors",
        r"\(0 bytes\)",
    ),
    "HTML named .jpg": (_html, "errors", "not an image"),
    "PNG with a flipped bit": (lambda f: _flip(_replace(f, _photo())), "errors", "cannot read"),
    "JPEG with a flipped bit": (_known, "errors", "not the file that SHA256SUMS knows"),
    "grey": (lambda f: _replace(f, _photo().convert("L")), "warnings", "mode L, read as RGB"),
    "CMYK": (
        lambda f: _replace(f, _photo().convert("CMYK"), "01.jpg"),
        "warnings",
        "mode CMYK, read as RGB",
    ),
    "RGBA": (lambda f: _replace(f, _photo().convert("RGBA")), "warnings", "mode RGBA, read as RGB"),
    "16 bits": (lambda f: _replace(f, GREY16), "warnings", "16 bits a channel"),
    "animated": (lambda f: _replace(f, _photo(), **TWO), "warnings", "2 pictures in one file"),
    "EXIF rotation": (_turned, "warnings", "EXIF orientation 6"),
    "1x1": (lambda f: _resized(f, (1, 1)), "warnings", "only 1x1 pixels"),
    "1x5000": (lambda f: _resized(f, (1, 5000)), "warnings", "only 1x5000 pixels"),
    "decompression bomb": (_bomb, "errors", "20000x20000|400000000"),
    "upper-case suffix": (lambda f: _replace(f, _photo(), "01.PNG"), "", ""),
    "unicode and space": (lambda f: _replace(f, _photo(), "photo été 雪.png"), "", ""),
    "newline": (lambda f: _replace(f, _photo(), "a\nb.png"), "warnings", "control characters"),
}


def _mask(folder: Path, values: np.ndarray, name: str = "01.png", **options) -> Path:
    (folder / "train/masks/01.png").unlink()
    path = folder / "train/masks" / name
    Image.fromarray(values).save(path, **options)
    return path


def _filled(value: int, dtype: type = np.uint8, rest: int = 1) -> np.ndarray:
    values = np.full(SIZE, rest, dtype)
    values[3:5] = value
    return values


def _coloured(folder: Path, mode: str) -> Path:
    path = folder / "train/masks/01.png"
    _photo().convert(mode).save(path)
    return path


def _black_and_white(folder: Path) -> Path:
    for path in folder.glob("*/masks/*.png"):
        Image.fromarray(_filled(255, rest=0)).save(path)
    return Path("train: all masks")


def _moved(folder: Path, part: str) -> Path:
    path = folder / f"train/{part}/01.png"
    path.unlink()
    return folder / "train/masks/01.png"


MASKS: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "255": (lambda f: _mask(f, _filled(255)), "", ""),
    "K": (lambda f: _mask(f, _filled(3)), "errors", r"holds ids 3 \(48 pixels\)"),
    "254": (lambda f: _mask(f, _filled(254)), "errors", r"holds ids 254 \(48 pixels\)"),
    "-1": (lambda f: _mask(f, _filled(-1, np.int32), "01.tif"), "errors", "holds ids -1"),
    "-1 in int16": (
        lambda f: _mask(f, _filled(-1, np.int16).view(np.uint16), "01.tif", tiffinfo={339: 2}),
        "errors",
        "holds ids -1",
    ),
    "palette": (lambda f: _mask(f, _filled(2)), "", ""),
    "RGB": (lambda f: _coloured(f, "RGB"), "errors", "mode RGB: needs class ids"),
    "RGBA": (lambda f: _coloured(f, "RGBA"), "errors", "mode RGBA: needs class ids"),
    "times 256": (
        lambda f: _mask(f, _filled(512, np.uint16, rest=256)),
        "errors",
        "holds ids 256 .* 512 .* scaled to 16 bits",
    ),
    "1 bit": (lambda f: _mask(f, _filled(0).astype(bool)), "", ""),
    "one of 0 and 255": (lambda f: _mask(f, _filled(255, rest=0)), "warnings", "only 0 and 255"),
    "all of 0 and 255": (_black_and_white, "errors", 'only 0 and 255.* "values": .0, 255.'),
    "JPEG": (
        lambda f: _mask(f, _filled(2), "01.jpg"),
        "errors",
        "is a JPEG, whose compression changes ids",
    ),
    "another size": (lambda f: _mask(f, _filled(1)[:-1]), "errors", r"\(19, 24\).*must be equal"),
    "all ignored": (
        lambda f: _mask(f, _filled(255, rest=255)),
        "warnings",
        "all of the mask is ig",
    ),
    "one class": (lambda f: _mask(f, _filled(1)), "", ""),
    "missing": (lambda f: _moved(f, "masks"), "errors", r"01\.png has no mask: needs .*masks"),
    "extra": (lambda f: _moved(f, "images"), "warnings", "a mask without an image"),
    "NaN": (
        lambda f: _mask(f, np.full(SIZE, np.nan, np.float32), "01.tif"),
        "errors",
        "mode F: needs class ids",
    ),
}


CASES = IMAGES | {f"mask: {name}": case for name, case in MASKS.items()}
DECODES = "JPEG with a flipped bit"  # to other pixels; only the checksum tells


@pytest.mark.parametrize("case", CASES)
def test_a_bad_file_is_named_with_its_reason(folder, case):
    make, kind, words = CASES[case]
    path = make(folder)
    facts = inspect(str(folder), ["train", "val"])
    for key in ("errors", "warnings"):
        named = [line for line in facts[key] if shown(path) in line]
        if key == kind:
            assert any(re.search(words, line) for line in named), facts[key]
        else:
            assert not named
    assert facts["splits"]["val"]["images"] == 2
    source = catalog.open_split(str(folder), "train", complete=False)
    index = {image.stem: i for i, image in enumerate(source.images)}.get(path.stem)
    if index is not None and kind == "errors" and case != DECODES:
        with pytest.raises(InputError, match=re.escape(path.name)):
            source[index]
    elif index is not None:
        example = source[index]
        assert example["image"].shape[:2] == example["label"].shape == source.size(index)


def test_palette_masks_keep_their_ids(folder):
    label = _filled(2)
    save_label(folder / "train/masks/01.png", label, Classes(NAMES, voc_palette(3)))
    facts = inspect(str(folder), ["train"])
    counts = [np.asarray(Image.open(p)) for p in sorted((folder / "train/masks").iterdir())]
    pixels = np.bincount(np.concatenate([c.ravel() for c in counts]), minlength=256)
    assert list(facts["splits"]["train"]["class_pixels"].values()) == pixels[:3].tolist()
    assert facts["splits"]["train"]["ignored_pixels"] == pixels[255] and not facts["errors"]


def test_what_ade20k_calls_0_is_ignored(tmp_path):
    for name in ("training", "validation"):
        for kind, picture in (
            ("images", _photo()),
            ("annotations", Image.new("L", SIZE[::-1], 150)),
        ):
            place = tmp_path / "ade20k" / kind / name
            place.mkdir(parents=True)
            picture.paste(0, (0, 0, 24, 2))
            picture.save(place / ("a.jpg" if kind == "images" else "a.png"))
    found = inspect("ade20k", ["train", "val"], str(tmp_path))
    for split in ("train", "val"):
        assert found["splits"][split]["class_pixels"]["flag"] == 18 * 24
        assert found["splits"][split]["ignored_pixels"] == 2 * 24
    assert not found["errors"]


def test_good_data_are_counted(folder):
    facts = inspect(str(folder), ["train", "val"])
    assert facts["errors"] == facts["warnings"] == []
    train = facts["splits"]["train"]
    images = np.stack([np.asarray(Image.open(folder / f"train/images/0{k}.png")) for k in range(3)])
    assert train["images"] == 3 and train["ignored_pixels"] == 3 * 24
    assert sum(train["class_pixels"].values()) == 3 * 19 * 24
    assert train["images_with_class"] == dict.fromkeys(NAMES, 3)
    np.testing.assert_allclose(train["mean"], images.mean(axis=(0, 1, 2)), atol=1e-3)
    np.testing.assert_allclose(train["std"], images.std(axis=(0, 1, 2)), atol=1e-3)
    assert train["sizes"] == {"least": [20, 24], "most": [20, 24]} and train["modes"] == {"RGB": 3}


def test_maps_of_objects_are_read_too(folder):
    masks = sorted((folder / "train/masks").iterdir())
    (folder / "train/instances").mkdir()
    for path in masks[1:]:
        shutil.copy(path, folder / "train/instances" / path.name)
    Image.new("L", (3, 4)).save(folder / "train/instances" / masks[1].name)
    errors = inspect(str(folder), ["train"])["errors"]
    assert len(errors) == 2
    assert masks[0].name in errors[0] and "is (4, 3) and the mask of its classes" in errors[1]


def test_objects_without_a_pixel_are_named(tmp_path):
    tiny, images = [[3.2, 3.2, 3.4, 3.4, 3.2, 3.6]], []
    for number in (1, 2):
        images.append({"id": number, "file_name": f"{number}.png", "height": 20, "width": 24})
        _photo(number).save(tmp_path / f"{number}.png")
    shapes = [(1, [[2, 2, 9, 2, 9, 9]]), (2, tiny), (2, [[2, 2, 9, 2, 9, 9]]), (2, tiny)]
    notes = [{"image_id": i, "category_id": 1, "segmentation": shape} for i, shape in shapes]
    content = {"images": images, "annotations": notes, "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    facts = inspect(f"coco_json:{tmp_path}", ["train"])
    (warning,) = facts["warnings"]
    assert facts["errors"] == [] and warning.endswith("counts as missed: 2")
    assert f"{tmp_path / '2.png'}: objects without a pixel" in warning


def test_an_image_in_two_splits_is_named(folder):
    picture = Image.open(folder / "train/images/02.png")
    picture.save(folder / "val/images/00.tif")  # other bytes, the same pixels
    (folder / "val/images/00.png").unlink()
    picture.save(folder / "train/images/00.png")
    facts = inspect(str(folder), ["train", "val"])
    (line,) = facts["warnings"]
    assert "the same image in train and val" in line
    for name in ("train/images/00.png", "train/images/02.png", "val/images/00.tif"):
        assert str(folder / name) in line


def test_classes_that_never_occur_are_named(folder):
    for path in folder.glob("train/masks/*.png"):
        Image.fromarray(_filled(0)).save(path)
    facts = inspect(str(folder), ["train", "val"])
    assert facts["warnings"] == ["train has no pixel of car"]
    assert facts["weights"]["median_frequency_pixels"]["car"] is None


def test_a_split_that_cannot_be_opened_is_an_error_beside_the_others(folder):
    facts = inspect(str(folder), ["train", "test"])
    assert "no split 'test'" in facts["errors"][0] and facts["splits"]["train"]["images"] == 3


def test_median_frequencies_are_in_both_definitions():
    pixels = np.zeros((3, 256), np.int64)
    pixels[:, 0], pixels[:, 255] = (60, 40, 100), (0, 20, 0)
    pixels[0, 1], pixels[1, 2] = 40, 40
    weights = median_frequency(pixels, ("a", "b", "c", "d"))
    # of all 300 pixels, 200 are a, 40 b, 40 c; b and c are in one image of 100 each
    assert weights["median_frequency_pixels"] == {"a": 0.2, "b": 1.0, "c": 1.0, "d": None}
    assert weights["median_frequency_images"] == {"a": 0.6, "b": 1.0, "c": 1.0, "d": None}


def test_camvid_has_its_published_frequencies_and_weights(data_root):
    if not (data_root / "camvid").is_dir():
        pytest.skip("needs camvid")
    facts = inspect("camvid", ["train", "val"], str(data_root))
    train = facts["splits"]["train"]
    assert facts["errors"] == [] and train["images"] == 367
    stats = json.loads((data_root / "camvid/stats.json").read_text())["train"]
    assert train["class_pixels"] == stats["class_pixels"]
    assert train["ignored_pixels"] == stats["ignore_pixels"] == 2503995
    assert list(train["images_with_class"].values()) == [
        *(366, 365, 366, 367, 349, 319, 351, 173, 360, 317, 201)
    ]
    published = {
        "median_frequency_images": [
            *(0.2793, 0.2017, 4.7865, 0.1490, 1.0, 0.4217, 3.8467, 1.9736, 0.7889, 6.3747, 8.8587)
        ],
        "median_frequency_pixels": [
            *(0.2663, 0.1929, 4.5642, 0.1417, 1.0, 0.4614, 3.8248, 3.9814, 0.7648, 7.0182, 15.3816)
        ],
    }
    for key, weights in published.items():
        np.testing.assert_allclose(list(facts["weights"][key].values()), weights, atol=1e-4)
    # Published of the PNGs, before their JPEG compression.
    np.testing.assert_allclose(train["mean"], (105.03, 108.41, 110.33), atol=0.15)
    np.testing.assert_allclose(train["std"], (78.30, 79.46, 78.34), atol=0.15)


def test_the_command_line_prints_one_json_object_and_returns_1_for_errors(folder, capsys):
    assert main.run(["check", "--data", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["splits"]) == {"train", "val"} and facts["errors"] == []
    _cut(folder / "val/images/00.png", 100)
    assert main.run(["check", "--data", str(folder), "--json"]) == 1
    (error,) = json.loads(capsys.readouterr().out)["errors"]
    assert str(folder / "val/images/00.png") in error


def test_the_text_has_the_counts_the_weights_and_the_first_errors(folder, capsys):
    for k in range(3):
        Image.fromarray(_filled(7)).save(folder / f"train/masks/0{k}.png")
    assert main.run(["check", "--data", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "train: 3 images of 20x24" in out and "3 errors:" in out and "0 warnings" in out
    assert f"mask {folder / 'train/masks/01.png'} holds ids 7 (48 pixels)" in out
    assert "weight" not in out  # no mask of train could be read


def test_a_config_names_the_data_set_and_its_splits(folder, tmp_path, capsys):
    config = tmp_path / "mine.py"
    config.write_text(
        "from jaxseg.config import default\n"
        "def get_config():\n"
        "    config = default()\n"
        f"    config.data.dataset = {str(folder)!r}\n"
        "    config.model.name = 'unet'\n"
        "    return config\n"
    )
    assert main.run(["check", "--config", str(config), "--config.data.eval_split=train"]) == 0
    assert "val:" not in capsys.readouterr().out
    with pytest.raises(InputError, match="one of them"):
        main.run(["check"])
    with pytest.raises(InputError, match="not found"):
        main.run(["check", "--data", str(tmp_path / "nowhere")])


def test_shapes_are_checked_too(few_scenes):
    facts = inspect("shapes", ["train", "val"])
    assert facts["errors"] == [] and facts["splits"]["train"]["images"] == 16
    assert facts["splits"]["val"]["class_pixels"]["background"] > 0


def _save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


@pytest.mark.parametrize("bits", [8, 16])
def test_images_of_many_bands_are_no_errors(folder, bits):
    for path in folder.glob("*/images/*.png"):
        values = np.random.default_rng(0).integers(0, 2**bits, (*SIZE, 5)).astype(f"u{bits // 8}")
        write_tiff(path.with_suffix(".tif"), values)
        path.unlink()
    facts = inspect(str(folder), ["train", "val"], channels=5)
    assert facts["errors"] == [] and facts["splits"]["train"]["modes"] == {"5 bands": 3}
    assert len(facts["splits"]["train"]["mean"]) == 5


def test_the_values_and_modes_of_masks_are_counted(folder):
    _mask(folder, _filled(2, np.uint16))
    train = inspect(str(folder), ["train"])["splits"]["train"]
    assert sum(train["mask_modes"].values()) == 3 and train["mask_modes"]["P"] == 2
    raw = [np.asarray(Image.open(folder / f"train/masks/0{k}.png")).ravel() for k in range(3)]
    values, counts = np.unique(np.concatenate(raw), return_counts=True)
    assert train["mask_values"] == dict(
        zip(map(str, values.tolist()), counts.tolist(), strict=True)
    )


def test_values_are_those_of_the_files_not_the_ids(folder, capsys):
    for path in folder.glob("*/masks/*.png"):
        _save(path, _filled(255, rest=0))
    content = {"names": ["a", "b"], "values": [0, 255]}
    (folder / "classes.json").write_text(json.dumps(content))
    assert main.run(["check", "--data", str(folder)]) == 0
    assert "masks L 3; 2 values: 0, 255" in capsys.readouterr().out


def _city(root: Path, split: str) -> None:
    for kind in ("labelIds", "instanceIds", "labelTrainIds"):
        _save(root / f"gtFine/{split}/x/{split}_gtFine_{kind}.png", np.full(SIZE, 7, np.uint8))
    _save(root / f"gtFine/{split}/x/{split}_gtFine_color.png", np.zeros((*SIZE, 3), np.uint8))
    _save(root / f"leftImg8bit/{split}/x/{split}_leftImg8bit.png", np.asarray(_photo(len(split))))


def test_what_lies_beside_the_masks_of_cityscapes_is_no_surplus(tmp_path):
    for split in ("train", "val"):
        _city(tmp_path, split)
    facts = inspect(f"cityscapes:{tmp_path}", ["train", "val"])
    assert not [line for line in facts["warnings"] if "without an image" in line]
    _save(tmp_path / "gtFine/val/x/other_gtFine_labelIds.png", np.full(SIZE, 7, np.uint8))
    found = [line for line in inspect(f"cityscapes:{tmp_path}", ["val"])["warnings"]]
    assert len([line for line in found if "other_gtFine_labelIds.png: a mask without" in line]) == 1


def test_masks_of_other_splits_are_no_surplus(tmp_path):
    names = [f"{k}" for k in range(6)]
    for name in names:
        _save(tmp_path / f"images/{name}.jpg", np.asarray(_photo(int(name))))
        _save(tmp_path / f"annotations/trimaps/{name}.png", _filled(1, rest=2))
    (tmp_path / "annotations/trainval.txt").write_text("\n".join(names[:5]))
    (tmp_path / "annotations/test.txt").write_text(names[5])
    facts = inspect(f"pets:{tmp_path}", ["train"])
    assert not [line for line in facts["warnings"] if "without an image" in line]


def test_the_command_takes_the_channels_and_the_root_of_a_data_set(folder, capsys):
    command = ["check", "--data", "mine", "--root", str(folder.parent), "--channels", "1", "--json"]
    assert main.run(command) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["splits"]["train"]["mean"]) == 1
    assert any("mode RGB, read as L" in line for line in facts["warnings"])
