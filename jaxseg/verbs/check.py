"""The verb `check`: reads every image and mask once, counts, and names what would hurt a training.

An error is what training or evaluation stops at, and what spoils them for certain: files that are
not those of SHA256SUMS, masks of nothing but 0 and 255. A warning is what they take in silence.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxseg.data import catalog, own
from jaxseg.data.colours import IGNORE
from jaxseg.data.files import (
    IMAGE_SUFFIXES,
    Embedded,
    Page,
    count_pages,
    find_images,
    open_image,
    orientation,
    path_of,
    read_label,
    read_values,
    shown,
    translate,
)
from jaxseg.data.sources import Files
from jaxseg.errors import InputError

SHOWN = 20  # lines of errors, and of warnings, in the text
SMALL, LONG = 16, 20  # pixels of the shorter side; the longer side over the shorter
PNG_END = b"IEND\xaeB`\x82"


class Finding(NamedTuple):
    """What one example showed; what could not be read is None, or empty."""

    place: str  # of the image
    mask: str
    errors: list[str]
    warnings: list[str]
    pixels: np.ndarray | None = None  # uint32 [256], of each id
    values: Counter = Counter()  # pixels of each value in the file of the mask
    mask_mode: str = ""
    moments: np.ndarray | None = None  # float64 [C,3]: count, sum, sum of squares
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    digest: str = ""  # of the image's pixels

    def seeing(self, image: np.ndarray, mode: str) -> "Finding":
        """With what the image [H,W,C] shows."""
        digest = hashlib.sha1(np.ascontiguousarray(image), usedforsecurity=False).hexdigest()
        seen = {"moments": moments(image), "size": image.shape[:2], "mode": mode}
        return self._replace(**seen, digest=digest)


def check(
    dataset: str, splits: list[str], root: str = "", channels: int = 3, as_json: bool = False
) -> int:
    """Prints what is in a data set and what is wrong with it; returns 1 for errors, else 0.

    No splits: all that it has. Raises InputError where there is no such data set.
    """
    begin = time.perf_counter()
    facts = inspect(dataset, splits or catalog.splits(dataset, root), root, channels)
    seconds = time.perf_counter() - begin
    print(json.dumps(facts) if as_json else "\n".join(text(facts, seconds)))
    return 1 if facts["errors"] else 0


def inspect(dataset: str, splits: list[str], root: str = "", channels: int = 3) -> dict[str, Any]:
    """The facts, as --json prints them.

    `errors` and `warnings` are sentences that name a file. `splits.NAME` has `images`,
    `class_pixels` and `images_with_class` by class, `ignored_pixels`, `mean` and `std` of the
    images by channel (0..255), `sizes` (least and greatest height and width), `modes`, `mask_modes`
    and `mask_values`, the pixels of each value that the files of the masks hold.
    `weights` has weights of the loss by class, from the first split: see `median_frequency`.
    """
    facts, weights, opened, seen = {}, {}, {}, {}
    errors, warnings = [], []
    plain = False
    if dataset != "shapes" and not dataset.startswith(catalog.TFDS):
        layout, place = catalog.resolve(dataset, root)
        errors += checksums(place)
        plain = layout.listing in (own.folder, own.listed)
    if not splits:
        errors.append(f"{dataset} has no split, such as train/images with train/masks")
    for split in splits:
        try:
            source = catalog.open_split(dataset, split, root, channels, complete=False)
        except InputError as error:
            errors.append(str(error))
            continue
        findings, names = read_all(source), source.classes.names
        errors += [error for finding in findings for error in finding.errors]
        warnings += [warning for finding in findings for warning in finding.warnings]
        pixels = [finding.pixels for finding in findings if finding.pixels is not None]
        pixels = np.array(pixels, np.int64).reshape(-1, 256)
        facts[split] = summary(findings, pixels, names)
        if plain:
            black_and_white(split, findings, errors, warnings)
        if len(pixels):
            unseen = [name for name, count in facts[split]["class_pixels"].items() if not count]
            warnings += [f"{split} has no pixel of {', '.join(unseen)}"] if unseen else []
            weights = median_frequency(pixels, names) if split == splits[0] else weights
        for finding in findings:
            seen.setdefault(finding.digest, []).append((split, finding.place))
        if isinstance(source, Files):
            opened[split] = source
    warnings += duplicates(seen)
    if any(source.pattern for source in opened.values()):
        warnings += extra(opened, others(dataset, root, channels, opened))
    errors, warnings = list(dict.fromkeys(errors)), list(dict.fromkeys(warnings))
    found = {"errors": errors, "warnings": warnings, "splits": facts, "weights": weights}
    return {"dataset": dataset, **found}


def read_all(source: Any) -> list[Finding]:
    """A finding for each example, read by as many threads as there are cores."""
    findings, total = [], len(source)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for finding in pool.map(lambda index: examine(source, index), range(total)):
            findings.append(finding)
            if sys.stderr.isatty() and (len(findings) % 100 == 0 or len(findings) == total):
                end = "\n" if len(findings) == total else ""
                print(f"\r{len(findings)}/{total} read", end=end, file=sys.stderr, flush=True)
    return findings


def examine(source: Any, index: int) -> Finding:
    """Reads one example, its image and its mask apart: one may be broken and the other not."""
    if not isinstance(source, Files):
        return examine_whole(source, index)
    errors, warnings, place = [], [], source.images[index]
    name, file = shown(path_of(place)), source.mask(index)
    mask = shown(file) if file else name
    image = attempt(source.image, index, errors)
    label, values = read_mask(source, index, errors)
    mode, mask_mode, ids = "", "", None
    if image is not None:
        mode, found = header(place, source.channels, image.shape)
        warnings += [f"{name}: {what}" for what in found]
    if label is not None:
        ids = histogram(label)
        if file and file.suffix.lower() in IMAGE_SUFFIXES and file.suffix.lower() != ".npy":
            mask_mode = open_image(source.labels[index], decode=False).mode
            warnings += early_end(file)
        if ids[IGNORE] == label.size:
            warnings.append(f"{mask}: all of the mask is ignored")
    if image is not None and label is not None:
        attempt(lambda i: source.check_size(i, image, label), index, errors)
    if label is not None and source.read_instances is not None:
        objects = attempt(lambda i: source.objects(i, label), index, errors)
        empty = 0 if objects is None else np.count_nonzero(~objects["masks"].any((1, 2)))
        if empty:
            lost = "training drops, evaluation counts as missed"
            warnings.append(f"{name}: objects without a pixel, which {lost}: {empty}")
    found = Finding(name, mask, errors, warnings, ids, values, mask_mode)
    return found if image is None else found.seeing(image, mode)


def examine_whole(source: Any, index: int) -> Finding:
    """The same of a source that has no files of its own for images and masks."""
    try:
        example = source[index]
    except InputError as error:
        return Finding(str(index), str(index), [str(error)], [])
    name, ids, warnings = example["name"], histogram(example["label"]), []
    if ids[IGNORE] == example["label"].size:
        warnings.append(f"{name}: all of the mask is ignored")
    return Finding(name, name, [], warnings, ids).seeing(example["image"], "")


def read_mask(source: Files, index: int, errors: list[str]) -> tuple[np.ndarray | None, Counter]:
    """(label, or None and a message in `errors`; the pixels of each value that the file holds).

    Values are counted where ids are made of them one by one, and not of colours or shapes.
    """
    read, mask = source.read_label, source.mask(index)
    if getattr(read, "func", None) is not read_label or not mask.exists():
        return attempt(source.label, index, errors), Counter()
    values = attempt(lambda i: read_values(source.labels[i]), index, errors)
    if values is None:
        return None, Counter()
    if values.dtype == np.uint8:
        counted = dict(enumerate(histogram(values).tolist()))
    else:
        found, counts = np.unique(values, return_counts=True)
        counted = dict(zip(found.tolist(), counts.tolist(), strict=True))
    label = attempt(lambda _: translate(values, path=mask, **read.keywords), index, errors)
    return label, +Counter(counted)  # those that are there


def histogram(label: np.ndarray) -> np.ndarray:
    """uint32 [256], the pixels of each value of uint8 [H,W]; Pillow counts fastest."""
    return np.array(Image.fromarray(label).histogram(), np.uint32)


def attempt(read: Callable, index: int, errors: list[str]) -> Any:
    """What `read` gives; None, and a new message in `errors`, where that is an InputError."""
    try:
        return read(index)
    except InputError as error:
        if str(error) not in errors:
            errors.append(str(error))
        return None


def header(
    place: Path | Page | Embedded, channels: int, shape: tuple[int, ...]
) -> tuple[str, list[str]]:
    """(mode, warnings) of a readable image, from its header; shape: [H,W,C] as read."""
    path, (height, width, _) = path_of(place), shape
    found, mode = [], "array"
    if path.suffix.lower() != ".npy":
        try:
            picture = open_image(place, decode=False)
        except InputError:  # a TIFF of more bands than Pillow knows
            mode = f"{channels} bands"
        else:
            mode = picture.mode
            found += _odd(picture, place, channels)
    small, long = sorted((height, width))
    if small < SMALL or long > LONG * small:
        found.append(f"only {height}x{width} pixels (height, width)")
    if not path.name.isprintable():
        found.append("control characters, such as a newline, in its name")
    return mode, found + [line.removeprefix(f"{shown(path)}: ") for line in early_end(path)]


def _odd(picture: Image.Image, place: Path | Page | Embedded, channels: int) -> Iterator[str]:
    turned, pages = orientation(picture), 1
    if picture.format in ("TIFF", "GIF") and not isinstance(place, Page):
        pages = count_pages(path_of(place))  # which has to look for them
    elif not isinstance(place, Page):
        pages = getattr(picture, "n_frames", 1)
    usual = {1: "L", 3: "RGB"}.get(channels, picture.mode)
    if turned != 1:
        yield f"EXIF orientation {turned}: the image is read upright, and so must the mask be"
    if ";16" in str(picture.tile) or picture.mode.startswith("I;16"):
        yield "16 bits a channel: grey is scaled to 0..255 with fractions, colour keeps 8 bits"
    elif picture.mode != usual:
        yield f"mode {picture.mode}, read as {usual}"
    if pages > 1 and pages != channels:
        yield f"{pages} pictures in one file: the first is read"


def early_end(path: Path) -> list[str]:
    """A warning for a PNG that lacks its last bytes, which Pillow reads all the same."""
    if path.suffix.lower() != ".png" or not path.is_file():
        return []
    with path.open("rb") as file:
        start = file.read(8)
        file.seek(max(0, path.stat().st_size - 4096))
        if start != b"\x89PNG\r\n\x1a\n" or PNG_END in file.read():
            return []
    return [f"{shown(path)}: the PNG does not end as it should: it may be cut short"]


def moments(image: np.ndarray) -> np.ndarray:
    """float64 [C,3]: count, sum and sum of squares of each channel of [H,W,C]."""
    if image.dtype == np.uint8 and image.shape[2] == 3:  # Pillow counts fastest
        counts = np.array(Image.fromarray(image).histogram(), float).reshape(3, 256)
        return counts @ np.stack([np.ones(256), np.arange(256), np.arange(256) ** 2], axis=1)
    values = image.reshape(-1, image.shape[2]).astype(float)
    return np.stack([np.full(values.shape[1], len(values)), values.sum(0), (values**2).sum(0)], 1)


def summary(findings: list[Finding], pixels: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    """The facts of one split; pixels int64 [n,256], a row for each label that could be read."""
    known = len(names)
    total = pixels.sum(axis=0).tolist()
    seen = np.count_nonzero(pixels[:, :known], axis=0).tolist()
    facts: dict[str, Any] = {
        "images": len(findings),
        "class_pixels": dict(zip(names, total, strict=False)),
        "images_with_class": dict(zip(names, seen, strict=True)),
        "ignored_pixels": total[IGNORE],
    }
    read = [finding for finding in findings if finding.moments is not None]
    if read:
        count, total, squares = sum(finding.moments for finding in read).T
        mean, variance = total / count, squares / count - (total / count) ** 2
        facts["mean"] = mean.round(3).tolist()
        facts["std"] = np.sqrt(variance.clip(0)).round(3).tolist()
        sizes = np.array([finding.size for finding in read])
        facts["sizes"] = {"least": sizes.min(axis=0).tolist(), "most": sizes.max(axis=0).tolist()}
        facts["modes"] = dict(Counter(finding.mode for finding in read if finding.mode))
    facts["mask_modes"] = dict(Counter(f.mask_mode for f in findings if f.mask_mode))
    values = sum((finding.values for finding in findings), Counter())
    facts["mask_values"] = {str(value): values[value] for value in sorted(values)}
    return facts


def black_and_white(
    split: str, findings: list[Finding], errors: list[str], warnings: list[str]
) -> None:
    """Masks of nothing but 0 and 255 are most likely a class drawn in white: all are an error."""
    labels = [finding for finding in findings if finding.pixels is not None]
    found = [f for f in labels if f.pixels[0] and f.pixels[IGNORE] and not f.pixels[1:IGNORE].any()]
    hint = f'"values": [0, {IGNORE}] in classes.json makes {IGNORE} a class'
    if found and len(found) == len(labels):
        errors.append(f"{split}: all masks hold only 0 and {IGNORE}, which is ignored: {hint}")
    else:
        only = f"only 0 and {IGNORE}, which is ignored"
        warnings += [f"{finding.mask}: {only}: {hint}" for finding in found]


def median_frequency(
    pixels: np.ndarray, names: tuple[str, ...]
) -> dict[str, dict[str, float | None]]:
    """Weights median(f) / f by class, in both definitions of the frequency f in use.

    "images": a class' pixels over those of the images that have it (Eigen and Fergus 2015; SegNet).
    "pixels": over all pixels. Median over the classes that occur; the others have None.
    """
    counts = pixels[:, : len(names)]
    total = counts.sum(axis=0)
    base = (counts > 0).T @ pixels.sum(axis=1)
    there = total > 0
    result = {}
    for key, size in (("images", base), ("pixels", np.full(len(names), pixels.sum()))):
        frequency = total / np.maximum(size, 1)
        median = np.median(frequency[there]) if there.any() else 0.0
        weights = [
            round(float(median / f), 4) if f else None for f in np.where(there, frequency, 0)
        ]
        result[f"median_frequency_{key}"] = dict(zip(names, weights, strict=True))
    return result


def duplicates(seen: dict[str, list[tuple[str, str]]]) -> list[str]:
    """A warning for each set of images with the same pixels; across splits it spoils the scores."""
    found = []
    for digest, places in seen.items():
        if digest and len(places) > 1:
            splits = sorted({split for split, _ in places})
            kind = f"the same image in {' and '.join(splits)}" if len(splits) > 1 else "twice"
            found.append(f"{places[0][1]}: {kind}: {', '.join(place for _, place in places[1:])}")
    return sorted(found, key=lambda line: ": twice: " in line)


def others(dataset: str, root: str, channels: int, opened: dict[str, Files]) -> list[Files]:
    """The splits that were not opened, of which the masks are nobody's surplus either."""
    found = []
    for split in catalog.splits(dataset, root):
        if split not in opened:
            with contextlib.suppress(InputError):  # not there
                found.append(catalog.open_split(dataset, split, root, channels, complete=False))
    return found


