"""ResNet: Deep Residual Learning for Image Recognition. He, Zhang, Ren, Sun. CVPR 2016,
arXiv:1512.03385; made atrous as in DeepLab v3 (Chen et al. 2017, arXiv:1706.05587, section 3.1).

image [B,H,W,C] -> c1 [B,H/2,W/2,64 or 128], c2 [B,H/4,W/4,256], c3 (stride 8, 512),
c4 (stride 16, 1024), c5 (stride 32, 2048); a quarter of these channels from c2 on for depths 18 and
34. Past `output_stride`, stride turns into dilation.

Differs from the paper: the stride of a bottleneck sits in its 3x3 convolution (as in torch) unless
`stride_in_1x1`; the classifier is left out.
"""

from functools import partial

import flax.linen as nn
import jax

from jaxseg.backbones.layers import ConvNorm, Norm, stage_strides
from jaxseg.errors import unknown
from jaxseg.ops.pool import max_pool

BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
# Widths of three 3x3 convolutions; None: one 7x7 convolution.
STEMS = {
    "7x7": None,
    "deep": (64, 64, 128),
    "v1c": (32, 32, 64),
}
CHOICES = {"depth": BLOCKS, "stem": STEMS, "output_stride": (4, 8, 16, 32)}


class Basic(nn.Module):
    """Two 3x3 convolutions around an identity. Fig. 5 left."""

    features: int
    stride: int
    rate: int
    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(ConvNorm, norm=self.norm)
        y = conv(self.features, 3, self.stride, self.rate, name="conv1")(x, train)
        y = conv(self.features, 3, rate=self.rate, relu=False, name="conv2")(y, train)
        if x.shape != y.shape:
            x = conv(self.features, 1, self.stride, relu=False, name="shortcut")(x, train)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1 down to features / 4, 3x3, 1x1 up, around an identity. Fig. 5 right."""

    features: int
    stride: int
    rate: int
    norm: Norm
    stride_in_1x1: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(ConvNorm, norm=self.norm)
        first, second = (self.stride, 1) if self.stride_in_1x1 else (1, self.stride)
        y = conv(self.features // 4, 1, first, name="conv1")(x, train)
        y = conv(self.features // 4, 3, second, self.rate, name="conv2")(y, train)
        y = conv(self.features, 1, relu=False, name="conv3")(y, train)
        if x.shape != y.shape:
            x = conv(self.features, 1, self.stride, relu=False, name="shortcut")(x, train)
        return nn.relu(x + y)


class Backbone(nn.Module):
    depth: int = 50
    stem: str = "7x7"  # "deep" = 3x3 of 64, 64, 128 (PSPNet, TF DeepLab); "v1c" = 32, 32, 64
    output_stride: int = 32
    multi_grid: tuple[int, ...] = (1, 1, 1)  # DeepLab v3, section 3.1: factors of conv5's rates
    stride_in_1x1: bool = False  # the MSRA weights' style
    norm: Norm = Norm()

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> dict[str, jax.Array]:
        for key, valid in CHOICES.items():
            if getattr(self, key) not in valid:
                raise unknown(f"backbone.{key}", str(getattr(self, key)), map(str, valid))
        conv = partial(ConvNorm, norm=self.norm)
        if STEMS[self.stem] is None:
            x = conv(64, 7, 2, name="stem")(image, train)
        else:
            x = image
            for i, features in enumerate(STEMS[self.stem], start=1):
                x = conv(features, 3, 2 if i == 1 else 1, name=f"stem{i}")(x, train)
        outputs = {"c1": x}
        x = max_pool(x, window=3, stride=2, padding=1)

        plan = stage_strides((2, 2, 1, 2, 2, 2), self.output_stride)[2:]
        for stage, (blocks, (stride, rate)) in enumerate(
            zip(BLOCKS[self.depth], plan, strict=True), 2
        ):
            for block in range(blocks):
                grid = self.multi_grid[block % len(self.multi_grid)] if stage == 5 else 1
                unit = (
                    Basic
                    if self.depth < 50
                    else partial(Bottleneck, stride_in_1x1=self.stride_in_1x1)
                )
                features = 2 ** (stage + (4 if self.depth < 50 else 6))
                x = unit(
                    features,
                    stride if block == 0 else 1,
                    rate * grid,
                    self.norm,
                    name=f"conv{stage}_{block + 1}",
                )(x, train)
            outputs[f"c{stage}"] = x
        return outputs


VARIANTS = {f"resnet{depth}": partial(Backbone, depth=depth) for depth in BLOCKS}
