"""U-Net: Convolutional Networks for Biomedical Image Segmentation. Ronneberger, Fischer, Brox.
MICCAI 2015, arXiv:1505.04597.

A contracting path of 3x3 convolutions and 2x2 max-poolings, and an expanding path that doubles the
resolution again and again, each time beside the features of the same level (Fig. 1):

    image 572 -> 64 ------------- copy and crop -------------> 64 -> logits 388
                  `-> 128 -> 256 -> 512 -> 1024 -> 512 -> 256 -> 128 -'

padding="valid" is the paper's network: an input of 16m + 124 pixels is labelled in its centre,
16m - 60 pixels. padding="same" keeps the size (a multiple of 16); it is usually run with batch
norm, and patch=2 makes it four times cheaper: the network works on 2x2 pixels at a time and its
classifier gives their four labels (dense upsampling, Wang et al. 2018, arXiv:1702.08502).

With a `backbone`, its levels c1 to c5 are the contracting path, and `widths` the expanding one.
`predict` is FCN's, of the labelled centre.

Differs from the paper: the dropout rate, which it does not give, is 0.5; class weights multiply the
border term of Eq. 2, to which the paper adds them (the same where they are 1, the default). Fields
that are not in the paper are the switches by which segmentation_models.pytorch's and
MMSegmentation's networks of this name differ from it.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.backbones.layers import (
    ConvNorm,
    Norm,
    UpConv,
    check_fields,
    classifier,
    dense_upsampling,
    dropout,
)
from jaxseg.errors import InputError
from jaxseg.models.fcn import predict as predict
from jaxseg.ops import matting
from jaxseg.ops.image import centre, space_to_depth
from jaxseg.ops.losses import PixelLoss
from jaxseg.ops.pool import max_pool
from jaxseg.ops.resize import nearest, resize

CHOICES = {"padding": ("valid", "same"), "up": ("transposed", "bilinear", "nearest")}


class Up(nn.Module):
    """Doubles the resolution: [B,h,w,C] -> [B,2h,2w,features], or C channels where nearest."""

    features: int
    kind: str
    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if self.kind == "transposed":
            return UpConv(self.features, name="conv")(x)
        size = (2 * x.shape[1], 2 * x.shape[2])
        if self.kind == "nearest":
            return nearest(x, size)
        return ConvNorm(self.features, 1, norm=self.norm, name="conv")(resize(x, size), train)


class Model(nn.Module):
    """image [B,H,W,C] -> logits [B,H,W,K], or [B,H-184,W-184,K] where valid and four deep."""

    num_classes: int
    backbone: nn.Module | None = None
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)  # channels of each level, Fig. 1
    padding: str = "valid"  # section 2: "the valid part of each convolution"; or "same"
    patch: int = 1  # patch x patch pixels fold into channels: all levels at 1/patch resolution
    dropout: float = 0.5  # at the end of the contracting path, section 3.1
    up: str = "transposed"  # Fig. 1; "bilinear" + 1x1 convolution: MMSegmentation; "nearest": smp
    head: int = 0  # channels of one more 3x3 convolution: 64 in MMSegmentation
    aux: int = 0  # channels of an auxiliary head on the level of half the size: 64 there
    head_dropout: float = 0.0  # of whole channels, before the classifiers: 0.1 in MMSegmentation
    classifier_kernel: int = 1  # Fig. 1; smp's is 3
    norm: Norm = Norm(kind="none")

    @property
    def depth(self) -> int:
        """The number of times that the resolution halves."""
        return len(self.widths) - (self.backbone is None)

    @property
    def output_stride(self) -> int:
        return 1

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> dict[str, jax.Array]:
        """image [B,H,W,C] -> logits [B,H,W,K], or [B,H-184,W-184,K] where valid and four deep; with
        an auxiliary head, aux_logits [B,H/2,W/2,K]."""
        self._check(image.shape[1:3], "input")
        conv = partial(ConvNorm, norm=self.norm, padding=self.padding)
        if self.backbone:
            levels = self.backbone(image, train)
            skips = [None, *(levels[f"c{level}"] for level in range(1, self.depth))]
            x = levels[f"c{self.depth}"]
        else:
            x, skips = space_to_depth(image, self.patch), []
            for level, width in enumerate(self.widths):
                if level:
                    skips.append(x)
                    x = max_pool(x, window=2, stride=2)
                x = conv(width, name=f"down{level}_1")(x, train)
                x = conv(width, name=f"down{level}_2")(x, train)
        x = dropout(self.dropout, x, train)

        half = x
        for level in reversed(range(self.depth)):
            width, skip, half = self.widths[level], skips[level], x
            if skip is None or skip.shape[1] != x.shape[1]:  # equal where a backbone is dilated
                x = Up(width, self.up, self.norm, name=f"up{level}")(x, train)
            if skip is not None:
                x = jnp.concatenate([centre(skip, x.shape[1:3]), x], axis=-1)
            x = conv(width, name=f"up{level}_1")(x, train)
            x = conv(width, name=f"up{level}_2")(x, train)
        if self.head:
            x = conv(self.head, name="head")(x, train)
        x = dropout(self.head_dropout, x, train, channels=True)
        logits = dense_upsampling(self.num_classes, self.patch, x, self.classifier_kernel)
        outputs = {"logits": logits}
        if self.aux:
            half = conv(self.aux, name="aux")(half, train)
            half = dropout(self.head_dropout, half, train, channels=True)
            outputs["aux_logits"] = classifier(self.num_classes, name="aux_classifier")(half)
        return outputs

    def fit(self, size: tuple[int, int]) -> tuple[int, int]:
        """The smallest input size whose labelled centre covers `size`."""
        return tuple(self._input(n) for n in size)

    def check_crop(self, size: tuple[int, int]) -> None:
        """Raises InputError for a training crop (H, W) that the network cannot take."""
        self._check(size, "crop")

    def _input(self, labelled: int) -> int:
        """16b + 60 pixels give 16(b - 4) - 60 labels where valid; 16b give 16b where same."""
        step = self.patch * 2**self.depth
        lost = 0 if self.padding == "same" else 4 * (step - self.patch)
        bottom = -(-(labelled + lost) // step) + (0 if self.padding == "same" else 4)
        return step * bottom + lost

    def _check(self, size: tuple[int, int], what: str) -> None:
        check_fields(self, CHOICES, "model")
        if self.backbone and self.padding == "valid":
            raise InputError('a U-Net on a backbone pads: needs model.padding="same"')
        if self.padding == "valid" and (self.head or self.aux):
            raise InputError(
                f"model.head is {self.head} and model.aux {self.aux}: their convolutions need "
                'model.padding="same", for what is labelled would no longer meet its labels'
            )
        if self.backbone and (self.patch > 1 or self.depth > 5):
            raise InputError(
                f"a U-Net on a backbone has at most 5 levels and patch 1, got {self.depth} and "
                f"{self.patch}"
            )
        if not self.widths or not all(type(n) is int and n > 0 for n in (*self.widths, self.patch)):
            raise InputError(
                f"model.widths is {self.widths} and model.patch {self.patch}: needs positive "
                "integers, such as (64, 128, 256) and 1"
            )
        step, least = self.patch * 2**self.depth, self._input(1)
        rest = least % step
        if all(n >= least and n % step == rest for n in size):
            return
        near = tuple(max(least, n - (n - rest) % step) for n in size)
        above = tuple(n if n >= m else n + step for n, m in zip(near, size, strict=True))
        rule = f"{step}n + {rest}" if rest else f"multiples of {step}"
        raise InputError(
            f"{what} {tuple(size)} does not fit a {self.padding} U-Net of depth {self.depth}, "
            f"whose sides are {rule}, at least {least}: use {near} or {above}"
        )


def loss(
    outputs: dict[str, jax.Array],
    batch: dict[str, jax.Array],
    *,
    aux_weight: float = 0.4,
    pixel: PixelLoss = PixelLoss(),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Softmax cross entropy of every pixel of the labelled centre, Eq. 1.

    `weight` [B,H,W] of the batch, where it has one, is the border-weight map of Eq. 2; for soft
    masks, `alpha` [B,H,W], it is the loss of `ops/matting.py` instead.
    """
    logits = outputs["logits"].astype(jnp.float32)
    size = logits.shape[1:3]
    label = centre(batch["label"], size)
    if "alpha" in batch:
        return matting.loss(logits, centre(batch["alpha"], size), label)
    weight = centre(batch["weight"], size) if "weight" in batch else None
    value = pixel(logits, label, weight)
    if "aux_logits" not in outputs:
        return value, {"loss": value}
    aux = pixel(outputs["aux_logits"], label, weight)
    logs = {"loss": value + aux_weight * aux, "main_loss": value, "aux_loss": aux}
    return logs["loss"], logs
