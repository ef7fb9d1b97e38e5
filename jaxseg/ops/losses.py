"""Pixel losses: a map of logits against the true class of every pixel.

All take logits [...,K] of any float dtype, computed in float32, and label [...], integers
0 .. K - 1 or `ignore`, and return a float32 scalar. Ignored pixels count nowhere and the logits
under them never matter, even if inf or NaN; when every pixel is ignored the loss and its gradient
are 0. Any other label out of range gives NaN, since JAX cannot raise there.

- `cross_entropy`, `top_k`, `ohem` and `focal` are means over pixels. `class_weights`, K numbers, or
  None or empty for none, weigh the pixels of each class; `weight_map`, float and shaped as label,
  multiplies the loss of each pixel (U-Net's borders). `reduction` says what divides the sum of the
  weighted losses:
    "mean"      the sum of the class weights of the pixels that count, as torch.nn.CrossEntropyLoss
    "mean_all"  the number of all pixels, ignored ones too: MMSegmentation (avg_non_ignore=False)
    "sum"       nothing: FCN, whose learning rate is 1e-10 for that reason
  Logits [B,h,w,K] of another resolution than label [B,H,W] are interpolated bilinearly, with
  `align_corners` or without, in blocks: [B,H,W,K] numbers never exist at once (`ops.nll`).
- `dice`, `tversky` and `lovasz_softmax` compare the regions of each class over the whole batch, and
  are means over the classes that the truth has, weighted by `class_weights` where given.

All raise InputError, when traced, for a number of class weights other than K and for a `weight_map`
of another shape than label.
"""

import dataclasses
import math
from collections.abc import Sequence
from numbers import Real

import jax
import jax.numpy as jnp

from jaxseg.errors import InputError, unknown
from jaxseg.ops.nll import clean, is_class, nll, upsampled_nll
from jaxseg.ops.resize import resize

REDUCTIONS = ("mean", "mean_all", "sum")


def cross_entropy(
    logits: jax.Array,
    label: jax.Array,
    *,
    class_weights: Sequence[float] | None = None,
    weight_map: jax.Array | None = None,
    reduction: str = "mean",
    ignore: int = 255,
    align_corners: bool = False,
) -> jax.Array:
    """Softmax cross entropy, in nats: -log p of the true class."""
    loss, weight, scale = _pixels(logits, label, class_weights, weight_map, ignore, align_corners)
    return _reduce(loss * scale, weight, reduction, label.size)


def top_k(
    logits: jax.Array,
    label: jax.Array,
    *,
    keep: float = 0.2,
    class_weights: Sequence[float] | None = None,
    weight_map: jax.Array | None = None,
    reduction: str = "mean",
    ignore: int = 255,
    align_corners: bool = False,
) -> jax.Array:
    """Bootstrapped cross entropy: of the k = int(keep * all pixels) largest weighted losses.

    k is of the whole batch. "mean" is over those of the k that count, as in the authors' code of
    DeepLab; "mean_all" is over k, as in detectron2's hard pixel mining. Pixels that tie for the
    last places share them.
    """
    loss, weight, scale = _pixels(logits, label, class_weights, weight_map, ignore, align_corners)
    k = max(1, int(keep * label.size))
    kept = _hardest(loss * scale * weight, weight > 0, k)
    return _reduce(loss * scale, weight * kept, reduction, k)


def ohem(
    logits: jax.Array,
    label: jax.Array,
    *,
    threshold: float = 0.7,
    min_kept: int = 100_000,
    class_weights: Sequence[float] | None = None,
    weight_map: jax.Array | None = None,
    reduction: str = "mean",
    ignore: int = 255,
    align_corners: bool = False,
) -> jax.Array:
    """Online hard example mining: cross entropy where the true class has p < threshold.

    At least the `min_kept` pixels an image of smallest p are kept: min_kept * B of the whole batch,
    label [B,...]. "mean" is over the kept pixels, as in HRNet's OhemCrossEntropy; "mean_all" is
    over all, as in MMSegmentation. Those two drop the easiest pixel where fewer than min_kept
    count; here all are kept.
    """
    loss, weight, scale = _pixels(logits, label, class_weights, weight_map, ignore, align_corners)
    kept = _hardest(loss, weight > 0, min_kept * label.shape[0])
    kept = jnp.maximum(kept, loss > -math.log(threshold))
    return _reduce(loss * scale, weight * kept, reduction, label.size)


