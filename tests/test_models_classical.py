"""The classical methods, on images whose regions are known, and against slow computations."""

import re
import sys

import numpy as np
import pytest

from jaxseg.errors import InputError
from jaxseg.models import classical
from jaxseg.models.classical import METHODS, Model

pytest.importorskip("skimage", reason="needs scikit-image, the extra classical")
OPENCV = ("kmeans", "meanshift", "grabcut")
BINARY = ("otsu", "adaptive", "grabcut")
GROWN = ("slic", "felzenszwalb", "watershed", "ncut", "meanshift")  # regions that are connected


def method(name: str, segments: int = 16) -> Model:
    if name in OPENCV:
        pytest.importorskip("cv2", reason="needs OpenCV, the extra classical")
    return Model(8, name, segments)


def noisy(truth: np.ndarray, colours: tuple, spread: float = 6) -> np.ndarray:
    """An image uint8 [H,W,3] of truth [H,W], its classes in colours, with normal noise."""
    mean = np.array(colours, float)[truth]
    noise = np.random.default_rng(0).normal(0, spread, mean.shape)
    return (mean + noise).round().clip(0, 255).astype(np.uint8)


def halves(height: int = 48, width: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """(truth, image): left dark green, right light red."""
    truth = np.zeros((height, width), int)
    truth[:, width // 2 :] = 1
    return truth, noisy(truth, ((40, 90, 50), (220, 150, 130)))


def purity(regions: np.ndarray, truth: np.ndarray) -> float:
    """Share of the pixels that have the most frequent class of their region."""
    return sum(np.bincount(truth[regions == r]).max() for r in range(regions.max() + 1)) / (
        truth.size
    )


def test_there_are_nine_methods_and_each_names_its_paper():
    assert list(METHODS) == [
        *("otsu", "adaptive", "kmeans", "meanshift", "slic", "felzenszwalb", "watershed", "ncut"),
        "grabcut",
    ]
    for function in METHODS.values():
        assert re.match(r"[A-Z][\w ,.]+, (19|20)\d\d, \"[^\"]+\"", function.__doc__), function


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("channels", [1, 3])
def test_regions_are_numbered_without_gaps_and_always_the_same(name, channels):
    image = halves()[1][..., :channels]
    found = method(name)(image)
    assert found.dtype == np.int32 and found.shape == image.shape[:2]
    assert np.unique(found).tolist() == list(range(found.max() + 1))
    assert found.max() >= 1 or name == "grabcut"  # whose middle has both halves
    np.testing.assert_array_equal(method(name)(image.copy()), found)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("adaptive", "grabcut")])
def test_two_noisy_halves_are_told_apart(name):
    truth, image = halves()
    found = method(name, 40)(image)
    assert purity(found, truth) > 0.99
    assert name not in BINARY or found.max() == 1


@pytest.mark.parametrize("name", ["kmeans", "meanshift", "felzenszwalb", "ncut"])
def test_two_segments_of_two_halves_are_the_halves(name):
    truth, image = halves()
    found = method(name, 2)(image)
    assert found.max() == 1 and purity(found, truth) > 0.99


@pytest.mark.parametrize("name", [n for n in METHODS if n not in BINARY])
@pytest.mark.parametrize("segments", [20, 60])
def test_there_are_about_as_many_regions_as_asked_for(name, segments):
    count = method(name, segments)(_scene()).max() + 1
    assert count <= 1.3 * segments + 1
    assert count >= (0.4 * segments if name in ("slic", "watershed", "ncut", "kmeans") else 2)


def _scene() -> np.ndarray:
    """Twenty-five tiles of random colours with noise, uint8 [80,100,3]."""
    tiles = np.arange(25).reshape(5, 5).repeat(16, 0).repeat(20, 1)
    return noisy(tiles, np.random.default_rng(1).integers(30, 225, (25, 3)), 4)


@pytest.mark.parametrize("name", GROWN)
def test_superpixels_keep_the_outlines_of_tiles(name):
    tiles = np.arange(25).reshape(5, 5).repeat(16, 0).repeat(20, 1)
    least = 0.9 if name == "meanshift" else 0.98  # it smooths corners away
    assert purity(method(name, 60)(_scene()), tiles) > least


