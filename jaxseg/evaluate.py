"""Evaluation: the scores of a split, of a network or of predictions that were saved."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxseg import config as configs
from jaxseg import models, sharding
from jaxseg.compiler import options
from jaxseg.data import catalog, pipeline
from jaxseg.data.colours import IGNORE, Classes, read_note
from jaxseg.data.files import read_label
from jaxseg.data.transforms import fitted_size
from jaxseg.errors import InputError
from jaxseg.found import is_found, packed
from jaxseg.inference import buckets, check_windows, make_infer, settings
from jaxseg.log import say
from jaxseg.ops import boundary, matting, metrics
from jaxseg.report import Evaluation, report, table
from jaxseg.saver import Given, Saver
from jaxseg.scoring import Gallery, Objects, Pixels


def make_eval_step(
    config: ConfigDict, mesh: Mesh, infer: Callable | None = None, edges: bool | None = None
) -> Callable:
    """(variables, batch) -> `counts` of each image, `semantic` [B,H,W], `finite`, `index`; jitted.

    Of a paper of objects in place of the first two `found`, see `found.packed`: the host scores it.
    infer: in place of the network's. edges: count near boundaries too; None: as eval.boundary says.
    """
    infer, classes = infer or make_infer(config, mesh), config.model.num_classes
    edges = config.eval.boundary if edges is None else edges

    @partial(jax.jit, out_shardings=sharding.replicated(mesh), compiler_options=options())
    def eval_step(variables: Any, batch: dict[str, jax.Array]) -> dict[str, Any]:
        label = batch["label"]
        soft = "alpha" in batch
        out = infer(variables, batch["image"], label.shape[1:], soft, batch["size"])
        if is_found(out):
            return {"found": packed(out), "finite": out["finite"], "index": batch["index"]}
        counts = {"confusion": metrics.confusions(out["semantic"], label, classes)}
        if soft and "logits" in out:  # regions have none
            counts["alpha"] = matting.sums(out["logits"], batch["alpha"], label)
        if edges:
            counts |= boundary.counts(out["semantic"], label, batch["size"], classes)
        semantic = out["semantic"].astype(jnp.uint8 if classes <= IGNORE else jnp.int32)
        return {
            "counts": counts,
            "semantic": semantic,
            "finite": out["finite"],
            "index": batch["index"],
        }

    return eval_step


def open_source(config: ConfigDict, split: str, classes: Classes | None = None) -> Any:
    """The reader of a split. Raises InputError where its classes are not the network's, and where
    a paper of objects cannot learn or be scored on it.

    classes: those that the run was trained on.
    """
    data, training = config.data, split == config.data.train_split
    objects = training and max(data.copy_paste, data.crop_on_objects, data.objects) > 0
    objects |= models.of_objects(config)
    source = catalog.open_split(data.dataset, split, data.root, data.channels, objects)
    names = source.classes.names
    if len(names) != config.model.num_classes:
        raise InputError(
            f"model.num_classes is {config.model.num_classes}, but {data.dataset} has "
            f"{len(names)} classes ({', '.join(names)}): set model.num_classes"
        )
    if (models.of_objects(config) or data.objects) and not source.classes.things:
        raise InputError(
            f"{data.dataset} does not say of which classes objects are told apart: name them in "
            'its classes.json, such as "things": ["car"]'
        )
    asked = models.things(config) if models.of_objects(config) else ()
    if stray := sorted(set(asked) - set(source.classes.things)):
        raise InputError(
            f"model.things has {', '.join(map(str, stray))}, whose objects {data.dataset} does not "
            f"tell apart: needs ids of {source.classes.things}"
        )
    if models.of_objects(config) and training and not data.objects:
        raise InputError(
            f"data.objects is 0, and {config.model.name} learns objects: set it to the most that a "
            "training example may show, such as 100"
        )
    check_classes(source.classes, classes.names if classes else names, "the run")
    return source


def check_images(config: ConfigDict, source: Any) -> None:
    """Raises InputError where an image of the source is smaller than a window of config.eval."""
    if config.eval.mode == "slide":
        sizes = [source.size(i) for i in range(len(source))]
        check_windows(config, sizes, partial(image_name, source))


def check_labels(source: Any, count: int = 32) -> None:
    """Raises InputError where `count` masks hold white, which is ignored, and else class 0 alone.

    It reads them, so that a set of bad files is told before anything is compiled.
    """
    some = np.unique(np.linspace(0, len(source) - 1, count).astype(int)) if len(source) else ()
    ids = [np.unique(source[int(i)]["label"]).tolist() for i in some]
    if ids and all(seen == [0, IGNORE] for seen in ids):
        raise InputError(
            f"{len(ids)} training masks hold only 0 and {IGNORE}, which is ignored: "
            f'"values": [0, {IGNORE}] in classes.json makes {IGNORE} a class'
        )
    if ids and all(seen == [IGNORE] for seen in ids):
        raise InputError(
            f"{len(ids)} training masks hold only {IGNORE}, which is ignored: nothing to learn from"
        )


def padding(config: ConfigDict, source: Any) -> str:
    """A sentence where most of a training crop is outside the image, "" elsewhere."""
    crop, data = np.array(config.data.crop), config.data
    sizes = [source.size(i) for i in range(min(32, len(source)))]
    if data.resize != (0, 0) or not sizes:
        return ""
    inside = np.minimum(np.array(sizes) * data.scale[1], crop).prod(1).mean() / crop.prod()
    if inside > 0.5:
        return ""
    return (
        f"images are small, such as {sizes[0][0]}x{sizes[0][1]}: {1 - inside:.0%} or more of a "
        f"crop of {crop[0]}x{crop[1]} is padding: set a smaller data.crop"
    )


def check_classes(classes: Classes, names: tuple[str, ...], whose: str) -> None:
    """Raises InputError where `names` are not those of the data set's classes, in their order."""
    if tuple(names) == classes.names:
        return
    differing = [
        f"{i} is {theirs!r} there and {ours!r} here"
        for i, (theirs, ours) in enumerate(zip(names, classes.names, strict=False))
        if theirs != ours
    ]
    counts = f"{len(names)} classes there and {len(classes)} here"
    raise InputError(
        f"the classes of {whose} are not those of the data set: {(differing or [counts])[0]}. "
        "Use the data set, or the table of classes, that it was made with"
    )


