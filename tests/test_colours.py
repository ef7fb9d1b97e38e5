"""Labels as colours: palette files keep the ids, pictures show what they should."""

import numpy as np
import pytest
from PIL import Image

from jaxseg.data.colours import (
    GAP,
    IGNORE,
    IGNORE_COLOUR,
    Classes,
    colourise,
    legend,
    overlay,
    read_note,
    rgb,
    save_label,
    strip,
    voc_palette,
)

TABLE = Classes(("sky", "road", "car"), ((10, 20, 30), (200, 0, 0), (0, 0, 250)))
LABEL = np.array([[0, 1, 2, 1], [2, 255, 0, 1], [1, 1, 1, 1]], np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_a_saved_label_has_its_ids_its_palette_and_its_size(tmp_path, dtype):
    save_label(tmp_path / "label.png", LABEL.astype(dtype), TABLE)
    with Image.open(tmp_path / "label.png") as picture:
        assert picture.mode == "P" and picture.size == (4, 3)
        np.testing.assert_array_equal(np.asarray(picture), LABEL)
        shown = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(shown, colourise(LABEL, TABLE))


def test_a_flipped_label_is_saved_as_it_looks(tmp_path):
    save_label(tmp_path / "label.png", LABEL[:, ::-1].T, TABLE)
    with Image.open(tmp_path / "label.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), LABEL[:, ::-1].T)


def test_the_last_of_255_classes_survives_saving(tmp_path):
    table = Classes(tuple(map(str, range(255))), voc_palette(255))
    label = np.arange(256, dtype=np.uint8).reshape(16, 16)
    save_label(tmp_path / "label.png", label, table)
    with Image.open(tmp_path / "label.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), label)
        shown = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert tuple(map(tuple, shown[:255])) == table.palette
    assert tuple(shown[255]) == IGNORE_COLOUR


def test_colourise_paints_classes_and_leaves_the_rest_ignored():
    painted = colourise(LABEL, TABLE)
    assert painted.shape == (3, 4, 3) and painted.dtype == np.uint8
    assert tuple(painted[0, 2]) == (0, 0, 250)
    assert tuple(painted[1, 1]) == IGNORE_COLOUR


@pytest.mark.parametrize("channels", [1, 3])
def test_an_overlay_mixes_image_and_colours(channels):
    image = np.full((3, 4, channels), 100, np.uint8)
    np.testing.assert_array_equal(overlay(image, LABEL, TABLE, alpha=0), np.full((3, 4, 3), 100))
    np.testing.assert_array_equal(overlay(image, LABEL, TABLE, alpha=1), colourise(LABEL, TABLE))
    half = overlay(image, LABEL, TABLE)
    assert half.dtype == np.uint8
    assert tuple(half[0, 0]) == (55, 60, 65)
    assert tuple(half[0, 1]) == (150, 50, 50)


def test_voc_palette_is_the_official_one():
    def official(index: int) -> tuple[int, int, int]:
        colour = [0, 0, 0]  # VOCdevkit's VOClabelcolormap: three bits of the id at a time
        for place in range(7, -1, -1):
            for channel in range(3):
                colour[channel] |= (index & 1) << place
                index >>= 1
        return tuple(colour)

    palette = voc_palette(256)
    assert palette == tuple(map(official, range(256)))
    assert palette[1] == (128, 0, 0) and palette[15] == (192, 128, 128)
    assert palette[20] == (0, 64, 128) and palette[255] == IGNORE_COLOUR
    assert len(set(palette)) == 256


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(200, 260), (48, 40), (401, 1)])
def test_a_strip_shows_four_panels_and_a_legend(size, channels):
    height, width = size
    image = np.full((*size, channels), 90, np.uint8)
    truth = np.zeros(size, np.uint8)
    truth[: height // 2] = 1
    truth[0] = IGNORE
    prediction = np.full(size, 1, np.int32)
    picture = strip(image, truth, prediction, TABLE)
    zoom = max(1, round(200 / height))
    wide = zoom * width
    assert picture.mode == "RGB" and picture.width == 4 * wide + 3 * GAP
    assert picture.height > zoom * height
    pixels = np.asarray(picture)[: zoom * height : zoom]
    panels = [pixels[:, k * (wide + GAP) :][:, :wide:zoom] for k in range(4)]
    assert (panels[0] == 90).all()
    np.testing.assert_array_equal(panels[1], colourise(truth, TABLE))
    np.testing.assert_array_equal(panels[2], colourise(prediction, TABLE))
    red = (panels[3] == (230, 40, 40)).all(axis=-1)
    np.testing.assert_array_equal(red, truth == 0)
    assert (panels[3][~red] == 30).all()


def test_a_legend_shows_the_colours_of_its_classes_and_of_ignore():
    picture = np.asarray(legend(TABLE, [1, 2, IGNORE], width=300))
    assert picture.shape[1] == 300
    colours = {tuple(c) for c in picture.reshape(-1, 3)}
    assert {(200, 0, 0), (0, 0, 250), IGNORE_COLOUR} <= colours
    assert (10, 20, 30) not in colours


def test_a_narrow_legend_has_a_row_for_each_class():
    one, three = legend(TABLE, [0], width=20), legend(TABLE, [0, 1, 2], width=20)
    assert three.height - one.height == 2 * 18


def test_images_of_any_channels_and_numbers_are_shown():
    image = np.arange(2 * 2 * 5, dtype=np.uint8).reshape(2, 2, 5)
    np.testing.assert_array_equal(rgb(image), image[..., :3])
    for channels in (1, 2):
        grey = rgb(image[..., :channels])
        np.testing.assert_array_equal(grey, np.repeat(image[..., :1], 3, axis=2))
    fine = np.array([[[-0.3, 254.6, 255.2]]], np.float32)
    assert rgb(fine).dtype == np.uint8 and rgb(fine).tolist() == [[[0, 255, 255]]]


def test_a_note_is_kept_in_the_file(tmp_path):
    save_label(tmp_path / "label.png", LABEL, TABLE, '{"names": ["Stra\\u00dfe"]}')
    assert read_note(tmp_path / "label.png") == '{"names": ["Stra\\u00dfe"]}'
    save_label(tmp_path / "label.png", LABEL, TABLE)
    assert read_note(tmp_path / "label.png") == ""
