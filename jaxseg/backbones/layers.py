"""The blocks that every network is made of: convolution, norm, activation."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.errors import InputError, unknown
from jaxseg.ops import rows
from jaxseg.ops.conv import conv, depthwise
from jaxseg.ops.image import depth_to_space
from jaxseg.ops.norm import batch_norm

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015, ReLU
he_depthwise = nn.initializers.variance_scaling(2.0, "fan_in", "normal")  # of [k,k,1,C]: k * k
Activation = Callable[[jax.Array], jax.Array]
NORMS = ("batch", "group", "frozen", "none")


@dataclasses.dataclass(frozen=True)
class Norm:
    """How a network normalises, handed down to all of its layers."""

    # "group": Wu and He, ECCV 2018, arXiv:1803.08494. "frozen": batch norm's four, as constants.
    kind: str = "batch"  # or "group", "frozen", "none"
    momentum: float = 0.9  # share of the old running mean that stays: 1 - torch's momentum
    epsilon: float = 1e-5
    frozen: bool = False  # use the running statistics in training too
    groups: int = 32  # of kind "group", which has no running statistics

    def __post_init__(self):
        """Raises InputError for another kind, and without groups."""
        if self.kind not in NORMS:
            raise unknown("kind of norm", self.kind, NORMS)
        if self.groups < 1:
            raise InputError(f"norm.groups is {self.groups}: needs at least 1")

    def __call__(self, x: jax.Array, train: bool, name: str = "norm") -> jax.Array:
        """Normalises x [B,h,w,C]; call inside a module. Batch norm is over the global batch, group
        norm over each image's pixels and C / groups channels.

        Raises InputError, when traced, for channels that do not make whole groups.
        """
        if self.kind == "none":
            return x
        if self.kind == "group":
            if x.shape[-1] % self.groups:
                raise InputError(
                    f"norm.groups is {self.groups}, of {x.shape[-1]} channels: needs a divisor"
                )
            return nn.GroupNorm(self.groups, epsilon=self.epsilon, name=name)(x)
        if self.kind == "frozen":
            return FrozenNorm(self.epsilon, name=name)(x)
        use_running = self.frozen or not train
        return BatchNorm(self.momentum, self.epsilon, name=name)(x, use_running)


class BatchNorm(nn.Module):
    """Batch norm over all but the last axis: [B,h,w,C] -> the same.

    Computes what flax's does, see `ops.norm` for why it is ours.
    """

    momentum: float
    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array, use_running: bool) -> jax.Array:
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        if use_running:
            inverse = jax.lax.rsqrt(var.value + self.epsilon)
            return ((x - mean.value) * (inverse * scale) + bias).astype(x.dtype)
        y, *found = batch_norm(x, scale, bias, self.epsilon)
        if not self.is_initializing():
            for running, new in zip((mean, var), found, strict=True):
                running.value = self.momentum * running.value + (1 - self.momentum) * new
        return y


class FrozenNorm(nn.Module):
    """Batch norm of constants: [B,h,w,C] -> the same; nothing of it is a parameter.

    scale, bias, mean and var stand among the statistics, as in torchvision's detectors.
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        names = {"scale": jnp.ones, "bias": jnp.zeros, "mean": jnp.zeros, "var": jnp.ones}
        held = {key: self.variable("batch_stats", key, fill, shape) for key, fill in names.items()}
        scale, bias, mean, var = (held[key].value for key in names)
        scale *= jax.lax.rsqrt(var + self.epsilon)
        return x * scale.astype(x.dtype) + (bias - mean * scale).astype(x.dtype)


class Conv(nn.Module):
    """Convolution: [B,h,w,C] -> [B,h/stride,w/stride,features].

    Padding "same" is symmetric, rate * (kernel - 1) / 2, as in Caffe and torch; "valid" pads
    nothing; a number pads so many pixels on every side. features=0: depthwise, one filter for each
    input channel, kernel [k,k,1,C].
    """

    features: int
    kernel: int = 3
    stride: int = 1
    rate: int = 1  # dilation
    padding: str | int = "same"
    use_bias: bool = True
    kernel_init: Callable = he_normal
    bias_init: Callable = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        pad = {"valid": 0, "same": self.rate * (self.kernel - 1) // 2}.get(
            self.padding, self.padding
        )
        if self.features:
            shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        else:
            shape = (self.kernel, self.kernel, 1, x.shape[-1])
        kernel = self.param("kernel", self.kernel_init, shape).astype(x.dtype)
        pads = ((pad, pad), (pad, pad))
        if self.features:
            x = conv(x, kernel, self.stride, self.rate, pads)
        else:
            x = depthwise(x, kernel[:, :, 0], self.stride, self.rate, pads)
        if self.use_bias:
            x += self.param("bias", self.bias_init, shape[-1:]).astype(x.dtype)
        return x


