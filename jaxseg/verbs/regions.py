"""The verbs of a paper without parameters: train, which has nothing to train, eval and predict.

Its regions have no class. So `eval` gives each region of an image the class that most of its pixels
have in the truth, which no method can know: the score is a ceiling, that of the best labels that
these regions allow. It depends on how many regions there are, and the report says how many.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from jaxseg import config as configs
from jaxseg import models, sharding
from jaxseg.data import catalog, colours, files
from jaxseg.data.colours import IGNORE, Classes, voc_palette
from jaxseg.errors import InputError
from jaxseg.evaluate import evaluate, image_name, labels_given, make_eval_step, open_source
from jaxseg.log import say
from jaxseg.report import place, report, table
from jaxseg.verbs.predict import PLAIN, Formats, Progress, check_outputs, collect, standing
from jaxseg.workdir import load_config, prepare

CEILING = "ceiling: each region has the majority class of the truth"
COLOURS = Classes(tuple(map(str, range(256))), voc_palette(256))  # of regions: their id modulo 256
BORDER = (255, 255, 255)


def train(config: ConfigDict, workdir: Path, dry_run: bool = False) -> int:
    """The default verb: makes a run of `config` in `workdir` and scores it; the exit code.

    dry_run: segments one image, and leaves nothing behind.
    """
    method = models.segmenter(config)
    source = open_source(config, config.data.eval_split)
    say(f"{method.method} on {config.data.dataset}: no parameters, nothing to train")
    if dry_run:
        if not len(source):
            raise InputError("the split has no images: choose another")
        say(f"dry run: one image, {method(source[0]['image']).max() + 1} regions")
        return 0
    prepare(config, workdir, source.classes)
    return _score(config, workdir, source, config.data.eval_split)


def score(
    workdir: Path,
    split: str | None = None,
    save: bool = False,
    overrides: Sequence[tuple[str, str]] = (),
) -> int:
    """The verb `eval`: scores the run in `workdir` on a split, by default its validation split."""
    if save:
        raise InputError(
            "--save_predictions needs a network: the classes of these regions come from the truth. "
            "`predict` writes the regions"
        )
    config = _load(workdir, overrides)
    split = split or config.data.eval_split
    source = open_source(config, split, catalog.read_classes(workdir / "classes.json"))
    return _score(config, workdir, source, split)


def _load(workdir: Path, overrides: Sequence[tuple[str, str]]) -> ConfigDict:
    config = load_config(workdir)
    configs.override(config, overrides)
    configs.check(config)
    return config


def _score(config: ConfigDict, workdir: Path, source: Any, split: str) -> int:
    """Evaluates the ceiling of the config's method, and reports it."""
    mesh = sharding.make_mesh(configs.default().mesh)
    best = Ceiling(models.segmenter(config), source)
    step = make_eval_step(config, mesh, labels_given, edges=True)
    result = evaluate(step, {}, best, config, mesh)
    mean, folder = float(np.mean(list(best.counts.values()))), place(workdir, split, config)
    method = {key: value for key, value in config.model.items() if key in ("method", "segments")}
    notes = {"scored": CEILING, **method, "regions_per_image": mean, "versions": versions()}
    if jax.process_index() == 0:
        report(folder, None, result, source, split, notes)
    say(table(result.scores, source.classes, CEILING))
    say(
        f"{config.model.method}: {mean:.1f} regions an image, {len(source)} images of {split}; "
        f"details in {folder / 'eval.json'}"
    )
    return 0


def versions() -> dict[str, str]:
    """Of the packages that are installed among those that segment."""
    found = {}
    for package in ("scikit-image", "opencv-python-headless", "opencv-python", "scipy"):
        try:
            found[package] = version(package)
        except ModuleNotFoundError:  # importlib's PackageNotFoundError is one
            continue
    return found


