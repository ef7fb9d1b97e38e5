"""Losses against loops in float64: values, and gradients by differences of the same loops."""

import dataclasses
import inspect
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxseg.errors import InputError
from jaxseg.ops.losses import LOSSES, PixelLoss, cross_entropy, tversky

K = 5
ABSENT = 2  # no pixel of `batch` is of this class
SHAPE = (2, 5, 3)
WEIGHTS = (0.5, 2.0, 1.0, 0.0, 3.0)

EVERY = (
    PixelLoss(),
    PixelLoss("top_k", keep=0.4),
    PixelLoss("ohem", threshold=0.2, min_kept=5),
    PixelLoss("focal"),
    PixelLoss("dice"),
    PixelLoss("tversky"),
    PixelLoss("lovasz"),
    PixelLoss(dice_weight=3.0, class_weights=WEIGHTS, reduction="mean_all"),
)
every_loss = pytest.mark.parametrize("loss", EVERY, ids=[*LOSSES, "and_dice"])


def batch(ignored=0.3, dtype=np.int32, ignore=255, shape=SHAPE):
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(*shape, K)).astype(np.float32)
    label = rng.choice([k for k in range(K) if k != ABSENT], size=shape).astype(dtype)
    label[rng.random(shape) < ignored] = ignore
    return logits, label


def border_map(shape=SHAPE):
    return np.random.default_rng(1).uniform(0.5, 11, shape).astype(np.float32)


@partial(jax.jit, static_argnums=0)
def value_and_grad(loss, logits, label, weight_map=None):
    return jax.value_and_grad(loss)(logits, label, weight_map)


def pixels(loss, logits, label, weight_map, ignore):
    """(-log p, class weight, map) of each pixel that counts."""
    for at in np.ndindex(label.shape):
        k = label[at]
        if k == ignore or loss.class_weights and not loss.class_weights[k]:
            continue
        top = max(logits[at])
        nll = math.log(sum(math.exp(x - top) for x in logits[at])) + top - logits[at][k]
        scale = 1.0 if weight_map is None else float(weight_map[at])
        yield nll, loss.class_weights[k] if loss.class_weights else 1.0, scale


def over_pixels(loss, logits, label, weight_map=None, ignore=255):
    found = list(pixels(loss, logits, label, weight_map, ignore))
    size = label.size
    if loss.name == "top_k":
        size = int(loss.keep * size)
        found = sorted(found, key=lambda x: x[0] * x[1] * x[2], reverse=True)[:size]
    elif loss.name == "ohem":
        found = sorted(found, key=lambda x: x[0], reverse=True)
        least = loss.min_kept * len(label)
        found = found[:least] + [x for x in found[least:] if math.exp(-x[0]) < loss.threshold]
    exponent = loss.gamma if loss.name == "focal" else 0
    total = sum(w * m * nll * (1 - math.exp(-nll)) ** exponent for nll, w, m in found)
    return total / {"sum": 1, "mean": sum(w for _, w, _ in found), "mean_all": size}[loss.reduction]


def of_class(loss, p, truth):
    """p, truth [n]: probability of one class, and whether it is the true one."""
    if loss.name == "dice":
        return 1 - 2 * (p * truth).sum() / (p.sum() + truth.sum())
    if loss.name == "tversky":
        hit, false_positive, false_negative = (
            (p * truth).sum(),
            (p * ~truth).sum(),
            ((1 - p) * truth).sum(),
        )
        return 1 - hit / (hit + loss.alpha * false_positive + loss.beta * false_negative)
    # Berman et al. 2018, Eq. 5, 8 and 9: the set of mistakes grows, from the largest error on.
    error, value, mistakes, jaccard = np.where(truth, 1 - p, p), 0.0, np.zeros(len(p), bool), 0.0
    for n in np.argsort(-error):
        mistakes[n] = True
        grown = mistakes.sum() / (mistakes | truth).sum()
        value += error[n] * (grown - jaccard)
        jaccard = grown
    return value


