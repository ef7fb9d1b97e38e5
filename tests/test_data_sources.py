"""The readers: what a folder may hold, what they make of it, and how they refuse the rest."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxseg.data import catalog
from jaxseg.data.colours import Classes, save_label, voc_palette
from jaxseg.data.sources import Folder, Shapes, find_images, read_image, read_label
from jaxseg.errors import InputError

TABLE = Classes(("sky", "road", "car"), voc_palette(3))
ROTATED = 6  # EXIF orientation: the camera was held upright

# SegNet's CamVid: pixels per class in the order of the classes, then void.
CAMVID_VAL = (
    *(1601620, 4531180, 98499, 5053176, 1521751, 2851125, 155724, 537197, 304716, 113531),
    *(387010, 297271),
)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


def _small_png(path: Path, bits: int, palette: bool) -> None:
    """One row of the ids 0, 1, 2, 3 with `bits` a pixel, which Pillow cannot write in grey."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    row = sum(i << bits * (3 - i) for i in range(4)).to_bytes(bits * 4 // 8)
    header = struct.pack(">IIBBBBB", 4, 1, bits, 3 if palette else 0, 0, 0, 0)
    colours = chunk(b"PLTE", bytes(range(12))) if palette else b""
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    path.write_bytes(start + colours + pixels + chunk(b"IEND", b""))


def _damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    spoiled = {"truncated": content[: len(content) // 2], "empty": b"", "html": b"<!DOCTYPE html>"}
    path.write_bytes(spoiled[kind])


@pytest.fixture
def folder(tmp_path, write_folder):
    return write_folder(tmp_path / "mine", TABLE.names, size=(20, 24), train=3, val=2)


def test_a_folder_is_read_in_the_order_of_names(folder):
    source = Folder(folder, "train", TABLE, channels=3)
    assert len(source) == 3 and source.classes is TABLE and source.channels == 3
    assert [source[i]["name"] for i in range(3)] == ["00", "01", "02"]
    for i in range(3):
        example = source[i]
        assert example["image"].dtype == example["label"].dtype == np.uint8
        assert example["image"].shape == (20, 24, 3) and example["label"].shape == (20, 24)
        assert source.size(i) == (20, 24)
    stored = np.asarray(Image.open(folder / "train/images/01.png"))
    np.testing.assert_array_equal(source[1]["image"], stored)


def test_images_are_found_by_suffix_whatever_its_case(tmp_path):
    for name in ("b.JPG", "a.tiff", "notes.txt", "c.webp", "Thumbs.db"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [p.name for p in find_images(tmp_path)] == ["a.tiff", "b.JPG", "c.webp"]


def test_one_channel_is_the_grey_of_the_same_image(folder):
    colour = Folder(folder, "val", TABLE, channels=3)[0]
    grey = Folder(folder, "val", TABLE, channels=1)[0]
    assert grey["image"].shape == (20, 24, 1)
    expected = colour["image"] @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    np.testing.assert_allclose(grey["image"][..., 0], expected, atol=1)
    np.testing.assert_array_equal(grey["label"], colour["label"])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "LA", "1"])
def test_images_of_other_modes_are_converted(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode).save(path)
    for channels in (1, 3):
        image = read_image(path, channels)
        assert image.shape == (4, 5, channels) and image.dtype == np.uint8
        assert (image == 255).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_the_exif_rotation_is_applied(tmp_path, suffix):
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, :8] = 255
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(image).save(path, exif=_exif(ROTATED))
    upright = read_image(path, 3)
    assert upright.shape == (16, 8, 3)
    assert upright[:7].min() > 200 and upright[9:].max() < 50


def test_files_of_several_pictures_give_the_first_and_are_closed(tmp_path):
    first, second = Image.new("RGB", (5, 4), (9, 9, 9)), Image.new("RGB", (5, 4))
    first.save(tmp_path / "stack.tif", save_all=True, append_images=[second])
    assert (read_image(tmp_path / "stack.tif", 3) == 9).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_images_of_more_than_8_bits_are_refused_rather_than_clipped(tmp_path, dtype):
    path = tmp_path / "deep.tif"
    Image.fromarray(np.full((4, 5), 3000, dtype)).save(path)
    with pytest.raises(InputError, match=r"deep\.tif has mode .*needs 8"):
        read_image(path, 1)


