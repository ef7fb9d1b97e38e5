"""Prediction on a user's images: the two-line API and the verb `predict`.

predictor = jaxseg.load("runs/quickstart")
result = predictor(image)  # uint8 [H,W,3] of any size
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxseg.data import catalog, colours, sources
from jaxseg.data.transforms import resize
from jaxseg.errors import InputError
from jaxseg.evaluate import make_infer
from jaxseg.log import say
from jaxseg.train import load_variables


@dataclasses.dataclass(frozen=True)
class Result:
    """What the network sees in one image."""

    image: np.ndarray  # uint8 [H,W,C]
    label: np.ndarray  # uint8 [H,W], class ids
    logits: np.ndarray  # float32 [H,W,K]
    classes: colours.Classes

    @property
    def overlay(self) -> np.ndarray:
        """The classes' colours over the image, uint8 [H,W,3]."""
        return colours.overlay(self.image, self.label, self.classes)

    def save(self, path: str | Path) -> None:
        """Writes `label` as an indexed PNG in the data set's palette."""
        colours.save_label(Path(path), self.label, self.classes)


class Predictor:
    """A trained run, ready to label images. Attributes: config, classes, step."""

    def __init__(self, workdir: str | Path):
        """Loads the newest good checkpoint. Raises InputError where there is no run."""
        workdir = Path(workdir)
        self.config, _, self.variables, self.step, _ = load_variables(workdir)
        self.classes = catalog.read_classes(workdir / "classes.json")
        self._infer = jax.jit(make_infer(self.config), static_argnames="size")

    def __call__(self, image: np.ndarray) -> Result:
        """Labels one image, uint8 [H,W,C] of any size, C as in the run. It compiles once a size."""
        image, channels = np.asarray(image), self.config.data.channels
        if (
            image.dtype != np.uint8
            or image.ndim != 3
            or image.shape[2] != channels
            or not image.size
        ):
            raise InputError(
                f"an image of {image.dtype} {list(image.shape)}: "
                f"needs uint8 [H,W,{channels}], values 0..255"
            )
        size = image.shape[:2]
        scaled = tuple(max(1, round(n * self.config.eval.scale)) for n in size)
        out = self._infer(self.variables, jnp.asarray(resize(image, scaled))[None], size=size)
        label = np.asarray(out["semantic"][0]).astype(np.uint8)
        return Result(image, label, np.asarray(out["logits"][0]), self.classes)


def load(workdir: str | Path) -> Predictor:
    """The trained run in `workdir`, as a function of an image."""
    return Predictor(workdir)


def predict(workdir: Path, inputs: Sequence[Path], output: Path, save_logits: bool = False) -> int:
    """Labels image files and the images of folders; returns the exit code.

    Writes OUTPUT/NAME.png (indexed, at the image's own size), NAME_overlay.png and, on request,
    NAME.npz with float32 `logits` [H,W,K].
    """
    paths = collect(inputs)
    files = {path.resolve() for path in paths.values()}
    for name in paths:
        for written in (output / f"{name}.png", output / f"{name}_overlay.png"):
            if written.resolve() in files:
                raise InputError(f"{written} is an input and would be overwritten: change --output")
    predictor = load(workdir)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {output}: {error.strerror}") from error
    for number, (name, path) in enumerate(paths.items(), start=1):
        result = predictor(sources.read_image(path, predictor.config.data.channels))
        result.save(output / f"{name}.png")
        Image.fromarray(result.overlay).save(output / f"{name}_overlay.png")
        if save_logits:
            np.savez_compressed(output / f"{name}.npz", logits=result.logits)
        say(f"{number}/{len(paths)}  {path} -> {output / name}.png")
    return 0


def collect(inputs: Sequence[Path]) -> dict[str, Path]:
    """Output name -> image file, for files and folders. Raises InputError if one has no image."""
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = sources.find_images(path)
            if not inside:
                raise InputError(
                    f"no images in folder {path}: "
                    f"needs files ending in {', '.join(sources.IMAGE_SUFFIXES)}"
                )
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"no such image or folder: {path}")
    names: dict[str, Path] = {}
    for path in found:
        if path.stem in names and names[path.stem] != path:
            raise InputError(
                f"{names[path.stem]} and {path} would both become {path.stem}.png: "
                "predict them into different --output folders"
            )
        names[path.stem] = path
    for name, path in names.items():
        if f"{name}_overlay" in names:
            raise InputError(
                f"the overlay of {path} and the labels of {names[f'{name}_overlay']} would both "
                f"become {name}_overlay.png: predict them into different --output folders"
            )
    return names
