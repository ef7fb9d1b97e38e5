"""UPSNet: A Unified Panoptic Segmentation Network. Xiong, Liao, Zhao, Hu, Bai, Yumer, Urtasun. CVPR
2019, arXiv:1901.03784; on Mask R-CNN.

A semantic head and Mask R-CNN's heads look at one pyramid, and a panoptic head without parameters
weighs their logits against each other (section 3, Fig. 1 to 3). With S stuff classes and N objects,
each of a class c and with a box:

    p2 .. p5 -> deformable 3x3 convolutions, shared -> to stride 4, side by side [B,H/4,W/4,512]
      -> semantic_logits [B,H/4,W/4,K]
    semantic_logits of stuff --------------------------------------> logits 0 .. S - 1
    semantic_logits of c in the box, 0 outside + mask logits, pasted -> logits S .. S + N - 1
    max of semantic_logits of things - max of those in the boxes -> unknown, logit S + N

The largest logit is the pixel's; unknown is void. In training the objects are the true ones of
which some are hidden, so that there are pixels to learn "unknown" from.

Differs from the paper: where no object is there, the second maximum of "unknown" is 0; RoIs of the
semantic loss are cut out of the logits, which is the same, as both steps are linear. The authors'
code divides its cross entropies by all pixels, and not by those that count.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.backbones.fpn import FPN
from jaxseg.backbones.layers import Conv, he_normal
from jaxseg.errors import InputError
from jaxseg.models import maskrcnn
from jaxseg.ops import boxes as ops
from jaxseg.ops import centres
from jaxseg.ops.deform import deform_conv
from jaxseg.ops.losses import cross_entropy
from jaxseg.ops.panoptic_quality import STEP
from jaxseg.ops.resize import resize
from jaxseg.ops.roi import roi_align

NOBODY = -1e9  # the logit of an empty slot
ROI = 28  # bins of the semantic loss of objects; the authors' code


class DeformConv(nn.Module):
    """A deformable 3x3 convolution whose offsets are a 3x3 convolution, 0 at first."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        offset = Conv(18, 3, kernel_init=nn.initializers.zeros, name="offset")(x)
        kernel = self.param("kernel", he_normal, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return deform_conv(x, offset, kernel.astype(x.dtype), padding=((1, 1), (1, 1))) + bias


class Semantic(nn.Module):
    """{"p2": [B,h,w,C], .., "p5"} -> logits [B,h,w,K] float32. Section 3, Fig. 2."""

    num_classes: int
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, levels: dict[str, jax.Array]) -> jax.Array:
        layers = [DeformConv(w, name=f"deform{i}") for i, w in enumerate(self.widths, start=1)]
        size, parts = levels["p2"].shape[1:3], []
        for x in (levels[f"p{i}"] for i in (2, 3, 4, 5)):
            for layer in layers:
                x = nn.relu(layer(x))
            parts.append(resize(x, size))
        init = nn.initializers.normal(0.01)
        score = Conv(self.num_classes, 1, kernel_init=init, name="classifier")
        return score(jnp.concatenate(parts, axis=-1)).astype(jnp.float32)


