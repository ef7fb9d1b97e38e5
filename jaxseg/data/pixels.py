"""What augmentation does to the pixels of one image [H,W,C], uint8 or float32 0..255, of any C.

OpenCV does the work where it is installed (the extra `fast`), Pillow and numpy do it elsewhere.
Both follow the same definitions and agree but for rounding; a run remembers which it began with.
"""

import math

import numpy as np
from PIL import Image

try:
    import cv2

    cv2.setNumThreads(0)  # the pipeline has threads and processes of its own
except ImportError:
    cv2 = None

BACKEND = "opencv" if cv2 else "pillow"
ANTIALIAS_BELOW = 0.5  # bilinear reads 2x2 pixels: below half the size it would skip some
TIE = 1e-4  # pixels: an output on the border of two takes the second, whatever the rounding
BLUR_SIGMA = 1.1  # pixels; what a kernel of 5 is taken for: 0.3 * ((5 - 1) / 2 - 1) + 0.8


def decode_jpeg(data: bytes) -> np.ndarray | None:
    """A whole, upright JPEG of 3 channels -> uint8 [H,W,3], to the bit what Pillow makes of it.

    None without OpenCV, and for a file that Pillow should judge: OpenCV is silent where it is cut
    off or damaged. Sound is one scan up to the end, in which each 255 is followed by 0, by which
    the format says that it is no marker.
    """
    scan = data[data.find(b"\xff\xda") :]
    sound = scan.endswith(b"\xff\xd9") and scan.count(b"\xff") == scan.count(b"\xff\x00") + 2
    if cv2 is None or not sound:
        return None
    how = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    return cv2.imdecode(np.frombuffer(data, np.uint8), how)


def resample(
    image: np.ndarray,
    start: tuple[int, int],
    factor: tuple[float, float],
    size: tuple[int, int],
) -> np.ndarray:
    """The window of image [H,W,C] at `start`, resized by `factor` to `size`: [*size,C].

    Of all three the height comes first. Output i lies at (i + 0.5) / factor - 0.5 from the start,
    clamped to the window. Bilinear; antialiased (a triangle of width 2 / factor) below half size.
    """
    (top, left), (rows, columns) = start, window(factor, size)
    image = image[top : top + rows, left : left + columns]
    if tuple(factor) == (1, 1):
        return image
    if min(factor) < ANTIALIAS_BELOW or (cv2 is None and min(factor) >= 1):
        return _pillow(image, factor, size)
    if cv2 is None or min(image.shape[:2]) == 1:  # which OpenCV may round to nothing
        dtype = image.dtype
        for axis, (n, f) in enumerate(zip(size, factor, strict=True)):
            image = _between(image, axis, (np.arange(n) + 0.5) / f - 0.5)
        return _like(image, dtype)
    scaled = _by_channels(lambda x: cv2.resize(x, None, fx=factor[1], fy=factor[0]), image)
    return scaled[: size[0], : size[1]]


def window(factor: tuple[float, float], size: tuple[int, int]) -> tuple[int, int]:
    """How many pixels of the source become `size` when resized by `factor`."""
    return tuple(math.ceil(n / f - 1e-6) for n, f in zip(size, factor, strict=True))


def nearest(
    label: np.ndarray,
    start: tuple[int, int],
    factor: tuple[float, float],
    size: tuple[int, int],
) -> np.ndarray:
    """As `resample`, for ids [...,H,W] -> [...,*size]: each output takes the pixel it lies in."""
    if tuple(factor) == (1, 1):
        return label[..., start[0] : start[0] + size[0], start[1] : start[1] + size[1]]
    for axis in (-2, -1):
        at = (np.arange(size[axis]) + 0.5) / factor[axis] + TIE
        at = start[axis] + at.astype(np.int64)
        label = label.take(np.minimum(at, label.shape[axis] - 1), axis)
    return label


