"""Segmentation before networks, from Otsu's threshold (1979) to superpixels (2012).

A threshold, clusters or a graph, and no parameters: nothing is learnt, and what comes out are
regions without a class. `Model(...)(image)` takes one image on the host, of any size and number of
channels, and returns int32 [H,W], regions numbered 0..R-1 without gaps; the same image always gives
the same regions. `METHODS` has the methods by name: functions of image uint8 [H,W,3] and of
`segments`, the number of regions to aim at. Colours are compared in CIE L*a*b*. scikit-image and
OpenCV do the work.

Differs from the papers: what each docstring says.
"""

import heapq
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import scipy.linalg
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from jaxseg.data.colours import rgb
from jaxseg.errors import InputError, unknown

MOST = 65_535  # regions that a 16-bit PNG can number
MOST_OF_NCUT = 2_000  # its graph is a dense matrix of twice as many rows
SPATIAL, RANGE = 8, 16  # bandwidths of the mean shift: pixels; L*u*v* of 8 bits
SIMILAR = 10.0  # L*a*b* distance at which the similarity of two superpixels has fallen to e^-1/2


@dataclass(frozen=True)
class Model:
    num_classes: int = 0  # of the data set that it is scored on
    method: str = "slic"  # a key of METHODS
    segments: int = 200  # regions to aim at; two where a method separates figure and ground

    def __post_init__(self):
        """Raises InputError for an unknown method, for a number of segments out of range, and where
        the packages are missing."""
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        most = MOST_OF_NCUT if self.method == "ncut" else MOST
        if not 2 <= self.segments <= most:
            raise InputError(
                f"model.segments is {self.segments}: {self.method} needs a number from 2 to {most}"
            )
        _library("skimage")
        if self.method in ("kmeans", "meanshift", "grabcut"):
            _library("cv2")

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Regions int32 [H,W] of image [H,W,C], 0..255; another C than 1 or 3 as it is drawn."""
        image = np.ascontiguousarray(rgb(image))
        found = METHODS[self.method](image, min(self.segments, image.shape[0] * image.shape[1]))
        return np.unique(found, return_inverse=True)[1].reshape(found.shape).astype(np.int32)


def otsu(image: np.ndarray, segments: int) -> np.ndarray:
    """Otsu, 1979, "A threshold selection method from gray-level histograms".

    The threshold of the grey values whose two sides differ most, relative to their spread. Two
    regions.
    """
    grey = _grey(image)
    return grey > _library("skimage.filters").threshold_otsu(grey)


def adaptive(image: np.ndarray, segments: int) -> np.ndarray:
    """Bradley and Roth, 2007, "Adaptive thresholding using the integral image".

    A pixel is dark where it is 15 % below the mean of the square around it, whose side is an eighth
    of the image's width. Two regions. Beyond the border the image is mirrored.
    """
    grey, side = _grey(image), image.shape[1] // 16 * 2 + 1
    mean = _library("skimage.filters").threshold_local(grey, max(3, side), method="mean")
    return grey > 0.85 * mean


def kmeans(image: np.ndarray, segments: int) -> np.ndarray:
    """Lloyd, 1982, "Least squares quantization in PCM", of colours; started by Arthur and
    Vassilvitskii, 2007, "k-means++: the advantages of careful seeding".

    A region is a cluster of colours, wherever in the image they are.
    """
    cv2, colours = _library("cv2"), _lab(image).reshape(-1, 3).astype(np.float32)
    distinct = np.unique(image.reshape(-1, 3) @ np.array([65_536, 256, 1])).size
    if distinct == 1:
        return np.zeros(image.shape[:2], int)
    cv2.setRNGSeed(0)
    stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 20, 0.1)
    clusters = min(segments, distinct)
    _, _, centres = cv2.kmeans(colours, clusters, None, stop, 1, cv2.KMEANS_PP_CENTERS)
    return cKDTree(centres).query(colours)[1].reshape(image.shape[:2])  # one colour, one cluster


def meanshift(image: np.ndarray, segments: int) -> np.ndarray:
    """Comaniciu and Meer, 2002, "Mean shift: a robust approach toward feature space analysis".

    Each pixel climbs to the mode of place and colour, in L*u*v*; neighbours whose modes are within
    the bandwidth are one region. The `segments` largest stay, and flood the smaller ones, which the
    paper joins to their neighbours one by one.
    """
    cv2, segmentation = _library("cv2"), _library("skimage.segmentation")
    modes = cv2.pyrMeanShiftFiltering(cv2.cvtColor(image, cv2.COLOR_RGB2LUV), SPATIAL, RANGE)
    regions = _linked(modes.astype(np.float32), RANGE)
    markers = np.zeros(regions.max() + 1, np.int32)
    largest = np.argsort(-np.bincount(regions.ravel()), kind="stable")[:segments]
    markers[largest] = np.arange(1, largest.size + 1)
    return segmentation.watershed(_gradient(image), markers[regions])


def slic(image: np.ndarray, segments: int) -> np.ndarray:
    """Achanta et al., 2012, "SLIC superpixels compared to state-of-the-art superpixel methods".

    k-means of place and colour, near each centre alone. About `segments` connected regions.
    """
    return _library("skimage.segmentation").slic(image, segments, compactness=10, start_label=0)


def felzenszwalb(image: np.ndarray, segments: int) -> np.ndarray:
    """Felzenszwalb and Huttenlocher, 2004, "Efficient graph-based image segmentation".

    Regions join where the edge between them is weak against the edges inside. The scale k is the
    smallest, to 5 %, that leaves at most `segments` regions; they have at least 20 pixels.
    """
    run = _library("skimage.segmentation").felzenszwalb
    best = np.zeros(image.shape[:2], int)
    low, high = 0.0, math.log2(442 * best.size)  # above 255 sqrt(3) times the pixels all join
    for _ in range(9):
        middle = (low + high) / 2
        found = run(image, scale=2**middle, sigma=0.8, min_size=20)
        if found.max() < segments:
            best, high = found, middle
        else:
            low = middle
    return best


def watershed(image: np.ndarray, segments: int) -> np.ndarray:
    """Vincent and Soille, 1991, "Watersheds in digital spaces"; from markers, as Meyer and
    Beucher, 1990, "Morphological segmentation".

    The gradient is flooded from about `segments` markers on a regular grid.
    """
    return _library("skimage.segmentation").watershed(_gradient(image), markers=segments)


def ncut(image: np.ndarray, segments: int) -> np.ndarray:
    """Shi and Malik, 2000, "Normalized cuts and image segmentation".

    On the graph of twice as many SLIC superpixels, linked to their neighbours by similar mean
    colour: the part whose best cut costs least is cut in two, until there are `segments` parts.
    """
    superpixels = slic(image, min(2 * segments, image[..., 0].size))
    weights, ids = _similarity(_lab(image), superpixels), np.arange(superpixels.max() + 1)
    part = np.zeros(ids.size, int)
    waiting = [_cut(weights, ids)] if ids.size > 1 else []  # cheapest first; no two sides are equal
    for number in range(1, min(segments, ids.size)):
        _, side, other = heapq.heappop(waiting)
        part[list(side)] = number
        for nodes in (side, other):
            if len(nodes) > 1:
                heapq.heappush(waiting, _cut(weights, np.array(nodes)))
    return part[superpixels]


def grabcut(image: np.ndarray, segments: int) -> np.ndarray:
    """Rother, Kolmogorov, Blake, 2004, "GrabCut: interactive foreground extraction using iterated
    graph cuts".

    Mixtures of colours of figure and ground, and a minimal cut, five times. In place of a user's
    rectangle: the image without an eighth at each side. Two regions.
    """
    cv2, (height, width) = _library("cv2"), image.shape[:2]
    if min(height, width) < 8:
        raise InputError(f"grabcut: an image of {height} x {width} pixels, needs 8 x 8 or more")
    top, left = height // 8, width // 8
    mask, models = np.zeros((height, width), np.uint8), np.zeros((2, 1, 65))
    cv2.setRNGSeed(0)
    rectangle = (left, top, width - 2 * left, height - 2 * top)
    cv2.grabCut(image, mask, rectangle, *models, 5, cv2.GC_INIT_WITH_RECT)
    return mask & 1  # surely or probably figure


METHODS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    f.__name__: f
    for f in (otsu, adaptive, kmeans, meanshift, slic, felzenszwalb, watershed, ncut, grabcut)
}


def _library(name: str) -> ModuleType:
    """A module of scikit-image or OpenCV. Raises InputError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"the classical methods need {name}: pip install -e '.[classical]' ({error})"
        ) from error