def evaluate(
    eval_step: Callable,
    variables: Any,
    source: Any,
    config: ConfigDict,
    mesh: Mesh,
    save: Saver | None = None,
) -> Evaluation:
    """Every image of a source once, in batches of at most eval.buckets shapes.

    Scored is what the network says: pixels, or objects. save: keeps the answer to each image, in
    the first process. Raises InputError for a source without images and for answers that are not
    finite.
    """
    if not len(source):
        raise InputError("the split has no images: choose another")
    sizes = [source.size(i) for i in range(len(source))]
    given = isinstance(source, Saved)  # answers, which need no network, and so no windows
    if not given:
        check_windows(config, sizes, partial(image_name, source))
    whole = models.of_objects(config) and not given
    seen = [fitted_size(size, config.eval.resize) if whole else size for size in sizes]
    fits = buckets(seen, config.eval.buckets)
    compiled = getattr(eval_step, "_cache_size", lambda: 0)
    before = compiled()
    parts = sharding.batch_parts(mesh)
    batches = pipeline.eval_batches(
        source,
        batch=-(-config.eval.batch // parts) * parts,
        shapes=[fits[size] for size in seen],
        threads=config.data.threads,
        process=(jax.process_index(), jax.process_count()),
        resize=config.eval.resize if whole else (0, 0),
        fill=config.data.mean if whole else None,
    )
    tally, gallery = None, None
    for host in batches:
        names = dict(zip(host["index"].tolist(), host.pop("name"), strict=True))
        truths = dict(zip(host["index"].tolist(), host.pop("truth", ()), strict=False))
        out = jax.device_get(eval_step(variables, sharding.put_batch(host, mesh)))
        if tally is None:
            tally = Objects(config, source.classes) if "found" in out else Pixels()
            gallery = Gallery(tally, len(source), config.eval.pictures)
        rows = {i: row for row, i in enumerate(out["index"].tolist()) if i >= 0}
        names |= {i: image_name(source, i) for i in rows if i not in names}  # of other processes
        broken = [names[i] for i, row in rows.items() if not out["finite"][row]]
        if broken:
            raise InputError(
                f"the network's answer to {', '.join(broken)} is not finite (NaN or infinity): the "
                "checkpoint or the image is broken, or train.compute_dtype too small for them"
            )
        for i, row in rows.items():
            truth = truths.get(i)
            if truth is None and "found" in out:
                truth = source[i]
            answer, scores = tally.image(out, row, sizes[i], truth)
            gallery.add(i, names[i], answer, scores)
            if save and jax.process_index() == 0:
                save(names[i], answer)
    if save and jax.process_index() == 0:
        save.finish()
    compilations = compiled() - before
    return _evaluation(gallery, len(fits), compilations, settings(config))


def _evaluation(
    gallery: Gallery, sizes: int, compilations: int, asked: dict[str, Any] | None
) -> Evaluation:
    tally, images = gallery.tally, gallery.ordered()
    return Evaluation(
        scores=tally.scores(images),
        confusion=tally.confusion,
        images=images,
        drawn=gallery.drawn,
        worst=gallery.worst,
        sizes=sizes,
        compilations=compilations,
        settings=asked,
        rank=tally.rank,
    )


def image_name(source: Any, index: int) -> str:
    """The name of an image, without reading it where the source can tell."""
    if hasattr(source, "image_name"):
        return source.image_name(index)
    return source[index]["name"]


class Saved:
    """Saved predictions as a source: its images are the ids [h,w,1] that were predicted.

    The files are FOLDER/NAME.png, as `eval --save_predictions` writes them, or of any other
    origin: indexed or grey, pixel value = class id.
    """

    channels, dtype = 1, np.dtype(np.uint8)

    def __init__(self, folder: Path, source: Any):
        """Raises InputError where the first prediction is missing or of other classes."""
        self.folder, self.source, self.classes = folder, source, source.classes
        self.size, self.image_name = source.size, partial(image_name, source)
        self.note = _note(self._path(self.image_name(0))) if len(source) else {}
        self.step = self.note.get("step")
        if "names" in self.note:
            check_classes(self.classes, self.note["names"], str(folder))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        example = self.source[index]
        path = self._path(example["name"])
        found = read_label(path, {i: i for i in range(len(self.classes))})
        if found.shape != example["label"].shape:
            raise InputError(
                f"prediction {path} is {found.shape} and its truth {example['label'].shape} "
                "(height, width): they must be equal"
            )
        if (found == IGNORE).any():
            raise InputError(f"prediction {path} holds {IGNORE}: needs a class for every pixel")
        if _note(path) != self.note:
            other = self._path(self.image_name(0))
            raise InputError(
                f"{other} and {path} are not of one prediction: "
                f"{_difference(self.note, _note(path))}. "
                "Score the files of one run, step and settings, in a folder of their own"
            )
        return {**example, "image": found[..., None]}

    def _path(self, name: str) -> Path:
        path = self.folder / f"{name}.png"
        if not path.is_file():
            raise InputError(
                f"no prediction {path}: needs one PNG for each of the {len(self)} images, named "
                "like them"
            )
        return path


def _note(path: Path) -> dict:
    """What a prediction says of its origin; {} where it says nothing."""
    try:
        note = json.loads(read_note(path) or "{}")
    except (OSError, ValueError):  # no picture, which reading it will tell
        return {}
    return {key: note[key] for key in ("step", "names", "run", "eval") if key in note}


def _difference(one: dict, other: dict) -> str:
    key = next(key for key in [*one, *other] if one.get(key) != other.get(key))
    return f"{key} is {one.get(key)} and {other.get(key)}"


def labels_given(_: Any, image: jax.Array, *__: Any) -> dict[str, jax.Array]:
    """In place of a network's `infer`, where the images are ids [B,h,w,1]: these are the labels."""
    return {"semantic": image[..., 0].astype(jnp.int32), "finite": jnp.ones(len(image), bool)}


def rescore(config: ConfigDict, folder: Path, split: str | None = None, edges: bool = True) -> int:
    """The verb `eval` on saved predictions, without a network: reports into their folder.

    Labels, or where there are files of objects, see `saver.Given`, these. edges: boundary scores
    too, of labels.
    """
    split, mesh = split or config.data.eval_split, sharding.make_mesh(configs.default().mesh)
    source = open_source(config, split)
    if models.of_objects(config) and Given.is_in(folder):
        result, made = score_given(config, folder, source), None
    else:
        saved = Saved(folder, source)
        step, made = make_eval_step(config, mesh, labels_given, edges), saved.step
        result = evaluate(step, {}, saved, config, mesh)._replace(settings=saved.note.get("eval"))
    if jax.process_index() == 0:
        report(folder, made, result, source, split)
    say(table(result.scores, source.classes))
    say(f"{len(source)} predictions of {split}; details in {folder / 'eval.json'}")
    return 0


def score_given(config: ConfigDict, folder: Path, source: Any) -> Evaluation:
    """The scores of objects and panoptic maps in files, at the images' own size."""
    ids = catalog.file_ids(config.data.dataset, config.data.root)
    given, tally = Given(folder, ids, source.classes), Objects(config, source.classes)
    gallery = Gallery(tally, len(source), config.eval.pictures)
    for i in range(len(source)):
        example = source[i]
        found = given(example["name"], example["label"].shape)
        gallery.add(i, example["name"], found, tally.add(i, found, example))
    sizes = {source.size(i) for i in range(len(source))}
    return _evaluation(gallery, len(sizes), 0, None)
