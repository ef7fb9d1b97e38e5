"""Objects as one map: who is on top, which number, where the border is."""

import numpy as np
from PIL import Image

from jaxseg.data.colours import GAP, Classes, voc_palette
from jaxseg.data.results import to_panoptic
from jaxseg.data.scene import BORDER, borders, of_panoptic, overlay, painted, strip

CLASSES = Classes(("sky", "cat", "dog"), voc_palette(3), (1, 2))


def _row(*spans: tuple[int, int]) -> np.ndarray:
    masks = np.zeros((len(spans), 1, 8), np.uint8)
    for mask, (start, stop) in zip(masks, spans, strict=True):
        mask[:, start:stop] = 1
    return masks


def test_the_surest_is_on_top_and_the_unsure_is_left_out():
    found = {"masks": _row((0, 4), (2, 6), (5, 8)), "classes": np.int32([1, 2, 1])}
    found["scores"] = np.float32([0.6, 0.9, 0.2])
    scene = painted(found, (1, 8), 0.5)
    assert scene.numbers.tolist() == [[2, 2, 1, 1, 1, 1, 0, 0]]
    assert scene.classes == (2, 1) and scene.scores == (np.float32(0.9), np.float32(0.6))
    assert scene.label.tolist() == [[1, 1, 2, 2, 2, 2, 255, 255]]


def test_of_true_objects_the_later_is_on_top():
    truth = {"masks": _row((0, 4), (2, 6)), "classes": np.int32([1, 2])}
    scene = painted(truth, (1, 8))
    assert scene.numbers.tolist() == [[1, 1, 2, 2, 2, 2, 0, 0]] and scene.scores == (None, None)


def test_a_panoptic_map_tells_objects_from_stuff():
    scene = of_panoptic(np.int32([[0, 1001, 1002, 255000, 1001, 2000]]))
    assert scene.numbers.tolist() == [[1, 2, 3, 0, 2, 4]]
    assert scene.classes == (0, 1, 1, 2) and scene.things == (False, True, True, False)
    assert scene.objects.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert scene.label.tolist() == [[0, 1, 1, 255, 1, 2]]


def test_the_panoptic_truth_has_crowds_stuff_and_void():
    label = np.uint8([[0, 1, 1, 1, 2, 2, 255, 1]])
    objects = {"masks": _row((1, 2), (2, 3), (4, 7), (7, 8)), "classes": np.int32([1, 1, 2, 1])}
    objects["crowd"] = np.array([False, False, False, True])
    panoptic = to_panoptic(label, objects, (1, 2))
    assert panoptic.tolist() == [[0, 1001, 1002, 1000, 2001, 2001, 255000, 1000]]


def test_borders_surround_each_object_inside():
    numbers = np.zeros((6, 7), np.int32)
    numbers[1:5, 1:4], numbers[1:5, 4:6] = 1, 2
    edge = borders(numbers)
    assert not edge[numbers == 0].any() and not edge[2:4, 2].any() and edge[1:5, [1, 3]].all()
    assert edge[1, 1:6].all() and edge[4, 1:6].all() and edge[1:5, 5].all()


def test_an_overlay_shows_shades_of_the_class_borders_and_names():
    numbers = np.zeros((80, 120), np.int32)
    numbers[10:70, 5:55], numbers[10:70, 60:110] = 1001, 1002
    image = np.full((80, 120, 3), 100, np.uint8)
    drawn = overlay(image, of_panoptic(numbers), CLASSES)
    np.testing.assert_array_equal(drawn[0, 0], [50, 50, 50])  # the sky's black over the image
    assert (drawn[10, 5:55] == BORDER).all()
    left, right = drawn[15, 10], drawn[15, 65]
    assert (left != right).any() and left.argmax() == right.argmax() == 0  # shades of red
    assert (drawn[30:50, 15:45].std(axis=(0, 1)) > 5).all()  # the name
    picture = strip(image, of_panoptic(numbers), of_panoptic(numbers), CLASSES)
    assert isinstance(picture, Image.Image) and picture.width == 2 * 3 * 120 + 2 * GAP


def test_an_overlay_shows_the_score():
    mask = np.zeros((1, 80, 120), np.uint8)
    mask[0, 10:70, 5:115] = 1
    image, drawn = np.full((80, 120, 3), 100, np.uint8), []
    for score in (0.12, 0.98, 0.98):
        found = {"masks": mask, "classes": np.int32([1]), "scores": np.float32([score])}
        drawn.append(overlay(image, painted(found, (80, 120)), CLASSES))
    differs = (drawn[0] != drawn[1]).any(-1)
    assert differs.any() and not differs[:25].any() and not differs[:, :20].any()  # the text alone
    np.testing.assert_array_equal(drawn[1], drawn[2])


def test_an_image_without_objects_is_drawn():
    none = {"masks": _row(), "classes": np.int32([]), "scores": np.float32([])}
    scene = painted(none, (1, 8))
    image = np.full((1, 8, 3), 7, np.uint8)
    np.testing.assert_array_equal(overlay(image, scene, CLASSES), image)
    assert strip(image, scene, scene, CLASSES).height > 0
