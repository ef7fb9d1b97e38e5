"""Panoptic-DeepLab: A Simple, Strong, and Fast Baseline for Bottom-Up Panoptic Segmentation. Cheng,
Collins, Zhu, Liu, Huang, Adam, Chen. CVPR 2020, arXiv:1911.10194.

DeepLab v3+ twice on one backbone, each with its own ASPP and a decoder that climbs two levels with
5x5 depthwise separable convolutions (Fig. 2). One says the class of every pixel, the other where
the objects' centres are and how far it is from each pixel to its own:

    image [B,H,W,C] -> backbone -> c2, c3, c5
    c5 -> ASPP -> + c3 (64) -> 5x5 256 -> + c2 (32) -> 5x5 256 -> logits [B,H/4,W/4,K]
    c5 -> ASPP -> + c3 (32) -> 5x5 128 -> + c2 (16) -> 5x5 128 -> centre [B,H/4,W/4,1]
                                                               -> offset [B,H/4,W/4,2], pixels

Peaks of the centre map are objects, each thing pixel joins the nearest one, and the majority of its
pixels' classes is the object's (section 3). The classes that are no things are stuff.

Differs from the paper: the atrous convolutions of ASPP are plain unless `separable`, as in the
authors' later code (deeplab2), whose parameter counts are met.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.backbones.layers import Conv, ConvNorm, Norm, SeparableConvNorm, classifier
from jaxseg.errors import InputError
from jaxseg.models.deeplabv3 import ASPP
from jaxseg.models.pspnet import check_crop, fit, level, upsample
from jaxseg.ops import centres
from jaxseg.ops.losses import PixelLoss
from jaxseg.ops.panoptic_quality import STEP
from jaxseg.ops.resize import resize

small_normal = nn.initializers.normal(0.01)  # the loss of centres counts 200 times


class Model(nn.Module):
    """image [B,H,W,C] -> logits [B,H/4,W/4,K], centre [B,H/4,W/4,1], offset [B,H/4,W/4,2]."""

    num_classes: int
    backbone: nn.Module
    things: tuple[int, ...] = ()  # class ids whose objects are told apart; () = all
    rates: tuple[int, ...] = (6, 12, 18)  # at output stride 16; halved at 32
    features: int = 256  # of both ASPPs
    separable: bool = False  # their atrous convolutions
    levels: tuple[str, ...] = ("c3", "c2")  # that the decoders climb; HRNet: from c4 on
    semantic: tuple[int, ...] = (64, 32)  # channels left of each level
    instance: tuple[int, ...] = (32, 16)
    decoder: int = 256  # channels of the semantic decoder and its head
    instance_decoder: int = 128
    instance_head: int = 32
    kernel: int = 5  # of the decoders' and the heads' separable convolutions
    dropout: float = 0.1  # in the ASPPs; deeplab2
    align_corners: bool = True  # the authors' code
    fit_corners: bool = True
    nms: int = 7  # window in which a centre is the highest, pixels
    threshold: float = 0.1  # lowest score of a centre
    top_k: int = 200  # slots of objects, best centres first
    detections: int = 100  # of which so many have a mask in `instances`, by their scores
    stuff_area: int = 2048  # fewer pixels of a stuff class in an image are void; COCO: 4096
    norm: Norm = Norm(momentum=0.99, epsilon=1e-3)  # deeplab2

    @property
    def output_stride(self) -> int:
        return self.backbone.output_stride

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> dict[str, jax.Array]:
        """image [B,H,W,C] -> logits [B,H/4,W/4,K], centre [..,1], offset [..,2]; the stride is that
        of the last of `levels`."""
        self.check()
        levels = self.backbone(image, train)
        conv = partial(SeparableConvNorm, kernel=self.kernel, norm=self.norm)
        last = partial(Conv, kernel=1, kernel_init=small_normal)
        x = self._decode(levels, self.semantic, self.decoder, "semantic", train)
        x = conv(self.decoder, name="semantic_head")(x, train)
        outputs = {"logits": classifier(self.num_classes)(x)}
        x = self._decode(levels, self.instance, self.instance_decoder, "instance", train)
        for name, channels in (("centre", 1), ("offset", 2)):
            y = conv(self.instance_head, name=f"{name}_head")(x, train)
            # Numbers of 8 bits would give a centre many equal pixels, each a peak.
            outputs[name] = last(channels, name=name)(y.astype(jnp.float32))
        return outputs

    def _decode(
        self, levels: dict, widths: tuple[int, ...], features: int, branch: str, train: bool
    ) -> jax.Array:
        """ASPP on c5, then level by level up: [B,h,w,features] at the stride of the last level."""
        aspp = ASPP(
            *(self.rates, self.output_stride, self.dropout, self.norm, self.features),
            separable=self.separable,
            name=f"{branch}_aspp",
        )
        x = aspp(levels["c5"], train)
        for name, width in zip(self.levels, widths, strict=True):
            low = ConvNorm(width, 1, norm=self.norm, name=f"{branch}_{name}")
            low = low(levels[level(name, levels)], train)
            x = resize(x, low.shape[1:3], self.align_corners)
            x = jnp.concatenate([x, low], axis=-1)
            join = SeparableConvNorm(
                features, self.kernel, norm=self.norm, name=f"{branch}_join_{name}"
            )
            x = join(x, train)
        return x

    def check(self) -> None:
        """Raises InputError where a decoder has not one width for each level, and for numbers of
        objects that a panoptic map does not have."""
        if not len(self.levels) == len(self.semantic) == len(self.instance):
            raise InputError(
                f"model.levels is {self.levels}, model.semantic {self.semantic} and model.instance "
                f"{self.instance}: need as many numbers of channels as levels"
            )
        if not 0 < self.top_k < STEP:
            raise InputError(
                f"model.top_k is {self.top_k}: a panoptic map numbers the objects of an image from "
                f"1 to {STEP - 1}, needs one of these"
            )

    def fit(self, size: tuple[int, int]) -> tuple[int, int]:
        """The input size (H, W) that labels an image of `size` without moving it."""
        return fit(size, self)

    def check_crop(self, size: tuple[int, int]) -> None:
        """Raises InputError for a training crop (H, W) whose labels the outputs would not meet."""
        check_crop(size, self)


def loss(
    outputs: dict[str, jax.Array],
    batch: dict[str, jax.Array],
    *,
    num_classes: int,
    things: tuple[int, ...],
    align_corners: bool,
    centre_weight: float = 200.0,  # the authors' code, as all that follows
    offset_weight: float = 0.01,
    sigma: float = 8.0,  # of a centre in the heat-map, pixels
    small_area: int = 4096,  # the pixels of smaller objects ...
    small_weight: float = 3.0,  # ... count so many times in the semantic loss
    pixel: PixelLoss = PixelLoss(name="top_k"),  # bootstrapped: the hardest 20%
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The pixel loss of the logits, squared error of the centres, absolute error of the offsets.

    All at full size. The offsets of the pixels of objects count; the centres everywhere but where
    the truth does not say whose a pixel is: void, crowds, objects that found no slot. Raises
    InputError, when traced, for a batch without objects.
    """
    if "masks" not in batch:
        raise InputError(
            "panoptic_deeplab learns from objects and the batch has none: set data.objects to the "
            "most that an image may have, for a data set that tells objects apart"
        )
    label, there = batch["label"], (batch["classes"] >= 0) & ~batch["crowd"]
    heat, offset, owner, area = centres.targets(batch["masks"], there, sigma)
    found = {k: upsample(outputs[k], label.shape[1:], align_corners) for k in outputs}

    known, owned = label != 255, owner >= 0
    slot = jnp.maximum(owner, 0).reshape(len(owner), -1)
    small = jnp.take_along_axis(area, slot, 1).reshape(owner.shape) < small_area
    weight = jnp.where(owned & small, small_weight, 1.0)
    semantic = pixel(found["logits"], label, weight_map=weight if small_weight != 1 else None)

    class_id = jnp.where(known, label, 0)
    counted = known & (owned | ~is_thing(num_classes, things)[class_id])
    centre = _mean((found["centre"][..., 0] - heat) ** 2, counted)
    distance = _mean(jnp.abs(found["offset"] - offset).mean(-1), known & owned)
    value = semantic + centre_weight * centre + offset_weight * distance
    parts = {"semantic_loss": semantic, "centre_loss": centre, "offset_loss": distance}
    return value, {"loss": value, **parts}


