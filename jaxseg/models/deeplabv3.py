"""DeepLab v3: Rethinking Atrous Convolution for Semantic Image Segmentation. Chen, Papandreou,
Schroff, Adam. 2017, arXiv:1706.05587.

image [B,H,W,C] -> atrous backbone, c5 at `output_stride` -> ASPP -> logits [B,H/os,W/os,K]. Atrous
spatial pyramid pooling looks at c5 through a 1x1 convolution, three 3x3 ones of growing rate and
the image's mean, side by side (section 3.3, Fig. 5). With `cascade`, the other network of the
paper: copies of the last ResNet block follow each other at doubling rates (section 3.2, Fig. 3b).

The loss and the final upsampling are PSPNet's. Differs from the paper: nothing known. Fields that
are not in the paper are the switches by which torchvision's, segmentation_models.pytorch's and
MMSegmentation's networks of this name differ from it.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.backbones import resnet
from jaxseg.backbones.layers import ConvNorm, Norm, SeparableConvNorm, classifier, dropout
from jaxseg.errors import InputError
from jaxseg.models.pspnet import auxiliary, check_crop, fit
from jaxseg.models.pspnet import loss as loss
from jaxseg.models.pspnet import predict as predict


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling with image-level features: [B,h,w,C] -> [B,h,w,features].

    Section 3.3, Fig. 5.
    """

    rates: tuple[int, ...]  # at output stride 16; none: the 1x1 convolution and the mean alone
    output_stride: int
    dropout: float
    norm: Norm
    features: int = 256
    project_kernel: int = 1
    separable: bool = False  # DeepLab v3+: the atrous convolutions, depthwise and pointwise
    inner_norm: bool = True  # norm and ReLU between these two
    scale_rates: bool = True  # section 4: doubled at output stride 8

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(ConvNorm, norm=self.norm)
        atrous = conv
        if self.separable:
            inner = {"inner_norm": self.inner_norm, "inner_act": self.inner_norm}
            atrous = partial(SeparableConvNorm, norm=self.norm, **inner)
        branches = [conv(self.features, 1, name="conv1x1")(x, train)]
        for i, rate in enumerate(self.rates, start=1):
            if self.scale_rates:
                rate = max(1, rate * 16 // self.output_stride)
            branches.append(atrous(self.features, 3, rate=rate, name=f"atrous{i}")(x, train))
        mean = jnp.mean(x, axis=(1, 2), keepdims=True)
        mean = conv(self.features, 1, name="image_pooling")(mean, train)
        branches.append(jnp.broadcast_to(mean, branches[0].shape))
        x = jnp.concatenate(branches, axis=-1)
        x = conv(self.features, self.project_kernel, name="project")(x, train)
        return dropout(self.dropout, x, train)


class Model(nn.Module):
    """image [B,H,W,C] -> logits [B,H/os,W/os,K] and aux_logits of an auxiliary head."""

    num_classes: int
    backbone: nn.Module
    rates: tuple[int, ...] = (6, 12, 18)  # section 3.3, at output stride 16
    features: int = 256  # section 3.3
    cascade: int = 0  # blocks after conv5 in place of ASPP; section 3.2 has 3, block5 to block7
    scale_rates: bool = True  # other output strides change the rates; not in smp
    dropout: float = 0.1  # not in the paper; the authors' code keeps 0.9
    channel_dropout: bool = False  # just before the classifiers, whole channels: MMSegmentation
    project_kernel: int = 1  # of the convolution that joins ASPP's branches; MMSegmentation's is 3
    head: int = 0  # channels of one more 3x3 convolution: 256 in torchvision and smp
    aux: int = 0  # channels of an auxiliary head: 256 in torchvision and MMSegmentation
    aux_on: str = "c4"
    aux_dropout: float = 0.1
    align_corners: bool = True  # the authors' code: sides of 16n + 1 map corners onto each other
    fit_corners: bool = True  # where align_corners, on sides of os n + 1; smp: on multiples of os
    norm: Norm = Norm()

    @property
    def output_stride(self) -> int:
        return self.backbone.output_stride

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> dict[str, jax.Array]:
        """image [B,H,W,C] -> logits and, with an auxiliary head, aux_logits [B,H/os,W/os,K]."""
        levels = self.backbone(image, train)
        x = levels["c5"]
        if self.cascade:
            x = self._cascade(x, train)
        else:
            inside = 0.0 if self.channel_dropout else self.dropout
            aspp = ASPP(
                *(self.rates, self.output_stride, inside, self.norm, self.features),
                project_kernel=self.project_kernel,
                scale_rates=self.scale_rates,
                name="aspp",
            )
            x = aspp(x, train)
        if self.head:
            x = ConvNorm(self.head, 3, norm=self.norm, name="head")(x, train)
        if self.channel_dropout:
            x = dropout(self.dropout, x, train, channels=True)
        logits = classifier(self.num_classes)(x)
        return {"logits": logits, **auxiliary(self, levels, train)}

    def _cascade(self, x: jax.Array, train: bool) -> jax.Array:
        """block5, block6, ...: conv5 again, each at twice the rate of the one before. Fig. 3b."""
        if not isinstance(self.backbone, resnet.Backbone):
            raise InputError("model.cascade repeats a ResNet's last block: needs a resnet backbone")
        for i in range(1, self.cascade + 1):
            rate = 32 // self.output_stride * 2**i
            plan = resnet.multiply([(1, rate)] * 3, self.backbone.multi_grid)
            unit, features = self.backbone.unit(), x.shape[-1]
            x, _ = resnet.Stage(unit, features, tuple(plan), name=f"block{4 + i}")(x, train)
        return x

    def fit(self, size: tuple[int, int]) -> tuple[int, int]:
        """The input size (H, W) that labels an image of `size` without moving it."""
        return fit(size, self)

    def check_crop(self, size: tuple[int, int]) -> None:
        """Raises InputError for a training crop (H, W) whose labels the logits would not meet."""
        check_crop(size, self)
