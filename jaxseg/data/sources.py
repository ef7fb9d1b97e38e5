"""Random-access readers: `source[i]` is one example, read and checked.

An example is a dict: `image` uint8 [H,W,C], `label` uint8 [H,W] with ids 0..K-1 or 255 = ignore,
`name`. A source has `classes`, `len()`, `source[i]` and `size(i)` (height, width, cheaply).
"""

import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from jaxseg.data import shapes
from jaxseg.data.colours import IGNORE, Classes
from jaxseg.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")


def find_images(folder: Path) -> list[Path]:
    """The image files of a folder, by suffix, sorted by name."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def open_image(path: Path, decode: bool = True) -> Image.Image:
    """The decoded picture, or its header alone. Raises InputError where the file cannot be read."""
    try:
        with Image.open(path) as picture:
            if decode:
                picture.load()
    except FileNotFoundError:
        raise InputError(f"no image {path}") from None
    except Exception as error:  # Pillow raises many kinds for broken files
        size = path.stat().st_size
        raise InputError(
            f"cannot read image {path} ({size} bytes): {error}. It may be truncated or not an "
            "image: export it again or remove it."
        ) from error
    return picture


def read_image(path: Path, channels: int) -> np.ndarray:
    """uint8 [H,W,channels], upright: the camera's EXIF rotation is applied.

    Raises InputError for more than 8 bits a channel, which Pillow would clip to white.
    """
    picture = open_image(path)
    if picture.mode.startswith(("I", "F")):
        raise InputError(
            f"image {path} has mode {picture.mode}, more than 8 bits a channel: needs 8. "
            "Scale its values to 0..255 first."
        )
    picture = ImageOps.exif_transpose(picture).convert("L" if channels == 1 else "RGB")
    return np.asarray(picture).reshape(picture.height, picture.width, channels)


def read_label(path: Path, num_classes: int) -> np.ndarray:
    """uint8 [H,W] of ids. Palette PNGs keep their ids, whatever their colours.

    Raises InputError for a colour mask, for grey of 2 or 4 bits, and for ids outside
    0..num_classes-1 that are not 255.
    """
    picture = open_image(path)
    if picture.mode not in ("P", "L", "1", "I;16", "I"):
        raise InputError(
            f"mask {path} has mode {picture.mode}: needs class ids, one channel (a palette or grey "
            "PNG). Convert its colours to ids first."
        )
    # Pillow scales grey of 2 or 4 bits to 0..255; only the tiles of an undecoded file tell.
    packed = re.search(r"'L;([24])", str(open_image(path, decode=False).tile))
    if packed:
        raise InputError(
            f"mask {path} is grey with {packed[1]} bits a pixel: needs 8, since ids of fewer "
            "bits are scaled when read. Save the mask as an 8-bit PNG."
        )
    label = np.asarray(picture)
    strange = (label >= num_classes) & (label != IGNORE) | (label < 0)
    if strange.any():
        values, counts = np.unique(label[strange], return_counts=True)
        found = ", ".join(
            f"{v} ({c} pixels)" for v, c in list(zip(values, counts, strict=True))[:8]
        )
        raise InputError(
            f"mask {path} holds ids {found}: needs 0..{num_classes - 1}, or {IGNORE} for ignore. "
            "Correct the mask, or the names in classes.json."
        )
    return label.astype(np.uint8)


class Folder:
    """`root/SPLIT/images/NAME.*` and `root/SPLIT/masks/NAME.png`."""

    def __init__(self, root: Path, split: str, classes: Classes, channels: int):
        """Raises InputError for an empty or missing folder and for images without a mask."""
        self.classes, self.channels = classes, channels
        images, masks = root / split / "images", root / split / "masks"
        if not images.is_dir() or not masks.is_dir():
            splits = sorted(p.name for p in root.iterdir() if (p / "images").is_dir())
            raise InputError(f"no split {split!r} in {root}: found {splits or 'none'}.\n{TREE}")
        self.images = find_images(images)
        if not self.images:
            raise InputError(
                f"no images in {images}: needs files ending in {', '.join(IMAGE_SUFFIXES)}"
            )
        by_stem = {p.stem: p for p in find_images(masks)}
        missing = [p for p in self.images if p.stem not in by_stem]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(self.images)} images have no mask, such as {missing[0]}: "
                f"needs {masks / missing[0].stem}.png"
            )
        self.masks = [by_stem[p.stem] for p in self.images]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        image = read_image(self.images[index], self.channels)
        label = read_label(self.masks[index], len(self.classes))
        if image.shape[:2] != label.shape:
            raise InputError(
                f"image {self.images[index]} is {image.shape[:2]} and its mask {self.masks[index]} "
                f"{label.shape} (height, width): they must be equal"
            )
        return {"image": image, "label": label, "name": self.images[index].stem}

    def size(self, index: int) -> tuple[int, int]:
        """(height, width), from the header of the mask."""
        picture = open_image(self.masks[index], decode=False)
        return picture.height, picture.width


TREE = """A data set is a folder
    NAME/classes.json          {"names": ["sky", "road", ...]}, and "palette" if you like
    NAME/train/images/*.jpg
    NAME/train/masks/*.png     named like the images; pixel = class id, 255 = ignore
    NAME/val/images/*.jpg
    NAME/val/masks/*.png"""


class Shapes:
    """The embedded data set: scenes of `shapes.scene`, drawn when first asked for, then kept."""

    SPLITS = {"train": (0, 2048), "val": (1, 256), "test": (2, 256)}  # seed, number of scenes
    classes = Classes(shapes.CLASSES, shapes.PALETTE)

    def __init__(self, split: str, channels: int):
        if split not in self.SPLITS:
            raise InputError(f"no split {split!r} in shapes: it has {', '.join(self.SPLITS)}")
        self.seed, self.count = self.SPLITS[split]
        self.channels, self.kept = channels, {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        if index not in self.kept:
            scene = shapes.scene(self.seed, index)
            if self.channels == 1:
                scene["image"] = np.asarray(Image.fromarray(scene["image"]).convert("L"))[..., None]
            self.kept[index] = {
                "image": scene["image"],
                "label": scene["label"],
                "name": f"{index:05d}",
            }
        return self.kept[index]

    def size(self, index: int) -> tuple[int, int]:
        return self[index]["label"].shape
