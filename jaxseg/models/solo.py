"""SOLO: Segmenting Objects by Locations. Wang, Kong, Shen, Jiang, Li. ECCV 2020, arXiv:1912.04488.

Objects are told apart by where they are. On each of five levels of a pyramid, the image is divided
into S x S cells: the category branch says what lies at a cell, of T categories, and the mask branch
has one mask for each cell (Fig. 2). There are no boxes and no groups of pixels. With L = 2 .. 6:

    image [B,H,W,C] -> ResNet -> FPN -> strides 8, 8, 16, 32, 32 [B,h,w,256]
    level -> resized to S x S -> 7 convolutions ------------> categories{L} [B,S,S,T]
    level, its coordinates -> 7 convolutions -> features{L} [B,h,w,256], whose product with the row
        of a cell in kernels{L} [S^2,256], twice as large, is the cell's mask [2h,2w]

Decoupled SOLO (section 5) has S masks for the columns, x{L} [B,2h,2w,S], and S for the rows, y{L};
that of a cell is the product of two. Masks are drawn for few cells only, those that an object fills
in training and the best ones in prediction: S^2 = 1600 of them are never held at once.

Differs from the paper: the masks that are drawn, of a level and an image in training (`positives`)
and of an image in prediction (`select.candidates`), are at most a fixed number; what is left out in
training is logged as `dropped`. As in the authors' code, sizes that are compared with `ranges` are
those of boxes, and suppression is SOLOv2's.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.backbones.fpn import FPN, check_strides
from jaxseg.backbones.layers import Conv, ConvNorm, Norm, check_fields
from jaxseg.errors import InputError, unknown
from jaxseg.ops.grids import assign, choose, coordinates, mass_centres, own, shrink
from jaxseg.ops.mask_losses import mask_dice, sigmoid_focal
from jaxseg.ops.matrix_nms import matrix_nms, point_nms
from jaxseg.ops.pool import avg_pool
from jaxseg.ops.resize import resize

LEVELS = (2, 3, 4, 5, 6)
STRIDES = (8, 8, 16, 32, 32)  # of the levels, once resized
MASKS = ("vanilla", "decoupled", "decoupled_light")
small = nn.initializers.normal(0.01)  # the authors' code
rare = nn.initializers.constant(-math.log(99))  # a probability of 0.01; section 3.3 of RetinaNet


@dataclasses.dataclass(frozen=True)
class Select:
    """How scores and masks become objects; the authors' numbers."""

    score: float = 0.1  # of a category, to be looked at
    candidates: int = 500  # cells and categories of an image, the best ones
    mask: float = 0.5  # probability of a pixel that belongs to the object
    kernel: str = "gaussian"  # or "linear": of Matrix NMS
    sigma: float = 2.0  # of the Gaussian
    keep: float = 0.05  # final score, to be an object
    objects: int = 100  # of an image, at most

    def __post_init__(self):
        """Raises InputError for numbers that no prediction could use."""
        if self.kernel not in ("gaussian", "linear"):
            raise unknown("model.select.kernel", self.kernel, ("gaussian", "linear"))
        for key in ("candidates", "objects"):
            if getattr(self, key) < 1:
                raise InputError(f"model.select.{key} is {getattr(self, key)}: needs at least 1")


class Tower(nn.Module):
    """3x3 convolutions with norm and ReLU: [B,h,w,C] -> [B,h,w,features]."""

    convs: int
    features: int
    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i in range(1, self.convs + 1):
            x = ConvNorm(self.features, norm=self.norm, name=f"conv{i}")(x, train)
        return x


class Kernels(nn.Module):
    """The weights of a 1x1 convolution, to be applied to few of its outputs."""

    outputs: int
    bias_init: nn.initializers.Initializer

    @nn.compact
    def rows(self, inputs: int) -> tuple[jax.Array, jax.Array]:
        """(kernels [outputs,inputs], biases [outputs])."""
        kernel = self.param("kernel", small, (1, 1, inputs, self.outputs))
        return kernel[0, 0].T, self.param("bias", self.bias_init, (self.outputs,))


