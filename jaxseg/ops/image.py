"""Small operations on images [B,H,W,C]."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def normalise(image: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """image [B,H,W,C] of 0..255, any dtype -> float32 (image - mean) / std of each channel."""
    return (image.astype(jnp.float32) - jnp.asarray(mean)) / jnp.asarray(std)


def centre(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """The central `size` (height, width) of [B,H,W,...]. Raises ValueError for a larger one."""
    if any(want > have for have, want in zip(x.shape[1:3], size, strict=True)):
        raise ValueError(f"the centre {tuple(size)} of {x.shape[1:3]}: use at most that")
    top, left = ((have - want) // 2 for have, want in zip(x.shape[1:3], size, strict=True))
    return x[:, top : top + size[0], left : left + size[1]]


def space_to_depth(x: jax.Array, block: int) -> jax.Array:
    """[B,H,W,C] -> [B,H/block,W/block,block*block*C]: each block of pixels becomes channels."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // block, block, w // block, block, c).swapaxes(2, 3)
    return x.reshape(b, h // block, w // block, block * block * c)


def depth_to_space(x: jax.Array, block: int) -> jax.Array:
    """The inverse of `space_to_depth`: [B,h,w,block*block*C] -> [B,h*block,w*block,C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, block, block, c // block**2).swapaxes(2, 3)
    return x.reshape(b, h * block, w * block, c // block**2)
