"""COCO's layouts: on real samples, and on annotations written here."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxseg.data import catalog, rle
from jaxseg.data.coco import read_segments
from jaxseg.errors import InputError

SQUARE = [[1, 1, 5, 1, 5, 5, 1, 5]]  # columns and rows 1..4


def _formats(data_root: Path, name: str) -> Path:
    if not (data_root / "formats" / name).is_dir():
        pytest.skip(f"needs formats/{name}")
    return data_root / "formats" / name


def _write(root: Path, annotations: list[dict], categories: list[dict] | None = None) -> Path:
    """Two images of 8x10, the first with annotations, as COCO's val2017."""
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").mkdir()
    images = []
    for number in (7, 3):
        name = f"{number:012}.jpg"
        Image.new("RGB", (10, 8)).save(root / "val2017" / name)
        images.append({"id": number, "file_name": name, "height": 8, "width": 10})
    content = {
        "images": images,
        "annotations": [{"image_id": 3, "id": k, **a} for k, a in enumerate(annotations)],
        "categories": categories or [{"id": 1, "name": "person"}],
    }
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content))
    return root


def test_objects_are_drawn_and_listed(tmp_path):
    crowd = {"counts": [0, 3, 77], "size": [8, 10]}
    _write(
        tmp_path / "coco",
        [
            {"category_id": 90, "segmentation": SQUARE, "iscrowd": 0},
            {"category_id": 1, "segmentation": [[4, 4, 8, 4, 8, 7, 4, 7]], "iscrowd": 0},
            {"category_id": 1, "segmentation": crowd, "iscrowd": 1},
        ],
    )
    source = catalog.open_split("coco", "val", str(tmp_path), instances=True)
    assert [source[i]["name"] for i in range(2)] == ["000000000003", "000000000007"]
    label, objects = source[0]["label"], source[0]["instances"]
    expected = np.zeros((8, 10), np.uint8)
    expected[1:5, 1:5] = 80  # category 90 is the last of 80
    expected[4:7, 4:8] = 1
    expected[4, 4] = 255  # of both
    expected[:3, 0] = 1
    np.testing.assert_array_equal(label, expected)
    assert objects["classes"].tolist() == [80, 1, 1]
    assert objects["crowd"].tolist() == [False, False, True]
    assert objects["masks"].sum(axis=(1, 2)).tolist() == [16, 12, 3]
    assert objects["masks"].dtype == np.uint8 and objects["classes"].dtype == np.int32
    assert not source[1]["label"].any() and source[1]["instances"]["masks"].shape == (0, 8, 10)


def test_objects_have_the_area_and_the_box_that_their_annotation_says(tmp_path):
    one = {"category_id": 1, "segmentation": SQUARE}
    said = {"area": 7.25, "bbox": [1.5, 2, 3.25, 4]}
    notes = [one | said, one, one | {"area": None, "bbox": []}, one | {"category_id": 2}]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    folder = _write(tmp_path / "mine", notes, categories)
    (folder / "annotations/instances_val2017.json").rename(folder / "annotations.json")
    (folder / "val2017").rename(folder / "images")
    source = catalog.open_split(f"coco_json:{folder}", "all", instances=True)
    objects = source[0]["instances"]
    np.testing.assert_array_equal(objects["areas"], [7.25, *[np.nan] * 3])
    np.testing.assert_array_equal(objects["boxes"][0], [2, 1.5, 6, 4.75])
    assert np.isnan(objects["boxes"][1:]).all() and objects["boxes"].shape == (4, 4)
    assert source[1]["instances"]["boxes"].shape == (0, 4)


@pytest.mark.parametrize("said", [{"area": "big"}, {"area": [1, 2]}, {"bbox": [1, 2, 3]}])
def test_an_area_or_a_box_that_is_none_is_named(tmp_path, said):
    _write(tmp_path, [{"category_id": 1, "segmentation": SQUARE, **said}])
    source = catalog.open_split(f"coco:{tmp_path}", "val", instances=True)
    message = r"area or bbox of an object of 000000000003\.jpg in .*val2017\.json is no number, or"
    with pytest.raises(InputError, match=message):
        source[0]


