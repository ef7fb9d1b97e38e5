"""The elastic grid against cubic Hermite curves, evaluated pixel by pixel."""

import numpy as np
import pytest

from jaxseg.data.elastic import displacement


def _hermite(nodes: list[float], at: float) -> float:
    """The cubic through its two neighbours with central differences as slopes (Catmull-Rom)."""
    padded = [nodes[0], *nodes, nodes[-1], nodes[-1]]
    i = int(at)
    before, left, right, after = padded[i : i + 4]
    t = at - i
    return (
        (2 * t**3 - 3 * t**2 + 1) * left
        + (t**3 - 2 * t**2 + t) * (right - before) / 2
        + (3 * t**2 - 2 * t**3) * right
        + (t**3 - t**2) * (after - left) / 2
    )


@pytest.mark.parametrize("size", [(7, 10), (24, 33), (1, 2)])
def test_the_displacement_is_bicubic_between_the_nodes(size):
    vectors = np.random.default_rng(0).normal(0, 10, (2, 3, 3))
    field = displacement(vectors, size)
    assert field.shape == (2, *size) and field.dtype == np.float32
    for d in range(2):
        for y in range(size[0]):
            for x in range(size[1]):
                across = [_hermite(list(row), 2 * (x + 0.5) / size[1]) for row in vectors[d]]
                want = _hermite(across, 2 * (y + 0.5) / size[0])
                assert field[d, y, x] == pytest.approx(want, abs=1e-4)


def test_equal_vectors_move_everything_alike():
    field = displacement(np.full((2, 3, 3), 4.0), (9, 12))
    np.testing.assert_allclose(field, 4.0, rtol=1e-6)


def test_a_pixel_on_a_node_has_its_vector():
    vectors = np.random.default_rng(1).normal(0, 10, (2, 3, 3))
    field = displacement(vectors, (5, 5))  # whose middle pixel lies on the middle node
    np.testing.assert_allclose(field[:, 2, 2], vectors[:, 1, 1], rtol=1e-6)
