"""The trees of Pascal VOC: VOC 2012, SBD, Pascal Context, CVAT."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from jaxseg.data import catalog
from jaxseg.data.colours import Classes, save_label, voc_palette
from jaxseg.errors import InputError

VOC = Classes(tuple(map(str, range(21))), voc_palette(21))
LABEL = np.array([[0, 15, 15, 255], [0, 0, 20, 255]], np.uint8)


def _image(path: Path, size: tuple[int, int] = (2, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1]).save(path)


def _label(path: Path, label: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_label(path, label, VOC)


def _list(path: Path, names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def _mat(path: Path, key: str, **fields: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {key: fields})


@pytest.fixture
def voc(tmp_path) -> Path:
    """VOC 2012 with one image of train and one of val, and SBD with these and one more."""
    root, sbd = tmp_path / "voc2012/VOCdevkit/VOC2012", tmp_path / "voc2012/benchmark_RELEASE"
    for name in ("2007_1", "2007_2", "2008_3"):
        _image(root / f"JPEGImages/{name}.jpg")
        _mat(sbd / f"dataset/cls/{name}.mat", "GTcls", Segmentation=np.full((2, 4), 3, np.uint8))
    for name in ("2007_1", "2007_2"):
        _label(root / f"SegmentationClass/{name}.png", LABEL)
        numbers = np.array([[0, 1, 2, 255], [0, 0, 3, 255]], np.uint8)
        _label(root / f"SegmentationObject/{name}.png", numbers)
    _list(root / "ImageSets/Segmentation/train.txt", ["2007_1"])
    _list(root / "ImageSets/Segmentation/val.txt", ["2007_2"])
    _list(sbd / "dataset/train.txt", ["2008_3", "2007_2"])
    _list(sbd / "dataset/val.txt", ["2007_1"])
    inst = {"Segmentation": np.array([[1, 1, 0, 2]] * 2, np.uint8), "Categories": [[3], [8]]}
    _mat(sbd / "dataset/inst/2008_3.mat", "GTinst", **inst)
    return tmp_path


def test_voc_has_its_labels_and_objects(voc):
    source = catalog.open_split("voc2012", "val", str(voc), instances=True)
    example = source[0]
    np.testing.assert_array_equal(example["label"], LABEL)
    objects = example["instances"]
    assert objects["classes"].tolist() == [15, 15, 20] and not objects["crowd"].any()
    assert objects["masks"].sum(axis=(1, 2)).tolist() == [1, 1, 1]
    assert source.classes.things == tuple(range(1, 21))


def test_trainaug_is_sbd_and_train_without_val(voc):
    source = catalog.open_split("voc2012", "trainaug", str(voc), instances=True)
    assert [source[i]["name"] for i in range(len(source))] == ["2007_1", "2008_3"]
    np.testing.assert_array_equal(source[0]["label"], LABEL)  # VOC's own label goes first
    assert (source[1]["label"] == 3).all() and source.size(1) == (2, 4)
    assert source[1]["instances"]["classes"].tolist() == [3, 8]
    assert source[1]["instances"]["masks"].sum(axis=(1, 2)).tolist() == [4, 2]


def test_without_sbd_voc_alone_is_named(voc):
    shutil.rmtree(voc / "voc2012" / "benchmark_RELEASE")
    with pytest.raises(InputError, match="trainaug needs SBD.*data.train_split=train takes VOC's"):
        catalog.open_split("voc2012", "trainaug", str(voc))


def test_trainaug_may_be_pictures_with_a_list(voc):
    root = voc / "voc2012/VOCdevkit/VOC2012"
    _label(root / "SegmentationClassAug/2008_3.png", np.full((2, 4), 7, np.uint8))
    _list(root / "ImageSets/Segmentation/trainaug.txt", ["2008_3", "2007_1"])
    source = catalog.open_split(f"voc2012:{root}", "trainaug")
    assert (source[0]["label"] == 7).all()
    np.testing.assert_array_equal(source[1]["label"], LABEL)


def test_a_broken_mat_is_named(voc):
    path = voc / "voc2012/benchmark_RELEASE/dataset/cls/2008_3.mat"
    path.write_bytes(b"not Matlab's")
    source = catalog.open_split("voc2012", "trainaug", str(voc))
    with pytest.raises(InputError, match=r"cannot read GTcls in .*2008_3\.mat"):
        source[1]


def test_a_missing_list_shows_the_tree(voc):
    with pytest.raises(InputError, match=r"no .*/test\.txt(?s:.*)JPEGImages(?s:.*)SegmentationObj"):
        catalog.open_split("voc2012", "test", str(voc))


def test_the_sample_of_voc(data_root):
    folder = data_root / "formats/voc"
    if not folder.is_dir():
        pytest.skip("needs formats/voc")
    for split, count in (("train", 2), ("val", 2), ("trainval", 4)):
        source = catalog.open_split(f"voc2012:{folder}", split)
        assert len(source) == count
        for i in range(count):
            with Image.open(source.mask(i)) as picture:
                assert picture.mode == "P"
                np.testing.assert_array_equal(source[i]["label"], np.asarray(picture))
    objects = catalog.open_split(f"voc2012:{folder}", "train", instances=True)[1]["instances"]
    path = folder / "VOCdevkit/VOC2012/SegmentationObject/2011_000006.png"
    assert len(objects["classes"]) == 6  # numbers 1..5 and 7; 6 is ignored
    numbers = np.asarray(Image.open(path))
    areas = [int((numbers == n).sum()) for n in (1, 2, 3, 4, 5, 7)]
    assert objects["masks"].sum(axis=(1, 2)).tolist() == areas


CONTEXT = np.array([[0, 2, 23], [9, 458, 1]], np.uint16)  # of 459: aeroplane, bicycle, bag, wood


def _context(root: Path, form: str) -> None:
    voc = root / "VOCdevkit/VOC2010"
    _image(voc / "JPEGImages/2008_1.jpg", (2, 3))
    _list(voc / "ImageSets/SegmentationContext/val.txt", ["2008_1"])
    if form == "mat":
        (root / "trainval").mkdir()
        savemat(root / "trainval/2008_1.mat", {"LabelMap": CONTEXT})
    elif form == "59":  # in the order of 59_labels.txt
        _label(root / "59_context_labels/2008_1.png", np.array([[0, 1, 2], [21, 59, 0]]))
    else:  # in the order of the alphabet
        label = np.array([[0, 1, 6], [2, 59, 0]])
        _label(voc / "SegmentationClassContext/2008_1.png", label)


@pytest.mark.parametrize("form", ["mat", "59", "alphabet"])
def test_pascal_context_is_the_same_in_its_three_forms(tmp_path, form):
    _context(tmp_path / "pascal_context", form)
    source = catalog.open_split("pascal_context", "val", str(tmp_path))
    names = [*source.classes.names, *(256 - 59) * ["other"]]
    shown = [[names[i] for i in row] for row in source[0]["label"]]
    assert shown == [["other", "aeroplane", "bicycle"], ["bag", "wood", "other"]]
    whole = catalog.open_split(f"pascal_context60:{tmp_path / 'pascal_context'}", "val")
    assert len(whole.classes) == 60 and source[0]["label"][0, 0] == 255
    np.testing.assert_array_equal(whole[0]["label"], (source[0]["label"].astype(int) + 1) % 256)


def test_the_lists_of_voc_do_for_pascal_context(tmp_path):
    _context(tmp_path, "59")
    voc = tmp_path / "VOCdevkit/VOC2010"
    (voc / "ImageSets/SegmentationContext/val.txt").unlink()
    _list(voc / "ImageSets/Main/val.txt", ["2008_0", "2008_1"])  # the first has no label
    assert len(catalog.open_split(f"pascal_context:{tmp_path}", "val")) == 1


@pytest.fixture
def cvat(tmp_path) -> Path:
    """Five images as CVAT exports them, with the images beside the masks."""
    colours = {"background": (0, 0, 0), "cat": (250, 50, 83), "ignored dog": (1, 2, 3)}
    lines = ["# label:color_rgb:parts:actions"]
    lines += [f"{name}:{','.join(map(str, c))}::" for name, c in colours.items()]
    (tmp_path / "labelmap.txt").write_text("\n".join(lines))
    names = [f"my photo {k}" for k in range(5)]
    _list(tmp_path / "ImageSets/Segmentation/default.txt", names)
    for folder in ("SegmentationClass", "SegmentationObject", "JPEGImages"):
        (tmp_path / folder).mkdir()
    classes = np.array([[(0, 0, 0), (250, 50, 83)], [(1, 2, 3), (250, 50, 83)]], np.uint8)
    numbers = np.array([[(0, 0, 0), (128, 0, 0)], [(0, 128, 0), (128, 128, 0)]], np.uint8)
    for k, name in enumerate(names):
        Image.new("RGB", (2, 2), (k, k, k)).save(tmp_path / f"JPEGImages/{name}.PNG", format="png")
        Image.fromarray(classes).save(tmp_path / f"SegmentationClass/{name}.png")
        Image.fromarray(numbers).save(tmp_path / f"SegmentationObject/{name}.png")
    return tmp_path


def test_cvats_export_is_read_with_its_classes_and_objects(cvat):
    train, val = (catalog.open_split(f"cvat:{cvat}", s, instances=True) for s in ("train", "val"))
    assert (len(train), len(val), val[0]["name"]) == (4, 1, "my photo 4")
    assert train.classes.names == ("background", "cat", "ignored dog")
    assert train.classes.palette[1] == (250, 50, 83)
    assert train[0]["label"].tolist() == [[0, 1], [2, 1]]
    assert sorted(train[0]["instances"]["classes"].tolist()) == [1, 1, 2]
    assert catalog.splits(f"cvat:{cvat}") == ["train", "val"]
    _list(cvat / "ImageSets/Segmentation/Test.txt", ["my photo 0"])
    assert catalog.splits(f"cvat:{cvat}") == ["Test", "default"]
    assert len(catalog.open_split(f"cvat:{cvat}", "Test")) == 1


def test_cvats_masks_of_one_channel_hold_places_in_the_label_map(cvat):
    path = cvat / "SegmentationClass/my photo 0.png"
    Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8)).save(path)
    assert catalog.open_split(f"cvat:{cvat}", "train")[0]["label"].tolist() == [[0, 1], [2, 1]]


def test_a_colour_that_the_label_map_lacks_is_named(cvat):
    (cvat / "labelmap.txt").write_text("background:0,0,0::\ncat:250,50,83::\n")
    with pytest.raises(InputError, match=r"photo 0\.png holds colours \(1, 2, 3\) \(1 pixels\)"):
        catalog.open_split(f"cvat:{cvat}", "train")[0]


@pytest.mark.parametrize("line", ["cat", "cat:red::", "cat:1,2::"])
def test_a_bad_label_map_is_named(cvat, line):
    (cvat / "labelmap.txt").write_text(f"background:0,0,0::\n{line}\n")
    with pytest.raises(InputError, match=r"labelmap\.txt"):
        catalog.open_split(f"cvat:{cvat}", "train")


def test_without_a_label_map_the_classes_are_vocs(cvat):
    (cvat / "labelmap.txt").unlink()
    assert catalog.classes(f"cvat:{cvat}").names[15] == "person"