def extra(opened: dict[str, Files], others: list[Files]) -> list[str]:
    """A warning for each file beside the masks, named like them, that belongs to no image of any
    split."""
    known = {source.mask(i) for source in [*opened.values(), *others] for i in range(len(source))}
    sources = [source for source in opened.values() if source.pattern]
    places = {(s.mask(i).parent, s.pattern) for s in sources for i in range(len(s))}
    found = []
    for folder, pattern in sorted(places):
        there = find_images(folder) if folder.is_dir() else []
        found += [path for path in there if fnmatch(path.name, pattern) and path not in known]
    return [f"{shown(path)}: a mask without an image" for path in found]


def checksums(place: Path) -> list[str]:
    """Errors for files that differ from those in PLACE/SHA256SUMS, as `sha256sum` writes it.

    Only so is a JPEG with a flipped bit found: it decodes like any other.
    """
    listed = place / "SHA256SUMS"
    if not listed.is_file():
        return []
    wrong = []
    for line in listed.read_text().splitlines():
        expected, _, name = line.partition(" ")
        path = place / name.strip().removeprefix("*")
        if not path.is_file():
            wrong.append(f"{shown(path)}: in {listed.name}, but not here")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != expected.lower():
            wrong.append(f"{shown(path)}: not the file that {listed.name} knows: it was changed")
    return wrong


