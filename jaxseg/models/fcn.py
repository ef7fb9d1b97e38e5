"""FCN: Fully Convolutional Networks for Semantic Segmentation. Long, Shelhamer, Darrell. CVPR 2015,
arXiv:1411.4038.

VGG-16's fully connected layers become convolutions, so that it scores every place of a map of
stride 32 (FCN-32s). Two finer levels are scored too, and summed with the coarser scores at twice
their size (FCN-16s, FCN-8s, Fig. 3). What upsamples are transposed convolutions with the weights
of bilinear interpolation:

    image [B,H,W,C] -> pad 99 -> c3 (stride 8) -> c4 (16) ------> c5 (32) -> fc6 -> fc7
                                   | scores         | scores                         | scores
    logits [B,H,W,K] <- crop <- x8 + <---------- x2 + <----------------------- x2 ---'

fc6, 7x7, and the transposed convolutions are unpadded: c4's scores are cropped by 5 places, c3's by
9, and the result by 19 (FCN-32s), 27 or 31 pixels, as in the authors' code. The border of zeros is
theirs too; it makes room for images of any size.

Differs from the paper: the doublings are fixed by default, as in the authors' released networks;
`upsampling="learned"` is the paper's.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.backbones.layers import Conv, check_fields
from jaxseg.backbones.vgg import fully_connected
from jaxseg.errors import InputError
from jaxseg.ops.losses import PixelLoss
from jaxseg.ops.upsample import bilinear_kernel, bilinear_transposed, transposed

BORDER = 99  # zeros around the image; with its own padding, conv1_1 pads by 100: the authors' code
SKIPS = {  # level: (factor where all is learned at once, name of the upsampling before it)
    "c4": (1e-2, "upscore2"),
    "c3": (1e-4, "upscore_pool4"),
}
CHOICES = {
    "stride": (32, 16, 8),
    "upsampling": (
        "fixed",  # the authors' released networks
        "learned",  # section 4.3: the doublings are learned, the last upsampling is fixed
        "all",  # the last is learned too: SegNet's Table 3, "FCN (learnt deconv)"
    ),
}


class Deconv(nn.Module):
    """Transposed convolution that starts as bilinear: [B,h,w,K] -> [B,(h+1)factor,(w+1)factor,K].

    Section 3.3; the kernel is [2 factor, 2 factor, K, K].
    """

    factor: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def init(_: jax.Array, classes: int) -> jax.Array:
            return bilinear_kernel(self.factor)[..., None, None] * jnp.eye(classes)

        kernel = self.param("kernel", init, x.shape[-1])
        return transposed(x, kernel.astype(x.dtype), self.factor)


class Model(nn.Module):
    """image [B,H,W,C] -> logits float32 [B,H,W,K]."""

    num_classes: int
    backbone: nn.Module
    stride: int = 8  # of the finest scores: FCN-32s, FCN-16s, FCN-8s
    upsampling: str = "fixed"  # or "learned", "all"
    at_once: bool = False  # FCN-8s learned without its coarser stages: levels are scaled down
    features: int = 4096  # channels of fc6 and fc7
    dropout: float = 0.5  # section 4.3, as in VGG-16

    @property
    def output_stride(self) -> int:
        return self.stride

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> dict[str, jax.Array]:
        """image [B,H,W,C] -> logits float32 [B,H,W,K]."""
        self.check()
        border = ((0, 0), (BORDER, BORDER), (BORDER, BORDER), (0, 0))
        levels = self.backbone(jnp.pad(image, border), train)
        # Section 4.3: the scores start at zero.
        score = partial(Conv, self.num_classes, 1, kernel_init=nn.initializers.zeros)
        x = fully_connected(levels["c5"], train, self.features, padding="valid", drop=self.dropout)
        x = score(name="score_fr")(x)
        # x[i] stands at place i + first of the level of its stride. Upsampled by f, the centre of
        # x[i] is at f i + f - 1/2; in a map f times finer, that of place i at f i + (f - 1) / 2.
        stride, first = 32, 3
        for level, (factor, name) in SKIPS.items():
            if stride == self.stride:
                break
            x = self._up(x, 2, name, learned=self.upsampling != "fixed")
            stride, first = stride // 2, 2 * first - 1
            skip = levels[level] * factor if self.at_once else levels[level]
            x += crop(score(name=f"score_pool{level[1]}")(skip), first, x.shape[1:3])
        x = x.astype(jnp.float32)
        x = self._up(x, stride, f"upscore{stride}", learned=self.upsampling == "all")
        first = BORDER + stride // 2 - stride * first
        return {"logits": crop(x, first, image.shape[1:3])}

    def _up(self, x: jax.Array, factor: int, name: str, learned: bool) -> jax.Array:
        return Deconv(factor, name=name)(x) if learned else bilinear_transposed(x, factor)

    def check(self) -> None:
        """Raises InputError for a field that is none of its choices, and for other strides."""
        check_fields(self, CHOICES, "model")
        if self.backbone.output_stride != 32:
            raise InputError(
                f"FCN upsamples from stride 32, got backbone.output_stride "
                f"{self.backbone.output_stride}: set 32 and eval.output_stride=0, or take the "
                "model fcn_resnet"
            )


def crop(x: jax.Array, first: int, size: tuple[int, int]) -> jax.Array:
    """Rows and columns `first` to `first` + size of [B,h,w,C]."""
    return x[:, first : first + size[0], first : first + size[1]]


def loss(
    outputs: dict[str, jax.Array],
    batch: dict[str, jax.Array],
    *,
    pixel: PixelLoss = PixelLoss(),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The pixel loss of logits at full size."""
    value = pixel(outputs["logits"], batch["label"])
    return value, {"loss": value}


def predict(outputs: dict[str, jax.Array], image: jax.Array) -> dict[str, jax.Array]:
    """semantic [B,H,W] int32 and logits [B,H,W,K] float32, of logits at full size."""
    logits = outputs["logits"].astype(jnp.float32)
    return {"semantic": jnp.argmax(logits, axis=-1).astype(jnp.int32), "logits": logits}
