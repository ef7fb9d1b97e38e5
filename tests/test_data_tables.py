"""Label tables: what the files of the known data sets hold, and what classes.json may say."""

import csv
import json

import numpy as np
import pytest

from jaxseg.data import catalog
from jaxseg.data.colours import Classes, voc_palette
from jaxseg.data.tables import (
    LABELS,
    numbered,
    read_classes,
    read_csv,
    read_json,
    to_values,
    write_classes,
)
from jaxseg.errors import InputError

COUNTS = {
    "ade20k": 150,
    "camvid": 11,
    "camvid32": 31,
    "cityscapes": 19,
    "coco": 81,
    "coco_panoptic": 133,
    "coco_stuff": 171,
    "coco_voc": 21,
    "isbi2012": 2,
    "nuclei": 2,
    "pascal_context": 59,
    "pascal_context60": 60,
    "pets": 2,
    "sunrgbd": 37,
    "voc2012": 21,
}


@pytest.mark.parametrize("name", COUNTS)
def test_every_table_has_one_format(name):
    with (LABELS / f"{name}.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows.pop(0) == ["id", "train_id", "name", "red", "green", "blue", "thing"]
    ids, names = [int(row[0]) for row in rows], [row[2] for row in rows]
    assert len(set(ids)) == len(ids) and len(set(names)) == len(names)
    trained = [int(row[1]) for row in rows if row[1] != "255"]
    assert sorted(set(trained)) == list(range(COUNTS[name]))
    colours = [row[3:6] for row in rows if row[1] != "255"]
    assert len({tuple(colour) for colour in colours}) >= 0.9 * len(colours)
    assert all(0 <= int(value) <= 255 for row in rows for value in row[3:6])
    assert {row[6] for row in rows} <= {"0", "1"}


def test_there_is_a_table_for_each_count():
    assert {path.stem for path in LABELS.glob("*.csv")} == set(COUNTS)


def test_tables_have_what_is_known_of_their_data_sets():
    ade, cityscapes, stuff = map(read_csv, ("ade20k", "cityscapes", "coco_stuff"))
    assert ade.ids[0] == 255 and ade.ids[1] == 0 and ade.ids[150] == 149
    assert (ade.classes.names[0], ade.classes.names[149]) == ("wall", "flag")
    assert cityscapes.ids[7] == 0 and cityscapes.ids[33] == 18 and cityscapes.ids[-1] == 255
    assert cityscapes.classes.names[13] == "car"
    assert [cityscapes.classes.names[i] for i in cityscapes.classes.things] == [
        *("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
    ]
    assert stuff.ids[181] == 170 and stuff.classes.names[170] == "wood"
    assert stuff.ids[11] == 255  # street sign was never annotated
    voc = read_csv("voc2012")
    assert voc.classes.names[15] == "person" and voc.classes.palette == voc_palette(21)
    assert read_csv("coco_voc").classes.names == voc.classes.names
    coco = read_csv("coco").classes
    assert coco.names[:2] == ("background", "person") and len(coco.things) == 80
    panoptic = read_csv("coco_panoptic").classes
    assert panoptic.things == tuple(range(80)) and panoptic.names[-1] == "rug-merged"
    assert read_csv("camvid").classes.names[7] == "fence"


def test_both_forms_of_pascal_context_agree():
    without, both = read_csv("pascal_context"), read_csv("pascal_context60")
    assert both.classes.names == ("background", *without.classes.names)
    assert without.ids == {k: (255 if k == 0 else i - 1) for k, i in both.ids.items()}
    # Mottaghi's 459 classes are in order of the alphabet, and so are their ids.
    names = [without.classes.names[i] for k, i in sorted(without.ids.items()) if k]
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "must hold"),
        ("[1, 2]", "must hold"),
        ('{"labels": ["a", "b"]}', "names"),
        ('{"names": "ab"}', "must hold"),
        ('{"names": ["a", "b"], "palette": 3}', "must hold"),
        ('{"names": ["a", "b"], "palette": [["r", 0, 0], [0, 0, 0]]}', "must hold"),
        ('{"names": ["a", "b"], "things": ["c"]}', "must hold"),
        ('{"names": ["a", "b"], "values": ["c", "d"]}', "must hold"),
        ('{"names": ["a", "b"], "values": [1]}', '"values"'),
        ('{"names": ["a", "b"], "values": [1, 1]}', '"values"'),
        ('{"names": ["a", "b"], "values": [0, 9], "ignore": [9]}', '"values"'),
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
        read_classes(path)
    assert str(path) in str(error.value)


def test_classes_json_survives_writing_and_reading(tmp_path):
    for things in ((), (1,)):
        classes = Classes(("sky", "Straße"), ((1, 2, 3), (255, 0, 9)), things)
        write_classes(tmp_path / "classes.json", classes)
        assert read_classes(tmp_path / "classes.json") == classes


def test_classes_without_a_palette_get_the_colours_of_voc(tmp_path):
    (tmp_path / "classes.json").write_text('{"names": ["a", "b", "c"]}')
    expected = Classes(("a", "b", "c"), ((0, 0, 0), (128, 0, 0), (0, 128, 0)))
    assert read_classes(tmp_path / "classes.json") == expected


def test_classes_json_says_what_the_masks_hold(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text('{"names": ["back", "person"], "values": [0, 255], "ignore": [128, [9, 9, 9]]}')
    table = read_json(path, "")
    assert table.ids == {0: 0, 255: 1, 128: 255}
    assert table.colours == {(0, 0, 0): 0, (128, 0, 0): 1, (9, 9, 9): 255}


def test_a_label_goes_back_to_the_values_of_its_files():
    for name in ("cityscapes", "ade20k", "coco_stuff", "voc2012"):
        table = read_csv(name)
        label = np.array([[*range(len(table.classes)), 255]], np.uint8)
        values = to_values(label, table)
        assert [table.ids[v] for v in values[0].tolist()] == label[0].tolist()
    city = catalog.to_submission_ids(np.array([[0, 18, 255]], np.uint8), "cityscapes")
    assert city.tolist() == [[7, 33, 0]] and city.dtype == np.uint8
    with pytest.raises(InputError, match="none of 19 classes"):
        catalog.to_submission_ids(np.array([[19]], np.uint8), "cityscapes")
    with pytest.raises(InputError, match='Did you mean "cityscapes"'):
        catalog.to_submission_ids(label, "cityscape")
    plain = numbered(Classes(("a", "b"), voc_palette(2)))
    assert to_values(np.array([[1, 255]], np.uint8), plain).tolist() == [[1, 255]]


def test_a_colour_of_two_classes_is_refused_where_masks_are_colours(tmp_path):
    content = {"names": ["sky", "road", "car"], "palette": [[1, 2, 3], [4, 5, 6], [1, 2, 3]]}
    (tmp_path / "classes.json").write_text(json.dumps(content))
    table = read_json(tmp_path / "classes.json", "")
    with pytest.raises(InputError, match=r"the colour \(1, 2, 3\) is sky and car: masks of"):
        table.colours  # noqa: B018
    content |= {"palette": [[1, 2, 3], [4, 5, 6], [7, 8, 9]], "ignore": [[4, 5, 6]]}
    (tmp_path / "classes.json").write_text(json.dumps(content))
    table = read_json(tmp_path / "classes.json", "")
    with pytest.raises(InputError, match=r"\(4, 5, 6\) is ignored and road"):
        table.colours  # noqa: B018


def test_submissions_of_one_data_set_have_one_type():
    table = read_csv("pascal_context")
    few, many = (to_values(np.full((2, 3), i, np.uint8), table) for i in (0, 58))
    assert few.dtype == many.dtype == np.uint16
