"""Batches: their contract, and a stream that depends on the seed and the position alone."""

import contextlib
import gc
import itertools
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from processes import memory, readers, shared

from jaxseg.config import check, default
from jaxseg.data import pipeline
from jaxseg.data.borders import border_weights
from jaxseg.data.colours import IGNORE, Classes, voc_palette
from jaxseg.data.objects import bounds
from jaxseg.errors import InputError

KEYS = ("image", "label", "valid", "size", "index", "name")
SIZES = [(12, 16), (20, 9), (12, 16), (12, 16), (7, 7), (20, 9), (12, 16)]


class Numbers:
    """Example i is an image of value i, with label i in its top half; `bad` ones raise."""

    channels, classes, dtype = 3, tuple("abcdefg"), np.dtype(np.uint8)

    def __init__(self, sizes: list[tuple[int, int]] = ((20, 24),) * 7, bad: int = -1):
        self.sizes, self.bad = sizes, bad

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> dict:
        if index == self.bad:
            raise InputError(f"mask {index} is bad")
        label = np.zeros(self.sizes[index], np.uint8)
        label[: self.sizes[index][0] // 2] = index
        image = np.full((*self.sizes[index], 3), index, np.uint8)
        return {"image": image, "label": label, "name": str(index)}

    def size(self, index: int) -> tuple[int, int]:
        return self.sizes[index]


def _data(**fields) -> ConfigDict:
    data = default().data
    data.update(crop=(16, 18), **fields)
    return data


def _first(count: int, *, data: ConfigDict | None = None, batch: int = 4, seed: int = 5, **options):
    stream = pipeline.train_batches(Numbers(), data or _data(), batch=batch, seed=seed, **options)
    with contextlib.closing(stream):
        return [
            {key: value.copy() for key, value in item.items()}
            for item in itertools.islice(stream, count)
        ]


def _order(batches: list[dict]) -> list[int]:
    """The positions in the source: no pixel of these images is anything else."""
    return [int(image[0, 0, 0]) for item in batches for image in item["image"]]


def _assert_equal(ours: list[dict], theirs: list[dict]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_a_training_batch_has_its_keys_shapes_and_types():
    for item in _first(3):
        assert set(item) == {"image", "label", "valid"}
        assert item["image"].shape == (4, 16, 18, 3) and item["image"].dtype == np.uint8
        assert item["label"].shape == (4, 16, 18) and item["label"].dtype == np.int32
        assert item["valid"].shape == (4,) and item["valid"].dtype == bool and item["valid"].all()


def test_a_border_weight_adds_the_map_of_the_augmented_label():
    (item,) = _first(1, data=_data(border_weight=10.0, border_class=3))
    assert item["weight"].shape == item["label"].shape and item["weight"].dtype == np.float32
    for label, weight in zip(item["label"], item["weight"], strict=True):
        np.testing.assert_array_equal(weight, border_weights(label, 3, 10.0, 5.0))


def test_label_and_image_of_a_batch_are_of_one_example():
    data = _data()
    data.crop = (20, 24)
    for item in _first(4, data=data):
        np.testing.assert_array_equal(item["label"][:, 0, 0], item["image"][:, 0, 0, 0])


def test_each_epoch_sees_each_example_once_in_another_order():
    order = _order(_first(14, batch=2))
    epochs = [order[k : k + 7] for k in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    assert any(epoch != list(range(7)) for epoch in epochs)


def test_a_batch_may_be_larger_than_the_source():
    order = _order(_first(2, batch=14))
    assert sorted(order[:7]) == sorted(order[7:14]) == list(range(7))


def test_epochs_are_augmented_anew():
    data = _data(scale=(0.5, 2.0), photometric=True)
    batches = _first(10, data=data, batch=7)
    images = [
        item["image"][k] for item in batches for k in range(7) if (item["label"][k] == 3).any()
    ]
    assert len({image.tobytes() for image in images}) > len(images) // 2


def test_another_seed_is_another_stream():
    assert _order(_first(5)) == _order(_first(5))
    assert _order(_first(5)) != _order(_first(5, seed=6))


def test_the_stream_is_the_same_for_any_number_of_threads():
    fields = {"scale": (0.5, 2.0), "photometric": True}
    _assert_equal(
        _first(6, data=_data(threads=1, **fields)), _first(6, data=_data(threads=4, **fields))
    )


def test_the_stream_is_the_same_from_a_worker_process():
    fields = {"scale": (0.5, 2.0), "photometric": True}
    _assert_equal(_first(5, data=_data(**fields)), _first(5, data=_data(workers=1, **fields)))


@pytest.mark.slow
def test_fifteen_hundred_batches_of_two_workers_leak_nothing():
    seen = []
    source, data = Numbers([(300, 300)] * 40), _data(workers=2, scale=(0.8, 1.25))
    data.crop = (256, 256)
    with contextlib.closing(pipeline.train_batches(source, data, batch=8, seed=5)) as stream:
        for number, batch in zip(range(1501), stream, strict=False):
            assert batch["image"].shape == (8, 256, 256, 3)
            if number in (100, 1500):
                seen.append([memory(), *map(memory, readers())])
                files = shared().union(*map(shared, readers()))
    del stream, batch
    gc.collect()
    deadline = time.monotonic() + 30  # threads of grain remove them
    while time.monotonic() < deadline and any(Path(file).exists() for file in files):
        time.sleep(0.1)
    assert files and not any(Path(file).exists() for file in files)
    before, used = seen
    assert len(used) == 3
    assert abs(used[0] - before[0]) <= 0.05 * before[0], (before, used)
    assert all(b <= 1.15 * a for a, b in zip(before[1:], used[1:], strict=True)), (before, used)


@pytest.mark.slow
def test_the_stream_is_the_same_for_any_number_of_workers_and_processes():
    fields = {"scale": (0.5, 2.0), "photometric": True, "rotate": 10.0, "elastic": 2.0}
    whole = _first(4, data=_data(**fields))
    for workers, count in ((1, 1), (2, 1), (4, 1), (0, 2), (0, 4), (2, 2)):
        data = _data(workers=workers, **fields)
        parts = [_first(4, data=data, process=(p, count)) for p in range(count)]
        _assert_joined(whole, parts)


def _assert_joined(whole: list[dict], parts: list[list[dict]]) -> None:
    """The shares of the processes, dealt one by one, are the batches of a single one."""
    for one, *shares in zip(whole, *parts, strict=True):
        for key, value in one.items():
            joined = np.stack([share[key] for share in shares], axis=1).reshape(value.shape)
            np.testing.assert_array_equal(joined, value)


@pytest.mark.parametrize("start", [1, 2, 9])
def test_starting_at_k_continues_the_stream_at_batch_k(start):
    fields = {"scale": (0.5, 2.0), "photometric": True}
    whole = _first(12, data=_data(**fields))
    _assert_equal(whole[start:], _first(12 - start, data=_data(**fields), start=start))


@pytest.mark.parametrize("start", [0, 3])
def test_two_processes_share_the_batches_of_one(start):
    data = _data(scale=(0.5, 2.0), photometric=True)
    whole = _first(5, data=data, start=start)
    _assert_joined(whole, [_first(5, data=data, start=start, process=(p, 2)) for p in range(2)])


@pytest.mark.parametrize("resize", [(0, 0), (36, 30)])
def test_the_device_is_given_whole_images_of_one_shape_with_their_sizes(resize):
    data = _data(augment_on="device", resize=resize, scale=(0.5, 2.0), photometric=True)
    source = Numbers(SIZES)
    stream = pipeline.train_batches(source, data, batch=7, seed=5)
    with contextlib.closing(stream):
        item = next(stream)
    fits = [min(36 / max(s), 30 / min(s)) if any(resize) else 1 for s in SIZES]
    sizes = [tuple(round(n * fit) for n in s) for s, fit in zip(SIZES, fits, strict=True)]
    shape = tuple(np.max(sizes, axis=0))
    assert pipeline.stage_shape(source, data) == shape
    assert set(item) == {"image", "label", "valid", "size", "position"}
    assert item["position"].tolist() == list(range(7)) and item["position"].dtype == np.uint32
    assert item["image"].shape == (7, *shape, 3) and item["image"].dtype == np.uint8
    assert item["label"].shape == (7, *shape) and item["label"].dtype == np.int32
    for image, label, (height, width) in zip(
        item["image"], item["label"], item["size"], strict=True
    ):
        index = int(image[0, 0, 0])
        assert (height, width) == sizes[index]
        assert (image[:height, :width] == index).all()
        assert (label[:height, :width] != IGNORE).all()
        assert (label[height:] == IGNORE).all() and (label[:, width:] == IGNORE).all()


def test_a_function_of_ones_own_sees_what_the_device_is_given(monkeypatch):
    module = types.ModuleType("my_transforms")
    module.invert = lambda image, label: (255 - image, label)
    monkeypatch.setitem(sys.modules, "my_transforms", module)
    data = _data(augment_on="device", transform="my_transforms:invert")
    plain = _first(2, data=_data(augment_on="device"))
    for one, other in zip(plain, _first(2, data=data), strict=True):
        np.testing.assert_array_equal(one["image"], 255 - other["image"])


def test_objects_are_pasted_from_other_examples_of_the_source():
    class Objects(Numbers):
        def __getitem__(self, index: int) -> dict:
            example = super().__getitem__(index)
            mask = np.zeros((1, 20, 24), np.uint8)
            mask[0, 5:15, 5:15] = 1
            objects = {"masks": mask, "classes": np.int32([index]), "crowd": np.array([False])}
            return {**example, "instances": objects}

    data = _data(copy_paste=1.0)
    data.crop = (20, 24)
    stream = pipeline.train_batches(Objects(), data, batch=7, seed=5)
    with contextlib.closing(stream):
        item = next(stream)
    assert set(item) == {"image", "label", "valid"}
    mixed = [len(np.unique(image)) for image in item["image"]]
    assert max(mixed) == 2 and min(mixed) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_example_is_an_input_error_through_threads_and_processes(workers):
    stream = pipeline.train_batches(Numbers(bad=3), _data(workers=workers), batch=4, seed=5)
    with contextlib.closing(stream), pytest.raises(InputError, match="mask 3 is bad"):
        for _ in range(3):
            next(stream)


class Objects(Numbers):
    """Example i has i objects of class 1, each a column, and one of class 2, which is no thing."""

    instances = True
    classes = Classes(tuple("abcdefg"), voc_palette(7), (1,))

    def __getitem__(self, index: int) -> dict:
        example = super().__getitem__(index)
        masks = np.zeros((index + 1, *example["label"].shape), np.uint8)
        for i in range(index + 1):
            masks[i, :, 2 * i : 2 * i + 2] = 1
        classes, crowd = np.ones(index + 1, np.int32), np.zeros(index + 1, bool)
        classes[index] = 2
        example["instances"] = {"masks": masks, "classes": classes, "crowd": crowd}
        return example


@pytest.mark.parametrize("crop", [(16, 18), (20, 24)])
def test_objects_come_in_slots_aligned_with_the_image(caplog, crop):
    data = _data(objects=4)
    data.crop = crop
    with contextlib.closing(pipeline.train_batches(Objects(), data, batch=7, seed=1)) as stream:
        batch = next(stream)
    assert set(batch) == {"image", "label", "valid", "masks", "classes", "boxes", "crowd"}
    assert batch["masks"].shape == (7, 4, *crop) and batch["boxes"].shape == (7, 4, 4)
    for k, i in enumerate(batch["image"][:, 0, 0, 0].tolist()):
        held = batch["classes"][k] >= 0
        assert (batch["classes"][k][held] == 1).all() and held.sum() <= min(i, 4)
        assert (batch["masks"][k].any((1, 2)) == held).all()
        np.testing.assert_array_equal(batch["boxes"][k], bounds(batch["masks"][k]))
        assert not batch["masks"][k][:, batch["label"][k] == IGNORE].any()
    if crop == (20, 24):  # all of every image
        assert (batch["classes"] >= 0).sum() == 1 + 2 + 3 + 4 + 4 + 4
        said = [record.getMessage() for record in caplog.records]
        assert "data.objects is 4, and an image has" in said[0]
        assert "data.objects is 4: 3 objects of 2 images were dropped" in said[1]


def test_objects_without_a_pixel_are_dropped_and_counted(caplog):
    """Not those that augmentation cuts away, and not those of no thing."""

    class Degenerate(Objects):
        def __getitem__(self, index: int) -> dict:
            example = super().__getitem__(index)
            example["instances"]["masks"][: min(index, 2)] = 0
            example["instances"]["masks"][index] = 0
            return example

    data = _data(objects=9)
    for crop in ((20, 24), (16, 8)):
        data.crop = crop
        caplog.clear()
        stream = pipeline.train_batches(Degenerate(), data, batch=7, seed=1)
        with contextlib.closing(stream):
            batch = next(stream)
        assert "empty" not in batch and (batch["classes"] >= 0).sum() <= 1 + 2 + 3 + 4
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 2 and "an image has 2 objects without a pixel, which" in said[0]
        assert "11 objects of 6 images were dropped, which have no pixel" in said[1]
    assert (batch["classes"] >= 0).sum() < 1 + 2 + 3 + 4


def test_the_device_deals_no_objects():
    config = default()
    config.data.update(objects=4, augment_on="device")
    with pytest.raises(InputError, match="data.objects is 4: needs its default where data.augment"):
        check(config)


def test_evaluation_carries_the_truth_beside_what_goes_to_the_device():
    sizes = [(12, 16), (20, 9), (12, 16)]
    for item in _all(Objects(sizes), batch=2, resize=(8, 6), fill=(7, 8, 9), shapes=[(8, 9)] * 3):
        for image, label, size, index, truth in zip(
            *(item[key] for key in ("image", "label", "size", "index", "truth")), strict=True
        ):
            if index < 0:
                assert truth is None
                continue
            assert tuple(size) == ((6, 8) if sizes[index] == (12, 16) else (8, 4))
            assert (image[: size[0], : size[1]] == index).all()
            assert (image[size[0] :] == (7, 8, 9)).all() and (
                image[:, size[1] :] == (7, 8, 9)
            ).all()
            assert (label[: size[0], : size[1]] != IGNORE).all()
            assert truth["label"].shape == sizes[index]
            assert len(truth["instances"]["masks"]) == index + 1


def _all(source: Numbers, **options) -> list[dict]:
    return list(pipeline.eval_batches(source, **options))


def test_all_processes_evaluate_batches_of_one_type():
    """Also the one that holds no image of the last batch."""
    source = Numbers(SIZES[:1])
    source.dtype = np.dtype(np.float32)
    kinds = [_all(source, batch=2, process=(p, 2))[0]["image"].dtype for p in range(2)]
    assert kinds == [np.float32] * 2


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_evaluation_sees_every_example_once_at_its_own_size(batch):
    source, seen = Numbers(SIZES), []
    for item in _all(source, batch=batch):
        assert set(item) == {"image", "label", "valid", "size", "index", "name"}
        assert item["image"].dtype == np.uint8 and item["label"].dtype == np.int32
        assert item["valid"].dtype == bool
        assert len(item["image"]) == len(item["label"]) == len(item["valid"]) == batch
        assert item["size"].dtype == np.int32 and item["index"].dtype == np.int32
        for image, label, valid, size, index, name in zip(
            *(item[key] for key in KEYS), strict=True
        ):
            assert valid == (index >= 0)
            if valid:
                seen.append(int(index))
                np.testing.assert_array_equal(image, source[index]["image"])
                np.testing.assert_array_equal(label, source[index]["label"])
                assert name == str(index) and tuple(size) == SIZES[index]
            else:
                assert (label == IGNORE).all()
    assert sorted(seen) == list(range(len(SIZES)))


def test_evaluation_fills_batches_only_where_a_size_runs_out():
    fills = [int((item["index"] < 0).sum()) for item in _all(Numbers(SIZES), batch=3)]
    assert sorted(fills) == [0, 1, 2, 2]  # four, two and one images of a size


def test_examples_are_extended_to_the_shapes_asked_for():
    source = Numbers(SIZES)
    shapes = [(20, 16) if size != (7, 7) else (7, 30) for size in SIZES]
    seen = []
    for item in _all(source, batch=2, shapes=shapes):
        assert item["image"].shape[1:3] == item["label"].shape[1:] and item["size"].shape == (2, 2)
        for image, label, (height, width), index in zip(
            *(item[key] for key in ("image", "label", "size", "index")), strict=True
        ):
            if index < 0:
                continue
            seen.append(int(index))
            assert label.shape == shapes[index] and (height, width) == SIZES[index]
            np.testing.assert_array_equal(label[:height, :width], source[index]["label"])
            assert (label[height:] == IGNORE).all() and (label[:, width:] == IGNORE).all()
            assert (image == index).all()
    assert sorted(seen) == list(range(len(SIZES)))


def test_an_image_is_extended_by_its_mirror_image_below_and_to_the_right():
    image = np.arange(2 * 3 * 1, dtype=np.uint8).reshape(2, 3, 1)
    extended = pipeline.extend(image, (5, 7))[..., 0]
    rows, columns = [0, 1, 1, 0, 0], [0, 1, 2, 2, 1, 0, 0]
    np.testing.assert_array_equal(extended, image[..., 0][np.ix_(rows, columns)])


def test_images_of_more_than_eight_bits_keep_their_fractions():
    class Fine(Numbers):
        dtype = np.dtype(np.float32)

        def __getitem__(self, index: int) -> dict:
            example = super().__getitem__(index)
            return {**example, "image": example["image"] + np.float32(0.25)}

    (item,) = _all(Fine([(3, 4)] * 2), batch=2)
    assert item["image"].dtype == np.float32 and (item["image"] % 1 == 0.25).all()


def test_evaluation_is_the_same_for_any_number_of_threads():
    _assert_equal(
        _all(Numbers(SIZES), batch=2, threads=1), _all(Numbers(SIZES), batch=2, threads=4)
    )


def test_two_processes_share_the_evaluation():
    whole = _all(Numbers(SIZES), batch=4)
    parts = [_all(Numbers(SIZES), batch=4, process=(p, 2)) for p in range(2)]
    assert len(whole) == len(parts[0]) == len(parts[1])
    for one, *shares in zip(whole, *parts, strict=True):
        assert {share["image"].shape for share in shares} == {(2, *one["image"].shape[1:])}
        joined = np.stack([share["index"] for share in shares], axis=1).ravel()
        np.testing.assert_array_equal(joined, one["index"])


def test_a_bad_example_is_an_input_error_in_evaluation():
    with pytest.raises(InputError, match="mask 3 is bad"):
        _all(Numbers(SIZES, bad=3), batch=2)
