"""The negative log-likelihood of every pixel, from logits of lower resolution than the labels.

Upsampled logits of 150 classes at 512x512 are 157 MB an image in float32, and a loss on them keeps
several such arrays. Here blocks of columns are upsampled one after the other, in the forward pass
and once more in the backward pass; what is kept is the small logits and a number for each pixel.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxseg.ops.resize import interpolation, resize, resize_axis

WHOLE = 2**24  # elements of upsampled logits up to which they are computed at once
BLOCK = 2**21  # elements of one block, about: larger ones leave a CPU's caches
LARGE = 2**4  # times as many on an accelerator, which many small blocks would leave idle


def clean(
    logits: jax.Array, label: jax.Array, ignore: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logits float32, label int32, counted bool): zeros where ignored, NaN under a wrong label."""
    label = label.astype(jnp.int32)
    counted = label != ignore
    known = (label >= 0) & (label < logits.shape[-1])
    # Before anything else: masking only the result would leave 0 * NaN gradients.
    logits = jnp.where(known[..., None], logits.astype(jnp.float32), jnp.nan)
    logits = jnp.where(counted[..., None], logits, 0)
    return logits, jnp.where(counted & known, label, 0), counted


def is_class(label: jax.Array, classes: int) -> jax.Array:
    """bool [...,K], to be read by a sum only: there the compiler fuses it and stores nothing."""
    return label[..., None] == jnp.arange(classes)


def nll(logits: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(-log p of the true class, logsumexp), float32 [...], of logits [...,K] from `clean`."""
    # Not a gather: its gradient is a scatter into a second array of the logits' size.
    target = jnp.where(is_class(label, logits.shape[-1]), logits, 0).sum(-1)
    total = jax.nn.logsumexp(logits, axis=-1)
    return total - target, total


def upsampled_nll(
    logits: jax.Array, label: jax.Array, align_corners: bool = False, ignore: int = 255
) -> jax.Array:
    """-log p of the true class of each pixel: logits [B,h,w,K], label [B,H,W] -> float32 [B,H,W].

    Equals the log-softmax of `resize(logits, (H, W), align_corners)`, in float32; where these are
    large they never exist at once. 0 where ignored; NaN where the label is out of range. Blocks are
    of columns, so that sharded rows stay where they are. Reverse mode only.
    """
    batch, height, width = label.shape
    column = batch * height * logits.shape[3]
    if jax.default_backend() != "cpu":
        column = -(-column // LARGE)
    if column * width <= WHOLE:
        full = resize(logits.astype(jnp.float32), label.shape[1:], align_corners)
        full, known, counted = clean(full, label, ignore)
        return jnp.where(counted, nll(full, known)[0], 0)
    columns = max(1, min(width, BLOCK // column))
    return _run(logits, label.astype(jnp.int32), align_corners, ignore, columns)


def _plan(n_in: int, n: int, columns: int, align_corners: bool) -> tuple[np.ndarray, np.ndarray]:
    """Of each block of output columns: the first input column that it needs, int32 [blocks], and
    the weights of those from there, float32 [blocks, columns, inputs]."""
    matrix = np.zeros((-(-n // columns) * columns, n_in), np.float32)
    matrix[:n] = interpolation(n_in, n, align_corners)
    blocks = matrix.reshape(-1, columns, n_in)
    used = blocks.any(1)
    first, end = used.argmax(1), n_in - used[:, ::-1].argmax(1)
    inputs = (end - first).max()
    first = np.minimum(first, n_in - inputs)
    weights = [block[:, i : i + inputs] for block, i in zip(blocks, first, strict=True)]
    return first.astype(np.int32), np.stack(weights)


def _split(x: jax.Array, columns: int, fill: float) -> jax.Array:
    """[B,H,W] -> [blocks,B,H,columns], the last block filled up."""
    batch, height, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -width % columns)), constant_values=fill)
    return jnp.moveaxis(x.reshape(batch, height, -1, columns), 2, 0)


def _join(x: jax.Array, width: int) -> jax.Array:
    blocks, batch, height, columns = x.shape
    return jnp.moveaxis(x, 0, 2).reshape(batch, height, blocks * columns)[..., :width]


def _upsample(x: jax.Array, weights: jax.Array, height: int, align_corners: bool) -> jax.Array:
    """Columns [B,h,inputs,K] -> [B,height,columns,K], in float32."""
    weights = jnp.broadcast_to(weights, (*x.shape[:2], *weights.shape))
    # HIGHEST: accelerators would round float32 inputs of a product to fewer bits.
    y = jnp.matmul(weights, x.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return resize_axis(y, 1, height, align_corners)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _run(
    logits: jax.Array, label: jax.Array, align_corners: bool, ignore: int, columns: int
) -> jax.Array:
    return _forward(logits, label, align_corners, ignore, columns)[0]


def _forward(
    logits: jax.Array, label: jax.Array, align_corners: bool, ignore: int, columns: int
) -> tuple:
    height, width = label.shape[1:]
    first, weights = _plan(logits.shape[2], width, columns, align_corners)

    def block(_: None, part: tuple) -> tuple:
        first, weight, label = part
        x = lax.dynamic_slice_in_dim(logits, first, weight.shape[1], 2)
        y, label, counted = clean(_upsample(x, weight, height, align_corners), label, ignore)
        loss, total = nll(y, label)
        return None, (jnp.where(counted, loss, 0), total)

    _, (loss, total) = lax.scan(block, None, (first, weights, _split(label, columns, ignore)))
    return _join(loss, width), (logits, label, total)


def _backward(
    align_corners: bool, ignore: int, columns: int, saved: tuple, g: jax.Array
) -> tuple[jax.Array, None]:
    logits, label, total = saved
    height, width = label.shape[1:]
    first, weights = _plan(logits.shape[2], width, columns, align_corners)

    def block(slope: jax.Array, part: tuple) -> tuple:
        first, weight, label, total, g = part
        x = lax.dynamic_slice_in_dim(logits, first, weight.shape[1], 2)
        y, pull = jax.vjp(lambda x: _upsample(x, weight, height, align_corners), x)
        y, label, counted = clean(y, label, ignore)
        p = jnp.exp(y - total[..., None])
        truth = is_class(label, y.shape[-1])
        dy = jnp.where(counted[..., None], (p - truth) * g[..., None], 0)
        # Without the barrier, XLA repeats the exponentials in every blend of the upsampling.
        dy = lax.optimization_barrier(dy)
        dx = lax.dynamic_slice_in_dim(slope, first, weight.shape[1], 2) + pull(dy)[0]
        return lax.dynamic_update_slice_in_dim(slope, dx, first, 2), None

    parts = (first, weights, _split(label, columns, ignore), total, _split(g, columns, 0))
    slope, _ = lax.scan(block, jnp.zeros(logits.shape, jnp.float32), parts)
    return slope.astype(logits.dtype), None


_run.defvjp(_forward, _backward)
