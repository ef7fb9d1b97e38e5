"""Objects as pictures: one map of them for an image, and the overlay that shows it."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from jaxseg.data import pixels
from jaxseg.data.colours import IGNORE, Classes, enlarged, rgb, side_by_side
from jaxseg.data.results import STEP, VOID

SHADES = (1.0, 0.7, 1.25, 0.55, 0.85, 1.4)  # of a class's colour, object by object
BORDER = (255, 255, 255)
NAMED = 24  # pixels; smaller objects are drawn without their name


class Scene(NamedTuple):
    """What is seen where: the segments 1..n of an image."""

    numbers: np.ndarray  # int32 [H,W], 0 = nothing
    classes: tuple[int, ...]  # [n]
    scores: tuple[float | None, ...]  # [n]
    things: tuple[bool, ...]  # [n]: an object, and no stuff

    @property
    def label(self) -> np.ndarray:
        """uint8 [H,W]: the class ids, 255 where nothing is seen."""
        return np.array([IGNORE, *self.classes], np.uint8)[self.numbers]

    @property
    def objects(self) -> np.ndarray:
        """int32 [H,W]: the number of the object among the objects, 0 = none."""
        table = np.cumsum([False, *self.things]) * np.array([False, *self.things])
        return table.astype(np.int32)[self.numbers]


def painted(objects: Mapping[str, np.ndarray], size: tuple[int, int], least: float = 0.0) -> Scene:
    """The objects with a score of at least `least`, the surest on top and first; size: [H,W].

    objects: `masks` [n,H,W], `classes` [n] and, where they were found, `scores` [n]; without them
    those of a truth, whose later ones are on top.
    """
    masks, numbers = objects["masks"].astype(bool), np.zeros(size, np.int32)
    order, values = list(range(len(masks))), None
    if "scores" in objects:
        values = objects["scores"]
        order = [i for i in np.argsort(-values, kind="stable").tolist() if values[i] >= least]
    above = list(enumerate(order, start=1))
    for number, i in above if values is None else above[::-1]:
        numbers[masks[i]] = number
    classes = tuple(int(objects["classes"][i]) for i in order)
    scores = tuple(None if values is None else float(values[i]) for i in order)
    return Scene(numbers, classes, scores, (True,) * len(order))


def of_panoptic(panoptic: np.ndarray) -> Scene:
    """The segments of a panoptic map int [H,W]; void is nothing."""
    values, numbers = np.unique(panoptic, return_inverse=True)
    kept = values // STEP != VOID // STEP
    table = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    values = values[kept].tolist()
    return Scene(
        table[numbers.reshape(panoptic.shape)],
        tuple(value // STEP for value in values),
        (None,) * len(values),
        tuple(value % STEP > 0 for value in values),
    )


def shrunk(scene: Scene, size: tuple[int, int]) -> Scene:
    """The scene at another size."""
    factor = tuple(n / have for n, have in zip(size, scene.numbers.shape, strict=True))
    return scene._replace(numbers=pixels.nearest(scene.numbers, (0, 0), factor, size))


def overlay(image: np.ndarray, scene: Scene, classes: Classes, alpha: float = 0.5) -> np.ndarray:
    """The scene over image [H,W,C]: uint8 [H,W,3]. Each object in a shade of its class's colour,
    with a border, its class and its score."""
    drawn = rgb(image).astype(np.float32)
    table = np.zeros((len(scene.classes) + 1, 3), np.float32)
    for number, (c, thing) in enumerate(zip(scene.classes, scene.things, strict=True), start=1):
        shade = SHADES[number % len(SHADES)] if thing else 1.0
        table[number] = np.clip(np.float32(classes.palette[c]) * shade, 0, 255)
    there = scene.numbers > 0
    drawn[there] = (1 - alpha) * drawn[there] + alpha * table[scene.numbers[there]]
    drawn[borders(scene.objects)] = BORDER
    picture = Image.fromarray(drawn.round().astype(np.uint8))
    _name(picture, scene, classes)
    return np.asarray(picture)


def borders(numbers: np.ndarray) -> np.ndarray:
    """bool [H,W]: the pixels of objects int [H,W] whose right or lower neighbour is another's, or
    whose left or upper one is no object's."""
    edge = np.zeros(numbers.shape, bool)
    for drawn, ids in ((edge, numbers), (edge.T, numbers.T)):
        differ = ids[1:] != ids[:-1]
        drawn[:-1] |= differ & (ids[:-1] > 0)
        drawn[1:] |= differ & (ids[1:] > 0) & (ids[:-1] == 0)
    return edge


def _name(picture: Image.Image, scene: Scene, classes: Classes) -> None:
    """Writes the class and score of each object that is large enough, in its middle."""
    numbers = scene.numbers
    pen = ImageDraw.Draw(picture)
    count = len(scene.classes) + 1
    area = np.bincount(numbers.ravel(), minlength=count)
    y, x = (
        np.bincount(numbers.ravel(), np.broadcast_to(at, numbers.shape).ravel(), count)
        for at in (np.arange(numbers.shape[0])[:, None], np.arange(numbers.shape[1]))
    )
    for number in range(1, count):
        if scene.things[number - 1] and area[number] >= NAMED**2:
            score = scene.scores[number - 1]
            text = classes.names[scene.classes[number - 1]]
            text = text if score is None else f"{text} {score:.2f}"
            at = (x[number] / area[number], y[number] / area[number])
            pen.text(at, text, fill="white", anchor="mm", stroke_width=1, stroke_fill="black")


def strip(image: np.ndarray, truth: Scene, found: Scene, classes: Classes) -> Image.Image:
    """image | truth | what was found, side by side, with a legend of the classes below."""
    image = enlarged(rgb(image))
    scenes = [s._replace(numbers=enlarged(s.numbers)) for s in (truth, found)]
    panels = [image, *(overlay(image, scene, classes) for scene in scenes)]
    return side_by_side(panels, sorted({*truth.classes, *found.classes}), classes)