def focal(
    logits: jax.Array,
    label: jax.Array,
    *,
    gamma: float = 2.0,
    class_weights: Sequence[float] | None = None,
    weight_map: jax.Array | None = None,
    reduction: str = "mean",
    ignore: int = 255,
    align_corners: bool = False,
) -> jax.Array:
    """Softmax focal loss, -(1 - p)^gamma log p of the true class.

    Lin, Goyal, Girshick, He, Dollar, ICCV 2017, arXiv:1708.02002, Eq. 4; their alpha is
    `class_weights`.
    """
    loss, weight, scale = _pixels(logits, label, class_weights, weight_map, ignore, align_corners)
    miss = -jnp.expm1(-loss)  # 1 - p, without cancellation
    miss = jnp.maximum(miss, jnp.finfo(jnp.float32).tiny)  # 0^gamma has no slope for gamma < 1
    return _reduce(miss**gamma * loss * scale, weight, reduction, label.size)


def dice(
    logits: jax.Array,
    label: jax.Array,
    *,
    class_weights: Sequence[float] | None = None,
    ignore: int = 255,
) -> jax.Array:
    """Soft Dice loss, 1 - 2 sum(p g) / (sum(p) + sum(g)), g = 1 at the pixels of the class.

    The denominator is that of segmentation_models_pytorch; V-Net (Milletari, Navab, Ahmadi, 3DV
    2016, arXiv:1606.04797), where the loss is from, sums p^2 and g^2. No smoothing constant.
    """
    return tversky(logits, label, alpha=0.5, beta=0.5, class_weights=class_weights, ignore=ignore)


def tversky(
    logits: jax.Array,
    label: jax.Array,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    class_weights: Sequence[float] | None = None,
    ignore: int = 255,
) -> jax.Array:
    """1 - TP / (TP + alpha FP + beta FN), of probabilities; both 0.5 is Dice, both 1 is Jaccard.

    Salehi, Erdogmus, Gholipour, MLMI 2017, arXiv:1706.05721, Eq. 2; alpha and beta as in their best
    result.
    """
    logits, label, counted = clean(logits, label, ignore)
    p = jnp.where(counted[..., None], jax.nn.softmax(logits), 0)
    truth = is_class(label, logits.shape[-1]) & counted[..., None]
    pixels = tuple(range(label.ndim))
    hit = jnp.where(truth, p, 0).sum(pixels)  # [K]
    size = truth.sum(pixels)
    false = alpha * (p.sum(pixels) - hit) + beta * (size - hit)
    absent = size == 0
    return _over_classes(1 - hit / (hit + false + absent), ~absent, class_weights)


def lovasz_softmax(
    logits: jax.Array,
    label: jax.Array,
    *,
    class_weights: Sequence[float] | None = None,
    ignore: int = 255,
) -> jax.Array:
    """Lovasz-softmax: the convex extension of 1 - IoU, of the errors of the probabilities.

    Berman, Rannen Triki, Blaschko, CVPR 2018, arXiv:1705.08790, with classes="present" and
    per_image=False of their code. Sorts all pixels once for every class that is present.
    """
    logits, label, counted = clean(logits, label, ignore)
    classes = logits.shape[-1]
    label, counted = label.ravel(), counted.ravel()
    p = jax.nn.softmax(logits).reshape(-1, classes).T  # [K,N]
    truth = (label == jnp.arange(classes)[:, None]) & counted
    error = jnp.where(truth, 1 - p, p) * counted
    # One class at a time: the sort's memory is that of one.
    slope = jax.lax.map(
        lambda row: _lovasz_slope(*row, counted), (jax.lax.stop_gradient(error), truth)
    )
    return _over_classes((slope * error).sum(1), truth.any(1), class_weights)


# Name -> (function, the fields of PixelLoss that it takes); those with a reduction take a map too.
LOSSES = {
    "cross_entropy": (cross_entropy, ("reduction",)),
    "top_k": (top_k, ("reduction", "keep")),
    "ohem": (ohem, ("reduction", "threshold", "min_kept")),
    "focal": (focal, ("reduction", "gamma")),
    "dice": (dice, ()),
    "tversky": (tversky, ("alpha", "beta")),
    "lovasz": (lovasz_softmax, ()),
}


