"""Pixels as channels and back, the centre of a map, normalisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.backbones.layers import dense_upsampling
from jaxseg.ops.image import centre, depth_to_space, normalise, space_to_depth


@pytest.mark.parametrize("block", [1, 2, 3])
def test_depth_to_space_takes_space_to_depth_back(block):
    x = np.random.default_rng(0).normal(size=(2, 6, 12, 5)).astype(np.float32)
    folded = space_to_depth(x, block)
    assert folded.shape == (2, 6 // block, 12 // block, 5 * block**2)
    np.testing.assert_array_equal(depth_to_space(folded, block), x)
    y = np.random.default_rng(1).normal(size=(1, 3, 2, 7 * block**2)).astype(np.float32)
    np.testing.assert_array_equal(space_to_depth(depth_to_space(y, block), block), y)


def test_the_channels_of_a_block_are_its_pixels_row_by_row():
    """Channel (2 row + column) C + c of place (u, v) is channel c of its pixel (row, column)."""
    x = np.arange(4 * 6 * 3).reshape(1, 4, 6, 3)
    folded = np.asarray(space_to_depth(jnp.asarray(x), 2))
    for u, v, row, column, c in np.ndindex(2, 3, 2, 2, 3):
        pixel = x[0, 2 * u + row, 2 * v + column, c]
        assert folded[0, u, v, (2 * row + column) * 3 + c] == pixel


def test_dense_upsampling_scores_every_pixel_of_a_place():
    """The classifier's scores of place (u, v) are those of its factor x factor pixels."""
    import flax.linen as nn

    class Head(nn.Module):
        @nn.compact
        def __call__(self, x):
            return dense_upsampling(2, 3, x)

    x = jax.random.normal(jax.random.key(0), (1, 2, 4, 5))
    variables = Head().init(jax.random.key(1), x)
    y = Head().apply(variables, x)
    layer = variables["params"]["classifier"]
    scores = np.asarray(x @ layer["kernel"][0, 0] + layer["bias"])
    assert y.shape == (1, 6, 12, 2) and scores.shape == (1, 2, 4, 18)
    for u, v, row, column in np.ndindex(2, 4, 3, 3):
        first = 2 * (3 * row + column)
        want = scores[0, u, v, first : first + 2]
        np.testing.assert_allclose(y[0, 3 * u + row, 3 * v + column], want, rtol=1e-5, atol=1e-6)


def test_the_centre_is_cropped_as_much_on_both_sides():
    x = jnp.arange(7 * 6).reshape(1, 7, 6)
    np.testing.assert_array_equal(centre(x, (3, 2)), x[:, 2:5, 2:4])
    np.testing.assert_array_equal(centre(x, (7, 6)), x)
    for larger in ((8, 6), (7, 7)):
        with pytest.raises(ValueError, match=r"of \(7, 6\): use at most that"):
            centre(x, larger)


def test_normalise_is_per_channel_in_float32():
    x = np.full((1, 2, 2, 2), 100, np.uint8)
    y = normalise(x, (50.0, 80.0), (25.0, 10.0))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y[0, 0, 0], [2.0, 2.0])
