"""Convolutions and their gradients against loops over taps in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxseg.ops.conv import conv, depthwise

CASES = [  # size, kernel, stride, rate, padding
    ((6, 8), (1, 1), 1, 1, ((0, 0), (0, 0))),
    ((7, 5), (1, 1), 2, 1, ((0, 0), (0, 0))),
    ((6, 8), (1, 1), 2, 2, ((0, 0), (0, 0))),
    ((5, 6), (1, 1), 2, 1, ((2, 1), (0, 3))),
    ((1, 1), (1, 1), 1, 1, ((0, 0), (0, 0))),
    ((6, 8), (3, 3), 1, 1, ((1, 1), (1, 1))),
    ((7, 6), (3, 3), 2, 1, ((1, 1), (1, 1))),
    ((6, 8), (3, 3), 2, 1, ((0, 1), (0, 1))),  # TensorFlow's "SAME" at stride 2
    ((9, 8), (3, 3), 1, 2, ((2, 2), (2, 2))),
    ((7, 9), (3, 3), 1, 12, ((12, 12), (12, 12))),  # most taps see only padding
    ((8, 10), (3, 3), 1, 5, ((6, 3), (5, 4))),  # fewer than 0.6 of the products meet a pixel
    ((9, 8), (5, 3), 1, 4, ((8, 7), (-1, 6))),
    ((9, 8), (3, 3), 2, 2, ((2, 1), (0, 3))),
    ((8, 7), (3, 3), 3, 1, ((4, 0), (3, 5))),  # padding past the kernel
    ((8, 7), (3, 3), 2, 1, ((-1, 0), (1, -2))),  # cut instead of padded
    ((6, 7), (5, 5), 1, 1, ((0, 0), (0, 0))),
    ((8, 9), (5, 3), 2, 1, ((2, 2), (1, 1))),
    ((9, 7), (7, 7), 2, 1, ((3, 3), (3, 3))),  # ResNet stem
    ((30, 27), (3, 3), 2, 12, ((2, 3), (1, 0))),
]


@pytest.fixture(params=["cpu", "elsewhere"])
def platform(request, monkeypatch):
    """Runs a test in the forms for CPU, then in those for other platforms."""
    if request.param == "elsewhere":
        jax.clear_caches()
        monkeypatch.setattr(
            jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args)
        )
        yield
        jax.clear_caches()
    else:
        yield


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def reference(x, kernel, g, stride, rate, padding):
    """Output, and gradients of x and kernel, tap by tap. kernel [kh,kw,C,D], or [kh,kw,C]."""
    (above, below), (left, right) = padding
    b, height, width, c = x.shape
    reach = [rate * (k - 1) for k in kernel.shape[:2]]
    # Wide enough for any padding: the image lies in the middle of zeros.
    room = 40
    wide = np.zeros((b, height + 2 * room, width + 2 * room, c))
    wide[:, room : room + height, room : room + width] = x
    slope = np.zeros_like(wide)
    h = (height + above + below - reach[0] - 1) // stride + 1
    w = (width + left + right - reach[1] - 1) // stride + 1
    y = np.zeros((b, h, w, kernel.shape[-1]))
    dk = np.zeros(kernel.shape)
    times = "bc,c->bc" if kernel.ndim == 3 else "bc,cd->bd"
    back = "bc,c->bc" if kernel.ndim == 3 else "bd,cd->bc"
    outer = "bc,bc->c" if kernel.ndim == 3 else "bc,bd->cd"
    for u, v, i, j in np.ndindex(h, w, *kernel.shape[:2]):
        row = room - above + u * stride + i * rate
        col = room - left + v * stride + j * rate
        y[:, u, v] += np.einsum(times, wide[:, row, col], kernel[i, j])
        slope[:, row, col] += np.einsum(back, g[:, u, v], kernel[i, j])
        dk[i, j] += np.einsum(outer, wide[:, row, col], g[:, u, v])
    return y, slope[:, room : room + height, room : room + width], dk


def run(op, x, kernel, *args):
    """Output and both gradients for a random cotangent, which is returned too."""
    y_shape = jax.eval_shape(lambda x, k: op(x, k, *args), x, kernel)
    g = random(2, *y_shape.shape).astype(x.dtype)

    @jax.jit
    def both(x, kernel, g):
        y, pull = jax.vjp(lambda x, k: op(x, k, *args), x, kernel)
        return y, *pull(g)

    return g, both(x, kernel, g)


@pytest.mark.parametrize("op", [conv, depthwise])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_loops(op, case, platform):
    size, taps, *args = case
    x = random(0, 2, *size, 3)
    kernel = random(1, *taps, 3, 4) if op is conv else random(1, *taps, 3)
    g, found = run(op, x, kernel, *args)
    expected = reference(*(a.astype(np.float64) for a in (x, kernel, g)), *args)
    for have, want in zip(found, expected, strict=True):
        assert have.shape == want.shape and have.dtype == jnp.float32
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_what_meets_only_padding_is_not_computed():
    x, kernel = jnp.ones((1, 32, 32, 8)), jnp.ones((3, 3, 8, 8))
    counts = []
    for rate in (36, 1):
        same = ((rate, rate), (rate, rate))
        program = jax.jit(lambda x, k, r=rate, p=same: conv(x, k, 1, r, p)).lower(x, kernel)
        text = program.compile().as_text()
        counts.append((text.count(" dot("), text.count(" convolution(")))
    assert counts == [(1, 0), (0, 1)]


def test_many_channels_against_loops():
    """From 512 on, depthwise's gradient takes one pass for three taps."""
    x, kernel = random(0, 1, 9, 8, 1000), random(1, 3, 3, 1000)
    args = (2, 2, ((2, 2), (2, 1)))
    g, found = run(depthwise, x, kernel, *args)
    expected = reference(*(a.astype(np.float64) for a in (x, kernel, g)), *args)
    for have, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("op", [conv, depthwise])
