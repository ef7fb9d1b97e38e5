"""ResNet: Deep Residual Learning for Image Recognition. He, Zhang, Ren, Sun. CVPR 2016,
arXiv:1512.03385; made atrous as in DeepLab v3 (Chen et al. 2017, arXiv:1706.05587, section 3.1).

image [B,H,W,C] -> c1 [B,H/2,W/2,64 or 128], c2 [B,H/4,W/4,256], c3 (stride 8, 512),
c4 (stride 16, 1024), c5 (stride 32, 2048); a quarter of these channels from c2 on for depths 18 and
34. Past `output_stride`, stride turns into dilation.

The released networks differ where a stage's stride sits (`strides`), in the rate of the first unit
after a stride became dilation (`contract`), in what multi-grid means (`absolute_grid`) and in the
stem; the parameter count does not tell them apart, but their weights do not fit each other.

Hybrid dilated convolution (Wang et al. 2018, arXiv:1702.08502, section 3.2): where all units of a
stage have one rate, a pixel is never seen by its neighbours, and the output shows a grid. `hybrid`
gives units rates without a common factor, the paper's ((1, 2, 5, 9), (5, 9, 17)) at stride 8.

Differs from the paper: the classifier is left out.
"""

from functools import partial

import flax.linen as nn
import jax

from jaxseg.backbones.layers import ConvNorm, Norm, check_fields, relu_sum, stage_strides
from jaxseg.errors import InputError
from jaxseg.ops.pool import avg_pool, max_pool

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
    "deep": (64, 64, 128),  # PSPNet, the TensorFlow DeepLab
    "v1c": (32, 32, 64),  # He et al. 2019, "Bag of Tricks", arXiv:1812.01187, Fig. 2b
    "v1d": (32, 32, 64),  # Fig. 2c: the shortcut's stride is an average pooling too
}
STRIDES = (
    "pytorch",  # in the 3x3 convolution of a stage's first unit
    "caffe",  # in its first 1x1 convolution: the MSRA weights, PSPNet, DeepLab v2
    "tensorflow",  # in the 3x3 convolution of the last unit of the stage before: DeepLab v3, v3+
)
CHOICES = {
    "depth": BLOCKS,
    "stem": STEMS,
    "strides": STRIDES,
    "output_stride": (4, 8, 16, 32),
}


