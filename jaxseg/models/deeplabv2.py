"""DeepLab v2: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and
Fully Connected CRFs. Chen, Papandreou, Kokkinos, Murphy, Yuille. TPAMI 2018, arXiv:1606.00915.

Atrous spatial pyramid pooling: parallel convolutions of several rates score the last map, and their
scores are summed (Fig. 7). A ResNet goes through the network at three scales, and each place takes
the largest score of its class (section 4.1.2):

    image x 1, 3/4, 1/2 -> c5 [B,h,w,2048] -> 3x3 of rates 6, 12, 18, 24 -> sum -> resize -> maximum

On VGG-16 each branch has its own fc6, fc7 and scores, and the image one scale. Labels are
subsampled and scores interpolated as in DeepLab v1, at sides of 8n + 1.

Differs from the paper: the loss of a scale is at that scale's own resolution, as in the PyTorch
code that reproduces its results; the CRF is not in the network.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.backbones.layers import Conv
from jaxseg.backbones.vgg import fully_connected
from jaxseg.errors import InputError
from jaxseg.models import deeplabv1
from jaxseg.models.deeplabv1 import predict as predict
from jaxseg.models.deeplabv1 import subsample
from jaxseg.ops.losses import PixelLoss
from jaxseg.ops.resize import resize


class ASPP(nn.Module):
    """Scores of several fields of view, summed: [B,h,w,C] -> logits [B,h,w,K]. Fig. 7."""

    num_classes: int
    rates: tuple[int, ...]
    features: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        init = nn.initializers.normal(0.01)
        branches = []
        for i, rate in enumerate(self.rates, 1):
            y, kernel = x, 3
            if self.features:
                fields = (self.features, 3, rate)
                y = fully_connected(x, train, *fields, drop=self.dropout, branch=f"_{i}")
                kernel, rate = 1, 1
            score = Conv(self.num_classes, kernel, rate=rate, kernel_init=init, name=f"fc8_{i}")
            branches.append(score(y))
        return sum(branches)


class Model(nn.Module):
    """image [B,H,W,C] -> logits [B,H/8,W/8,K], the maximum of those of every scale, and these."""

    num_classes: int
    backbone: nn.Module
    rates: tuple[int, ...] = (6, 12, 18, 24)  # section 4.1.2, ASPP-L; ASPP-S: (2, 4, 8, 12)
    features: int = 0  # channels of each branch's fc6 and fc7: 1024 on VGG-16, none on ResNet
    scales: tuple[float, ...] = (1.0, 0.75, 0.5)  # section 4.1.2, on ResNet; 1 comes first
    dropout: float = 0.5  # after fc6 and fc7: the authors' code

    @property
    def output_stride(self) -> int:
        return self.backbone.output_stride

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> dict[str, jax.Array]:
        """image [B,H,W,C] -> logits [B,H/8,W/8,K]; with several scales also those of each, such as
        scale_0.75 [B,3H/32,3W/32,K]."""
        if not self.scales or self.scales[0] != 1:
            raise InputError(f"model.scales is {self.scales}: the first must be 1.0")
        aspp = ASPP(self.num_classes, self.rates, self.features, self.dropout, name="aspp")
        outputs = {}
        for scale in self.scales:
            # Corners stay corners: 321 -> 241 and 161.
            size = tuple(round((n - 1) * scale) + 1 for n in image.shape[1:3])
            scaled = resize(image, size, align_corners=True)
            outputs[f"scale_{scale}"] = aspp(self.backbone(scaled, train)["c5"], train)
        first, *others = outputs.values()
        fused = first
        for logits in others:
            fused = jnp.maximum(fused, resize(logits, first.shape[1:3], align_corners=True))
        return {"logits": fused, **(outputs if others else {})}

    def fit(self, size: tuple[int, int]) -> tuple[int, int]:
        """The input size (H, W) that labels an image of `size` without moving it."""
        return deeplabv1.fit(size, self.output_stride)

    def check_crop(self, size: tuple[int, int]) -> None:
        """Raises InputError for a training crop (H, W) whose corners have no scores."""
        deeplabv1.check_crop(size, self.output_stride)


def loss(
    outputs: dict[str, jax.Array],
    batch: dict[str, jax.Array],
    *,
    pixel: PixelLoss = PixelLoss(),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum of the pixel losses of every scale and of their maximum. Section 4.1.2."""
    logs = {
        f"{name}_loss": pixel(logits, subsample(batch["label"], logits.shape[1:3]))
        for name, logits in outputs.items()
    }
    total = sum(logs.values())
    return total, {"loss": total, **logs}
