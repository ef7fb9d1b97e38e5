"""3x3 convolutions by Winograd's products, and their gradients, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.ops import winograd
from jaxseg.ops.conv import conv

SAME = ((1, 1), (1, 1))
CASES = [  # batch and size, channels, rate, padding
    ((2, 6, 8), (3, 4), 1, SAME),
    ((1, 7, 5), (5, 2), 1, SAME),  # odd: the last tiles are half used
    ((2, 9, 6), (3, 4), 1, ((0, 0), (0, 0))),
    ((1, 6, 9), (3, 3), 1, ((2, 0), (1, 3))),
    ((1, 8, 7), (3, 2), 1, ((-1, 1), (0, -2))),  # cut instead of padded
    ((2, 8, 12), (4, 3), 2, ((2, 2), (2, 2))),
    ((1, 11, 13), (3, 4), 3, ((3, 3), (3, 3))),
    ((1, 9, 10), (3, 4), 4, ((4, 5), (0, 4))),
    ((1, 3, 3), (2, 2), 1, ((0, 0), (0, 0))),  # one pixel comes out
]


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def reference(x, kernel, g, rate, padding):
    """Output and gradients of x and kernel, tap by tap."""
    room = 8  # wide enough for any padding
    wide = np.pad(x, ((0, 0), (room, room), (room, room), (0, 0)))
    height, width = g.shape[1:3]
    y, slope, dk = np.zeros(g.shape), np.zeros(wide.shape), np.zeros(kernel.shape)
    for i, j in np.ndindex(3, 3):
        top, left = room - padding[0][0] + rate * i, room - padding[1][0] + rate * j
        met = np.s_[:, top : top + height, left : left + width]
        y += wide[met] @ kernel[i, j]
        slope[met] += g @ kernel[i, j].T
        dk[i, j] = np.einsum("bhwc,bhwd->cd", wide[met], g)
    return y, slope[:, room:-room, room:-room], dk


def errors(form, x, kernel, rate, padding):
    """The largest differences of output and gradients, as shares of the largest value."""
    shape = jax.eval_shape(form, x, kernel).shape
    g = random(2, *shape)

    @jax.jit
    def all_three(x, kernel, g):
        y, pull = jax.vjp(form, x, kernel)
        return y, *pull(g.astype(y.dtype))

    wanted = reference(*(np.float64(a) for a in (x, kernel, g)), rate, padding)
    found = all_three(x, kernel, g)
    for have, want in zip(found, wanted, strict=True):
        assert have.shape == want.shape and have.dtype == x.dtype
    pairs = zip(found, wanted, strict=True)
    return [np.abs(np.float64(a) - b).max() / np.abs(b).max() for a, b in pairs]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_taps_in_float64(case):
    size, channels, rate, padding = case
    x, kernel = random(0, *size, channels[0]), random(1, 3, 3, *channels)
    found = errors(lambda x, k: winograd.conv3x3(x, k, rate, padding), x, kernel, rate, padding)
    assert max(found) <= 2e-6


def test_it_is_as_near_to_the_truth_as_the_plain_sum():
    x, kernel = random(0, 1, 16, 16, 128), random(1, 3, 3, 128, 96)
    ours = errors(lambda x, k: winograd.conv3x3(x, k, 1, SAME), x, kernel, 1, SAME)
    plain = errors(
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1, 1), SAME, dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        x,
        kernel,
        1,
        SAME,
    )
    assert all(a <= 4 * b for a, b in zip(ours, plain, strict=True)), (ours, plain)


def test_bfloat16_is_rounded_once():
    x, kernel = (
        jnp.asarray(a, jnp.bfloat16) for a in (random(0, 1, 8, 8, 8), random(1, 3, 3, 8, 8))
    )
    y = winograd.conv3x3(x, kernel, 1, SAME)
    want = reference(np.float64(x), np.float64(kernel), np.zeros((1, 8, 8, 8)), 1, SAME)[0]
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(y), want, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "taps", "rate", "padding", "products"),
    [
        ((1, 16, 16, 64), (3, 3, 64, 64), 1, SAME, 16),
        ((2, 12, 12, 64), (3, 3, 64, 64), 2, ((2, 2), (2, 2)), 16),
        ((1, 12, 12, 64), (3, 3, 64, 64), 1, SAME, 0),  # few pixels
        ((1, 16, 16, 63), (3, 3, 63, 64), 1, SAME, 0),  # few channels
        ((1, 16, 16, 64), (3, 3, 64, 63), 1, SAME, 0),
        ((1, 18, 18, 64), (3, 3, 64, 64), 6, ((6, 6), (6, 6)), 0),  # 24x24 would be made
        ((1, 16, 16, 64), (5, 3, 64, 64), 1, SAME, 0),
        ((2, 512, 511, 64), (3, 3, 64, 64), 1, SAME, 0),  # 2 x 134 million sums
    ],
    ids=str,
)
def test_convolutions_for_which_it_pays_take_it_on_cpu(size, taps, rate, padding, products):
    assert winograd.pays(size, taps, rate, padding) == (products == 16)
    x, kernel = jnp.ones(size), jnp.ones(taps)
    program = jax.jit(lambda x, k: conv(x, k, 1, rate, padding)).lower(x, kernel)
    text = program.compile().as_text()
    assert text.count(" dot(") == products and text.count(" convolution(") == (products == 0)
