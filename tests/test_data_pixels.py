"""Pixels: each operation against its definition in float64, with OpenCV and without."""

import colorsys
import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from jaxseg.data import pixels
from jaxseg.data.files import read_image


@pytest.fixture(params=["pillow", "opencv"])
def backend(request, monkeypatch):
    """Runs a test with either library."""
    if request.param == "opencv":
        pytest.importorskip("cv2", reason="needs OpenCV, the extra fast")
    else:
        monkeypatch.setattr(pixels, "cv2", None)
    return request.param


def _image(size: tuple[int, int], channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 60, (*size, channels))
    smooth = ndimage.gaussian_filter(noise, (2, 2, 0)) * 6 + rng.normal(0, 4, (*size, channels))
    return (smooth + 128).clip(0, 255).round().astype(np.uint8)


def _hat(image: np.ndarray, start: int, factor: float, n: int, axis: int) -> np.ndarray:
    """Along one axis, pixel by pixel: bilinear, clamped to the window; wider when small."""
    count = int(np.ceil(n / factor - 1e-6))
    part = np.moveaxis(image.astype(np.float64), axis, 0)[start : start + count]
    out = []
    for i in range(n):
        at = (i + 0.5) / factor - 0.5
        if factor >= 0.5:
            at, width = min(max(at, 0), len(part) - 1), 1.0
        else:
            width = 1 / factor
        weights = np.maximum(0, 1 - np.abs(np.arange(len(part)) - at) / width)
        out.append(np.tensordot(weights / weights.sum(), part, 1))
    return np.moveaxis(np.array(out), 0, axis)


@pytest.mark.parametrize("factor", [0.3, 0.5, 0.61, 0.95, 1.0, 1.37, 2.0])
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_window_is_resampled_bilinearly(backend, factor, channels, dtype):
    image, start, size = _image((83, 70), channels).astype(dtype), (5, 3), (20, 17)
    out = pixels.resample(image, start, (factor, factor), size)
    want = _hat(_hat(image, start[0], factor, size[0], 0), start[1], factor, size[1], 1)
    assert out.dtype == dtype and out.shape == (*size, channels)
    assert np.abs(out - want).max() <= (1.01 if dtype == np.uint8 else 0.02)


@pytest.mark.parametrize("factor", [0.31, 0.5, 0.77, 1.0, 1.9])
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (33, 1), (31, 47)])
def test_whole_images_of_any_size_are_resampled(backend, factor, size):
    image = _image(size)
    want = tuple(max(1, round(n * factor)) for n in size)
    factors = tuple(a / b for a, b in zip(want, size, strict=True))
    assert pixels.resample(image, (0, 0), factors, want).shape == (*want, 3)
    assert pixels.nearest(image[..., 0], (0, 0), factors, want).shape == want


@pytest.mark.parametrize("factor", [0.3, 0.8, 1.0, 1.7])
def test_labels_take_the_pixel_that_they_lie_in(factor):
    label = np.arange(40 * 50).reshape(40, 50)
    out = pixels.nearest(np.stack([label, -label]), (3, 4), (factor, factor), (11, 12))
    rows = [3 + int((i + 0.5) / factor + 1e-4) for i in range(11)]
    columns = [4 + int((i + 0.5) / factor + 1e-4) for i in range(12)]
    np.testing.assert_array_equal(out[0], label[np.ix_(rows, columns)])
    np.testing.assert_array_equal(out[1], -out[0])


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_warping_is_bilinear_and_repeats_the_edge(backend, channels):
    image, rng = _image((30, 40), channels), np.random.default_rng(1)
    y = rng.uniform(-3, 33, (21, 22)).astype(np.float32)
    x = rng.uniform(-3, 43, (21, 22)).astype(np.float32)
    out = pixels.warp(image, y, x)
    for c in range(channels):
        want = ndimage.map_coordinates(
            image[..., c].astype(np.float64), [y, x], order=1, mode="nearest"
        )
        # OpenCV keeps positions to 1/32 of a pixel.
        assert np.abs(out[..., c] - want).max() <= 0.51 + np.ptp(image) / 32


def test_warping_by_whole_pixels_moves_them(backend):
    image = _image((12, 15))
    y, x = (np.float32(i) for i in np.indices((8, 9)))
    np.testing.assert_array_equal(pixels.warp(image, y + 2, x + 3), image[2:10, 3:12])


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_mirroring_reverses_columns(backend, channels):
    image = _image((5, 6), channels)
    np.testing.assert_array_equal(pixels.mirror(image), image[:, ::-1])


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_blur_is_a_gaussian_of_five_pixels(backend, dtype):
    image = _image((20, 31)).astype(dtype)
    want = ndimage.gaussian_filter(
        image.astype(np.float64), (1.1, 1.1, 0), mode="mirror", radius=(2, 2, 0)
    )
    out = pixels.blur(image)
    assert out.dtype == dtype and np.abs(out - want).max() <= (1.01 if dtype == np.uint8 else 0.01)