def test_only_the_classes_of_voc_are_drawn_for_voc(tmp_path):
    shapes = [[[*np.array(SQUARE[0]) + shift]] for shift in (0, 4)]
    shapes = [[list(map(float, shape[0]))] for shape in shapes]
    _write(
        tmp_path / "coco",
        [
            {"category_id": 10, "segmentation": shapes[0], "iscrowd": 0},  # a traffic light
            {"category_id": 72, "segmentation": SQUARE, "iscrowd": 0},  # tv
        ],
    )
    source = catalog.open_split(f"coco_voc:{tmp_path / 'coco'}", "val")
    assert set(np.unique(source[0]["label"])) == {0, 20} and len(source.classes) == 21


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "no polygon"),
        ({"counts": [9], "size": [8, 10]}, "9 pixels"),
        ({"counts": [80], "size": [10, 8]}, "not the image's"),
        (None, "NoneType"),
        ({"size": [8, 10]}, "counts"),
    ],
)
def test_bad_segmentations_are_named(tmp_path, segmentation, message):
    _write(tmp_path, [{"category_id": 1, "segmentation": segmentation, "iscrowd": 0}])
    source = catalog.open_split(f"coco:{tmp_path}", "val")
    with pytest.raises(InputError, match=rf"000000000003\.jpg in .*val2017\.json: .*{message}"):
        source[0]


@pytest.mark.parametrize("content", ["[]", "{", '{"images": [], "annotations": []}'])
def test_a_file_that_is_not_cocos_is_named(tmp_path, content):
    _write(tmp_path, [])
    (tmp_path / "annotations/instances_val2017.json").write_text(content)
    with pytest.raises(InputError, match=r"instances_val2017\.json is not COCO's JSON"):
        catalog.open_split(f"coco:{tmp_path}", "val")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": [None]}, "annotations must be a list of objects"),
        ({"images": [3]}, "images must be a list of objects"),
        ({"images": 3}, "'int' object is not iterable"),
        ({"categories": [{"id": [1], "name": "a"}]}, "each id of categories must be a number"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": "2", "name": "b"}]}, "each id of categor"),
        ({"images": [{"id": 1}, {"id": "2"}]}, "each id of images must be a number, or each a"),
        ({"annotations": [{"category_id": [1]}]}, "each category_id of annotations"),
        ({"annotations": [{"image_id": {}}]}, "each image_id of annotations"),
    ],
)
def test_entries_that_are_not_cocos_are_named(tmp_path, change, message):
    place = _write(tmp_path, []) / "annotations/instances_val2017.json"
    content = json.dumps(json.loads(place.read_text()) | change)
    for name in ("instances_train2017.json", place.name):
        place.with_name(name).write_text(content)
    for layout in ("coco", "coco_json"):
        with pytest.raises(InputError, match=rf"2017\.json is not COCO's JSON: .*{message}"):
            catalog.open_split(f"{layout}:{tmp_path}", "val", complete=False)


def test_an_entry_that_lacks_a_field_is_named(tmp_path):
    _write(tmp_path, [{"category_id": 1}])
    with pytest.raises(InputError, match="an image or annotation lacks 'segmentation'"):
        catalog.open_split(f"coco:{tmp_path}", "val")


def test_objects_of_a_category_that_coco_lacks_are_refused(tmp_path):
    _write(tmp_path, [{"category_id": c, "segmentation": SQUARE} for c in (1, 91)])
    message = rf"val2017\.json has objects of category 91, .* the data set is coco_json:{tmp_path}"
    with pytest.raises(InputError, match=message):
        catalog.open_split(f"coco:{tmp_path}", "val")


def test_missing_annotations_show_the_tree(tmp_path):
    (tmp_path / "coco").mkdir()
    with pytest.raises(InputError, match=r"no .*train2017\.json(?s:.*)coco/val2017/\*\.jpg"):
        catalog.open_split("coco", "train", str(tmp_path))


