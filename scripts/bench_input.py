"""Images a second through the input pipeline, by stage, beside torch's DataLoader on the same work.

    python scripts/bench_input.py
    python scripts/bench_input.py --check 300

The work: decode a 480x360 JPEG and its PNG label, resize both by 0.5 to 2, crop 320x320, flip, and
distort the colours; bytes out. Peers run where they are importable: torchvision's v2 transforms and
albumentations. --images takes a plain folder's split instead of the pictures made here; --check has
the verb check read pairs of 1024x512 instead.
"""

import argparse
import contextlib
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from jaxseg.config import default
from jaxseg.data import catalog, pipeline, pixels, tables, transforms
from jaxseg.data.colours import Classes, voc_palette
from jaxseg.verbs.check import inspect

SIZE, CROP, SCALE, BATCH, COUNT = (360, 480), (320, 320), (0.5, 2.0), 8, 64


def make_folder(root: Path, size: tuple[int, int] = SIZE, count: int = COUNT) -> None:
    """Pictures of blobs, gradients and noise, JPEGs of quality 90: about 60 KB at 480x360."""
    classes = Classes(tuple(f"class{i}" for i in range(12)), voc_palette(12))
    images, masks = root / "train" / "images", root / "train" / "masks"
    images.mkdir(parents=True)
    masks.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        label = rng.integers(0, 12, (9, 18), np.uint8).repeat(60, 0).repeat(60, 1)
        label = label[: size[0], : size[1]]
        coarse = rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3), np.uint8)
        smooth = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
        image = np.asarray(smooth) * 0.8 + rng.normal(0, 6, (*size, 3)) + label[..., None]
        image = Image.fromarray(image.clip(0, 255).astype(np.uint8))
        image.save(images / f"{i:03}.jpg", quality=90)
        Image.fromarray(label).save(masks / f"{i:03}.png")
    tables.write_classes(root / "classes.json", classes)


def rate(work: Callable[[int], None], seconds: float) -> float:
    """Calls of work(i) a second, the best of three runs."""
    work(0)
    best = 0.0
    for _ in range(3):
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            work(count)
            count += 1
        best = max(best, count / (time.perf_counter() - begin))
    return best


def stream_rate(batches: Iterator, seconds: float) -> float:
    """Images a second of an iterator of batches, once its buffers are full."""
    for _ in range(8):
        next(batches)
    return BATCH * rate(lambda _: next(batches), seconds)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="a data set, as data.dataset; its split train")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--check", type=int, default=0, metavar="N", help="only N pairs checked")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.check:
            print(f"check: {checked(Path(folder), args.check):.0f} pairs of 1024x512 a second")
            return
        if not args.images:
            make_folder(Path(folder))
        source = catalog.open_split(args.images or folder, "train")
        size = sum(path.stat().st_size for path in source.images) / len(source)
        print(f"{len(source)} images, JPEG {size / 1e3:.0f} KB; augmented with {pixels.BACKEND}")
        stages(source, args.seconds)
        streams(source, args.seconds)
        peers(source, args.seconds)


def checked(root: Path, count: int) -> float:
    """Pairs of 1024x512 a second that the verb check reads, the files being in memory."""
    make_folder(root, (512, 1024), count)
    inspect(str(root), ["train"])
    begin = time.perf_counter()
    if errors := inspect(str(root), ["train"])["errors"]:
        raise ValueError(errors[0])
    return count / (time.perf_counter() - begin)


def config() -> object:
    data = default().data
    data.update(crop=CROP, scale=SCALE, photometric=True)
    return data