@pytest.mark.parametrize("case", [CASES[1], CASES[6], CASES[8]], ids=str)
def test_bfloat16(op, case, platform):
    size, taps, *args = case
    x = random(0, 2, *size, 3).astype(jnp.bfloat16)
    kernel = random(1, *taps, 3, 4)[..., : 4 if op is conv else 1].astype(jnp.bfloat16)
    kernel = kernel if op is conv else kernel[..., 0]
    g, found = run(op, x, kernel, *args)
    expected = reference(*(a.astype(np.float64) for a in (x, kernel, g)), *args)
    for have, want in zip(found, expected, strict=True):
        assert have.dtype == jnp.bfloat16
        error = np.abs(np.asarray(have, np.float64) - want)
        assert error.max() <= 2**-7 * np.abs(want).max()  # two roundings to 8 bits


@pytest.mark.parametrize("op", [conv, depthwise])
def test_bfloat16_sums_in_float32(op):
    """Summed in bfloat16, ones stop at 256."""
    x = jnp.ones((2, 32, 32, 1024), jnp.bfloat16)
    kernel = jnp.ones((1, 1, 1024, 2) if op is conv else (1, 1, 1024), jnp.bfloat16)
    y, pull = jax.vjp(op, x, kernel)
    _, dk = pull(jnp.ones_like(y))
    assert bool((y == (1024 if op is conv else 1)).all())
    assert bool((dk == 2048).all())


