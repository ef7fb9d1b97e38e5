"""Image and mask files: every mode becomes what an example holds, or is refused by name."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxseg.data.colours import Classes, save_label, voc_palette
from jaxseg.data.files import (
    Page,
    find_images,
    image_size,
    is_deep,
    read_colours,
    read_image,
    read_label,
    shown,
    translate,
)
from jaxseg.errors import InputError

IDS = {0: 0, 1: 1, 2: 2}
LABEL = np.array([[0, 1, 2], [2, 255, 0]], np.uint8)
NAMES = ("sky", "road", "car")
ROTATED = 6  # EXIF orientation: the camera was held upright


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


def _small_png(path: Path, bits: int, palette: bool) -> None:
    """One row of the ids 0, 1, 2, 3 with `bits` a pixel, which Pillow cannot write in grey."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    row = sum(i << bits * (3 - i) for i in range(4)).to_bytes(bits * 4 // 8)
    header = struct.pack(">IIBBBBB", 4, 1, bits, 3 if palette else 0, 0, 0, 0)
    colours = chunk(b"PLTE", bytes(range(12))) if palette else b""
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    path.write_bytes(start + colours + pixels + chunk(b"IEND", b""))


def _tiff(path: Path, image: np.ndarray) -> None:
    """An uncompressed TIFF of [H,W,C], which Pillow cannot write for more than four bands."""
    (height, width, bands), bits = image.shape, 8 * image.itemsize
    content = image.astype(image.dtype.newbyteorder("<")).tobytes()
    tags = [
        (256, "I", [width]),
        (257, "I", [height]),
        (258, "H", [bits] * bands),
        (259, "H", [1]),  # no compression
        (262, "H", [1]),  # 0 is black
        (273, "I", [0]),  # where the pixels begin: set below
        (277, "H", [bands]),
        (278, "I", [height]),
        (279, "I", [len(content)]),
        (338, "H", [0] * (bands - 1)),  # what the other bands mean: unknown
    ]
    start = 8 + 2 + 12 * len(tags) + 4
    spare = sum(2 * len(v) for _, kind, v in tags if kind == "H" and len(v) > 2)
    entries, rest = b"", b""
    for tag, kind, values in tags:
        values = [start + spare] if tag == 273 else values
        packed = struct.pack(f"<{len(values)}{kind}", *values)
        if len(packed) > 4:
            packed, rest = struct.pack("<I", start + len(rest)), rest + packed
        entries += struct.pack("<HHI", tag, {"H": 3, "I": 4}[kind], len(values))
        entries += packed.ljust(4, b"\0")
    header = b"II*\0" + struct.pack("<IH", 8, len(tags))
    path.write_bytes(header + entries + bytes(4) + rest + content)


def test_images_are_found_by_suffix_whatever_its_case(tmp_path):
    for name in ("b.JPG", "a.tiff", "notes.txt", "c.webp", "Thumbs.db", "d.npy", "._b.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [p.name for p in find_images(tmp_path)] == ["a.tiff", "b.JPG", "c.webp", "d.npy"]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "LA", "1"])
def test_images_of_other_modes_are_converted(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode).save(path)
    for channels in (1, 3):
        image = read_image(path, channels)
        assert image.shape == (4, 5, channels) and image.dtype == np.uint8
        assert (image == 255).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_the_exif_rotation_is_applied(tmp_path, suffix):
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, :8] = 255
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(image).save(path, exif=_exif(ROTATED))
    upright = read_image(path, 3)
    assert upright.shape == (16, 8, 3) and image_size(path) == (16, 8)
    assert upright[:7].min() > 200 and upright[9:].max() < 50


