"""Losses of networks that find objects: of categories, of boxes, and of whole masks."""

import jax
import jax.numpy as jnp


def sigmoid_focal(
    logits: jax.Array, truth: jax.Array, gamma: float = 2.0, alpha: float = 0.25
) -> jax.Array:
    """-alpha_t (1 - p_t)^gamma log p_t of every logit: float32, in the shape of logits.

    truth: bool, in the same shape. Lin, Goyal, Girshick, He, Dollar, ICCV 2017, arXiv:1708.02002,
    Eq. 5: each category is a binary choice, and alpha weighs the true ones.
    """
    logits = logits.astype(jnp.float32)
    sign = jnp.where(truth, 1.0, -1.0)
    miss = jax.nn.sigmoid(-sign * logits)  # 1 - p_t
    weight = jnp.where(truth, alpha, 1 - alpha)
    return weight * miss**gamma * jax.nn.softplus(-sign * logits)


def binary_cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """-log p of true targets, -log(1 - p) of the others, of every logit; target bool or 0..1."""
    return jax.nn.softplus(logits) - logits * target


def smooth_l1(x: jax.Array, beta: float) -> jax.Array:
    """x^2 / (2 beta) below beta, |x| - beta / 2 above: Girshick 2015, arXiv:1504.08083, Eq. 3."""
    size = jnp.abs(x)
    return jnp.where(size < beta, x**2 / (2 * beta or 1), size - beta / 2)


def mask_dice(p: jax.Array, truth: jax.Array, epsilon: float = 1e-3) -> jax.Array:
    """1 - 2 sum(p g) / (sum(p^2) + sum(g^2)) of each mask: p float, truth bool [...,h,w] -> [...].

    V-Net (Milletari, Navab, Ahmadi, 3DV 2016, arXiv:1606.04797); SOLO, Eq. 3. epsilon is added to
    both sums of squares, as in the authors' code.
    """
    p, pixels = p.astype(jnp.float32), (-2, -1)
    hit = jnp.where(truth, p, 0).sum(pixels)
    return 1 - 2 * hit / ((p * p).sum(pixels) + truth.sum(pixels) + 2 * epsilon)
