"""Image and mask files: from any mode to what an example holds, or a message that names the file.

An image is uint8, or float32 in the same units (0..255, with fractions) where its file has grey or
bands of more than 8 bits; of RGB with 16 bits Pillow gives the upper 8. A mask is a
file of integers, or of colours; `translate` makes ids of them.
"""

import functools
import io
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from jaxseg.data import pixels
from jaxseg.data.colours import IGNORE
from jaxseg.data.tiff import read_bands, stored_type
from jaxseg.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".npy")
MAX_PIXELS = 200_000_000  # a header that claims more is taken for a decompression bomb
JPEG = (".jpg", ".jpeg")
LOSSY = ("JPEG", "MPO")
TIFF = (".tif", ".tiff")
CAMERA_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # of PNGs, that Pillow obeys
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


class Page(NamedTuple):
    """One picture of a file that holds several, such as a TIFF volume."""

    path: Path
    number: int  # from 0

    @property
    def stem(self) -> str:
        return f"{self.path.stem}_{self.number:03}"


class Embedded(NamedTuple):
    """A picture inside another file, such as labelme's JSON."""

    path: Path
    size: tuple[int, int]  # height, width
    read: Callable[[Path], bytes]

    @property
    def stem(self) -> str:
        return self.path.stem


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write; it takes that name once it is whole, and never before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield written
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)


def find_images(folder: Path) -> list[Path]:
    """The image files of a folder, by suffix, sorted by name; hidden ones are left out."""
    with os.scandir(folder) as entries:
        names = sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(IMAGE_SUFFIXES)
            and not entry.name.startswith(".")
            and entry.is_file()
        )
    return [folder / name for name in names]


def path_of(place: Any) -> Path:
    """The file of a place or of a label; what has none is given back as it is."""
    return getattr(place, "path", place)


def open_image(place: Path | Page | Embedded, decode: bool = True) -> Image.Image:
    """The decoded picture, or its header alone. Raises InputError where the file cannot be read."""
    path = path_of(place)
    try:
        source = io.BytesIO(place.read(path)) if isinstance(place, Embedded) else path
        with Image.open(source) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"its header claims {picture.width}x{picture.height} pixels")
            if isinstance(place, Page):
                picture.seek(place.number)
            if decode:
                picture.load()
    except FileNotFoundError:
        raise InputError(f"no image {shown(path)}") from None
    except Exception as error:  # Pillow raises many kinds for broken files
        size = path.stat().st_size
        raise InputError(
            f"cannot read image {shown(path)} ({size} bytes): {error}. It may be truncated or not "
            "an image: export it again or remove it."
        ) from error
    return picture


def count_pages(path: Path) -> int:
    """How many pictures a file holds. Raises InputError where it cannot be read."""
    open_image(path, decode=False)
    with Image.open(path) as picture:
        return getattr(picture, "n_frames", 1)


def shown(path: Path) -> str:
    """A path as a message prints it: a name may hold newlines and other control characters."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def read_image(place: Path | Page | Embedded, channels: int) -> np.ndarray:
    """[H,W,channels], upright (the camera's EXIF rotation is applied): uint8, or float32 0..255.

    Grey of 16 bits is divided by 257, so that `data.mean` keeps its units; colour of 16 bits gives
    its upper 8. For other than 1 or 3 channels the file has them itself: a picture with alpha, a
    TIFF (its bands, or its pages) or a .npy array [H,W,C]. Raises InputError where it has not, and
    for 32 bits, whose range is unknown.
    """
    path = path_of(place)
    if path.suffix.lower() == ".npy":
        return _scaled(_load_array(path), channels, path)
    if path.suffix.lower() in TIFF and channels not in (1, 3):
        return _scaled(_load_tiff(path), channels, path)
    if channels == 3 and path.suffix.lower() in JPEG:
        image = _read_jpeg(path)
        if image is not None:
            return image
    return as_image(turned_upright(open_image(place), path), channels, path)


def turned_upright(picture: Image.Image, path: Path) -> Image.Image:
    """The picture as the camera saw it. Raises InputError where its EXIF data are broken."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception as error:  # Pillow raises many kinds, such as SyntaxError
        raise _broken_exif(path, error) from error


def _broken_exif(path: Path, error: Exception) -> InputError:
    return InputError(
        f"image {shown(path)} has EXIF data that cannot be read: {error}. Which way is up is "
        "unknown: export it again"
    )


def as_image(picture: Image.Image, channels: int, path: Path) -> np.ndarray:
    """What `read_image` gives, of a decoded picture; `path` is named in errors."""
    if picture.mode.startswith("I;16"):
        image = _scaled(np.asarray(picture), 1, path)
        return image if channels == 1 else np.repeat(image, channels, axis=2)
    if picture.mode in ("I", "F"):
        raise InputError(
            f"image {shown(path)} has mode {picture.mode}, 32 bits a channel, whose range is "
            "unknown: needs 8 or 16. Scale its values first."
        )
    if channels not in (1, 3):
        return _scaled(np.asarray(picture), channels, path)
    picture = picture.convert("L" if channels == 1 else "RGB")
    return np.asarray(picture).reshape(picture.height, picture.width, channels)


def _read_jpeg(path: Path) -> np.ndarray | None:
    """What read_image makes of a JPEG of 3 channels, faster; None where Pillow must look at it."""
    header = open_image(path, decode=False)
    if (header.format, header.mode, orientation(header)) != ("JPEG", "RGB", 1):
        return None
    return pixels.decode_jpeg(path.read_bytes())


def _scaled(image: np.ndarray, channels: int, path: Path) -> np.ndarray:
    """[H,W,channels] as an example holds it, of an array [H,W] or [H,W,C] from a file."""
    image = image.astype(image.dtype.newbyteorder("="), copy=False)  # files may be big-endian
    if image.dtype not in (np.uint8, np.uint16, np.float32) or image.ndim not in (2, 3):
        raise InputError(
            f"image {shown(path)} is {image.dtype} {list(image.shape)}: needs uint8, uint16 or "
            "float32 (0..255), [H,W] or [H,W,C]"
        )
    image = image.reshape(*image.shape[:2], -1)
    if image.shape[2] != channels:
        raise InputError(
            f"image {shown(path)} has {image.shape[2]} channels and data.channels is {channels}: "
            "they must be equal"
        )
    if image.dtype == np.uint16:
        return image.astype(np.float32) / 257
    if image.dtype == np.float32 and not np.isfinite(image).all():
        raise InputError(f"image {shown(path)} holds NaN or infinity: needs numbers 0..255")
    return image


def _load_array(path: Path, mmap_mode: str | None = None) -> np.ndarray:
    try:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"no image {shown(path)}") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"cannot read image {shown(path)}: {error}") from error


