"""Upsampling of NHWC arrays by transposed convolution, learned or fixed.

Resizing is in `ops.resize`, unpooling by the indices of the maxima in `ops.pool`, and the dense
upsampling convolution of Wang et al. (2018, arXiv 1702.08502, section 3.1) is a convolution and
then `ops.image.depth_to_space`: `backbones.layers.dense_upsampling`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxseg.ops.conv import UNPADDED, Padding, conv

MOST_PHASED = 8  # the largest stride that is computed phase by phase


def transposed(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding = UNPADDED
) -> jax.Array:
    """Transposed convolution: [B,h,w,C] with kernel [kh,kw,C,D] -> [B,H,W,D].

    Pixel (u, v) adds x[u, v] @ kernel[i, j] to output (stride u + i - above, stride v + j - left);
    padding ((above, below), (left, right)) is what is cut off the full output, or with a negative
    number added to it, so that H = (h - 1) stride + kh - above - below. It transposes the
    convolution of that stride and padding. `torch.nn.ConvTranspose2d(padding=p, output_padding=q)`
    is padding ((p, p - q), (p, p - q)) with the axes of the kernel moved.

    The outputs at one offset within the stride, a phase, see every stride-th tap of the kernel, so
    each phase is a dense convolution with stride 1, and the phases are interleaved (Shi et al.
    2016, arXiv 1609.07009). `lax.conv_transpose` instead convolves an array of mostly zeros; its
    gradient is up to 30 times slower on CPU, and gathers an array whose rows are sharded. But a
    program of stride**2 convolutions takes long to compile: above MOST_PHASED it is the former.
    """
    taps = kernel.shape[:2]
    if stride > MOST_PHASED:
        return _lhs_dilated(x, kernel, stride, padding)
    size = [
        (n - 1) * stride + k - sum(cut)
        for n, k, cut in zip(x.shape[1:3], taps, padding, strict=True)
    ]
    missing = [(0, max(0, stride - k)) for k in taps]  # a phase without taps is zero
    kernel = jnp.pad(kernel, (*missing, (0, 0), (0, 0)))
    rows, cols = (
        [_phase(p + cut[0], stride, k, n, -(-m // stride)) for p in range(stride)]
        for k, n, m, cut in zip(kernel.shape[:2], x.shape[1:3], size, padding, strict=True)
    )
    y = [
        jnp.stack([conv(x, kernel[i, j], padding=(up, across)) for j, across in cols], 3)
        for i, up in rows
    ]
    y = jnp.stack(y, 2)  # [B, h, stride, w, stride, D]
    b, h, _, w, _, d = y.shape
    return y.reshape(b, h * stride, w * stride, d)[:, : size[0], : size[1]]


def _lhs_dilated(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """The same as one convolution of x spread out by zeros."""
    edges = [
        tuple(k - 1 - n for n in cut) for k, cut in zip(kernel.shape[:2], padding, strict=True)
    ]
    return lax.conv_general_dilated(
        x,
        kernel[::-1, ::-1],
        (1, 1),
        edges,
        lhs_dilation=(stride, stride),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _phase(start: int, stride: int, taps: int, n: int, count: int) -> tuple:
    """The taps and the padding that give outputs start, start + stride, .. of n pixels: `count`.

    Output start + stride u is the sum over m of tap first + stride m times pixel u + row - m.
    """
    row, first = divmod(start, stride)
    used = range(first, taps, stride)
    return slice(used[-1], None, -stride), (len(used) - 1 - row, count + row - n)


def bilinear_kernel(factor: int) -> jax.Array:
    """The bilinear weights that upsample by `factor`: float32 [2 factor, 2 factor].

    They initialise FCN's transposed convolutions of stride `factor`, on the diagonal of the
    channels, all else zero (Long et al. 2015, section 3.3 and the authors' `surgery.py`).
    """
    tent = 1 - np.abs(np.arange(2 * factor) - (factor - 0.5)) / factor
    return jnp.asarray(np.outer(tent, tent), jnp.float32)


def bilinear_transposed(x: jax.Array, factor: int) -> jax.Array:
    """FCN's fixed upsampling of every channel: float [B,h,w,C] -> [B,(h+1)factor,(w+1)factor,C].

    The transposed convolution with `bilinear_kernel(factor)` and stride `factor`, as Caffe's
    Deconvolution without padding: beyond the image are zeros, and the caller crops (Long et al.
    2015, section 4.3). Cropped by factor / 2 at each side it is bilinear upsampling, except at the
    border. Along one axis after the other, each output blends two pixels.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    for axis in (1, 2):
        before, after = (
            jnp.pad(wide, [edge if i == axis else (0, 0) for i in range(4)])
            for edge in ((1, 0), (0, 1))
        )
        weights = ((p + 0.5) / factor for p in range(factor))
        phases = [after * weight + before * (1 - weight) for weight in weights]
        shape = (*wide.shape[:axis], -1, *wide.shape[axis + 1 :])
        wide = jnp.stack(phases, axis + 1).reshape(shape)
    return wide.astype(x.dtype)
