"""Cityscapes and KITTI: ids, train ids, objects, panoptic labels, in trees written here."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxseg.data import catalog
from jaxseg.errors import InputError

FRAME = "ulm_000001_000019"
# road, a group of cars, two cars, a person, sky, unlabelled, licence plate as 8 bits have it
INSTANCES = np.array([[7, 26, 26000, 26001], [24000, 23, 0, 4]], np.uint16)
IDS = np.where(INSTANCES < 1000, INSTANCES, INSTANCES // 1000).astype(np.uint8)
TRAINED = np.array([[0, 13, 13, 13], [11, 10, 255, 255]], np.uint8)


def _save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


@pytest.fixture
def city(tmp_path) -> Path:
    root = tmp_path / "cityscapes"
    _save(root / f"leftImg8bit/val/ulm/{FRAME}_leftImg8bit.png", np.zeros((2, 4, 3), np.uint8))
    truth = root / f"gtFine/val/ulm/{FRAME}_gtFine"
    _save(truth.with_name(f"{FRAME}_gtFine_instanceIds.png"), INSTANCES)
    _save(truth.with_name(f"{FRAME}_gtFine_labelIds.png"), IDS)
    _save(truth.with_name(f"{FRAME}_gtFine_labelTrainIds.png"), TRAINED)
    return root


def test_cityscapes_has_train_ids_whatever_its_files_hold(city):
    folder = city / "gtFine/val/ulm"
    for kind in ("labelIds", "labelTrainIds", "instanceIds"):
        source = catalog.open_split("cityscapes", "val", str(city.parent))
        assert source.mask(0).name == f"{FRAME}_gtFine_{kind}.png"
        np.testing.assert_array_equal(source[0]["label"], TRAINED)
        assert source.size(0) == (2, 4) and source[0]["name"] == f"{FRAME}_leftImg8bit"
        (folder / f"{FRAME}_gtFine_{kind}.png").unlink()


def test_the_objects_of_cityscapes_are_its_things_and_groups_are_crowds(city):
    source = catalog.open_split("cityscapes", "val", str(city.parent), instances=True)
    objects = source[0]["instances"]
    assert objects["classes"].tolist() == [13, 11, 13, 13]
    assert objects["crowd"].tolist() == [True, False, False, False]
    assert objects["masks"].reshape(4, 8).argmax(axis=1).tolist() == [1, 4, 2, 3]


def test_a_submission_holds_ids_again(city):
    label = catalog.open_split("cityscapes", "val", str(city.parent))[0]["label"]
    ids = catalog.to_submission_ids(label, "cityscapes")
    scored = TRAINED != 255
    np.testing.assert_array_equal(ids[scored], IDS[scored])


def test_an_id_that_cityscapes_lacks_is_named(city):
    (city / f"gtFine/val/ulm/{FRAME}_gtFine_labelTrainIds.png").unlink()
    path = city / f"gtFine/val/ulm/{FRAME}_gtFine_labelIds.png"
    _save(path, np.full((2, 4), 34, np.uint8))
    with pytest.raises(InputError, match=r"labelIds\.png holds ids 34 \(8 pixels\): needs -1"):
        catalog.open_split("cityscapes", "val", str(city.parent))[0]


def test_a_missing_split_shows_the_tree(city):
    with pytest.raises(InputError, match=r"no images in .*leftImg8bit/train(?s:.*)gtFine/"):
        catalog.open_split("cityscapes", "train", str(city.parent))
    with pytest.raises(InputError, match=r"no .*cityscapes_panoptic_val\.json(?s:.*)csCreate"):
        catalog.open_split(f"cityscapes_panoptic:{city}", "val")


def test_panoptic_labels_are_the_same_as_the_others(city):
    numbers = {7: 7, 26: 26, 26000: 26000, 26001: 26001, 24000: 24000, 23: 23}
    colours = np.zeros((2, 4, 3), np.uint8)
    for number in numbers:
        colours[INSTANCES == number] = (number % 256, number // 256, 0)
    folder = city / "gtFine/cityscapes_panoptic_val"
    _save(folder / f"{FRAME}_gtFine_panoptic.png", colours)
    segments = [
        {"id": n, "category_id": n // 1000 if n >= 1000 else n, "iscrowd": int(n == 26)}
        for n in numbers
    ]
    entry = {
        "image_id": FRAME,
        "file_name": f"{FRAME}_gtFine_panoptic.png",
        "segments_info": segments,
    }
    folder.with_suffix(".json").write_text(json.dumps({"annotations": [entry]}))
    panoptic = catalog.open_split(f"cityscapes_panoptic:{city}", "val", instances=True)[0]
    other = catalog.open_split(f"cityscapes:{city}", "val", instances=True)[0]
    np.testing.assert_array_equal(panoptic["label"], TRAINED)
    order = np.argsort(panoptic["instances"]["masks"].reshape(4, -1).argmax(axis=1))
    again = np.argsort(other["instances"]["masks"].reshape(4, -1).argmax(axis=1))
    for key in ("masks", "classes", "crowd"):
        mine, theirs = panoptic["instances"][key][order], other["instances"][key][again]
        np.testing.assert_array_equal(mine, theirs)


def test_kitti_shares_the_labels_of_cityscapes(tmp_path):
    root = tmp_path / "kitti/training"
    numbers = np.array([[7 * 256, 26 * 256], [26 * 256 + 1, 24 * 256 + 3]], np.uint16)
    for k in range(6):
        _save(root / f"image_2/{k:06}_10.png", np.zeros((2, 2, 3), np.uint8))
        _save(root / f"instance/{k:06}_10.png", numbers)
        _save(root / f"semantic/{k:06}_10.png", (numbers // 256).astype(np.uint8))
    train, val = (
        catalog.open_split("kitti", s, str(tmp_path), instances=True) for s in ("train", "val")
    )
    assert (len(train), len(val)) == (5, 1) and val[0]["name"] == "000004_10"
    assert train[0]["label"].tolist() == [[0, 13], [13, 11]]
    assert train[0]["instances"]["classes"].tolist() == [11, 13, 13]
    assert train[0]["instances"]["crowd"].tolist() == [False, True, False]
    for path in (root / "semantic").iterdir():
        path.unlink()
    (root / "semantic").rmdir()
    again = catalog.open_split("kitti", "train", str(tmp_path))[0]["label"]
    assert again.tolist() == [[0, 13], [13, 11]]


def test_the_tiny_samples(data_root):
    tiny = data_root / "formats/datumaro_tiny"
    if not tiny.is_dir():
        pytest.skip("needs formats/datumaro_tiny")
    city = catalog.open_split(f"cityscapes:{tiny}/cityscapes_dataset/dataset", "train")
    assert city[0]["label"].tolist() == [[255, 255, 255, 11, 11]] or 11 in city[0]["label"]
    kitti = catalog.open_split(f"kitti:{tiny}/kitti_dataset/kitti_segmentation", "all")
    assert 14 in kitti[0]["label"] and len(kitti) == 2