XMP = '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def _chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def _turned(how: str) -> bytes:
    """The chunk of a PNG that says that it is turned."""
    exif = _exif(ROTATED).tobytes()
    if how == "exif":
        return _chunk(b"eXIf", exif.removeprefix(b"Exif\0\0"))
    if how == "profile":
        profile = f"\nexif\n{len(exif):8}\n{exif.hex()}\n".encode()
        return _chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile))
    return _chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP.encode())


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("how", ["exif", "profile", "xmp"])
def test_every_way_of_a_png_to_say_that_it_is_turned_is_obeyed(tmp_path, how, late):
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, :8] = 255
    path = tmp_path / "photo.png"
    Image.fromarray(image).save(path)
    content = path.read_bytes()
    at = content.index(b"IEND" if late else b"IDAT") - 4
    path.write_bytes(content[:at] + _turned(how) + content[at:])
    upright = read_image(path, 3)
    assert upright.shape == (16, 8, 3) and image_size(path) == (16, 8)
    assert upright[:7].min() == 255 and upright[9:].max() == 0
    assert image_size(path, upright=False) == (8, 16)


def test_other_texts_after_the_pixels_do_not_make_the_header_decode_them(tmp_path, monkeypatch):
    path = tmp_path / "dated.png"
    Image.new("RGB", (16, 8)).save(path)
    content = path.read_bytes()
    at = content.index(b"IEND") - 4
    path.write_bytes(content[:at] + _chunk(b"tEXt", b"date:create\0today") + content[at:])
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert image_size(path) == (8, 16)


def test_the_pages_of_a_file_are_read_one_by_one(tmp_path):
    pages = [Image.new("RGB", (5, 4), (9 * i, 9, 9)) for i in range(3)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    assert (read_image(tmp_path / "stack.tif", 3)[..., 0] == 0).all()
    page = Page(tmp_path / "stack.tif", 2)
    assert (read_image(page, 3)[..., 0] == 18).all() and page.stem == "stack_002"
    assert image_size(page) == (4, 5)
    with pytest.raises(InputError, match=r"cannot read image .*stack\.tif"):
        read_image(Page(tmp_path / "stack.tif", 3), 3)


@pytest.mark.parametrize("suffix", ["png", "tif", "npy"])
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_of_16_bits_is_scaled_without_loss(tmp_path, suffix, channels):
    values = np.array([[0, 1, 256], [257, 4095, 65535]], np.uint16)
    path = tmp_path / f"deep.{suffix}"
    if suffix == "npy":
        np.save(path, np.repeat(values[..., None], channels, axis=2))
    else:
        Image.fromarray(values).save(path)
    image = read_image(path, channels)
    assert image.shape == (2, 3, channels) and image.dtype == np.float32
    assert len(np.unique(image)) == 6 and image.min() == 0 and image.max() == 255
    for k in range(channels):
        np.testing.assert_allclose(image[..., k], values.astype(float) / 257, rtol=1e-6)


@pytest.mark.parametrize("value", [3000.0, 70000])
def test_images_of_32_bits_are_refused_rather_than_clipped(tmp_path, value):
    kind = np.int32 if isinstance(value, int) else np.float32
    Image.fromarray(np.full((4, 5), value, kind)).save(tmp_path / "deep.tif")
    with pytest.raises(InputError, match=r"deep\.tif has mode .*needs 8 or 16"):
        read_image(tmp_path / "deep.tif", 1)


def test_arrays_are_images_of_any_channels(tmp_path):
    image = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    np.save(tmp_path / "bands.npy", image)
    np.testing.assert_array_equal(read_image(tmp_path / "bands.npy", 5), image)
    assert image_size(tmp_path / "bands.npy") == (2, 3)
    with pytest.raises(InputError, match=r"bands\.npy has 5 channels and data\.channels is 3"):
        read_image(tmp_path / "bands.npy", 3)
    np.save(tmp_path / "real.npy", image.astype(np.float32) + 0.5)
    assert read_image(tmp_path / "real.npy", 5)[0, 0, 0] == 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.full((2, 3), np.nan, np.float32), "NaN"),
        (np.zeros((2, 3), np.int64), "int64"),
        (np.zeros((2, 3, 1, 1), np.uint8), r"\[2, 3, 1, 1\]"),
        (np.array([{}], object), "cannot read image"),
    ],
)
def test_other_arrays_are_refused(tmp_path, content, message):
    np.save(tmp_path / "array.npy", content, allow_pickle=True)
    with pytest.raises(InputError, match=message) as error:
        read_image(tmp_path / "array.npy", 1)
    assert "array.npy" in str(error.value)


