"""Data sets of TensorFlow Datasets, read from ArrayRecord files without TensorFlow.

Those that the verb `pack` writes, and others whose examples have an image and a label. Images come
out as bytes and are decoded here: what tfds decodes depends on whether OpenCV is installed.
"""

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxseg.data import pixels, tables
from jaxseg.data.colours import Classes, voc_palette
from jaxseg.data.files import MAX_PIXELS, as_image, translate
from jaxseg.errors import InputError

LABEL_FEATURES = ("label", "segmentation_label", "segmentation_mask", "annotation", "mask")
# Beside their masks, what objects have: [n] or [n,4]
OBJECTS = {"classes": np.int32, "crowd": np.bool_, "areas": np.float64, "boxes": np.float64}
# What the labels mean in data sets of tfds that do not say so: name -> labels/TABLE.csv
TABLES = {"cityscapes": "cityscapes", "oxford_iiit_pet": "pets", "scene_parse150": "ade20k"}


def locate(name: str, root: str = "") -> Any:
    """The folder of a prepared data set's newest version: NAME[/CONFIG][/VERSION], or its path.

    NAME is looked for in `root` or $JAXSEG_DATA, and where tfds keeps its own. Raises InputError
    where there is none.
    """
    import tensorflow_datasets as tfds  # not at the top: the command line's help needs none of it

    own = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    bases = [base for base in (root or os.environ.get("JAXSEG_DATA", ""), own) if base]
    names = (name, *(f"{base}/{name}" for base in bases))
    places = [tfds.core.Path(os.path.expanduser(place)) for place in names]
    for place in places:
        if (place / "dataset_info.json").exists():
            return place
        versions = [p for p in place.iterdir() if p.is_dir()] if place.is_dir() else []
        versions = [p for p in versions if (p / "dataset_info.json").exists()]
        if versions:
            return max(versions, key=lambda p: [int(n) for n in p.name.split(".") if n.isdigit()])
    tried = " or ".join(str(place / "VERSION" / "dataset_info.json") for place in places)
    raise InputError(
        f'data set "tfds:{name}" not found: no {tried}. Write one with the verb pack, or set '
        "data.root to the folder that holds it"
    )


def open_builder(name: str, root: str = "") -> Any:
    """The tfds builder of a prepared data set. Raises InputError where it cannot be read."""
    import tensorflow_datasets as tfds

    place = locate(name, root)
    try:
        return tfds.builder_from_directory(str(place))
    except Exception as error:
        raise InputError(f"cannot read the data set in {place}: {error}") from error


def splits(name: str, root: str = "") -> list[str]:
    return list(open_builder(name, root).info.splits)


def classes(name: str, root: str = "") -> Classes:
    """The classes of a prepared data set. Raises InputError where it does not tell them."""
    return read_table(open_builder(name, root)).classes


def read_table(builder: Any) -> tables.Table:
    """What the values of the labels mean: ids, where the data set itself names its classes."""
    feature = builder.info.features[find_features(builder)[1]]
    meta = builder.info.metadata or {}
    names = tuple(getattr(feature, "names", None) or ())
    if names:
        palette = tuple(map(tuple, meta["palette"])) if "palette" in meta else None
        things = tuple(meta["things"]) if "things" in meta else ()
        return tables.numbered(Classes(names, palette or voc_palette(len(names)), things))
    if builder.name in TABLES:
        return tables.read_csv(TABLES[builder.name])
    path = builder.data_path / "classes.json"
    return tables.read_json(
        path,
        f"tfds:{builder.name} does not name its classes, which that file tells: it holds "
        f"{tables.CLASSES_JSON}\nOr its label is a LabeledImage with labels, as the verb pack "
        "writes it.",
    )