class Model(nn.Module):
    """image [B,H,W,C], H and W multiples of 32 -> categories{L} [B,S,S,T], L = 2 .. 6, and either
    features{L} [B,h,w,256], kernels{L} [S^2,256], biases{L} [S^2] or x{L}, y{L} [B,2h,2w,S]."""

    num_classes: int
    backbone: nn.Module
    things: tuple[int, ...] = ()  # classes of the T categories; () = all
    masks: str = "vanilla"  # or "decoupled" (section 5), "decoupled_light": one tower for x and y
    grids: tuple[int, ...] = (40, 36, 24, 16, 12)  # S; the authors' code
    ranges: tuple = ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048))  # pixels, section 4
    centre: float = 0.2  # section 3.3.1: part of an object's box whose cells are its own
    convs: int = 7  # Fig. 3
    features: int = 256
    fpn: int = 256  # channels of the pyramid
    prior: float = 0.01  # what masks begin with, a probability; the authors' code
    norm: Norm = Norm(kind="group")  # the authors' code: 32 groups
    square: bool = False  # images to label are extended to squares, such as training crops are
    select: Select = Select()

    @property
    def output_stride(self) -> int:
        """Of the finest masks."""
        return 4

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> dict[str, jax.Array]:
        self.check()
        levels = FPN(self.fpn, name="fpn")(self.backbone(image, train))
        tower = dict(convs=self.convs, features=self.features, norm=self.norm)
        category, last = Tower(**tower, name="category"), categories(self)
        names = ("mask_x", "mask_y") if self.masks == "decoupled" else ("mask",)
        towers = [Tower(**tower, name=name) for name in names]
        outputs, prior = {}, nn.initializers.constant(-math.log(1 / self.prior - 1))
        for level, grid, x in zip(LEVELS, self.grids, even(levels), strict=True):
            outputs[f"categories{level}"] = last(category(resize(x, (grid, grid)), train))
            xy = coordinates(x)
            parts = [xy] if len(towers) == 1 else [xy[..., :1], xy[..., 1:]]
            ys = [t(jnp.concatenate([x, c], -1), train) for t, c in zip(towers, parts, strict=True)]
            if self.masks == "vanilla":
                outputs[f"features{level}"] = ys[0]
                rows = Kernels(grid**2, prior, name=f"masks{level}").rows(self.features)
                outputs[f"kernels{level}"], outputs[f"biases{level}"] = rows
                continue
            for axis, y in zip("xy", [double(ys[0]), double(ys[-1])], strict=True):
                conv = Conv(grid, kernel_init=small, bias_init=prior, name=f"masks_{axis}{level}")
                outputs[f"{axis}{level}"] = conv(y)
        return outputs

    def check(self) -> None:
        """Raises InputError for another kind of masks, and where levels and grids do not fit."""
        check_fields(self, {"masks": MASKS}, "model")
        check_levels(self)

    def fit(self, size: tuple[int, int]) -> tuple[int, int]:
        """The input size (H, W) of an image of `size`: multiples of the coarsest stride."""
        sides = tuple(-(-n // 32) * 32 for n in size)
        return (max(sides),) * 2 if self.square else sides

    def check_crop(self, size: tuple[int, int]) -> None:
        """Raises InputError for a training crop (H, W) that levels would not divide evenly."""
        if tuple(size) != self.fit(size):
            rule = "equal sides, multiples" if self.square else "sides that are multiples"
            raise InputError(f"crop {tuple(size)} must have {rule} of 32: use {self.fit(size)}")


def check_levels(model: nn.Module) -> None:
    """Raises InputError where there is not one grid and one range of sizes for each level, or the
    backbone's levels have other strides."""
    check_strides(model.backbone)
    pairs = all(isinstance(r, tuple) and len(r) == 2 for r in model.ranges)
    if len(model.grids) != len(LEVELS) or len(model.ranges) != len(LEVELS) or not pairs:
        raise InputError(
            f"model.grids is {model.grids} and model.ranges {model.ranges}: need five numbers of "
            "cells and five pairs (low, high) in pixels, from the finest level to the coarsest"
        )


def categories(model: nn.Module) -> Conv:
    """The last convolution of the category branch; call it inside the model."""
    count = len(model.things) or model.num_classes
    return Conv(count, kernel_init=small, bias_init=rare, name="classifier")


def even(levels: dict[str, jax.Array]) -> list[jax.Array]:
    """p2 .. p6 at strides 8, 8, 16, 32, 32: the outermost are resized to their neighbours' size."""
    p2, p3, p4, p5, p6 = (levels[f"p{i}"] for i in LEVELS)
    return [avg_pool(p2, 2, 2), p3, p4, p5, resize(p6, p5.shape[1:3])]


def double(x: jax.Array) -> jax.Array:
    """[B,h,w,C] -> [B,2h,2w,C], bilinear."""
    return resize(x, (2 * x.shape[1], 2 * x.shape[2]))


def draw(
    level: int,
    shared: dict[str, jax.Array],
    image: dict[str, jax.Array],
    cells: jax.Array,
    size: tuple[int, int] | None = None,
) -> jax.Array:
    """Masks of cells int32 [P] of one level of one image: probabilities float32 [P,2h,2w].

    shared, image: from `split`, the second without the batch axis. size: to which the masks, or
    those of columns and rows before they meet, are resized.
    """

    def resized(p: jax.Array) -> jax.Array:
        """[h,w,C] of probabilities."""
        return p if size is None else resize(p[None], size)[0]

    if f"x{level}" in image:
        x, y = (nn.sigmoid(image[f"{axis}{level}"].astype(jnp.float32)) for axis in "xy")
        x, y = resized(x)[..., cells % x.shape[-1]], resized(y)[..., cells // x.shape[-1]]
        return jnp.moveaxis(x * y, -1, 0)
    kernels, biases = shared[f"kernels{level}"][cells], shared[f"biases{level}"][cells]
    logits = jnp.einsum("hwf,pf->hwp", image[f"features{level}"], kernels).astype(jnp.float32)
    # The authors enlarge the features: a 1x1 convolution after it is the same, and costs more.
    return jnp.moveaxis(resized(nn.sigmoid(double((logits + biases)[None])[0])), -1, 0)


def split(outputs: dict[str, jax.Array]) -> tuple[dict, dict]:
    """What each image has of its own, with the batch axis, and what all share."""
    shared = {k: v for k, v in outputs.items() if v.ndim < 3}
    return {k: v for k, v in outputs.items() if v.ndim >= 3}, shared


def loss(
    outputs: dict[str, jax.Array],
    batch: dict[str, jax.Array],
    *,
    num_classes: int,
    things: tuple[int, ...],
    grids: tuple[int, ...],
    ranges: tuple,
    centre: float,
    positives: int = 64,  # masks that are drawn, of a level and an image
    mask_weight: float = 3.0,  # section 3.3.2
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Focal loss of the categories of all cells and Dice loss of the masks of positive ones. Eq. 1.

    The first is summed, over the number of positive cells + 1; the second is a mean.
    """
    images, shared = split(outputs)
    found = objects(batch, num_classes, things)
    focal = dice = drawn = dropped = 0.0
    for level, grid, scales in zip(LEVELS, grids, ranges, strict=True):
        owner, cells, positive = assign(*found[:3], grid, scales, batch["masks"].shape[2:], centre)
        focal += category_loss(outputs[f"categories{level}"], owner, found[3])
        positive = own(owner, cells, positive).reshape(len(owner), -1)
        places, used = choose(positive, positives)
        chosen = jnp.take_along_axis(cells.reshape(positive.shape), places, 1)
        p = jax.vmap(partial(draw, level, shared))(images, chosen)
        truth = of_objects(shrink(batch["masks"], p.shape[2:]), places // 9)
        dice += jnp.where(used, mask_dice(p, truth), 0).sum()
        drawn += used.sum()
        dropped += positive.sum() - used.sum()
    return total(focal, dice, drawn + dropped, drawn, dropped, mask_weight)


def objects(
    batch: dict[str, jax.Array], num_classes: int, things: tuple[int, ...]
) -> tuple[jax.Array, ...]:
    """(mass centres [B,N,2], boxes [B,N,4], which count bool [B,N], categories int32 [B,N]).

    Empty slots, crowds and classes that are no things do not count.
    """
    if "masks" not in batch:
        raise InputError(
            "the batch has no objects: SOLO needs data.objects > 0 and a data set that tells "
            "objects apart"
        )
    category = batch["classes"]
    if things:
        table = np.full(num_classes, -1, np.int32)
        table[list(things)] = np.arange(len(things))
        category = jnp.where(category >= 0, jnp.asarray(table)[category], -1)
    counted = (category >= 0) & ~batch["crowd"]
    return mass_centres(batch["masks"]), batch["boxes"], counted, category


def category_loss(logits: jax.Array, owner: jax.Array, category: jax.Array) -> jax.Array:
    """The sum of focal losses of logits [B,S,S,T]; owner [B,S,S] of `assign`, category [B,N]."""
    taker = jnp.maximum(owner, 0).reshape(len(owner), -1)
    truth = jnp.take_along_axis(category, taker, 1).reshape(owner.shape)
    truth = jnp.where(owner >= 0, truth, -1)[..., None] == jnp.arange(logits.shape[-1])
    return sigmoid_focal(logits, truth).sum()


def of_objects(masks: jax.Array, numbers: jax.Array) -> jax.Array:
    """masks [B,N,h,w] and numbers of objects [B,P] -> [B,P,h,w]."""
    return jax.vmap(lambda masks, n: masks[n])(masks, numbers)


def total(
    focal: jax.Array,
    dice: jax.Array,
    positive: jax.Array,
    drawn: jax.Array,
    dropped: jax.Array,
    mask_weight: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, scalars to log) of the two sums and the numbers of positive cells and masks drawn."""
    category, mask = focal / (positive + 1), dice / jnp.maximum(drawn, 1)
    logs = {"loss": category + mask_weight * mask, "category_loss": category, "mask_loss": mask}
    return logs["loss"], {**logs, "positives": positive, "dropped": dropped}


def predict(
    outputs: dict[str, jax.Array],
    image: jax.Array,
    *,
    num_classes: int,
    things: tuple[int, ...],
    select: Select,
) -> dict[str, dict[str, jax.Array]]:
    """instances: masks bool [B,M,H,W], scores float32 [B,M] and classes int32 [B,M], best first.

    Slots without an object have class -1 and score 0. At the size of image [B,H,W,C].
    """
    images, shared = split(outputs)
    size = image.shape[1:3]

    def one(image: dict[str, jax.Array]) -> dict[str, jax.Array]:
        logits = [image[f"categories{level}"] for level in LEVELS]
        return detect(logits, partial(draw_any, shared, image, size), size, select)

    return {"instances": named(jax.vmap(one)(images), num_classes, things)}


def draw_any(
    shared: dict[str, jax.Array],
    image: dict[str, jax.Array],
    size: tuple[int, int],
    cells: jax.Array,
) -> jax.Array:
    """Masks of cells int32 [P], counted through all levels of an image of `size`: [P,H/4,W/4]."""
    size = tuple(n // 4 for n in size)
    masks, start = jnp.zeros((len(cells), *size)), 0
    for level in LEVELS:
        count = math.prod(image[f"categories{level}"].shape[:2])
        p = draw(level, shared, image, jnp.clip(cells - start, 0, count - 1), size)
        here = (cells >= start) & (cells < start + count)
        masks = jnp.where(here[:, None, None], p, masks)
        start += count
    return masks


def detect(
    logits: list[jax.Array],
    draw: Callable[[jax.Array], jax.Array],
    size: tuple[int, int],
    select: Select,
) -> dict[str, jax.Array]:
    """The objects of one image: masks bool [M,*size], scores [M], classes (categories) [M].

    Points that are no local maximum go, then masks that are not larger than their level's stride.
    What stays scores its category's probability times the mean probability inside its mask, and
    is decayed by Matrix NMS. logits: [S,S,T] of each level; draw: cells [K] -> masks [K,h,w].
    """
    scores = [point_nms(nn.sigmoid(x.astype(jnp.float32))) for x in logits]
    strides = np.repeat(STRIDES, [math.prod(x.shape[:2]) for x in logits])
    scores = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in scores])
    best, index = jax.lax.top_k(scores.ravel(), min(select.candidates, scores.size))
    cells, category = index // scores.shape[1], index % scores.shape[1]

    p = draw(cells)
    masks = p > select.mask
    area = masks.sum((1, 2))
    kept = (best > select.score) & (area > jnp.asarray(strides)[cells])
    inside = jnp.where(masks, p, 0).sum((1, 2)) / jnp.maximum(area, 1)
    best = jnp.where(kept, best * inside, 0)
    best = matrix_nms(masks, category, best, select.kernel, select.sigma)

    best, index = jax.lax.top_k(best, min(select.objects, len(best)))
    there = (best >= select.keep) & (best > 0)
    masks = resize(p[index][..., None], size)[..., 0] > select.mask
    return {
        "masks": masks & there[:, None, None],
        "scores": jnp.where(there, best, 0),
        "classes": jnp.where(there, category[index], -1).astype(jnp.int32),
    }


def named(
    found: dict[str, jax.Array], num_classes: int, things: tuple[int, ...]
) -> dict[str, jax.Array]:
    """Objects with the class ids of the data set in place of categories."""
    table = jnp.asarray([*(things or range(num_classes)), -1], jnp.int32)  # -1 takes the last
    return {**found, "classes": table[found["classes"]]}
