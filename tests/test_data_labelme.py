"""labelme's annotations: its own examples with the masks that it made of them, and each shape."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxseg.data import catalog
from jaxseg.data.labelme import draw, read_shapes
from jaxseg.errors import InputError
from jaxseg.verbs.check import inspect

SIZE = (40, 50)


def _examples(data_root: Path) -> Path:
    if not (data_root / "formats/labelme").is_dir():
        pytest.skip("needs formats/labelme")
    return data_root / "formats/labelme"


def _write(folder: Path, shapes: list[dict], name: str = "a", labels: str = "cat\ndog\n") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE[::-1]).save(folder / f"{name}.jpg")
    content = {"imagePath": f"{name}.jpg", "imageHeight": SIZE[0], "imageWidth": SIZE[1]}
    (folder / f"{name}.json").write_text(json.dumps({**content, "shapes": shapes}))
    (folder / "labels.txt").write_text(labels)


def _shape(kind: str | None, points: list, label: str = "cat", **more) -> dict:
    return {"label": label, "points": points, "shape_type": kind, **more}


# Pillow has changed by a few pixels how it fills a polygon's last row since these masks were made.
@pytest.mark.parametrize(
    ("kind", "name", "differing"),
    [
        ("instance_segmentation", "2011_000003", 0),
        ("instance_segmentation", "2011_000006", 1),
        ("instance_segmentation", "2011_000025", 0),
        ("semantic_segmentation", "2011_000025", 0),
    ],
)
def test_labelmes_examples_become_labelmes_masks(data_root, kind, name, differing):
    folder = _examples(data_root) / kind
    source = catalog.open_split(f"labelme:{folder}", "all", instances=True)
    example = next(source[i] for i in range(len(source)) if source[i]["name"] == name)
    expected = np.asarray(Image.open(folder / f"expected_SegmentationClass/{name}.png"))
    assert source.classes.names[:2] == ("_background_", "aeroplane")
    assert (example["label"] != expected).sum() <= differing
    objects = folder / f"expected_SegmentationObject/{name}.png"
    if objects.exists():
        numbers = np.asarray(Image.open(objects))
        numbers = [numbers == n for n in np.unique(numbers) if 0 < n < 255]
        masks = example["instances"]["masks"].astype(bool)
        ignored = (expected == 255) & (example["label"] == 255)
        numbers = [mask for mask in numbers if not ignored[mask].all()]
        assert len(masks) == len(numbers)
        for mask in masks:
            assert min((mask != other).sum() for other in numbers) <= differing


def test_the_example_of_the_tutorial(data_root):
    folder = _examples(data_root) / "tutorial"
    names = (folder / "apc2016_obj3/label_names.txt").read_text().split()
    expected = np.asarray(Image.open(folder / "apc2016_obj3/label.png"))
    file = folder / "apc2016_obj3.json"
    size, _, shapes = read_shapes(file)
    label = np.zeros(size, np.uint8)
    for shape in shapes:
        label[draw(file, shape, size)] = names.index(shape["label"])
    assert (label != expected).sum() <= 8


def test_the_example_of_all_shapes(data_root):
    file = _examples(data_root) / "primitives/primitives.json"
    size, _, shapes = read_shapes(file)
    areas = {}
    for shape in shapes:
        mask = draw(file, shape, size)
        areas[shape["label"]] = mask.sum()
        y, x = np.nonzero(mask)
        points = np.array(shape["points"])
        if shape["shape_type"] in ("polygon", "rectangle", "mask"):
            box = [x.min(), y.min(), x.max(), y.max()]
            np.testing.assert_allclose(box, [*points.min(axis=0), *points.max(axis=0)], atol=1)
    assert areas["circle"] == pytest.approx(np.pi * (30**2 + 41**2), rel=0.02)
    assert areas["line"] == pytest.approx(10 * np.hypot(28, 46), rel=0.05)
    assert areas["point"] == pytest.approx(np.pi * 25, rel=0.3)


def test_each_shape_is_drawn(tmp_path):
    picture = io.BytesIO()
    Image.fromarray(np.array([[255, 0, 255]], np.uint8)).save(picture, "PNG")
    text = base64.b64encode(picture.getvalue()).decode()
    boxes = {
        "polygon": (_shape(None, [[2, 3], [8, 3], [8, 7], [2, 7]]), (slice(3, 8), slice(2, 9))),
        "rectangle": (_shape("rectangle", [[8, 7], [2, 3]]), (slice(3, 8), slice(2, 9))),
        "point": (_shape("point", [[20, 20]]), (slice(15, 26), slice(15, 26))),
        "circle": (_shape("circle", [[20, 20], [23, 24]]), (slice(15, 26), slice(15, 26))),
        "mask": (_shape("mask", [[48.2, 5], [50, 5]], mask=text), (slice(5, 6), slice(48, 49))),
    }
    for kind, (shape, box) in boxes.items():
        mask = draw(tmp_path / "a.json", shape, SIZE)
        y, x = np.nonzero(mask)
        assert (y.min(), y.max() + 1) == (box[0].start, box[0].stop), kind
        assert (x.min(), x.max() + 1) == (box[1].start, box[1].stop), kind
    assert draw(tmp_path / "a.json", _shape("circle", [[20, 20], [23, 24]]), SIZE).sum() < 11 * 11


def test_later_shapes_lie_over_earlier_ones_and_groups_are_one_object(tmp_path):
    square = [[0, 0], [9, 0], [9, 9], [0, 9]]
    shapes = [
        _shape("polygon", square),
        _shape("rectangle", [[5, 5], [14, 14]], "dog", group_id=3),
        _shape("rectangle", [[30, 5], [39, 14]], "dog", group_id=3),
        _shape("rectangle", [[30, 30], [31, 31]], "__ignore__"),
    ]
    _write(tmp_path / "train", shapes, labels="")
    (tmp_path / "labels.txt").write_text("__ignore__\n_background_\ncat\ndog\n")
    source = catalog.open_split(f"labelme:{tmp_path}", "train", instances=True)
    label, objects = source[0]["label"], source[0]["instances"]
    assert source.classes.names == ("_background_", "cat", "dog")
    counts = np.bincount(label.ravel(), minlength=256)
    assert counts[[1, 2, 255]].tolist() == [75, 200, 4]
    assert objects["classes"].tolist() == [1, 2]
    assert objects["masks"].sum(axis=(1, 2)).tolist() == [75, 200]


def test_a_folder_without_splits_is_divided(tmp_path):
    for k in range(5):
        _write(tmp_path, [], name=f"{k}")
    train, val = (catalog.open_split(f"labelme:{tmp_path}", split) for split in ("train", "val"))
    assert (len(train), len(val), val[0]["name"]) == (4, 1, "4")
    assert catalog.splits(f"labelme:{tmp_path}") == ["train", "val"]
    assert train.classes.names == ("_background_", "cat", "dog")
    with pytest.raises(InputError, match="every fifth"):
        catalog.open_split(f"labelme:{tmp_path}", "test")


def test_a_folder_with_splits_of_its_own_is_not_divided(tmp_path):
    """Else a run without val/ would be scored on every fifth image that it was trained on."""
    (tmp_path / "train").mkdir()
    for k in range(5):
        _write(tmp_path / "train", [], name=f"{k}")
    (tmp_path / "train/labels.txt").rename(tmp_path / "labels.txt")
    assert len(catalog.open_split(f"labelme:{tmp_path}", "train")) == 5
    with pytest.raises(InputError, match=r"no split 'val' in .*: found \['train'\]"):
        catalog.open_split(f"labelme:{tmp_path}", "val")
    _write(tmp_path / "test/deep", [])
    assert catalog.splits(f"labelme:{tmp_path}") == ["train", "test"]
    assert len(catalog.open_split(f"labelme:{tmp_path}", "test")) == 1


def test_classes_json_does_for_labels_txt(tmp_path):
    _write(tmp_path, [_shape("point", [[9, 9]], "dog")])
    (tmp_path / "labels.txt").unlink()
    with pytest.raises(InputError, match=r"no .*classes\.json(?s:.*)NAME/labels\.txt"):
        catalog.open_split(f"labelme:{tmp_path}", "all")
    (tmp_path / "classes.json").write_text('{"names": ["rest", "cat", "dog"]}')
    source = catalog.open_split(f"labelme:{tmp_path}", "all")
    assert len(source) == 1 and source[0]["label"].max() == 2


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (_shape("polygon", [[1, 1], [2, 2]]), "a polygon of 2 points"),
        (_shape("spiral", [[1, 1]]), "a spiral of 1 points: needs one of polygon"),
        (_shape("point", [[1, 1]], "horse"), 'labelled "horse": the classes are _background_, cat'),
        (_shape("mask", [[1, 1], [2, 2]], mask="?"), "a mask that cannot be read"),
    ],
)
def test_bad_shapes_are_named(tmp_path, shape, message):
    _write(tmp_path, [shape])
    with pytest.raises(InputError, match=rf"a\.json has .*{message}"):
        catalog.open_split(f"labelme:{tmp_path}", "all")[0]


@pytest.mark.parametrize("text", ["{", "[]", '{"shapes": []}', '{"shapes": [{}]}'])
def test_a_file_that_is_not_labelmes_is_named(tmp_path, text):
    _write(tmp_path, [])
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"a\.json is not labelme's JSON"):
        catalog.open_split(f"labelme:{tmp_path}", "all")[0]


@pytest.mark.parametrize("kind", ["polygon", "circle", "mask"])
@pytest.mark.parametrize(
    "points",
    [[], [[1, 1], [3, None]], [[1, 1], [3]], [[1, 1], 3], [["a", 1]], [[float("nan"), 1]]]
    + [[[10**400, 1]]],
)
def test_points_that_are_no_pairs_of_numbers_are_named(tmp_path, kind, points):
    _write(tmp_path, [_shape(kind, points, mask="")])
    facts = inspect(f"labelme:{tmp_path}", ["all"])
    assert len(facts["errors"]) == 1 and "a.json is not labelme's JSON" in facts["errors"][0]


def _embedded(folder: Path, image: bytes, **more) -> Path:
    """A file that holds its image, and names itself as labelme once did."""
    content = {"imagePath": "a.json", "imageHeight": SIZE[0], "imageWidth": SIZE[1]}
    content |= {"imageData": base64.b64encode(image).decode(), "shapes": [], **more}
    (folder / "a.json").write_text(json.dumps(content))
    (folder / "labels.txt").write_text("cat\n")
    return folder


@pytest.mark.parametrize("path", ["a.json", "gone.jpg"])
def test_an_image_may_be_in_the_file_alone(tmp_path, path):
    image, file = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8), io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    _embedded(tmp_path, file.getvalue(), imagePath=path)
    source = catalog.open_split(f"labelme:{tmp_path}", "all")
    np.testing.assert_array_equal(source[0]["image"], image)
    assert source[0]["name"] == "a" and source.size(0) == SIZE and source.dtype == np.uint8
    facts = inspect(f"labelme:{tmp_path}", ["all"])
    assert facts["errors"] == [] and facts["splits"]["all"]["images"] == 1


def test_a_broken_image_in_the_file_is_named(tmp_path):
    source = catalog.open_split(f"labelme:{_embedded(tmp_path, b'no image')}", "all")
    with pytest.raises(InputError, match=r"cannot read image .*a\.json"):
        source[0]
    _embedded(tmp_path, b"", imageData="A")
    with pytest.raises(InputError, match=r"a\.json holds an image that cannot be read"):
        catalog.open_split(f"labelme:{tmp_path}", "all")


def test_the_tutorial_is_read_with_the_image_that_it_holds(data_root, tmp_path):
    folder = _examples(data_root) / "tutorial"
    names = (folder / "apc2016_obj3/label_names.txt").read_text()
    (tmp_path / "labels.txt").write_text(names)
    (tmp_path / "apc2016_obj3.json").write_bytes((folder / "apc2016_obj3.json").read_bytes())
    source = catalog.open_split(f"labelme:{tmp_path}", "all")
    example, expected = source[0], np.asarray(Image.open(folder / "apc2016_obj3/label.png"))
    assert example["image"].shape == (907, 1210, 3) and example["image"].std() > 20
    assert source.classes.names == tuple(names.split())
    assert (example["label"] != expected).sum() <= 8