def find_features(builder: Any) -> tuple[str, str]:
    """The names of the image and the label among an example's features."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
    labels = [key for key in LABEL_FEATURES if key in images]
    kinds = (tfds.features.Image, tfds.features.Tensor)
    given = [k for k in sorted(features) if k.startswith("image") and k not in labels]
    given = [k for k in given if isinstance(features[k], kinds)]
    if not labels or not given:
        raise InputError(
            f"tfds:{builder.name} has the features {', '.join(sorted(features))}: needs an image "
            f"and, as an image too, one of {', '.join(LABEL_FEATURES)}"
        )
    return given[0], labels[0]


class Records:
    """The source of one split; `data_source` is that of tfds."""

    def __init__(
        self, name: str, split: str, root: str = "", channels: int = 3, instances: bool = False
    ):
        """Raises InputError where there is no such split, or where it is not in ArrayRecord."""
        import tensorflow_datasets as tfds

        builder = open_builder(name, root)
        table, features = read_table(builder), builder.info.features
        self.name, self.split, self.ids = name, split, table.ids
        self.classes, self.channels, self.instances = table.classes, channels, instances
        self.image, self.label = find_features(builder)
        self.sizes: dict[int, tuple[int, int]] = {}  # of the records that were read
        deep = features[self.image].np_dtype != np.uint8
        self.dtype = np.dtype(np.float32 if deep else np.uint8)
        self.soft = "alpha" in features
        if split not in builder.info.splits:
            found = ", ".join(builder.info.splits)
            raise InputError(f"no split {split!r} in tfds:{name}: it has {found}")
        if instances and "masks" not in features:
            raise InputError(f"tfds:{name} does not tell objects apart: pack it with --instances")
        raw = {k: f for k, f in features.items() if isinstance(f, tfds.features.Image)}
        try:
            self.data_source = builder.as_data_source(
                split, decoders={key: tfds.decode.SkipDecoding() for key in raw}
            )
        except Exception as error:
            raise InputError(
                f'tfds:{name} cannot be read: {error}. Prepare it with file_format="array_record"'
            ) from error

    def __len__(self) -> int:
        return len(self.data_source)

    def __getitem__(self, index: int) -> dict:
        record, where = self._record(index), self._where(index)
        with _reading(where):
            image = record[self.image]
            if isinstance(image, bytes):
                image = decode_image(image, self.channels, where)
            values = np.asarray(Image.open(io.BytesIO(record[self.label])))
        self.sizes[index] = values.shape[:2]
        if image.dtype != self.dtype and self.dtype == np.uint8:
            raise InputError(f"{where} has more than 8 bits, and its feature 8: prepare it anew")
        if image.dtype == np.uint16:
            image = image.astype(np.float32) / 257
        image = image.astype(self.dtype, copy=False)
        label = translate(values, self.ids, where)
        if image.shape != (*label.shape, self.channels):
            raise InputError(
                f"{where} has an image {list(image.shape)} and a label {list(label.shape)}: needs "
                f"[H,W,{self.channels}] and [H,W]"
            )
        name = record["name"].decode() if "name" in record else f"{index:08}"
        example = {"image": image, "label": label, "name": name}
        if self.soft:
            example["alpha"] = record["alpha"]
        if self.instances:
            with _reading(where):
                example["instances"] = decode_objects(record, label.shape)
        return example

    def size(self, index: int) -> tuple[int, int]:
        """(height, width), from the header of the label; kept, for it takes the whole record."""
        if index not in self.sizes:
            with _reading(self._where(index)):
                picture = Image.open(io.BytesIO(self._record(index)[self.label]))
            self.sizes[index] = picture.height, picture.width
        return self.sizes[index]

    def _record(self, index: int) -> Mapping[str, Any]:
        with _reading(self._where(index)):
            return self.data_source[index]

    def _where(self, index: int) -> Path:
        return Path(f"tfds:{self.name}/{self.split}[{index}]")


@contextlib.contextmanager
def _reading(where: Path) -> Iterator[None]:
    """What goes wrong inside is an InputError: Pillow and tfds raise many kinds."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"cannot read {where}: {error}. Prepare the data anew") from error


def encode_png(array: np.ndarray) -> bytes:
    """uint8 [H,W], [H,W,1] or [H,W,3] as the bytes of a PNG."""
    file = io.BytesIO()
    picture = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def decode_image(data: bytes, channels: int, where: Path) -> np.ndarray:
    """The bytes of a file -> [H,W,channels] as `files.read_image` has it, whatever EXIF says.

    where: named in errors.
    """
    picture = Image.open(io.BytesIO(data))
    if (picture.format, picture.mode, channels) == ("JPEG", "RGB", 3):
        image = pixels.decode_jpeg(data)
        if image is not None:
            return image
    return as_image(picture, channels, where)


def encode_objects(objects: Mapping[str, np.ndarray], size: tuple[int, int]) -> dict[str, Any]:
    """The objects of an example as features: a PNG whose pixels' bits are the masks of eight, the
    next eight below.

    Raises InputError where that is more than a picture may hold.
    """
    masks = objects["masks"] if len(objects["masks"]) else np.zeros((1, *size), np.uint8)
    packed = np.packbits(masks, axis=0)
    if packed.size > MAX_PIXELS:
        raise InputError(
            f"{len(masks)} objects of {size} pixels (height, width) are too many for one record: "
            "cut the images into parts"
        )
    return {**objects, "masks": encode_png(packed.reshape(-1, size[1]))}


def decode_objects(record: Mapping[str, Any], size: tuple[int, int]) -> dict[str, np.ndarray]:
    """The inverse of `encode_objects`."""
    packed = np.asarray(Image.open(io.BytesIO(record["masks"]))).reshape(-1, *size)
    masks = np.unpackbits(packed, axis=0, count=len(record["classes"]))
    return {"masks": masks, **{key: record[key] for key in OBJECTS if key in record}}