class ConvNorm(nn.Module):
    """Convolution, norm, activation: [B,h,w,C] -> [B,h/stride,w/stride,features].

    use_bias=None: the convolution has a bias only where no norm follows.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    rate: int = 1
    norm: Norm = Norm()
    act: Activation | None = nn.relu
    padding: str | int = "same"
    use_bias: bool | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        bias = self.norm.kind == "none" if self.use_bias is None else self.use_bias
        x = Conv(
            self.features, self.kernel, self.stride, self.rate, self.padding, bias, name="conv"
        )(x)
        x = self.norm(x, train)
        return self.act(x) if self.act else x


class SeparableConvNorm(nn.Module):
    """A depthwise convolution, then a 1x1 one that mixes the channels; norm and act after both.

    [B,h,w,C] -> [B,h/stride,w/stride,features]. Chollet, "Xception", CVPR 2017. inner_norm and
    inner_act tell what stands between the two.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    rate: int = 1
    norm: Norm = Norm()
    act: Activation | None = nn.relu
    inner_norm: bool = True
    inner_act: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = Conv(
            *(0, self.kernel, self.stride, self.rate),
            use_bias=False,
            kernel_init=he_depthwise,
            name="depthwise",
        )(x)
        if self.inner_norm:
            x = self.norm(x, train, name="inner_norm")
        if self.inner_act and self.act:
            x = self.act(x)
        return ConvNorm(self.features, 1, norm=self.norm, act=self.act, name="pointwise")(x, train)


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
        fill = -h % rows.parts()  # uneven shares of rows would be gathered by the reshape
        y = conv(x, kernel.transpose(2, 0, 1, 3).reshape(1, 1, c, -1))
        y = jnp.pad(y, ((0, 0), (0, fill), (0, 0), (0, 0)))
        y = y.reshape(b, h + fill, w, 2, 2, self.features).transpose(0, 1, 3, 2, 4, 5)
        return y.reshape(b, 2 * (h + fill), 2 * w, self.features)[:, : 2 * h] + bias


@jax.custom_vjp
def relu_sum(x: jax.Array, y: jax.Array) -> jax.Array:
    """relu(x + y) of arrays of one shape, to the bit: the end of a residual unit in training.

    As max(x, -y) + y, a sum of two arrays, which XLA's CPU backend keeps. A maximum of one array it
    computes again wherever it is used, which the backward pass does everywhere, and so all units
    before it, down to their convolutions.
    """
    return jnp.maximum(x, -y) + y


def _relu_sum(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = relu_sum(x, y)
    return total, total


def _relu_sum_gradient(total: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    g = jnp.where(total > 0, g, 0)
    return g, g


relu_sum.defvjp(_relu_sum, _relu_sum_gradient)


def classifier(num_classes: int, kernel: int = 1, name: str = "classifier") -> nn.Module:
    """The last convolution, [B,h,w,C] -> logits [B,h,w,K].

    Its initial weights have variance 1 / C: much smaller ones start all classes at a saddle, where
    narrow networks learn foreground from background and then rest for hundreds of steps.
    """
    return Conv(num_classes, kernel, kernel_init=nn.initializers.lecun_normal(), name=name)


def dense_upsampling(num_classes: int, factor: int, x: jax.Array, kernel: int = 1) -> jax.Array:
    """Dense upsampling convolution: [B,h,w,C] -> logits [B,h*factor,w*factor,K].

    Call it inside a module. The classifier scores all pixels of a place at once; its channels are
    laid out as pixels. Wang et al. 2018, arXiv:1702.08502, section 3.1.
    """
    return depth_to_space(classifier(num_classes * factor**2, kernel)(x), factor)


def dropout(rate: float, x: jax.Array, train: bool, channels: bool = False) -> jax.Array:
    """Dropout of single values, or of whole channels (torch's Dropout2d); call inside a module."""
    dims = (1, 2) if channels else ()
    return nn.Dropout(rate, broadcast_dims=dims, deterministic=not train)(x)


def check_fields(module: nn.Module, choices: Mapping[str, Collection], owner: str) -> None:
    """Raises InputError, naming `owner.field`, for a field that is none of its choices."""
    for key, valid in choices.items():
        if getattr(module, key) not in valid:
            raise unknown(f"{owner}.{key}", str(getattr(module, key)), map(str, valid))


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
