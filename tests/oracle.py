"""A paper of objects that reads its answer from the image, and scenes that have it written there.

Of an image, channel 0 is `step` times the class, channel 1 `step` times the number of the object,
channel 2 its score in hundredths; with mean 0 and deviation 1 the network sees these numbers.
"""

import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg import models
from jaxseg.config import check, default
from jaxseg.data.colours import Classes, voc_palette
from jaxseg.data.objects import bounds
from jaxseg.data.sources import objects

CLASSES = Classes(("sky", "cat", "dog", "road"), voc_palette(4), (1, 2))
SIZES = [(24, 40), (30, 30), (24, 40), (17, 29), (40, 24), (24, 40)]
STEP = 20


class Model(nn.Module):
    num_classes: int
    things: tuple[int, ...] = ()
    slots: int = 6
    step: int = STEP
    says: str = "instances boxes"

    def fit(self, size):
        return tuple(-(-n // 8) * 8 for n in size)

    def inputs(self, batch):
        return (batch["boxes"], batch["rng"])

    @nn.compact
    def __call__(self, image, boxes=None, rng=None, *, train):
        assert (boxes is not None) == train
        seen = image * self.param("gain", nn.initializers.ones, ())
        return {"seen": seen, "drawn": jax.random.normal(rng) if train else jnp.zeros(())}


def loss(outputs, batch, *, num_classes, things=()):
    held = (batch["masks"].any((2, 3)) == (batch["classes"] >= 0)).all()
    value = jnp.mean(outputs["seen"] ** 2) * 1e-6 + jnp.where(held, 0.0, jnp.nan)
    return value, {"loss": value, "drawn": outputs["drawn"]}


def predict(outputs, image, *, num_classes, things=(), slots=6, step=STEP, says=""):
    ids, numbers, scores = jnp.moveaxis(outputs["seen"], -1, 0)
    ids, numbers = (jnp.round(x / step).astype(jnp.int32) for x in (ids, numbers))
    ids = ids.clip(0, num_classes - 1)
    masks = numbers[:, None] == jnp.arange(1, slots + 1)[:, None, None]
    there = masks.any((2, 3))
    classes = jnp.where(there, (masks * ids[:, None]).max((2, 3)), -1)
    instances = {"masks": masks, "classes": classes}
    instances["scores"] = (masks * scores[:, None]).max((2, 3)) / 100
    if "boxes" in says:
        rows, columns = masks.any(3), masks.any(2)
        ends = [rows.argmax(-1), columns.argmax(-1)]
        ends += [x.shape[-1] - x[..., ::-1].argmax(-1) for x in (rows, columns)]
        instances["boxes"] = jnp.stack(ends, axis=-1).astype(jnp.float32)
    out = {"instances": instances, "semantic": ids, "panoptic": ids * 1000 + numbers}
    return {key: value for key, value in out.items() if key in says}


def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes it one of the papers."""
    module = types.ModuleType("jaxseg.models.oracle")
    module.Model, module.loss, module.predict = Model, loss, predict
    names = models.names()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(models, "names", lambda: [*names, "oracle"])


def config(says: str = "instances boxes", step: int = STEP, **asked):
    """Of the oracle, complete."""
    filled = default()
    filled.data.update(mean=(0.0,) * 3, std=(1.0,) * 3, objects=6, crop=(24, 24), threads=1)
    filled.model.update(name="oracle", num_classes=4, things=(1, 2), says=says, step=step)
    filled.eval.update({"batch": 2, "pictures": 2, "buckets": 2, **asked})
    models.complete(filled)
    check(filled)
    return filled


class Scenes:
    """Stuff with rectangles on it, some crowds, some void; `wrong` of the answers are off."""

    classes, channels, instances, dtype = CLASSES, 3, True, np.dtype(np.uint8)

    def __init__(self, wrong: float = 0.0, step: int = STEP, most: int = 5):
        self.wrong, self.step, self.most = wrong, step, most

    def __len__(self) -> int:
        return len(SIZES)

    def size(self, index: int) -> tuple[int, int]:
        return SIZES[index]

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng(index)
        size = self.size(index)
        label = np.where(np.arange(size[0]) < 9, 0, 3)[:, None].repeat(size[1], 1).astype(np.uint8)
        answer, numbers = label.copy(), np.zeros(size, np.uint8)
        scores = np.zeros(size, np.uint8)
        masks, classes = [], []
        for number in range(1, (index % 3 and self.most) + 1):
            y, x = 8 * rng.integers(0, size[0] // 8 - 1, 2)
            h, w = rng.integers(4, 12, 2)
            box = np.s_[y : y + h, x : x + w]
            c = int(rng.integers(1, 3))
            for mask in masks:
                mask[box] = 0
            masks.append(np.zeros(size, np.uint8))
            masks[-1][box], label[box] = 1, c
            classes.append(c)
            if rng.random() < self.wrong:
                box, c = np.s_[y + 1 : y + h + 2, x : x + w], rng.integers(1, 3)
            answer[box], numbers[box], scores[box] = c, number, rng.integers(20, 100)
        found = objects(masks, classes, [False] * len(masks), size)
        kept = found["masks"].any((1, 2))
        found = {key: value[kept] for key, value in found.items()}
        image = np.stack([answer * self.step, numbers * self.step, scores], axis=-1)
        name = f"scene{index}"
        return {"image": image.astype(np.uint8), "label": label, "instances": found, "name": name}


def answer(example: dict) -> dict:
    """What is written in the image: the objects found."""
    ids, numbers = (example["image"][..., k] // STEP for k in (0, 1))
    values = [v for v in np.unique(numbers) if v]
    masks = np.array([numbers == v for v in values], bool).reshape(-1, *ids.shape)
    classes = np.array([ids[mask].max() for mask in masks], np.int32)
    scores = np.array([example["image"][mask][:, 2].max() for mask in masks]) / np.float32(100)
    panoptic = ids.astype(np.int32) * 1000 + numbers
    found = {"masks": masks, "classes": classes, "scores": scores, "boxes": bounds(masks)}
    return {**found, "panoptic": panoptic, "semantic": ids}
