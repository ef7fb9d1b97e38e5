"""The lattice filter against one in float64 with a dictionary for the vertices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.ops import permutohedral
from jaxseg.ops.permutohedral import apply, build


def reference(features, x):
    """Splat, blur, slice as in the paper, point by point: (filtered [N,C], number of vertices)."""
    n, d = features.shape
    axis = np.arange(1, d + 1)
    basis = np.zeros((d + 1, d))  # columns: (1, .., 1, -j, 0, .., 0), scaled
    for j in axis:
        basis[:j, j - 1], basis[j, j - 1] = 1, -j
    basis *= np.sqrt(2 / 3) * (d + 1) / np.sqrt(axis * (axis + 1))
    table, simplices = {}, []
    for feature, value in zip(features, x, strict=True):
        elevated = basis @ feature
        # The nearest point whose coordinates are multiples of d + 1 and sum to 0.
        base = np.round(elevated / (d + 1)).astype(int)
        order = np.argsort(-(elevated / (d + 1) - base), kind="stable")
        excess = base.sum()
        base[order[d + 1 - excess :] if excess > 0 else order[:0]] -= 1
        base[order[:-excess] if excess < 0 else order[:0]] += 1
        rest = elevated / (d + 1) - base
        order = np.argsort(-rest, kind="stable")
        falling = rest[order]
        weights = [1 - falling[0] + falling[d]]
        weights += [falling[d - k] - falling[d + 1 - k] for k in range(1, d + 1)]
        corners = []
        for k, weight in enumerate(weights):
            corner = base * (d + 1) + k
            corner[order[d + 1 - k :]] -= d + 1
            assert corner.sum() == 0
            corners.append((tuple(corner), weight))
            table[tuple(corner)] = table.get(tuple(corner), 0) + weight * value
        simplices.append(corners)
    for j in range(d + 1):
        step = np.ones(d + 1, int)
        step[j] = -d
        table = {
            key: value + 0.5 * (table.get(tuple(key + step), 0) + table.get(tuple(key - step), 0))
            for key, value in table.items()
        }
    filtered = [sum(weight * table[key] for key, weight in corners) for corners in simplices]
    return np.array(filtered), len(table)


def points(n, d, spread, seed=0):
    """Features float32 [n,d] from 0 to spread, in clumps."""
    rng = np.random.default_rng(seed)
    centres = rng.random((max(n // 12, 1), d))
    features = centres[rng.integers(len(centres), size=n)] + rng.normal(0, 0.05, (n, d))
    return (spread * features.clip(0, 1)).astype(np.float32)


def lattice(features, valid=None):
    n = len(features)
    span = np.maximum(features.max(0), 0.1)
    return jax.jit(build)(features.T, span, np.ones(n, bool) if valid is None else valid)


def values(n, channels, seed=1):
    return np.random.default_rng(seed).normal(size=(n, channels)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("d", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.5, 4.0, 60.0])
def test_filters_as_the_paper_does(d, spread):
    features, x = points(150, d, spread), values(150, 3)
    wanted, vertices = reference(features.astype(np.float64), x)
    found = lattice(features)
    # In single precision a few points may lie in the simplex beside theirs, with weights near 0.
    assert abs(int(found.count) - 1 - vertices) <= 3
    np.testing.assert_allclose(apply(found, found, x), wanted, atol=2e-4 * abs(wanted).max())


def test_weights_are_barycentric():
    features = points(300, 5, 8.0)
    found = lattice(features)
    assert (found.weight > -1e-5).all()
    np.testing.assert_allclose(found.weight.sum(0), 1, atol=1e-5)
    assert (found.vertex > 0).all() and (found.vertex < found.count).all()
    # Both lists hold the same pairs.
    rebuilt = np.zeros((300, int(found.count)))
    vertex = np.searchsorted(found.start, np.arange(6 * 300), side="right") - 1
    rebuilt[found.point, vertex] = found.share
    wanted = np.zeros_like(rebuilt)
    wanted[np.arange(300), found.vertex] = found.weight
    np.testing.assert_array_equal(rebuilt, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("small", [0, 10**9])
@pytest.mark.parametrize(
    ("spread", "least", "most"), [(0.05, 0, 1 / 8), (1.5, 1 / 8, 1), (5.0, 1, 5.5), (300.0, 5.9, 6)]
)
def test_any_number_of_vertices_finds_room(small, spread, least, most, monkeypatch):
    monkeypatch.setattr(permutohedral, "SMALL", small)
    monkeypatch.setattr(permutohedral, "BLOCK", 64)
    n = 600
    features, x = np.random.default_rng(0).random((n, 5), np.float32) * spread, values(n, 9)
    found = lattice(features)
    assert least < (int(found.count) - 1) / n <= most
    wanted, _ = reference(features.astype(np.float64), x)
    np.testing.assert_allclose(apply(found, found, x), wanted, atol=2e-4 * abs(wanted).max())


@pytest.mark.slow
def test_the_gradient_is_the_transpose():
    features = points(40, 5, 5.0)
    found = lattice(features)
    send, receive = jnp.asarray(np.random.default_rng(2).random((2, 40)), jnp.float32)
    scaled, transpose = (
        permutohedral.scale(found, *factors) for factors in ((send, receive), (receive, send))
    )
    eye = np.eye(40, dtype=np.float32)
    plain = np.asarray(apply(found, found, eye))
    assert abs(plain - plain.T).max() > 1e-3  # the order of the blurs matters
    matrix, pull = jax.vjp(lambda x: apply(scaled, transpose, x), eye)
    np.testing.assert_allclose(matrix, receive[:, None] * plain * send, atol=1e-6)
    np.testing.assert_allclose(pull(eye)[0], matrix.T, atol=1e-6)


@pytest.mark.slow
def test_what_takes_no_part_changes_nothing():
    features, x = points(80, 5, 6.0), values(80, 4)
    valid = np.arange(80) % 3 > 0
    found = lattice(features, valid)
    x[~valid] = 7.0
    rest = lattice(features[valid])
    assert found.count == rest.count
    np.testing.assert_allclose(
        apply(found, found, x)[valid], apply(rest, rest, x[valid]), atol=1e-5
    )
    assert (apply(found, found, x)[~valid] == 0).all()


def test_near_the_gaussian_on_smooth_values():
    """Normalised sums, of values that turn in 2 pi / 0.5 = 13 deviations, against all pairs."""
    features = (np.random.default_rng(0).random((1500, 2)) * 6).astype(np.float32)
    x = np.stack([np.ones(1500), np.sin(0.5 * features[:, 0]), np.cos(0.5 * features[:, 1])], 1)
    wanted = np.exp(-((features[:, None] - features) ** 2).sum(-1) / 2) @ x
    found = np.asarray(apply(*[lattice(features)] * 2, x.astype(np.float32)))
    wanted, found = (sums[:, 1:] / sums[:, :1] for sums in (wanted, found))
    assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)


@pytest.mark.parametrize(("span", "n", "fit"), [(100.0, 2**18, True), (1e6, 2**18, False)])
def test_knows_what_fits(span, n, fit):
    for xp in (np, jnp):
        assert bool(permutohedral.fits(xp.full(5, span, xp.float32), n)) == fit
