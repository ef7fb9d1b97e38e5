"""VGG-16: Very Deep Convolutional Networks for Large-Scale Image Recognition. Simonyan, Zisserman.
ICLR 2015, arXiv:1409.1556; made atrous as in DeepLab v1 (Chen et al. 2015, arXiv:1412.7062).

image [B,H,W,C] -> c1 [B,H/2,W/2,64], c2 (stride 4, 128), c3 (stride 8, 256), c4 (stride 16, 512),
c5 (stride 32, 512): the poolings that end the five stages of 3x3 convolutions. Sizes are rounded
up, as in Caffe. Past `output_stride` a pooling is 3x3 with stride 1, and the convolutions after it
are dilated.

The layers have the names of the authors' Caffe model, conv1_1 to conv5_3; `fully_connected` adds
fc6 and fc7. With batch norm, convolutions keep their biases: so do the weights that libraries give.

Differs from the paper: the classifier is left out.
"""

from functools import partial

import flax.linen as nn
import jax

from jaxseg.backbones.layers import Conv, ConvNorm, Norm, check_fields, dropout, stage_strides
from jaxseg.ops.pool import max_pool

WIDTHS = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)  # Table 1, configuration D
CHOICES = {"output_stride": (2, 4, 8, 16, 32), "pool": (2, 3)}


class Backbone(nn.Module):
    widths: tuple[tuple[int, ...], ...] = WIDTHS
    output_stride: int = 32
    pool: int = 2  # window of the poolings with stride 2; DeepLab's is 3, padded by 1
    norm: Norm = Norm(kind="none")

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> dict[str, jax.Array]:
        """image [B,H,W,C] -> c1 [B,H/2,W/2,64] to c5 [B,H/os,W/os,512]."""
        check_fields(self, CHOICES, "backbone")
        conv = partial(ConvNorm, norm=self.norm, use_bias=True)
        x, rate, outputs = image, 1, {}
        plan = stage_strides((2,) * len(self.widths), self.output_stride)
        for stage, (widths, (stride, after)) in enumerate(zip(self.widths, plan, strict=True), 1):
            for i, width in enumerate(widths, 1):
                x = conv(width, 3, rate=rate, name=f"conv{stage}_{i}")(x, train)
            if stride == 1 or self.pool == 3:
                x = max_pool(x, 3, stride, padding=1)
            else:
                x = max_pool(x, 2, 2, ceil=True)
            outputs[f"c{stage}"], rate = x, after
        return outputs


def fully_connected(
    x: jax.Array,
    train: bool,
    features: int = 4096,
    kernel: int = 7,
    rate: int = 1,
    padding: str = "same",
    drop: float = 0.5,
    branch: str = "",
) -> jax.Array:
    """fc6 and fc7 as convolutions: [B,h,w,C] -> [B,h,w,features]; call inside a module.

    Long, Shelhamer, Darrell 2015, section 3.1. Each ends in a ReLU and dropout; `branch` is the end
    of their names.
    """
    for name, size, spread in (("fc6", kernel, rate), ("fc7", 1, 1)):
        x = Conv(features, size, rate=spread, padding=padding, name=f"{name}{branch}")(x)
        x = dropout(drop, nn.relu(x), train)
    return x


VARIANTS = {"vgg16": Backbone, "vgg16_bn": partial(Backbone, norm=Norm())}
