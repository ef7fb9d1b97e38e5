"""U-Net: Convolutional Networks for Biomedical Image Segmentation. Ronneberger, Fischer, Brox.
MICCAI 2015, arXiv:1505.04597.

A contracting path of 3x3 convolutions and 2x2 max-poolings, and an expanding path that doubles the
resolution again and again, each time beside the features of the same level (Fig. 1):

    image 572 -> 64 ------------- copy and crop -------------> 64 -> logits 388
                  `-> 128 -> 256 -> 512 -> 1024 -> 512 -> 256 -> 128 -'

padding="valid" is the paper's network: an input of 16m + 124 pixels is labelled in its centre,
16m - 60 pixels. padding="same" keeps the size (a multiple of 16); it is usually run with batch
norm, and patch=2 makes it four times cheaper: the network works on 2x2 pixels at a time and its
classifier gives their four labels (dense upsampling, Wang et al. 2018, arXiv:1702.08502).

Differs from the paper: the dropout rate, which it does not give, is 0.5.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.backbones.layers import ConvNorm, Norm, UpConv, classifier
from jaxseg.errors import InputError
from jaxseg.ops.image import centre, depth_to_space, space_to_depth
from jaxseg.ops.losses import cross_entropy
from jaxseg.ops.pool import max_pool


class Model(nn.Module):
    num_classes: int
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)  # channels of each level, Fig. 1
    padding: str = "valid"  # section 2: "the valid part of each convolution"; or "same"
    patch: int = 1  # patch x patch pixels fold into channels: all levels at 1/patch resolution
    dropout: float = 0.5  # at the end of the contracting path, section 3.1
    norm: Norm = Norm(kind="none")

    @property
    def depth(self) -> int:
        """The number of times that the resolution halves."""
        return len(self.widths) - 1

    @property
    def output_stride(self) -> int:
        return 1

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> dict[str, jax.Array]:
        """image [B,H,W,C] -> logits [B,H,W,K], or [B,H-184,W-184,K] where valid and four deep."""
        self._check(image.shape[1:3], "input")
        conv = partial(ConvNorm, norm=self.norm, padding=self.padding)

        x, skips = space_to_depth(image, self.patch), []
        for level, width in enumerate(self.widths):
            if level:
                skips.append(x)
                x = max_pool(x, window=2, stride=2)
            x = conv(width, name=f"down{level}_1")(x, train)
            x = conv(width, name=f"down{level}_2")(x, train)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)

        for level, width in reversed(list(enumerate(self.widths[:-1]))):
            x = UpConv(width, name=f"up{level}")(x)
            x = jnp.concatenate([centre(skips[level], x.shape[1:3]), x], axis=-1)
            x = conv(width, name=f"up{level}_1")(x, train)
            x = conv(width, name=f"up{level}_2")(x, train)
        logits = classifier(self.num_classes * self.patch**2)(x)
        return {"logits": depth_to_space(logits, self.patch)}

    def fit(self, size: tuple[int, int]) -> tuple[int, int]:
        """The smallest input size whose labelled centre covers `size`."""
        return tuple(self._input(n) for n in size)

    def check_crop(self, size: tuple[int, int]) -> None:
        self._check(size, "crop")

    def _input(self, labelled: int) -> int:
        """16b + 60 pixels give 16(b - 4) - 60 labels where valid; 16b give 16b where same."""
        step = self.patch * 2**self.depth
        lost = 0 if self.padding == "same" else 4 * (step - self.patch)
        bottom = -(-(labelled + lost) // step) + (0 if self.padding == "same" else 4)
        return step * bottom + lost

    def _check(self, size: tuple[int, int], what: str) -> None:
        if self.padding not in ("valid", "same"):
            raise InputError(f'model.padding is "{self.padding}": needs "valid" or "same"')
        if not self.widths or not all(type(n) is int and n > 0 for n in (*self.widths, self.patch)):
            raise InputError(
                f"model.widths is {self.widths} and model.patch {self.patch}: needs positive "
                "integers, such as (64, 128, 256) and 1"
            )
        step, least = self.patch * 2**self.depth, self._input(1)
        rest = least % step
        if all(n >= least and n % step == rest for n in size):
            return
        near = tuple(max(least, n - (n - rest) % step) for n in size)
        above = tuple(n if n >= m else n + step for n, m in zip(near, size, strict=True))
        rule = f"{step}n + {rest}" if rest else f"multiples of {step}"
        raise InputError(
            f"{what} {tuple(size)} does not fit a {self.padding} U-Net of depth {self.depth}, "
            f"whose sides are {rule}, at least {least}: use {near} or {above}"
        )


def loss(
    outputs: dict[str, jax.Array], batch: dict[str, jax.Array], *, class_weights: tuple = ()
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Softmax cross entropy of every pixel, Eq. 1, on the labelled centre."""
    logits = outputs["logits"]
    label = centre(batch["label"], logits.shape[1:3])
    value = cross_entropy(logits, label, class_weights=class_weights)
    return value, {"loss": value}


def predict(outputs: dict[str, jax.Array], image: jax.Array) -> dict[str, jax.Array]:
    """The class of every pixel of the labelled centre: semantic [B,h,w], logits [B,h,w,K]."""
    logits = outputs["logits"].astype(jnp.float32)
    return {"semantic": jnp.argmax(logits, axis=-1).astype(jnp.int32), "logits": logits}