@dataclasses.dataclass(frozen=True)
class PixelLoss:
    """Which loss compares a map of logits with the truth, and how: the section `loss.pixel`.

    Raises InputError for a name or a number that no loss could use.
    """

    name: str = "cross_entropy"  # or "top_k", "ohem", "focal", "dice", "tversky", "lovasz"
    class_weights: tuple = ()  # one number a class; () = all 1
    reduction: str = "mean"  # or "mean_all", "sum"; of losses that are means over pixels
    keep: float = 0.2  # top_k: fraction of all pixels; 0.2 in Panoptic-DeepLab and detectron2
    threshold: float = 0.7  # ohem: probability of the true class, MMSegmentation's
    min_kept: int = 100_000  # ohem: pixels an image, MMSegmentation's for crops of 512x1024
    gamma: float = 2.0  # focal: exponent; the best of Lin et al. 2017
    alpha: float = 0.3  # tversky: cost of a false positive; Salehi et al. 2017
    beta: float = 0.7  # tversky: cost of a false negative
    dice_weight: float = 0.0  # adds so many times Dice, without class weights; MMSegmentation: 3

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise unknown("loss.pixel.name", self.name, LOSSES)
        if self.reduction not in REDUCTIONS:
            raise unknown("loss.pixel.reduction", self.reduction, REDUCTIONS)
        weights = self.class_weights
        rules = {
            "class_weights": (
                all(isinstance(w, Real) and 0 <= w < math.inf for w in weights)
                and (any(weights) or not weights),
                "needs a number >= 0 for each class, not all 0",
            ),
            "reduction": (
                self.reduction == "mean" or "reduction" in LOSSES[self.name][1],
                f'needs "mean": {self.name} is a mean over classes, not over pixels',
            ),
            "keep": (0 < self.keep <= 1, "needs a fraction, 0 < keep <= 1"),
            "threshold": (0 < self.threshold <= 1, "needs a probability, 0 < threshold <= 1"),
            "min_kept": (self.min_kept >= 0, "needs 0 or more pixels"),
            "gamma": (0 <= self.gamma < math.inf, "needs 0 or more"),
            "alpha": (0 < self.alpha < math.inf, "needs a positive number"),
            "beta": (0 < self.beta < math.inf, "needs a positive number"),
            "dice_weight": (0 <= self.dice_weight < math.inf, "needs 0 or more"),
        }
        for key, (holds, rule) in rules.items():
            if not holds:
                raise InputError(f"loss.pixel.{key} is {getattr(self, key)!r}: {rule}")

    def __call__(
        self,
        logits: jax.Array,
        label: jax.Array,
        weight_map: jax.Array | None = None,
        align_corners: bool = False,
    ) -> jax.Array:
        """The loss of logits [...,K] and label [...], 255 = ignore; weight_map float [...] or None.

        Logits [B,h,w,K] of another resolution than label [B,H,W] are interpolated.

        Raises InputError, when traced, as the losses do, and for a weight_map with a loss that is a
        mean over classes.
        """
        function, fields = LOSSES[self.name]
        options = {key: getattr(self, key) for key in fields}
        whole = logits
        if logits.shape[:-1] != label.shape:
            whole = resize(logits.astype(jnp.float32), label.shape[1:], align_corners)
        if "reduction" in fields:  # these interpolate by themselves, with less memory
            options |= {"weight_map": weight_map, "align_corners": align_corners}
        elif weight_map is not None:
            raise InputError(
                f'loss.pixel.name is "{self.name}": pixels with a weight each need one of '
                + ", ".join(name for name, (_, keys) in LOSSES.items() if "reduction" in keys)
            )
        given = logits if "reduction" in fields else whole
        value = function(given, label, class_weights=self.class_weights, **options)
        return value + self.dice_weight * dice(whole, label) if self.dice_weight else value


