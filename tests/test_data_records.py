"""TFDS without TensorFlow: what is packed comes back to the bit; others' data sets are read."""

import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxseg import main
from jaxseg.config import default
from jaxseg.data import catalog, pipeline, records
from jaxseg.errors import InputError
from jaxseg.verbs.pack import pack


def _jpeg(image: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(write_folder, tmp_path_factory) -> Path:
    """A plain folder with PNGs, JPEGs and one JPEG that EXIF turns."""
    root = write_folder(tmp_path_factory.mktemp("data") / "Mein Set")
    rng = np.random.default_rng(1)
    turned = Image.Exif()
    turned[0x112] = 6
    for name, size, options in (
        ("01", (40, 48), {}),
        ("02", (48, 40), {"exif": turned}),
    ):
        (root / "train" / "images" / f"{name}.png").unlink()
        image = rng.integers(0, 256, (*size, 3), np.uint8)
        (root / "train" / "images" / f"{name}.jpg").write_bytes(_jpeg(image, **options))
    return root


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("packed")
    assert pack(str(folder), output) == 0
    return output


@pytest.mark.parametrize("channels", [1, 3])
def test_a_packed_data_set_is_the_folders_to_the_bit(folder, packed, channels):
    for split, count in (("train", 8), ("val", 2)):
        theirs = catalog.open_split(str(folder), split, channels=channels)
        ours = catalog.open_split("tfds:mein_set", split, str(packed), channels=channels)
        assert len(ours) == len(theirs) == count and ours.channels == channels
        assert ours.classes == theirs.classes
        for i in range(count):
            _assert_equal(ours[i], theirs[i])
            assert ours.size(i) == theirs.size(i)


def test_packed_objects_keep_their_areas_and_boxes(tmp_path):
    square = {"image_id": 1, "category_id": 1, "segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]]}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 8, "width": 10}],
        "annotations": [{**square, "area": 7.25, "bbox": [1, 2, 3.5, 4]}, square],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    Image.new("RGB", (10, 8)).save(tmp_path / "a.png")
    dataset = f"coco_json:{tmp_path}"
    assert pack(dataset, tmp_path / "out", name="cats", chosen=["train"], instances=True) == 0
    ours = catalog.open_split("tfds:cats", "train", str(tmp_path / "out"), instances=True)[0]
    theirs = catalog.open_split(dataset, "train", instances=True)[0]
    assert ours["instances"].keys() == theirs["instances"].keys() >= {"areas", "boxes"}
    for key, value in theirs["instances"].items():
        assert ours["instances"][key].dtype == value.dtype
        np.testing.assert_array_equal(ours["instances"][key], value)


def _assert_equal(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys() and ours["name"] == theirs["name"]
    for key in ("image", "label"):
        assert ours[key].dtype == theirs[key].dtype
        np.testing.assert_array_equal(ours[key], theirs[key])


def test_jpegs_are_kept_as_they_are_unless_they_are_turned(folder, packed):
    source = records.Records("mein_set", "train", str(packed))
    stored = [source._record(i)["image"] for i in range(3)]
    assert stored[1] == (folder / "train" / "images" / "01.jpg").read_bytes()
    assert stored[0].startswith(b"\x89PNG") and stored[2].startswith(b"\x89PNG")


def test_names_splits_and_paths(packed, monkeypatch):
    assert catalog.splits("tfds:mein_set", str(packed)) == ["train", "val"]
    assert catalog.classes("tfds:mein_set", str(packed)).names == ("sky", "road", "car")
    for name in (f"tfds:{packed}/mein_set", f"tfds:{packed}/mein_set/1.0.0"):
        assert len(catalog.open_split(name, "val")) == 2
    monkeypatch.setenv("TFDS_DATA_DIR", str(packed))
    assert len(catalog.open_split("tfds:mein_set", "val")) == 2
    assert "tensorflow" not in sys.modules


def test_the_newest_version_is_read(packed, tmp_path):
    for version in ("1.2.0", "1.10.0"):
        (tmp_path / "set" / version).mkdir(parents=True)
        (tmp_path / "set" / version / "dataset_info.json").touch()
    assert records.locate("set", str(tmp_path)).name == "1.10.0"


def test_objects_come_back(few_scenes, tmp_path):
    assert (
        main.run(
            [
                "pack",
                "--dataset",
                "shapes",
                "--output",
                str(tmp_path),
                "--splits",
                "val",
                "--instances",
            ]
        )
        == 0
    )
    ours = catalog.open_split("tfds:shapes", "val", str(tmp_path), instances=True)
    theirs = catalog.open_split("shapes", "val", instances=True)
    assert catalog.splits("tfds:shapes", str(tmp_path)) == ["val"]
    assert len(ours) == 8 and ours.classes == theirs.classes
    for i in range(8):
        _assert_equal(ours[i], theirs[i])
        for key, value in theirs[i]["instances"].items():
            assert ours[i]["instances"][key].dtype == value.dtype
            np.testing.assert_array_equal(ours[i]["instances"][key], value)


def test_more_objects_than_one_picture_holds_are_refused_when_they_are_packed(monkeypatch):
    monkeypatch.setattr(records, "MAX_PIXELS", 2 * 35)
    masks = np.random.default_rng(0).integers(0, 2, (17, 5, 7), np.uint8)
    objects = {"masks": masks, "classes": np.ones(17, np.int32), "crowd": np.zeros(17, bool)}
    with pytest.raises(InputError, match="17 objects of .5, 7. pixels .* too many"):
        records.encode_objects(objects, (5, 7))
    few = {key: value[:16] for key, value in objects.items()}
    back = records.decode_objects(records.encode_objects(few, (5, 7)), (5, 7))
    np.testing.assert_array_equal(back["masks"], masks[:16])


def test_an_example_without_objects_has_none_when_it_comes_back():
    none = {
        "masks": np.zeros((0, 5, 7), np.uint8),
        "classes": np.zeros(0, np.int32),
        "crowd": np.zeros(0, bool),
    }
    back = records.decode_objects(records.encode_objects(none, (5, 7)), (5, 7))
    assert back["masks"].shape == (0, 5, 7)


def test_images_that_no_png_can_hold_are_stored_as_numbers(tmp_path):
    source = _Numbers()
    pack_sources(tmp_path, "numbers", {"train": source})
    ours = records.Records("numbers", "train", str(tmp_path), channels=5)
    for i in range(2):
        _assert_equal(ours[i], source[i])


class _Numbers:
    classes, dtype = catalog.classes("isbi2012"), np.dtype(np.float32)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng(index)
        image = rng.uniform(0, 255, (6 + index, 9, 5)).astype(np.float32)
        label = rng.integers(0, 2, image.shape[:2], np.uint8)
        return {"image": image, "label": label, "name": str(index)}


def pack_sources(folder: Path, name: str, sources: dict) -> None:
    from jaxseg.verbs.pack import Packed

    Packed(name, sources, folder).download_and_prepare()


class OxfordIIITPet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Four pictures in the form of a data set of tfds."""

    VERSION = tfds.core.Version("3.2.0")
    name = "oxford_iiit_pet"
    mask = "segmentation_mask"

    def _info(self):
        kinds = tfds.features
        features = {
            "image": kinds.Image(shape=(None, None, 3)),
            self.mask: kinds.Image(shape=(None, None, 1)),
            "label": kinds.ClassLabel(num_classes=37),
            "file_name": kinds.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=kinds.FeaturesDict(features))

    def _split_generators(self, _):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        rng = np.random.default_rng(0)
        for i in range(4):
            trimap = rng.integers(1, 4, (8, 9), np.uint8)
            trimap[0] = 1 + i % 3
            image = rng.integers(0, 256, (8, 9, 3), np.uint8)
            record = {"image": _jpeg(image), self.mask: records.encode_png(trimap)}
            yield f"{i}", {**record, "label": 0, "file_name": f"{i}.jpg"}


def test_a_data_set_of_tfds_is_read_with_the_meaning_of_its_labels(tmp_path):
    builder = OxfordIIITPet(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    source = catalog.open_split("tfds:oxford_iiit_pet", "train", str(tmp_path))
    assert source.classes.names == ("background", "pet") and len(source) == 4
    for i, record in enumerate(builder.as_data_source("train")):
        trimap = record["segmentation_mask"][..., 0]
        np.testing.assert_array_equal(source[i]["label"], np.array([0, 1, 0, 255])[trimap])
        np.testing.assert_array_equal(source[i]["image"], record["image"])


class Unlabelled(OxfordIIITPet, skip_registration=True):
    """The same, with a mask by another name."""

    name = "unlabelled"
    mask = "outline"


class Nameless(OxfordIIITPet, skip_registration=True):
    """The same, with labels that mean nothing known."""

    name = "nameless"
    mask = "annotation"


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        (Unlabelled, "has the features file_name, image, label, outline: needs an image and"),
        (Nameless, "does not name its classes"),
    ],
)
def test_what_has_no_labels_is_an_input_error(builder, message, tmp_path):
    builder(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    with pytest.raises(InputError, match=message):
        catalog.open_split(f"tfds:{builder.name}", "train", str(tmp_path))


def test_what_is_missing_is_an_input_error(packed, folder):
    with pytest.raises(InputError, match="no split 'test' in tfds:mein_set: it has train, val"):
        catalog.open_split("tfds:mein_set", "test", str(packed))
    with pytest.raises(InputError, match='data set "tfds:nothing" not found'):
        catalog.open_split("tfds:nothing", "train", str(packed))
    with pytest.raises(InputError, match="does not tell objects apart"):
        catalog.open_split("tfds:mein_set", "val", str(packed), instances=True)
    with pytest.raises(InputError, match="exists: remove it"):
        pack(str(folder), packed)
    with pytest.raises(InputError, match="needs letters, digits"):
        pack(str(folder), packed, name="7 days")


def test_a_damaged_record_is_an_input_error(packed, monkeypatch):
    source = records.Records("mein_set", "val", str(packed))
    record = source._record(0)
    monkeypatch.setattr(source, "_record", lambda _: {**record, "image": b"not a picture"})
    with pytest.raises(InputError, match=r"cannot read tfds:mein_set/val\[0\]"):
        source[0]
    bad = records.encode_png(np.full((40, 48), 77, np.uint8))
    monkeypatch.setattr(source, "_record", lambda _: {**record, "label": bad})
    with pytest.raises(InputError, match=r"val\[0\] holds ids 77 \(1920 pixels\)"):
        source[0]
    small = records.encode_png(np.zeros((4, 5), np.uint8))
    monkeypatch.setattr(source, "_record", lambda _: {**record, "label": small})
    with pytest.raises(InputError, match=r"an image \[40, 48, 3\] and a label \[4, 5\]"):
        source[0]
    assert source.size(0) == (4, 5)  # as it was read
    again = records.Records("mein_set", "val", str(packed))
    monkeypatch.setattr(again, "_record", lambda _: {**record, "label": b"not a picture"})
    for read in (again.size, again.__getitem__):
        with pytest.raises(InputError, match=r"cannot read tfds:mein_set/val\[0\]"):
            read(0)


@pytest.mark.parametrize(
    "damage", [{"masks": b"not a picture"}, {"masks": records.encode_png(np.zeros((3, 3), bool))}]
)
def test_damaged_objects_are_an_input_error(packed, monkeypatch, damage):
    source = records.Records("mein_set", "val", str(packed))
    record = {**source._record(0), "classes": np.zeros(1, np.int32), **damage}
    monkeypatch.setattr(source, "instances", True)
    monkeypatch.setattr(source, "_record", lambda _: record)
    with pytest.raises(InputError, match=r"cannot read tfds:mein_set/val\[0\]"):
        source[0]


def test_the_size_of_a_record_is_read_once(packed, monkeypatch):
    source = records.Records("mein_set", "val", str(packed))
    source[0]
    first = source.size(1)
    monkeypatch.setattr(source, "_record", None)
    assert source.size(1) == first and source.size(0) == (40, 48)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_of_16_bits_is_scaled_as_from_a_file(channels):
    values = np.array([[0, 1, 256], [257, 4095, 65535]], np.uint16)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    image = records.decode_image(file.getvalue(), channels, Path("x"))
    assert image.shape == (2, 3, channels) and image.dtype == np.float32
    np.testing.assert_array_equal(image[..., 0], values.astype(np.float32) / 257)


@pytest.mark.slow
def test_packed_data_travel_to_worker_processes(folder, packed):
    data = default().data
    data.update(crop=(16, 18), scale=(0.5, 2.0), photometric=True)
    source = catalog.open_split("tfds:mein_set", "train", str(packed))
    found = []
    for workers in (0, 1):
        data.workers = workers
        stream = pipeline.train_batches(source, data, batch=4, seed=3)
        with contextlib.closing(stream):
            found.append([np.array(next(stream)["image"]) for _ in range(3)])
    np.testing.assert_array_equal(*found)


def test_a_classes_json_names_the_classes_of_a_data_set_that_does_not(tmp_path):
    builder = Nameless(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    content = {"names": ["pet", "ground"], "values": [1, 2], "ignore": [3]}
    Path(builder.data_dir, "classes.json").write_text(json.dumps(content))
    source = catalog.open_split("tfds:nameless", "train", str(tmp_path))
    assert source.classes.names == ("pet", "ground")
    for i, record in enumerate(builder.as_data_source("train")):
        trimap = record["annotation"][..., 0]
        np.testing.assert_array_equal(source[i]["label"], np.array([0, 0, 1, 255])[trimap])


def test_splits_of_8_and_16_bits_are_packed_as_one_type(tmp_path, write_folder):
    folder = write_folder(tmp_path / "mine", size=(8, 9), train=2, val=2)
    deep = np.arange(72, dtype=np.uint16).reshape(8, 9) * 300
    for name in ("00", "01"):
        Image.fromarray(deep).save(folder / f"val/images/{name}.png")
    assert pack(str(folder), tmp_path / "packed", channels=1) == 0
    for split in ("train", "val"):
        ours = catalog.open_split("tfds:mine", split, str(tmp_path / "packed"), channels=1)
        theirs = catalog.open_split(str(folder), split, channels=1)
        for i in range(2):
            assert ours[i]["image"].dtype == np.float32
            np.testing.assert_array_equal(ours[i]["image"], theirs[i]["image"])


def test_soft_masks_are_packed(tmp_path):
    for part, values in (("images", np.zeros((6, 8, 3))), ("alphas", np.arange(48).reshape(6, 8))):
        (tmp_path / "mine/train" / part).mkdir(parents=True)
        picture = Image.fromarray(values.astype(np.uint8) * 5)
        picture.save(tmp_path / "mine/train" / part / "a.png")
    (tmp_path / "mine/classes.json").write_text('{"names": ["background", "person"]}')
    assert pack(str(tmp_path / "mine"), tmp_path / "packed") == 0
    ours = catalog.open_split("tfds:mine", "train", str(tmp_path / "packed"))[0]
    theirs = catalog.open_split(str(tmp_path / "mine"), "train")[0]
    np.testing.assert_array_equal(ours["alpha"], theirs["alpha"])
    np.testing.assert_array_equal(ours["label"], theirs["label"])


def test_a_bad_example_stops_packing_with_one_message(tmp_path, write_folder):
    folder = write_folder(tmp_path / "mine", size=(8, 9), train=3, val=1)
    (folder / "train/images/01.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"^cannot read image .*01\.png \(0 bytes\)"):
        pack(str(folder), tmp_path / "packed")
    assert not (tmp_path / "packed/mine/1.0.0").exists()