def stages(source, seconds: float) -> None:
    """One after the other in one thread."""
    data, rng, n = config(), np.random.default_rng(0), len(source)
    examples = [source[i] for i in range(min(n, 16))]
    placed = [transforms.place(example, rng, data) for example in examples]

    def report(name: str, work: Callable[[int], object]) -> None:
        print(f"  {name:34} {rate(work, seconds):8.0f} images/s")

    print("stages, one thread")
    report("decode image and label", lambda i: source[i % n])
    report("scale, crop, flip", lambda i: transforms.place(examples[i % 16], rng, data))
    report("photometric", lambda i: transforms.photometric(placed[i % 16]["image"], rng))
    report("all", lambda i: transforms.augment(source[i % n], rng, data))


def streams(source, seconds: float) -> None:
    """Through grain, in batches."""
    print(f"batches of {BATCH}")
    for threads, workers in ((1, 0), (2, 0), (1, 1), (1, 2)):
        data = config()
        data.update(threads=threads, workers=workers)
        with contextlib.closing(
            pipeline.train_batches(source, data, batch=BATCH, seed=0)
        ) as batches:
            name = f"{workers} workers" if workers else f"{threads} threads"
            print(f"  grain, {name:27} {stream_rate(batches, seconds):8.0f} images/s")


def peers(source, seconds: float) -> None:
    """torch's DataLoader with the transforms that are installed."""
    if not importlib.util.find_spec("torch"):
        print("torch is not installed: no peers")
        return
    import torch

    torch.set_num_threads(1)
    files = list(zip(source.images, source.labels, strict=True))
    for name, make in (("torchvision", torchvision_work), ("albumentations", albumentations_work)):
        if not importlib.util.find_spec(name):
            print(f"  {name} is not installed")
            continue
        try:
            work = make()
        except Exception as error:  # torch and torchvision must fit each other
            print(f"  {name} cannot be used: {error}")
            continue
        alone = rate(lambda i, work=work: work(*files[i % len(files)]), seconds)
        print(f"  {f'{name}, one thread':34} {alone:8.0f} images/s")
        for workers in (1, 2):
            batches = endless(torch, files, work, workers)
            label = f"DataLoader, {name}, {workers} workers"
            print(f"  {label:34} {stream_rate(batches, seconds):8.0f} images/s")


class Pairs:
    """A torch data set: the work on each pair of files, over and over."""

    def __init__(self, files, work):
        self.files, self.work = files, work

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int):
        return self.work(*self.files[index % len(self.files)])


def endless(torch, files, work, workers: int) -> Iterator:
    return iter(torch.utils.data.DataLoader(Pairs(files, work), BATCH, num_workers=workers))


def torchvision_work() -> Callable:
    from parity import without_operators

    without_operators()
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    chain = v2.Compose(
        [
            v2.ScaleJitter(SIZE, SCALE, antialias=False),
            v2.RandomCrop(CROP, pad_if_needed=True, fill={tv_tensors.Mask: 255, "others": 114}),
            v2.RandomHorizontalFlip(),
            v2.RandomPhotometricDistort(hue=(-0.05, 0.05)),
        ]
    )

    def work(image, label):
        image, label = (v2.functional.pil_to_tensor(Image.open(path)) for path in (image, label))
        return chain(tv_tensors.Image(image), tv_tensors.Mask(label))

    return work


def albumentations_work() -> Callable:
    import albumentations as A
    import cv2

    cv2.setNumThreads(0)
    chain = A.Compose(
        [
            A.RandomScale((SCALE[0] - 1, SCALE[1] - 1), p=1),
            A.PadIfNeeded(*CROP, fill=114, fill_mask=255, border_mode=cv2.BORDER_CONSTANT),
            A.RandomCrop(*CROP),
            A.HorizontalFlip(p=0.5),
            A.ColorJitter((0.87, 1.13), (0.5, 1.5), (0.5, 1.5), (-0.05, 0.05), p=0.5),
        ]
    )

    def work(image, label):
        out = chain(
            image=cv2.imread(str(image), cv2.IMREAD_COLOR_RGB),
            mask=cv2.imread(str(label), cv2.IMREAD_UNCHANGED),
        )
        return out["image"], out["mask"]

    return work


if __name__ == "__main__":
    main()
