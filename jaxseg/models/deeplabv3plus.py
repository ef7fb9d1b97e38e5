"""DeepLab v3+: Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation.
Chen, Zhu, Papandreou, Schroff, Adam. ECCV 2018, arXiv:1802.02611.

DeepLab v3 as the encoder; the decoder brings its features to stride 4, sets them beside a narrow
projection of c2, and refines object boundaries with two 3x3 convolutions (Fig. 2):

    image [B,H,W,C] -> backbone -> c2, c5
    c5 -> ASPP 256 -> bilinear -.
    c2 -> 1x1 48 ----------------> 3x3 256 -> 3x3 256 -> logits [B,H/4,W/4,K]

With Xception, and in MMSegmentation, the 3x3 convolutions of ASPP and decoder are `separable`
(section 3.1). With MobileNetV2 the authors leave out the atrous branches and the decoder.

The loss and the final upsampling are PSPNet's. Differs from the paper: nothing known. Fields that
are not in the paper are the switches by which segmentation_models.pytorch's and MMSegmentation's
networks of this name differ from it.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.backbones.layers import ConvNorm, Norm, SeparableConvNorm, classifier, dropout
from jaxseg.models.deeplabv3 import ASPP
from jaxseg.models.pspnet import auxiliary, check_crop, fit
from jaxseg.models.pspnet import loss as loss
from jaxseg.models.pspnet import predict as predict
from jaxseg.ops.resize import resize


class Model(nn.Module):
    """image [B,H,W,C] -> logits [B,H/4,W/4,K] and aux_logits of an auxiliary head."""

    num_classes: int
    backbone: nn.Module
    rates: tuple[int, ...] = (6, 12, 18)  # section 3.1, at output stride 16
    scale_rates: bool = True  # other output strides change the rates; not in smp
    features: int = 256  # of ASPP
    separable: bool = False  # section 3.1: atrous separable convolution
    low_level: int = 48  # channels left of c2, Table 1
    decoder: tuple[int, ...] = (256, 256)  # channels of the 3x3 convolutions, Table 2; () = none
    dropout: float = 0.1  # in the ASPP; the authors' code keeps 0.9
    channel_dropout: bool = False  # just before the classifiers, whole channels: MMSegmentation
    aux: int = 0  # channels of an auxiliary head: 256 in MMSegmentation
    aux_on: str = "c4"
    aux_dropout: float = 0.1
    align_corners: bool = True  # the authors' code
    fit_corners: bool = True  # where align_corners, on sides of os n + 1; smp: on multiples of os
    project_kernel: int = 1  # of the convolution that joins ASPP's branches; MMSegmentation's is 3
    after_aspp: int = 0  # channels of one more separable convolution: 256 in smp
    inner_norm: bool = True  # norm and ReLU inside separable convolutions; smp has none
    norm: Norm = Norm()

    @property
    def output_stride(self) -> int:
        return self.backbone.output_stride

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> dict[str, jax.Array]:
        """image [B,H,W,C] -> logits [B,H/4,W/4,K], or [B,H/os,W/os,K] without a decoder; with an
        auxiliary head, aux_logits [B,H/os,W/os,K]."""
        levels = self.backbone(image, train)
        conv = partial(ConvNorm, norm=self.norm)
        inner = {"inner_norm": self.inner_norm, "inner_act": self.inner_norm}
        separable = partial(SeparableConvNorm, norm=self.norm, **inner)
        inside = 0.0 if self.channel_dropout else self.dropout
        aspp = ASPP(
            *(self.rates, self.output_stride, inside, self.norm, self.features),
            *(self.project_kernel, self.separable, self.inner_norm, self.scale_rates),
            name="aspp",
        )
        x = aspp(levels["c5"], train)
        if self.after_aspp:
            x = separable(self.after_aspp, 3, name="after_aspp")(x, train)
        if self.decoder:
            low = conv(self.low_level, 1, name="low_level")(levels["c2"], train)
            x = resize(x, low.shape[1:3], self.align_corners)
            x = jnp.concatenate([x, low], axis=-1)  # [B,H/4,W/4,256 + 48]
        for i, features in enumerate(self.decoder, start=1):
            refine = separable if self.separable else conv
            x = refine(features, 3, name=f"decoder{i}")(x, train)
        if self.channel_dropout:
            x = dropout(self.dropout, x, train, channels=True)
        logits = classifier(self.num_classes)(x)
        return {"logits": logits, **auxiliary(self, levels, train)}

    def fit(self, size: tuple[int, int]) -> tuple[int, int]:
        """The input size (H, W) that labels an image of `size` without moving it."""
        return fit(size, self)

    def check_crop(self, size: tuple[int, int]) -> None:
        """Raises InputError for a training crop (H, W) whose labels the logits would not meet."""
        check_crop(size, self)