def test_alpha_is_a_fourth_channel_where_four_are_wanted(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (4, 5, 4), np.uint8)
    Image.fromarray(image, "RGBA").save(tmp_path / "image.png")
    np.testing.assert_array_equal(read_image(tmp_path / "image.png", 4), image)
    np.testing.assert_array_equal(read_image(tmp_path / "image.png", 3), image[..., :3])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("bands", [2, 4, 5])
def test_tiffs_of_more_bands_are_read_whole(tmp_path, bands, dtype):
    # Pillow knows none of them but the one of four times 8 bits, of which it gives three.
    image = np.random.default_rng(0).integers(0, 256, (6, 7, bands)).astype(dtype)
    _tiff(tmp_path / "bands.tif", image)
    expected = image if dtype == np.uint8 else image.astype(np.float32) / 257
    np.testing.assert_array_equal(read_image(tmp_path / "bands.tif", bands), expected)
    assert image_size(tmp_path / "bands.tif") == (6, 7)


def test_pages_are_channels_where_there_are_as_many(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (4, 5, 6), np.uint8)
    pages = [Image.fromarray(image[..., k]) for k in range(6)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(read_image(tmp_path / "stack.tif", 6), image)


def test_palette_masks_keep_their_ids_whatever_their_colours(tmp_path):
    for number, palette in enumerate((voc_palette(3), ((9, 9, 9), (9, 9, 9), (0, 0, 0)))):
        path = tmp_path / f"{number}.png"
        save_label(path, LABEL, Classes(NAMES, palette))
        with Image.open(path) as picture:
            assert picture.mode == "P"
        np.testing.assert_array_equal(read_label(path, IDS), LABEL)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_grey_masks_are_ids_and_255_is_kept(tmp_path, dtype):
    path = tmp_path / ("mask.tif" if dtype == np.int32 else "mask.png")
    Image.fromarray(LABEL.astype(dtype)).save(path)
    read = read_label(path, IDS)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, LABEL)