def _pixels(
    logits: jax.Array,
    label: jax.Array,
    class_weights: Sequence[float] | None,
    weight_map: jax.Array | None,
    ignore: int,
    align_corners: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | float]:
    """(-log p of the true class, its weight or 0 where ignored, the map or 1): float32 [...]."""
    if weight_map is not None and weight_map.shape != label.shape:  # would broadcast in silence
        raise InputError(
            f"weight_map is {weight_map.shape}: needs the shape of label, {label.shape}"
        )
    classes = logits.shape[-1]
    if logits.shape[:-1] == label.shape:
        logits, known, counted = clean(logits, label, ignore)
        loss, _ = nll(logits, known)
    else:
        loss, counted = upsampled_nll(logits, label, align_corners, ignore), label != ignore
        known = jnp.clip(label, 0, classes - 1)
    weight = counted.astype(jnp.float32)
    if class_weights:
        weight *= _table(class_weights, classes)[known]
    scale = 1.0 if weight_map is None else jnp.where(counted, weight_map.astype(jnp.float32), 0)
    return loss, weight, scale


def _table(class_weights: Sequence[float], classes: int) -> jax.Array:
    if len(class_weights) != classes:  # indexing would clamp in silence
        raise InputError(
            f"{len(class_weights)} class_weights for {classes} classes: needs one each"
        )
    return jnp.asarray(class_weights, jnp.float32)


def _reduce(loss: jax.Array, weight: jax.Array, reduction: str, pixels: int) -> jax.Array:
    """The sum of weight * loss, over the sum of the weights, the number of pixels, or 1."""
    if reduction not in REDUCTIONS:
        raise unknown("reduction", reduction, REDUCTIONS)
    total = (weight * loss).sum()
    if reduction == "sum":
        return total
    if reduction == "mean_all":
        return total / pixels
    weights = weight.sum()
    return total / jnp.where(weights > 0, weights, 1)


def _over_classes(
    loss: jax.Array, present: jax.Array, class_weights: Sequence[float] | None
) -> jax.Array:
    """The mean loss [K] of the classes present [K]."""
    weight = present.astype(jnp.float32)
    if class_weights:
        weight *= _table(class_weights, len(loss))
    return _reduce(loss, weight, "mean", 0)


def _hardest(loss: jax.Array, counted: jax.Array, k: int) -> jax.Array:
    """The k largest losses (>= 0) of those that count: 1 there, 0 elsewhere, float32 [...].

    Where several tie for the last places, each has its share of them. The k-th largest is found
    bit by bit, as floats >= 0 are ordered like their bits: 31 sums, where a sort of the whole batch
    would be slower and gather it from all devices.
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(jax.lax.stop_gradient(loss)), jnp.int32)
    bits = jnp.where(counted, bits, -1)
    places = jnp.minimum(counted.sum(), min(k, loss.size))

    def set_bit(i: int, found: jax.Array) -> jax.Array:
        candidate = found | (1 << (30 - i))
        return jnp.where((bits >= candidate).sum() >= places, candidate, found)

    last = jax.lax.fori_loop(0, 31, set_bit, jnp.int32(0))
    above, tied = bits > last, bits == last
    share = (places - above.sum()) / jnp.maximum(tied.sum(), 1)
    return jnp.where(above, 1.0, jnp.where(tied, share, 0.0))


def _lovasz_slope(error: jax.Array, truth: jax.Array, counted: jax.Array) -> jax.Array:
    """The loss of one class by the error of each pixel, [N]; zeros where the class is absent.

    From the largest error on, each pixel adds to the mistakes: 1 - I / U grows by 1 / U where it
    takes one from the intersection I (truth), by I / (U (U - 1)) where it adds one to the union U.
    Written so, since differences of neighbouring 1 - I / U would lose all digits.
    """

    def sort() -> jax.Array:
        index = jnp.arange(error.size, dtype=jnp.int32)
        # Floats >= 0 are ordered like their bits, and integers are sorted faster.
        falling = jnp.where(counted, -jax.lax.bitcast_convert_type(error, jnp.int32), 1)
        _, order = jax.lax.sort((falling, index), num_keys=1, is_stable=False)
        lost = truth[order]
        missed, size = jnp.cumsum(lost, dtype=jnp.int32), truth.sum()
        left = (size - missed).astype(jnp.float32)
        union = (size + index + 1 - missed).astype(jnp.float32)
        slope = jnp.where(lost, 1 / union, left / (union * (union - 1)))
        return jnp.zeros_like(error).at[order].set(slope, unique_indices=True)

    return jax.lax.cond(truth.any(), sort, lambda: jnp.zeros_like(error))
