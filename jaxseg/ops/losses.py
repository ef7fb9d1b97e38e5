"""Pixel losses."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxseg.errors import InputError


def cross_entropy(
    logits: jax.Array,
    label: jax.Array,
    *,
    class_weights: Sequence[float] | None = None,
    ignore: int = 255,
) -> jax.Array:
    """Mean softmax cross-entropy of the pixels that are not ignored: a float32 scalar, in nats.

    logits [...,K] of any float dtype, computed in float32; label [...], integers 0 .. K - 1 or
    `ignore`. With `class_weights` (K numbers; None or empty for none) the mean is weighted,
    sum(w ce) / sum(w), as in `torch.nn.CrossEntropyLoss`. When every pixel is ignored the loss and
    its gradient are 0, and logits under ignored pixels never matter, even if inf or NaN.

    Any other label out of range has to be stopped where data enters: JAX raises nothing, a label
    of K or more turns the loss to NaN and -1 trains the last class.
    """
    valid = label != ignore
    # Before the logarithm and the gather: masking only the result would leave 0 * NaN gradients.
    label = jnp.where(valid, label, 0)
    logits = jnp.where(valid[..., None], logits, 0).astype(jnp.float32)
    target = jnp.take_along_axis(logits, label[..., None], axis=-1)[..., 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - target
    if class_weights:
        if len(class_weights) != logits.shape[-1]:  # indexing would clamp in silence
            raise InputError(
                f"{len(class_weights)} class_weights for {logits.shape[-1]} classes: needs one each"
            )
        weight = jnp.asarray(class_weights, jnp.float32)[label] * valid
    else:
        weight = valid.astype(jnp.float32)
    total = weight.sum()
    return (loss * weight).sum() / jnp.where(total > 0, total, 1)
