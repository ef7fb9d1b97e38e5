"""Data sets of one's own: folders, folders of colours, lists."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxseg.data import catalog
from jaxseg.errors import InputError

NAMES = ("sky", "road", "car")


def _save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


@pytest.fixture
def folder(tmp_path, write_folder) -> Path:
    return write_folder(tmp_path / "mine", NAMES, size=(20, 24), train=3, val=2)


def test_a_folder_is_read_in_the_order_of_names(folder):
    source = catalog.open_split(str(folder), "train")
    assert len(source) == 3 and source.classes.names == NAMES and source.channels == 3
    assert [source[i]["name"] for i in range(3)] == ["00", "01", "02"]
    for i in range(3):
        example = source[i]
        assert set(example) == {"image", "label", "name"}
        assert example["image"].dtype == example["label"].dtype == np.uint8
        assert example["image"].shape == (20, 24, 3) and example["label"].shape == (20, 24)
        assert source.size(i) == (20, 24)
    stored = np.asarray(Image.open(folder / "train/images/01.png"))
    np.testing.assert_array_equal(source[1]["image"], stored)


def test_one_channel_is_the_grey_of_the_same_image(folder):
    colour = catalog.open_split(str(folder), "val", channels=3)[0]
    grey = catalog.open_split(str(folder), "val", channels=1)[0]
    assert grey["image"].shape == (20, 24, 1)
    expected = colour["image"] @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    np.testing.assert_allclose(grey["image"][..., 0], expected, atol=1)
    np.testing.assert_array_equal(grey["label"], colour["label"])


def test_a_missing_split_lists_the_splits_that_are_there(folder):
    with pytest.raises(InputError, match=r"no split 'test'.*found \['train', 'val'\]") as error:
        catalog.open_split(str(folder), "test")
    assert "NAME/train/images" in str(error.value)


def test_a_missing_mask_is_named_with_the_file_that_is_needed(folder):
    (folder / "train/masks/01.png").unlink()
    pattern = r"1 of 3 images have no mask.*images/01\.png: needs .*masks/01\.png"
    with pytest.raises(InputError, match=pattern):
        catalog.open_split(str(folder), "train")
    source = catalog.open_split(str(folder), "train", complete=False)
    assert len(source) == 3 and source[0]["name"] == "00"
    with pytest.raises(InputError, match=r"01\.png has no mask: needs .*masks/01\.png"):
        source[1]


def test_an_image_and_a_mask_of_different_sizes_are_both_named(folder):
    Image.new("L", (20, 24)).save(folder / "train/masks/01.png")
    pattern = r"images/01\.png is \(20, 24\) and its mask .*masks/01\.png \(24, 20\)"
    with pytest.raises(InputError, match=pattern):
        catalog.open_split(str(folder), "train")[1]


def test_a_folder_without_images_says_which_files_it_needs(folder):
    for path in (folder / "val/images").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(InputError, match=r"no images in .*val/images: needs files .*png"):
        catalog.open_split(str(folder), "val")


def test_two_images_of_one_name_are_both_named(folder):
    Image.new("RGB", (24, 20)).save(folder / "train/images/01.jpg")
    with pytest.raises(InputError, match=r"01\.jpg and .*01\.png have one name"):
        catalog.open_split(str(folder), "train")


def test_a_data_set_without_classes_json_shows_the_tree(folder):
    (folder / "classes.json").unlink()
    with pytest.raises(InputError, match=r"no .*classes\.json(?s:.*)NAME/train/images"):
        catalog.open_split(str(folder), "train")


def test_a_folder_may_number_its_objects(folder):
    with pytest.raises(InputError, match="does not tell objects apart"):
        catalog.open_split(str(folder), "train", instances=True)
    label, numbers = np.zeros((2, 20, 24), np.uint16)
    label[2:6, 2:6] = 1
    label[2:6, 10:12] = 2
    numbers[2:6, 2:6], numbers[2:6, 10:12], numbers[19] = 300, 7, 9
    label[19] = 255
    _save(folder / "train/masks/00.png", label.astype(np.uint8))
    for k in range(3):
        _save(folder / f"train/instances/{k:02}.png", numbers)
    objects = catalog.open_split(str(folder), "train", instances=True)[0]["instances"]
    assert objects["classes"].tolist() == [2, 1]  # by number; what is all ignored is no object
    assert objects["masks"].sum(axis=(1, 2)).tolist() == [8, 16]


def test_masks_may_be_numbers_of_objects_of_one_class(tmp_path):
    numbers = np.array([[0, 1, 1], [300, 300, 0]], np.uint16)
    for split in ("train", "val"):
        _save(tmp_path / f"cells/{split}/images/a.png", np.zeros((2, 3, 3), np.uint8))
        _save(tmp_path / f"cells/{split}/masks/a.png", numbers)
    text = json.dumps({"names": ["background", "cell"], "instance_maps": True})
    (tmp_path / "cells/classes.json").write_text(text)
    source = catalog.open_split("cells", "val", str(tmp_path), instances=True)
    assert source[0]["label"].tolist() == [[0, 1, 1], [1, 1, 0]] and source.classes.things == (1,)
    assert source[0]["instances"]["masks"].sum(axis=(1, 2)).tolist() == [2, 2]
    assert source[0]["instances"]["classes"].tolist() == [1, 1]


def test_portraits_in_black_and_white_say_so(tmp_path):
    _save(tmp_path / "train/images/a.png", np.zeros((1, 2, 3), np.uint8))
    _save(tmp_path / "train/masks/a.png", np.array([[0, 255]], np.uint8))
    (tmp_path / "classes.json").write_text('{"names": ["back", "person"], "values": [0, 255]}')
    assert catalog.open_split(str(tmp_path), "train")[0]["label"].tolist() == [[0, 1]]


def test_masks_of_colours(tmp_path):
    colours = np.array([[(70, 130, 180), (0, 0, 0), (128, 64, 128)]], np.uint8)
    _save(tmp_path / "train/images/a.png", np.zeros((1, 3, 3), np.uint8))
    _save(tmp_path / "train/masks/a.png", colours)
    table = {
        "names": ["sky", "road"],
        "palette": [[70, 130, 180], [128, 64, 128]],
        "ignore": [[0, 0, 0]],
    }
    (tmp_path / "classes.json").write_text(json.dumps(table))
    assert catalog.open_split(f"colours:{tmp_path}", "train")[0]["label"].tolist() == [[0, 255, 1]]
    assert catalog.splits(f"colours:{tmp_path}") == ["train"]
    assert catalog.splits(f"colours:{tmp_path / 'classes.json'}") == []
    with pytest.raises(InputError, match="name the data set colours:FOLDER"):
        catalog.open_split(str(tmp_path), "train")[0]
    (tmp_path / "classes.json").write_text(json.dumps({**table, "ignore": []}))
    with pytest.raises(InputError, match=r"holds colours \(0, 0, 0\) \(1 pixels\): needs \(70, "):
        catalog.open_split(f"colours:{tmp_path}", "train")[0]


def test_a_list_of_pairs(folder):
    lines = ["image,mask,split"]
    lines += [f"mine/train/images/0{k}.png,mine/train/masks/0{k}.png,train" for k in range(3)]
    lines += ["mine/val/images/00.png,mine/val/masks/00.png,val"]
    file = folder.parent / "pairs.csv"
    file.write_text("\n".join(lines), encoding="utf-8-sig")
    (folder.parent / "classes.json").write_text((folder / "classes.json").read_text())
    train, val = (catalog.open_split(f"list:{file}", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (3, 1) and train.classes.names == NAMES
    same = catalog.open_split(str(folder), "train")[1]["image"]
    np.testing.assert_array_equal(train[1]["image"], same)
    with pytest.raises(InputError, match=r"no split 'test'.*found \['train', 'val'\]"):
        catalog.open_split(f"list:{file}", "test")
    file.write_text("\n".join([*lines[:-1], lines[-1].replace(",val", ",test")]))
    assert catalog.splits(f"list:{file}") == ["train", "test"]
    file.write_text("\n".join(line.rpartition(",")[0] for line in lines))
    with pytest.raises(InputError, match="no images"):
        catalog.open_split(f"list:{file}", "val")
    assert len(catalog.open_split(f"list:{file}", "all")) == 4
    assert catalog.splits(f"list:{file}") == ["train", "val"]
    file.write_text("picture,label\n")
    with pytest.raises(InputError, match=r"no lines with image and mask(?s:.*)photos/a\.jpg"):
        catalog.open_split(f"list:{file}", "train")
    with pytest.raises(InputError, match="is no file"):
        catalog.open_split(f"list:{folder}", "train")
    with pytest.raises(InputError, match=r"is a file: a list of images is named list:.*pairs\.csv"):
        catalog.splits(str(file))
    file.write_bytes("image,mask\nbäume.jpg,bäume.png\n".encode("cp1252"))
    with pytest.raises(InputError, match=r"cannot read .*pairs\.csv.*in UTF-8"):
        catalog.open_split(f"list:{file}", "train")


def test_a_split_without_masks_is_there_but_cannot_be_scored(folder):
    shutil.copytree(folder / "val" / "images", folder / "test" / "images")
    pattern = r"split 'test' of .*mine has images but no masks: .* predict --input .*test/images"
    with pytest.raises(InputError, match=pattern):
        catalog.open_split(str(folder), "test")


def test_a_mask_is_not_turned_and_its_size_is_that_of_its_pixels(folder):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("L", (24, 20), 1).save(folder / "val/masks/00.png", exif=exif)
    source = catalog.open_split(str(folder), "val")
    assert source.size(0) == source[0]["label"].shape == (20, 24)


@pytest.mark.parametrize("line", ["photos/b.jpg", "photos/b.jpg,masks/b.png,train,more"])
def test_a_line_of_another_length_is_named(tmp_path, line):
    text = f"image,mask,split\nphotos/a.jpg,masks/a.png,train\n{line}\n"
    (tmp_path / "pairs.csv").write_text(text)
    (tmp_path / "classes.json").write_text(json.dumps({"names": NAMES}))
    with pytest.raises(InputError, match=r"line 3 of .*pairs\.csv has another number of values"):
        catalog.open_split(f"list:{tmp_path / 'pairs.csv'}", "train")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_soft_masks_are_shares_and_labels(tmp_path, dtype):
    values = np.linspace(0, np.iinfo(dtype).max, 48).round().astype(dtype).reshape(6, 8)
    _save(tmp_path / "train/alphas/a.png", values)
    _save(tmp_path / "train/images/a.png", np.zeros((6, 8, 3), np.uint8))
    (tmp_path / "classes.json").write_text(json.dumps({"names": ["background", "person"]}))
    source = catalog.open_split(str(tmp_path), "train")
    example = source[0]
    assert example["alpha"].dtype == np.float32 and example["alpha"].shape == (6, 8)
    np.testing.assert_allclose(example["alpha"], values / np.iinfo(dtype).max, atol=1e-6)
    np.testing.assert_array_equal(example["label"], example["alpha"] >= 0.5)
    assert example["label"].dtype == np.uint8 and source.size(0) == (6, 8)
    Image.new("RGBA", (8, 6), (230, 230, 230, 0)).save(tmp_path / "train/alphas/a.png")
    with pytest.raises(InputError, match="a picture of mode RGBA: a soft mask is grey"):
        source[0]
    (tmp_path / "classes.json").write_text(json.dumps({"names": NAMES}))
    with pytest.raises(InputError, match="holds soft masks, and there are 3 classes: needs two"):
        catalog.open_split(str(tmp_path), "train")


def test_numbers_of_another_size_than_the_mask_are_named(folder):
    _save(folder / "train/instances/00.png", np.zeros((20, 23), np.uint8))
    source = catalog.open_split(str(folder), "train", instances=True)
    with pytest.raises(InputError, match=r"instances/00\.png is \(20, 23\) and the mask"):
        source[0]