@pytest.mark.parametrize("name", ["slic", "felzenszwalb", "watershed", "meanshift"])
def test_superpixels_are_connected(name):
    from scipy.ndimage import label

    found = method(name, 30)(_scene())
    for region in range(found.max() + 1):
        assert label(found == region, np.ones((3, 3)))[1] == 1


def _brute_otsu(grey: np.ndarray) -> int:
    """The threshold of 256 whose sides have the greatest variance between them."""
    best, values = (-1.0, 0), grey.ravel().astype(float)
    for threshold in range(255):
        low, high = values[values <= threshold], values[values > threshold]
        if low.size and high.size:
            between = low.size * high.size * (low.mean() - high.mean()) ** 2
            best = max(best, (between, threshold))
    return best[1]


@pytest.mark.parametrize("seed", range(3))
def test_otsu_is_the_best_of_all_thresholds(seed):
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.normal(90, 25, 900), rng.normal(170, 15, 500)])
    grey = values.clip(0, 255).astype(np.uint8).reshape(35, 40)
    expected = grey > _brute_otsu(grey)
    assert 0.2 < expected.mean() < 0.8
    np.testing.assert_array_equal(method("otsu")(grey[..., None]), expected)


def test_the_grey_of_a_colour_is_that_of_television():
    image = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)
    expected = np.rint(0.299 * image[..., 0] + 0.587 * image[..., 1] + 0.114 * image[..., 2])
    np.testing.assert_array_equal(classical._grey(image), expected)


def test_adaptive_compares_with_the_mean_of_the_square_around():
    grey = np.random.default_rng(0).integers(0, 256, (30, 40), np.uint8)
    reach = 40 // 16
    wide = np.pad(grey.astype(float), reach, "symmetric")
    side = 2 * reach + 1
    mean = np.array(
        [[wide[y : y + side, x : x + side].mean() for x in range(40)] for y in range(30)]
    )
    np.testing.assert_array_equal(method("adaptive")(grey[..., None]), grey > 0.85 * mean)


def test_adaptive_reads_writing_under_uneven_light_where_otsu_does_not():
    light = np.linspace(80, 240, 160)[None].repeat(48, 0)
    ink = np.zeros(light.shape, bool)
    ink[::12, :], ink[:, ::16] = True, True
    page = np.where(ink, 0.6 * light, light).astype(np.uint8)[..., None]
    right = {name: np.mean((method(name)(page) == 0) == ink) for name in ("adaptive", "otsu")}
    assert right["adaptive"] > 0.97 > 0.9 > right["otsu"]


def test_kmeans_takes_every_colour_to_the_nearest_centre():
    pytest.importorskip("cv2", reason="needs OpenCV, the extra classical")
    image = _scene()
    found, lab = method("kmeans", 12)(image), classical._lab(image)
    centres = np.stack([lab[found == r].mean(axis=0) for r in range(found.max() + 1)])
    distance = np.linalg.norm(lab[..., None, :] - centres, axis=-1)
    assert np.mean(distance.argmin(-1) == found) > 0.97  # the centres of one step before


def test_kmeans_has_no_more_clusters_than_colours():
    truth = np.arange(3).repeat(20).reshape(6, 10)
    image = np.uint8([(10, 20, 30), (200, 20, 30), (10, 200, 30)])[truth]
    found = method("kmeans", 50)(image)
    assert found.max() == 2 and purity(found, truth) == 1


def test_watershed_meets_on_the_outline_of_blobs():
    y, x = np.mgrid[:64, :64]
    disk = ((y - 30) ** 2 + (x - 34) ** 2 < 18**2).astype(int)
    found = method("watershed", 16)(noisy(disk, ((50, 60, 90), (200, 190, 80))))
    assert 9 <= found.max() + 1 <= 25 and purity(found, disk) > 0.97


