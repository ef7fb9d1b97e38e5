"""HRNet: counts, sizes, what the levels are, and the exchange against float64 NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import networks as ref
import numpy as np
import pytest
from networks import count, randomised

from jaxseg import backbones
from jaxseg.backbones.hrnet import Exchange
from jaxseg.backbones.layers import Norm
from jaxseg.errors import InputError


def trace(net, size=(65, 97)):
    image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    outputs, variables = jax.eval_shape(
        partial(net.init_with_output, train=False), jax.random.key(0), image
    )
    return variables, outputs


def bottleneck(before, width):
    """Parameters of a bottleneck with a projection, up to 4 width channels; two a norm."""
    convs = before * width + 9 * width**2 + width * 4 * width + before * 4 * width
    return convs + 2 * (width + width + 4 * width + 4 * width)


def classification_head(widths):
    """Each branch widened by a bottleneck to 128, 256, 512, 1024; added up from the finest by 3x3
    convolutions with stride 2; 1x1 to 2048; 1000 classes. The authors' code for ImageNet."""
    inner = (32, 64, 128, 256)
    total = sum(bottleneck(b, w) for b, w in zip(widths, inner, strict=True))
    total += sum(9 * 4 * a * 4 * b + 2 * 4 * b for a, b in zip(inner, inner[1:], strict=False))
    return total + 1024 * 2048 + 2 * 2048 + 2048 * 1000 + 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "width", "classifier"),
    [("hrnet_w18", 18, 21_295_164), ("hrnet_w48", 48, 77_466_024)],
)
def test_with_its_classifier_it_has_the_published_number_of_parameters(name, width, classifier):
    variables, outputs = trace(backbones.find(name)())
    assert count(variables) + classification_head([width * 2**i for i in range(4)]) == classifier
    assert outputs["c5"].shape == (1, 17, 25, 15 * width)


def test_the_small_one_has_mmsegmentations_number_of_parameters():
    variables, _ = trace(backbones.find("hrnet_w18_small")())
    head = 270 * 270 + 2 * 270 + 270 * 19 + 19  # FCN: 1x1 with norm, 19 classes
    assert count(variables) + head == 3_939_309


@pytest.mark.parametrize("output_stride", [4, 8, 16, 32])
def test_levels_have_their_strides_up_to_the_cap_and_c5_is_all_of_them(output_stride):
    net = backbones.find("hrnet_w18_small")(output_stride=output_stride)
    _, outputs = trace(net)
    for level in range(1, 6):
        stride = min(2**level, output_stride)
        assert outputs[f"c{level}"].shape[1:3] == (-(-65 // stride), -(-97 // stride)), level
    widths = [outputs[f"c{i}"].shape[-1] for i in (2, 3, 4, 5)]
    assert widths == [18, 36, 72, 144 if output_stride == 32 else 270]


def test_another_output_stride_is_refused():
    with pytest.raises(InputError, match="backbone.output_stride"):
        trace(backbones.find("hrnet_w48")(output_stride=2))


def resize_halves(x, size):
    """Bilinear, pixels as areas."""
    for axis, n in enumerate(size):
        at = np.clip((np.arange(n) + 0.5) * x.shape[axis] / n - 0.5, 0, x.shape[axis] - 1)
        low = np.minimum(at.astype(int), max(x.shape[axis] - 2, 0))
        high = np.minimum(low + 1, x.shape[axis] - 1)
        part = np.expand_dims(at - low, tuple(a for a in range(3) if a != axis))
        x = x.take(low, axis) * (1 - part) + x.take(high, axis) * part
    return x


@pytest.mark.slow
def test_every_branch_gets_the_sum_of_all():
    """Without residual units, on sides that no stride divides."""
    net, rng = Exchange(0, Norm(kind="none")), np.random.default_rng(0)
    branches = [rng.normal(size=(1, *s)).astype(np.float32) for s in ((9, 7, 2), (5, 4, 4))]
    branches.append(rng.normal(size=(1, 3, 2, 8)).astype(np.float32))
    variables = net.init(jax.random.key(0), branches, train=False)
    params = randomised(variables)["params"]
    have = net.apply({"params": params}, branches, train=False)
    layer = {k: jax.tree.map(lambda x: np.asarray(x, np.float64), v["conv"])
             for k, v in params.items()}  # fmt: skip
    a, b, c = (x[0].astype(np.float64) for x in branches)

    def up(x, name, size):
        return resize_halves(ref.conv(x, layer[name]), size)

    def down(x, name):
        return ref.conv(x, layer[name], stride=2, pad=1)

    two = down(ref.relu(down(a, "from1_to3_1")), "from1_to3")
    wants = [
        a + up(b, "from2_to1", (9, 7)) + up(c, "from3_to1", (9, 7)),
        b + down(a, "from1_to2") + up(c, "from3_to2", (5, 4)),
        c + two + down(b, "from2_to3"),
    ]
    for x, want in zip(have, wants, strict=True):
        ref.assert_close(np.asarray(x[0]), ref.relu(want))
