"""Convolutions of NHWC arrays, each in the form that the platform runs fast.

XLA's CPU backend hands matrix products and dense convolutions to fast kernels, and runs grouped
convolutions, and gradients of strided ones, as scalar loops. There, depthwise convolutions become
sums of shifted products and 1x1 convolutions matrix products, with gradients of their own, and
dense 3x3 ones save products. Other platforms keep their native convolutions.

The choice is `jax.lax.platform_dependent`, made when a program is lowered and not when it is
traced: a program exported for several platforms takes the right form on each, and so does a
computation placed on a device that is not the default one.

All forms keep an array whose rows are sharded where it is: neighbours exchange a halo. The forms
with gradients of their own differentiate once, in reverse mode.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain, product

import jax
import jax.numpy as jnp
from jax import lax

from jaxseg.ops import rows, winograd
from jaxseg.ops.winograd import Padding

UNPADDED = ((0, 0), (0, 0))


@partial(jax.jit, static_argnames=("stride", "rate", "padding"))
def conv(
    x: jax.Array, kernel: jax.Array, stride: int = 1, rate: int = 1, padding: Padding = UNPADDED
) -> jax.Array:
    """Convolution: [B,H,W,C] with kernel [kh,kw,C,D] -> [B,h,w,D], in the dtype of both.

    h = (H + padding - rate (kh - 1) - 1) // stride + 1, likewise w. Equals
    `lax.conv_general_dilated`. On CPU a 1x1 kernel is one matrix product over pixels, one whose
    taps mostly meet the padding, as DeepLab's largest rates, one product a tap over what it meets,
    and 3x3 kernels of many channels take Winograd's products.

    stride, rate (dilation), padding: pixels, hashable.
    Raises TypeError where the dtypes differ or the channels do not match.
    """
    if any(sum(edge) > rate * (k - 1) for edge, k in zip(padding, kernel.shape[:2], strict=True)):
        # Where the output is larger than the input, as in FCN's first layer, XLA's CPU backend runs
        # the gradient of the kernel as a scalar loop, 10 to 100 times slower. Padding first helps.
        x, padding = _pad(x, padding), UNPADDED
    if _far(x, kernel, rate):
        return _by_rows(conv, x, kernel, stride, rate, padding)
    native = partial(_native, stride=stride, rate=rate, padding=padding)
    if form := _fewer_products(x, kernel, stride, rate, padding):
        forward = partial(form, rate=rate, padding=padding)
        return _on_cpu(forward, partial(_vjp, forward), native)(x, kernel)
    uneven = x.shape[1] % rows.parts()  # shares of rows, whose pixels in a line would be gathered
    if kernel.shape[:2] != (1, 1) or uneven:
        return native(x, kernel)
    forward = partial(_pointwise, stride=stride, padding=padding)
    backward = partial(_pointwise_gradient, stride=stride, padding=padding)
    return _on_cpu(forward, backward, native)(x, kernel)


@partial(jax.jit, static_argnames=("stride", "rate", "padding"))
def depthwise(
    x: jax.Array, kernel: jax.Array, stride: int = 1, rate: int = 1, padding: Padding = UNPADDED
) -> jax.Array:
    """Convolution of each channel by itself: [B,H,W,C] with kernel [kh,kw,C] -> [B,h,w,C].

    Sizes, arguments and errors as in `conv`. Equals `lax.conv_general_dilated` with C groups. On
    CPU it is the sum over taps of the shifted image times that tap, one loop that vectorises over
    channels, several tens of times faster than the grouped convolution and its gradient.
    """
    if _far(x, kernel, rate):
        return _by_rows(depthwise, x, kernel, stride, rate, padding)
    forward = partial(_shifted, stride=stride, rate=rate, padding=padding)
    backward = partial(_shifted_gradient, stride=stride, rate=rate, padding=padding)
    native = partial(_native_depthwise, stride=stride, rate=rate, padding=padding)
    return _on_cpu(forward, backward, native)(x, kernel)


def _fewer_products(
    x: jax.Array, kernel: jax.Array, stride: int, rate: int, padding: Padding
) -> Callable | None:
    """The form that computes less than one product for each tap and output, where one pays."""
    if stride > 1 or rows.parts() > 1:
        return None
    if rate > 1 and _met(x.shape, kernel.shape, rate, padding) < 0.6:
        return _by_taps
    return winograd.conv3x3 if winograd.pays(x.shape, kernel.shape, rate, padding) else None


def _far(x: jax.Array, kernel: jax.Array, rate: int) -> bool:
    """Whether the taps reach beyond the rows of two devices."""
    return rows.parts() > 1 and rate * (kernel.shape[0] - 1) > 2 * x.shape[1] / rows.parts()


def _by_rows(
    form: Callable, x: jax.Array, kernel: jax.Array, stride: int, rate: int, padding: Padding
) -> jax.Array:
    """`form` as a sum over rows of the kernel, each one convolution of rows that were moved.

    For rows on several devices: the compiler would send each device all rows between the taps, or
    all of the image; here it gets the rows that its taps meet. A tap that meets none, as at
    DeepLab's largest rates on small images, is left out.
    """
    (above, below), across = padding
    h = x.shape[1]
    count = (h + above + below - rate * (kernel.shape[0] - 1) - 1) // stride + 1
    total = 0
    for i in range(kernel.shape[0]):
        start = rate * i - above  # the row of x under this tap at output row 0
        end = start + (count - 1) * stride + 1
        if start >= h or end <= 0:
            continue
        edges = [(0, 0, 0), (-start, end - h, 0), (0, 0, 0), (0, 0, 0)]
        moved = lax.pad(x, jnp.zeros((), x.dtype), edges)
        tap = form(moved, kernel[i : i + 1], stride, rate, ((0, 0), across))
        total += tap.astype(_wide(x))
    return total.astype(x.dtype)


def _on_cpu(forward: Callable, backward: Callable, native: Callable) -> Callable:
    """`native(x, kernel)`, but on CPU `forward(x, kernel)` and `backward(x, kernel, g)`.

    The platform is chosen inside both rules: a gradient through the choice itself would keep the
    residuals of every platform.
    """

    @jax.custom_vjp
    def run(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.platform_dependent(x, kernel, cpu=forward, default=native)

    def pull(saved: tuple, g: jax.Array) -> tuple:
        return lax.platform_dependent(*saved, g, cpu=backward, default=partial(_vjp, native))

    run.defvjp(lambda x, kernel: (run(x, kernel), (x, kernel)), pull)
    return run


def _vjp(form: Callable, x: jax.Array, kernel: jax.Array, g: jax.Array) -> tuple:
    return jax.vjp(form, x, kernel)[1](g)


def _native(
    x: jax.Array, kernel: jax.Array, stride: int, rate: int, padding: Padding, groups: int = 1
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        rhs_dilation=(rate, rate),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _native_depthwise(
    x: jax.Array, kernel: jax.Array, stride: int, rate: int, padding: Padding
) -> jax.Array:
    return _native(x, kernel[:, :, None], stride, rate, padding, groups=x.shape[3])


def _wide(x: jax.Array) -> jnp.dtype:
    """The dtype to sum in: float32, or that of x where it is wider."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _pad(x: jax.Array, padding: Padding, interior: int = 0) -> jax.Array:
    edges = [(0, 0, 0), *((*edge, interior) for edge in padding), (0, 0, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), edges)


