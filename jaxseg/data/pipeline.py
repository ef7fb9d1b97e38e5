"""From a source to batches: shuffled, augmented, sharded and prefetched by grain."""

from collections.abc import Iterator, Sequence
from functools import partial

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from jaxseg.data.colours import IGNORE
from jaxseg.data.transforms import augment, resize


class _Augment(grain.transforms.RandomMap):
    """One example of a training batch: image uint8 [h,w,C], label int32 [h,w], valid."""

    def __init__(self, data: ConfigDict):
        self.data = data

    def random_map(self, example: dict, rng: np.random.Generator) -> dict:
        example = augment(example, rng, self.data)
        example["label"] = example["label"].astype(np.int32)
        return {**example, "valid": np.bool_(True)}


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
    """
    index, count = process
    stream = (
        grain.MapDataset.source(source)
        .shuffle(seed=seed)
        .repeat()
        .random_map(_Augment(data), seed=seed)[index::count]
        .batch(batch // count, drop_remainder=True)[start:]
    )
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
    scale: float = 1.0,
    threads: int = 2,
    process: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in batches of one image size each, filled up where examples run out.

    Beside `image` (resized by `scale`), `label` and `valid`, a batch has `index` [B], the examples'
    positions in the source; -1 marks a filling example, all ignored and not valid.
    """
    by_size: dict[tuple[int, int], list[int]] = {}
    for i in range(len(source)):
        by_size.setdefault(source.size(i), []).append(i)
    groups = []
    for size, members in by_size.items():
        members += [-1] * (-len(members) % batch)
        for k in range(0, len(members), batch):
            groups.append((size, members[k : k + batch][process[0] :: process[1]]))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    load = partial(_load, source=source, scale=scale)
    return iter(grain.MapDataset.source(groups).map(load).to_iter_dataset(options))


def _load(group: tuple, source: Sequence[dict], scale: float) -> dict[str, np.ndarray]:
    size, index = group
    input_size = tuple(max(1, round(n * scale)) for n in size)
    image = np.zeros((len(index), *input_size, source.channels), np.uint8)
    label = np.full((len(index), *size), IGNORE, np.int32)
    for k, i in enumerate(index):
        if i >= 0:
            example = source[i]
            image[k], label[k] = resize(example["image"], input_size), example["label"]
    return {"image": image, "label": label, "valid": np.array(index) >= 0, "index": np.array(index)}
