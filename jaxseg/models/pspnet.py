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

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        before = x
        for i in range(1, self.convs + 1):
            x = ConvNorm(self.features, 3, norm=self.norm, name=f"conv{i}")(x, train)
        if self.concat_input:
            x = jnp.concatenate([before, x], axis=-1)
            x = ConvNorm(self.features, 3, norm=self.norm, name="fuse")(x, train)
        x = dropout(self.dropout, x, train, self.channel_dropout)
        return classifier(self.num_classes)(x)


class Model(nn.Module):
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
    source: str = "c5"  # the level that is pooled; smp takes c3
    kernel: int = 3  # of the convolution after the pyramid; smp's is 1
    classifier_kernel: int = 1  # smp's is 3
    norm_single: bool = True  # norm after the pool of the whole scene; smp has none there
    channel_dropout: bool = False  # drop whole channels: MMSegmentation, smp
    norm: Norm = Norm()

    @property
    def output_stride(self) -> int:
        return min(self.backbone.output_stride, 2 ** int(self.source[1:]))

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> dict[str, jax.Array]:
        """image [B,H,W,C] -> logits and, with an auxiliary head, aux_logits [B,H/os,W/os,K]."""
        levels = self.backbone(image, train)
        x = levels[level(self.source, levels)]
        pooled = self.pooled or x.shape[-1] // len(self.bins)
        pyramid = partial(PyramidPooling, self.bins, pooled, self.align_corners, self.norm)
        x = pyramid(self.norm_single, name="pyramid")(x, train)
        x = ConvNorm(self.features, self.kernel, norm=self.norm, name="fuse")(x, train)
        x = dropout(self.dropout, x, train, self.channel_dropout)
        outputs = {"logits": classifier(self.num_classes, self.classifier_kernel)(x)}
        if self.aux:
            head = Head(
                *(self.num_classes, self.aux, self.norm),
                dropout=self.aux_dropout,
                channel_dropout=self.channel_dropout,
                name="aux",
            )
            outputs["aux_logits"] = head(levels[level(self.aux_on, levels)], train)
        return outputs

    def check_crop(self, size: tuple[int, int]) -> None:
        check_crop(size, self.output_stride, self.align_corners)


def level(name: str, levels: dict[str, jax.Array]) -> str:
    """`name` where it is a level of a backbone, such as "c4". Raises InputError otherwise."""
    if name not in levels:
        raise unknown("level of the backbone", name, levels)
    return name


def check_crop(size: tuple[int, int], stride: int, align_corners: bool) -> None:
    """A crop must put the corners of the logits where `align_corners` expects them."""
    rest = 1 if align_corners else 0
    if any(n % stride != rest for n in size):
        fitting = tuple(max(1, round((n - rest) / stride)) * stride + rest for n in size)
        rule = f"{stride}n + 1" if rest else f"multiples of {stride}"
        raise InputError(
            f"crop {tuple(size)} must have sides of {rule} for output stride {stride} with "
            f"align_corners={align_corners}: use {fitting}"
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
    value = pixel(upsample(outputs["logits"], label.shape[1:], align_corners), label)
    logs = {"loss": value}
    if "aux_logits" in outputs:
        aux = pixel(upsample(outputs["aux_logits"], label.shape[1:], align_corners), label)
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