@pytest.mark.parametrize(("offset", "factor"), [(-30, 1.5), (25, 0.5), (0, 1.2)])
def test_brightness_and_contrast_clip_after_each(backend, offset, factor):
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    want = np.clip(np.clip(np.arange(256) + offset, 0, 255) * factor, 0, 255).reshape(16, 16, 1)
    out = pixels.brighten(image, offset, factor)
    assert out.dtype == np.uint8 and np.abs(out - want).max() <= 0.5
    np.testing.assert_allclose(
        pixels.brighten(image.astype(np.float32), offset, factor), want, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("saturation", "hue"), [(1.0, 18.0), (1.0, -18.0), (0.5, 0.0), (1.5, 7.3), (1.2, -11.0)]
)
def test_saturation_and_hue_are_those_of_colorsys(backend, saturation, hue):
    image = np.random.default_rng(0).integers(0, 256, (30, 31, 3), np.uint8)
    image[0, :6] = [[0, 0, 0], [255, 255, 255], [9, 9, 9], [255, 0, 0], [0, 255, 0], [0, 0, 255]]
    out = pixels.turn_colours(image, saturation, hue)
    errors = []
    for (r, g, b), got in zip(image.reshape(-1, 3), out.reshape(-1, 3), strict=True):
        h, s, v = colorsys.rgb_to_hsv(r / 255, g / 255, b / 255)
        want = colorsys.hsv_to_rgb((h + hue / 360) % 1, min(1, s * saturation), v)
        errors.append(np.abs(got - 255 * np.array(want)).max())
    # OpenCV keeps hue and its turn in 8 bits, where a unit moves a colour by 6 at most.
    assert max(errors) <= (0.51 if backend == "pillow" else 9)
    assert np.mean(errors) < (0.45 if backend == "pillow" else 2.5)


def test_saturation_and_hue_of_floats_are_exact():
    image = np.random.default_rng(0).uniform(0, 255, (9, 10, 3)).astype(np.float32)
    out = pixels.turn_colours(image, 1.3, 12.5)
    for pixel, got in zip(image.reshape(-1, 3), out.reshape(-1, 3), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(pixel / 255).astype(float))
        want = colorsys.hsv_to_rgb((h + 12.5 / 360) % 1, min(1, s * 1.3), v)
        np.testing.assert_allclose(got, 255 * np.array(want), atol=2e-3)


@pytest.mark.parametrize(
    "options",
    [{}, {"subsampling": 0}, {"subsampling": 2}, {"progressive": True}, {"quality": 30}],
)
@pytest.mark.parametrize("size", [(16, 24), (31, 45)])
def test_opencv_decodes_jpegs_as_pillow_does(options, size):
    pytest.importorskip("cv2", reason="needs OpenCV, the extra fast")
    file = io.BytesIO()
    Image.fromarray(_image(size)).save(file, "JPEG", **options)
    data = file.getvalue()
    decoded = pixels.decode_jpeg(data)
    assert (decoded is None) == ("progressive" in options)  # of many scans: left to Pillow
    if decoded is not None:
        np.testing.assert_array_equal(decoded, np.asarray(Image.open(file)))
    assert pixels.decode_jpeg(data[:-30]) is None


def test_damaged_jpegs_are_left_to_pillow():
    pytest.importorskip("cv2", reason="needs OpenCV, the extra fast")
    file, rng, refused = io.BytesIO(), np.random.default_rng(0), 0
    Image.fromarray(_image((120, 160))).save(file, "JPEG", quality=90)
    for _ in range(60):
        data = bytearray(file.getvalue())
        at = int(rng.integers(700, len(data) - 400))
        data[at : at + 200] = rng.bytes(200)
        try:
            want = np.asarray(Image.open(io.BytesIO(data)))
        except (OSError, SyntaxError):
            want = None
        decoded = pixels.decode_jpeg(bytes(data))
        assert decoded is None or np.array_equal(decoded, want)
        refused += want is None
    assert refused > 5


def test_without_opencv_no_jpeg_is_decoded(monkeypatch):
    monkeypatch.setattr(pixels, "cv2", None)
    file = io.BytesIO()
    Image.fromarray(_image((8, 8))).save(file, "JPEG")
    assert pixels.decode_jpeg(file.getvalue()) is None


@pytest.mark.parametrize("kind", ["upright", "turned", "grey", "cmyk"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_read_the_same_with_either_library(backend, kind, channels, tmp_path):
    picture, turned = Image.fromarray(_image((16, 24))), Image.Exif()
    turned[0x112] = 6
    picture = picture.convert({"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB"))
    picture.save(tmp_path / "a.jpg", **({"exif": turned} if kind == "turned" else {}))
    want = Image.open(tmp_path / "a.jpg").convert("L" if channels == 1 else "RGB")
    want = np.asarray(want).reshape(16, 24, channels)
    want = np.rot90(want, 3) if kind == "turned" else want
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg", channels), want)
