"""Predictions as files: those of an evaluation, and what was found in a user's images."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from jaxseg import models
from jaxseg.data import catalog, results, rle, scene
from jaxseg.data.coco import read_segments
from jaxseg.data.colours import Classes, save_label
from jaxseg.data.files import read_label, replacing
from jaxseg.errors import InputError
from jaxseg.found import Found


class Saver:
    """save(name, answer), for each image once, and finish().

    A label [H,W] becomes FOLDER/NAME.png, indexed, with the step, the classes and, where given, the
    settings that were asked for inside. What a network of objects found is that label too, where
    it says one, and with all other images: FOLDER/results.json, COCO's results, in which masks are
    run lengths, and of a network of boxes boxes.json (apart, because COCO's tool measures a mask
    with a box by its box); FOLDER/panoptic.json and panoptic/NAME.png, COCO's panoptic form, which
    is that of Cityscapes too; and of its data sets cityscapes/NAME.txt with cityscapes/masks/. The
    ids in them are those of the data set's own files.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        classes: Classes,
        asked: dict | None = None,
        config: ConfigDict | None = None,
    ):
        """config: of a paper of objects, for the data set's ids."""
        self.folder, self.classes = folder, classes
        self.note = json.dumps({"step": step, "names": classes.names, "eval": asked})
        self.written: set[str] = set()
        self.results: list[dict] | None = None
        self.boxes: list[dict] | None = None
        self.taken: dict[int | str, str] = {}
        self.segments: list[dict] = []
        self.city, self.ids = False, {i: i for i in range(len(classes))}
        if config is not None and models.of_objects(config):
            data = config.data
            self.ids = catalog.file_ids(data.dataset, data.root)
            self.city = data.dataset.partition(":")[0].startswith("cityscapes")

    def __call__(self, name: str, answer: np.ndarray | Found) -> None:
        if name in self.written:
            raise InputError(f"two images are named {name}: their predictions have no place")
        self.written.add(name)
        if isinstance(answer, Found):
            self._found(name, answer)
            answer = answer.semantic
        if answer is not None:
            with replacing(self.folder / f"{name}.png") as file:
                save_label(file, answer, self.classes, self.note)

    def _found(self, name: str, found: Found) -> None:
        results.take_id(self.taken, name)
        if found.instances is not None:
            self.results = self.results or []
            if "boxes" in found.instances:
                self.boxes = self.boxes or []
            for entry in results.coco_results(name, found.instances, self.ids):
                box = entry.pop("bbox")
                self.results.append(entry)
                if self.boxes is not None:
                    rest = {k: v for k, v in entry.items() if k != "segmentation"}
                    self.boxes.append({**rest, "bbox": box})
            if self.city:
                place = self.folder / "cityscapes"
                results.save_cityscapes(place, name, found.instances, self.ids)
        if found.panoptic is not None:
            self.segments.append(results.panoptic_entry(name, found.panoptic, self.ids))
            with replacing(self.folder / "panoptic" / f"{name}.png") as file:
                results.save_panoptic(file, found.panoptic)

    def finish(self) -> None:
        """Writes what is about all images."""
        if self.results is not None:
            results.save_json(self.folder / "results.json", self.results)
        if self.boxes is not None:
            results.save_json(self.folder / "boxes.json", self.boxes)
        if self.segments:
            whole = results.panoptic_json(self.segments, self.classes, self.ids)
            results.save_json(self.folder / "panoptic.json", whole)


