"""From a source to batches: shuffled, augmented, sharded and prefetched by grain."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from jaxseg.data.borders import border_weights
from jaxseg.data.colours import IGNORE
from jaxseg.data.feed import end_with_parent
from jaxseg.data.objects import of_classes, slots
from jaxseg.data.transforms import augment, fitted, fitted_size, own_transform, pad
from jaxseg.errors import InputError

_log = logging.getLogger(__name__)


class _Augment(grain.transforms.RandomMap):
    """One example of a training batch: image [h,w,C], label int32 [h,w], valid; with
    data.border_weight also weight, and from soft masks alpha, both float32 [h,w]; with data.objects
    also what `objects.slots` gives of the objects of things, and `empty`, int32: of how many the
    source has no pixel."""

    def __init__(self, source: Sequence[dict], data: ConfigDict):
        self.source, self.data = source, data

    def random_map(self, example: dict, rng: np.random.Generator) -> dict:
        classes = len(self.source.classes) if self.data.transform else IGNORE
        if self.data.objects:
            found, things = example["instances"], self.source.classes.things
            empty = np.isin(found["classes"], things) & ~found["masks"].any((1, 2))
        example = augment(example, rng, self.data, self.another, classes)
        label = example["label"].astype(np.int32)
        batch = {"image": example["image"], "label": label, "valid": np.bool_(True)}
        if self.data.border_weight:
            how = (self.data.border_class, self.data.border_weight, self.data.border_sigma)
            batch["weight"] = border_weights(label, *how)
        if "alpha" in example:
            batch["alpha"] = np.ascontiguousarray(example["alpha"])
        if self.data.objects:
            batch |= slots(of_classes(example["instances"], things), self.data.objects)
            batch["empty"] = np.int32(np.count_nonzero(empty))
        return batch

    def another(self, rng: np.random.Generator) -> dict:
        return self.source[int(rng.integers(len(self.source)))]


class _Stage(grain.transforms.RandomMap):
    """The same, unaugmented, of one fixed size: `size` [2] of it is the image, the rest ignored."""

    def __init__(self, source: Sequence[dict], data: ConfigDict):
        self.source, self.data, self.shape = source, data, stage_shape(source, data)

    def random_map(self, example: dict, rng: np.random.Generator) -> dict:
        if "alpha" in example:
            raise InputError("soft masks need data.augment_on=host: the device does without them")
        example = fitted(example, self.data.resize)
        if self.data.transform:
            example = own_transform(example, self.data.transform, len(self.source.classes), rng)
        size = np.array(example["label"].shape, np.int32)
        example = pad(example, self.shape, self.data.mean)
        label = example["label"].astype(np.int32)
        valid = np.bool_(True)
        return {"image": example["image"], "label": label, "valid": valid, "size": size}


def _place(position: int, example: dict) -> dict:
    """With its position in the stream: uint32, of which a run has enough."""
    return {**example, "position": np.uint32(position % 2**32)}


def stage_shape(source: Sequence[dict], data: ConfigDict) -> tuple[int, int]:
    """The size at which the device is given images: the greatest height and width of the source.

    Measured after data.resize, from the headers of all images.
    """
    sizes = np.array([fitted_size(source.size(i), data.resize) for i in range(len(source))])
    return tuple(sizes.max(axis=0).tolist())


def train_batches(
    source: Sequence[dict],
    data: ConfigDict,
    *,
    batch: int,
    seed: int,
    start: int = 0,
    process: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, np.ndarray]]:
    """This process' share of the batches `start`, `start` + 1, ... of an endless shuffled stream.

    The stream depends on the seed alone, not on threads, workers or processes: examples are
    shuffled and augmented by their global position, then dealt to processes. So the position of
    a run in its data is the number of its steps.

    With data.augment_on = "device" they come as they are, but for data.resize, with their `size`
    [B,2] in images of one greater shape (`stage_shape`) and their `position` [B] in the stream;
    `ops.augment` goes on from there.

    With data.objects = N > 0 a batch also has the objects of each example, after augmentation:
    `masks` uint8 [B,N,H,W], `classes` int32 [B,N] (-1 = empty slot), `boxes` float32 [B,N,4] and
    `crowd` bool [B,N]. Of more than N the smallest are dropped, and all of which the source has no
    pixel, which is said.
    """
    index, count = process
    stream = grain.MapDataset.source(source).shuffle(seed=seed).repeat()
    if data.augment_on == "device":
        stream = stream.random_map(_Stage(source, data), seed=seed).map_with_index(_place)
    else:
        stream = stream.random_map(_Augment(source, data), seed=seed)
    stream = stream[index::count].batch(batch // count, drop_remainder=True)[start:]
    options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=2 * data.threads)
    stream = stream.to_iter_dataset(options)
    if data.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's workers read absl's flags
        how = grain.MultiprocessingOptions(num_workers=data.workers)
        stream = stream.mp_prefetch(how, worker_init_fn=end_with_parent)
    return _counted(iter(stream), data.objects) if data.objects else iter(stream)


def _counted(batches: Iterator[dict], most: int) -> Iterator[dict]:
    """The batches without `dropped` and `empty`, which are added up: said at their first, and in
    all at the end.

    Counted is what this process takes out of its stream.
    """
    said = {
        "dropped": (
            f"data.objects is {most}, and an image has %d more: the smallest are dropped",
            f"data.objects is {most}: %d objects of %d images were dropped, the smallest of each "
            "image",
        ),
        "empty": (
            "an image has %d objects without a pixel, which are dropped; the verb check names it",
            "%d objects of %d images were dropped, which have no pixel",
        ),
    }
    total = {key: np.zeros(2, int) for key in said}  # objects, images
    with contextlib.closing(batches):
        try:
            for batch in batches:
                for key, (first, _) in said.items():
                    count = batch.pop(key)
                    if count.any() and not total[key].any():
                        _log.warning(first + ". How many in all is said at the end", count.max())
                    total[key] += count.sum(), np.count_nonzero(count)
                yield batch
        finally:
            for key, (_, last) in said.items():
                if total[key].any():
                    _log.warning(last, *total[key])


def eval_batches(
    source: Sequence[dict],
    *,
    batch: int,
    shapes: Sequence[tuple[int, int]] = (),
    threads: int = 2,
    process: tuple[int, int] = (0, 1),
    resize: tuple[int, int] = (0, 0),
    fill: Sequence[float] | None = None,
) -> Iterator[dict[str, Any]]:
    """Every example once, in batches of one shape each, filled up where examples run out.

    shapes: the (height, width) that each example is extended to, its own size by default: the image
    by mirroring, or with `fill`, one number a channel, by that; the label by 255. Beside `image`,
    `label` and `valid` a batch has the examples' `size` [B,2] before that, their `index` [B] in the
    source, and `name` [B]; from soft masks also `alpha` [B,H,W]. An index of -1 marks a filling
    example, all ignored and not valid.

    From a source of objects a batch also has `truth`, a list of B examples as they are, without
    their images, None for a filling one; it stays on the host. resize: (long, short side) to fit
    images and labels into before all that, but not the truth.
    """
    by_shape: dict[tuple[int, int], list[int]] = {}
    for i in range(len(source)):
        shape = shapes[i] if shapes else fitted_size(source.size(i), resize)
        by_shape.setdefault(shape, []).append(i)
    groups = []
    for shape, members in by_shape.items():
        members += [-1] * (-len(members) % batch)
        for k in range(0, len(members), batch):
            groups.append((shape, members[k : k + batch][process[0] :: process[1]]))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    load = partial(_load, source=source, resize=resize, fill=fill)
    stream = grain.MapDataset.source(groups).map(load).to_iter_dataset(options)
    with contextlib.closing(iter(stream)) as batches:  # its threads end with the caller's interest
        yield from batches


def extend(
    image: np.ndarray, shape: tuple[int, int], fill: Sequence[float] | None = None
) -> np.ndarray:
    """image [h,w,C] -> [*shape,C]: mirrored at its lower and right border, again and again; with
    `fill`, one number a channel, that is there instead: a mirrored object would be one more."""
    pads = [(0, n - h) for n, h in zip(shape, image.shape[:2], strict=True)]
    if image.shape[:2] == tuple(shape):  # without a copy
        return image
    if fill is not None:
        label = np.empty(image.shape[:2], np.uint8)
        return pad({"image": image, "label": label}, shape, fill)["image"]
    return np.pad(image, [*pads, (0, 0)], mode="symmetric")


def _load(
    group: tuple,
    source: Sequence[dict],
    resize: tuple[int, int],
    fill: Sequence[float] | None,
) -> dict[str, Any]:
    shape, index = group
    index = np.array(index, np.int32)
    examples = {k: source[i] for k, i in enumerate(index) if i >= 0}
    # Of the source's type, so that the batches of all processes are of one.
    image = np.zeros((len(index), *shape, source.channels), source.dtype)
    label = np.full((len(index), *shape), IGNORE, np.int32)
    size = np.tile(np.int32(shape), (len(index), 1))
    name = np.full(len(index), "", object)
    soft = getattr(source, "soft", False)
    alpha = np.zeros(label.shape, np.float32) if soft else None
    truth: list[dict | None] = [None] * len(index)
    for k, example in examples.items():
        if example["label"].shape != source.size(index[k]):
            raise InputError(
                f"{example['name']} has {example['label'].shape} pixels (height, width), but its "
                f"header says {source.size(index[k])}: the file is damaged. Export it again"
            )
        if "instances" in example:
            truth[k] = {key: example[key] for key in ("label", "instances")}
        seen = {key: value for key, value in example.items() if key != "instances"}
        seen = fitted(seen, resize) if any(resize) else seen
        height, width = size[k] = seen["label"].shape
        image[k] = extend(seen["image"], shape, fill)
        label[k, :height, :width], name[k] = seen["label"], example["name"]
        if soft:
            alpha[k, :height, :width] = seen["alpha"]
    batch = {"image": image, "label": label, "valid": index >= 0}
    batch |= {"alpha": alpha} if soft else {}
    batch |= {"truth": truth} if getattr(source, "instances", False) else {}
    return {**batch, "size": size, "index": index, "name": name}