def _grey(image: np.ndarray) -> np.ndarray:
    return (image @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8)  # ITU-R BT.601


def _lab(image: np.ndarray) -> np.ndarray:
    return _library("skimage.color").rgb2lab(image)


def _gradient(image: np.ndarray) -> np.ndarray:
    """The length of the gradient of the smoothed colours, [H,W]."""
    filters = _library("skimage.filters")
    smooth = filters.gaussian(_lab(image), 1, channel_axis=-1)
    return np.sqrt(sum(filters.sobel(smooth[..., c]) ** 2 for c in range(3)))


def _linked(values: np.ndarray, most: float) -> np.ndarray:
    """Regions [H,W] of pixels linked by neighbours whose values [H,W,C] are less than `most`
    apart."""
    number = np.arange(values.shape[0] * values.shape[1]).reshape(values.shape[:2])
    pairs = []
    for a, b in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        near = np.linalg.norm(values[a] - values[b], axis=-1) < most
        pairs.append(np.stack([number[a][near], number[b][near]]))
    pairs = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(pairs.shape[1], bool), pairs), shape=(number.size, number.size))
    return connected_components(graph, directed=False)[1].reshape(number.shape)


def _similarity(colours: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """Symmetric [R,R]: exp(-d^2 / 2 SIMILAR^2) for neighbours, d apart in mean colour; else 0."""
    flat, count = regions.ravel(), regions.max() + 1
    sums = [np.bincount(flat, channel.ravel(), count) for channel in np.moveaxis(colours, -1, 0)]
    means = np.stack(sums, axis=1) / np.bincount(flat, minlength=count)[:, None]
    weights = np.zeros((count, count))
    for a, b in ((regions[1:], regions[:-1]), (regions[:, 1:], regions[:, :-1])):
        i, j = a[a != b], b[a != b]
        apart = np.sum((means[i] - means[j]) ** 2, axis=1)
        weights[i, j] = weights[j, i] = np.exp(-apart / (2 * SIMILAR**2))
    return weights


def _cut(weights: np.ndarray, nodes: np.ndarray) -> tuple[float, tuple, tuple]:
    """The best normalised cut of some nodes of a graph along the second eigenvector of the
    normalised Laplacian: (cost, one side, other side)."""
    inside = weights[np.ix_(nodes, nodes)] + 1e-9  # so that no degree is 0
    scale = 1 / np.sqrt(inside.sum(axis=1))
    laplacian = np.eye(nodes.size) - scale[:, None] * inside * scale
    _, vectors = scipy.linalg.eigh(laplacian, subset_by_index=[1, 1])
    order = np.argsort(vectors[:, 0] * scale, kind="stable")
    inside = inside[np.ix_(order, order)]
    left = np.cumsum(inside.sum(axis=1))  # the degrees of the first 1, 2, ... nodes
    within = inside.cumsum(axis=0).cumsum(axis=1).diagonal()
    cut, total = (left - within)[:-1], left[-1]
    cost = cut / left[:-1] + cut / (total - left[:-1])
    best = int(np.argmin(cost)) + 1
    return float(cost[best - 1]), tuple(nodes[order[:best]]), tuple(nodes[order[best:]])