@pytest.mark.slow
@pytest.mark.parametrize("op", [conv, depthwise])
@pytest.mark.parametrize("taps", [1, 3])
def test_vmap(op, taps):
    x = random(0, 3, 2, 5, 6, 2)
    kernel = random(1, 3, taps, taps, 2, 2)[..., : 2 if op is conv else 1]
    kernel = kernel if op is conv else kernel[..., 0]

    def slopes(x, kernel):
        return jax.grad(lambda x, k: (op(x, k, 2, 1, ((1, 1), (0, 1))) ** 2).sum(), (0, 1))(
            x, kernel
        )

    mapped, shared = jax.jit(jax.vmap(slopes))(x, kernel), jax.jit(jax.vmap(slopes, (0, None)))
    for have, have_shared, want in zip(
        mapped, shared(x, kernel[1]), slopes(x[1], kernel[1]), strict=True
    ):
        np.testing.assert_allclose(have[1], want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(have_shared[1], want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("op", [conv, depthwise])
@pytest.mark.parametrize(
    ("taps", "stride", "rate"), [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 4)]
)
def test_sharded_rows_move_only_a_halo(op, taps, stride, rate):
    mesh = jax.make_mesh((2, 4), ("data", "space"), (AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, PartitionSpec("data", "space"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    x = random(0, 4, 32, 8, 2)
    kernel = random(1, taps, taps, 2, 3)
    kernel = kernel if op is conv else kernel[..., 0]
    pad = rate * (taps - 1) // 2

    def slopes(x, kernel):
        y, pull = jax.vjp(lambda x, k: op(x, k, stride, rate, ((pad, pad),) * 2), x, kernel)
        return y, *pull(jnp.sin(y))

    places = {"in_shardings": (rows, everywhere), "out_shardings": (rows, rows, everywhere)}
    compiled = jax.jit(slopes, **places).lower(x, kernel).compile()
    assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()
    found = compiled(jax.device_put(x, rows), jax.device_put(kernel, everywhere))
    for have, want in zip(found, jax.jit(slopes)(x, kernel), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("op,fold", [(conv, 4), (depthwise, 3)])
def test_rows_that_a_rate_takes_past_their_neighbours_save_memory_too(op, fold):
    """12 rows away, of 32 on eight devices: the nearest two have 4 each."""
    x, kernel = random(0, 1, 32, 32, 16), random(1, 3, 3, 16, 8)
    kernel = kernel if op is conv else kernel[..., 0]

    def slopes(x, kernel):
        y, pull = jax.vjp(lambda x, k: op(x, k, 1, 12, ((12, 12), (12, 12))), x, kernel)
        return y, *pull(jnp.sin(y))

    mesh = jax.make_mesh((8,), ("space",), (AxisType.Auto,))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*p)) for p in ((None, "space"), ()))
    places = {"in_shardings": (rows, everywhere), "out_shardings": (rows, rows, everywhere)}
    with jax.set_mesh(mesh):
        shared = jax.jit(slopes, **places).lower(x, kernel).compile()
    alone = jax.jit(slopes).lower(x, kernel).compile()
    needs = [program.memory_analysis().temp_size_in_bytes for program in (shared, alone)]
    assert needs[0] <= min(x.nbytes, needs[1] / fold), needs
    found = shared(jax.device_put(x, rows), jax.device_put(kernel, everywhere))
    for have, want in zip(found, alone(x, kernel), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("op", [conv, depthwise])
def test_each_platform_is_given_its_form(op):
    kernel = random(1, 1, 1, 4, 4) if op is conv else random(1, 3, 3, 4)

    def loss(x, kernel):
        return op(x, kernel, 2).sum()

    def program(platform):
        run = jax.jit(jax.value_and_grad(loss, (0, 1)))
        return export.export(run, platforms=[platform])(random(0, 1, 6, 6, 4), kernel).mlir_module()

    assert "stablehlo.convolution" not in program("cpu")
    for platform in ("cuda", "tpu"):
        text = program(platform)
        assert "stablehlo.convolution" in text and "dot_general" not in text


def test_one_program_for_several_platforms():
    x, kernel = random(0, 1, 6, 6, 4), random(1, 3, 3, 4)
    several = export.export(jax.jit(depthwise), platforms=["cpu", "cuda", "tpu"])(x, kernel)
    np.testing.assert_allclose(several.call(x, kernel), depthwise(x, kernel), atol=1e-6)


@pytest.mark.parametrize("op", [conv, depthwise])
def test_channels_and_dtypes_must_match(op):
    tail = (3, 4) if op is conv else (3,)
    for taps in (1, 3):
        with pytest.raises((TypeError, ValueError)):
            op(jnp.zeros((1, 4, 4, 2)), jnp.zeros((taps, taps, *tail)))
        with pytest.raises(TypeError, match="dtype"):
            op(jnp.zeros((1, 4, 4, 3), jnp.bfloat16), jnp.zeros((taps, taps, *tail)))


@pytest.mark.parametrize(
    ("rates", "seen"),
    [
        ((2, 2, 2), {-6, -4, -2, 0, 2, 4, 6}),  # gridding: one pixel in four
        ((1, 2, 5), set(range(-8, 9))),  # hybrid dilated convolution
        ((1, 2, 9), set(range(-12, 13)) - {-5, -4, 4, 5}),  # the section's counter-example
    ],
)
def test_gridding_of_dilated_convolutions(rates, seen):
    """Which pixels one output of three dilated convolutions sees: its gradient.

    Equal rates leave holes, and a hybrid of rates without a common factor does not (Wang et al.
    2018, arXiv 1702.08502, section 3.2).
    """
    kernel = jnp.ones((3, 3, 1, 1))

    def centre(x):
        for rate in rates:
            x = conv(x, kernel, rate=rate, padding=((rate, rate), (rate, rate)))
        return x[0, 13, 13, 0]

    slope = jax.jit(jax.grad(centre))(jnp.ones((1, 27, 27, 1)))[0, :, :, 0]
    rows, cols = np.nonzero(slope)
    assert set(zip((rows - 13).tolist(), (cols - 13).tolist(), strict=True)) == {
        (i, j) for i in seen for j in seen
    }
