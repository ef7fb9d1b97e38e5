"""Inference against windows, scales and flips done one by one in numpy."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxseg import inference, models
from jaxseg.config import default
from jaxseg.errors import InputError
from jaxseg.inference import buckets, make_infer
from jaxseg.sharding import make_mesh, replicated
from jaxseg.windows import axis_shares, starts

K = 4


def _config(evaluation: dict | None = None, **model) -> ConfigDict:
    config = default()
    config.data.crop = (16, 16)
    config.model.update(name="unet", num_classes=K, widths=(4, 8), padding="same", dropout=0.0)
    config.model.update(model)
    config.eval.update(evaluation or {})
    models.complete(config)
    return config


def _variables(config: ConfigDict) -> dict:
    model, _, _ = models.build(config)
    image = jnp.zeros((1, *model.fit(config.data.crop), 3))
    variables = jax.jit(model.init, static_argnames="train")(jax.random.key(0), image, train=False)
    return {"batch_stats": {}, **variables}


@pytest.fixture(scope="module")
def variables() -> dict:
    return _variables(_config())


def _image(*size: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, (batch, *size, 3), np.uint8)


def _run(config: ConfigDict, variables: dict, image: np.ndarray, size: tuple = (), **options):
    size = size or image.shape[1:3]
    infer = jax.jit(make_infer(config), static_argnames=("size", "logits"))
    return jax.device_get(infer(variables, jnp.asarray(image), size, **options))


def _softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def _agree(out: dict, expected: np.ndarray, atol: float = 1e-5) -> None:
    """expected: probabilities [B,H,W,K], to which softmax takes the logits."""
    np.testing.assert_allclose(_softmax(out["logits"]), expected, atol=atol)
    np.testing.assert_array_equal(out["semantic"], out["logits"].argmax(-1))
    assert out["semantic"].dtype == np.int32 and out["finite"].all()


SIZES = [(16, 16), (17, 23), (5, 40), (1, 1)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_the_answer_has_the_size_of_the_image(size, padding, mode):
    config = _config({"mode": mode, "crop": (1, 1) if size == (1, 1) else (5, 12)}, padding=padding)
    variables = jax.eval_shape(lambda: _variables(config))
    image = jnp.zeros((2, *size, 3), jnp.uint8)
    out = jax.eval_shape(lambda v, x: make_infer(config)(v, x, size), variables, image)
    assert out["semantic"].shape == (2, *size) and out["semantic"].dtype == jnp.int32
    assert out["logits"].shape == (2, *size, K) and out["logits"].dtype == jnp.float32
    assert out["finite"].shape == (2,)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_an_image_is_mirrored_at_its_borders_where_the_network_needs_more(padding):
    config = _config(padding=padding)
    model, _, predict = models.build(config)
    variables = _variables(config)
    image = _image(13, 10)
    need = model.fit((13, 10))
    before = [(n - h) // 2 for n, h in zip(need, (13, 10), strict=True)]
    pads = [(b, n - h - b) for b, n, h in zip(before, need, (13, 10), strict=True)]
    padded = np.pad(image, [(0, 0), *pads, (0, 0)], mode="symmetric")
    assert padded.shape != image.shape
    x = (padded - np.array(config.data.mean)) / np.array(config.data.std)
    x = jnp.asarray(x, jnp.float32)
    whole = np.asarray(predict(model.apply(variables, x, train=False), x)["logits"])
    lost = [(n - h) // 2 for n, h in zip(padded.shape[1:3], whole.shape[1:3], strict=True)]
    top, left = (b - gone for b, gone in zip(before, lost, strict=True))
    out = _run(config, variables, image)
    np.testing.assert_allclose(out["logits"], whole[:, top : top + 13, left : left + 10], atol=1e-4)


def test_valid_and_padded_labels_are_where_the_image_is():
    config = _config(padding="valid")
    variables = _variables(config)
    image, spot = (np.full((1, 21, 24, 3), 128, np.uint8) for _ in range(2))
    spot[0, 5, 18] = 255
    plain, marked = (_run(config, variables, x)["logits"] for x in (image, spot))
    rows, columns = np.nonzero(np.abs(plain - marked).max(axis=(0, 3)) > 1e-7)
    assert abs(rows.mean() - 5) < 3 and abs(columns.mean() - 18) < 3


@pytest.mark.parametrize(
    ("length", "crop", "stride", "expected"),
    [
        (20, 8, 6, [0, 6, 12]),
        (21, 8, 6, [0, 6, 12, 13]),
        (8, 8, 6, [0]),
        (9, 8, 6, [0, 1]),
        (24, 8, 8, [0, 8, 16]),
    ],
)
def test_windows_start_as_in_mmsegmentation(length, crop, stride, expected):
    assert starts(length, crop, stride).tolist() == expected
    count = max(length - crop + stride - 1, 0) // stride + 1  # its words: h_grids
    ends = [min(i * stride + crop, length) for i in range(count)]
    assert [max(end - crop, 0) for end in ends] == expected


@pytest.mark.parametrize("blend", ["uniform", "gaussian"])
@pytest.mark.parametrize(("length", "crop", "stride"), [(20, 8, 6), (21, 8, 3), (8, 8, 5)])
def test_shares_of_a_pixel_add_up_to_one(length, crop, stride, blend):
    first, shares = axis_shares(length, crop, stride, blend)
    total = np.zeros(length)
    for start, share in zip(first, shares, strict=True):
        total[start : start + crop] += share
        assert (share > 0).all() and np.isfinite(share).all()
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    inner = shares[len(shares) // 2]
    assert blend == "uniform" or len(shares) == 1 or inner.max() > 3 * inner.min()


def _by_hand(config: ConfigDict, variables: dict, image: np.ndarray, crop, stride) -> np.ndarray:
    """Each window through whole-image inference, added up in float64 numpy."""
    whole = config.copy_and_resolve_references()
    whole.eval.update(mode="whole", flip=False, scales=(1.0,))
    probabilities = config.eval.average == "probabilities"
    bump = [np.ones(n) for n in crop]
    if config.eval.blend == "gaussian":
        bump = [np.exp(-((np.arange(n) - (n - 1) / 2) ** 2) / (2 * (n / 8) ** 2)) for n in crop]
    total = np.zeros((*image.shape[:3], K))
    weight = np.zeros(image.shape[1:3])

    def voice(x: np.ndarray) -> np.ndarray:
        logits = _run(whole, variables, x)["logits"].astype(np.float64)
        return _softmax(logits) if probabilities else logits

    for y, x in itertools.product(
        *(starts(*a) for a in zip(image.shape[1:3], crop, stride, strict=True))
    ):
        at = np.s_[:, y : y + crop[0], x : x + crop[1]]
        said = voice(image[at])
        if config.eval.flip:
            said = (said + voice(image[at][:, :, ::-1])[:, :, ::-1]) / 2
        total[at] += said * np.outer(*bump)[..., None]
        weight[at[1:]] += np.outer(*bump)
    mean = total / weight[..., None]
    return mean if probabilities else _softmax(mean)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "stride", "blend", "average", "flip", "batch"),
    [
        ((24, 31), (8, 6), "uniform", "probabilities", False, 1),
        ((24, 31), (8, 6), "gaussian", "logits", False, 3),
        ((13, 12), (5, 12), "gaussian", "probabilities", True, 8),
        ((12, 40), (0, 0), "uniform", "logits", True, 2),
    ],
)
def test_windows_are_blended_as_one_by_one(variables, size, stride, blend, average, flip, batch):
    asked = {"mode": "slide", "crop": (12, 12), "stride": stride, "blend": blend}
    config = _config({**asked, "average": average, "flip": flip, "batch": batch})
    image = _image(*size, batch=2)
    out = _run(config, variables, image)
    stride = tuple(s or 8 for s in stride)  # two thirds of 12
    _agree(out, _by_hand(config, variables, image, (12, 12), stride))
    lean = _run(config, variables, image, logits=False)
    assert lean.keys() == {"semantic", "finite"}
    np.testing.assert_array_equal(lean["semantic"], out["semantic"])


def test_one_window_over_all_is_the_whole_image(variables):
    image = _image(16, 12)
    whole = _run(_config(), variables, image)
    slid = _run(_config({"mode": "slide", "crop": (16, 12)}), variables, image)
    _agree(slid, _softmax(whole["logits"]))


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_overlap_tiles_of_a_valid_network_are_its_answer_to_the_whole_image(average):
    """Tiles see what surrounds them, mirrored beyond the image: only the grid of pooling counts."""
    asked = {"mode": "slide", "crop": (8, 16), "stride": (8, 16), "average": average}
    config = _config(asked, padding="valid")
    variables = _variables(config)
    image = _image(24, 32)
    whole = _run(_config(padding="valid"), variables, image)
    assert whole["logits"].std() > 0.01
    _agree(_run(config, variables, image), _softmax(whole["logits"]))


@pytest.mark.parametrize(("train", "labelled"), [(572, 388), (600, 404), (188, 4)])
def test_the_default_window_is_the_largest_that_a_training_crop_labels(train, labelled):
    """U-Net, section 2: of 572 pixels it labels 388; the next sizes up are 588 and 604."""
    model = SimpleNamespace(fit=models.unet.Model(num_classes=2).fit)
    config = _config({"mode": "slide"}, padding="valid")
    config.data.crop = (train, 572)
    crop, stride = inference.windows(config, model.fit)
    assert crop == (labelled, 388) and stride == (-(-2 * labelled // 3), 259)
    assert model.fit(crop) <= (train, 572) < model.fit((labelled + 1, 389))


def test_a_training_crop_that_labels_nothing_makes_no_window():
    config = _config({"mode": "slide"}, padding="valid")
    with pytest.raises(InputError, match=r"no window fits data.crop \(16, 16\): .* Set eval.crop"):
        make_infer(config)


def test_a_side_shorter_than_the_window_is_mirrored(variables):
    config = _config({"mode": "slide", "crop": (16, 16), "stride": (16, 16)})
    image = _image(10, 16)
    grown = np.pad(image, [(0, 0), (0, 6), (0, 0), (0, 0)], mode="symmetric")
    expected = _run(_config(), variables, grown)["logits"][:, :10]
    _agree(_run(config, variables, image), _softmax(expected))


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Triangles as wide as a pixel of the coarser grid, in float64."""
    x = image.astype(np.float64)
    for axis, n in zip((1, 2), size, strict=True):
        n_in = x.shape[axis]
        at = (np.arange(n) + 0.5) * n_in / n - 0.5
        hats = 1 - np.abs(at[:, None] - np.arange(n_in)) / max(1, n_in / n)
        hats = hats.clip(0)
        hats /= hats.sum(1, keepdims=True)
        x = np.moveaxis(np.tensordot(hats, x, (1, axis)), 0, axis)
    return x


