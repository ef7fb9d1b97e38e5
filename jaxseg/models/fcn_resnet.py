"""FCN on a dilated ResNet: what torchvision (2019) and MMSegmentation (2020) call FCN.

Long, Shelhamer, Darrell, CVPR 2015, arXiv:1411.4038, is `fcn.py`, on VGG16. The libraries keep its
idea, a network of convolutions alone, and take the resolution from dilation instead of skips:

    image [B,H,W,C] -> ResNet, output stride 8 -> 3x3 convolutions -> logits [B,H/8,W/8,K]

The loss, with an auxiliary head on c4, and the final upsampling are PSPNet's.

Differs from the paper: in all of the above.
"""

import flax.linen as nn
import jax

from jaxseg.backbones.layers import Norm
from jaxseg.models.pspnet import Head, auxiliary, check_crop, fit
from jaxseg.models.pspnet import loss as loss
from jaxseg.models.pspnet import predict as predict


class Model(nn.Module):
    """image [B,H,W,C] -> logits [B,H/os,W/os,K] and aux_logits of an auxiliary head."""

    num_classes: int
    backbone: nn.Module
    features: int = 0  # channels of the 3x3 convolutions; 0 = a quarter of c5's
    convs: int = 1
    concat_input: bool = False  # MMSegmentation: one more convolution sees c5 beside the features
    rate: int = 1  # of these; MMSegmentation's D6: 6, at output stride 8 or 16
    dropout: float = 0.1
    channel_dropout: bool = False  # drop whole channels: MMSegmentation
    aux: int = 256  # channels of the auxiliary head; 0 = none
    aux_on: str = "c4"
    aux_dropout: float = 0.1
    align_corners: bool = False
    fit_corners: bool = True  # where align_corners: on sides of os n + 1
    norm: Norm = Norm()

    @property
    def output_stride(self) -> int:
        return self.backbone.output_stride

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> dict[str, jax.Array]:
        """image [B,H,W,C] -> logits and, with an auxiliary head, aux_logits [B,H/os,W/os,K]."""
        levels = self.backbone(image, train)
        c5 = levels["c5"]
        head = Head(
            *(self.num_classes, self.features or c5.shape[-1] // 4, self.norm, self.convs),
            *(self.concat_input, self.dropout, self.channel_dropout, self.rate),
            name="head",
        )
        return {"logits": head(c5, train), **auxiliary(self, levels, train)}

    def fit(self, size: tuple[int, int]) -> tuple[int, int]:
        """The input size (H, W) that labels an image of `size` without moving it."""
        return fit(size, self)

    def check_crop(self, size: tuple[int, int]) -> None:
        """Raises InputError for a training crop (H, W) whose labels the logits would not meet."""
        check_crop(size, self)
