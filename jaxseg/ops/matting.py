"""Soft masks: the loss of a network that tells how opaque each pixel is, and its errors."""

import jax
import jax.numpy as jnp

EPSILON = 1e-6  # Xu et al., Eq. 1
IGNORE = 255


def loss(
    logits: jax.Array, alpha: jax.Array, label: jax.Array, weight: float = 1.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross entropy with alpha for the truth, and `weight` times the alpha-prediction loss.

    That is the mean of sqrt((p - alpha)^2 + 1e-12), p the probability of class 1: Xu, Price, Cohen,
    Huang, "Deep Image Matting", CVPR 2017, arXiv:1703.03872, section 4.1, Eq. 1.

    logits: float32 [B,H,W,2]. alpha: [B,H,W], 0..1. label: [B,H,W], 255 = counts nowhere. Returns
    the sum, and both parts with it: `loss`, `ce_loss`, `alpha_loss`.
    """
    counted = label != IGNORE
    truth = jnp.stack([1 - alpha, alpha], axis=-1)
    entropy = -(truth * jax.nn.log_softmax(logits)).sum(-1)
    distance = jnp.sqrt((opacity(logits) - alpha) ** 2 + EPSILON**2)
    count = jnp.maximum(counted.sum(), 1)
    entropy, distance = (jnp.where(counted, x, 0).sum() / count for x in (entropy, distance))
    total = entropy + weight * distance
    return total, {"loss": total, "ce_loss": entropy, "alpha_loss": distance}


def opacity(logits: jax.Array) -> jax.Array:
    """logits [...,2] -> the probability of class 1, [...]."""
    return jax.nn.softmax(logits)[..., 1]


def sums(logits: jax.Array, alpha: jax.Array, label: jax.Array) -> jax.Array:
    """Of each image, where label [B,H,W] is not 255: the sums of |p - alpha| and of its square, and
    the pixels; float32 [B,3]."""
    counted = (label != IGNORE).astype(jnp.float32)
    difference = jnp.abs(opacity(logits) - alpha) * counted
    parts = (difference, difference**2, counted)
    return jnp.stack([part.sum((1, 2)) for part in parts], axis=-1)


def scores(totals: jax.Array, images: int) -> dict[str, float]:
    """Of the `sums` [3] of so many images: the mean absolute difference `MAD` and the mean squared
    one `MSE` over all pixels, and `SAD`, an image's sum in thousands on average."""
    absolute, squared, pixels = (float(total) for total in totals)
    pixels = max(pixels, 1.0)
    return {"MAD": absolute / pixels, "MSE": squared / pixels, "SAD": absolute / images / 1000}
