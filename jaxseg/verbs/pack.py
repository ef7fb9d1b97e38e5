"""The verb `pack`: any data set as one of TensorFlow Datasets, in ArrayRecord files.

A few large files with random access, instead of one or two for each image: what a cluster reads
well. Nothing is lost: training sees the same bytes as from the data set itself.
"""

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxseg.data import catalog, records
from jaxseg.errors import InputError
from jaxseg.log import say

VERSION = "1.0.0"


class Packed(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Images and labels of one data set.

    image: the JPEG of the data set, or a PNG; where neither can hold it, a tensor. label: a PNG of
    class ids, 255 = ignore. alpha: of soft masks. masks, classes, crowd: the objects, where they
    are told apart; areas, boxes: where the data set says them, see `sources.objects`.
    """

    VERSION = tfds.core.Version(VERSION)
    url_infos = None  # nothing is downloaded; tfds would look for checksums beside this file

    def __init__(self, name: str, sources: Mapping[str, Any], folder: Path):
        self.name, self.sources = name, sources
        self.first = next(iter(sources.values()))
        self.dtype = np.result_type(*(source.dtype for source in sources.values()))
        self.error: InputError | None = None  # what tfds would wrap into its own
        super().__init__(data_dir=folder, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        kinds, table, example = tfds.features, self.first.classes, self.first[0]
        image = example["image"].astype(self.dtype)
        channels = image.shape[2]
        if as_file(image):
            pixels = kinds.Image(shape=(None, None, channels))
        else:
            pixels = kinds.Tensor(
                shape=(None, None, channels), dtype=image.dtype, encoding=kinds.Encoding.ZLIB
            )
        features = {
            "image": pixels,
            "label": kinds.LabeledImage(labels=list(table.names), shape=(None, None, 1)),
            "name": kinds.Text(),
        }
        if "alpha" in example:
            features["alpha"] = kinds.Tensor(
                shape=(None, None), dtype=np.float32, encoding=kinds.Encoding.ZLIB
            )
        if "instances" in example:
            features["masks"] = kinds.Image(shape=(None, None, 1))
            for key, kind in records.OBJECTS.items():
                if key in example["instances"]:
                    shape = (None, *example["instances"][key].shape[1:])
                    features[key] = kinds.Tensor(shape=shape, dtype=kind)
        palette = [list(map(int, colour)) for colour in table.palette]
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images with class ids of every pixel, 255 = ignore; written by jaxseg.",
            features=kinds.FeaturesDict(features),
            disable_shuffling=True,  # the order of the data set
            metadata=tfds.core.MetadataDict(palette=palette, things=list(table.things)),
        )

    def _split_generators(self, _: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(source) for split, source in self.sources.items()}

    def _generate_examples(self, source: Any) -> Iterator[tuple[int, dict]]:
        for i in range(len(source)):
            try:
                example = source[i]
            except InputError as error:
                self.error = error
                raise
            size = example["label"].shape
            record = {
                "image": encoded_image(source, i, example["image"].astype(self.dtype)),
                "label": records.encode_png(example["label"]),
                "name": example["name"],
            }
            if "alpha" in example:
                record["alpha"] = example["alpha"]
            if "instances" in example:
                record |= records.encode_objects(example["instances"], size)
            yield i, record


def pack(
    dataset: str,
    output: Path,
    *,
    name: str = "",
    chosen: Sequence[str] = (),
    root: str = "",
    channels: int = 3,
    instances: bool = False,
) -> int:
    """Writes OUTPUT/NAME/1.0.0; returns the exit code.

    name: by default that of the data set. chosen: splits; by default all.
    Raises InputError where it is there already, and for examples that cannot be read.
    """
    name = name or re.sub(r"\W+", "_", Path(dataset.rpartition(":")[2]).stem).strip("_").lower()
    if not re.fullmatch(r"[a-z]\w*", name):
        raise InputError(f"--name {name!r}: needs letters, digits and _, a letter first")
    target = output / name / VERSION
    if target.exists():
        raise InputError(f"{target} exists: remove it, or choose another --output or --name")
    sources = {
        split: catalog.open_split(dataset, split, root, channels, instances)
        for split in chosen or catalog.splits(dataset, root)
    }
    tfds.disable_progress_bar()
    packed = Packed(name, sources, output)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # tfds speaks of downloads
            packed.download_and_prepare()
    except Exception as error:
        if packed.error:
            raise packed.error from None
        if isinstance(error, OSError):
            raise InputError(f"cannot write to {output}: {error.strerror or error}") from error
        raise
    counts = ", ".join(f"{len(source)} of {split}" for split, source in sources.items())
    size = sum(file.stat().st_size for file in target.iterdir())
    say(f"packed {counts}, {size / 1e6:.1f} MB, in {target}")
    say(f"train on it with --config.data.dataset=tfds:{name} --config.data.root={output}")
    return 0


def as_file(image: np.ndarray) -> bool:
    """Whether a JPEG or PNG can hold an image [H,W,C]."""
    return image.dtype == np.uint8 and image.shape[2] in (1, 3)


def encoded_image(source: Any, index: int, image: np.ndarray) -> bytes | np.ndarray:
    """The image's own JPEG where it decodes to the same pixels, else a PNG; else the array."""
    if not as_file(image):
        return image
    place = source.images[index] if hasattr(source, "images") else None
    if isinstance(place, Path) and place.suffix.lower() in (".jpg", ".jpeg"):
        data = place.read_bytes()
        if np.array_equal(records.decode_image(data, image.shape[2], place), image):
            return data
    return records.encode_png(image)
