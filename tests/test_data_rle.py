"""COCO's masks, against the official tool where it is installed, and its stored answers."""

import numpy as np
import pytest

from jaxseg.data.rle import decode, draw_polygon, encode, from_runs, unpack

# Polygons x, y, ... in a picture of 7 x 9 and what pycocotools 2.0.11 makes of them, row by row.
PIXELS = {
    (1, 1, 6, 1, 6, 5, 1, 5): (
        "000000000 011111000 011111000 011111000 011111000 000000000 000000000"
    ),
    (0.5, 0.5, 8.3, 2.2, 4.1, 6.9): (
        "000000000 011110000 001111110 001111100 000111000 000110000 000010000"
    ),
    (-3, -2, 4, 3.5, -1, 9): (
        "000000000 100000000 111000000 111100000 111000000 110000000 100000000"
    ),
    (2.6, 1.4, 2.6, 1.4, 7.2, 6.5, 3.1, 5.7, 8.8, 0.2): (
        "000000010 000111100 000011000 000000000 000010000 000111000 000000000"
    ),
    (0, 0, 9, 0, 9, 7, 0, 7): (
        "111111111 111111111 111111111 111111111 111111111 111111111 111111111"
    ),
    (3.2, 3.2, 3.4, 3.4, 3.2, 3.6): (
        "000000000 000000000 000000000 000000000 000000000 000000000 000000000"
    ),
}
SIZE = (7, 9)
OLD_NUMPY = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # pycocotools


def _rows(mask: np.ndarray) -> str:
    return " ".join("".join("01"[value] for value in row) for row in mask.astype(int))


@pytest.mark.parametrize("polygon", PIXELS)
def test_polygons_have_the_pixels_of_the_official_tool(polygon):
    mask = draw_polygon(np.array(polygon, float).reshape(-1, 2), SIZE)
    assert mask.shape == SIZE and _rows(mask) == PIXELS[polygon]


@OLD_NUMPY
def test_any_polygon_has_the_pixels_of_the_official_tool():
    official = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(300):
        size = tuple(rng.integers(1, 60, 2).tolist())
        count = int(rng.integers(3, 20))
        points = rng.uniform(-0.2, 1.2, (count, 2)) * size[::-1]
        points = np.round(points, int(rng.integers(0, 4)))
        expected = official.decode(official.frPyObjects([points.ravel().tolist()], *size))[..., 0]
        np.testing.assert_array_equal(draw_polygon(points, size), expected)


@OLD_NUMPY
def test_packed_runs_are_those_of_the_official_tool():
    official = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = tuple(rng.integers(1, 90, 2).tolist())
        mask = (rng.random(size) < rng.random()).astype(np.uint8)
        packed = official.encode(np.asfortranarray(mask))
        text = {"size": list(size), "counts": packed["counts"].decode()}
        np.testing.assert_array_equal(decode(text, size), mask)
        np.testing.assert_array_equal(from_runs(unpack(text["counts"]), size), mask)


def test_runs_go_down_the_columns_from_0():
    mask = from_runs([1, 2, 2, 1], (2, 3))
    assert mask.astype(int).tolist() == [[0, 1, 0], [1, 0, 1]]
    assert not from_runs([6], (2, 3)).any() and from_runs([0, 6], (2, 3)).all()


def test_small_and_large_and_falling_runs_are_unpacked():
    # By hand: 5 bits a character from "0"; the difference to the number two before from the 4th on.
    assert unpack("135") == [1, 3, 5]
    assert unpack("1352") == [1, 3, 5, 5]
    assert unpack("135O") == [1, 3, 5, 2]
    assert unpack("P1") == [32] and unpack("0P2") == [0, 64]


def test_several_polygons_are_one_object():
    one, other = [0, 0, 2, 0, 2, 2, 0, 2], [4, 4, 6, 4, 6, 6, 4, 6]
    both = decode([one, other], SIZE)
    np.testing.assert_array_equal(both, decode([one], SIZE) | decode([other], SIZE))
    assert decode([one], SIZE).sum() == decode([other], SIZE).sum() == 4


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [7, 8], "counts": [56]}, "not the image's"),
        ({"size": [7, 9], "counts": [60]}, "60 pixels, the image 63"),
        ([], "no polygon"),
        ({"size": [7, 9], "counts": [10**12]}, "1000000000000 pixels, the image 63"),
        ({"size": [7, 9], "counts": [70, -7]}, "one of its runs is -7 pixels long"),
        ([[1, 1, 1e9, 1, 5, 5]], r"a point at x 1e\+09, y 1, far outside of 9x7"),
        ([[1, 1, 5, -1e300, 5, 5]], r"a point at x 5, y -1e\+300"),
        ([[1, 1, 5, float("nan"), 5, 5]], "a point at x 5, y nan"),
        ([[1, 1, float("inf"), 2, 5, 5]], "a point at x inf, y 2"),
    ],
)
def test_what_does_not_fit_the_image_is_refused(segmentation, message):
    with pytest.raises(ValueError, match=message):
        decode(segmentation, SIZE)


def test_points_somewhat_outside_are_drawn():
    points = np.array([[-9000, -9000], [9000, -9000], [9000, 9000], [-9000, 9000]], float)
    assert draw_polygon(points, SIZE).all()


def test_masks_are_encoded_as_the_official_tool_does():
    official = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for density in (0, 0.01, 0.5, 0.99, 1):
        mask = rng.random((37, 53)) < density
        theirs = official.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert encode(mask) == {"size": [37, 53], "counts": theirs["counts"].decode()}


def test_what_is_encoded_is_decoded():
    rng = np.random.default_rng(0)
    for density in (0, 0.003, 0.5, 1):
        mask = rng.random((140, 90)) < density
        np.testing.assert_array_equal(decode(encode(mask), mask.shape), mask)
    assert encode(np.bool_([[0, 1], [1, 1]])) == {"size": [2, 2], "counts": "13"}
