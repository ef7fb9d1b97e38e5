"""3x3 convolutions with 4 products for each output instead of 9, for CPUs.

Lavin and Gray, 2016, "Fast algorithms for convolutional neural networks", section 4.1: F(2x2,3x3).
Two neighbouring outputs y0, y1 of a kernel (k0, k1, k2) over (x0, x1, x2, x3) are

    m0 = (x0 - x2) k0                   m1 = (x1 + x2) (k0 + k1 + k2) / 2
    m3 = (x1 - x3) k2                   m2 = (x2 - x1) (k0 - k1 + k2) / 2
    y0 = m0 + m1 + m2                   y1 = m1 - m2 - m3

and in two dimensions the same, nested: 16 products for 4 outputs, each product a matrix's over
channels. In float32 the result is as near to the truth as that of the plain sum.
"""

from math import prod

import jax
import jax.numpy as jnp
from jax import lax

Padding = tuple[tuple[int, int], tuple[int, int]]  # rows above and below, columns left and right
LARGEST = 2**27  # numbers: half a gigabyte in float32


def pays(size: tuple[int, ...], taps: tuple[int, ...], rate: int, padding: Padding) -> bool:
    """Whether `conv3x3` is faster than nine products: images [B,H,W,C], kernel [kh,kw,C,D].

    With few channels its sums, with few pixels the kernel's cost more than the products saved. It
    makes squares of 2 x rate outputs, which may be more than are asked for. And the sums, four
    times the size of input and output, must not be so large that memory is what takes the time.
    """
    if taps[:2] != (3, 3) or min(taps[2:]) < 64:
        return False
    (height, width), tiles = _sizes(size, rate, padding)
    asked, made = size[0] * height * width, size[0] * prod(tiles) * 4 * rate**2
    return asked >= 256 and made < 1.6 * asked and 4 * made * sum(taps[2:]) < LARGEST


def conv3x3(x: jax.Array, kernel: jax.Array, rate: int, padding: Padding) -> jax.Array:
    """Convolution of stride 1: [B,H,W,C] with kernel [3,3,C,D] -> [B,h,w,D], in the dtype of x.

    h = H + padding - 2 rate, likewise w. It computes in float32 or wider. Rows are seen as [tiles,
    2 outputs, rate], likewise columns: pixels `rate` apart are neighbours.
    """
    (height, width), (p, q) = _sizes(x.shape, rate, padding)
    batch, channels = x.shape[0], x.shape[3]
    asked, dtype = x.dtype, jnp.promote_types(x.dtype, jnp.float32)
    edges = [
        (low, 2 * rate * (tiles + 1) - n - low, 0)
        for n, tiles, (low, _) in zip(x.shape[1:3], (p, q), padding, strict=True)
    ]
    x = lax.pad(x.astype(dtype), jnp.zeros((), dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    x = x.reshape(batch, p + 1, 2, rate, q + 1, 2, rate, channels)
    inputs = [tap for row in _input(x, 1) for tap in _input(row, 3)]
    kernels = [tap for row in _kernel(kernel.astype(dtype)) for tap in _kernel(row)]
    products = [
        jnp.matmul(tap.reshape(-1, channels), weights)
        for tap, weights in zip(inputs, kernels, strict=True)
    ]
    by_columns = [_output(products[i : i + 4]) for i in range(0, 16, 4)]
    outputs = [_output(rows) for rows in zip(*by_columns, strict=True)]  # a column's two rows
    outputs = [[y.reshape(batch, p, rate, q, rate, -1) for y in rows] for rows in outputs]
    y = jnp.stack([jnp.stack(rows, 2) for rows in outputs], 5)
    y = y.reshape(batch, 2 * p * rate, 2 * q * rate, -1)
    return y[:, :height, :width].astype(asked)


def _sizes(
    size: tuple[int, ...], rate: int, padding: Padding
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) of the output, and how many squares of 2 x rate hold it, down and across."""
    height, width = (n + sum(edge) - 2 * rate for n, edge in zip(size[1:3], padding, strict=True))
    return (height, width), (-(-height // (2 * rate)), -(-width // (2 * rate)))


def _input(x: jax.Array, axis: int) -> list[jax.Array]:
    """Tiles along `axis`, each of the two pixels along the next -> what the kernel meets."""
    pixels = []
    for start, end in ((0, -1), (1, None)):  # a tile and the one after it
        tiles = lax.slice_in_dim(x, start, end, axis=axis)
        pixels += (lax.index_in_dim(tiles, i, axis + 1, keepdims=False) for i in range(2))
    x0, x1, x2, x3 = pixels
    return [x0 - x2, x1 + x2, x2 - x1, x1 - x3]


def _kernel(taps: jax.Array) -> list[jax.Array]:
    k0, k1, k2 = taps
    return [k0, (k0 + k1 + k2) / 2, (k0 - k1 + k2) / 2, k2]


def _output(products: list[jax.Array]) -> list[jax.Array]:
    m0, m1, m2, m3 = products
    return [m0 + m1 + m2, m1 - m2 - m3]