def _load_tiff(path: Path) -> np.ndarray:
    try:
        return read_bands(path)
    except FileNotFoundError:
        raise InputError(f"no image {shown(path)}") from None
    except Exception as error:  # Pillow raises many kinds for broken files
        raise InputError(f"cannot read image {shown(path)}: {error}") from error


def image_size(place: Path | Page | Embedded, upright: bool = True) -> tuple[int, int]:
    """(height, width) of the upright image, or of the pixels as stored, from its header."""
    if isinstance(place, Embedded):
        return place.size
    if path_of(place).suffix.lower() == ".npy":
        return _load_array(path_of(place), mmap_mode="r").shape[:2]
    try:
        picture = open_image(place, decode=False)
    except InputError:
        if path_of(place).suffix.lower() not in TIFF:
            raise
        return _load_tiff(path_of(place)).shape[:2]  # of more bands than Pillow knows
    # Of a TIFF, Pillow gives the upright size.
    turned = upright and picture.format != "TIFF" and orientation(picture) in (5, 6, 7, 8)
    return picture.size if turned else picture.size[::-1]


def is_deep(place: Path | Page | Embedded, channels: int) -> bool:
    """Whether `read_image` gives float32, from the header; False where that cannot be read."""
    path = path_of(place)
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            return _load_array(path, mmap_mode="r").dtype.itemsize > 1
        if suffix in TIFF and channels not in (1, 3):
            return stored_type(path) != "u1"
        return suffix not in JPEG and open_image(place, decode=False).mode.startswith("I;16")
    except Exception:  # reading it will say what is wrong
        return False


def orientation(picture: Image.Image) -> int:
    """How EXIF or XMP say that the camera was held: 1 = upright, 2..8 = mirrored or turned."""
    if picture.format == "TIFF":
        return picture.tag_v2.get(0x112, 1)
    path = Path(picture.filename)
    if picture.format == "PNG" and picture.filename and _camera_at_end(path):
        picture = open_image(path)
    # Not the method of PNGs, which decodes the pixels to look for what may come after them.
    try:
        return Image.Image.getexif(picture).get(0x112, 1)
    except Exception as error:  # Pillow raises many kinds, such as SyntaxError
        raise _broken_exif(path, error) from error


def _camera_at_end(path: Path) -> bool:
    """Whether EXIF or XMP come after the pixels of a PNG, where only decoding reads them."""
    pixels_seen = False
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if pixels_seen and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                start = file.read(min(length, 22))
                if kind == b"eXIf" or start.startswith(CAMERA_TEXTS):
                    return True
                length -= len(start)
            pixels_seen |= kind == b"IDAT"
            file.seek(length + 4, os.SEEK_CUR)
    return False


def open_mask(place: Path | Page) -> Image.Image:
    """The decoded mask. Raises InputError for a JPEG, whose compression changes ids."""
    picture = open_image(place)
    if picture.format in LOSSY:
        raise InputError(
            f"mask {shown(path_of(place))} is a JPEG, whose compression changes ids: save it as "
            "PNG, from the source it was made of"
        )
    return picture


