"""Smooth random deformation (Ronneberger et al. 2015, section 3.1)."""

import numpy as np

NODES = 3  # a coarse 3x3 grid


def displacement(vectors: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Vectors [2,3,3] on a grid from corner to corner -> a vector at every pixel, [2,*size].

    Bicubic: Keys' cubic convolution with a = -1/2, the border nodes repeated beyond the grid.
    """
    rows, columns = (_weights(n) for n in size)
    return np.einsum("yi,dij,xj->dyx", rows, vectors, columns).astype(np.float32)


def _weights(n: int) -> np.ndarray:
    """What each node counts for at n pixels, [n,NODES]: rows sum to one."""
    at = (np.arange(n) + 0.5) / n * (NODES - 1)
    weights = np.zeros((n, NODES))
    for offset in (-1, 0, 1, 2):
        node = np.floor(at).astype(np.int64) + offset
        weights[np.arange(n), node.clip(0, NODES - 1)] += _keys(np.abs(at - node))
    return weights


def _keys(x: np.ndarray) -> np.ndarray:
    """Keys 1981, equation 15."""
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))