def over_classes(loss, logits, label, ignore=255):
    counted = label != ignore
    rows, label = logits[counted], label[counted]
    p = np.exp(rows - rows.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    present = np.unique(label)
    weights = [loss.class_weights[k] if loss.class_weights else 1.0 for k in present]
    return np.average([of_class(loss, p[:, k], label == k) for k in present], weights=weights)


def reference(loss, logits, label, weight_map=None):
    logits = np.asarray(logits, np.float64)
    if "reduction" in LOSSES[loss.name][1]:
        value = over_pixels(loss, logits, label, weight_map)
    else:
        value = over_classes(loss, logits, label)
    return value + loss.dice_weight * over_classes(PixelLoss("dice"), logits, label)


def slope(function, logits, step=1e-5):
    """Central differences."""
    logits = np.asarray(logits, np.float64)
    result = np.zeros(logits.shape)
    for at in np.ndindex(logits.shape):
        high, low = logits.copy(), logits.copy()
        high[at] += step
        low[at] -= step
        result[at] = (function(high) - function(low)) / (2 * step)
    return result


CASES = (
    *EVERY,
    PixelLoss(class_weights=WEIGHTS),
    PixelLoss(class_weights=WEIGHTS, reduction="sum"),
    PixelLoss(class_weights=WEIGHTS, reduction="mean_all"),
    PixelLoss("top_k", keep=0.3, class_weights=WEIGHTS, reduction="mean_all"),
    PixelLoss("top_k", keep=1.0, reduction="sum"),
    PixelLoss("ohem", threshold=0.9, min_kept=1, class_weights=WEIGHTS),
    PixelLoss("ohem", threshold=1e-9, min_kept=4, reduction="mean_all"),
    PixelLoss("focal", gamma=0.5, class_weights=WEIGHTS, reduction="sum"),
    PixelLoss("dice", class_weights=WEIGHTS),
    PixelLoss("tversky", alpha=1.0, beta=0.1, class_weights=WEIGHTS),
    PixelLoss("lovasz", class_weights=WEIGHTS),
)


@pytest.mark.parametrize("loss", CASES, ids=range(len(CASES)))
def test_value_and_gradient(loss):
    logits, label = batch()
    takes_map = "reduction" in LOSSES[loss.name][1]
    for weight_map in [None] * (loss in EVERY) + [border_map()] * takes_map or [None]:
        value, gradient = value_and_grad(loss, logits, label, weight_map)
        assert value.shape == () and value.dtype == jnp.float32
        expected = partial(reference, loss, label=label, weight_map=weight_map)
        np.testing.assert_allclose(value, expected(logits), rtol=1e-5)
        scale = max(1.0, float(value))
        np.testing.assert_allclose(gradient, slope(expected, logits), rtol=0, atol=2e-6 * scale)


def test_labels_of_uint8_and_none_ignored():
    logits, label = batch(ignored=0.0, dtype=np.uint8, shape=(1, 7, 2))
    for loss in (PixelLoss(), PixelLoss("dice")):
        value, _ = value_and_grad(loss, logits, label)
        np.testing.assert_allclose(value, reference(loss, logits, label), rtol=1e-5)


@pytest.mark.parametrize("ignore", [-1, 0, 4])
def test_other_ignore_values(ignore):
    logits, label = batch(ignore=ignore)
    expected = over_pixels(PixelLoss(), np.float64(logits), label, ignore=ignore)
    loss = jax.jit(partial(cross_entropy, ignore=ignore))(logits, label)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    expected = over_classes(PixelLoss("tversky"), np.float64(logits), label, ignore=ignore)
    loss = jax.jit(partial(tversky, ignore=ignore))(logits, label)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.slow
@every_loss
def test_all_ignored_is_zero_with_zero_gradient(loss):
    label = np.full(SHAPE, 255)
    for fill in (0.0, 7.0, np.inf, -np.inf, np.nan):
        value, gradient = value_and_grad(loss, np.full((*SHAPE, K), fill, np.float32), label)
        assert float(value) == 0
        np.testing.assert_array_equal(gradient, np.zeros((*SHAPE, K)))


@every_loss
def test_logits_under_ignored_pixels_do_not_matter(loss):
    logits, label = batch()
    ignored = (label == 255)[..., None]
    clean = value_and_grad(loss, logits, label)
    for fill in (np.inf, -np.inf, np.nan):
        dirty = value_and_grad(loss, np.where(ignored, np.float32(fill), logits), label)
        np.testing.assert_array_equal(clean[0], dirty[0])
        np.testing.assert_array_equal(clean[1], dirty[1])
    assert not np.any(np.where(ignored, clean[1], 0)) and np.any(clean[1])


@every_loss
@pytest.mark.parametrize("wrong", [-1, K, 254])
def test_a_label_out_of_range_gives_nan(loss, wrong):
    logits, label = batch()
    label[1, 2, 1] = wrong
    assert math.isnan(value_and_grad(loss, logits, label)[0])
    assert math.isnan(value_and_grad(loss, logits, np.full(SHAPE, wrong))[0])


@every_loss
def test_nan_logits_give_nan(loss):
    """The step that such a loss comes from is refused, so it must not be lost in a selection."""
    logits, label = batch(ignored=0.0)
    for at in range(0, logits.size, 11):
        broken = logits.copy()
        broken.flat[at] = np.nan
        assert math.isnan(value_and_grad(loss, broken, label)[0])


@every_loss
def test_large_logits_do_not_overflow(loss):
    logits, label = batch()
    value, gradient = value_and_grad(loss, 1e4 * logits, label)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(value, reference(loss, 1e4 * logits, label), rtol=1e-5)


@every_loss
def test_bfloat16_logits_are_computed_in_float32(loss):
    logits, label = batch()
    half = jnp.asarray(logits, jnp.bfloat16)
    value, gradient = value_and_grad(loss, half, label)
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, reference(loss, half.astype(np.float32), label), rtol=1e-5)


