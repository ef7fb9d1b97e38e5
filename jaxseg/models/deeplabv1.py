"""DeepLab v1: Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs.
Chen, Papandreou, Kokkinos, Murphy, Yuille. ICLR 2015, arXiv:1412.7062.

VGG-16 keeps stride 8: its last two poolings do not subsample, and what follows is dilated, the last
three convolutions by 2 and the first fully connected layer by 4 or, of 3x3 taps, by 12 (LargeFOV):

    image [B,H,W,C] -> c5 [B,H/8,W/8,512] -> fc6 3x3, rate 12 -> fc7 -> logits [B,H/8,W/8,K]

With `multi_scale`, two convolutions on the image and on each of the first four poolings add their
features to fc7's (MSc, section 4.3). The loss compares with every eighth label (section 3.1);
bilinear interpolation gives full size at test time. Both need sides of 8n + 1.

Differs from the paper: the loss is a mean, as in the authors' code; the CRF is not in the network.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.backbones.layers import Conv, classifier
from jaxseg.backbones.vgg import fully_connected
from jaxseg.errors import InputError
from jaxseg.ops.losses import PixelLoss
from jaxseg.ops.pool import avg_pool
from jaxseg.ops.resize import resize


class Model(nn.Module):
    """image [B,H,W,C] -> logits [B,H/8,W/8,K]."""

    num_classes: int
    backbone: nn.Module
    kernel: int = 3  # of fc6, Table 2: LargeFOV; or 7, 4
    rate: int = 12  # of fc6, Table 2; 4 with kernel 7, 4 or 8 with kernel 4
    features: int = 1024  # channels of fc6 and fc7, Table 2: LargeFOV; the others have 4096
    average: bool = True  # 3x3 average pooling before fc6: the authors' code, LargeFOV
    multi_scale: int = 0  # channels from the image and each of c1 to c4; section 4.3: 128
    dropout: float = 0.5  # the authors' code, as in VGG-16

    @property
    def output_stride(self) -> int:
        return self.backbone.output_stride

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> dict[str, jax.Array]:
        """image [B,H,W,C] -> logits [B,H/8,W/8,K]."""
        levels = self.backbone(image, train)
        x = levels["c5"]
        if self.average:
            x = avg_pool(x, 3, 1, padding=1)
        size = (self.features, self.kernel, self.rate)
        features = [fully_connected(x, train, *size, drop=self.dropout)]
        if self.multi_scale:
            finer = {"image": image, **{f"c{i}": levels[f"c{i}"] for i in range(1, 5)}}
            for i, (name, y) in enumerate(finer.items()):
                stride = max(1, self.output_stride // 2**i)
                y = nn.relu(Conv(self.multi_scale, 3, stride, name=f"{name}_1")(y))
                features.append(nn.relu(Conv(self.multi_scale, 1, name=f"{name}_2")(y)))
        x = jnp.concatenate(features, axis=-1)
        return {"logits": classifier(self.num_classes, name="fc8")(x)}

    def fit(self, size: tuple[int, int]) -> tuple[int, int]:
        """The input size (H, W) that labels an image of `size` without moving it."""
        return fit(size, self.output_stride)

    def check_crop(self, size: tuple[int, int]) -> None:
        """Raises InputError for a training crop (H, W) whose corners have no scores."""
        check_crop(size, self.output_stride)


def fit(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """The smallest sides of stride * n + 1 that cover `size`: the places of the scores, every
    stride-th pixel, then include the corners."""
    return tuple(-(-(n - 1) // stride) * stride + 1 for n in size)


def check_crop(size: tuple[int, int], stride: int) -> None:
    """Raises InputError for a crop whose corners have no scores."""
    if fit(size, stride) != tuple(size):
        raise InputError(
            f"crop {tuple(size)} must have sides of {stride}n + 1, so that scores stand at its "
            f"corners: use {fit(size, stride)}"
        )


def loss(
    outputs: dict[str, jax.Array],
    batch: dict[str, jax.Array],
    *,
    pixel: PixelLoss = PixelLoss(),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The pixel loss at the places of the logits. Section 3.1."""
    logits = outputs["logits"]
    value = pixel(logits, subsample(batch["label"], logits.shape[1:3]))
    return value, {"loss": value}


def subsample(label: jax.Array, size: tuple[int, int]) -> jax.Array:
    """The labels [B,H,W] under a map of `size` whose corners are those of the image: [B,*size].

    Every stride-th where H = stride (h - 1) + 1; the nearest to h places from edge to edge else.
    """
    rows, cols = (
        np.linspace(0, n - 1, m).round().astype(int)
        for n, m in zip(label.shape[1:], size, strict=True)
    )
    return label[:, rows][:, :, cols]


def predict(outputs: dict[str, jax.Array], image: jax.Array) -> dict[str, jax.Array]:
    """semantic [B,H,W] int32 and logits [B,H,W,K] float32, at the size of image [B,H,W,C]."""
    logits = resize(outputs["logits"].astype(jnp.float32), image.shape[1:3], align_corners=True)
    return {"semantic": jnp.argmax(logits, axis=-1).astype(jnp.int32), "logits": logits}
