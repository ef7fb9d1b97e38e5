"""Mask R-CNN. He, Gkioxari, Dollar, Girshick. ICCV 2017, arXiv:1703.06870; on Faster R-CNN (Ren et
al. 2015, arXiv:1506.01497) and the feature pyramid (Lin et al. 2017, arXiv:1612.03144).

A region proposal network says at every place of a pyramid which of three anchors shows an object
and how its box differs; the best boxes, their features cut out by RoIAlign, are classified, refined
and get a mask for every class.

    image [B,H,W,C], H and W made multiples of 32 by zeros below and right
      -> ResNet c2 .. c5 -> FPN p2 .. p6 [B,H/4,W/4,256] .. [B,H/64,W/64,256]
    p2 .. p6 -> 3x3 -> objectness and box of A anchors -> NMS -> proposals [B,P,4]
    proposals -> RoIAlign 7x7 of p2 .. p5 -> 2 fully connected -> T + 1 classes, T boxes
    detections -> RoIAlign 14x14 -> 4 convolutions -> x2 -> masks [B,M,28,28] of T classes

T is the number of things; class 0 inside is the background. In training RoIs are drawn from the
proposals and the true boxes, so `inputs` hands the truth to the forward pass. All shapes are
static: slots without a box are marked, none is computed on the host.

Differs from the paper: points of RoIAlign and anchors' sides as in detectron2, boxes of all RoIs
are refined once; a mask's target is RoIAligned from the true one by 4 points a bin; crowds are
background; at most 2,000 boxes enter the last NMS; masks are drawn at the size that the network
sees, and resized from there to the image's own.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.backbones.fpn import FPN, check_strides
from jaxseg.backbones.layers import Conv, UpConv
from jaxseg.errors import InputError
from jaxseg.ops import boxes as ops
from jaxseg.ops.mask_losses import binary_cross_entropy, smooth_l1
from jaxseg.ops.roi import crop_masks, level_of, paste, roi_align

LEVELS = (2, 3, 4, 5, 6)  # of the pyramid; RoIs have features of all but the last
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # Fast R-CNN's code: targets of RoIs have deviation 1


@dataclasses.dataclass(frozen=True)
class Proposals:
    """The region proposal network, and which of its boxes go on."""

    sizes: tuple[float, ...] = (32, 64, 128, 256, 512)  # FPN, section 4.1: of p2 .. p6, pixels
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height / width
    rounded: bool = False  # halves of anchors' sides are whole pixels, and they are as far apart as
    # the image's side over the map's, in whole pixels: torchvision
    before: tuple[int, ...] = (2000, 1000)  # boxes a level before NMS, in training and after it
    after: tuple[int, ...] = (1000, 1000)  # boxes an image after it
    iou: float = 0.7  # of the NMS, level by level

    def __post_init__(self):
        """Raises InputError for numbers that fit no pyramid."""
        pairs = [len(pair) == 2 and min(pair) > 0 for pair in (self.before, self.after)]
        if len(self.sizes) != len(LEVELS) or not self.ratios or not all(pairs):
            raise InputError(
                f"model.proposals is {self}: needs five sizes of anchors, from the finest level to "
                "the coarsest, a ratio or more, and two numbers of boxes before and after the NMS"
            )


@dataclasses.dataclass(frozen=True)
class Detections:
    """Which RoIs are learnt from, and which are said to be objects."""

    rois: int = 512  # drawn for each training image; section 3.1
    positives: float = 0.25  # at most this share of them shows an object
    score: float = 0.05  # an object has at least this probability
    iou: float = 0.5  # of the NMS, class by class
    candidates: int = 2000  # most probable boxes that enter it
    count: int = 100  # objects an image; section 3.1


class Linear(nn.Module):
    """A fully connected layer over a small map: [N,s,s,C] -> [N,features]; kernel [s,s,C,features].

    A matrix product, and not a convolution of windows that occur once.
    """

    features: int
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (*x.shape[1:], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        flat = kernel.astype(x.dtype).reshape(-1, self.features)
        return x.reshape(len(x), -1) @ flat + bias.astype(x.dtype)


class RegionProposals(nn.Module):
    """{"p2": [B,h,w,C], ..} -> objectness [B,N], codes [B,N,4] of N anchors, row by row."""

    anchors: int  # at a place

    @nn.compact
    def __call__(self, levels: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        init = nn.initializers.normal(0.01)
        width = next(iter(levels.values())).shape[-1]
        shared = Conv(width, 3, kernel_init=init, name="conv")
        objectness = Conv(self.anchors, 1, kernel_init=init, name="objectness")
        regressor = Conv(4 * self.anchors, 1, kernel_init=init, name="regressor")
        scores, codes = [], []
        for x in levels.values():
            y = nn.relu(shared(x))
            scores.append(objectness(y).reshape(len(x), -1))
            codes.append(regressor(y).reshape(len(x), -1, 4))
        wide = partial(jnp.concatenate, axis=1)
        return wide(scores).astype(jnp.float32), wide(codes).astype(jnp.float32)


class BoxHead(nn.Module):
    """RoIs [N,7,7,C] -> logits [N,T+1], the background first, and codes [N,T+1,4]."""

    classes: int  # T
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = nn.relu(Linear(self.features, name="fc1")(x))[:, None, None]
        x = nn.relu(Linear(self.features, name="fc2")(x))[:, None, None]
        few, fewer = (nn.initializers.normal(s) for s in (0.01, 0.001))
        logits = Linear(self.classes + 1, few, name="classifier")(x)
        codes = Linear(4 * (self.classes + 1), fewer, name="regressor")(x)
        codes = codes.reshape(len(x), self.classes + 1, 4)
        return logits.astype(jnp.float32), codes.astype(jnp.float32)


class MaskHead(nn.Module):
    """RoIs [N,14,14,C] -> logits of their masks [N,28,28,T+1], of which the first is unused."""

    classes: int
    features: int
    convs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(1, self.convs + 1):
            x = nn.relu(Conv(self.features, 3, name=f"conv{i}")(x))
        x = nn.relu(UpConv(self.features, name="up")(x))
        few = nn.initializers.normal(0.001)
        return Conv(self.classes + 1, 1, kernel_init=few, name="classifier")(x)


class Model(nn.Module):
    """image [B,H,W,C] -> what `predict` draws; with the truth, what `loss` compares."""

    num_classes: int
    backbone: nn.Module
    things: tuple[int, ...] = ()  # ids of the classes whose objects are found; () = all; -1: none
    features: int = 256  # of the pyramid
    box_features: int = 1024  # section 3.1, Fig. 4 right
    mask_features: int = 256
    mask_convs: int = 4
    box_size: int = 7  # bins of RoIAlign
    mask_size: int = 14
    samples: int = 2  # points of a bin, each way; section 3, RoIAlign
    aligned: bool = True  # RoIAlign's half pixel and masks to the centre of pixels; torchvision: no
    canonical: float = 224.0  # side of a box that takes p4; FPN, Eq. 1
    mask_threshold: float = 0.5  # section 3.1
    proposals: Proposals = Proposals()
    detections: Detections = Detections()

    @property
    def output_stride(self) -> int:
        """That of the finest level."""
        return 4

    def check(self) -> None:
        """Raises InputError for a backbone whose levels are not where anchors stand."""
        check_strides(self.backbone)

    def inputs(self, batch: dict[str, jax.Array]) -> tuple[dict[str, jax.Array]]:
        """What the forward pass takes beside the image in training: the truth."""
        rng = batch["rng"] if "rng" in batch else jax.random.key(0)
        kind = thing(batch, self.num_classes, self.things)
        return ({"boxes": batch["boxes"], "kind": kind, "rng": jax.random.fold_in(rng, 0)},)

    @nn.compact
    def __call__(
        self, image: jax.Array, truth: dict[str, jax.Array] | None = None, *, train: bool
    ) -> dict[str, jax.Array]:
        """image [B,H,W,C] -> boxes, scores, kinds and mask_logits of M detections; with the truth
        the scores and codes of all anchors and of the RoIs drawn, and the masks of the positives.
        """
        return self.find(self.pyramid(image, train), image.shape[1:3], truth)[0]

    def pyramid(self, image: jax.Array, train: bool) -> dict[str, jax.Array]:
        """p2 .. p6 of image [B,H,W,C] made multiples of 32 by zeros."""
        self.check()
        pads = [(0, -n % 32) for n in image.shape[1:3]]
        levels = self.backbone(jnp.pad(image, ((0, 0), *pads, (0, 0))), train)
        return self.fpn()(levels)

    def fpn(self) -> FPN:
        return FPN(self.features, name="fpn")

    def find(
        self,
        levels: dict[str, jax.Array],
        size: tuple[int, int],
        truth: dict[str, jax.Array] | None,
    ) -> tuple[dict[str, jax.Array], Callable]:
        """All outputs of an image of `size`, and the function that gives boxes [B,R,4] of any the
        logits of their masks, [B,R,28,28,T+1]."""
        anchors, counts = self.anchors({key: x.shape[1:3] for key, x in levels.items()})
        objectness, codes = RegionProposals(len(self.proposals.ratios), name="rpn")(levels)
        found = jax.vmap(partial(self.propose, anchors, counts, size, truth is not None))(
            *jax.lax.stop_gradient((objectness, codes))
        )
        kinds = len(self.things) or self.num_classes
        box_head = BoxHead(kinds, self.box_features, name="box")
        mask_head = MaskHead(kinds, self.mask_features, self.mask_convs, name="mask")
        box_rois, mask_rois = (
            partial(self.align, levels, n) for n in (self.box_size, self.mask_size)
        )

        def mask_logits(rois: jax.Array) -> jax.Array:
            return unflat(rois, mask_head(flat(mask_rois(rois)))).astype(jnp.float32)

        if truth is None:
            rois, there = found
            logits, regressed = map(partial(unflat, rois), box_head(flat(box_rois(rois))))
            said = jax.vmap(partial(self.detect, size))(rois, there, logits, regressed)
            masks = of_kind(mask_logits(said["boxes"]), said["kinds"])
            return {**said, "mask_logits": masks}, mask_logits
        keys = jax.random.split(truth["rng"], len(truth["boxes"]))
        drawn = jax.vmap(self.draw)(keys, truth["boxes"], truth["kind"] > 0, *found)
        rois = drawn["rois"]
        logits, regressed = map(partial(unflat, rois), box_head(flat(box_rois(rois))))
        first = rois[:, : int(self.detections.rois * self.detections.positives)]
        return {
            **{"anchors": anchors, "objectness": objectness, "anchor_codes": codes},
            **{**drawn, "logits": logits, "codes": regressed},
            "mask_logits": mask_logits(first),
        }, mask_logits

    def anchors(self, grids: dict[str, tuple[int, int]]) -> tuple[np.ndarray, list[int]]:
        """float32 [N,4] of all levels, and how many each level has."""
        ask, each = self.proposals, []
        for i, size in zip(LEVELS, ask.sizes, strict=True):
            grid = grids[f"p{i}"]
            stride = (2**i, 2**i)
            if ask.rounded:
                stride = tuple(4 * n // have for n, have in zip(grids["p2"], grid, strict=True))
            each.append(ops.grid_anchors(grid, stride, size, ask.ratios, ask.rounded))
        return np.concatenate(each), [len(x) for x in each]

    def propose(
        self,
        anchors: np.ndarray,
        counts: list[int],
        size: tuple[int, int],
        training: bool,
        objectness: jax.Array,
        codes: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Boxes [P,4] and bool [P] which are there, of objectness [N] and codes [N,4]."""
        ask = self.proposals
        before, after = (pair[0 if training else 1] for pair in (ask.before, ask.after))
        slots = min(before, max(counts))
        ends = np.cumsum(counts)
        boxes, scores = [], []
        for first, end in zip(ends - counts, ends, strict=True):
            value, place = ops.top(objectness[first:end], slots)
            box = ops.decode(codes[first:end][place], jnp.asarray(anchors[first:end])[place])
            box = ops.clip(box, size)
            big = (ops.sides(box) >= 1e-3).all(-1)
            boxes.append(box)
            scores.append(jnp.where(big, value, -jnp.inf))
        boxes, scores = jnp.stack(boxes), jnp.stack(scores)  # [5,slots,..]
        stays = jax.vmap(lambda b, s: ops.nms(b, s, ask.iou))(boxes, scores)
        score, place = ops.top(jnp.where(stays, scores, -jnp.inf).reshape(-1), after)
        there = score > -jnp.inf
        return jnp.where(there[:, None], boxes.reshape(-1, 4)[place], 0), there

    def draw(
        self,
        rng: jax.Array,
        truth: jax.Array,
        real: jax.Array,
        boxes: jax.Array,
        there: jax.Array,
    ) -> dict[str, jax.Array]:
        """The RoIs to learn from, of the proposals [P,4] and the true boxes [N,4] of one image.

        rois [R,4], of which those that show an object come first; index [R], the true box; positive
        and counts, bool [R]. Section 3.1: IoU 0.5.
        """
        boxes = jnp.concatenate([boxes, truth])
        there = jnp.concatenate([there, real])
        index, positive, negative = ops.match(truth, real, boxes, 0.5, 0.5)
        ask = self.detections
        place, is_positive, counts = ops.sample(
            rng, positive & there, negative & there, ask.rois, ask.positives
        )
        rois = {"rois": boxes[place], "index": index[place]}
        return {**rois, "positive": is_positive, "counts": counts}

    def align(self, levels: dict[str, jax.Array], size: int, rois: jax.Array) -> jax.Array:
        """Features of rois [B,R,4]: [B,R,size,size,C]."""
        used = [f"p{i}" for i in LEVELS[:-1]]
        level = level_of(rois, LEVELS[0], LEVELS[-2], self.canonical) - LEVELS[0]
        strides = [2**i for i in LEVELS[:-1]]
        one = partial(roi_align, size=size, samples=self.samples, aligned=self.aligned)
        each = jax.vmap(lambda maps, box, k: one(maps, strides, box, k))
        return each([levels[key] for key in used], rois, level)

    def detect(
        self,
        size: tuple[int, int],
        rois: jax.Array,
        there: jax.Array,
        logits: jax.Array,
        codes: jax.Array,
    ) -> dict[str, jax.Array]:
        """boxes [M,4], scores [M] and kinds [M], 1 .. T or -1 for none, of RoIs [P,4] of an image.

        Each RoI may be an object of each class.
        """
        scores = jax.nn.softmax(logits)[:, 1:]
        boxes = ops.clip(ops.decode(codes[:, 1:], rois[:, None], BOX_WEIGHTS), size)
        good = there[:, None] & (ops.sides(boxes) >= 1e-2).all(-1)
        return self.select(boxes, jnp.where(good, scores, -jnp.inf))

    def select(self, boxes: jax.Array, scores: jax.Array) -> dict[str, jax.Array]:
        """What `detect` returns, of the boxes [P,T,4] and probabilities [P,T] of all kinds."""
        ask = self.detections
        return self.best(boxes, scores, least=ask.score, iou=ask.iou, by_kind=True)

    def best(
        self, boxes: jax.Array, scores: jax.Array, *, least: float, iou: float, by_kind: bool
    ) -> dict[str, jax.Array]:
        """Those with a score above `least`, after an NMS of each kind alone or of all at once."""
        ask = self.detections
        kinds = jnp.broadcast_to(jnp.arange(1, scores.shape[1] + 1), scores.shape)
        kept = jnp.where(scores > least, scores, -jnp.inf)
        score, place = ops.top(kept.reshape(-1), ask.candidates)
        boxes, kinds = boxes.reshape(-1, 4)[place], kinds.reshape(-1)[place]
        stays = ops.nms(boxes, score, iou, kinds if by_kind else None)
        score, place = ops.top(jnp.where(stays, score, -jnp.inf), ask.count)
        found = score > -jnp.inf
        return {
            "boxes": jnp.where(found[:, None], boxes[place], 0),
            "scores": jnp.where(found, score, 0),
            "kinds": jnp.where(found, kinds[place], -1),
        }


def flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])


def unflat(like: jax.Array, x: jax.Array) -> jax.Array:
    return x.reshape(*like.shape[:2], *x.shape[1:])


def of_kind(masks: jax.Array, kinds: jax.Array) -> jax.Array:
    """Those of masks [B,R,m,m,T+1] that are drawn for kinds [B,R]: [B,R,m,m]."""
    own = jnp.maximum(kinds, 0)[:, :, None, None, None]
    return jnp.take_along_axis(masks, own, axis=-1)[..., 0]


def thing(batch: dict[str, jax.Array], num_classes: int, things: tuple[int, ...]) -> jax.Array:
    """What the network calls each object of a batch: int32 [B,N], 1 .. T; 0 for none and crowds."""
    order = np.zeros(num_classes + 1, np.int32)  # the last for the empty slot, -1
    ids = things or range(num_classes)
    order[list(ids)] = 1 + np.arange(len(ids))
    order[-1] = 0  # of a class of the network's own, too
    kind = jnp.asarray(order)[batch["classes"]]
    return jnp.where(batch["crowd"], 0, kind)


def loss(
    outputs: dict[str, jax.Array],
    batch: dict[str, jax.Array],
    *,
    num_classes: int,
    things: tuple[int, ...],
    aligned: bool,
    anchors: int = 256,  # drawn for each image; Ren et al. 2015, section 3.1.3
    beta: float = 1 / 9,  # of the smooth L1 loss of proposals; 0: L1 (detectron2)
    box_beta: float = 1 / 9,  # of that of RoIs
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L = L_cls + L_box + L_mask (section 3), and the two of the proposals, all with weight 1.

    The objectness of anchors drawn one to one, and the boxes of the positive ones; the class of the
    RoIs, and of the positive ones the box and the mask of the true class alone. Both boxes' losses
    are divided by all that were drawn.
    """
    kind = thing(batch, num_classes, things)
    rng = batch["rng"] if "rng" in batch else jax.random.key(0)
    keys = jax.random.split(jax.random.fold_in(rng, 1), len(kind))
    rpn = jax.vmap(partial(anchor_losses, jnp.asarray(outputs["anchors"]), anchors, beta))(
        keys, batch["boxes"], kind, outputs["objectness"], outputs["anchor_codes"]
    )
    roi = jax.vmap(partial(roi_losses, aligned, box_beta))(
        {key: batch[key] for key in ("boxes", "masks")},
        kind,
        {key: outputs[key] for key in ("rois", "index", "positive", "counts")},
        *(outputs[key] for key in ("logits", "codes", "mask_logits")),
    )
    sums = jax.tree.map(jnp.sum, {**rpn, **roi})
    shares = {
        "objectness_loss": sums["objectness"] / jnp.maximum(sums["anchors"], 1),
        "proposal_loss": sums["proposal"] / jnp.maximum(sums["anchors"], 1),
        "class_loss": sums["class"] / jnp.maximum(sums["rois"], 1),
        "box_loss": sums["box"] / jnp.maximum(sums["rois"], 1),
        "mask_loss": sums["mask"] / jnp.maximum(sums["positives"], 1),
    }
    positives = sums["positives"] / len(kind)  # RoIs an image that show an object
    return sum(shares.values()), {"loss": sum(shares.values()), **shares, "positives": positives}


def anchor_losses(
    anchors: jax.Array,
    count: int,
    beta: float,
    rng: jax.Array,
    boxes: jax.Array,
    kind: jax.Array,
    objectness: jax.Array,
    codes: jax.Array,
) -> dict[str, jax.Array]:
    """Sums over the anchors drawn in one image, and their number."""
    index, positive, negative = ops.match(boxes, kind > 0, anchors, 0.7, 0.3, best_too=True)
    place, positive, counts = ops.sample(rng, positive, negative, count, 0.5)
    target = ops.encode(boxes[index[place]], anchors[place])
    wrong = jnp.where(positive[:, None], smooth_l1(codes[place] - target, beta), 0)
    said = binary_cross_entropy(objectness[place], positive)
    return {
        "objectness": jnp.where(counts, said, 0).sum(),
        "proposal": wrong.sum(),
        "anchors": counts.sum(),
    }


def roi_losses(
    aligned: bool,
    beta: float,
    truth: dict[str, jax.Array],
    kind: jax.Array,
    drawn: dict[str, jax.Array],
    logits: jax.Array,
    codes: jax.Array,
    mask_logits: jax.Array,
) -> dict[str, jax.Array]:
    """Sums over the RoIs drawn in one image, and how many they and the positive ones are."""
    rois, index, positive, counts = (drawn[k] for k in ("rois", "index", "positive", "counts"))
    label = jnp.where(positive, kind[index], 0)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)[:, 0]
    own = jnp.take_along_axis(codes, label[:, None, None], axis=1)[:, 0]
    target = ops.encode(truth["boxes"][index], rois, BOX_WEIGHTS)
    wrong = jnp.where(positive[:, None], smooth_l1(own - target, beta), 0)
    slots, size = mask_logits.shape[:2]
    shape = crop_masks(truth["masks"], index[:slots], rois[:slots], size, aligned=aligned)
    drawn_as = jnp.take_along_axis(mask_logits, label[:slots, None, None, None], axis=-1)[..., 0]
    mask = binary_cross_entropy(drawn_as, shape).mean((1, 2))
    return {
        "class": -jnp.where(counts, log_p, 0).sum(),
        "box": wrong.sum(),
        "mask": jnp.where(positive[:slots], mask, 0).sum(),
        "rois": counts.sum(),
        "positives": positive.sum(),
    }


def predict(
    outputs: dict[str, jax.Array],
    image: jax.Array,
    *,
    num_classes: int,
    things: tuple[int, ...],
    aligned: bool,
    mask_threshold: float,
) -> dict[str, dict[str, jax.Array]]:
    """instances: masks bool [B,M,H,W], boxes, scores and classes [B,M], -1 = none, of image
    [B,H,W,C]. Section 3.1, inference."""
    ids = jnp.asarray([-1, *(things or range(num_classes))], jnp.int32)
    kinds = outputs["kinds"]

    def draw(one: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits, boxes = one  # of one slot of all images: the masks of all slots would be 4 times
        drawn = paste(jax.nn.sigmoid(logits), boxes, image.shape[1:3], whole=not aligned)
        return drawn >= mask_threshold if aligned else drawn > mask_threshold

    slots = (outputs["mask_logits"].swapaxes(0, 1), outputs["boxes"].swapaxes(0, 1))
    masks = jax.lax.map(draw, slots).swapaxes(0, 1) & (kinds > 0)[..., None, None]
    return {
        "instances": {
            "masks": masks,
            "boxes": outputs["boxes"],
            "scores": outputs["scores"],
            "classes": ids[jnp.maximum(kinds, 0)],
        }
    }