def warp(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """image [H,W,C] at pixel positions y, x float32 [h,w]: [h,w,C], bilinear, edges repeated."""
    if cv2 is not None:
        how = {"interpolation": cv2.INTER_LINEAR, "borderMode": cv2.BORDER_REPLICATE}
        return _by_channels(lambda part: cv2.remap(part, x, y, **how), image)
    y, x = y.clip(0, image.shape[0] - 1), x.clip(0, image.shape[1] - 1)
    top, left = y.astype(np.int64), x.astype(np.int64)
    low, right = np.minimum(top + 1, image.shape[0] - 1), np.minimum(left + 1, image.shape[1] - 1)
    dy, dx = (y - top)[..., None], (x - left)[..., None]
    upper = image[top, left] * (1 - dx) + image[top, right] * dx
    lower = image[low, left] * (1 - dx) + image[low, right] * dx
    return _like(upper * (1 - dy) + lower * dy, image.dtype)


def mirror(image: np.ndarray) -> np.ndarray:
    """image [H,W,C], left to right."""
    if cv2 is not None:
        return _by_channels(lambda x: cv2.flip(x, 1), image)
    return image[:, ::-1]


def blur(image: np.ndarray) -> np.ndarray:
    """A Gaussian of 5x5 pixels, sigma 1.1; the image is mirrored about its edge pixels."""
    if cv2 is not None:
        return _by_channels(lambda x: cv2.GaussianBlur(x, (5, 5), BLUR_SIGMA), image)
    weights = np.exp(-(np.arange(-2, 3) ** 2) / (2 * BLUR_SIGMA**2))
    weights = (weights / weights.sum()).astype(np.float32)
    blurred = image.astype(np.float32)
    for axis in (0, 1):
        pads = [(2, 2) if i == axis else (0, 0) for i in range(3)]
        padded, n = np.pad(blurred, pads, mode="reflect"), image.shape[axis]
        blurred = sum(w * _span(padded, axis, k, n) for k, w in enumerate(weights))
    return _like(blurred, image.dtype)


def brighten(image: np.ndarray, offset: float, factor: float) -> np.ndarray:
    """(image + offset) * factor, within 0..255 after each."""

    def change(x: np.ndarray) -> np.ndarray:
        return ((x + np.float32(offset)).clip(0, 255) * np.float32(factor)).clip(0, 255)

    if image.dtype != np.uint8:
        return change(image)
    table = _like(change(np.arange(256, dtype=np.float32)), np.uint8)
    return cv2.LUT(image, table).reshape(image.shape) if cv2 is not None else table.take(image)


def turn_colours(image: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    """RGB [H,W,3] with its HSV saturation multiplied (at most 1) and its hue turned, in degrees."""
    if cv2 is not None and image.dtype == np.uint8:
        every = np.arange(256)
        hues = ((every + round(hue / 360 * 256)) % 256).astype(np.uint8)
        saturations = _like(every * saturation, np.uint8)
        h, s, v = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL))
        hsv = cv2.merge((cv2.LUT(h, hues), cv2.LUT(s, saturations), v))
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    red, green, blue = (image[..., i].astype(np.float32) for i in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    safe = np.where(spread > 0, spread, 1)
    sector = np.where(  # the hue in sixths of a turn, -1 .. 5
        value == red,
        (green - blue) / safe,
        np.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    spread = np.minimum(spread * np.float32(saturation), value)
    turned = np.empty_like(image)
    for channel, phase in enumerate((5, 3, 1)):
        k = (sector + np.float32(phase + hue / 60)) % 6
        part = value - spread * np.minimum(k, 4 - k).clip(0, 1)
        turned[..., channel] = _like(part, image.dtype)
    return turned


def _pillow(image: np.ndarray, factor: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
    bottom, right = (min(image.shape[i], size[i] / factor[i]) for i in (0, 1))
    box = (0, 0, right, bottom)

    def one(part: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(part).resize(size[::-1], Image.Resampling.BILINEAR, box))

    if image.shape[2] == 3 and image.dtype == np.uint8:
        return one(image)
    return np.stack([one(image[..., i]) for i in range(image.shape[2])], axis=2)


def _between(image: np.ndarray, axis: int, at: np.ndarray) -> np.ndarray:
    """image float32 or uint8 at positions between its pixels along an axis: float32."""
    last = image.shape[axis] - 1
    at = at.clip(0, last)
    low = at.astype(np.int64)
    part = (at - low).astype(np.float32).reshape(-1, *[1] * (2 - axis))
    near = image.take(low, axis).astype(np.float32)
    return near + part * (image.take(np.minimum(low + 1, last), axis) - near)


def _span(x: np.ndarray, axis: int, start: int, count: int) -> np.ndarray:
    return x[start : start + count] if axis == 0 else x[:, start : start + count]


def _like(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Floats as `dtype`: bytes are rounded and clipped."""
    if dtype == np.uint8:
        return np.rint(values).clip(0, 255).astype(np.uint8)
    return values.astype(dtype)


def _by_channels(function, image: np.ndarray) -> np.ndarray:
    """OpenCV takes four channels at a time, and drops a single one."""
    image = np.ascontiguousarray(image)
    parts = [function(image[..., i : i + 4]) for i in range(0, image.shape[2], 4)]
    parts = [part.reshape(*part.shape[:2], -1) for part in parts]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
