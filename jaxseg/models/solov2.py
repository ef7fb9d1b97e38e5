"""SOLOv2: Dynamic and Fast Instance Segmentation. Wang, Zhang, Kong, Li, Shen. NeurIPS 2020,
arXiv:2003.10152.

SOLO, whose cells no longer have a channel of the mask branch each: a cell predicts the kernel of a
1x1 convolution, which draws its mask on features that all levels share (section 3.2). The masks are
finer, stride 4 for all sizes, and Matrix NMS replaces the sequential one (section 3.4). L = 2 .. 6:

    image [B,H,W,C] -> ResNet -> FPN -> p2 .. p6 [B,h,w,256]
    level, its coordinates -> resized to S x S -> 4 convolutions -> kernels{L} [B,S,S,256]
    level -> resized to S x S -> 4 convolutions ------------------> categories{L} [B,S,S,T]
    p2 .. p5, the last with coordinates -> convolutions and x2 up to stride 4 -> sum -> 1x1
        -> mask_features [B,H/4,W/4,256]

Differs from the paper: as SOLO; `positives` are those of an image. The paper's 3x3 dynamic kernels,
no better there (Table 3a), and its deformable convolutions are left out. As in the authors' code, a
cell that two objects share learns the masks of both, and the category of the later one.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.backbones.fpn import FPN
from jaxseg.backbones.layers import Conv, ConvNorm, Norm
from jaxseg.models import solo
from jaxseg.models.solo import LEVELS, Select, Tower, small
from jaxseg.ops.grids import assign, choose, coordinates, shrink
from jaxseg.ops.mask_losses import mask_dice
from jaxseg.ops.resize import resize


class MaskFeatures(nn.Module):
    """p2 .. p5 -> [B,H/4,W/4,embedding]. Section 3.2, Fig. 3."""

    features: int
    embedding: int
    norm: Norm

    @nn.compact
    def __call__(self, levels: dict[str, jax.Array], train: bool) -> jax.Array:
        conv = partial(ConvNorm, norm=self.norm)
        y = conv(self.features, name="level2_1")(levels["p2"], train)
        for i in (3, 4, 5):
            x = levels[f"p{i}"]
            if i == 5:
                x = jnp.concatenate([x, coordinates(x)], -1)
            for j in range(1, i - 1):
                x = solo.double(conv(self.features, name=f"level{i}_{j}")(x, train))
            y += x
        return conv(self.embedding, 1, name="fuse")(y, train)


class Model(nn.Module):
    """image [B,H,W,C], H and W multiples of 32 -> categories{L} [B,S,S,T], kernels{L} [B,S,S,E],
    L = 2 .. 6, and mask_features [B,H/4,W/4,E]."""

    num_classes: int
    backbone: nn.Module
    things: tuple[int, ...] = ()  # classes of the T categories; () = all
    grids: tuple[int, ...] = (40, 36, 24, 16, 12)  # S; the authors' code
    ranges: tuple = ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048))  # pixels; SOLO's
    centre: float = 0.2  # part of an object's box whose cells are its own; SOLO's
    convs: int = 4  # of the category and of the kernel branch
    features: int = 512  # in them; the authors' code
    embedding: int = 256  # E, channels that a kernel weighs; section 4.2
    mask_features: int = 128  # channels on the way to them; Fig. 3
    fpn: int = 256  # channels of the pyramid
    norm: Norm = Norm(kind="group")  # 32 groups
    square: bool = False  # images to label are extended to squares, such as training crops are
    select: Select = Select()

    @property
    def output_stride(self) -> int:
        """Of the masks."""
        return 4

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> dict[str, jax.Array]:
        self.check()
        levels = FPN(self.fpn, name="fpn")(self.backbone(image, train))
        mask = MaskFeatures(self.mask_features, self.embedding, self.norm, name="mask_features")
        tower = dict(convs=self.convs, features=self.features, norm=self.norm)
        category, last = Tower(**tower, name="category"), solo.categories(self)
        kernel = Tower(**tower, name="kernel")
        kernels = Conv(self.embedding, kernel_init=small, name="kernels")
        outputs = {"mask_features": mask(levels, train)}
        for level, grid, x in zip(LEVELS, self.grids, solo.even(levels), strict=True):
            y = resize(jnp.concatenate([x, coordinates(x)], -1), (grid, grid))
            outputs[f"kernels{level}"] = kernels(kernel(y, train))
            outputs[f"categories{level}"] = last(category(y[..., :-2], train))
        return outputs

    check = solo.check_levels
    fit = solo.Model.fit
    check_crop = solo.Model.check_crop


def draw(features: jax.Array, kernels: jax.Array) -> jax.Array:
    """mask_features [h,w,E], kernels [P,E] -> probabilities float32 [P,h,w]."""
    return nn.sigmoid(jnp.einsum("hwe,pe->phw", features, kernels).astype(jnp.float32))


def every(outputs: dict[str, jax.Array]) -> jax.Array:
    """The kernels of all cells, level by level: [B,cells,E]."""
    kernels = [outputs[f"kernels{level}"] for level in LEVELS]
    return jnp.concatenate([k.reshape(k.shape[0], -1, k.shape[-1]) for k in kernels], 1)


def loss(
    outputs: dict[str, jax.Array],
    batch: dict[str, jax.Array],
    *,
    num_classes: int,
    things: tuple[int, ...],
    grids: tuple[int, ...],
    ranges: tuple,
    centre: float,
    positives: int = 128,  # masks that are drawn, of an image
    mask_weight: float = 3.0,  # section 3.3
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """SOLO's: focal loss of the categories of all cells and Dice loss of the masks of positives."""
    found = solo.objects(batch, num_classes, things)
    focal, taken, cells, positive, start = 0.0, 0, [], [], 0
    for level, grid, scales in zip(LEVELS, grids, ranges, strict=True):
        size = batch["masks"].shape[2:]
        owner, of_level, flags = assign(*found[:3], grid, scales, size, centre)
        focal += solo.category_loss(outputs[f"categories{level}"], owner, found[3])
        taken += (owner >= 0).sum()
        cells.append((of_level + start).reshape(len(owner), -1))
        positive.append(flags.reshape(len(owner), -1))
        start += grid**2
    cells, positive = jnp.concatenate(cells, 1), jnp.concatenate(positive, 1)
    places, used = choose(positive, positives)
    chosen = jnp.take_along_axis(cells, places, 1)
    features = outputs["mask_features"]
    kernels = jnp.take_along_axis(every(outputs), chosen[..., None], 1)
    truth = shrink(batch["masks"], features.shape[1:3])
    truth = solo.of_objects(truth, places // 9 % truth.shape[1])
    dice = jnp.where(used, mask_dice(jax.vmap(draw)(features, kernels), truth), 0).sum()
    dropped = positive.sum() - used.sum()
    # As in MMDetection, a shared cell's masks both count, over the number of cells; the authors
    # divide by that of masks.
    return solo.total(focal, dice, taken, jnp.minimum(taken, used.sum()), dropped, mask_weight)


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
    logits = [outputs[f"categories{level}"] for level in LEVELS]

    def one(logits: list[jax.Array], kernels: jax.Array, features: jax.Array) -> dict:
        found = lambda cells: draw(features, kernels[cells])  # noqa: E731
        return solo.detect(logits, found, image.shape[1:3], select)

    found = jax.vmap(one)(logits, every(outputs), outputs["mask_features"])
    return {"instances": solo.named(found, num_classes, things)}
