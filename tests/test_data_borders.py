"""U-Net's weight map, against all distances by brute force."""

import numpy as np
import pytest
from scipy import ndimage

from jaxseg.data.borders import REACH, border_weights


def brute_force(label, cell, w0, sigma):
    cells, count = ndimage.label(label == cell)
    places = np.argwhere(np.ones(label.shape, bool)).reshape(*label.shape, 1, 2)
    distances = []
    for number in range(1, count + 1):
        members = np.argwhere(cells == number)
        distances.append(np.sqrt(((places - members) ** 2).sum(-1)).min(-1))
    d1, d2 = np.sort(distances, axis=0)[:2]
    return 1 + w0 * np.exp(-((d1 + d2) ** 2) / (2 * sigma**2))


@pytest.mark.parametrize("seed", range(4))
def test_the_map_is_the_papers_to_what_weighs_nothing(seed):
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal((41, 56)), 3)
    label = (noise > 0).astype(np.uint8)
    got = border_weights(label, 1, w0=10, sigma=2.0)
    rest = 10 * np.exp(-(REACH**2) / 2)  # beyond the reach, less than this is left out
    np.testing.assert_allclose(got, brute_force(label, 1, 10, 2.0), atol=1.1 * rest)


def test_between_two_touching_cells_the_weight_is_at_its_peak():
    label = np.ones((20, 30), np.uint8)
    label[:, 15] = 0  # one pixel of border
    weights = border_weights(label, 1, w0=10, sigma=5)
    peak = 1 + 10 * np.exp(-4 / 50)  # d1 + d2 = 2, between the cells and at their edges
    np.testing.assert_allclose(weights[:, 14:17], peak, rtol=1e-6)
    assert weights[0, 0] < 1.1


@pytest.mark.parametrize("cells", [0, 1])
def test_with_fewer_than_two_cells_every_weight_is_one(cells):
    label = np.zeros((9, 9), np.uint8)
    label[2:5, 2:5] = cells
    assert (border_weights(label, 1, 10, 5) == 1).all()
