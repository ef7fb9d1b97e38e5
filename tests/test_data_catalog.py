"""Data sets by name: where they are looked for, and how they are read from there."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxseg.data import catalog
from jaxseg.data.sources import Shapes
from jaxseg.data.tables import LABELS
from jaxseg.errors import InputError

NAMES = ("sky", "road", "car")


@pytest.fixture
def folder(tmp_path, write_folder) -> Path:
    return write_folder(tmp_path / "mine", NAMES, size=(8, 9), train=3, val=2)


def test_every_known_data_set_has_classes_and_a_tree():
    for name in ("shapes", *catalog.LAYOUTS):
        assert len(catalog.classes(name)) >= 2
    for name, layout in {**catalog.LAYOUTS, **catalog.OWN}.items():
        lines = layout.listing.__doc__.splitlines()
        assert len(lines) > 1 and max(map(len, lines)) <= 100, name
    tables = {layout.table for layout in catalog.LAYOUTS.values()}
    assert tables == {path.stem for path in LABELS.glob("*.csv")}


def test_the_classes_of_shapes_are_its_own():
    assert catalog.classes("shapes") == Shapes.classes
    assert catalog.splits("shapes") == ["train", "val", "test"]
    assert len(catalog.open_split("shapes", "val")) == 256


def test_a_data_set_is_found_by_path_root_and_environment(folder, monkeypatch):
    monkeypatch.delenv("JAXSEG_DATA", raising=False)
    assert catalog.locate(str(folder)) == folder
    assert catalog.locate("mine", root=str(folder.parent)) == folder
    with pytest.raises(InputError, match="Set JAXSEG_DATA"):
        catalog.locate("mine")
    monkeypatch.setenv("JAXSEG_DATA", str(folder.parent))
    assert catalog.locate("mine") == folder
    assert len(catalog.open_split("mine", "train")) == 3
    assert catalog.splits("mine") == ["train", "val"]


def test_the_root_goes_before_the_environment(folder, tmp_path, monkeypatch):
    (tmp_path / "other" / "mine").mkdir(parents=True)
    monkeypatch.setenv("JAXSEG_DATA", str(tmp_path / "other"))
    assert catalog.locate("mine", root=str(folder.parent)) == folder


def test_a_data_set_that_is_nowhere_prints_the_places_and_the_tree(tmp_path):
    with pytest.raises(InputError) as error:
        catalog.open_split("mine", "train", root=str(tmp_path))
    message = str(error.value)
    assert '"mine" not found' in message and str(tmp_path / "mine") in message
    assert "NAME/classes.json" in message and "NAME/val/masks" in message


@pytest.mark.parametrize("name", catalog.LAYOUTS)
def test_a_known_data_set_that_is_nowhere_prints_its_own_tree(tmp_path, name):
    with pytest.raises(InputError) as error:
        catalog.open_split(name, "train", root=str(tmp_path))
    assert str(error.value).endswith(catalog.LAYOUTS[name].listing.__doc__)


def test_a_layout_may_lie_anywhere(folder):
    with pytest.raises(InputError, match=r"no images in .*mine/leftImg8bit/train(?s:.*)gtFine"):
        catalog.open_split(f"cityscapes:{folder}", "train")
    with pytest.raises(InputError, match='unknown layout of a data set "citiscapes".*cityscapes'):
        catalog.open_split(f"citiscapes:{folder}", "train")
    with pytest.raises(InputError, match='"nowhere" not found'):
        catalog.open_split("labelme:nowhere", "train")


def test_a_table_beside_the_data_set_is_not_taken_for_its_classes(folder):
    folder.with_suffix(".csv").write_text("something,else\n1,2\n")
    assert catalog.classes(str(folder)).names == NAMES


def test_a_folder_that_borrows_a_known_name_must_have_its_classes(tmp_path, write_folder):
    write_folder(tmp_path / "camvid", ("sky", "road"), size=(8, 8), train=1, val=1)
    with pytest.raises(InputError, match=r"names 2 classes .*camvid has 11(?s:.*)another folder"):
        catalog.open_split("camvid", "train", root=str(tmp_path))


def test_a_known_data_set_may_lie_in_a_plain_folder(tmp_path, write_folder):
    names = catalog.classes("isbi2012").names
    write_folder(tmp_path / "isbi2012", names, size=(8, 8), train=1, val=1)
    label = catalog.open_split("isbi2012", "train", root=str(tmp_path))[0]["label"]
    assert set(np.unique(label)) == {0, 1, 255}  # ids, not the values of the official files
    assert catalog.splits("isbi2012", str(tmp_path)) == ["train", "val"]


def test_known_classes_need_no_files(monkeypatch):
    monkeypatch.delenv("JAXSEG_DATA", raising=False)
    assert catalog.classes("cityscapes").names[13] == "car"
    with pytest.raises(InputError, match="not found"):
        catalog.classes("mine")


def test_the_classes_of_other_layouts_are_in_their_files(tmp_path):
    (tmp_path / "labels.txt").write_text("cat\n")
    assert catalog.classes(f"labelme:{tmp_path}").names == ("_background_", "cat")
    (tmp_path / "annotations.json").write_text(
        json.dumps({"images": [], "annotations": [], "categories": [{"id": 1, "name": "dog"}]})
    )
    assert catalog.classes(f"coco_json:{tmp_path}").names == ("background", "dog")


def test_a_list_takes_its_classes_from_beside_it(folder):
    file = folder / "pairs.csv"
    file.write_text("image,mask\n")
    assert catalog.classes(f"list:{file}").names == NAMES
    Image.new("L", (2, 2)).save(folder / "x.png")
    with pytest.raises(InputError, match="no lines"):
        catalog.open_split(f"list:{file}", "train")