def _upsampled(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear without antialiasing, in float64."""
    for axis, n in zip((1, 2), size, strict=True):
        n_in = x.shape[axis]
        at = ((np.arange(n) + 0.5) * n_in / n - 0.5).clip(0, n_in - 1)
        low = np.floor(at).astype(int)
        part = (at - low).reshape([-1 if a == axis else 1 for a in range(4)])
        high = np.minimum(low + 1, n_in - 1)
        x = (1 - part) * np.take(x, low, axis) + part * np.take(x, high, axis)
    return x


@pytest.mark.slow
@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize(("flip", "turns"), [(False, False), (True, False), (True, True)])
def test_scales_flips_and_turns_are_averaged(variables, average, flip, turns):
    scales, size = (0.5, 1.0, 1.5), (24, 32)  # no scale needs a mirrored border
    config = _config({"scales": scales, "flip": flip, "turns": turns, "average": average})
    image, said = _image(*size), []
    for scale in scales:
        x = _resized(image, tuple(round(n * scale) for n in size)).astype(np.float32)
        for step in (1, -1) if flip else (1,):
            for turn in range(4 if turns else 1):
                seen = np.rot90(x[:, :, ::step], turn, (1, 2))
                logits = np.rot90(_run(_config(), variables, seen)["logits"], -turn, (1, 2))
                logits = _upsampled(logits[:, :, ::step].astype(np.float64), size)
                said.append(_softmax(logits) if average == "probabilities" else logits)
    mean, out = np.mean(said, axis=0), _run(config, variables, image)
    _agree(out, mean if average == "probabilities" else _softmax(mean), atol=1e-4)


@pytest.mark.slow
def test_scales_and_windows_go_together(variables):
    config = _config({"mode": "slide", "crop": (16, 16), "scales": (1.0, 2.0)})
    image = _image(20, 24)
    said = []
    for scale in (1, 2):
        x = np.float32(_resized(image, (20 * scale, 24 * scale)))
        said.append(_upsampled(_by_hand(config, variables, x, (16, 16), (11, 11)), (20, 24)))
    _agree(_run(config, variables, image), np.mean(said, axis=0), atol=1e-4)


def test_one_scale_that_is_not_one(variables):
    image = _image(20, 24)
    out = _run(_config({"scales": (0.5,)}), variables, image)
    x = np.float32(_resized(image, (10, 12)))
    logits = _run(_config(), variables, x)["logits"]
    _agree(out, _softmax(_upsampled(logits.astype(np.float64), (20, 24))), atol=1e-4)


def test_any_other_size_is_answered_too(variables):
    image = _image(16, 16)
    logits = _run(_config(), variables, image)["logits"]
    out = _run(_config(), variables, image, size=(24, 20))
    _agree(out, _softmax(_upsampled(logits.astype(np.float64), (24, 20))), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8, 16])
def test_windows_over_eight_devices_say_the_same(variables, batch):
    config = _config({"mode": "slide", "crop": (12, 12), "batch": 4, "stride": (6, 6)})
    mesh, image = make_mesh(config.mesh), _image(14, 31, batch=batch)
    alone = _run(config, variables, image)
    infer = jax.jit(make_infer(config, mesh), static_argnames="size")
    out = infer(jax.device_put(variables, replicated(mesh)), image, size=(14, 31))
    np.testing.assert_allclose(out["logits"], alone["logits"], atol=1e-5)
    hlo = infer.lower(jax.device_put(variables, replicated(mesh)), image, size=(14, 31)).compile()
    assert f"f32[{max(1, batch // 8)},12,12,4]" in hlo.as_text()  # a device's share of logits


def test_nothing_loops_over_windows_in_python(variables):
    config = _config({"mode": "slide", "crop": (12, 12), "batch": 2})

    def equations(size: tuple[int, int]) -> int:
        image = jnp.zeros((1, *size, 3), jnp.uint8)
        return str(jax.make_jaxpr(lambda x: make_infer(config)(variables, x, size))(image)).count(
            "="
        )

    assert equations((40, 40)) == equations((160, 400))


def test_bfloat16_inference_gives_float32_logits_close_to_those_of_float32(variables):
    half = _config()
    half.train.compute_dtype = "bfloat16"
    full, ours = (_run(c, variables, _image(16, 16))["logits"] for c in (_config(), half))
    assert ours.dtype == np.float32 and (ours != full).any()
    np.testing.assert_allclose(ours, full, atol=0.1 * np.abs(full).max())


def test_parameters_are_cast_to_the_compute_dtype():
    params = {"conv": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    cast = inference.cast(params, "bfloat16")
    assert all(p.dtype == jnp.bfloat16 for p in jax.tree.leaves(cast))


def _atrous(output_stride: int) -> ConfigDict:
    config = default()
    config.data.crop = (65, 65)
    backbone = {"name": "resnet18", "output_stride": 16}
    config.model.update(name="deeplabv3", num_classes=K, backbone=backbone)
    config.eval.output_stride = output_stride
    models.complete(config)
    return config


def test_another_output_stride_keeps_the_parameters_and_refines_the_grid():
    """The network that is built has the rates and the parameters of one made with that stride."""
    config = _atrous(8)
    assert inference.at_output_stride(_atrous(0)).model.backbone.output_stride == 16
    model, _, _ = models.build(inference.at_output_stride(config))
    trained, _, _ = models.build(config)
    image = jnp.zeros((1, 65, 65, 3))
    shapes = [
        jax.eval_shape(lambda m=m: m.init(jax.random.key(0), image, train=False))
        for m in (model, trained)
    ]
    assert jax.tree.map(lambda x: x.shape, shapes[0]) == jax.tree.map(lambda x: x.shape, shapes[1])
    for m, size in ((model, (9, 9)), (trained, (5, 5))):
        out = jax.eval_shape(lambda m=m: m.apply(shapes_of(shapes[0]), image, train=False))
        assert out["logits"].shape[1:3] == size


def shapes_of(tree):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"output_stride": 8}, "eval.output_stride is 8, but unet has no backbone"),
        ({"mode": "slide", "stride": (17, 16)}, r"eval.stride \(17, 16\) is above .*\(16, 16\)"),
        ({"mode": "slide", "crop": (12, 12), "stride": (0, 13)}, r"\(8, 13\) is above"),
        ({"crf": "nosuch"}, "nosuch"),
    ],
)
def test_settings_that_do_not_fit_are_refused_when_the_network_is_built(asked, expected):
    with pytest.raises(InputError, match=expected):
        make_infer(_config(asked))


def test_an_image_smaller_than_one_window_is_refused(variables):
    config = _config({"mode": "slide", "crop": (16, 16)})
    with pytest.raises(InputError, match=r"image of \(10, 12\) is smaller .* \(16, 16\).*whole"):
        make_infer(config)(variables, jnp.asarray(_image(10, 12)), (10, 12))


def test_few_sizes_stay_as_they_are():
    sizes = [(3, 4), (5, 6), (3, 4)]
    assert buckets(sizes, 2) == {(3, 4): (3, 4), (5, 6): (5, 6)}


def _padding(sizes: list, fits: dict) -> float:
    """Added pixels, as a share of those of the images."""
    own = sum(h * w for h, w in sizes)
    return sum(np.prod(fits[size]) for size in sizes) / own - 1


@pytest.mark.parametrize("most", [1, 4, 8])
@pytest.mark.parametrize("distinct", [12, 200, 2000])
def test_many_sizes_share_few_shapes_that_cover_them(most, distinct):
    rng = np.random.default_rng(distinct)
    sizes = [tuple(map(int, s)) for s in rng.integers(200, 640, (distinct, 2))]
    fits = buckets(sizes, most)
    assert len(set(fits.values())) <= most
    assert all(a >= b for s in sizes for a, b in zip(fits[s], s, strict=True))
    assert most < 8 or _padding(sizes, fits) < 0.45
    assert buckets(sizes[::-1], most) == fits


def test_the_shapes_follow_the_histogram():
    """Many images of two sizes and a few odd ones: the two are hardly padded."""
    sizes = [(375, 500)] * 700 + [(500, 375)] * 300
    sizes += [(375 - i, 500 - i) for i in range(20)] + [(300 + i, 300) for i in range(20)]
    fits = buckets(sizes, 3)
    assert fits[375, 500] == (375, 500) and fits[500, 375] == (500, 375)
    assert _padding(sizes, fits) < 0.01


def _pixels(monkeypatch: pytest.MonkeyPatch, step: int = 1) -> np.ndarray:
    """Makes inference that of a network of 1x1 convolutions, on multiples of `step` pixels."""
    weight = jax.random.normal(jax.random.key(1), (3, K))
    network = SimpleNamespace(
        apply=lambda variables, x, train: {"logits": x @ weight},
        fit=lambda size: tuple(-(-n // step) * step for n in size),
    )
    built = (network, None, models.build(_config())[2])
    monkeypatch.setattr(models, "build", lambda config: built)
    return np.asarray(weight)


def test_a_bucket_answers_for_its_pixels_as_the_image_alone(monkeypatch):
    """Where every pixel is seen alone: what surrounds them changes nothing, to the last bit."""
    _pixels(monkeypatch)
    image = _image(9, 14)
    grown = np.pad(image, [(0, 0), (0, 23), (0, 2), (0, 0)], mode="symmetric")
    alone, padded = (_run(_config(), {"params": {}}, x) for x in (image, grown))
    np.testing.assert_array_equal(padded["logits"][:, :9, :14], alone["logits"])


@pytest.mark.parametrize("size", [(16, 16), (13, 21), (12, 31)])
@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_all_views_of_a_pixel_are_of_that_pixel(monkeypatch, size, mode):
    """Margins of odd widths included: mirrored, cut or not, a pixel alone says the same."""
    weight = _pixels(monkeypatch, step=8)
    asked = {"mode": mode, "crop": (11, 13), "flip": True, "average": "logits"}
    config = _config(asked)
    image = _image(*size)
    x = (image - np.array(config.data.mean)) / np.array(config.data.std)
    out = _run(config, {"params": {}}, image)
    np.testing.assert_allclose(out["logits"], x @ weight, atol=1e-4)


@pytest.mark.parametrize("mode", ["whole", "slide"])
@pytest.mark.parametrize("flip", [False, True])
def test_answers_that_are_not_finite_are_told_by_image(monkeypatch, mode, flip):
    _pixels(monkeypatch)
    config = _config({"mode": mode, "crop": (12, 12), "flip": flip})
    image = np.float32(_image(16, 31, batch=2))
    image[1, 15, 30] = np.nan
    for logits in (False, True):
        out = _run(config, {"params": {}}, image, logits=logits)
        assert out["finite"].tolist() == [True, False]


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_minus_infinity_is_not_finite_even_where_probabilities_are_averaged(monkeypatch, mode):
    """A softmax makes a 0 of it."""
    logits = {"logits": jnp.zeros((1, 12, 12, K)).at[0, 3, 4, 0].set(-jnp.inf)}
    network = SimpleNamespace(apply=lambda variables, x, train: logits)
    built = (network, None, models.build(_config())[2])
    monkeypatch.setattr(models, "build", lambda config: built)
    config = _config({"mode": mode, "crop": (12, 12), "flip": True})
    for keep in (False, True):
        out = _run(config, {"params": {}}, _image(12, 12), logits=keep)
        assert out["finite"].tolist() == [False]


@pytest.mark.slow
def test_another_output_stride_gives_the_logits_of_a_network_built_at_it():
    """With the same weights, which a run trained at stride 16 has."""
    trained, asked = _atrous(0), _atrous(8)
    built = _atrous(0)
    built.model.backbone.output_stride = 8
    model, _, predict = models.build(built)
    variables = _variables(trained)
    image = _image(65, 65)
    x = jnp.float32((image - np.array(built.data.mean)) / np.array(built.data.std))
    expected = jax.jit(lambda v, x: predict(model.apply(v, x, train=False), x)["logits"])
    out = _run(asked, variables, image)
    np.testing.assert_allclose(out["logits"], expected(variables, x), atol=1e-4)
    assert np.abs(out["logits"] - _run(trained, variables, image)["logits"]).max() > 1e-3
