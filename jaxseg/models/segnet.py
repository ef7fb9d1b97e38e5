"""SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image Segmentation. Badrinarayanan,
Kendall, Cipolla. TPAMI 2017, arXiv:1511.00561.

The encoder, VGG-16 with batch norm, remembers where each maximum of its 2x2 poolings was. The
decoder, its mirror image, puts the values back there, zero elsewhere, and convolves (Fig. 2, 3):

    image 360x480 -> 64 -> pool 180x240 -> ... -> 45x60 -> 23x30 -> 12x15 -> 512
                                |  where the maxima were  |       |       |
    logits 360x480 <- 64 <- unpool <- ... <- unpool 45x60 <- 23x30 <- unpool <-'

Sizes are rounded up, and unpooling goes back to the very size that was pooled. The loss and
`predict`, of logits at full size, are FCN's.

SegNet-Basic has four stages of one 7x7 convolution of 64 channels, no ReLU in the decoder, a 1x1
classifier and normalises its image locally (section 3.1 and the authors' code).

Differs from the paper: running means in place of norm statistics computed after training; norms add
1e-5 to the variance, as VGG-16's weights with batch norm expect, where the authors' code adds 1e-9.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.backbones import vgg
from jaxseg.backbones.layers import ConvNorm, Norm, classifier, dropout
from jaxseg.errors import InputError
from jaxseg.models.fcn import loss as loss
from jaxseg.models.fcn import predict as predict
from jaxseg.ops.pool import max_pool_with_indices, max_unpool

DROPPED = 3  # the first stage that ends in dropout, on both sides


class Encoder(nn.Module):
    """Stages of convolutions, each pooled: image -> (features, the indices and sizes to unpool).

    Its parameters are those of the backbone vgg16_bn.
    """

    widths: tuple[tuple[int, ...], ...]
    conv: partial
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, list[tuple]]:
        pooled = []
        for stage, widths in enumerate(self.widths, 1):
            for i, width in enumerate(widths, 1):
                x = self.conv(width, name=f"conv{stage}_{i}")(x, train)
            size = x.shape[1:3]
            x, indices = max_pool_with_indices(x)
            x = dropout(self.dropout if stage >= DROPPED else 0.0, x, train)
            pooled.append((indices, size))
        return x, pooled


class Model(nn.Module):
    """image [B,H,W,C] -> logits [B,H,W,K]."""

    num_classes: int
    encoder: tuple[tuple[int, ...], ...] = vgg.WIDTHS  # channels of each stage's convolutions
    decoder: tuple[tuple[int, ...], ...] = (  # from the last stage to the first; Fig. 2
        (512, 512, 512),
        (512, 512, 256),
        (256, 256, 128),
        (128, 64),
        (64,),  # the second convolution is the classifier
    )
    kernel: int = 3  # SegNet-Basic: 7
    decoder_act: bool = True  # ReLU in the decoder; not in SegNet-Basic
    classifier_kernel: int = 3  # SegNet-Basic: 1
    local_norm: bool = False  # SegNet-Basic: `local_response_norm` of the image, 0..255
    dropout: float = 0.0  # after stages 3 to 5 on both sides; Tables 3 to 5: 0.5
    norm: Norm = Norm()

    @property
    def output_stride(self) -> int:
        return 1

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> dict[str, jax.Array]:
        """image [B,H,W,C] -> logits [B,H,W,K]."""
        if len(self.encoder) != len(self.decoder):
            raise InputError(
                f"model.encoder has {len(self.encoder)} stages and model.decoder "
                f"{len(self.decoder)}: needs as many, for each unpooling takes a pooling's indices"
            )
        x = local_response_norm(image) if self.local_norm else image
        conv = partial(ConvNorm, kernel=self.kernel, norm=self.norm, use_bias=True)
        x, pooled = Encoder(self.encoder, conv, self.dropout, name="backbone")(x, train)
        if not self.decoder_act:
            conv = partial(conv, act=None)
        for stage, widths in zip(range(len(pooled), 0, -1), self.decoder, strict=True):
            indices, size = pooled[stage - 1]
            x = max_unpool(x, indices, size)
            for i, width in enumerate(widths):
                x = conv(width, name=f"conv{stage}_{len(self.encoder[stage - 1]) - i}_d")(x, train)
            x = dropout(self.dropout if stage >= DROPPED else 0.0, x, train)
        return {"logits": classifier(self.num_classes, self.classifier_kernel)(x)}


def local_response_norm(
    x: jax.Array, size: int = 5, alpha: float = 1e-4, beta: float = 0.75
) -> jax.Array:
    """x / (1 + alpha / size * sum of the squares of the `size` channels around)^beta: [B,H,W,C].

    Krizhevsky, Sutskever, Hinton, NIPS 2012, section 3.3, as Caffe has it; size, alpha and beta are
    the authors' code's.
    """
    wide = x.astype(jnp.float32)
    around = ((0, 0), (0, 0), (0, 0), (size // 2, size // 2))
    squares = jnp.pad(wide**2, around)
    total = sum(squares[..., i : i + x.shape[-1]] for i in range(size))
    return (wide / (1 + alpha / size * total) ** beta).astype(x.dtype)