class Given:
    """given(name, size): what files of COCO's forms say was found in an image; see `Saver`.

    results.json, with boxes.json whose entries are as many and in the same order, panoptic.json
    with the folder panoptic/, and labels NAME.png where they are there.
    """

    def __init__(self, folder: Path, ids: Mapping[int, int], classes: Classes):
        """ids: class id -> that of the files. Raises InputError where a file is not COCO's, or
        boxes.json not of results.json."""
        self.folder, self.things = folder, classes.things
        self.classes = {value: i for i, value in ids.items()}
        entries, boxes = self._read("results.json") or [], self._read("boxes.json")
        self.boxed = boxes is not None or (bool(entries) and "bbox" in entries[0])
        boxes = entries if boxes is None else boxes
        if len(boxes) != len(entries):
            raise InputError(
                f"{folder / 'boxes.json'} holds {len(boxes)} boxes and results.json {len(entries)} "
                "objects: needs a box for each, in the same order; without it masks alone score"
            )
        segments = (self._read("panoptic.json") or {"annotations": []})["annotations"]
        self.panoptic, self.objects = {s["image_id"]: s for s in segments}, {}
        self.masks, self.taken = (folder / "results.json").is_file(), {}
        for entry, box in zip(entries, boxes, strict=True):
            one = {**entry, "bbox": box["bbox"]} if self.boxed else entry
            self.objects.setdefault(entry["image_id"], []).append(one)

    @staticmethod
    def is_in(folder: Path) -> bool:
        return any((folder / name).is_file() for name in ("results.json", "panoptic.json"))

    def _read(self, name: str) -> Any:
        path = self.folder / name
        try:
            return json.loads(path.read_text()) if path.is_file() else None
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path}: {error}") from error

    def __call__(self, name: str, size: tuple[int, int]) -> Found:
        place = results.take_id(self.taken, name)
        try:
            panoptic = self._panoptic(name, place) if self.panoptic else None
            instances = self._instances(self.objects.get(place, []), size) if self.masks else None
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(
                f"{self.folder}: what was found in image {name} cannot be read: {error!r}"
            ) from error
        label = self.folder / f"{name}.png"
        same = {i: i for i in self.classes.values()}
        semantic = read_label(label, same) if label.is_file() else None
        for found in (panoptic, semantic):
            if found is not None and found.shape != size:
                raise InputError(
                    f"a map of {name} in {self.folder} is {found.shape} and its truth {size} "
                    "(height, width): they must be equal"
                )
        return Found(size, semantic, instances, panoptic)

    def _instances(self, entries: list[dict], size: tuple[int, int]) -> dict[str, np.ndarray]:
        scores = np.array([entry["score"] for entry in entries], np.float64)
        entries = [entries[i] for i in np.argsort(-scores, kind="stable")]
        masks = [rle.decode(entry["segmentation"], size) for entry in entries]
        found = {
            "masks": np.array(masks, bool).reshape(-1, *size),
            "scores": np.array([entry["score"] for entry in entries], np.float64),
            "classes": np.array([self.classes[e["category_id"]] for e in entries], np.int32),
        }
        if self.boxed:
            x, y, w, h = np.array([e["bbox"] for e in entries], np.float64).reshape(-1, 4).T
            found["boxes"] = np.stack([y, x, y + h, x + w], axis=1)
        return found

    def _panoptic(self, name: str, place: int | str) -> np.ndarray:
        if place not in self.panoptic:
            raise InputError(f"{self.folder / 'panoptic.json'} does not have image {name}")
        entry = self.panoptic[place]
        numbers = read_segments(self.folder / "panoptic" / entry["file_name"])
        panoptic = np.full(numbers.shape, results.VOID, np.int32)
        count = dict.fromkeys(self.classes.values(), 0)
        for segment in entry["segments_info"]:
            c = self.classes[segment["category_id"]]
            count[c] += c in self.things
            panoptic[numbers == segment["id"]] = c * results.STEP + count[c]
        return panoptic


def write_found(
    written: Mapping[str, Path],
    path: Path,
    image: np.ndarray,
    found: Found,
    shown: scene.Scene,
    classes: Classes,
) -> None:
    """Writes what was found in image [H,W,C], the file `path`, but for its label.

    written: `overlay`, `instances`, `objects` and, of a panoptic network, `panoptic`, and where.
    shown: what is drawn.
    """
    ids = {i: i for i in range(len(classes))}
    with replacing(written["overlay"]) as file:
        Image.fromarray(scene.overlay(image, shown, classes)).save(file, format="PNG")
    with replacing(written["instances"]) as file:
        results.save_numbers(file, shown.objects)
    height, width = found.size
    content = {"image": {"file_name": path.name, "height": height, "width": width}, "objects": []}
    if found.instances is not None:
        content["objects"] = results.coco_results(path.stem, found.instances, ids)
    if found.panoptic is not None:
        segments = results.panoptic_entry(path.stem, found.panoptic, ids)
        content["panoptic"] = {**segments, "file_name": written["panoptic"].name}
        with replacing(written["panoptic"]) as file:
            results.save_panoptic(file, found.panoptic)
    results.save_json(written["objects"], content)


def gather(output: Path, own: Sequence[Path], classes: Classes, panoptic: bool) -> None:
    """Writes OUTPUT/annotations.json, and panoptic.json, of the images whose own JSON is there.

    And again where another process has added one meanwhile, whose files these may have replaced.
    """
    done = None
    while (there := [path for path in own if path.is_file()]) != done:
        _gather(output, there, classes, panoptic)
        done = there


def _gather(output: Path, own: Sequence[Path], classes: Classes, panoptic: bool) -> None:
    held = [json.loads(path.read_text()) for path in own]
    for number, one in enumerate(held, start=1):  # by which COCO's JSON names images
        one["image"]["id"] = number
        for entry in [*one["objects"], *([one["panoptic"]] if panoptic else [])]:
            entry["image_id"] = number
    images = [one["image"] for one in held]
    objects = [entry for one in held for entry in one["objects"]]
    content = results.coco_annotations(images, objects, classes)
    results.save_json(output / "annotations.json", content)
    if panoptic:
        ids = {i: i for i in range(len(classes))}
        content = results.panoptic_json([one["panoptic"] for one in held], classes, ids)
        results.save_json(output / "panoptic.json", content)
