"""Exact counts, strides and dilation of the backbones, and the layers that they are made of."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg import backbones
from jaxseg.backbones.layers import Conv, ConvNorm, Norm, UpConv, relu_sum, stage_strides
from jaxseg.errors import InputError


def shapes(module, size=(1, 65, 97, 3)):
    """(output shapes, parameter shapes) of a backbone, traced only."""
    image = jax.ShapeDtypeStruct(size, jnp.float32)
    variables = jax.eval_shape(partial(module.init, train=False), jax.random.key(0), image)
    return jax.eval_shape(partial(module.apply, train=False), variables, image), variables


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stem", "parameters"),
    [
        ("resnet18", "7x7", 11_176_512),
        (
            "resnet34",
            "7x7",
            21_797_672 - 513_000,
        ),  # torchvision's, less the classifier's 512 x 1000
        ("resnet50", "7x7", 23_508_032),
        ("resnet50", "v1c", 23_527_264),
        ("resnet50", "deep", 23_631_808),
        ("resnet101", "7x7", 42_500_160),
        ("resnet101", "deep", 42_623_936),
        ("resnet152", "7x7", 60_192_808 - 2_049_000),
    ],
)
def test_resnets_have_the_published_number_of_parameters(name, stem, parameters):
    _, variables = shapes(backbones.find(name)(stem=stem))
    assert count(variables["params"]) == parameters


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_strides_are_2_to_32_capped_at_the_output_stride(name, output_stride):
    outputs, _ = shapes(backbones.find(name)(output_stride=output_stride))
    for level in range(1, 6):
        stride = min(2**level, output_stride)
        expected = (-(-65 // stride), -(-97 // stride))
        assert outputs[f"c{level}"].shape[1:3] == expected, f"c{level}"


@pytest.mark.parametrize(
    ("output_stride", "plan"),
    [
        (32, [(2, 1), (2, 1), (1, 1), (2, 1), (2, 1), (2, 1)]),
        (16, [(2, 1), (2, 1), (1, 1), (2, 1), (2, 1), (1, 2)]),
        (8, [(2, 1), (2, 1), (1, 1), (2, 1), (1, 2), (1, 4)]),
    ],
)
def test_stride_past_the_cap_turns_into_dilation(output_stride, plan):
    assert stage_strides((2, 2, 1, 2, 2, 2), output_stride) == plan


@pytest.mark.slow
@pytest.mark.parametrize(("output_stride", "field"), [(32, 435), (16, 467), (8, 483)])
def test_the_field_of_view_is_that_of_the_kernels_strides_and_rates(output_stride, field):
    """By gradient. The sum over layers of (kernel - 1) x rate x stride so far, plus 1, less the 4
    that the gradient of a max-pooling, which picks one of three, does not show."""
    net = backbones.find("resnet18")(output_stride=output_stride, norm=Norm(kind="none"))
    image = jnp.ones((1, 545, 33, 3))
    variables = jax.eval_shape(partial(net.init, train=False), jax.random.key(0), image)
    ones = jax.tree.map(lambda x: jnp.full(x.shape, 1e-2), variables)  # nothing cancels

    def middle(x):
        c5 = net.apply(ones, x, train=False)["c5"]
        return c5[0, c5.shape[1] // 2].sum()

    seen = np.flatnonzero(np.asarray(jax.grad(middle)(image)).sum((0, 2, 3)))
    assert seen[-1] - seen[0] + 1 == field - 4


def test_multi_grid_multiplies_the_rates_of_the_last_stage():
    rates = []

    def note(run, args, kwargs, context):
        if isinstance(context.module, ConvNorm) and context.method_name == "__call__":
            rates.append(("/".join(context.module.path), context.module.rate))
        return run(*args, **kwargs)

    with nn.intercept_methods(note):
        shapes(backbones.find("resnet50")(output_stride=16, multi_grid=(1, 2, 4)))
    found = dict(rates)
    assert [found[f"conv5/unit{unit}/conv2"] for unit in (1, 2, 3)] == [2, 4, 8]
    assert found["conv4/unit6/conv2"] == 1


def audit(net):
    """name -> (stride, rate) of every convolution with a window, in order."""
    found = {}

    def note(run, args, kwargs, context):
        module = context.module
        if isinstance(module, Conv) and context.method_name == "__call__":
            if module.kernel > 1 or module.stride > 1:
                found["/".join(module.path).removesuffix("/conv")] = (module.stride, module.rate)
        return run(*args, **kwargs)

    with nn.intercept_methods(note):
        shapes(net)
    return found


UNITS = {2: 3, 3: 4, 4: 6, 5: 3}  # of a ResNet-50
# (stride, rate) of each 3x3 convolution of conv3, conv4, conv5 where it is not (1, 1). Facts: the
# authors' code of each network.
AUDIT = [
    ("pytorch", False, 32, {"3/1": (2, 1), "4/1": (2, 1), "5/1": (2, 1)}),
    ("pytorch", False, 16, {"3/1": (2, 1), "4/1": (2, 1), "5/*": (1, 2)}),
    ("pytorch", False, 8, {"3/1": (2, 1), "4/*": (1, 2), "5/*": (1, 4)}),
    ("pytorch", True, 16, {"3/1": (2, 1), "4/1": (2, 1), "5/2": (1, 2), "5/3": (1, 2)}),
    (
        "pytorch",
        True,
        8,
        {"3/1": (2, 1), "4/*": (1, 2), "4/1": (1, 1), "5/*": (1, 4), "5/1": (1, 2)},
    ),
    ("tensorflow", False, 32, {"2/3": (2, 1), "3/4": (2, 1), "4/6": (2, 1)}),
    ("tensorflow", False, 16, {"2/3": (2, 1), "3/4": (2, 1), "5/*": (1, 2)}),
    ("tensorflow", False, 8, {"2/3": (2, 1), "4/*": (1, 2), "5/*": (1, 4)}),
    ("pytorch", True, 32, {"3/1": (2, 1), "4/1": (2, 1), "5/1": (2, 1)}),
    ("caffe", False, 32, {}),
    ("caffe", False, 16, {"5/*": (1, 2)}),
    ("caffe", False, 8, {"4/*": (1, 2), "5/*": (1, 4)}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("strides", "contract", "output_stride", "special"), AUDIT)
def test_every_convolution_has_the_conventions_stride_and_rate(
    strides, contract, output_stride, special
):
    options = {"strides": strides, "contract": contract, "output_stride": output_stride}
    found = audit(backbones.find("resnet50")(**options))
    expected = {}
    for stage, units in UNITS.items():
        for unit in range(1, units + 1):
            both = special.get(f"{stage}/*", (1, 1))
            expected[f"conv{stage}/unit{unit}/conv2"] = special.get(f"{stage}/{unit}", both)
    assert {k: v for k, v in found.items() if k.endswith("conv2")} == expected
    first = {k for k, (stride, _) in found.items() if k.endswith("conv1") and stride == 2}
    strided = [stage for stage in (3, 4, 5) if output_stride >= 2**stage]
    wanted = {f"conv{stage}/unit1/conv1" for stage in strided} if strides == "caffe" else set()
    assert first == wanted  # Caffe's stride sits in the first 1x1 convolution


def test_an_absolute_grid_replaces_the_rates():
    net = backbones.find("resnet50")(output_stride=16, multi_grid=(1, 2, 4), absolute_grid=True)
    found = audit(net)
    assert [found[f"conv5/unit{unit}/conv2"][1] for unit in (1, 2, 3)] == [1, 2, 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("output_stride", "expected"),
    [(32, (2, 1, 1)), (16, (1, 1, 2)), (8, (1, 2, 4))],
)
def test_xceptions_removed_strides_dilate_what_comes_after(output_stride, expected):
    """(stride of exit1, its rate, rate of exit2): the authors' code."""
    found = audit(backbones.find("xception65")(output_stride=output_stride))
    stride, rate = found["exit1/separable3/depthwise"]
    assert (stride, rate, found["exit2/separable1/depthwise"][1]) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("xception41", 24_920_560),
        ("xception65", 37_867_312),
        ("xception71", 40_289_736),
        ("mobilenetv2", 3_504_872 - 1_281_000 - 1_280 * (320 + 2)),  # less the last two layers
        ("mobilenetv3_large", 2_971_952),
    ],
)
def test_light_backbones_have_the_published_number_of_parameters(name, parameters):
    outputs, variables = shapes(backbones.find(name)())
    assert count(variables["params"]) == parameters
    for level in range(1, 6):
        assert outputs[f"c{level}"].shape[1:3] == (-(-65 // 2**level), -(-97 // 2**level))


def test_v1d_pools_before_the_shortcut_and_counts_as_v1c():
    net = {stem: backbones.find("resnet50")(stem=stem) for stem in ("v1c", "v1d")}
    assert count(shapes(net["v1c"])[1]["params"]) == count(shapes(net["v1d"])[1]["params"])
    strided = [name for name, (stride, _) in audit(net["v1d"]).items() if stride == 2]
    assert not [name for name in strided if "shortcut" in name]


def test_a_choice_that_a_backbone_does_not_have_is_refused():
    for name, field in {
        "resnet50": {"strides": "torch"},
        "resnet18": {"multi_grid": ()},
        "xception65": {"output_stride": 7},
        "mobilenetv2": {"output_stride": 12},
    }.items():
        with pytest.raises(InputError, match="backbone"):
            shapes(backbones.find(name)(**field))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_relu_sum_is_the_relu_of_the_sum_to_the_bit(dtype):
    rng = np.random.default_rng(0)
    x, y, g = (jnp.asarray(rng.normal(size=(2, 5, 6, 7)), dtype) for _ in range(3))
    x = x.at[0, 0].set(-y[0, 0]).at[0, 1, 0].set(jnp.nan).at[0, 1, 1].set(jnp.inf)
    found, back = jax.vjp(relu_sum, x, y)
    expected, plain = jax.vjp(lambda x, y: jax.nn.relu(x + y), x, y)
    for ours, theirs in zip((found, *back(g)), (expected, *plain(g)), strict=True):
        np.testing.assert_array_equal(ours.astype(jnp.float32), theirs.astype(jnp.float32))


def test_a_norm_has_groups():
    with pytest.raises(InputError, match="norm.groups is 0: needs at least 1"):
        Norm(kind="group", groups=0)


def test_an_unknown_backbone_is_refused_with_the_nearest_name():
    with pytest.raises(InputError, match='Did you mean "resnet50"'):
        backbones.find("resnet5O")


def test_up_conv_equals_a_transposed_convolution_in_value_and_gradient():
    x = jax.random.normal(jax.random.key(0), (2, 5, 7, 6))
    net = UpConv(4)
    variables = net.init(jax.random.key(1), x)
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"] + 0.5

    def ours(x, kernel):
        return net.apply({"params": {"kernel": kernel, "bias": bias}}, x)

    def plain(x, kernel):
        # lax.conv_transpose correlates; a transposed convolution flips the kernel
        flipped = kernel[::-1, ::-1]
        return jax.lax.conv_transpose(x, flipped, (2, 2), "VALID") + bias.reshape(1, 1, 1, -1)

    weight = jax.random.normal(jax.random.key(2), (2, 10, 14, 4))
    grads = [
        jax.grad(lambda x, k, f=f: (f(x, k) * weight).sum(), argnums=(0, 1))(x, kernel)
        for f in (ours, plain)
    ]
    np.testing.assert_allclose(ours(x, kernel), plain(x, kernel), atol=1e-5)
    for ours_grad, plain_grad in zip(*grads, strict=True):
        np.testing.assert_allclose(ours_grad, plain_grad, atol=1e-4)


def test_norm_uses_batch_statistics_in_training_and_running_ones_otherwise():
    class Net(nn.Module):
        norm: Norm

        @nn.compact
        def __call__(self, x, train):
            return self.norm(x, train)

    x = 3 + 2 * np.random.default_rng(0).standard_normal((4, 5, 6, 2)).astype(np.float32)
    net = Net(Norm(momentum=0.75, epsilon=1e-3))
    variables = net.init(jax.random.key(0), x, train=False)
    y, updated = net.apply(variables, x, train=True, mutable=["batch_stats"])
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-3), atol=1e-5)
    stats = updated["batch_stats"]["norm"]
    np.testing.assert_allclose(stats["mean"], 0.25 * mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.75 + 0.25 * var, rtol=1e-5)
    frozen = Net(Norm(frozen=True, epsilon=1e-3))
    np.testing.assert_allclose(
        frozen.apply(variables, x, train=True), x / np.sqrt(1.001), atol=1e-5
    )
    assert not jax.tree.leaves(Net(Norm(kind="none")).init(jax.random.key(0), x, train=True))
    # Frozen for good: the same numbers, none of which is a parameter.
    constant = Net(Norm(kind="frozen", epsilon=1e-3))
    shapes = jax.eval_shape(lambda: constant.init(jax.random.key(0), x, train=True))
    assert shapes.keys() == {"batch_stats"}
    drawn = np.random.default_rng(1).uniform(0.5, 2, (4, 2)).astype(np.float32)
    held = dict(zip(("scale", "bias", "mean", "var"), drawn, strict=True))
    assert jax.tree.map(jnp.shape, shapes["batch_stats"]["norm"]) == jax.tree.map(jnp.shape, held)
    y = constant.apply({"batch_stats": {"norm": held}}, x, train=True)
    wanted = (x - held["mean"]) / np.sqrt(held["var"] + 1e-3) * held["scale"] + held["bias"]
    np.testing.assert_allclose(y, wanted, atol=1e-5)