class Ceiling:
    """A source whose images are the best labels [h,w,1] that the regions of its images allow."""

    channels, dtype = 1, np.dtype(np.uint8)

    def __init__(self, method: Callable[[np.ndarray], np.ndarray], source: Any):
        self.method, self.source, self.classes = method, source, source.classes
        self.size, self.image_name = source.size, partial(image_name, source)
        self.counts: dict[int, int] = {}  # regions of the images that were read

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        example = self.source[index]
        regions = self.method(example["image"])
        self.counts[index] = int(regions.max()) + 1
        best = majority(regions, example["label"], len(self.classes))
        return {**example, "image": best[..., None]}


def majority(regions: np.ndarray, label: np.ndarray, num_classes: int) -> np.ndarray:
    """Each region's most frequent class of `label`, of two as frequent the first: uint8 [H,W].

    regions: int [H,W], 0..R-1. Ignored pixels have no vote; a region of nothing else is ignored.
    """
    votes = label != IGNORE
    cells = regions[votes].astype(np.int64) * num_classes + label[votes]
    counts = np.bincount(cells, minlength=(int(regions.max()) + 1) * num_classes)
    counts = counts.reshape(-1, num_classes)
    best = np.where(counts.any(axis=1), counts.argmax(axis=1), IGNORE)
    return best.astype(np.uint8)[regions]


def predict(
    workdir: Path,
    inputs: Sequence[Path],
    output: Path,
    formats: Formats = PLAIN,
    legend: bool = False,
    part: tuple[int, int] = (1, 1),
    overrides: Sequence[tuple[str, str]] = (),
) -> int:
    """Writes, for each image, NAME.png, its regions' ids, and NAME_overlay.png; the exit code.

    The ids are an indexed PNG up to 256 regions, above a grey one of 16 bits. As with a network,
    files appear whole or not at all, and what is there, by the same method, is not made again.
    """
    if formats != PLAIN or legend:
        raise InputError(
            "regions have neither logits nor classes: leave --save_logits, --save_probabilities, "
            "--save_alpha and --legend out"
        )
    paths = collect(inputs)
    check_outputs(paths, output, PLAIN, legend=False)
    config = _load(workdir, overrides)
    method, note = models.segmenter(config), config.model.to_dict()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {output}: {error.strerror}") from error
    mine = list(paths.items())[part[0] - 1 :: part[1]]
    progress = Progress(len(mine))
    for name, path in mine:
        written = PLAIN.files(output, name)
        work = not written.keys() <= standing(written, path, note)[0]
        if work:
            image = files.read_image(path, config.data.channels)
            regions = method(image)
            written["label"].unlink(missing_ok=True)  # it vouches for the overlay
            with files.replacing(written["overlay"]) as file:
                Image.fromarray(overlay(image, regions)).save(file, format="PNG")
            with files.replacing(written["label"]) as file:
                save_regions(file, regions, json.dumps({**note, "kinds": sorted(written)}))
        progress.done(f"{path} -> {written['label']}" + ("" if work else " (is there)"), work)
    say(f"images: {len(mine)}, segmented: {progress.worked}")
    return 0


def save_regions(path: Path, regions: np.ndarray, note: str = "") -> None:
    """Writes ids [H,W] as a PNG: indexed up to 256 regions, else grey of 16 bits."""
    most = int(regions.max())
    if most < len(COLOURS):
        colours.save_label(path, regions, COLOURS, note)
        return
    if most >= 2**16:
        raise InputError(f"{most + 1} regions: a PNG can number {2**16}, use fewer model.segments")
    info = PngInfo()
    info.add_text("jaxseg", note)
    Image.fromarray(regions.astype(np.uint16)).save(path, format="PNG", pnginfo=info)


def overlay(image: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """The regions' colours over the image, their borders white: uint8 [H,W,3]."""
    drawn = colours.overlay(image, regions % len(COLOURS), COLOURS)
    border = np.zeros(regions.shape, bool)
    border[1:] |= regions[1:] != regions[:-1]
    border[:, 1:] |= regions[:, 1:] != regions[:, :-1]
    drawn[border] = BORDER
    return drawn
