"""Sources: the policy for bad examples, shares of a data set without splits, the embedded set."""

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxseg.data import catalog, shapes, sources
from jaxseg.data.pipeline import train_batches
from jaxseg.data.sources import Files, Listing, Shapes, SkipBad, numbered_objects, objects, part
from jaxseg.errors import InputError
from jaxseg.train import train
from jaxseg.workdir import load_config


class _Numbers:
    """A source of pictures of their own number, some of which cannot be read."""

    classes, channels = Shapes.classes, 1

    def __init__(self, count: int, bad: set[int]):
        self.count, self.bad, self.reads = count, bad, []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        self.reads.append(index)
        if index in self.bad:
            raise InputError(f"cannot read image {index}.jpg")
        label = np.full((4, 4), index % 8, np.uint8)
        return {"image": np.full((4, 4, 1), index % 251, np.uint8), "label": label, "name": "x"}

    def size(self, index: int) -> tuple[int, int]:
        return 4, 4


def test_a_bad_example_becomes_the_next_good_one(caplog):
    source = SkipBad(_Numbers(3000, {7, 8, 2999}))
    with caplog.at_level(logging.WARNING):
        assert [int(source[i]["image"][0, 0, 0]) for i in (6, 7, 8, 9, 2999)] == [6, 9, 9, 9, 0]
    assert sorted(source.bad) == [7, 8, 2999] and len(caplog.records) == 3
    assert "cannot read image 8.jpg" in caplog.text
    before = len(source.source.reads)
    source[7]
    assert source.source.reads[before:] == [9]  # what is known to be bad is not read again
    assert (len(source), source.size(0), source.channels) == (3000, (4, 4), 1)


def test_more_than_a_thousandth_of_bad_examples_stop_the_run():
    source = SkipBad(_Numbers(2000, {1, 5, 9}))
    source[1], source[5]
    pattern = r"3 of 2000 examples cannot be read, more than 0\.1%.*check.*The last: .* 9\.jpg"
    with pytest.raises(InputError, match=pattern):
        source[9]
    with pytest.raises(InputError, match="1 of 999 examples"):
        SkipBad(_Numbers(999, {1}))[1]


def test_only_the_first_20_are_named(caplog):
    source = SkipBad(_Numbers(30_000, set(range(0, 60, 2))))
    with caplog.at_level(logging.WARNING):
        for i in range(60):
            source[i]
    assert len(source.bad) == 30 and len(caplog.records) == SkipBad.NAMED == 20


def test_the_stream_is_the_same_whoever_reads_it(crops):
    bad = {3, 4, 500, 1999}

    def batches(start: int, process: tuple[int, int]) -> list[np.ndarray]:
        stream = train_batches(
            SkipBad(_Numbers(4000, bad)), crops, batch=8, seed=1, start=start, process=process
        )
        return [next(stream)["image"] for _ in range(3)]

    whole = batches(500, (0, 1))
    halves = [batches(500, (k, 2)) for k in range(2)]
    for one, left, right in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(one[0::2], left)
        np.testing.assert_array_equal(one[1::2], right)


@pytest.fixture
def crops():
    """Section `data` of a config whose augmentation takes the images as they are."""
    from jaxseg.config import default

    data = default().data
    with data.unlocked():
        data.crop, data.flip, data.channels = (4, 4), False, 1
        data.mean, data.std = (0.0,), (1.0,)
    return data


def test_a_listing_needs_images_and_objects_where_they_are_asked_for():
    empty = Listing([], [], np.asarray)
    with pytest.raises(InputError, match="no images"):
        Files(empty, Shapes.classes)


def test_sources_travel_to_other_processes(tmp_path, write_folder):
    folder = write_folder(tmp_path / "mine", size=(8, 9), train=1, val=1)
    source = catalog.open_split(str(folder), "train")
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[0]["label"], source[0]["label"])


def test_a_missing_image_is_named(tmp_path, write_folder):
    folder = write_folder(tmp_path / "mine", size=(8, 9), train=3, val=1)
    source = catalog.open_split(str(folder), "train")
    (folder / "train/images/02.png").unlink()
    with pytest.raises(InputError, match=r"no image .*02\.png"):
        source[2]
    listing = Listing(source.images, source.labels, source.read_label)
    with pytest.raises(InputError, match=r"1 of 3 images are missing, such as .*02\.png"):
        Files(listing, source.classes)


def test_every_fifth_is_val():
    items = list(range(12))
    assert part(items, "val") == [4, 9] and part(items, "all") == items
    assert sorted(part(items, "train") + part(items, "val")) == items


def test_objects_take_the_class_of_most_of_their_pixels():
    numbers = np.array([[0, 5, 5], [5, 9, 9], [7, 7, 7]])
    label = np.array([[1, 2, 2], [3, 255, 255], [255, 4, 255]], np.uint8)
    found = numbered_objects(numbers, label)
    assert found["classes"].tolist() == [2, 4] and not found["crowd"].any()
    assert found["masks"].reshape(2, 9).tolist() == [
        [0, 1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 1, 1],
    ]
    none = objects([], [], [], (4, 5))
    assert none["masks"].shape == (0, 4, 5) and none["classes"].dtype == np.int32


def test_the_splits_of_shapes_are_different_scenes():
    seeds = [Shapes(split).seed for split in ("train", "val", "test")]
    assert len(set(seeds)) == 3
    assert [len(Shapes(s)) for s in ("train", "val", "test")] == [2048, 256, 256]
    train, val = Shapes("train")[0], Shapes("val")[0]
    assert (train["image"] != val["image"]).any() and train["name"] == val["name"] == "00000"
    with pytest.raises(InputError, match="no split 'dev' in shapes: it has train, val, test"):
        Shapes("dev")


