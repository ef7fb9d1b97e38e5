"""Augmentation: each transform is a plain function of an example and a random generator.

An example has `image` uint8 [H,W,C] and `label` uint8 [H,W]; both stay aligned. The order, the same
for every experiment, is in `augment`.
"""

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance

from jaxseg.data.colours import IGNORE


def augment(example: dict, rng: np.random.Generator, data: ConfigDict) -> dict:
    """Scale, crop, flip, colour, as section `config.data` asks: an example of size data.crop."""
    image, label = example["image"], example["label"]
    factor = rng.uniform(*data.scale)
    if factor != 1:
        size = tuple(max(1, round(n * factor)) for n in label.shape)
        image, label = resize(image, size), resize_label(label, size)
    image, label = random_crop(image, label, data.crop, np.uint8(np.round(data.mean)), rng)
    if data.flip and rng.random() < 0.5:
        image, label = image[:, ::-1], label[:, ::-1]
    if data.flip_vertical and rng.random() < 0.5:
        image, label = image[::-1], label[::-1]
    if data.photometric:
        image = photometric(image, rng)
    return {"image": np.ascontiguousarray(image), "label": np.ascontiguousarray(label)}


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H,W,C] -> [*size,C], bilinear, antialiased where smaller."""
    if image.shape[:2] == size:
        return image
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    return np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR)).reshape(*size, -1)


def resize_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H,W] -> size, the nearest pixel's id."""
    if label.shape == size:
        return label
    return np.asarray(Image.fromarray(label).resize(size[::-1], Image.Resampling.NEAREST))


def random_crop(
    image: np.ndarray,
    label: np.ndarray,
    size: tuple[int, int],
    fill: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """A random window of `size`; where the image is smaller, `fill` and 255 around it."""
    pads = [(0, max(0, want - have)) for have, want in zip(label.shape, size, strict=True)]
    if any(after for _, after in pads):
        canvas = np.empty(
            (*(n + after for n, (_, after) in zip(label.shape, pads, strict=True)), image.shape[2]),
            np.uint8,
        )
        canvas[:] = fill
        canvas[: label.shape[0], : label.shape[1]] = image
        image, label = canvas, np.pad(label, pads, constant_values=IGNORE)
    top, left = (
        rng.integers(have - want + 1) for have, want in zip(label.shape, size, strict=True)
    )
    window = np.s_[top : top + size[0], left : left + size[1]]
    return image[window], label[window]


def photometric(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """SSD's distortion (Liu et al. 2016, section 2.2): brightness +-32, contrast and saturation 0.5
    to 1.5, hue +-18 degrees, each with probability 0.5. uint8 [H,W,C] -> the same."""
    coin = rng.random(4) < 0.5
    brightness = rng.uniform(-32, 32) if coin[0] else 0.0
    contrast = rng.uniform(0.5, 1.5) if coin[1] else 1.0
    table = np.clip((np.arange(256) + brightness) * contrast, 0, 255).astype(np.uint8)
    image = table[image]
    if image.shape[2] != 3:
        return image
    if coin[2]:
        picture = ImageEnhance.Color(Image.fromarray(image)).enhance(rng.uniform(0.5, 1.5))
        image = np.asarray(picture)
    if coin[3]:
        hsv = np.array(Image.fromarray(image).convert("HSV"))
        hsv[..., 0] += np.uint8(round(rng.uniform(-18, 18) / 360 * 256) % 256)
        picture = Image.frombytes("HSV", image.shape[1::-1], hsv.tobytes())
        image = np.asarray(picture.convert("RGB"))
    return image