def test_own_annotations_have_their_own_classes(tmp_path):
    categories = [{"id": 9, "name": "cat"}, {"id": 4, "name": "dog"}]
    note = {"category_id": 9, "segmentation": SQUARE}  # without iscrowd
    folder = _write(tmp_path / "mine", [note], categories)
    (folder / "train").mkdir()
    content = json.loads((folder / "annotations/instances_val2017.json").read_text())
    (folder / "train/_annotations.coco.json").write_text(json.dumps(content))
    for image in content["images"]:
        Image.new("RGB", (10, 8)).save(folder / "train" / image["file_name"])
    for split in ("train", "val"):
        source = catalog.open_split(f"coco_json:{folder}", split, instances=True)
        assert source.classes.names == ("background", "dog", "cat")
        assert source.classes.things == (1, 2)
        assert set(np.unique(source[0]["label"])) == {0, 2}
    assert catalog.splits(f"coco_json:{folder}") == ["train", "val"]
    (folder / "train").rename(folder / "test")
    (folder / "annotations/instances_val2017.json").rename(folder / "annotations.json")
    assert catalog.splits(f"coco_json:{folder}") == ["train", "test", "val"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["categories"][0].update(name="dog"), "category 9 is 'dog' in .* and 'cat' in"),
        (lambda c: c["categories"].append({"id": 8, "name": "cow"}), "category 8 is 'cow' .* None"),
        (lambda c: c["annotations"][0].update(category_id=5), "category 5 is None in .* and None"),
    ],
)
def test_splits_with_other_categories_are_refused(tmp_path, change, message):
    categories = [{"id": 9, "name": "cat"}, {"id": 4, "name": "dog"}]
    folder = _write(tmp_path / "mine", [{"category_id": 9, "segmentation": SQUARE}], categories)
    place = folder / "annotations/instances_val2017.json"
    content = json.loads(place.read_text())
    place.with_name("instances_train2017.json").write_text(json.dumps(content))
    (folder / "train2017").mkdir()
    assert len(catalog.open_split(f"coco_json:{folder}", "val", complete=False)) == 2
    change(content)
    place.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        catalog.open_split(f"coco_json:{folder}", "val", complete=False)


def test_the_sample_of_instances(data_root):
    folder = _formats(data_root, "coco_instances")
    train, val, every = (
        catalog.open_split(f"coco_json:{folder}", split, instances=True)
        for split in ("train", "all", "all")
    )
    assert len(train) == len(every) == len(val) == 3
    assert every.classes.names[:2] == ("_background_", "aeroplane") and len(every.classes) == 21
    found = sum(len(every[i]["instances"]["classes"]) for i in range(3))
    assert found == 12
    for i in range(3):
        example = every[i]
        masks, ids = example["instances"]["masks"], example["instances"]["classes"]
        alone = masks.sum(axis=0) == 1
        painted = (masks * ids[:, None, None]).sum(axis=0)
        np.testing.assert_array_equal(example["label"][alone], painted[alone])
        assert (example["label"][masks.sum(axis=0) > 1] == 255).all()


def test_the_sample_of_panoptic_segments(data_root):
    folder = _formats(data_root, "coco_panoptic")
    source = catalog.open_split(f"coco_panoptic:{folder}", "val", instances=True)
    notes = folder / "annotations"
    content = json.loads((notes / "panoptic_val2017.json").read_text())
    runs = json.loads((notes / "panoptic_coco_detection_format.json").read_text())["annotations"]
    ids = catalog.table(f"coco_panoptic:{folder}").ids
    assert len(source) == 2 and len(source.classes) == 133
    for i, entry in enumerate(content["annotations"]):
        example = source[i]
        assert f"{example['name']}.png" == entry["file_name"]
        # The same segments in another format: the category in red.
        other = np.asarray(Image.open(notes / "panoptic_val2017_2ch" / entry["file_name"]))[..., 0]
        expected = np.vectorize(lambda value: ids.get(int(value), 255))(other)
        np.testing.assert_array_equal(example["label"], expected)
        # And as run lengths.
        numbers = read_segments(notes / "panoptic_val2017" / entry["file_name"])
        mine = [run for run in runs if run["image_id"] == entry["image_id"]]
        for segment, run in zip(entry["segments_info"], mine, strict=True):
            mask = numbers == segment["id"]
            assert mask.sum() == segment["area"]
            np.testing.assert_array_equal(rle.decode(run["segmentation"], mask.shape), mask)
        things = [s for s in entry["segments_info"] if ids[s["category_id"]] < 80]
        masks = example["instances"]["masks"]
        assert masks.sum(axis=(1, 2)).tolist() == [s["area"] for s in things]
        assert example["instances"]["crowd"].tolist() == [bool(s["iscrowd"]) for s in things]


