"""DeepLab v3+: Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation.
Chen, Zhu, Papandreou, Schroff, Adam. ECCV 2018, arXiv:1802.02611.

DeepLab v3 as the encoder; the decoder brings its features to stride 4, sets them beside a narrow
projection of c2, and refines object boundaries with two 3x3 convolutions (Fig. 2):

    image [B,H,W,C] -> backbone -> c2, c5
    c5 -> ASPP 256 -> bilinear -.
    c2 -> 1x1 48 ----------------> 3x3 256 -> 3x3 256 -> logits [B,H/4,W/4,K]

The loss and the final upsampling are DeepLab v3's. Differs from the paper: nothing known.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.backbones.layers import ConvNorm, Norm, classifier
from jaxseg.models.deeplabv3 import ASPP, check_crop
from jaxseg.models.deeplabv3 import loss as loss
from jaxseg.models.deeplabv3 import predict as predict
from jaxseg.ops.resize import resize


class Model(nn.Module):
    num_classes: int
    backbone: nn.Module
    rates: tuple[int, ...] = (6, 12, 18)  # section 3.1, at output stride 16
    low_level: int = 48  # channels left of c2, Table 1
    decoder: int = 256  # channels of the two 3x3 convolutions, Table 2
    dropout: float = 0.1  # in the ASPP; the authors' code keeps 0.9
    align_corners: bool = True  # the authors' code
    norm: Norm = Norm()

    @property
    def output_stride(self) -> int:
        return self.backbone.output_stride

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> dict[str, jax.Array]:
        """image [B,H,W,C] -> logits [B,H/4,W/4,K]."""
        conv = partial(ConvNorm, norm=self.norm)
        features = self.backbone(image, train)
        aspp = ASPP(self.rates, self.output_stride, self.dropout, self.norm, name="aspp")
        x = aspp(features["c5"], train)

        low = conv(self.low_level, 1, name="low_level")(features["c2"], train)
        x = resize(x, low.shape[1:3], self.align_corners)
        x = jnp.concatenate([x, low], axis=-1)  # [B,H/4,W/4,256 + 48]
        x = conv(self.decoder, 3, name="decoder1")(x, train)
        x = conv(self.decoder, 3, name="decoder2")(x, train)
        return {"logits": classifier(self.num_classes)(x)}

    def check_crop(self, size: tuple[int, int]) -> None:
        check_crop(size, self.output_stride, self.align_corners)
