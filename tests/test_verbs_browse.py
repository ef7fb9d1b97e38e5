"""The contact sheet shows the training examples and their labels."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxseg import main
from jaxseg.config import default
from jaxseg.data import catalog, pipeline
from jaxseg.data.colours import overlay, rgb
from jaxseg.errors import InputError

QUICKSTART = str(Path(__file__).parents[1] / "experiments" / "quickstart.py")


def _browse(path, *changes: str) -> None:
    command = ["browse", "--config", QUICKSTART, "--output", str(path)]
    extra = [f"--config.{change}" for change in changes]
    assert main.run([*command, "--count", "6", *extra]) == 0


def test_the_sheet_holds_the_first_examples_of_the_stream(few_scenes, tmp_path):
    _browse(tmp_path / "sheet.png", "data.scale=(0.5,1.5)", "data.photometric=True")
    picture = np.asarray(Image.open(tmp_path / "sheet.png"))
    data = default().data
    data.update(crop=(96, 96), mean=(127.5,) * 3, scale=(0.5, 1.5), photometric=True)
    source = catalog.open_split("shapes", "train")
    batches = pipeline.train_batches(source, data, batch=6, seed=0)
    batch = next(batches)
    batches.close()
    for i in range(6):
        top, left = (i // 4) * 102, (i % 4) * 198
        image = picture[top : top + 96, left : left + 96]
        np.testing.assert_array_equal(image, batch["image"][i])
        over = picture[top : top + 96, left + 96 : left + 192]
        want = overlay(batch["image"][i], batch["label"][i], source.classes)
        np.testing.assert_array_equal(over, want)
    assert picture.shape[0] > 204  # the legend


def test_what_the_device_does_is_shown_too(few_scenes, tmp_path):
    _browse(tmp_path / "a.png", "data.augment_on=device", "data.scale=(2.0,2.0)")
    _browse(tmp_path / "b.png", "data.augment_on=device", "data.scale=(0.5,0.5)")
    a, b = (np.asarray(Image.open(tmp_path / name))[:96, :96] for name in ("a.png", "b.png"))
    grey = np.array([128, 128, 128])
    assert not (a == grey).all(-1).mean() > 0.1 and (b == grey).all(-1).mean() > 0.6


def test_objects_are_pasted_where_the_config_asks_for_it(few_scenes, tmp_path):
    _browse(tmp_path / "plain.png")
    _browse(tmp_path / "pasted.png", "data.copy_paste=1.0")
    plain, pasted = (np.asarray(Image.open(tmp_path / f"{n}.png")) for n in ("plain", "pasted"))
    differing = (plain[:96, :96] != pasted[:96, :96]).any(-1).mean()
    assert 0 < differing < 1


def test_objects_have_white_borders(few_scenes, tmp_path):
    _browse(tmp_path / "plain.png")
    _browse(tmp_path / "objects.png", "data.objects=12")
    plain, drawn = (np.asarray(Image.open(tmp_path / f"{n}.png")) for n in ("plain", "objects"))
    changed = (plain != drawn).any(-1)
    assert 100 < changed[:96, 96:192].sum() < 96 * 96 / 3 and (drawn[changed] == 255).all()
    assert not changed[:96, :96].any()


@pytest.mark.parametrize("channels", [1, 2, 3, 6])
def test_images_of_any_channels_are_shown(channels):
    image = np.random.default_rng(0).uniform(0, 255, (5, 6, channels)).astype(np.float32)
    picture = rgb(image)
    assert picture.shape == (5, 6, 3) and picture.dtype == np.uint8
    assert np.abs(picture[..., 0] - image[..., 0]).max() <= 0.5


def test_a_name_that_is_no_picture_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="needs the name of a picture"):
        _browse(tmp_path / "sheet.docx")
    with pytest.raises(InputError, match="needs at least 1"):
        main.run(["browse", "--config", QUICKSTART, "--output", "a.png", "--count", "0"])