class Model(maskrcnn.Model):
    """image [B,H,W,C] -> Mask R-CNN's outputs, semantic_logits [B,h,w,K] at stride 4, and
    object_masks [B,N,28,28], logits of the true objects in training, of the unified ones else."""

    semantic: tuple[int, ...] = (256, 128, 128)  # deformable convolutions; Cityscapes: (128, 128)
    scene: bool = True  # p5 sees the mean of c5 too; not for Cityscapes
    keep: float = 0.7  # share of the true objects that are not hidden; section 3
    score: float = 0.6  # the probability of an object that enters the panoptic head
    iou: float = 0.5  # of their NMS, over all classes at once
    overlap: float = 0.3  # share of a mask that better ones of its class may hold
    stuff_area: int = 4096  # fewer pixels of a stuff class in an image are void; Cityscapes: 2048

    def check(self) -> None:
        """Raises InputError for Mask R-CNN's reasons, and where objects have too many numbers."""
        super().check()
        if self.detections.count >= STEP:
            raise InputError(
                f"model.detections.count is {self.detections.count}: a panoptic map numbers the "
                f"objects of an image below {STEP}, use at most {STEP - 1}"
            )

    @nn.compact
    def __call__(
        self, image: jax.Array, truth: dict[str, jax.Array] | None = None, *, train: bool
    ) -> dict[str, jax.Array]:
        levels = self.pyramid(image, train)
        outputs, draw = self.find(levels, image.shape[1:3], truth)
        semantic = Semantic(self.num_classes, self.semantic, name="semantic_head")
        outputs["semantic_logits"] = semantic(levels)
        given = {"boxes": "object_boxes", "kind": "object_kinds"}
        boxes, kinds = (outputs[v] if truth is None else truth[k] for k, v in given.items())
        return {**outputs, "object_masks": maskrcnn.of_kind(draw(boxes), kinds)}

    def fpn(self) -> FPN:
        return FPN(self.features, scene=self.scene, name="fpn")

    def select(self, boxes: jax.Array, scores: jax.Array) -> dict[str, jax.Array]:
        """Mask R-CNN's objects of one image, and object_boxes, object_scores, object_kinds: those
        of the panoptic head, sure ones that suppress each other whatever their classes."""
        sure = self.best(boxes, scores, least=self.score, iou=self.iou, by_kind=False)
        return super().select(boxes, scores) | {f"object_{k}": x for k, x in sure.items()}