class Basic(nn.Module):
    """Two 3x3 convolutions around an identity. Fig. 5 left."""

    features: int
    stride: int
    rate: int
    norm: Norm
    avg_down: bool = False
    second_rate: bool = True  # the second convolution is dilated too

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(ConvNorm, norm=self.norm)
        y = conv(self.features, 3, self.stride, self.rate, name="conv1")(x, train)
        rate = self.rate if self.second_rate else 1
        y = conv(self.features, 3, rate=rate, act=None, name="conv2")(y, train)
        x = shortcut(x, y.shape, self.stride, self.avg_down, conv, train)
        return relu_sum(x, y) if train else nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1 down to features / 4, 3x3, 1x1 up, around an identity. Fig. 5 right."""

    features: int
    stride: int
    rate: int
    norm: Norm
    strides: str = "pytorch"
    avg_down: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(ConvNorm, norm=self.norm)
        first, second = (self.stride, 1) if self.strides == "caffe" else (1, self.stride)
        y = conv(self.features // 4, 1, first, name="conv1")(x, train)
        y = conv(self.features // 4, 3, second, self.rate, name="conv2")(y, train)
        y = conv(self.features, 1, act=None, name="conv3")(y, train)
        x = shortcut(x, y.shape, self.stride, self.avg_down, conv, train)
        return relu_sum(x, y) if train else nn.relu(x + y)


def shortcut(
    x: jax.Array, shape: tuple[int, ...], stride: int, avg_down: bool, conv: partial, train: bool
) -> jax.Array:
    """x itself, subsampled where it must be, projected where the channels differ. Section 3.3."""
    if x.shape[-1] == shape[-1]:
        return x[:, ::stride, ::stride]
    if avg_down and stride > 1:
        x, stride = avg_pool(x, stride, stride, ceil=True), 1
    return conv(shape[-1], 1, stride, act=None, name="shortcut")(x, train)


class Stage(nn.Module):
    """Residual units of one width, each with its (stride, rate).

    [B,h,w,C] -> (its output, the last map before its last unit's stride: the same where that is 1).
    """

    unit: partial
    features: int
    plan: tuple[tuple[int, int], ...]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        for i, (stride, rate) in enumerate(self.plan, start=1):
            before = x
            x = self.unit(self.features, stride, rate, name=f"unit{i}")(x, train)
        return x, before if stride > 1 and len(self.plan) > 1 else x


class Backbone(nn.Module):
    depth: int = 50
    stem: str = "7x7"  # or "deep", "v1c", "v1d"
    output_stride: int = 32
    strides: str = "pytorch"  # or "caffe", "tensorflow": which unit of a stage takes its stride
    contract: bool = False  # a dilated stage's first unit keeps the rate of the stage before
    multi_grid: tuple[int, ...] = (1, 1, 1)  # DeepLab v3, section 3.1: factors of conv5's rates
    absolute_grid: bool = False  # multi_grid's rates replace conv5's (MMSegmentation)
    hybrid: tuple[tuple[int, ...], ...] = ()  # rates of conv4's and of conv5's units, in turn
    second_rate: bool = True  # depths 18, 34: both convolutions dilate; MMSegmentation: the first
    ceil_mode: bool = False  # the max-pooling rounds its size up, as in Caffe
    norm: Norm = Norm()

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> dict[str, jax.Array]:
        """image [B,H,W,C] -> c1 [B,H/2,W/2,..] to c5 [B,H/os,W/os,..], channels as above."""
        check_fields(self, CHOICES, "backbone")
        if not self.multi_grid:
            raise InputError(
                "backbone.multi_grid is (): needs the factors of conv5's rates, such as (1, 2, 4)"
            )
        if self.hybrid and (len(self.hybrid) != 2 or not all(self.hybrid)):
            raise InputError(
                f"backbone.hybrid is {self.hybrid}: needs the rates of conv4 and of conv5, such as "
                "((1, 2, 5, 9), (5, 9, 17))"
            )
        if STEMS[self.stem] is None:
            x = ConvNorm(64, 7, 2, norm=self.norm, name="stem")(image, train)
        else:
            x = image
            for i, features in enumerate(STEMS[self.stem], start=1):
                stride = 2 if i == 1 else 1
                x = ConvNorm(features, 3, stride, norm=self.norm, name=f"stem{i}")(x, train)
        outputs = {"c1": x}
        x = max_pool(x, window=3, stride=2, padding=1, ceil=self.ceil_mode)
        for stage, plan in enumerate(self.plans(), start=2):
            features = 2 ** (stage + (4 if self.depth < 50 else 6))
            x, outputs[f"c{stage}"] = Stage(self.unit(), features, plan, name=f"conv{stage}")(
                x, train
            )
        return outputs

    def unit(self) -> partial:
        """The residual unit of this depth, to be called with its features, stride and rate."""
        style = {"norm": self.norm, "avg_down": self.stem == "v1d"}
        if self.depth < 50:
            return partial(Basic, second_rate=self.second_rate, **style)
        return partial(Bottleneck, strides=self.strides, **style)

    def plans(self) -> list[tuple[tuple[int, int], ...]]:
        """(stride, rate) of every unit of conv2 .. conv5."""
        if self.strides == "tensorflow":
            ends = stage_strides((2, 2, 2, 2, 2, 1), self.output_stride)
            strides = [stride for stride, _ in ends[2:]]
            rates = [rate for _, rate in ends[1:5]]  # a stride takes effect after its unit
        else:
            starts = stage_strides((2, 2, 1, 2, 2, 2), self.output_stride)
            strides, rates = zip(*starts[2:], strict=True)
        plans = []
        for stage, units in enumerate(BLOCKS[self.depth]):
            plan = [(1, rates[stage])] * units
            if self.strides == "tensorflow":
                plan[-1] = (strides[stage], rates[stage])
            else:
                first = rates[max(stage - 1, 0)] if self.contract else rates[stage]
                plan[0] = (strides[stage], first)
            if stage == 3:
                plan = multiply(plan, self.multi_grid, self.absolute_grid)
            if self.hybrid and stage >= 2:
                plan = multiply(plan, self.hybrid[stage - 2], absolute=True)
            plans.append(tuple(plan))
        return plans


def multiply(
    plan: list[tuple[int, int]], grid: tuple[int, ...], absolute: bool = False
) -> list[tuple[int, int]]:
    """Multi-grid: the rates of a stage's units times, or replaced by, those of `grid`."""
    grid = [grid[i % len(grid)] for i in range(len(plan))]
    return [(s, g if absolute else r * g) for (s, r), g in zip(plan, grid, strict=True)]


VARIANTS = {f"resnet{depth}": partial(Backbone, depth=depth) for depth in BLOCKS}
