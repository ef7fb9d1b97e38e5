"""Deformable convolution: every tap looks where an offset, learned for each pixel, sends it.

Version 1: Dai, Qi, Xiong, Li, Zhang, Hu, Wei, ICCV 2017, arXiv:1703.06211, Eq. 2 to 4. Version 2,
where each tap has a weight too: Zhu, Hu, Lin, Dai, CVPR 2019, arXiv:1811.11168, Eq. 1.

Neighbouring pixels are laid side by side first, so that a sample is one row gathered, and its
gradient one row scattered, in place of four. An array whose rows are sharded is gathered.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxseg.ops.conv import UNPADDED, Padding


def deform_conv(
    x: jax.Array,
    offset: jax.Array,
    kernel: jax.Array,
    mask: jax.Array | None = None,
    stride: int = 1,
    rate: int = 1,
    padding: Padding = UNPADDED,
) -> jax.Array:
    """Deformable convolution: [B,H,W,C] with kernel [kh,kw,C,D] -> [B,h,w,D], in the dtype of x.

    h = (H + padding - rate (kh - 1) - 1) // stride + 1, likewise w. offset [B,h,w,G kh kw 2]: for
    each of G groups of C / G channels and each tap in row-major order, (down, right) in pixels.
    mask [B,h,w,G kh kw], or None: version 2's weight of each sample. As torchvision's
    `deform_conv2d`, laid out channels last.

    stride, rate, padding: pixels, as in `ops.conv.conv`. Samples are kept for no gradient: each tap
    is sampled again there.
    """
    b, height, width, c = x.shape
    kh, kw, _, d = kernel.shape
    h, w = offset.shape[1:3]
    groups = offset.shape[3] // (2 * kh * kw)
    taps = jnp.stack(jnp.meshgrid(jnp.arange(kh), jnp.arange(kw), indexing="ij"), -1) * rate
    base = jnp.stack(jnp.meshgrid(jnp.arange(h), jnp.arange(w), indexing="ij"), -1) * stride
    base -= jnp.array([padding[0][0], padding[1][0]])
    # Groups join the batch: [B G,h,w,taps,2], and taps come first for the scan.
    at = offset.astype(jnp.float32).reshape(b, h, w, groups, kh * kw, 2)
    at = at + base[:, :, None, None] + taps.reshape(-1, 2)
    at = at.transpose(4, 0, 3, 1, 2, 5).reshape(kh * kw, b * groups, h * w, 2)
    parts = jnp.moveaxis(x.reshape(b, height, width, groups, -1), 3, 1)
    quads = _quads(parts.reshape(b * groups, height, width, -1))
    scale = jnp.ones((kh * kw, 1, 1, 1), x.dtype)
    if mask is not None:
        scale = mask.astype(x.dtype).reshape(b, h * w, groups, kh * kw)
        scale = scale.transpose(3, 0, 2, 1).reshape(kh * kw, b * groups, h * w, 1)

    @jax.checkpoint
    def add(total: jax.Array, tap: tuple) -> tuple[jax.Array, None]:
        at, scale, weight = tap
        places, weights = _corners(at, (height, width))
        seen = _blend(quads, places, weights) * scale  # [B G,h w,C / G]
        seen = seen.reshape(b, groups, h * w, -1).swapaxes(1, 2).reshape(b, h * w, c)
        out = jnp.matmul(seen, weight, preferred_element_type=total.dtype)
        return total + out, None

    total = jnp.zeros((b, h * w, d), jnp.promote_types(x.dtype, jnp.float32))
    total, _ = lax.scan(add, total, (at, scale, kernel.reshape(kh * kw, c, d).astype(x.dtype)))
    return total.reshape(b, h, w, d).astype(x.dtype)


def _quads(x: jax.Array) -> jax.Array:
    """[B,H,W,C] -> [B,(H+1)(W+1),4C]: each pixel with those right, below and right below, from the
    one above and left of the image on; 0 outside."""
    b, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = [x[:, i : i + h + 1, j : j + w + 1] for i in (0, 1) for j in (0, 1)]
    return jnp.concatenate(parts, axis=-1).reshape(b, (h + 1) * (w + 1), 4 * c)


def _corners(at: jax.Array, size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Of points [B,P,2]: the quad that holds each, int32 [B,P], and its weights [B,P,4]."""
    limit = jnp.array(size)
    inside = jnp.clip(at.astype(jnp.float32), -1, limit)
    low = jnp.clip(jnp.floor(lax.stop_gradient(inside)), -1, limit - 1)
    (v, u), place = jnp.moveaxis(inside - low, -1, 0), (low + 1).astype(jnp.int32)
    weights = jnp.stack([(1 - v) * (1 - u), (1 - v) * u, v * (1 - u), v * u], axis=-1)
    return place[..., 0] * (size[1] + 1) + place[..., 1], weights


def _blend(quads: jax.Array, places: jax.Array, weights: jax.Array) -> jax.Array:
    """[B,P,C]: the weighted pixels of the quads [B,.,4C] at places [B,P]."""
    found = jax.vmap(lambda rows, place: rows[place])(quads, places)
    found = found.reshape(*places.shape, 4, -1)
    return jnp.einsum("bpqc,bpq->bpc", found, weights.astype(quads.dtype))
