"""DeepLab v3: Rethinking Atrous Convolution for Semantic Image Segmentation. Chen, Papandreou,
Schroff, Adam. 2017, arXiv:1706.05587.

image [B,H,W,C] -> atrous backbone, c5 at `output_stride` -> ASPP -> logits [B,H/os,W/os,K]. Atrous
spatial pyramid pooling looks at c5 through a 1x1 convolution, three 3x3 ones of growing rate and
the image's mean, side by side (Fig. 5).

Differs from the paper: nothing known.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.backbones.layers import ConvNorm, Norm, classifier
from jaxseg.errors import InputError
from jaxseg.ops.losses import cross_entropy
from jaxseg.ops.resize import resize


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling with image-level features. Section 3.3, Fig. 5."""

    rates: tuple[int, ...]  # at output stride 16
    output_stride: int
    dropout: float
    norm: Norm
    features: int = 256

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(ConvNorm, norm=self.norm)
        branches = [conv(self.features, 1, name="conv1x1")(x, train)]
        for i, rate in enumerate(self.rates, start=1):
            rate = max(1, rate * 16 // self.output_stride)  # section 4: doubled at output stride 8
            branches.append(conv(self.features, 3, rate=rate, name=f"atrous{i}")(x, train))
        mean = jnp.mean(x, axis=(1, 2), keepdims=True)
        mean = conv(self.features, 1, name="image_pooling")(mean, train)
        branches.append(jnp.broadcast_to(mean, branches[0].shape))
        x = conv(self.features, 1, name="project")(jnp.concatenate(branches, axis=-1), train)
        return nn.Dropout(self.dropout, deterministic=not train)(x)


class Model(nn.Module):
    num_classes: int
    backbone: nn.Module
    rates: tuple[int, ...] = (6, 12, 18)  # section 3.3, at output stride 16
    dropout: float = 0.1  # not in the paper; the authors' code keeps 0.9
    align_corners: bool = (
        True  # the authors' code: sides of 16n + 1 map grid points onto each other
    )
    norm: Norm = Norm()

    @property
    def output_stride(self) -> int:
        return self.backbone.output_stride

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> dict[str, jax.Array]:
        """image [B,H,W,C] -> logits [B,H/os,W/os,K]."""
        c5 = self.backbone(image, train)["c5"]
        x = ASPP(self.rates, self.output_stride, self.dropout, self.norm, name="aspp")(c5, train)
        return {"logits": classifier(self.num_classes)(x)}

    def check_crop(self, size: tuple[int, int]) -> None:
        check_crop(size, self.output_stride, self.align_corners)


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
    class_weights: tuple = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross entropy at full size: the logits are upsampled, not the truth reduced. Section 4.1."""
    logits = upsample(outputs["logits"], batch["label"].shape[1:], align_corners)
    value = cross_entropy(logits, batch["label"], class_weights=class_weights)
    return value, {"loss": value}


def predict(
    outputs: dict[str, jax.Array], image: jax.Array, *, align_corners: bool
) -> dict[str, jax.Array]:
    """semantic [B,H,W] int32 and logits [B,H,W,K] float32, at the size of image [B,H,W,C]."""
    logits = upsample(outputs["logits"], image.shape[1:3], align_corners)
    return {"semantic": jnp.argmax(logits, axis=-1).astype(jnp.int32), "logits": logits}


def upsample(logits: jax.Array, size: tuple[int, int], align_corners: bool) -> jax.Array:
    """Logits [B,h,w,K] -> [B,H,W,K] float32, bilinear."""
    return resize(logits.astype(jnp.float32), size, align_corners)
