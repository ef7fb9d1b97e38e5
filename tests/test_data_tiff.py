"""TIFFs of many bands, against the library for them where it is installed."""

import struct

import numpy as np
import pytest
from PIL import Image

from jaxseg.data.tiff import read_bands


def _image(bands: int, dtype: type, size: tuple[int, int] = (37, 51)) -> np.ndarray:
    high = 256 if dtype == np.uint8 else 60_000
    return np.random.default_rng(bands).integers(0, high, (*size, bands)).astype(dtype)


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "packbits"])
@pytest.mark.parametrize("tile", [None, (16, 32)])
@pytest.mark.parametrize("planes", ["contig", "separate"])
def test_all_that_the_library_writes_is_read(tmp_path, compression, tile, planes):
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    options = {"compression": compression, "tile": tile, "photometric": "minisblack"}
    options |= {"planarconfig": planes, "rowsperstrip": None if tile else 8}
    for dtype in (np.uint8, np.uint16, np.float32):
        for bands in (2, 5):
            image = _image(bands, dtype)
            stored = np.moveaxis(image, 2, 0) if planes == "separate" else image
            differences = compression in ("zlib", "lzw") and dtype != np.float32
            for order in "<>":
                tifffile.imwrite(
                    tmp_path / "a.tif",
                    stored,
                    byteorder=order,
                    predictor=2 if differences else None,
                    **options,
                )
                found = read_bands(tmp_path / "a.tif")
                assert found.dtype == dtype
                np.testing.assert_array_equal(found, image)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("bands", [1, 3, 4])
def test_what_pillow_writes_is_read_as_pillow_reads_it(tmp_path, compression, bands):
    image = _image(bands, np.uint8)
    picture = Image.fromarray(image[..., 0] if bands == 1 else image)
    picture.save(tmp_path / "a.tif", compression=compression)
    np.testing.assert_array_equal(read_bands(tmp_path / "a.tif"), image)


def test_pages_are_bands(tmp_path):
    image = _image(6, np.uint8)
    pages = [Image.fromarray(image[..., 3 * k : 3 * k + 3]) for k in range(2)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(read_bands(tmp_path / "a.tif"), image)


@pytest.mark.parametrize("kind", ["JPEG inside", "cut", "no TIFF"])
def test_what_is_not_read_raises(tmp_path, kind):
    path = tmp_path / "a.tif"
    picture = Image.fromarray(_image(3, np.uint8))
    picture.save(path, compression="jpeg" if kind == "JPEG inside" else "raw")
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif kind == "no TIFF":
        path.write_bytes(b"no TIFF at all")
    with pytest.raises((ValueError, OSError, SyntaxError)):
        read_bands(path)


def test_a_circle_of_pages_is_walked_once(tmp_path):
    image = _image(3, np.uint8)
    Image.fromarray(image).save(tmp_path / "a.tif", compression="raw")
    content = (tmp_path / "a.tif").read_bytes()
    (start,) = struct.unpack("<I", content[4:8])
    (count,) = struct.unpack("<H", content[start : start + 2])
    end = start + 2 + 12 * count
    again = content[:end] + struct.pack("<I", start) + content[end + 4 :]
    (tmp_path / "a.tif").write_bytes(again)
    np.testing.assert_array_equal(read_bands(tmp_path / "a.tif"), image)