@pytest.mark.parametrize("name", ["top_k", "dice", "lovasz"])
def test_a_batch_over_eight_devices(name):
    """The same number; and only sums cross devices, but for the sort of the Lovasz loss."""
    loss, (logits, label) = PixelLoss(name), batch(shape=(8, 4, 3))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put((logits, label), NamedSharding(mesh, PartitionSpec("data")))
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*sharded).compile()
    value, gradient = compiled(*sharded)
    expected, expected_gradient = value_and_grad(loss, logits, label)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=1e-6)
    assert name == "lovasz" or "all-gather" not in compiled.as_text()


def test_uniform_logits_give_log_k():
    logits, label = batch()
    loss, _ = value_and_grad(PixelLoss(), np.zeros_like(logits), label)
    assert float(loss) == pytest.approx(math.log(K))


def test_only_classes_of_weight_zero():
    logits, _ = batch()
    label = np.full(logits.shape[:-1], 3)
    for name in ("top_k", "dice"):
        loss, gradient = value_and_grad(PixelLoss(name, class_weights=WEIGHTS), logits, label)
        assert float(loss) == 0 and not np.any(gradient)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_cross_entropy_against_torch(weights):
    torch = pytest.importorskip("torch")
    logits, label = batch()
    x = torch.tensor(np.moveaxis(logits, -1, 1), requires_grad=True)
    target = torch.tensor(label).long()
    w = weights and torch.tensor(weights)
    peer = partial(torch.nn.functional.cross_entropy, x, target, w, ignore_index=255)
    peers = {
        "mean": peer(),
        "sum": peer(reduction="sum"),
        "mean_all": peer(reduction="none").mean(),
    }
    for reduction, expected in peers.items():
        loss = PixelLoss(class_weights=weights or (), reduction=reduction)
        value, gradient = value_and_grad(loss, logits, label)
        np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
        (slopes,) = torch.autograd.grad(expected, x, retain_graph=True)
        np.testing.assert_allclose(gradient, np.moveaxis(slopes.numpy(), 1, -1), atol=1e-6)


def test_top_k_shares_the_last_places_among_ties():
    logits, label = batch()
    counted = (label != 255).sum()
    k = int(0.4 * label.size)
    assert k < counted
    loss = PixelLoss("top_k", keep=0.4, reduction="sum")
    value, gradient = value_and_grad(loss, np.zeros_like(logits), label)
    assert float(value) == pytest.approx(k * math.log(K))
    pull = np.abs(gradient).sum(-1)[label != 255]
    np.testing.assert_allclose(pull, k / counted * 2 * (1 - 1 / K), rtol=1e-5)


def test_top_k_counts_pixels_without_loss():
    """Certain pixels have a loss of 0, as ignored ones: only the former count in the mean."""
    label = np.array([[0, 1, 1, 1, 255, 255, 255, 255]])
    logits = 100 * np.eye(K, dtype=np.float32)[np.minimum(label, 2)]
    logits[0, 0] = 0
    value, _ = value_and_grad(PixelLoss("top_k", keep=0.5), logits, label)
    assert float(value) == pytest.approx(math.log(K) / 4)
    value, _ = value_and_grad(PixelLoss("top_k", keep=0.75), logits, label)
    assert float(value) == pytest.approx(math.log(K) / 4)


def test_ohem_keeps_the_least_and_all_below_the_threshold():
    """p of the true class: 0.1, 0.2, .. 0.8; two images of four pixels."""
    p = np.arange(1, 9) / 10
    logits = np.log(np.stack([p, 1 - p], -1)).reshape(2, 4, 2).astype(np.float32)
    label = np.zeros((2, 4), np.int32)
    for threshold, min_kept, kept in ((0.55, 1, 5), (0.05, 3, 6), (0.05, 9, 8)):
        loss = PixelLoss("ohem", threshold=threshold, min_kept=min_kept)
        expected = -np.log(p[:kept]).mean()
        np.testing.assert_allclose(value_and_grad(loss, logits, label)[0], expected, rtol=1e-5)


