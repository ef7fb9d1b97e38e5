"""The verbs of a paper without parameters, through the command line."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jaxseg
from jaxseg import main
from jaxseg.data.colours import IGNORE, read_note, voc_palette
from jaxseg.data.sources import Shapes
from jaxseg.errors import InputError
from jaxseg.verbs.regions import CEILING, Ceiling, majority, overlay, save_regions

pytest.importorskip("skimage", reason="needs scikit-image, the extra classical")
EXPERIMENT = Path(__file__).parents[1] / "experiments" / "classical.py"
FEW = ("--config.data.threads=1", "--config.eval.pictures=2")


def run(arguments: str, workdir: Path, *words: str) -> int:
    config = f"{EXPERIMENT}:{arguments}"
    return main.run(["--config", config, "--workdir", str(workdir), *FEW, *words])


@pytest.fixture
def scored(tmp_path, few_scenes) -> Path:
    """A workdir of slic on `shapes`."""
    assert run("method=slic,segments=150", tmp_path / "run") == 0
    return tmp_path / "run"


def by_hand(regions: np.ndarray, label: np.ndarray, classes: int) -> np.ndarray:
    best = np.full(label.shape, IGNORE)
    for region in set(regions.flat):
        votes = [0] * classes
        for r, truth in zip(regions.flat, label.flat, strict=True):
            if r == region and truth != IGNORE:
                votes[truth] += 1
        if any(votes):
            best[regions == region] = votes.index(max(votes))
    return best


@pytest.mark.parametrize("seed", range(3))
def test_majority_is_counted_by_hand(seed):
    rng = np.random.default_rng(seed)
    regions, label = rng.integers(0, 9, (12, 15)), rng.integers(0, 4, (12, 15)).astype(np.uint8)
    label[rng.random(label.shape) < 0.4] = IGNORE
    label[regions == 5] = IGNORE
    best = majority(regions, label, 4)
    assert best.dtype == np.uint8 and (best[regions == 5] == IGNORE).all()
    np.testing.assert_array_equal(best, by_hand(regions, label, 4))


def test_no_labels_of_the_regions_score_better_than_the_ceiling():
    """Nor do regions as fine as pixels score less than 1."""
    rng = np.random.default_rng(0)
    regions, label = rng.integers(0, 3, (6, 6)), rng.integers(0, 3, (6, 6)).astype(np.uint8)
    best = np.mean(majority(regions, label, 3) == label)
    for code in range(27):
        other = np.array([code % 3, code // 3 % 3, code // 9])[regions]
        assert np.mean(other == label) <= best
    pixels = np.arange(36).reshape(6, 6)
    np.testing.assert_array_equal(majority(pixels, label, 3), label)


def test_a_run_is_scored_and_remembered(scored, capsys):
    names = {path.name for path in scored.iterdir()}
    assert names >= {"config.json", "classes.json", "env.json", "eval.json", "per_class.csv"}
    assert names >= {"confusion.png", "worst.png"} and "checkpoints" not in names
    assert len(list((scored / "pictures").iterdir())) == 2
    report = json.loads((scored / "eval.json").read_text())
    assert report["scored"] == CEILING and report["step"] is None
    assert (report["method"], report["segments"], report["images"]) == ("slic", 150, 8)
    assert 75 < report["regions_per_image"] < 225
    assert "scikit-image" in report["versions"]


def test_the_score_is_that_of_majorities_counted_by_hand(scored):
    from skimage.segmentation import slic

    source, right, pixels = Shapes("val"), 0, 0
    for i in range(len(source)):
        example = source[i]
        regions = slic(example["image"], 150, compactness=10, start_label=0)
        best = majority(regions, example["label"], 8)
        right += np.sum((best == example["label"]) & (example["label"] != IGNORE))
        pixels += np.sum(example["label"] != IGNORE)
    report = json.loads((scored / "eval.json").read_text())
    assert report["aAcc"] == pytest.approx(right / pixels, abs=1e-12)
    assert 0.8 < report["mIoU"] < 1


def test_the_table_says_that_it_is_a_ceiling(tmp_path, few_scenes, capsys):
    assert run("method=otsu", tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "no parameters, nothing to train" in said
    assert f"({CEILING})" in said and "regions an image, 8 images of val" in said


def test_eval_scores_again_and_other_splits(scored, few_scenes, capsys):
    first = (scored / "eval.json").read_text()
    assert main.run(["eval", "--workdir", str(scored)]) == 0
    assert (scored / "eval.json").read_text() == first
    assert main.run(["eval", "--workdir", str(scored), "--split", "test"]) == 0
    assert (scored / "eval.json").read_text() == first
    assert json.loads((scored / "eval/test/eval.json").read_text())["split"] == "test"
    with pytest.raises(InputError, match="--save_predictions needs a network"):
        main.run(["eval", "--workdir", str(scored), "--save_predictions"])


def test_more_segments_have_a_higher_ceiling(tmp_path, few_scenes):
    scores = []
    for segments in (20, 300):
        assert run(f"segments={segments}", tmp_path / str(segments)) == 0
        scores.append(json.loads((tmp_path / str(segments) / "eval.json").read_text())["mIoU"])
    assert scores[0] + 0.05 < scores[1]


@pytest.mark.slow
def test_a_folder_with_ignored_pixels_and_mixed_sizes(tmp_path, write_folder):
    data = write_folder(tmp_path / "data")
    Image.new("RGB", (30, 20), "green").save(data / "val/images/02.png")
    Image.new("L", (30, 20), 255).save(data / "val/masks/02.png")  # nothing but ignored
    assert run(f"dataset={data},method=slic", tmp_path / "run") == 0
    report = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert report["images"] == 3 and set(report["per_class"]) == {"sky", "road", "car"}


def test_grey_images(tmp_path, few_scenes):
    assert run("method=otsu,in_channels=1", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["regions_per_image"] == 2


def _photos(folder: Path) -> list[Path]:
    folder.mkdir()
    paths = []
    for i, size in enumerate(((40, 50), (33, 20))):
        noise = np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)
        paths.append(folder / f"{i}.png")
        Image.fromarray(noise).save(paths[-1])
    return paths


def _predict(workdir: Path, folder: Path, output: Path, *words: str) -> int:
    known = ("predict", "--workdir", workdir, "--input", folder, "--output", output)
    return main.run([*map(str, known), *words])


def test_predict_writes_regions_and_overlays(scored, tmp_path, capsys):
    from skimage.segmentation import slic

    paths, output = _photos(tmp_path / "in"), tmp_path / "out"
    assert _predict(scored, tmp_path / "in", output) == 0
    names = ["0.png", "0_overlay.png", "1.png", "1_overlay.png"]
    assert sorted(path.name for path in output.iterdir()) == names
    for path in paths:
        image = np.asarray(Image.open(path))
        regions = slic(image, 150, compactness=10, start_label=0)
        with Image.open(output / path.name) as picture:
            assert picture.mode == "P"
            np.testing.assert_array_equal(np.asarray(picture), regions)
            shown = np.asarray(picture.convert("RGB"))
        np.testing.assert_array_equal(shown, np.array(voc_palette(256))[regions])
        drawn = np.asarray(Image.open(output / f"{path.stem}_overlay.png"))
        np.testing.assert_array_equal(drawn, overlay(image, regions))
    assert "images: 2, segmented: 2" in capsys.readouterr().out


def test_predict_goes_on_where_it_stopped(scored, tmp_path, capsys):
    _photos(tmp_path / "in")
    assert _predict(scored, tmp_path / "in", tmp_path / "out", "--part", "1/2") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0.png", "0_overlay.png"]
    assert _predict(scored, tmp_path / "in", tmp_path / "out") == 0
    assert "images: 2, segmented: 1" in capsys.readouterr().out
    os.utime(tmp_path / "in" / "1.png", (2e9, 2e9))  # newer than its regions
    assert _predict(scored, tmp_path / "in", tmp_path / "out") == 0
    assert "images: 2, segmented: 1" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "word", ["--save_logits", "--save_probabilities", "--save_alpha", "--legend"]
)
def test_what_regions_do_not_have_is_refused(scored, tmp_path, word):
    _photos(tmp_path / "in")
    with pytest.raises(InputError, match="neither logits nor classes"):
        _predict(scored, tmp_path / "in", tmp_path / "out", word)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="--submission needs a network"):
        _predict(scored, tmp_path / "in", tmp_path / "out", "--submission")


@pytest.mark.parametrize(("count", "mode"), [(256, "P"), (257, "I;16"), (65_536, "I;16")])
def test_many_regions_are_numbered_in_16_bits(tmp_path, count, mode):
    regions = np.arange(70_000).reshape(250, 280).clip(0, count - 1).astype(np.int32)
    save_regions(tmp_path / "a.png", regions, "a note")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == mode
        np.testing.assert_array_equal(np.asarray(picture), regions)
    assert read_note(tmp_path / "a.png") == "a note"


def test_more_regions_than_16_bits_can_number_are_refused(tmp_path):
    with pytest.raises(InputError, match="65537 regions.*fewer model.segments"):
        save_regions(tmp_path / "a.png", np.array([[65_536]]))


def test_the_overlay_has_borders_and_mixed_colours():
    regions = np.zeros((4, 6), int)
    regions[:, 3:] = 300
    image = np.full((4, 6, 1), 100, np.uint8)
    drawn = overlay(image, regions)
    assert (drawn[:, 3] == 255).all()
    colours = voc_palette(301)
    for column, region in ((1, 0), (5, 300 - 256)):
        mixed = np.rint((100 + np.array(colours[region])) / 2)
        assert np.abs(drawn[:, column].astype(float) - mixed).max() <= 1


def test_a_dry_run_leaves_nothing(tmp_path, few_scenes, capsys):
    assert run("segments=30", tmp_path / "run", "--dry_run") == 0
    assert "dry run: one image" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words", "expected"),
    [
        ("method=slik", (), 'unknown method "slik". Did you mean "slic"'),
        ("method=slic", ("--config.model.method=k",), "Valid: adaptive, felzenszwalb, grabcut"),
        ("segments=1", (), "segments is 1: slic needs a number from 2 to 65535"),
        ("segments=70000", (), "segments is 70000"),
        ("segments=many", (), "segments=many: needs an integer"),
        ("", ("--config.model.segment=9",), 'Did you mean "segments"'),
        ("", ("--config.loss.weight=9",), "loss.weight"),
    ],
)
def test_bad_input_is_one_message(tmp_path, few_scenes, arguments, words, expected):
    with pytest.raises(InputError) as error:
        run(arguments, tmp_path / "run", *words)
    assert expected in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_of_a_network_is_not_overwritten(tiny_run, few_scenes):
    before = (tiny_run / "config.json").read_text()
    with pytest.raises(InputError, match="holds a run of another config"):
        run("method=otsu", tiny_run)
    assert (tiny_run / "config.json").read_text() == before


def test_describe_and_load_say_that_there_is_no_network(few_scenes, tmp_path):
    with pytest.raises(InputError, match="classical has no network and no parameters"):
        main.run(["describe", "--config", str(EXPERIMENT)])
    run("method=otsu", tmp_path / "run")
    for use in (jaxseg.load, lambda run: main.run(["describe", "--workdir", str(run)])):
        with pytest.raises(InputError, match="a run of classical, which has no parameters"):
            use(tmp_path / "run")


def test_an_image_that_is_read_twice_counts_once(few_scenes):
    source = Ceiling(lambda image: np.zeros(image.shape[:2], int), Shapes("val"))
    assert source[3]["image"].shape == (*source.size(3), 1) == source[3]["image"].shape
    assert source.counts == {3: 1} and len(source) == 8