def split(num_classes: int, things: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """(stuff, things): class ids; no `things` means that all classes are."""
    things = list(things) or list(range(num_classes))
    return [k for k in range(num_classes) if k not in things], things


def panoptic_logits(
    semantic: jax.Array,
    boxes: jax.Array,
    masks: jax.Array,
    kinds: jax.Array,
    num_classes: int,
    things: tuple[int, ...],
) -> jax.Array:
    """The panoptic head, of one image: float32 [h,w,S+N+1]. Section 3.

    semantic [h,w,K]; boxes [N,4] in pixels of this map; masks [N,28,28], logits; kinds int32 [N],
    1 .. T, others for an empty slot.
    """
    stuff, ids = split(num_classes, things)
    there = kinds > 0
    own = jax.nn.one_hot(jnp.asarray([-1, *ids])[jnp.maximum(kinds, 0)], num_classes)
    inside = within(boxes, semantic.shape[:2])
    seen = jnp.einsum("hwk,nk->nhw", semantic, own, precision=jax.lax.Precision.HIGHEST)
    seen = jnp.where(inside, seen, 0)
    most = jnp.where(there[:, None, None], seen, -jnp.inf).max(0)
    unknown = semantic[..., np.array(ids)].max(-1) - jnp.where(there.any(), most, 0)
    objects = jnp.where(there[:, None, None], seen + paste(masks, boxes, inside), NOBODY)
    parts = [semantic[..., np.array(stuff, int)], jnp.moveaxis(objects, 0, -1), unknown[..., None]]
    return jnp.concatenate(parts, axis=-1)


def within(boxes: jax.Array, size: tuple[int, int]) -> jax.Array:
    """bool [N,h,w]: the pixels that boxes [N,4] touch."""
    rows, columns = (
        (jnp.arange(n) + 1 > boxes[:, a, None]) & (jnp.arange(n) < boxes[:, a + 2, None])
        for a, n in enumerate(size)
    )
    return rows[:, :, None] & columns[:, None]


def paste(masks: jax.Array, boxes: jax.Array, inside: jax.Array) -> jax.Array:
    """Masks [N,m,m] stretched over their boxes [N,4], bilinear: [N,h,w]; 0 where not inside.

    What lies at the border of a mask goes on to the border of its box.
    """
    cells = masks.shape[-1]

    def hats(axis: int, pixels: int) -> jax.Array:
        start, end = boxes[:, axis, None], boxes[:, axis + 2, None]
        at = (jnp.arange(pixels) + 0.5 - start) / jnp.maximum(end - start, 1e-6) * cells - 0.5
        at = jnp.clip(at, 0, cells - 1)
        return jnp.maximum(0, 1 - jnp.abs(at[..., None] - jnp.arange(cells)))

    exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    drawn = exact("nyp,npq->nyq", hats(0, inside.shape[1]), masks)
    return jnp.where(inside, exact("nxq,nyq->nyx", hats(1, inside.shape[2]), drawn), 0)


def panoptic_target(
    label: jax.Array, masks: jax.Array, kept: jax.Array, num_classes: int, things: tuple[int, ...]
) -> jax.Array:
    """Which of the panoptic head's logits is right: int32 [B,h,w], 0 .. S + N; -1 = ignored.

    label [B,h,w], masks [B,N,h,w], kept bool [B,N]: the objects that are not hidden. The pixels of
    things that are none of theirs are unknown.
    """
    stuff, _ = split(num_classes, things)
    table = np.full(256, len(stuff) + masks.shape[1], np.int32)
    table[stuff], table[255] = np.arange(len(stuff)), -1
    shown = (masks != 0) & kept[..., None, None]
    objects = len(stuff) + jnp.argmax(shown, axis=1)
    return jnp.where(shown.any(1) & (label != 255), objects, jnp.asarray(table)[label])


def loss(
    outputs: dict[str, jax.Array],
    batch: dict[str, jax.Array],
    *,
    num_classes: int,
    things: tuple[int, ...],
    aligned: bool,
    keep: float,
    anchors: int = 256,  # these three: Mask R-CNN's
    beta: float = 1 / 9,
    box_beta: float = 1.0,  # the authors' code
    semantic_weight: float = 0.2,  # COCO; Cityscapes: 1
    roi_weight: float = 0.04,  # COCO, the authors' code; Cityscapes: 0
    panoptic_weight: float = 0.1,  # COCO; Cityscapes: 0.5
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mask R-CNN's loss, and cross entropies: of the semantic logits at full size, of the same in
    the boxes of objects (`roi_loss`), and of the panoptic logits at stride 4. Section 3."""
    own = {"num_classes": num_classes, "things": things}
    theirs = {"aligned": aligned, "anchors": anchors, "beta": beta, "box_beta": box_beta}
    value, logs = maskrcnn.loss(outputs, batch, **own, **theirs)
    label, logits = batch["label"], outputs["semantic_logits"]
    kind = maskrcnn.thing(batch, num_classes, things)
    semantic = cross_entropy(full_size(logits, label.shape[1:]), label)
    roi = jax.vmap(roi_pixels)(logits, label, batch["boxes"], kind > 0)
    rng = batch["rng"] if "rng" in batch else jax.random.key(0)
    kept = jax.vmap(partial(show, keep))(
        jax.random.split(jax.random.fold_in(rng, 2), len(kind)), kind > 0
    )
    head = jax.vmap(partial(panoptic_logits, **own))(
        logits, batch["boxes"] / 4, outputs["object_masks"], jnp.where(kept, kind, 0)
    )
    small = label[:, ::4, ::4]
    head = head[:, : small.shape[1], : small.shape[2]]
    target = panoptic_target(small, batch["masks"][:, :, ::4, ::4], kept, **own)
    parts = {
        "semantic_loss": semantic,
        "roi_loss": cross_entropy(*roi),
        "panoptic_loss": cross_entropy(head, target, ignore=-1),
    }
    weights = (semantic_weight, roi_weight, panoptic_weight)
    value += sum(w * x for w, x in zip(weights, parts.values(), strict=True))
    return value, {**logs, **parts, "loss": value}


def full_size(logits: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Logits [B,h,w,K] at stride 4 -> [B,H,W,K], bilinear."""
    h, w = logits.shape[1:3]
    return resize(logits, (4 * h, 4 * w))[:, : size[0], : size[1]]


def roi_pixels(
    logits: jax.Array, label: jax.Array, boxes: jax.Array, there: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits [N,28,28,K] in the boxes [N,4] of one image, and the label [N,28,28] at the middle of
    each bin, ignored where no object is `there`."""
    level = jnp.zeros(len(boxes), jnp.int32)
    seen = roi_align([logits], [4], boxes, level, ROI)
    part = (np.arange(ROI) + 0.5) / ROI
    sides = ops.sides(boxes)[:, :, None]
    at = (boxes[:, :2, None] + sides * part).astype(jnp.int32)  # [N,2,28]
    rows, columns = (jnp.clip(at[:, a], 0, n - 1) for a, n in enumerate(label.shape))
    truth = label[rows[:, :, None], columns[:, None]]
    return seen, jnp.where(there[:, None, None], truth, 255)


def show(keep: float, rng: jax.Array, there: jax.Array) -> jax.Array:
    """bool [N]: a random share `keep` of the objects that are `there`, one at least."""
    draw = jnp.where(there, jax.random.uniform(rng, there.shape), 2)
    count = jnp.maximum(jnp.floor(keep * there.sum() + 1e-6), 1)
    return there & (jnp.argsort(jnp.argsort(draw)) < count)


def predict(
    outputs: dict[str, jax.Array],
    image: jax.Array,
    *,
    num_classes: int,
    things: tuple[int, ...],
    aligned: bool,
    mask_threshold: float,
    overlap: float,
) -> dict[str, jax.Array]:
    """semantic, logits, panoptic, and Mask R-CNN's instances, at the size of image [B,H,W,C]."""
    own = {"num_classes": num_classes, "things": things}
    size = image.shape[1:3]
    logits = full_size(outputs["semantic_logits"], size)
    given = [outputs[f"object_{key}"] for key in ("boxes", "masks", "kinds")]
    panoptic = jax.vmap(partial(unify, **own, overlap=overlap))(logits, *given)
    drawn = maskrcnn.predict(outputs, image, **own, aligned=aligned, mask_threshold=mask_threshold)
    semantic = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return {"semantic": semantic, "logits": logits, "panoptic": panoptic, **drawn}


def unify(
    semantic: jax.Array,
    boxes: jax.Array,
    masks: jax.Array,
    kinds: jax.Array,
    *,
    num_classes: int,
    things: tuple[int, ...],
    overlap: float,
) -> jax.Array:
    """The panoptic map int32 [H,W] of one image, from its objects, best first. Section 3.

    As in the authors' code, an object most of whose pixels look like one stuff class is that.
    """
    stuff, ids = split(num_classes, things)
    inside = within(boxes, semantic.shape[:2])
    kept = prune((paste(masks, boxes, inside) > 0) & inside, kinds, len(ids), overlap)
    kinds = jnp.where(kept, kinds, -1)
    choice = panoptic_logits(semantic, boxes, masks, kinds, num_classes, things).argmax(-1)
    count, slot = len(kinds), choice - len(stuff)
    owner = jnp.where((slot >= 0) & (slot < count), slot, -1).astype(jnp.int32)
    classes = jnp.asarray([ids[0], *ids])[jnp.maximum(kinds, 0)]

    looks = centres.votes(owner[None], semantic.argmax(-1)[None], count, num_classes)[0]  # [N,K]
    best = looks.argmax(-1)
    is_thing = jnp.asarray(np.isin(np.arange(num_classes), ids))
    is_stuff = ~is_thing[best] & (looks.max(-1) >= 0.5 * looks.sum(-1)) & (looks.sum(-1) > 0)
    taken = (owner >= 0) & is_stuff[owner]
    said = jnp.asarray([*stuff, ids[0]])[jnp.minimum(choice, len(stuff))]  # a thing: no stuff
    said = jnp.where(taken, best[owner], said)
    owner = jnp.where(taken, -1, owner)
    return centres.merge(said[None], owner[None], classes[None], is_thing)[0]


def prune(masks: jax.Array, kinds: jax.Array, count: int, overlap: float) -> jax.Array:
    """bool [N]: masks bool [N,H,W], best first, less those of which more than `overlap` belongs to
    earlier ones of their kind, 1 .. count."""

    def step(claimed: jax.Array, one: tuple[jax.Array, jax.Array]) -> tuple:
        mask, kind = one
        row = jnp.maximum(kind - 1, 0)
        shared, area = (claimed[row] & mask).sum(), mask.sum()
        stays = (kind > 0) & (area > 0) & (shared <= overlap * area)
        return claimed.at[row].set(claimed[row] | (mask & stays)), stays

    return jax.lax.scan(step, jnp.zeros((count, *masks.shape[1:]), bool), (masks, kinds))[1]