def read_values(place: Path | Page) -> np.ndarray:
    """The integers [H,W] that a mask's file holds. Palette PNGs keep theirs, whatever the colours.

    Raises InputError for a mask of colours or floats, a JPEG, and grey of 2 or 4 bits.
    """
    picture, path = open_mask(place), path_of(place)
    if picture.mode not in ("P", "L", "1", "I") and not picture.mode.startswith("I;16"):
        raise InputError(
            f"mask {shown(path)} has mode {picture.mode}: needs class ids, one channel (a palette "
            "or grey PNG). Convert its colours to ids first, or name the data set colours:FOLDER."
        )
    # Pillow scales grey of 2 or 4 bits to 0..255; only the tiles of an undecoded file tell.
    packed = picture.mode == "L" and re.search(r"'L;([24])", str(open_image(place, False).tile))
    if packed:
        raise InputError(
            f"mask {shown(path)} is grey with {packed[1]} bits a pixel: needs 8, since ids of "
            "fewer bits are scaled when read. Save the mask as an 8-bit PNG."
        )
    values = np.asarray(picture)
    return values.astype(np.uint8) if picture.mode == "1" else values


def read_label(place: Path | Page, ids: Mapping[int, int]) -> np.ndarray:
    """uint8 [H,W]: the ids of a mask's values. Raises InputError for values that have none."""
    return translate(read_values(place), ids, path_of(place))


def read_packed(place: Path | Page) -> np.ndarray:
    """The colours of a mask as integers [H,W], 0xRRGGBB."""
    red, green, blue = np.moveaxis(np.asarray(open_mask(place).convert("RGB"), np.int32), 2, 0)
    return red << 16 | green << 8 | blue


def read_colours(place: Path | Page, ids: Mapping[tuple[int, int, int], int]) -> np.ndarray:
    """uint8 [H,W]: the ids of a mask's colours. Raises InputError for colours that have none."""
    packed = {(red << 16) + (green << 8) + blue: i for (red, green, blue), i in ids.items()}
    return translate(read_packed(place), packed, path_of(place), colours=True)


def translate(
    values: np.ndarray, ids: Mapping[int, int], path: Path, colours: bool = False
) -> np.ndarray:
    """The ids uint8 [H,W] of integers [H,W]; 255 stays 255 (ignore) unless `ids` has it.

    Raises InputError that names `path` and the values that have no id, with their pixels.
    """
    ids = ids if colours else {IGNORE: IGNORE, **ids}
    keys = np.array(sorted(ids))
    if values.dtype == np.uint8:  # bytes.translate is several times as fast as numpy's indexing
        table, known = _byte_table(tuple(ids.items()))
        held = values.tobytes()
        new = held.translate(table) if table else held
        label = np.frombuffer(new, np.uint8).reshape(values.shape)
        strange = np.frombuffer(held.translate(None, delete=known), np.uint8)
    else:
        targets = np.array([ids[k] for k in keys.tolist()], np.uint8)
        place = np.searchsorted(keys, values).clip(max=len(keys) - 1)
        label, strange = targets[place], values[keys[place] != values]
    if strange.size:
        raise _strange(strange, keys, path, colours)
    return label


@functools.lru_cache
def _byte_table(ids: tuple[tuple[int, int], ...]) -> tuple[bytes, bytes]:
    """(the id of every byte, or nothing where all keep theirs; the bytes that have one)."""
    known = {value: i for value, i in ids if 0 <= value <= 255}
    same = all(value == i for value, i in known.items())
    table = b"" if same else bytes(known.get(value, 0) for value in range(256))
    return table, bytes(known)


def _strange(values: np.ndarray, keys: np.ndarray, path: Path, colours: bool) -> InputError:
    found, counts = np.unique(values, return_counts=True)
    names = [_colour(v) if colours else str(v) for v in found[:8].tolist()]
    some = ", ".join(f"{n} ({c} pixels)" for n, c in zip(names, counts.tolist(), strict=False))
    more = f" and {len(found) - 8} others" if len(found) > 8 else ""
    if colours:
        known = ", ".join(map(_colour, keys[:12].tolist())) + (", ..." if len(keys) > 12 else "")
        return InputError(f"mask {shown(path)} holds colours {some}{more}: needs {known}")
    hint = ""
    if found.min() > 255 and (not (found % 256).any() or not (found % 257).any()):
        hint = " All are multiples of 256 or 257: a mask scaled to 16 bits. Save it with 8."
    step = int(np.gcd.reduce(found))
    if not hint and step > 1 and found.max() <= 255:
        hint = (
            f' All are multiples of {step}: "values": [0, {step}, {2 * step}, ...] in classes.json '
            "says so."
        )
    return InputError(
        f"mask {shown(path)} holds ids {some}{more}: needs {_ranges(keys)}, where {IGNORE} is "
        f"ignore.{hint} Correct the mask, or the table of classes."
    )


def _colour(packed: int) -> str:
    return f"({packed >> 16}, {packed >> 8 & 255}, {packed & 255})"


def _ranges(keys: np.ndarray) -> str:
    """ "0..2, 255" for 0, 1, 2, 255."""
    starts = np.flatnonzero(np.diff(keys, prepend=keys[0] - 2) != 1)
    runs = [(run[0], run[-1]) for run in np.split(keys, starts[1:])]
    return ", ".join(f"{a}" if a == b else f"{a}..{b}" for a, b in runs)