def test_palette_masks_keep_their_ids_whatever_their_colours(tmp_path):
    label = np.array([[0, 1, 2], [2, 255, 0]], np.uint8)
    for number, palette in enumerate((voc_palette(3), ((9, 9, 9), (9, 9, 9), (0, 0, 0)))):
        path = tmp_path / f"{number}.png"
        save_label(path, label, Classes(TABLE.names, palette))
        with Image.open(path) as picture:
            assert picture.mode == "P"
        np.testing.assert_array_equal(read_label(path, 3), label)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_masks_are_ids_and_255_is_kept(tmp_path, dtype):
    label = np.array([[0, 1, 2], [2, 255, 0]], dtype)
    Image.fromarray(label).save(tmp_path / "mask.png")
    read = read_label(tmp_path / "mask.png", 3)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, label)


def test_one_bit_masks_are_ids_0_and_1(tmp_path):
    label = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    Image.fromarray(label.astype(bool)).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_label(tmp_path / "mask.png", 2), label)


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_masks_of_2_or_4_bits_are_refused_rather_than_scaled(tmp_path, bits):
    _small_png(tmp_path / "grey.png", bits, palette=False)
    with Image.open(tmp_path / "grey.png") as picture:
        assert np.asarray(picture).tolist() == [[i * 255 // (2**bits - 1) for i in range(4)]]
    message = rf"grey\.png is grey with {bits} bits a pixel: needs 8.* Save .* 8-bit PNG"
    with pytest.raises(InputError, match=message):
        read_label(tmp_path / "grey.png", 255)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_palette_masks_of_few_bits_keep_their_ids(tmp_path, bits):
    _small_png(tmp_path / "palette.png", bits, palette=True)
    assert read_label(tmp_path / "palette.png", 4).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("high", [3, 254, 300])
def test_ids_out_of_range_are_named_with_the_file_and_their_pixels(tmp_path, high):
    label = np.zeros((4, 5), np.uint16 if high > 255 else np.uint8)
    label[1, :3] = high
    Image.fromarray(label).save(tmp_path / "bad.png")
    with pytest.raises(InputError, match=rf"bad\.png holds ids {high} \(3 pixels\): needs 0\.\.2"):
        read_label(tmp_path / "bad.png", 3)


def test_the_highest_id_is_the_last_class(tmp_path):
    Image.fromarray(np.full((4, 5), 2, np.uint8)).save(tmp_path / "mask.png")
    assert (read_label(tmp_path / "mask.png", 3) == 2).all()
    with pytest.raises(InputError):
        read_label(tmp_path / "mask.png", 2)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colour_masks_are_refused(tmp_path, mode):
    Image.new(mode, (5, 4)).save(tmp_path / "colour.png")
    with pytest.raises(InputError, match=rf"colour\.png has mode {mode}: needs class ids"):
        read_label(tmp_path / "colour.png", 3)


@pytest.mark.parametrize("kind", ["truncated", "empty", "html"])
@pytest.mark.parametrize("part", ["images", "masks"])
def test_unreadable_files_are_named(folder, part, kind):
    path = folder / "train" / part / "01.png"
    _damage(path, kind)
    source = Folder(folder, "train", TABLE, channels=3)
    source[0]
    with pytest.raises(InputError, match=r"cannot read image .*01\.png \(\d+ bytes\)"):
        source[1]


def test_the_size_of_an_unreadable_mask_is_an_input_error_too(folder):
    _damage(folder / "train/masks/01.png", "html")
    with pytest.raises(InputError, match=r"cannot read image .*01\.png"):
        Folder(folder, "train", TABLE, channels=3).size(1)


def test_a_vanished_image_is_named(folder):
    source = Folder(folder, "train", TABLE, channels=3)
    (folder / "train/images/02.png").unlink()
    with pytest.raises(InputError, match=r"no image .*02\.png"):
        source[2]


def test_a_missing_split_lists_the_splits_that_are_there(folder):
    with pytest.raises(InputError, match=r"no split 'test'.*found \['train', 'val'\]") as error:
        Folder(folder, "test", TABLE, channels=3)
    assert "NAME/train/images" in str(error.value)


def test_a_missing_mask_is_named_with_the_file_that_is_needed(folder):
    (folder / "train/masks/01.png").unlink()
    pattern = r"1 of 3 images have no mask.*images/01\.png: needs .*masks/01\.png"
    with pytest.raises(InputError, match=pattern):
        Folder(folder, "train", TABLE, channels=3)


def test_an_image_and_a_mask_of_different_sizes_are_both_named(folder):
    Image.new("L", (20, 24)).save(folder / "train/masks/01.png")
    pattern = r"images/01\.png is \(20, 24\) and its mask .*masks/01\.png \(24, 20\)"
    with pytest.raises(InputError, match=pattern):
        Folder(folder, "train", TABLE, channels=3)[1]


def test_a_folder_without_images_says_which_files_it_needs(folder):
    for path in (folder / "val/images").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(InputError, match=r"no images in .*val/images: needs files ending in .*png"):
        Folder(folder, "val", TABLE, channels=3)


def test_a_data_set_without_classes_json_shows_the_tree(folder):
    (folder / "classes.json").unlink()
    with pytest.raises(InputError, match=r"no .*classes\.json(?s:.*)NAME/train/images"):
        catalog.open_split(str(folder), "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "must hold"),
        ("[1, 2]", "must hold"),
        ('{"labels": ["a", "b"]}', "names"),
        ('{"names": "ab"}', "must hold"),
        ('{"names": ["a", "b"], "palette": 3}', "must hold"),
        ('{"names": ["a", "b"], "palette": [["r", 0, 0], [0, 0, 0]]}', "must hold"),
        ('{"names": ["alone"]}', "1 names"),
        ('{"names": ["a", "b"], "palette": [[0, 0, 0]]}', "2 names and 1 colours"),
        ('{"names": ["a", "b"], "palette": [[0, 0, 0], [0, 0]]}', "three numbers"),
        ('{"names": ["a", "b"], "palette": [[0, 0, 0], [0, 0, 256]]}', "three numbers"),
        ('{"names": ["a", "b", "a"]}', "names a more than once"),
        (json.dumps({"names": [str(i) for i in range(256)]}), "256 names"),
    ],
)
def test_a_bad_classes_json_is_named(tmp_path, text, message):
    path = tmp_path / "classes.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        catalog.read_classes(path)
    assert str(path) in str(error.value)


def test_classes_json_survives_writing_and_reading(tmp_path):
    table = Classes(("sky", "Straße"), ((1, 2, 3), (255, 0, 9)))
    catalog.write_classes(tmp_path / "classes.json", table)
    assert catalog.read_classes(tmp_path / "classes.json") == table


def test_classes_without_a_palette_get_the_colours_of_voc(tmp_path):
    (tmp_path / "classes.json").write_text('{"names": ["a", "b", "c"]}')
    assert catalog.read_classes(tmp_path / "classes.json") == Classes(
        ("a", "b", "c"), ((0, 0, 0), (128, 0, 0), (0, 128, 0))
    )


@pytest.mark.parametrize("path", sorted(catalog.LABELS.glob("*.csv")), ids=lambda path: path.stem)
def test_label_tables_have_consecutive_ids_and_unique_names_and_colours(path):
    rows = [line.split(",") for line in path.read_text().split()]
    assert rows.pop(0) == ["id", "name", "red", "green", "blue"]
    assert [int(row[0]) for row in rows] == list(range(len(rows)))
    assert len({row[1] for row in rows}) == len({tuple(row[2:]) for row in rows}) == len(rows)
    table = catalog.classes(path.stem)
    assert len(table) == len(rows) and table.names[0] == rows[0][1]
    assert all(len(c) == 3 and 0 <= min(c) <= max(c) <= 255 for c in table.palette)


def test_known_tables_have_the_classes_of_their_data_sets():
    assert set(catalog.known()) >= {"shapes", "camvid", "isbi2012", "voc2012"}
    assert len(catalog.classes("camvid")) == 11
    assert catalog.classes("camvid").names[7] == "fence"
    assert len(catalog.classes("isbi2012")) == 2
    assert catalog.classes("shapes") == Shapes.classes
    voc = catalog.classes("voc2012")
    assert len(voc) == 21 and voc.names[15] == "person"
    assert voc.palette == voc_palette(21)


def test_a_data_set_is_found_by_path_root_and_environment(folder, monkeypatch):
    monkeypatch.delenv("JAXSEG_DATA", raising=False)
    assert catalog.locate(str(folder)) == folder
    assert catalog.locate("mine", root=str(folder.parent)) == folder
    with pytest.raises(InputError, match="Set JAXSEG_DATA"):
        catalog.locate("mine")
    monkeypatch.setenv("JAXSEG_DATA", str(folder.parent))
    assert catalog.locate("mine") == folder
    assert len(catalog.open_split("mine", "train")) == 3


def test_the_root_goes_before_the_environment(folder, tmp_path, monkeypatch):
    (tmp_path / "other" / "mine").mkdir(parents=True)
    monkeypatch.setenv("JAXSEG_DATA", str(tmp_path / "other"))
    assert catalog.locate("mine", root=str(folder.parent)) == folder


def test_a_data_set_that_is_nowhere_prints_the_places_and_the_tree(tmp_path):
    with pytest.raises(InputError) as error:
        catalog.open_split("cityscapes", "train", root=str(tmp_path))
    message = str(error.value)
    assert '"cityscapes" not found' in message and str(tmp_path / "cityscapes") in message
    assert "NAME/classes.json" in message and "NAME/val/masks" in message


def test_a_table_beside_the_data_set_is_not_taken_for_its_classes(folder):
    folder.with_suffix(".csv").write_text("something,else\n1,2\n")
    assert catalog.classes(str(folder)).names == TABLE.names


def test_a_folder_that_borrows_a_known_name_must_have_its_classes(tmp_path, write_folder):
    write_folder(tmp_path / "camvid", ("sky", "road"), size=(8, 8), train=1, val=1)
    with pytest.raises(InputError, match=r"names 2 classes .*camvid has 11(?s:.*)another folder"):
        catalog.open_split("camvid", "train", root=str(tmp_path))


def test_the_splits_of_shapes_are_different_scenes():
    seeds = [Shapes(split, 3).seed for split in ("train", "val", "test")]
    assert len(set(seeds)) == 3
    assert [len(Shapes(s, 3)) for s in ("train", "val", "test")] == [2048, 256, 256]
    train, val = Shapes("train", 3)[0], Shapes("val", 3)[0]
    assert (train["image"] != val["image"]).any() and train["name"] == val["name"] == "00000"
    with pytest.raises(InputError, match="no split 'dev' in shapes: it has train, val, test"):
        Shapes("dev", 3)


def test_shapes_have_examples_like_a_folder():
    source = Shapes("val", 3)
    example = source[5]
    assert set(example) == {"image", "label", "name"}
    assert example["image"].dtype == example["label"].dtype == np.uint8
    assert example["image"].shape[:2] == example["label"].shape == source.size(5)
    assert example["label"].max() < len(source.classes)


def test_shapes_in_grey_are_the_same_scenes():
    colour, grey = Shapes("val", 3)[2], Shapes("val", 1)[2]
    assert grey["image"].shape == (*colour["label"].shape, 1)
    expected = colour["image"] @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(grey["image"][..., 0], expected, atol=1)
    np.testing.assert_array_equal(grey["label"], colour["label"])


def test_camvid_has_its_published_splits_and_classes(data_root):
    if not (data_root / "camvid").is_dir():
        pytest.skip("needs camvid")
    counts = [len(catalog.open_split("camvid", s, str(data_root))) for s in ("train", "val")]
    assert counts == [367, 101]
    assert catalog.read_classes(data_root / "camvid/classes.json") == catalog.classes("camvid")


def test_camvid_val_has_its_published_pixels_of_each_class(data_root):
    if not (data_root / "camvid").is_dir():
        pytest.skip("needs camvid")
    source = catalog.open_split("camvid", "val", str(data_root))
    pixels = sum(np.bincount(read_label(m, 11).ravel(), minlength=256) for m in source.masks)
    assert (*pixels[:11], pixels[255]) == CAMVID_VAL
    assert source[0]["image"].shape == (360, 480, 3)


def test_isbi2012_has_24_and_6_slices(data_root):
    if not (data_root / "isbi2012").is_dir():
        pytest.skip("needs isbi2012")
    for split, count in (("train", 24), ("val", 6)):
        source = catalog.open_split("isbi2012", split, str(data_root), channels=1)
        assert len(source) == count
        assert {source.size(i) for i in range(count)} == {(512, 512)}
    example = source[0]
    assert example["image"].shape == (512, 512, 1) and example["image"].std() > 10
    assert set(np.unique(example["label"])) == {0, 1}