def test_a_segment_that_the_json_lacks_is_named(tmp_path):
    (tmp_path / "annotations/panoptic_val2017").mkdir(parents=True)
    (tmp_path / "val2017").mkdir()
    Image.new("RGB", (3, 2)).save(tmp_path / "val2017/a.jpg")
    Image.new("RGB", (3, 2), (7, 1, 0)).save(tmp_path / "annotations/panoptic_val2017/a.png")
    entry = {"file_name": "a.png", "image_id": 1, "segments_info": []}
    file = tmp_path / "annotations/panoptic_val2017.json"
    file.write_text(json.dumps({"annotations": [entry]}))
    segment = {"id": 263, "category_id": 1, "iscrowd": 0}
    other = {"id": 7, "category_id": 500, "iscrowd": 0}
    content = {"annotations": [entry | {"segments_info": [segment, other]}]}
    file.write_text(json.dumps(content))
    message = r"panoptic_val2017\.json has a segment of category 500 in a\.png, .* leave the segm"
    with pytest.raises(InputError, match=message):
        catalog.open_split(f"coco_panoptic:{tmp_path}", "val")
    file.write_text(json.dumps({"annotations": [entry]}))
    source = catalog.open_split(f"coco_panoptic:{tmp_path}", "val")
    with pytest.raises(InputError, match=r"a\.png holds ids 263 \(6 pixels\)"):
        source[0]
    (tmp_path / "annotations/panoptic_val2017/a.png").unlink()
    with pytest.raises(InputError, match=r"1 of 1 images have no mask"):
        catalog.open_split(f"coco_panoptic:{tmp_path}", "val")


def test_the_samples_of_coco_stuff(data_root):
    folder = _formats(data_root, "coco_stuff")
    table = catalog.table(f"coco_stuff:{folder}")
    for split, count in (("train", 2), ("val", 3)):
        source = catalog.open_split(f"coco_stuff:{folder}", split)
        assert len(source) == count and len(source.classes) == 171
        for i in range(count):
            example = source[i]
            raw = np.asarray(Image.open(source.mask(i)))
            expected = np.array([table.ids.get(value, 254) for value in range(256)])[raw]
            np.testing.assert_array_equal(example["label"], expected)
            assert source.size(i) == example["label"].shape
    # The people of the same image as COCO's panoptic labels have them.
    file = folder / "panoptic/panoptic_val2017.json"
    entry = json.loads(file.read_text())["annotations"][0]
    numbers = read_segments(folder / "panoptic/panoptic_val2017" / entry["file_name"])
    people = [s["id"] for s in entry["segments_info"] if s["category_id"] == 1]
    label = catalog.open_split(f"coco_stuff:{folder}", "val")[0]["label"]
    overlap = (label == 0) & np.isin(numbers, people)
    assert overlap.sum() > 0.9 * np.isin(numbers, people).sum() > 0


def test_coco_stuff_may_lie_beside_the_annotations_of_coco(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train2017.json").write_text("{}")
    for folder in ("images/train2017", "stuffthingmaps/train2017"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (5, 4)).save(tmp_path / "images/train2017/000000000001.jpg")
    Image.new("L", (5, 4), 2).save(tmp_path / "stuffthingmaps/train2017/000000000001.png")
    source = catalog.open_split(f"coco_stuff:{tmp_path}", "train")
    assert len(source) == 1 and (source[0]["label"] == 2).all()
    with pytest.raises(InputError, match=r"no .*annotations/val2017"):
        catalog.open_split(f"coco_stuff:{tmp_path}", "val")
