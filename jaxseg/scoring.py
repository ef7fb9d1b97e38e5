"""What an evaluation adds up over images: pixels for a semantic network, or objects."""

from operator import itemgetter
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxseg import models
from jaxseg.data.colours import IGNORE, Classes
from jaxseg.data.objects import bounds, of_classes
from jaxseg.data.results import to_panoptic
from jaxseg.data.scene import Scene
from jaxseg.data.transforms import fitted_size
from jaxseg.found import Found, unpacked
from jaxseg.ops import average_precision, boundary, matting, metrics, panoptic_quality


class Pixels:
    """Counts that the device made, and labels."""

    rank = "mIoU"  # the score by which images are the worst
    compact = staticmethod(np.copy)  # what is kept of an answer to draw it

    def __init__(self) -> None:
        self.totals: dict[str, np.ndarray] = {}

    def image(self, out: dict, row: int, size: tuple[int, int], truth: Any) -> tuple:
        """(label [H,W], scores) of one image of a batch's answers, which is added to the totals."""
        counts = {key: value[row] for key, value in out["counts"].items()}
        for key, value in counts.items():
            wide = np.float64 if value.dtype.kind == "f" else np.int64
            self.totals[key] = self.totals.get(key, 0) + value.astype(wide)
        return out["semantic"][row, : size[0], : size[1]], image_scores(counts)

    def scores(self, images: list[dict]) -> dict[str, Any]:
        """All scores of the split."""
        return split_scores(self.totals, images)

    @property
    def confusion(self) -> np.ndarray:
        return self.totals["confusion"]


def image_scores(counts: dict[str, np.ndarray]) -> dict[str, float | None]:
    """mIoU, aAcc and, where boundaries were counted, BF of one image."""
    scores = metrics.scores(counts["confusion"])
    scores = {key: scores[key] for key in ("mIoU", "aAcc")}
    return scores | ({"BF": boundary.image_f1(counts["contours"])} if "contours" in counts else {})


def split_scores(totals: dict[str, np.ndarray], images: list[dict]) -> dict[str, Any]:
    """The scores of the summed counts, and the means of the images' own."""
    scores = metrics.scores(totals["confusion"])
    for key in ("mIoU", "aAcc"):
        scores[f"image_{key}"] = metrics.mean(image[key] for image in images)
    if "alpha" in totals:
        scores |= matting.scores(totals["alpha"], len(images))
    if "bands" in totals:
        scores |= boundary.scores(totals["bands"], totals["rings"])
        scores["BF"] = metrics.mean(image["BF"] for image in images)
    return scores


class Objects:
    """AP of what is in `instances`, PQ of `panoptic`, mIoU of `semantic`, at each image's size."""

    def __init__(self, config: ConfigDict, classes: Classes):
        self.things, self.count = models.things(config), len(classes)
        self.resize, self.least = config.eval.resize, config.eval.confidence
        self.stuff_area = models.stuff_area(config)
        self.masks: dict[int, dict] = {}  # image -> class -> Match
        self.boxes: dict[int, dict] = {}
        self.segments = np.zeros((self.count, 4))
        self.confusion: np.ndarray | None = None
        self.rank = "AP"

    def compact(self, found: Found) -> Scene:
        return found.scene(self.least)

    def image(self, out: dict, row: int, size: tuple[int, int], truth: dict) -> tuple[Found, dict]:
        """(Found, scores) of one image; truth: its `label` and `instances`, see `data.sources`."""
        seen = fitted_size(size, self.resize)
        found = unpacked(out["found"], row, seen, size, self.stuff_area)
        return found, self.add(int(out["index"][row]), found, truth)

    def add(self, index: int, found: Found, truth: dict) -> dict[str, float | None]:
        """The scores of image number `index`, which are added to the totals."""
        scores = {}
        if found.panoptic is not None:
            self.rank = "PQ"
            whole = to_panoptic(truth["label"], truth["instances"], self.things)
            counts = panoptic_quality.counts(found.panoptic, whole, self.things, self.count)
            self.segments += counts
            scores["PQ"] = panoptic_quality.scores(counts, self.things)["PQ"]
        if found.instances is not None:
            true = of_classes(truth["instances"], self.things, empty=True)
            masks, boxes = matches(found.instances, true)
            self.masks[index] = masks
            scores["AP"] = average_precision.image_score(masks)
            if boxes is not None:
                self.boxes[index] = boxes
        if found.semantic is not None:
            counts = confusion(found.semantic, truth["label"], self.count)
            self.confusion = counts + (0 if self.confusion is None else self.confusion)
            scores |= image_scores({"confusion": counts})
        return scores

    def scores(self, images: list[dict]) -> dict[str, Any]:
        """All scores of the split."""
        result = {}
        for end, held in (("", self.masks), ("box_", self.boxes)):
            if held:
                ordered = [held[i] for i in sorted(held)]
                values = average_precision.scores(ordered, self.things, self.count)
                result |= {rename(key, end): value for key, value in values.items()}
        if self.rank == "PQ":
            result |= panoptic_quality.scores(self.segments, self.things)
        if self.confusion is not None:
            result |= split_scores({"confusion": self.confusion}, images)
        return result