def test_one_bit_masks_are_ids_0_and_1(tmp_path):
    label = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    Image.fromarray(label.astype(bool)).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_label(tmp_path / "mask.png", IDS), label)


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_masks_of_2_or_4_bits_are_refused_rather_than_scaled(tmp_path, bits):
    _small_png(tmp_path / "grey.png", bits, palette=False)
    with Image.open(tmp_path / "grey.png") as picture:
        assert np.asarray(picture).tolist() == [[i * 255 // (2**bits - 1) for i in range(4)]]
    message = rf"grey\.png is grey with {bits} bits a pixel: needs 8.* Save .* 8-bit PNG"
    with pytest.raises(InputError, match=message):
        read_label(tmp_path / "grey.png", IDS)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_palette_masks_of_few_bits_keep_their_ids(tmp_path, bits):
    _small_png(tmp_path / "palette.png", bits, palette=True)
    assert read_label(tmp_path / "palette.png", {i: i for i in range(4)}).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("high", [3, 254, 300])
def test_values_without_an_id_are_named_with_the_file_and_their_pixels(tmp_path, high):
    label = np.zeros((4, 5), np.uint16 if high > 255 else np.uint8)
    label[1, :3] = high
    Image.fromarray(label).save(tmp_path / "bad.png")
    message = rf"bad\.png holds ids {high} \(3 pixels\): needs 0\.\.2, 255"
    with pytest.raises(InputError, match=message):
        read_label(tmp_path / "bad.png", IDS)


def test_values_become_the_ids_of_a_table_once():
    values = np.array([[0, 1, 150], [150, 0, 255]], np.uint8)
    ade = {0: 255} | {i: i - 1 for i in range(1, 151)}
    expected = [[255, 0, 149], [149, 255, 255]]
    for dtype in (np.uint8, np.uint16, np.int32):
        read = translate(values.astype(dtype), ade, Path("x"))
        assert read.tolist() == expected and read.dtype == np.uint8


def test_255_may_be_a_class():
    values = np.array([[0, 255]], np.uint8)
    assert translate(values, {0: 0, 255: 1}, Path("x")).tolist() == [[0, 1]]


def test_colours_become_ids(tmp_path):
    colours = np.array([[(1, 2, 3), (200, 0, 7)], [(200, 0, 7), (0, 0, 0)]], np.uint8)
    Image.fromarray(colours).save(tmp_path / "mask.png")
    ids = {(1, 2, 3): 0, (200, 0, 7): 1, (0, 0, 0): 255}
    assert read_colours(tmp_path / "mask.png", ids).tolist() == [[0, 1], [1, 255]]
    del ids[0, 0, 0]
    message = r"mask\.png holds colours \(0, 0, 0\) \(1 pixels\): needs \(1, 2, 3\), \(200, 0, 7\)"
    with pytest.raises(InputError, match=message):
        read_colours(tmp_path / "mask.png", ids)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colour_masks_are_refused_as_ids(tmp_path, mode):
    Image.new(mode, (5, 4)).save(tmp_path / "colour.png")
    with pytest.raises(InputError, match=rf"colour\.png has mode {mode}: needs class ids.*colours"):
        read_label(tmp_path / "colour.png", IDS)


def test_strange_names_are_shown_on_one_line():
    assert shown(Path("a/b c.png")) == "a/b c.png" and shown(Path("café.png")) == "café.png"
    assert shown(Path("a\nb.png")) == r"'a\nb.png'"


@pytest.mark.parametrize("channels", [1, 3])
def test_big_endian_files_are_read(tmp_path, channels):
    values = np.array([[0, 1, 256], [257, 4095, 65535]], np.uint16)
    expected = np.repeat((values.astype(np.float32) / 257)[..., None], channels, axis=2)
    content = Image.frombytes("I;16B", (3, 2), values.astype(">u2").tobytes())
    content.save(tmp_path / "deep.tif")
    np.save(tmp_path / "deep.npy", np.repeat(values[..., None], channels, 2).astype(">u2"))
    np.save(tmp_path / "real.npy", expected.astype(">f4"))
    for name in ("deep.tif", "deep.npy", "real.npy"):
        image = read_image(tmp_path / name, channels)
        assert image.dtype == np.float32 and image.dtype.isnative
        np.testing.assert_array_equal(image, expected)
        assert is_deep(tmp_path / name, channels)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_broken_exif_data_are_an_input_error_or_passed_over(tmp_path, suffix):
    path = tmp_path / f"photo.{suffix}"
    Image.new("RGB", (8, 6)).save(path, exif=b"Exif\0\0no TIFF header at all")
    for read in (lambda: read_image(path, 3), lambda: image_size(path)):
        try:
            read()
        except InputError as error:
            assert f"photo.{suffix}" in str(error)


def test_broken_exif_data_of_a_png_are_named(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "photo.png", exif=b"no TIFF header at all")
    with pytest.raises(InputError, match=r"photo\.png has EXIF data that cannot be read"):
        read_image(tmp_path / "photo.png", 3)


def test_the_header_tells_what_is_deep(tmp_path):
    grey = np.zeros((4, 5), np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "plain.png")
    _tiff(tmp_path / "deep.tif", np.zeros((4, 5, 5), np.uint16))
    _tiff(tmp_path / "flat.tif", np.zeros((4, 5, 5), np.uint8))
    (tmp_path / "broken.png").write_bytes(b"")
    found = {p.name: is_deep(p, 5 if p.suffix == ".tif" else 1) for p in tmp_path.iterdir()}
    assert {name for name, deep in found.items() if deep} == {"grey.png", "deep.tif"}
