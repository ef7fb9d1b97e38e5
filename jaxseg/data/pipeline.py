"""From a source to batches: shuffled, augmented, sharded and prefetched by grain."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from jaxseg.data.borders import border_weights
from jaxseg.data.colours import IGNORE
from jaxseg.data.transforms import augment, fitted, fitted_size, own_transform, pad
from jaxseg.errors import InputError


class _Augment(grain.transforms.RandomMap):
    """One example of a training batch: image [h,w,C], label int32 [h,w], valid; with
    data.border_weight also weight, and from soft masks alpha, both float32 [h,w]."""

    def __init__(self, source: Sequence[dict], data: ConfigDict):
        self.source, self.data = source, data

    def random_map(self, example: dict, rng: np.random.Generator) -> dict:
        classes = len(self.source.classes) if self.data.transform else IGNORE
        example = augment(example, rng, self.data, self.another, classes)
        label = example["label"].astype(np.int32)
        batch = {"image": example["image"], "label": label, "valid": np.bool_(True)}
        if self.data.border_weight:
            how = (self.data.border_class, self.data.border_weight, self.data.border_sigma)
            batch["weight"] = border_weights(label, *how)
        if "alpha" in example:
            batch["alpha"] = np.ascontiguousarray(example["alpha"])
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
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=data.workers))
    return iter(stream)


def eval_batches(
    source: Sequence[dict],
    *,
    batch: int,
    shapes: Sequence[tuple[int, int]] = (),
    threads: int = 2,
    process: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in batches of one shape each, filled up where examples run out.

    shapes: the (height, width) that each example is extended to, its own size by default: the image
    by mirroring, the label by 255. Beside `image`, `label` and `valid` a batch has the examples'
    `size` [B,2] before that, their `index` [B] in the source, and `name` [B]; from soft masks also
    `alpha` [B,H,W]. An index of -1 marks a filling example, all ignored and not valid.
    """
    by_shape: dict[tuple[int, int], list[int]] = {}
    for i in range(len(source)):
        by_shape.setdefault(shapes[i] if shapes else source.size(i), []).append(i)
    groups = []
    for shape, members in by_shape.items():
        members += [-1] * (-len(members) % batch)
        for k in range(0, len(members), batch):
            groups.append((shape, members[k : k + batch][process[0] :: process[1]]))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    load = partial(_load, source=source)
    stream = grain.MapDataset.source(groups).map(load).to_iter_dataset(options)
    with contextlib.closing(iter(stream)) as batches:  # its threads end with the caller's interest
        yield from batches


def extend(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """image [h,w,C] -> [*shape,C]: mirrored at its lower and right border, again and again."""
    pads = [(0, n - h) for n, h in zip(shape, image.shape[:2], strict=True)]
    if image.shape[:2] == tuple(shape):  # without a copy
        return image
    return np.pad(image, [*pads, (0, 0)], mode="symmetric")


def _load(group: tuple, source: Sequence[dict]) -> dict[str, np.ndarray]:
    shape, index = group
    index = np.array(index, np.int32)
    examples = {k: source[i] for k, i in enumerate(index) if i >= 0}
    dtype = np.result_type(np.uint8, *(example["image"] for example in examples.values()))
    image = np.zeros((len(index), *shape, source.channels), dtype)
    label = np.full((len(index), *shape), IGNORE, np.int32)
    size = np.tile(np.int32(shape), (len(index), 1))
    name = np.full(len(index), "", object)
    soft = getattr(source, "soft", False)
    alpha = np.zeros(label.shape, np.float32) if soft else None
    for k, example in examples.items():
        height, width = size[k] = example["label"].shape
        if (height, width) != source.size(index[k]):
            raise InputError(
                f"{example['name']} has {(height, width)} pixels (height, width), but its header "
                f"says {source.size(index[k])}: the file is damaged. Export it again"
            )
        image[k] = extend(example["image"], shape)
        label[k, :height, :width], name[k] = example["label"], example["name"]
        if soft:
            alpha[k, :height, :width] = example["alpha"]
    batch = {"image": image, "label": label, "valid": index >= 0}
    batch |= {"alpha": alpha} if soft else {}
    return {**batch, "size": size, "index": index, "name": name}