def test_shapes_have_examples_like_a_folder():
    source = Shapes("val")
    example = source[5]
    assert set(example) == {"image", "label", "name"}
    assert example["image"].dtype == example["label"].dtype == np.uint8
    assert example["image"].shape[:2] == example["label"].shape == source.size(5)
    assert example["label"].max() < len(source.classes)


def test_the_objects_of_shapes_are_those_of_the_scene():
    example = Shapes("val", instances=True)[3]
    found, scene = example["instances"], shapes.scene(1, 3)
    np.testing.assert_array_equal(found["masks"], scene["masks"])
    np.testing.assert_array_equal(found["classes"], scene["classes"])
    painted = (found["masks"] * found["classes"][:, None, None]).sum(axis=0)
    np.testing.assert_array_equal(painted, example["label"])
    assert not found["crowd"].any() and len(found["crowd"]) == len(found["classes"])
    assert Shapes.classes.things == tuple(range(1, 8))


def test_a_second_thread_never_sees_half_an_example(monkeypatch):
    """It may ask for one while the first thread still makes its objects."""
    source, seen = Shapes("val", instances=True), []
    monkeypatch.setattr(sources, "objects", lambda *_: seen.append(dict(source.kept)))
    source[3]
    assert seen == [{}] and "instances" in source.kept[3]


def test_shapes_in_grey_are_the_same_scenes():
    colour, grey = Shapes("val", 3)[2], Shapes("val", 1)[2]
    assert grey["image"].shape == (*colour["label"].shape, 1)
    expected = colour["image"] @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(grey["image"][..., 0], expected, atol=1)
    np.testing.assert_array_equal(grey["label"], colour["label"])


@pytest.mark.slow
def test_training_follows_the_policy(tmp_path, write_folder, tiny_run, monkeypatch):
    folder = write_folder(tmp_path / "mine", Shapes.classes.names, size=(32, 32), train=8, val=1)
    (folder / "train/images/05.png").write_bytes(b"")
    config = load_config(tiny_run).unlock()
    config.data.dataset = str(folder)
    with pytest.raises(InputError, match=r"cannot read image .*05\.png \(0 bytes\)"):
        train(config.copy_and_resolve_references().lock(), tmp_path / "stopped")
    config.data.on_bad_example = "skip"
    monkeypatch.setattr(SkipBad, "SHARE", 0.2)
    assert train(config.lock(), tmp_path / "run") == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_all_images_of_a_source_have_one_type(tmp_path, write_folder, channels):
    folder = write_folder(tmp_path / "mine", size=(8, 9), train=3, val=1)
    assert catalog.open_split(str(folder), "train", channels=channels).dtype == np.uint8
    grey = np.full((8, 9), 257 * 7, np.uint16)
    Image.fromarray(grey).save(folder / "train/images/02.png")
    source = catalog.open_split(str(folder), "train", channels=channels)
    assert source.dtype == np.float32
    assert {source[i]["image"].dtype for i in range(3)} == {np.dtype(np.float32)}
    assert (source[2]["image"] == 7).all()
    eight = np.asarray(Image.open(folder / "train/images/01.png").convert("RGB"))
    if channels == 3:
        np.testing.assert_array_equal(source[1]["image"], eight)


def test_a_wrong_suffix_does_not_bring_in_another_type(tmp_path, write_folder):
    folder = write_folder(tmp_path / "mine", size=(8, 9), train=2, val=1)
    (folder / "train/images/01.png").unlink()
    picture = Image.fromarray(np.zeros((8, 9), np.uint16))
    picture.save(folder / "train/images/01.jpg", format="PNG")
    with pytest.raises(InputError, match=r"01\.jpg has more than 8 bits"):
        catalog.open_split(str(folder), "train")[1]


def test_objects_of_another_size_than_the_label_are_refused(tmp_path, write_folder):
    words = r"n\.png is \(4, 5\) and the mask of its classes \(4, 6\)"
    with pytest.raises(InputError, match=words):
        numbered_objects(np.zeros((4, 5)), np.zeros((4, 6), np.uint8), path=Path("n.png"))
    source = catalog.open_split(str(write_folder(tmp_path / "mine", size=(8, 9))), "train")
    wrong = objects([np.ones((7, 9))], [1], [False], (7, 9))
    listing = Listing(source.images, source.labels, source.read_label, lambda _: wrong)
    words = r"00\.png are masks of \(7, 9\) and its label is \(8, 9\)"
    with pytest.raises(InputError, match=words):
        Files(listing, source.classes, instances=True)[0]


def test_a_missing_mask_is_named_with_its_image(tmp_path, write_folder):
    source = catalog.open_split(str(write_folder(tmp_path / "mine", size=(8, 9))), "train")
    source.mask(1).unlink()
    with pytest.raises(InputError, match=r"image .*images/01\.png has no mask: needs .*masks/01"):
        source[1]


def test_the_size_of_a_bad_header_is_that_of_the_next(caplog):
    class Sized(_Numbers):
        def size(self, index: int) -> tuple[int, int]:
            if index in self.bad:
                raise InputError(f"cannot read image {index}.jpg")
            return index, index

    source = SkipBad(Sized(3000, {7}))
    assert source.size(6) == (6, 6) and source.size(7) == (8, 8) and source.summary()
    assert source.summary() == "1 of 3000 examples cannot be read: skipped"
    assert SkipBad(Sized(3000, set())).summary() == ""