class Gallery:
    """What an evaluation keeps of single images: scores, pictures to draw, and the worst."""

    def __init__(self, tally: Pixels | Objects, count: int, pictures: int):
        self.tally, self.many = tally, min(pictures, count)
        self.shown = set(np.linspace(0, count - 1, self.many, dtype=int).tolist())
        self.images: dict[int, dict] = {}
        self.drawn: dict[int, Any] = {}
        self._worst: list[tuple] = []

    def add(self, index: int, name: str, answer: Any, scores: dict) -> None:
        """Takes note of an image's answer and scores."""
        self.images[index] = {"name": name, **scores}
        if index in self.shown:
            self.drawn[index] = self.tally.compact(answer)
        place = (scores[self.tally.rank], index)
        full = len(self._worst) == self.many
        if self.many and place[0] is not None and not (full and place > self._worst[-1][0]):
            entry = (place, self.tally.compact(answer))
            self._worst = sorted([*self._worst, entry], key=itemgetter(0))[: self.many]

    @property
    def worst(self) -> dict[int, Any]:
        """Of the images with the lowest score, lowest first."""
        return {index: picture for (_, index), picture in self._worst}

    def ordered(self) -> list[dict]:
        return [self.images[i] for i in sorted(self.images)]


def rename(key: str, end: str) -> str:
    """ "box_AP" of "AP", "class_box_AP" of "class_AP"."""
    name = key.removeprefix("class_")
    return f"class_{end}{name}" if name != key else f"{end}{name}"


def matches(found: dict, truth: dict) -> tuple[dict, dict | None]:
    """What `average_precision.match` gives for the masks and, where there are some, the boxes.

    A true object has the area and the box that the truth itself says, see `sources.objects`.
    """
    found, drawn = (
        {**o, "bounds": bounds(o["masks"]), "areas": average_precision.mask_areas(o["masks"])}
        for o in (found, truth)
    )
    drawn["masks"] = drawn["masks"].astype(bool)
    ious = average_precision.mask_ious(found, drawn)
    truth = {**drawn, "areas": _said(truth, "areas", drawn["areas"])}
    masks = average_precision.match(found, truth, ious)
    if "boxes" not in found:
        return masks, None
    boxes = _said(truth, "boxes", drawn["bounds"])
    ious = average_precision.box_ious(found["boxes"], boxes, truth["crowd"])
    found = {**found, "areas": average_precision.box_areas(found["boxes"])}
    return masks, average_precision.match(found, truth, ious)


def _said(truth: dict, key: str, measured: np.ndarray) -> np.ndarray:
    """What the truth says, and where it does not, which is NaN, what was measured."""
    said = truth.get(key, np.nan)
    return np.where(np.isnan(said), measured, said)


def confusion(found: np.ndarray, label: np.ndarray, count: int) -> np.ndarray:
    """int64 [K,K] of two labels [H,W], row = truth; as `metrics.confusions`, on the host."""
    seen = (label != IGNORE) & (label < count) & (found < count)
    cells = label[seen].astype(np.int64) * count + found[seen]
    return np.bincount(cells, minlength=count**2).reshape(count, count)
