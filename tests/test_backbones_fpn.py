"""The feature pyramid against numpy, its sizes, and its parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import assert_close, conv, count, randomised

from jaxseg import backbones
from jaxseg.backbones.fpn import FPN, check_strides
from jaxseg.errors import InputError

SIZES = {"c2": (13, 10), "c3": (7, 5), "c4": (4, 3), "c5": (2, 2)}  # of an image of 52 x 40 pixels


def levels():
    rng = np.random.default_rng(0)
    shapes = {key: (1, *size, 3 + i) for i, (key, size) in enumerate(SIZES.items())}
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def test_against_numpy():
    """Odd sizes: the level above is stretched to the size of the one below, as in the libraries."""
    inputs, net = levels(), FPN(6)
    variables = randomised(jax.eval_shape(net.init, jax.random.key(0), inputs))
    got = jax.jit(net.apply)(variables, inputs)
    assert list(got) == ["p2", "p3", "p4", "p5", "p6"]
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    above = None
    for i in (5, 4, 3, 2):
        x = conv(inputs[f"c{i}"][0].astype(np.float64), params[f"lateral{i}"])
        if above is not None:
            (h, w), (rows, cols) = above.shape[:2], map(np.arange, x.shape[:2])
            x += above[rows * h // x.shape[0]][:, cols * w // x.shape[1]]
        assert_close(np.asarray(got[f"p{i}"][0]), conv(x, params[f"output{i}"], pad=1))
        above = x
    np.testing.assert_array_equal(got["p6"], got["p5"][:, ::2, ::2])
    assert got["p6"].shape[1:3] == (1, 1)


def test_the_published_count():
    """fpn of torchvision's maskrcnn_resnet50_fpn."""
    channels = {"c2": 256, "c3": 512, "c4": 1024, "c5": 2048}
    inputs = {k: jax.ShapeDtypeStruct((1, *SIZES[k], n), jnp.float32) for k, n in channels.items()}
    assert count(jax.eval_shape(FPN().init, jax.random.key(0), inputs)) == 3_344_384


@pytest.mark.parametrize("output_stride", [4, 8, 16])
def test_levels_at_other_strides_are_refused(output_stride):
    check_strides(backbones.find("hrnet_w18")(output_stride=32))
    with pytest.raises(
        InputError, match=f"got a backbone of output stride {output_stride}: set .*32"
    ):
        check_strides(backbones.find("hrnet_w18")(output_stride=output_stride))
