"""Foreign names and layouts: rules, kernels, rolled inputs, and what does not fit."""

import re

import numpy as np

from jaxseg.weights import imagenet
from jaxseg.weights.names import Rolled, Transposed, fit, layout, resnet


def test_kernels_are_transposed_and_vectors_are_not():
    kernel = np.arange(2 * 3 * 5 * 7.0).reshape(2, 3, 5, 7)  # out, in, h, w
    ours = layout(kernel, (5, 7, 3, 2))
    assert ours.shape == (5, 7, 3, 2) and ours[4, 6, 1, 0] == kernel[0, 1, 4, 6]
    depthwise = np.arange(9.0 * 4).reshape(4, 1, 3, 3)
    assert layout(depthwise, (3, 3, 1, 4))[2, 0, 0, 3] == depthwise[3, 0, 2, 0]
    assert layout(np.arange(3.0), (3,)).tolist() == [0, 1, 2]


def test_a_fully_connected_layer_is_a_convolution_over_the_map():
    rng = np.random.default_rng(0)
    x, matrix = rng.standard_normal((3, 5, 7)), rng.standard_normal((2, 105))  # C,h,w; out,C*h*w
    kernel = layout(matrix, (5, 7, 3, 2))
    np.testing.assert_allclose(np.einsum("chw,hwco->o", x, kernel), matrix @ x.ravel(), rtol=1e-12)


def test_the_first_rule_that_matches_the_whole_name_wins():
    state = {
        "a.0.weight": np.ones((2, 3, 1, 1)),
        "a.1.weight": np.full(2, 3.0),
        "a.1.running_mean": np.full(2, 4.0),
        "a.1.num_batches_tracked": np.zeros((), np.int64),
        "b.a.0.weight": np.ones((2, 3, 1, 1)),
    }
    shapes = {
        "params/x/conv/kernel": (1, 1, 3, 2),
        "params/x/norm/scale": (2,),
        "params/x/norm/bias": (2,),
        "batch_stats/x/norm/mean": (2,),
    }
    rules = [(r"a\.0", "x/conv"), (r"a\.(\d)", r"x/norm"), (r"a\.0", "y")]
    arrays, report = fit(state, rules, shapes)
    assert set(arrays) == set(shapes) - {"params/x/norm/bias"}
    assert arrays["params/x/norm/scale"].tolist() == [3, 3]
    assert report.missing == ["params/x/norm/bias"]
    assert report.unused == ["b.a.0.weight"] and not report.misfits
    assert all(value.dtype == np.float32 for value in arrays.values())


def test_a_deep_stem_has_three_convolutions():
    matches = [(re.fullmatch(p, f"stem.{i}"), f) for i in range(12) for p, f in resnet()]
    found = {int(match[1]): target(match) for match, target in matches if match}
    layers = ((i, name) for i in (1, 2, 3) for name in ("conv", "norm"))
    expected = [f"backbone/stem{i}/{name}" for i, name in layers]
    assert found == dict(zip((0, 1, 3, 4, 6, 7), expected, strict=True))


def test_a_rolled_kernel_has_its_input_channels_in_our_order():
    kernel = np.arange(5.0).reshape(1, 5, 1, 1)  # theirs: 2 features, then 3 of the skip
    rule = (r"c", lambda _: Rolled("c", lambda channels: channels - 2))
    arrays, _ = fit({"c.weight": kernel}, [rule], {"params/c/kernel": (1, 1, 5, 1)})
    assert arrays["params/c/kernel"].ravel().tolist() == [2, 3, 4, 0, 1]


def test_the_kernel_of_a_transposed_convolution_has_its_inputs_first():
    kernel = np.arange(24.0).reshape(2, 3, 2, 2)  # in, out, h, w
    state = {"up.weight": kernel, "up.bias": np.ones(3)}
    shapes = {"params/up/kernel": (2, 2, 2, 3), "params/up/bias": (3,)}
    arrays, report = fit(state, [("up", lambda _: Transposed("up"))], shapes)
    assert len(report.mapped) == 2 and not report.missing
    assert arrays["params/up/kernel"][1, 0, 1, 2] == kernel[1, 2, 1, 0]


def test_a_frozen_norm_has_its_scale_and_bias_among_the_statistics():
    state = {f"bn.{leaf}": np.ones(2) for leaf in ("weight", "bias", "running_mean", "running_var")}
    shapes = {f"batch_stats/n/{leaf}": (2,) for leaf in ("scale", "bias", "mean", "var")}
    arrays, report = fit(state, [("bn", "n")], shapes)
    assert set(arrays) == set(shapes) and not report.unused


def test_an_array_of_another_shape_is_told_and_not_taken():
    state = {"c.weight": np.ones((21, 4, 1, 1)), "c.bias": np.ones(21)}
    shapes = {"params/c/kernel": (1, 1, 4, 7), "params/c/bias": (7,)}
    arrays, report = fit(state, [("c", "c")], shapes)
    assert not arrays and len(report.misfits) == 2 and len(report.missing) == 2
    assert "c.bias (21,), params/c/bias needs (7,)" in report.text()


def test_a_shortcut_is_told_from_its_norm_by_rank():
    """torchvision: convolution 0, norm 1; with an average pooling first: 1 and 2."""
    shapes = {
        "params/backbone/conv3/unit1/shortcut/conv/kernel": (1, 1, 2, 4),
        "params/backbone/conv3/unit1/shortcut/norm/scale": (4,),
    }
    for conv, norm in ((0, 1), (1, 2)):
        state = {
            f"layer2.0.downsample.{conv}.weight": np.ones((4, 2, 1, 1)),
            f"layer2.0.downsample.{norm}.weight": np.ones(4),
        }
        _, report = fit(state, imagenet.rules("resnet50"), shapes)
        assert len(report.mapped) == 2 and not report.unused