def _pixels(x: jax.Array) -> jax.Array:
    """[B,h,w,C] -> [B,h*w,C]. Merging B too would gather an array whose rows are sharded."""
    return x.reshape(x.shape[0], -1, x.shape[3])


def _subsample(x: jax.Array, stride: int, padding: Padding) -> jax.Array:
    return _pad(x, padding)[:, ::stride, ::stride]


def _pointwise(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    x = _subsample(x, stride, padding)
    y = jnp.matmul(_pixels(x), kernel[0, 0], preferred_element_type=_wide(x))
    return y.astype(x.dtype).reshape(*x.shape[:3], -1)


def _pointwise_gradient(
    x: jax.Array, kernel: jax.Array, g: jax.Array, stride: int, padding: Padding
) -> tuple[jax.Array, jax.Array]:
    taken, spread = jax.vjp(partial(_subsample, stride=stride, padding=padding), x)
    dx = jnp.matmul(_pixels(g), kernel[0, 0].T, preferred_element_type=_wide(x))
    dx = dx.astype(x.dtype).reshape(taken.shape)
    dw = partial(jnp.einsum, preferred_element_type=_wide(x))
    if g.shape[1] * g.shape[2] >= g.shape[3]:  # a product per image, B C D numbers to sum
        dw = dw("bpc,bpd->bcd", _pixels(taken), _pixels(g)).sum(0)
    else:  # one product over images and pixels; XLA first transposes x, B C h w numbers
        dw = dw("bpc,bpd->cd", _pixels(taken), _pixels(g))
    return spread(dx)[0], dw.astype(kernel.dtype)[None, None]


def _met(size: tuple[int, ...], taps: tuple[int, ...], rate: int, padding: Padding) -> float:
    """The share of a convolution's products, of stride 1, that meet a pixel and no padding."""
    share = 1.0
    for n, k, (low, high) in zip(size[1:3], taps[:2], padding, strict=True):
        count = n + low + high - rate * (k - 1)  # of outputs
        met = (_overlap(n, count, rate * i - low) for i in range(k))
        share *= sum(max(0, end - start) for start, end in met) / (k * max(count, 1))
    return share


def _overlap(n: int, count: int, shift: int) -> tuple[int, int]:
    """Of `count` outputs, those whose tap, `shift` pixels on, meets one of n pixels."""
    return max(0, -shift), min(count, n - shift)


def _by_taps(x: jax.Array, kernel: jax.Array, rate: int, padding: Padding) -> jax.Array:
    """The sum over taps of a matrix product over the pixels that each meets; stride 1."""
    pairs = tuple(zip(x.shape[1:3], kernel.shape[:2], padding, strict=True))
    height, width = (n + sum(edge) - rate * (k - 1) for n, k, edge in pairs)
    total = jnp.zeros((x.shape[0], height, width, kernel.shape[3]), _wide(x))
    for i, j in product(*map(range, kernel.shape[:2])):
        down, right = rate * i - padding[0][0], rate * j - padding[1][0]
        (top, bottom) = _overlap(x.shape[1], height, down)
        (left, end) = _overlap(x.shape[2], width, right)
        if top >= bottom or left >= end:
            continue
        met = x[:, top + down : bottom + down, left + right : end + right]
        y = jnp.matmul(_pixels(met), kernel[i, j], preferred_element_type=_wide(x))
        y = y.reshape(*met.shape[:3], -1)
        total += _pad(y, ((top, height - bottom), (left, width - end)))
    return total.astype(x.dtype)


def _taps(
    x: jax.Array, kernel: tuple[int, ...], stride: int, rate: int, padding: Padding
) -> list[jax.Array]:
    """For every tap (i, j), in row-major order, the pixel it meets at each output [B,h,w,C]."""
    x = _pad(x, padding)
    end_h, end_w = (n - rate * (k - 1) for n, k in zip(x.shape[1:3], kernel, strict=True))
    starts = product(*(range(0, rate * k, rate) for k in kernel))
    return [x[:, i : i + end_h : stride, j : j + end_w : stride] for i, j in starts]


def _shifted(
    x: jax.Array, kernel: jax.Array, stride: int, rate: int, padding: Padding
) -> jax.Array:
    taps = _taps(x, kernel.shape[:2], stride, rate, padding)
    weights = kernel.reshape(-1, kernel.shape[2]).astype(_wide(x))
    y = sum(tap * weight for tap, weight in zip(taps, weights, strict=True)).astype(x.dtype)
    # Without the barrier, XLA repeats the whole sum in every consumer of y.
    return lax.optimization_barrier(y)


def _shifted_gradient(
    x: jax.Array, kernel: jax.Array, g: jax.Array, stride: int, rate: int, padding: Padding
) -> tuple[jax.Array, jax.Array]:
    """dx is the same sum on g, spread by the stride, with the kernel turned by half a turn."""
    edges = []
    sizes = zip(kernel.shape[:2], x.shape[1:3], g.shape[1:3], padding, strict=True)
    for k, n, m, (low, _) in sizes:
        reach = rate * (k - 1)
        edges.append((reach - low, n + low - ((m - 1) * stride + 1)))
    spread = _pad(g, tuple(edges), stride - 1)
    dx = _shifted(spread, kernel[::-1, ::-1], 1, rate, UNPADDED)

    if stride == 1:  # spread lies in memory, while g would be computed anew in every pass below
        turned = _taps(spread, kernel.shape[:2], 1, rate, UNPADDED)
        products = [x.astype(_wide(x)) * tap for tap in reversed(turned)]
    else:
        taps = _taps(x, kernel.shape[:2], stride, rate, padding)
        products = [tap.astype(_wide(x)) * g for tap in taps]
    # One pass for several taps at once, summed along each row of pixels first: all taps, or
    # three, where rows of more would evict each other from the cache. A sum alone, even in two
    # steps, is one for XLA, which adds channel by channel, pixel after distant pixel.
    size = len(products) if x.shape[3] < 512 else 3
    sums = [_row_sums(products[i : i + size]) for i in range(0, len(products), size)]
    dw = jnp.stack([row.sum((0, 1)) for row in chain(*sums)])
    return dx, dw.reshape(kernel.shape).astype(kernel.dtype)


def _row_sums(products: list[jax.Array]) -> list[jax.Array]:
    """Arrays [B,h,w,C], each summed over w, in one pass."""
    zeros = [jnp.zeros((), products[0].dtype)] * len(products)
    return lax.reduce(products, zeros, lambda a, b: jax.tree.map(jnp.add, a, b), (2,))
