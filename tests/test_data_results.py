"""What is found in the forms that others read, with the ids of their files."""

import json

import numpy as np
import oracle
import pytest
from PIL import Image

from jaxseg import models
from jaxseg.config import default
from jaxseg.data import catalog, results, rle
from jaxseg.data.colours import Classes, voc_palette
from jaxseg.errors import InputError
from jaxseg.found import Found
from jaxseg.inference import make_infer, settings
from jaxseg.ops import panoptic_quality
from jaxseg.saver import Given, Saver


def _found() -> dict:
    masks = np.zeros((2, 4, 6), bool)
    masks[0, 1:3, 2:5], masks[1, 0, 0] = True, True
    return {"masks": masks, "classes": np.int32([11, 13]), "scores": np.float32([0.75, 0.5])}


def test_classes_have_the_ids_of_the_data_set_s_own_files(tmp_path):
    for name in ("coco", "cityscapes"):
        (tmp_path / name).mkdir()
    coco, city = (catalog.file_ids(name, str(tmp_path)) for name in ("coco", "cityscapes"))
    assert (coco[1], coco[80], len(coco)) == (1, 90, 81)
    assert (city[0], city[18], len(city)) == (7, 33, 19)
    assert catalog.file_ids("shapes") == {i: i for i in range(8)}


def test_panoptic_maps_are_written_as_their_quality_counts_them():
    """The two rooms do not import each other."""
    assert (results.STEP, results.VOID) == (panoptic_quality.STEP, panoptic_quality.VOID)


def test_results_are_coco_s():
    entries = results.coco_results("000000000139", _found(), {11: 24, 13: 26})
    assert [e["image_id"] for e in entries] == [139, 139]
    assert [e["category_id"] for e in entries] == [24, 26]
    assert [e["bbox"] for e in entries] == [[2, 1, 3, 2], [0, 0, 1, 1]]
    assert [e["score"] for e in entries] == [0.75, 0.5]
    masks = [rle.decode(e["segmentation"], (4, 6)) for e in entries]
    np.testing.assert_array_equal(masks, _found()["masks"])
    boxes = np.float32([[0.5, 1.25, 3, 4], [0, 0, 1, 1]])
    entries = results.coco_results("cat", {**_found(), "boxes": boxes}, {11: 24, 13: 26})
    assert entries[0]["image_id"] == "cat" and entries[0]["bbox"] == [1.25, 0.5, 2.75, 2.5]


def test_two_names_never_share_a_number():
    ids = {"1": 1, "000000000001": 1, "01": "01", "139": 139, "0": 0, "00": "00", "a": "a"}
    ids |= {"0000000000001": "0000000000001", "123456789012": 123456789012, "1_0": "1_0"}
    assert {name: results.image_id(name) for name in ids} == ids
    taken: dict = {}
    for name in ("01", "1", "001", "1"):
        results.take_id(taken, name)
    assert taken == {"01": "01", 1: "1", "001": "001"}
    with pytest.raises(InputError, match="images 1 and 000000000001 both are number 1"):
        results.take_id(taken, "000000000001")


def test_names_that_differ_by_zeros_are_saved_apart(monkeypatch, tmp_path):
    oracle.installed(monkeypatch)
    config, classes = oracle.config(), oracle.CLASSES
    found = _found() | {"classes": np.int32([1, 2])}
    save, size = Saver(tmp_path, 1, classes, {}, config), (4, 6)
    save("01", Found(size, instances=found))
    save("1", Found(size, instances={key: value[:1] for key, value in found.items()}))
    with pytest.raises(InputError, match="images 1 and 000000000001 both are number 1 in COCO's"):
        save("000000000001", Found(size, instances=found))
    save.finish()
    given = Given(tmp_path, {i: i for i in range(4)}, classes)
    assert [len(given(name, size).instances["scores"]) for name in ("01", "1")] == [2, 1]
    with pytest.raises(InputError, match="images 1 and 000000000001 both are number 1 in COCO's"):
        given("000000000001", size)


def test_annotations_are_read_as_a_data_set(tmp_path):
    classes = Classes(("ground", "cat"), voc_palette(2), (1,))
    found = _found() | {"classes": np.int32([1, 1])}
    entries = results.coco_results("a", found, {1: 1})
    for entry in entries:
        entry["image_id"] = 1
    image = {"id": 1, "file_name": "a.png", "height": 4, "width": 6}
    results.save_json(
        tmp_path / "annotations.json", results.coco_annotations([image], entries, classes)
    )
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "a.png")
    content = json.loads((tmp_path / "annotations.json").read_text())
    assert [a["area"] for a in content["annotations"]] == [6, 1]
    source = catalog.open_split(f"coco_json:{tmp_path}", "train", instances=True)
    read = source[0]["instances"]
    np.testing.assert_array_equal(read["masks"], found["masks"])
    assert source.classes.names[read["classes"][0]] == "cat"


def test_cityscapes_gets_a_list_and_a_mask_of_each_object(monkeypatch, tmp_path):
    oracle.installed(monkeypatch)
    config, table = oracle.config(), catalog.tables.read_csv("cityscapes").classes
    (tmp_path / "cityscapes").mkdir()
    config.data.update(dataset="cityscapes", root=str(tmp_path))
    save = Saver(tmp_path / "out", 1, table, {}, config)
    save("bonn_1", Found((4, 6), instances=_found()))
    save.finish()
    lines = (tmp_path / "out/cityscapes/bonn_1.txt").read_text().splitlines()
    assert [line.split()[1:] for line in lines] == [["24", "0.750000"], ["26", "0.500000"]]
    with Image.open(tmp_path / "out/cityscapes" / lines[0].split()[0]) as picture:
        np.testing.assert_array_equal(np.asarray(picture) == 255, _found()["masks"][0])
    assert json.loads((tmp_path / "out/results.json").read_text())[0]["category_id"] == 24
    with pytest.raises(InputError, match="two images are named bonn_1"):
        save("bonn_1", Found((4, 6), instances=_found()))


def test_too_many_objects_are_refused(tmp_path):
    with pytest.raises(InputError, match="a PNG can number 65535"):
        results.save_numbers(tmp_path / "a.png", np.int32([[2**16]]))
    many = {"masks": np.ones((1000, 1, 1), np.uint8), "classes": np.ones(1000, np.int32)}
    many["crowd"] = np.zeros(1000, bool)
    with pytest.raises(InputError, match="more than 999 objects of class 1"):
        results.to_panoptic(np.ones((1, 1), np.uint8), many, (1,))


def test_a_semantic_network_knows_no_size_for_objects():
    config = default()
    config.model.update(name="unet", num_classes=2)
    models.complete(config)
    assert not {"resize", "confidence"} & settings(config).keys()
    config.eval.resize = (100, 80)
    with pytest.raises(InputError, match="unet finds no objects: leave it"):
        make_infer(config)