def test_the_scale_of_felzenszwalb_leaves_nearly_as_many_regions_as_asked_for():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (12, 15, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    counts = [method("felzenszwalb", n)(image).max() + 1 for n in (10, 60)]
    assert 6 <= counts[0] <= 10 and 40 <= counts[1] <= 60


def _ncut_of(weights: np.ndarray, side: np.ndarray) -> float:
    cut = weights[side][:, ~side].sum()
    return cut / weights[side].sum() + cut / weights[~side].sum()


def test_a_normalised_cut_is_the_best_of_all_cuts_of_a_small_graph():
    """Two groups of four nodes; against all 127 ways to cut."""
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.5, 1, (8, 8)) * 0.02
    for group in (np.s_[:4], np.s_[4:]):
        weights[group, group] = rng.uniform(0.5, 1, (4, 4))
    shuffle = rng.permutation(8)
    weights = ((weights + weights.T) / 2)[np.ix_(shuffle, shuffle)]
    np.fill_diagonal(weights, 0)
    ways = [np.array([bool(code >> i & 1) for i in range(8)]) for code in range(1, 128)]
    expected = min(ways, key=lambda side: _ncut_of(weights, side))
    cost, one, other = classical._cut(weights, np.arange(8))
    assert cost == pytest.approx(_ncut_of(weights, expected), rel=1e-5)
    assert set(map(int, one)) in (set(np.flatnonzero(expected)), set(np.flatnonzero(~expected)))
    assert sorted(map(int, [*one, *other])) == list(range(8))


def test_similarity_is_of_neighbours_alone():
    regions = np.array([[0, 0, 1, 2]])
    colours = np.array([[[0, 0, 0], [10, 0, 0], [5, 10, 0], [5, 0, 0]]], float)
    weights = classical._similarity(colours, regions)
    half = np.exp(-0.5)  # ten apart
    np.testing.assert_allclose(weights, [[0, half, 0], [half, 0, half], [0, half, 0]])


def test_grabcut_finds_the_figure_in_the_middle():
    y, x = np.mgrid[:60, :80]
    figure = ((y - 30) ** 2 + (x - 40) ** 2 < 17**2).astype(int)
    found = method("grabcut")(noisy(figure, ((60, 90, 60), (200, 60, 50)), 10))
    assert np.mean(found == figure) > 0.99


def test_modes_are_linked_by_neighbours():
    values = np.array([[0, 4, 8, 20], [0, 50, 8, 20]], np.float32)[..., None]
    found = classical._linked(values, 5)
    assert len({found[0, 0], found[0, 3], found[1, 1]}) == 3
    assert (found == found[0, 0]).tolist() == [[True] * 3 + [False], [True, False, True, False]]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 2), (8, 8), (40, 30)])
def test_small_and_flat_images_have_regions_too(name, size):
    run = method(name)
    if name == "grabcut" and min(size) < 8:
        with pytest.raises(InputError, match="8 x 8 or more"):
            run(np.full((*size, 3), 77, np.uint8))
        return
    assert run(np.full((*size, 3), 77, np.uint8)).shape == size
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    assert run(noise).shape == size


def test_images_of_16_bits_and_of_many_channels_are_seen_as_they_are_drawn():
    image, run = halves()[1], method("slic")
    expected = run(image)
    np.testing.assert_array_equal(run(image.astype(np.float32) + 0.2), expected)
    np.testing.assert_array_equal(run(np.dstack([image, image[..., :1]])), expected)


def test_bad_fields_are_refused_with_what_is_needed():
    with pytest.raises(InputError, match='unknown method "slik".*"slic".*Valid: adaptive'):
        Model(8, "slik")
    for name, segments, most in (("slic", 1, 65535), ("otsu", 65536, 65535), ("ncut", 2001, 2000)):
        with pytest.raises(InputError, match=rf"segments is {segments}: .* from 2 to {most}"):
            Model(8, name, segments)


@pytest.mark.parametrize(("name", "package"), [("slic", "skimage"), ("kmeans", "cv2")])
def test_a_missing_package_is_named_with_its_extra(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"need {package}: pip install -e '\.\[classical\]'"):
        Model(8, name)
