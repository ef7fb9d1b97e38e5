"""The blocks that every network is made of: convolution, norm, activation."""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax

from jaxseg.errors import unknown

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015, ReLU


@dataclasses.dataclass(frozen=True)
class Norm:
    """How a network normalises, handed down to all of its layers."""

    kind: str = "batch"  # or "none"
    momentum: float = 0.9  # share of the old running mean that stays: 1 - torch's momentum
    epsilon: float = 1e-5
    frozen: bool = False  # use the running statistics in training too

    def __post_init__(self):
        """Raises InputError for another kind."""
        if self.kind not in ("batch", "none"):
            raise unknown("kind of norm", self.kind, ("batch", "none"))

    def __call__(self, x: jax.Array, train: bool, name: str = "norm") -> jax.Array:
        """Batch norm over all but the last axis, over the global batch; call inside a module."""
        if self.kind == "none":
            return x
        use_running = self.frozen or not train
        return nn.BatchNorm(use_running, momentum=self.momentum, epsilon=self.epsilon, name=name)(x)


class ConvNorm(nn.Module):
    """Convolution, norm, ReLU: [B,h,w,C] -> [B,h/stride,w/stride,features].

    Padding is symmetric, rate * (kernel - 1) / 2, as in Caffe and torch; "VALID" pads nothing. The
    convolution has a bias only where no norm follows.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    rate: int = 1  # dilation
    norm: Norm = Norm()
    relu: bool = True
    padding: str = "same"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        pad = 0 if self.padding == "valid" else self.rate * (self.kernel - 1) // 2
        x = nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            strides=self.stride,
            padding=[(pad, pad)] * 2,
            kernel_dilation=self.rate,
            use_bias=self.norm.kind == "none",
            kernel_init=he_normal,
            name="conv",
        )(x)
        x = self.norm(x, train)
        return nn.relu(x) if self.relu else x


class UpConv(nn.Module):
    """Transposed convolution, kernel 2, stride 2: [B,h,w,C] -> [B,2h,2w,features].

    The windows do not overlap, so it is one matrix product and a reshape; unlike
    `lax.conv_transpose` its gradient is as fast, and rows may be sharded.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        init = nn.initializers.variance_scaling(2.0, "fan_in", "normal", in_axis=2, out_axis=3)
        kernel = self.param("kernel", init, (2, 2, c, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel, bias = (p.astype(x.dtype) for p in (kernel, bias))
        flat = x.reshape(-1, c) @ kernel.transpose(2, 0, 1, 3).reshape(c, -1)
        y = flat.reshape(b, h, w, 2, 2, self.features).transpose(0, 1, 3, 2, 4, 5)
        return y.reshape(b, 2 * h, 2 * w, self.features) + bias


def classifier(num_classes: int, name: str = "classifier") -> nn.Module:
    """The last 1x1 convolution, [B,h,w,C] -> logits [B,h,w,K].

    Its initial weights have variance 1 / C: much smaller ones start all classes at a saddle, where
    narrow networks learn foreground from background and then rest for hundreds of steps.
    """
    return nn.Conv(num_classes, (1, 1), kernel_init=nn.initializers.lecun_normal(), name=name)


def stage_strides(strides: Sequence[int], output_stride: int) -> list[tuple[int, int]]:
    """(stride, rate) of each stage: past `output_stride`, stride turns into dilation.

    DeepLab v3, section 3.1: a stage that would take the stride beyond the cap keeps stride 1, and
    it and all later ones are dilated by what was not taken.
    """
    taken, rate, plan = 1, 1, []
    for stride in strides:
        if taken * stride > output_stride:
            rate *= stride
            stride = 1
        taken *= stride
        plan.append((stride, rate))
    return plan
