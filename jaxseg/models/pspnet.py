"""PSPNet: Pyramid Scene Parsing Network. Zhao, Shi, Qi, Wang, Jia. CVPR 2017, arXiv:1612.01105.

Pyramid pooling sets the mean of the whole scene and of its 2x2, 3x3 and 6x6 parts beside the
features of every pixel (Fig. 3). An auxiliary head on conv4 helps training only (Fig. 4):

    image [B,H,W,C] -> ResNet, output stride 8 -> c5 [B,H/8,W/8,2048]
    c5 -> pools 1, 2, 3, 6 -> each 1x1 512 -> bilinear -.
    c5 ----------------------------------------------- concat -> 3x3 512 -> logits [B,H/8,W/8,K]

Differs from the paper: nothing known. Fields that are not in the paper are the switches by which
MMSegmentation's and segmentation_models.pytorch's networks of this name differ from it.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.backbones.layers import ConvNorm, Norm, classifier, dropout
from jaxseg.errors import InputError, unknown
from jaxseg.models import deeplabv1
from jaxseg.ops.losses import PixelLoss
from jaxseg.ops.pool import adaptive_avg_pool
from jaxseg.ops.resize import resize


class PyramidPooling(nn.Module):
    """[B,h,w,C] -> [B,h,w,C + features * len(bins)]: x, then the mean of each part of the scene.

    Section 3.2, Fig. 3c.
    """

    bins: tuple[int, ...]
    features: int
    align_corners: bool
    norm: Norm
    norm_single: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        branches = [x]
        for bins in self.bins:
            norm = self.norm if self.norm_single or bins > 1 else Norm(kind="none")
            y = adaptive_avg_pool(x, bins)
            y = ConvNorm(self.features, 1, norm=norm, name=f"pool{bins}")(y, train)
            branches.append(resize(y, x.shape[1:3], self.align_corners))
        return jnp.concatenate(branches, axis=-1)


class Head(nn.Module):
    """3x3 convolutions, dropout, classifier: [B,h,w,C] -> logits [B,h,w,K]. The auxiliary head."""

    num_classes: int
    features: int
    norm: Norm
    convs: int = 1
    concat_input: bool = False  # a last 3x3 convolution sees the input beside the features
    dropout: float = 0.1
    channel_dropout: bool = False
    rate: int = 1  # of the convolutions before that last one

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        before = x
        for i in range(1, self.convs + 1):
            x = ConvNorm(self.features, 3, rate=self.rate, norm=self.norm, name=f"conv{i}")(
                x, train
            )
        if self.concat_input:
            x = jnp.concatenate([before, x], axis=-1)
            x = ConvNorm(self.features, 3, norm=self.norm, name="fuse")(x, train)
        x = dropout(self.dropout, x, train, self.channel_dropout)
        return classifier(self.num_classes)(x)


class Model(nn.Module):
    """image [B,H,W,C] -> logits [B,H/os,W/os,K] and aux_logits of an auxiliary head."""

    num_classes: int
    backbone: nn.Module
    bins: tuple[int, ...] = (1, 2, 3, 6)  # section 3.2
    pooled: int = 0  # channels of each pooled map; 0 = section 3.2's, a quarter for four bins
    features: int = 512  # channels of the convolution after them; the authors' code
    dropout: float = 0.1  # the authors' code
    aux: int = 256  # channels of the auxiliary head; 0 = none
    aux_on: str = "c4"  # Fig. 4
    aux_dropout: float = 0.1
    align_corners: bool = True  # the authors' code
    fit_corners: bool = True  # where align_corners, on sides of os n + 1; smp: on multiples of os
    source: str = "c5"  # the level that is pooled; smp takes c3
    kernel: int = 3  # of the convolution after the pyramid; smp's is 1
    classifier_kernel: int = 1  # smp's is 3
    norm_single: bool = True  # norm after the pool of the whole scene; smp has none there
    channel_dropout: bool = False  # drop whole channels: MMSegmentation, smp
    norm: Norm = Norm()

    @property
    def output_stride(self) -> int:
        """That of the level which is pooled."""
        strides = {f"c{i}": 2**i for i in range(1, 6)}
        strides |= getattr(self.backbone, "block_strides", {})
        most = self.backbone.output_stride
        return min(most, strides.get(self.source, most))

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> dict[str, jax.Array]:
        """image [B,H,W,C] -> logits and, with an auxiliary head, aux_logits [B,H/os,W/os,K]."""
        self.check()
        levels = self.backbone(image, train)
        x = levels[level(self.source, levels)]
        pooled = self.pooled or x.shape[-1] // len(self.bins)
        pyramid = partial(PyramidPooling, self.bins, pooled, self.align_corners, self.norm)
        x = pyramid(self.norm_single, name="pyramid")(x, train)
        x = ConvNorm(self.features, self.kernel, norm=self.norm, name="fuse")(x, train)
        x = dropout(self.dropout, x, train, self.channel_dropout)
        logits = classifier(self.num_classes, self.classifier_kernel)(x)
        return {"logits": logits, **auxiliary(self, levels, train)}

    def check(self) -> None:
        """Raises InputError for bins that divide no scene."""
        some = self.bins and len(set(self.bins)) == len(self.bins)
        if not some or not all(type(n) is int and n > 0 for n in self.bins):
            raise InputError(
                f"model.bins is {self.bins}: needs different numbers of parts, such as (1, 2, 3, 6)"
            )

    def fit(self, size: tuple[int, int]) -> tuple[int, int]:
        """The input size (H, W) that labels an image of `size` without moving it."""
        return fit(size, self)

    def check_crop(self, size: tuple[int, int]) -> None:
        """Raises InputError for a training crop (H, W) whose labels the logits would not meet."""
        check_crop(size, self)


def auxiliary(model: nn.Module, levels: dict[str, jax.Array], train: bool) -> dict[str, jax.Array]:
    """aux_logits [B,h,w,K] of the auxiliary head on the level `model.aux_on`; {} without a head.

    Call it inside the model, whose fields aux, aux_on, aux_dropout and channel_dropout it reads.
    """
    if not model.aux:
        return {}
    head = Head(
        *(model.num_classes, model.aux, model.norm),
        dropout=model.aux_dropout,
        channel_dropout=model.channel_dropout,
        name="aux",
    )
    return {"aux_logits": head(levels[level(model.aux_on, levels)], train)}


def level(name: str, levels: dict[str, jax.Array]) -> str:
    """`name` where it is a level of a backbone, such as "c4". Raises InputError otherwise."""
    if name not in levels:
        raise unknown("level of the backbone", name, levels)
    return name


def fit(size: tuple[int, int], model: nn.Module) -> tuple[int, int]:
    """The size that an image of `size` is enlarged to, by mirroring, before `model` sees it.

    Bilinear interpolation with aligned corners stretches the scores between the image's corners,
    and scores stand at every output_stride-th pixel: only on sides of output_stride n + 1 do they
    stay where they belong (512 columns at stride 16: up to 15 pixels off). Otherwise `size`.
    """
    corners = model.align_corners and model.fit_corners
    return deeplabv1.fit(size, model.output_stride) if corners else tuple(size)


def check_crop(size: tuple[int, int], model: nn.Module) -> None:
    """Raises InputError for a crop whose corners have no logits, or no multiple of the stride.

    With aligned corners, sides of output_stride n + 1; multiples of it otherwise, and where
    `model.fit_corners` is off.
    """
    stride, rest = model.output_stride, int(model.align_corners and model.fit_corners)
    if any(n % stride != rest for n in size):
        fitting = tuple(max(1, round((n - rest) / stride)) * stride + rest for n in size)
        rule = f"{stride}n + 1" if rest else f"multiples of {stride}"
        raise InputError(
            f"crop {tuple(size)} must have sides of {rule} for output stride {stride} with "
            f"align_corners={model.align_corners}: use {fitting}"
        )


def loss(
    outputs: dict[str, jax.Array],
    batch: dict[str, jax.Array],
    *,
    align_corners: bool,
    aux_weight: float = 0.4,  # section 3.3, Table 2
    pixel: PixelLoss = PixelLoss(),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The pixel loss at full size, of the logits and, weighted, of the auxiliary ones."""
    label = batch["label"]
    value = pixel(outputs["logits"], label, align_corners=align_corners)
    logs = {"loss": value}
    if "aux_logits" in outputs:
        aux = pixel(outputs["aux_logits"], label, align_corners=align_corners)
        logs = {"loss": value + aux_weight * aux, "main_loss": value, "aux_loss": aux}
    return logs["loss"], logs


def predict(
    outputs: dict[str, jax.Array], image: jax.Array, *, align_corners: bool
) -> dict[str, jax.Array]:
    """semantic [B,H,W] int32 and logits [B,H,W,K] float32, at the size of image [B,H,W,C]."""
    logits = upsample(outputs["logits"], image.shape[1:3], align_corners)
    return {"semantic": jnp.argmax(logits, axis=-1).astype(jnp.int32), "logits": logits}


def upsample(logits: jax.Array, size: tuple[int, int], align_corners: bool) -> jax.Array:
    """Logits [B,h,w,K] -> [B,H,W,K] float32, bilinear."""
    return resize(logits.astype(jnp.float32), size, align_corners)
