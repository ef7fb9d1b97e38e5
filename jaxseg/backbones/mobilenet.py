"""MobileNetV2: Inverted Residuals and Linear Bottlenecks. Sandler, Howard, Zhu, Zhmoginov, Chen.
CVPR 2018, arXiv:1801.04381. MobileNetV3 (Large): Searching for MobileNetV3. Howard et al. ICCV
2019, arXiv:1905.02244.

image [B,H,W,C] -> c1 .. c5 at strides 2, 4, 8, 16, 32: 16, 24, 32, 96, 320 channels (V2), 16, 24,
40, 112, 960 (V3); and each block's own map, block1, block2, ... (torchvision's auxiliary head sits
on V3's block4). Past `output_stride`, stride turns into dilation; `contract` tells how: in
the TensorFlow DeepLab the block that loses its stride runs at the old rate, in torchvision, smp and
MMSegmentation at the new one.

Differs from the papers: the classifier is left out, and with it, unless `last` asks for it, V2's
1x1 convolution before it, as DeepLab v3+ does.
"""

import itertools
import operator
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.backbones.layers import (
    Activation,
    Conv,
    ConvNorm,
    Norm,
    check_fields,
    he_depthwise,
    stage_strides,
)


class Row(NamedTuple):
    """One inverted residual."""

    kernel: int
    expanded: int  # channels of the depthwise convolution
    features: int
    stride: int = 1
    squeeze: bool = False  # squeeze-and-excitation
    act: Activation = jax.nn.relu6


def _v2() -> tuple[Row, ...]:
    """Table 2: expansion, channels, repeats, stride of the first."""
    table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1))
    rows, before = [], 32
    for expansion, features, repeats, stride in (*table, (6, 160, 3, 2), (6, 320, 1, 1)):
        for i in range(repeats):
            rows.append(Row(3, expansion * before, features, stride if i == 0 else 1))
            before = features
    return tuple(rows)


def _v3_large() -> tuple[Row, ...]:
    """Table 1."""
    relu, swish = jax.nn.relu, jax.nn.hard_swish
    return (
        Row(3, 16, 16, 1, False, relu),
        Row(3, 64, 24, 2, False, relu),
        Row(3, 72, 24, 1, False, relu),
        Row(5, 72, 40, 2, True, relu),
        Row(5, 120, 40, 1, True, relu),
        Row(5, 120, 40, 1, True, relu),
        Row(3, 240, 80, 2, False, swish),
        Row(3, 200, 80, 1, False, swish),
        Row(3, 184, 80, 1, False, swish),
        Row(3, 184, 80, 1, False, swish),
        Row(3, 480, 112, 1, True, swish),
        Row(3, 672, 112, 1, True, swish),
        Row(5, 672, 160, 2, True, swish),
        Row(5, 960, 160, 1, True, swish),
        Row(5, 960, 160, 1, True, swish),
    )


# Rows, channels of the stem, its activation.
NETWORKS = {
    "v2": (_v2(), 32, jax.nn.relu6),
    "v3_large": (_v3_large(), 16, jax.nn.hard_swish),
}
CHOICES = {"version": NETWORKS, "output_stride": (2, 4, 8, 16, 32)}


class InvertedResidual(nn.Module):
    """1x1 up, depthwise, 1x1 down without activation; an identity where the shape allows."""

    row: Row
    stride: int
    rate: int
    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        row, y = self.row, x
        if row.expanded != x.shape[-1]:
            y = ConvNorm(row.expanded, 1, norm=self.norm, act=row.act, name="expand")(y, train)
        depthwise = Conv(
            *(0, row.kernel, self.stride, self.rate),
            use_bias=False,
            kernel_init=he_depthwise,
            name="depthwise",
        )
        y = row.act(self.norm(depthwise(y), train))
        if row.squeeze:
            y = SqueezeExcite(name="squeeze")(y)
        y = ConvNorm(row.features, 1, norm=self.norm, act=None, name="project")(y, train)
        return x + y if x.shape == y.shape else y


class SqueezeExcite(nn.Module):
    """Scales every channel by what the mean of all says: [B,h,w,C]. Hu et al., CVPR 2018."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.mean(x, axis=(1, 2), keepdims=True)
        y = nn.relu(Conv(_divisible(x.shape[-1] / 4), 1, name="reduce")(y))
        return x * jax.nn.hard_sigmoid(Conv(x.shape[-1], 1, name="expand")(y))


def _divisible(channels: float, by: int = 8) -> int:
    """The nearest multiple of `by` that is not more than a tenth smaller; the authors' code."""
    near = max(by, int(channels + by / 2) // by * by)
    return near + by if near < 0.9 * channels else near


class Backbone(nn.Module):
    version: str = "v2"
    output_stride: int = 32
    contract: bool = False  # the block that loses its stride keeps the rate before: TensorFlow's
    last: int = 0  # channels of the last 1x1 convolution: V3 has 960; V2, for ImageNet, 1280
    norm: Norm = Norm()

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> dict[str, jax.Array]:
        """image [B,H,W,C] -> c1 [B,H/2,W/2,16] to c5 [B,H/os,W/os,..], and block1, block2, ..."""
        check_fields(self, CHOICES, "backbone")
        rows, stem, act = NETWORKS[self.version]
        x = ConvNorm(stem, 3, 2, norm=self.norm, act=act, name="stem")(image, train)
        outputs, level = {}, 1
        for i, (row, (stride, rate)) in enumerate(zip(rows, self.plan(), strict=True), start=1):
            level += row.stride > 1
            x = InvertedResidual(row, stride, rate, self.norm, name=f"block{i}")(x, train)
            outputs[f"c{level}"] = outputs[f"block{i}"] = x
        if self.last:
            x = ConvNorm(self.last, 1, norm=self.norm, act=act, name="last")(x, train)
            outputs["c5"] = x
        return outputs

    def plan(self) -> list[tuple[int, int]]:
        """(stride, rate) of every block."""
        rows, _, _ = NETWORKS[self.version]
        plan = stage_strides((2, *(row.stride for row in rows)), self.output_stride)
        if self.contract:  # a stride that is not taken dilates what comes after its block
            return [(stride, rate) for (stride, _), (_, rate) in zip(plan[1:], plan, strict=False)]
        return plan[1:]

    @property
    def block_strides(self) -> dict[str, int]:
        """The stride of every block's own map, such as {"block1": 2}."""
        taken = itertools.accumulate((s for s, _ in self.plan()), operator.mul, initial=2)
        return {f"block{i}": stride for i, stride in enumerate(taken) if i}


VARIANTS = {
    "mobilenetv2": Backbone,
    "mobilenetv3_large": partial(
        Backbone,
        version="v3_large",
        last=960,
        norm=Norm(momentum=0.99, epsilon=1e-3),  # torchvision's
    ),
}
