"""Small operations on images [B,H,W,C]."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def normalise(image: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """image [B,H,W,C] of 0..255, any dtype -> (image - mean) / std, float32; one number a channel."""
    return (image.astype(jnp.float32) - jnp.asarray(mean)) / jnp.asarray(std)


def centre(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """The central `size` (height, width) of [B,H,W,...]."""
    top, left = ((have - want) // 2 for have, want in zip(x.shape[1:3], size, strict=True))
    return x[:, top : top + size[0], left : left + size[1]]
