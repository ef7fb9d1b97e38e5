"""The verb `browse`: training examples as the network gets them, in one picture."""

import contextlib
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from jaxseg.data import pipeline
from jaxseg.data.colours import Classes, legend, overlay, rgb
from jaxseg.data.scene import BORDER, borders
from jaxseg.data.sources import SkipBad
from jaxseg.errors import InputError
from jaxseg.evaluate import open_source
from jaxseg.log import say
from jaxseg.train import augment_batch

GAP = 6  # pixels between examples
COLUMNS = 4  # examples in a row
WIDTH = 1600  # of the sheet, pixels at most


def browse(config: ConfigDict, output: Path, count: int = 16) -> int:
    """Draws the first `count` examples of the training stream; returns the exit code.

    Each is the augmented image beside itself under its label's colours, with white borders around
    the objects of data.objects, and a legend of the classes below. output: a file name that Pillow
    knows, such as sheet.png.
    """
    if output.suffix.lower() not in Image.registered_extensions():
        raise InputError(f"--output {output}: needs the name of a picture, such as sheet.png")
    if count < 1:
        raise InputError(f"--count {count}: needs at least 1")
    source = open_source(config, config.data.train_split)
    source = SkipBad(source) if config.data.on_bad_example == "skip" else source
    batches = pipeline.train_batches(source, config.data, batch=count, seed=config.train.seed)
    with contextlib.closing(batches):
        batch = next(batches)
    batch = jax.device_get(jax.jit(lambda batch: augment_batch(batch, 0, config))(batch))
    picture = sheet(batch["image"], batch["label"], source.classes, batch.get("masks"))
    try:
        picture.save(output)
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror or error}") from error
    say(f"{count} examples of {config.data.dataset}, {config.data.train_split}, in {output}")
    return 0


def sheet(
    images: np.ndarray, labels: np.ndarray, classes: Classes, masks: np.ndarray | None = None
) -> Image.Image:
    """images [B,H,W,C], labels [B,H,W] -> pairs of image and overlay, and the classes' legend.

    masks: uint8 [B,N,H,W] of objects, whose borders are drawn.
    """
    pairs = []
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        over = overlay(image, label, classes)
        for mask in () if masks is None else masks[i]:
            over[borders(mask)] = BORDER
        pairs.append(np.concatenate([rgb(image), over], axis=1))
    height, width = pairs[0].shape[:2]
    columns = min(len(pairs), COLUMNS)
    rows = -(-len(pairs) // columns)
    canvas = np.full((rows * (height + GAP), columns * (width + GAP), 3), 255, np.uint8)
    for i, pair in enumerate(pairs):
        top, left = (i // columns) * (height + GAP), (i % columns) * (width + GAP)
        canvas[top : top + height, left : left + width] = pair
    if canvas.shape[1] > WIDTH:
        size = (WIDTH, round(canvas.shape[0] * WIDTH / canvas.shape[1]))
        canvas = np.asarray(Image.fromarray(canvas).resize(size))
    key = legend(classes, np.unique(labels).tolist(), canvas.shape[1])
    return Image.fromarray(np.concatenate([canvas, np.asarray(key)]))