def test_focal_without_focus_is_cross_entropy():
    logits, label = batch()
    value, gradient = value_and_grad(PixelLoss("focal", gamma=0.0), logits, label)
    expected, expected_gradient = value_and_grad(PixelLoss(), logits, label)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-7)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_of_certain_pixels_is_flat_not_nan(gamma):
    logits = np.zeros((1, 2, K), np.float32)
    logits[..., 1] = [50, 500]
    value, gradient = value_and_grad(PixelLoss("focal", gamma=gamma), logits, np.ones((1, 2), int))
    assert float(value) == 0 and not np.any(gradient)


def test_lovasz_of_hard_predictions_is_one_minus_iou():
    _, label = batch()
    guess = np.random.default_rng(2).integers(0, K, label.shape)
    guess = np.where(np.random.default_rng(3).random(label.shape) < 0.7, label % K, guess)
    counted, iou = label != 255, []
    for k in set(range(K)) - {ABSENT}:
        truth, found = counted & (label == k), counted & (guess == k)
        iou.append((truth & found).sum() / (truth | found).sum())
    logits = 200 * np.eye(K, dtype=np.float32)[guess]
    value, _ = value_and_grad(PixelLoss("lovasz"), logits, label)
    np.testing.assert_allclose(value, 1 - np.mean(iou), rtol=1e-5)
    perfect = 200 * np.eye(K, dtype=np.float32)[np.where(counted, label, 0)]
    assert float(value_and_grad(PixelLoss("lovasz"), perfect, label)[0]) == 0


def test_the_functions_have_the_defaults_of_the_section():
    section = dataclasses.asdict(PixelLoss())
    for function, fields in LOSSES.values():
        defaults = inspect.signature(function).parameters
        assert [defaults[key].default for key in fields] == [section[key] for key in fields]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": "dise"}, 'unknown loss.pixel.name "dise". Did you mean "dice"'),
        ({"reduction": "average"}, 'unknown loss.pixel.reduction "average"'),
        ({"name": "dice", "reduction": "sum"}, "loss.pixel.reduction is 'sum': needs \"mean\""),
        ({"class_weights": (1.0, -1.0)}, "loss.pixel.class_weights"),
        ({"class_weights": (1.0, math.nan)}, "loss.pixel.class_weights"),
        ({"class_weights": (1.0, "2")}, "loss.pixel.class_weights"),
        ({"class_weights": (0.0, 0)}, "not all 0"),
        ({"keep": 0.0}, "loss.pixel.keep is 0.0: needs a fraction"),
        ({"keep": 1.5}, "loss.pixel.keep is 1.5"),
        ({"keep": math.nan}, "loss.pixel.keep is nan"),
        ({"threshold": 0.0}, "loss.pixel.threshold"),
        ({"threshold": 1.1}, "loss.pixel.threshold"),
        ({"min_kept": -1}, "loss.pixel.min_kept"),
        ({"gamma": -0.5}, "loss.pixel.gamma"),
        ({"gamma": math.inf}, "loss.pixel.gamma"),
        ({"alpha": 0.0}, "loss.pixel.alpha"),
        ({"beta": -1.0}, "loss.pixel.beta"),
        ({"dice_weight": -3.0}, "loss.pixel.dice_weight"),
    ],
)
def test_fields_that_no_loss_could_use(fields, says):
    with pytest.raises(InputError) as error:
        PixelLoss(**fields)
    assert says in str(error.value)


@every_loss
def test_another_number_of_class_weights(loss):
    logits, label = batch()
    short = dataclasses.replace(loss, class_weights=(1.0, 2.0))
    with pytest.raises(InputError, match="2 class_weights for 5 classes"):
        jax.eval_shape(short, logits, label)


def test_weight_maps_that_do_not_fit():
    logits, label = batch()
    with pytest.raises(InputError, match="needs the shape of label"):
        jax.eval_shape(PixelLoss(), logits, label, border_map()[..., None])
    with pytest.raises(InputError, match='loss.pixel.name is "lovasz".*cross_entropy, top_k'):
        jax.eval_shape(PixelLoss("lovasz"), logits, label, border_map())
    with pytest.raises(InputError, match="unknown reduction"):
        jax.eval_shape(partial(cross_entropy, reduction="none"), logits, label)


def test_a_config_section_fills_it():
    section = ConfigDict(dataclasses.asdict(PixelLoss()))
    section.update(name="ohem", class_weights=WEIGHTS)
    loss = PixelLoss(**section)
    assert loss == PixelLoss("ohem", class_weights=WEIGHTS) and hash(loss)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.name = "dice"
