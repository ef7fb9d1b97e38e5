"""TIFFs of any number of bands, 8 or 16 bits each, which Pillow cuts down to three of 8.

Pillow does know the compressions. So a file is shown to it as grey bytes, the bands of a pixel side
by side, and what comes out is taken apart here. Tags and layout: Adobe, "TIFF Revision 6.0", 1992.
"""

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image, TiffImagePlugin

SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION = 254, 256, 257, 258, 259
PHOTOMETRIC, SAMPLES, PLANAR, PREDICTOR, FORMAT = 262, 277, 284, 317, 339
STRIPS = {"offsets": 273, "rows": 278, "counts": 279}
TILES = {"columns": 322, "rows": 323, "offsets": 324, "counts": 325}
LOSSLESS = (1, 5, 8, 32946, 32773, 34925, 50000)  # none, LZW, Deflate twice, PackBits, LZMA, Zstd
TYPES = {(8, 1): "u1", (16, 1): "u2", (32, 3): "f4"}  # bits, format -> numpy's


def read_bands(path: Path) -> np.ndarray:
    """[H,W,C], uint8, uint16 or float32 as stored: the bands of all pages but reduced ones.

    Raises ValueError, and what Pillow raises, for a file that it cannot read.
    """
    data, pages, seen = path.read_bytes(), [], set()
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        raise ValueError("not a TIFF")
    tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
    stream = io.BytesIO(data)
    while tags.next and tags.next not in seen:
        seen.add(tags.next)
        stream.seek(tags.next)
        tags.load(stream)
        if not tags.get(SUBFILE, 0) & 1:
            pages.append(_page(data, order, tags))
    return np.concatenate(pages, axis=2)


def stored_type(path: Path) -> str:
    """numpy's name for the values of the first page, such as "u1", from its header.

    "" for those that are not read here. Raises what Pillow raises for a file that it cannot read.
    """
    with path.open("rb") as file:
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
        file.seek(tags.next)
        tags.load(file)
    return TYPES.get((_first(tags, BITS), _first(tags, FORMAT)), "")


def _page(data: bytes, order: str, tags: TiffImagePlugin.ImageFileDirectory_v2) -> np.ndarray:
    """[H,W,C] of one directory of the file."""
    bands, planes = tags.get(SAMPLES, 1), tags.get(PLANAR, 1) == 2
    kind = TYPES.get((_first(tags, BITS), _first(tags, FORMAT)))
    predictor, compression = tags.get(PREDICTOR, 1), tags.get(COMPRESSION, 1)
    if kind is None or predictor not in (1, 2) or compression not in LOSSLESS:
        raise ValueError(
            f"{tags.get(BITS)} bits, compression {compression}, predictor {predictor}: needs 8 or "
            "16 bits, without loss. Save it without compression"
        )
    together = 1 if planes else bands
    layout = TILES if TILES["offsets"] in tags else STRIPS
    places, counts = (tags[layout[key]] for key in ("offsets", "counts"))
    share = len(places) // (bands // together)  # strips or tiles of one plane
    found = []
    for k in range(0, len(places), share):
        part = {layout["offsets"]: places[k : k + share], layout["counts"]: counts[k : k + share]}
        rows = _bytes(data, order, tags, part, together * np.dtype(kind).itemsize)
        values = rows.view(order + kind).reshape(len(rows), -1, together)
        if predictor == 2:
            values = _summed(values, tags.get(TILES["columns"], values.shape[1]))
        found.append(values)
    return np.concatenate(found, axis=2).astype(kind)


def _first(tags: TiffImagePlugin.ImageFileDirectory_v2, tag: int) -> int:
    """The value of a tag, 1 by default; the first of one that has one for each band."""
    value = tags.get(tag, 1)
    return value[0] if isinstance(value, tuple) else value


def _bytes(
    data: bytes,
    order: str,
    tags: TiffImagePlugin.ImageFileDirectory_v2,
    part: dict[int, tuple[int, ...]],
    pixel: int,
) -> np.ndarray:
    """uint8 [H, W * pixel]: some strips or tiles of a file, where a pixel takes `pixel` bytes."""
    new = {
        WIDTH: (tags[WIDTH] * pixel,),
        HEIGHT: (tags[HEIGHT],),
        BITS: (8,),
        COMPRESSION: (tags.get(COMPRESSION, 1),),
        PHOTOMETRIC: (1,),  # 0 is black
        SAMPLES: (1,),
        **part,
    }
    if TILES["offsets"] in part:
        new |= {TILES["columns"]: (tags[TILES["columns"]] * pixel,)}
        new |= {TILES["rows"]: (tags[TILES["rows"]],)}
    else:
        new |= {STRIPS["rows"]: (min(tags.get(STRIPS["rows"], 1 << 31), tags[HEIGHT]),)}
    start = len(data) + len(data) % 2
    after, entries, spare = start + 2 + 12 * len(new) + 4, b"", b""
    for tag, values in sorted(new.items()):
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            packed, spare = struct.pack(f"{order}I", after + len(spare)), spare + packed
        entries += struct.pack(f"{order}HHI", tag, 4, len(values)) + packed
    head = data[:4] + struct.pack(f"{order}I", start) + data[8:].ljust(start - 8, b"\0")
    directory = struct.pack(f"{order}H", len(new)) + entries + bytes(4)
    with Image.open(io.BytesIO(head + directory + spare)) as picture:
        return np.asarray(picture)


def _summed(values: np.ndarray, columns: int) -> np.ndarray:
    """[H,W,C] of differences to the pixel before, in blocks of so many columns -> their sums."""
    blocks = [values[:, x : x + columns] for x in range(0, values.shape[1], columns)]
    return np.concatenate([block.cumsum(axis=1, dtype=values.dtype) for block in blocks], axis=1)