def _mean(values: jax.Array, counted: jax.Array) -> jax.Array:
    return jnp.where(counted, values, 0).sum() / jnp.maximum(counted.sum(), 1)


def is_thing(num_classes: int, things: tuple[int, ...]) -> jax.Array:
    """bool [K]: the classes whose objects are told apart; no `things` means all."""
    return jnp.asarray(np.isin(np.arange(num_classes), things) if things else [True] * num_classes)


def predict(
    outputs: dict[str, jax.Array],
    image: jax.Array,
    *,
    num_classes: int,
    things: tuple[int, ...],
    align_corners: bool,
    nms: int,
    threshold: float,
    top_k: int,
    detections: int,
) -> dict[str, jax.Array]:
    """semantic, logits, panoptic, instances at the size of image [B,H,W,C]. Section 3.

    An object's score is that of its centre times the mean probability of its class in its mask.
    """
    found = {k: upsample(outputs[k], image.shape[1:3], align_corners) for k in outputs}
    semantic = jnp.argmax(found["logits"], axis=-1).astype(jnp.int32)
    table = is_thing(num_classes, things)
    points, scores = centres.peaks(found["centre"][..., 0], nms, threshold, top_k)
    owner = centres.group(found["offset"], points, scores > 0)
    owner = jnp.where(table[semantic], owner, -1)

    counts = centres.votes(owner, semantic, top_k, num_classes)
    classes = jnp.argmax(counts, axis=-1).astype(jnp.int32)  # [B,top_k]
    panoptic = centres.merge(semantic, owner, classes, table)

    slot = jnp.maximum(owner, 0).reshape(len(owner), -1)
    chosen = jnp.take_along_axis(classes, slot, 1).reshape(*owner.shape, 1)
    sure = jnp.take_along_axis(jax.nn.softmax(found["logits"]), chosen, -1)[..., 0]
    scores = scores * centres.means(sure, owner, top_k)  # 0 without a pixel
    scores, best = jax.lax.top_k(scores, min(detections, top_k))
    classes = jnp.where(scores > 0, jnp.take_along_axis(classes, best, 1), -1)
    masks = (owner[:, None] == best[..., None, None]) & (scores > 0)[..., None, None]
    instances = {"masks": masks, "scores": scores, "classes": classes}
    return {
        **{"semantic": semantic, "logits": found["logits"]},
        **{"panoptic": panoptic, "instances": instances},
    }