def text(facts: dict[str, Any], seconds: float) -> Iterator[str]:
    """The facts as lines for people."""
    for split, found in facts["splits"].items():
        line = f"{split}: {found['images']} images"
        if "mean" in found:
            least, most = ("x".join(map(str, found["sizes"][key])) for key in ("least", "most"))
            size = least if least == most else f"{least} to {most}"
            mean, std = (", ".join(f"{v:.2f}" for v in found[k]) for k in ("mean", "std"))
            modes = ", ".join(f"{mode} {count}" for mode, count in found["modes"].items())
            line += f" of {size} (height x width) {modes}; mean ({mean}), std ({std})"
        yield line
        total = sum(found["class_pixels"].values())
        everything = max(1, total + found["ignored_pixels"])
        width = max(map(len, found["class_pixels"]))
        weights = facts["weights"] if split == next(iter(facts["splits"])) else {}
        yield f"  {'class':{width}}          pixels        %  images" + "".join(
            f"  weight ({key.removeprefix('median_frequency_')})" for key in weights
        )
        for name, count in found["class_pixels"].items():
            shares = f"{count:16,}  {100 * count / max(1, total):6.2f}%  "
            shares += f"{found['images_with_class'][name]:6}"
            for by_class in weights.values():
                value = by_class[name]
                shares += f"  {'absent' if value is None else f'{value:.4f}':>15}"
            yield f"  {name:{width}}{shares}"
        values = list(found["mask_values"])
        if values:
            modes = ", ".join(f"{mode} {count}" for mode, count in found["mask_modes"].items())
            some = ", ".join(values[:SHOWN]) + (", ..." if len(values) > SHOWN else "")
            yield f"  masks {modes}; {len(values)} values: {some}"
        ignored = found["ignored_pixels"]
        yield f"  {'ignored':{width}}{ignored:16,}  {100 * ignored / everything:6.2f}% of all"
    for kind in ("errors", "warnings"):
        lines = grouped(facts[kind]) if kind == "warnings" else facts[kind]
        yield f"{len(facts[kind])} {kind}" + (":" if lines else "")
        yield from (f"  {line}" for line in lines[:SHOWN])
        if len(lines) > SHOWN:
            yield f"  ... and {len(lines) - SHOWN} more: --json prints all"
    count = sum(found["images"] for found in facts["splits"].values())
    yield f"{count} images in {seconds:.1f} s, {count / max(seconds, 1e-9):.0f} a second"


def grouped(lines: list[str]) -> list[str]:
    """The lines "FILE: what", where many say the same with the first file alone."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(line.partition(": ")[2] or line, []).append(line)
    return [
        same[0] if len(same) == 1 else f"{same[0]} ({len(same)} such files)"
        for same in groups.values()
    ]
