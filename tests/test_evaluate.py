"""Evaluation: scores equal to counting by hand, in any batches and buckets, or from files."""

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from jaxseg import evaluate as evaluation
from jaxseg import models
from jaxseg.config import default
from jaxseg.data.colours import IGNORE, Classes, save_label, voc_palette
from jaxseg.errors import InputError
from jaxseg.evaluate import Saved, evaluate, make_eval_step, open_source, rescore
from jaxseg.inference import make_infer, settings
from jaxseg.main import run
from jaxseg.ops import boundary, metrics
from jaxseg.saver import Saver
from jaxseg.sharding import make_mesh, replicated

K = 4
SIZES = [(17, 23), (16, 16), (17, 23), (9, 30), (16, 16), (17, 23)]


class Noise:
    """Random images and labels of mixed sizes; class 3 is nowhere."""

    classes = Classes(("sky", "road", "car", "bird"), voc_palette(K))
    channels, dtype = 3, np.dtype(np.uint8)

    def __init__(self, sizes: list[tuple[int, int]] = SIZES):
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def size(self, index: int) -> tuple[int, int]:
        return self.sizes[index]

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng(index)
        label = rng.integers(0, K - 1, self.sizes[index], np.uint8)
        label[rng.random(label.shape) < 0.2] = IGNORE
        image = rng.integers(0, 256, (*self.sizes[index], 3), np.uint8)
        return {"image": image, "label": label, "name": f"image{index}"}


def _config(**asked) -> ConfigDict:
    config = default()
    config.data.crop = (16, 16)
    config.model.update(name="unet", num_classes=K, widths=(4, 8), padding="same", dropout=0.0)
    config.eval.update({"batch": 3, "pictures": 3, **asked})
    models.complete(config)
    return config


@pytest.fixture(scope="module")
def variables() -> dict:
    config = _config()
    model, _, _ = models.build(config)
    image = jnp.zeros((1, *(model.fit(config.data.crop)), 3))
    variables = jax.jit(model.init, static_argnames="train")(jax.random.key(0), image, train=False)
    return jax.device_put({"batch_stats": {}, **variables}, replicated(make_mesh(config.mesh)))


def _evaluate(config: ConfigDict, variables: dict, source: object, **options):
    mesh = make_mesh(config.mesh)
    step = make_eval_step(config, mesh, edges=True)
    return evaluate(step, variables, source, config, mesh, **options)


@pytest.fixture(scope="module")
def evaluated(variables):
    return _evaluate(_config(), variables, Noise())


@pytest.fixture(scope="module")
def alone(variables) -> list[np.ndarray]:
    """The prediction for each image by itself."""
    infer = jax.jit(make_infer(_config()), static_argnames="size")
    images = [(Noise()[i]["image"], size) for i, size in enumerate(SIZES)]
    return [np.asarray(infer(variables, x[None], size=s)["semantic"][0]) for x, s in images]


def _count(label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    counts = np.zeros((K, K), np.int64)
    for truth, found in zip(label.flat, prediction.flat, strict=True):
        if truth != IGNORE:
            counts[truth, found] += 1
    return counts


def _ious(counts: np.ndarray) -> np.ndarray:
    hits = np.diag(counts)
    union = counts.sum(0) + counts.sum(1) - hits
    return hits[union > 0] / union[union > 0]


def test_evaluation_counts_what_inference_of_each_image_alone_gives(evaluated, alone):
    each = [_count(Noise()[i]["label"], prediction) for i, prediction in enumerate(alone)]
    total = np.sum(each, axis=0)
    assert evaluated.confusion.dtype == np.int64
    np.testing.assert_array_equal(evaluated.confusion, total)
    assert (total.sum(axis=0) > 0).sum() > 1
    scores = evaluated.scores
    assert {k: scores[k] for k in metrics.scores(total)} == metrics.scores(total)
    assert scores["mIoU"] == pytest.approx(np.mean(_ious(total)), rel=1e-12)
    assert scores["aAcc"] == pytest.approx(np.diag(total).sum() / total.sum(), rel=1e-12)
    for image, counts in zip(evaluated.images, each, strict=True):
        assert image["mIoU"] == pytest.approx(np.mean(_ious(counts)), rel=1e-12)
        assert image["aAcc"] == pytest.approx(np.diag(counts).sum() / counts.sum(), rel=1e-12)
    assert [image["name"] for image in evaluated.images] == [f"image{i}" for i in range(6)]
    mean = np.mean([image["mIoU"] for image in evaluated.images])
    assert scores["image_mIoU"] == pytest.approx(mean, rel=1e-12)
    assert (evaluated.sizes, evaluated.compilations) == (3, 3)


@pytest.mark.slow
def test_boundary_scores_are_those_of_the_images_alone(evaluated, alone):
    totals: dict[str, np.ndarray] = {"bands": 0, "rings": 0}
    values = []
    for i, prediction in enumerate(alone):
        label, size = Noise()[i]["label"], np.array([SIZES[i]], np.int32)
        counts = boundary.counts(prediction[None], label[None].astype(np.int32), size, K)
        totals = {key: totals[key] + np.asarray(counts[key][0]) for key in totals}
        values.append(boundary.image_f1(counts["contours"][0]))
    expected = boundary.scores(**totals)
    assert {key: evaluated.scores[key] for key in expected} == expected
    assert evaluated.scores["BF"] == pytest.approx(np.mean(values), rel=1e-12)
    assert 0 < evaluated.scores["mBoundaryIoU"] < 1


def test_pictures_are_of_spread_images_and_of_the_worst(evaluated, alone):
    assert sorted(evaluated.drawn) == [0, 2, 5]
    ranked = sorted(range(len(SIZES)), key=lambda i: evaluated.images[i]["mIoU"])
    assert list(evaluated.worst) == ranked[:3]
    for index, prediction in [*evaluated.drawn.items(), *evaluated.worst.items()]:
        np.testing.assert_array_equal(prediction, alone[index])


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8, 20])
def test_any_batch_gives_the_same(variables, evaluated, batch):
    """On eight devices it is rounded up to 8 and 24, and filled."""
    result = _evaluate(_config(batch=batch), variables, Noise())
    np.testing.assert_array_equal(result.confusion, evaluated.confusion)
    assert result.scores == evaluated.scores and result.images == evaluated.images


def test_rows_over_space_give_the_same_counts_for_any_image_size(variables, evaluated):
    config = _config()
    config.mesh.space = 2
    mesh = make_mesh(config.mesh)
    on_two = jax.device_put(jax.device_get(variables), replicated(mesh))
    result = evaluate(make_eval_step(config, mesh), on_two, Noise(), config, mesh)
    off = np.abs(result.confusion - evaluated.confusion).sum()
    assert off <= 2  # sums in another order may turn a tie
    assert "BF" not in result.scores


def _pixels(config: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes inference that of a network that sees each pixel alone."""
    weight = jax.random.normal(jax.random.key(1), (3, K))
    network = SimpleNamespace(apply=lambda variables, x, train: {"logits": x @ weight})
    built = (network, None, models.build(config)[2])
    monkeypatch.setattr(models, "build", lambda config: built)


@pytest.mark.slow
def test_two_hundred_sizes_compile_eight_times_and_count_each_image_once(monkeypatch):
    """Equal, to the digit, to evaluation of every image at its own size."""
    rng = np.random.default_rng(0)
    sizes = [tuple(map(int, size)) for size in rng.integers(5, 60, (220, 2))]
    source, config = Noise(sizes), _config(batch=8)
    _pixels(config, monkeypatch)
    mesh = make_mesh(config.mesh)
    step = make_eval_step(config, mesh)
    result = evaluate(step, {"params": {}}, source, config, mesh)
    assert result.sizes == len(set(sizes)) > 200
    assert step._cache_size() == result.compilations == 8
    weight = np.asarray(jax.random.normal(jax.random.key(1), (3, K)))
    expected = np.zeros((K, K), np.int64)
    for i in range(len(source)):
        x = (source[i]["image"] - np.array(config.data.mean)) / np.array(config.data.std)
        expected += _count(source[i]["label"], (np.float32(x) @ weight).argmax(-1))
    np.testing.assert_array_equal(result.confusion, expected)
    assert len(result.images) == len(sizes)


def test_padding_examples_count_for_nothing(variables):
    config = _config()
    step = make_eval_step(config, make_mesh(config.mesh), edges=True)
    batch = {
        "image": np.zeros((8, 16, 16, 3), np.uint8),
        "label": np.full((8, 16, 16), IGNORE, np.int32),
        "size": np.full((8, 2), 16, np.int32),
        "index": np.full(8, -1, np.int32),
    }
    out = step(variables, batch)
    assert not any(np.asarray(x).any() for x in out["counts"].values())
    assert out["semantic"].shape == (8, 16, 16)


@pytest.mark.slow
def test_scales_shrink_what_the_network_sees_and_not_the_answer(variables, evaluated):
    result = _evaluate(_config(scales=(0.5,)), variables, Noise())
    assert result.confusion.sum() == evaluated.confusion.sum()
    assert (result.confusion != evaluated.confusion).any()
    assert all(result.drawn[i].shape == SIZES[i] for i in result.drawn)


@pytest.mark.parametrize(("pictures", "drawn"), [(0, 0), (1, 1), (6, 6), (50, 6)])
def test_pictures_are_never_more_than_images(pictures, drawn):
    config = _config(pictures=pictures)

    def blank(_: dict, batch: dict) -> dict:
        label = np.asarray(batch["label"])
        return {
            "counts": {"confusion": np.ones((len(label), K, K), np.int32)},
            "semantic": np.zeros(label.shape, np.uint8),
            "finite": np.ones(len(label), bool),
            "index": batch["index"],
        }

    result = evaluate(blank, {}, Noise(), config, make_mesh(config.mesh))
    assert len(result.drawn) == len(result.worst) == drawn


def test_counts_beyond_int32_add_up():
    config = _config()

    def many(_: dict, batch: dict) -> dict:
        counts = np.full((len(batch["label"]), K, K), 2**31 - 1, np.int32)
        counts[np.asarray(batch["index"]) < 0] = 0
        label = np.asarray(batch["label"], np.uint8)
        finite = np.ones(len(label), bool)
        return {
            **{"counts": {"confusion": counts}, "semantic": label},
            **{"finite": finite, "index": batch["index"]},
        }

    result = evaluate(many, {}, Noise(), config, make_mesh(config.mesh))
    assert (result.confusion == len(SIZES) * (2**31 - 1)).all()


def test_logits_that_are_not_finite_are_refused_with_the_image(monkeypatch):
    class Broken(Noise):
        dtype = np.dtype(np.float32)

        def __getitem__(self, index: int) -> dict:
            example = super().__getitem__(index)
            image = np.float32(example["image"])
            if index == 2:
                image[3, 4] = np.nan
            return {**example, "image": image}

    config = _config()
    _pixels(config, monkeypatch)
    with pytest.raises(InputError, match=r"answer to image2 is not finite \(NaN"):
        _evaluate(config, {"params": {}}, Broken())


def test_an_empty_split_is_refused(variables):
    with pytest.raises(InputError, match="the split has no images"):
        _evaluate(_config(), variables, Noise([]))


def test_a_class_count_that_is_not_the_data_sets_is_refused():
    config = _config()
    message = r"num_classes is 4, but shapes has 8 classes \(background"
    with pytest.raises(InputError, match=message):
        open_source(config, "val")
    config.model.num_classes = 8
    assert len(open_source(config, "val")) == 256


def test_classes_of_another_order_are_refused():
    config = _config()
    config.model.num_classes = 8
    ours = open_source(config, "val").classes
    assert open_source(config, "val", ours)
    names = (ours.names[1], ours.names[0], *ours.names[2:])
    message = f"classes of the run are not .*0 is '{names[0]}' there and '{names[1]}' here"
    with pytest.raises(InputError, match=message):
        open_source(config, "val", Classes(names, ours.palette))
    with pytest.raises(InputError, match="7 classes there and 8 here"):
        open_source(config, "val", Classes(ours.names[:7], ours.palette[:7]))


@pytest.fixture(scope="module")
def saved(variables, evaluated, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "predictions" / "val"
    save = Saver(folder, 12, Noise.classes, settings(_config()))
    result = _evaluate(_config(), variables, Noise(), save=save)
    assert result.scores == evaluated.scores
    return folder


def test_saved_predictions_are_indexed_pictures(saved, alone):
    assert sorted(p.name for p in saved.glob("*")) == [f"image{i}.png" for i in range(6)]
    for i, prediction in enumerate(alone):
        with Image.open(saved / f"image{i}.png") as picture:
            assert picture.mode == "P"
            np.testing.assert_array_equal(np.asarray(picture), prediction)


def _open(monkeypatch: pytest.MonkeyPatch) -> ConfigDict:
    monkeypatch.setattr(evaluation, "open_source", lambda config, split: Noise())
    return _config()


@pytest.mark.slow
def test_the_report_is_made_again_of_saved_predictions(saved, evaluated, monkeypatch, tmp_path):
    evaluation.report(tmp_path, 12, evaluated, Noise(), "val")
    assert rescore(_open(monkeypatch), saved, "val") == 0
    for name in ("eval.json", "per_class.csv", "per_image.csv"):
        assert (saved / name).read_text() == (tmp_path / name).read_text()
    pictures = ("worst.png", "trimap.png", "confusion.png", "pictures/1_image2.png")
    assert all((saved / name).read_bytes() == (tmp_path / name).read_bytes() for name in pictures)


@pytest.mark.slow
def test_predictions_of_any_origin_are_scored(alone, evaluated, monkeypatch, tmp_path):
    for i, prediction in enumerate(alone):
        Image.fromarray(prediction.astype(np.uint8)).save(tmp_path / f"image{i}.png")  # grey
    rescore(_open(monkeypatch), tmp_path)
    summary = json.loads((tmp_path / "eval.json").read_text())
    assert summary["step"] is None and summary["mIoU"] == evaluated.scores["mIoU"]


def _another_size(folder: Path) -> None:
    save_label(folder / "image3.png", np.zeros((9, 29)), Noise.classes)


def _void(folder: Path) -> None:
    save_label(folder / "image3.png", np.full((9, 30), IGNORE), Noise.classes)


def _strange(folder: Path) -> None:
    save_label(folder / "image3.png", np.full((9, 30), K), Noise.classes)


def _gone(folder: Path, name: str = "image3.png") -> None:
    (folder / name).unlink()


def _other_classes(folder: Path) -> None:
    classes = Classes(("sky", "street", "car", "bird"), voc_palette(K))
    Saver(folder, 12, classes)("image0", np.zeros(SIZES[0]))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_another_size, r"prediction .*image3\.png is \(9, 29\) and its truth \(9, 30\)"),
        (_void, r"image3\.png holds 255: needs a class for every pixel"),
        (_strange, r"image3\.png holds ids 4 \(270 pixels\)"),
        (_gone, r"no prediction .*image3\.png: .* 6 images"),
        (partial(_gone, name="image0.png"), r"no prediction .*image0\.png"),
        (_other_classes, "1 is 'street' there and 'road' here"),
    ],
)
def test_bad_predictions_are_named(saved, tmp_path, monkeypatch, spoil, expected):
    for path in saved.glob("image*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spoil(tmp_path)
    with pytest.raises(InputError, match=expected):
        rescore(_open(monkeypatch), tmp_path)


def test_two_images_of_one_name_cannot_both_be_saved(tmp_path):
    save = Saver(tmp_path, 12, Noise.classes)
    save("a", np.zeros((3, 4)))
    with pytest.raises(InputError, match="two images are named a"):
        save("a", np.zeros((3, 4)))


@pytest.mark.parametrize("asked", [False, True])
def test_training_scores_boundaries_where_it_is_asked_to(variables, asked):
    config = _config(boundary=asked)
    mesh = make_mesh(config.mesh)
    result = evaluate(make_eval_step(config, mesh), variables, Noise(SIZES[:1]), config, mesh)
    assert ("BF" in result.scores) == ("trimap" in result.scores) == asked


def test_saved_predictions_are_a_source(saved):
    source = Saved(saved, Noise())
    assert len(source) == 6 and source.step == 12 and source.size(3) == (9, 30)
    assert source[3]["image"].shape == (9, 30, 1)


def test_eval_json_says_which_settings_were_scored(saved, monkeypatch):
    config = _open(monkeypatch)
    config.eval.update(flip=True, mode="slide")  # those of now do not count
    rescore(config, saved, "val")
    summary = json.loads((saved / "eval.json").read_text())
    asked = json.loads(json.dumps(settings(_config())))
    assert summary["eval"] == asked and {"mode", "scales", "flip", "crf"} <= asked.keys()
    assert "batch" not in asked


@pytest.mark.parametrize(
    ("step", "asked", "expected"),
    [
        (13, _config(), "step is 12 and 13"),
        (12, _config(flip=True), "eval is .* and .*'flip': True"),
        (None, None, "step is 12 and None"),
    ],
)
def test_a_folder_that_mixes_predictions_is_refused(
    saved, tmp_path, monkeypatch, step, asked, expected
):
    for path in saved.glob("image*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if step:
        Saver(tmp_path, step, Noise.classes, settings(asked))("image3", np.zeros(SIZES[3]))
    else:
        Image.fromarray(np.zeros(SIZES[3], np.uint8)).save(tmp_path / "image3.png")
    with pytest.raises(InputError, match=rf"image0\.png and .*image3\.png .*: {expected}"):
        rescore(_open(monkeypatch), tmp_path)
    assert not (tmp_path / "eval.json").exists()


def test_the_first_process_alone_reports_saved_predictions(saved, evaluated, monkeypatch, tmp_path):
    for path in saved.glob("image*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: evaluated)
    monkeypatch.setattr(evaluation.jax, "process_index", lambda: 1)
    assert rescore(_open(monkeypatch), tmp_path) == 0
    assert not (tmp_path / "eval.json").exists()


@pytest.mark.parametrize("buckets", [8, 1])
def test_an_image_smaller_than_a_window_is_named_before_any_is_read(variables, buckets):
    """In a bucket of larger images, too."""

    class Unread(Noise):
        def __getitem__(self, index: int) -> dict:
            raise AssertionError("read")

        def image_name(self, index: int) -> str:
            return f"image{index}"

    config = _config(mode="slide", crop=(10, 10), buckets=buckets)
    message = r"image1: an image of \(9, 8\) is smaller than one window of \(10, 10\)"
    with pytest.raises(InputError, match=message):
        _evaluate(config, variables, Unread([(17, 23), (9, 8), (9, 30)]))


def test_compilations_are_counted_and_not_inferred(variables):
    config = _config()
    mesh = make_mesh(config.mesh)
    step = make_eval_step(config, mesh)
    results = [evaluate(step, variables, Noise(), config, mesh) for _ in range(2)]
    assert [result.compilations for result in results] == [3, 0]


def test_a_file_whose_pixels_are_not_as_many_as_its_header_says_is_named(variables):
    class Lying(Noise):
        def size(self, index: int) -> tuple[int, int]:
            return self.sizes[index][::-1] if index == 3 else self.sizes[index]

    message = r"image3 has \(9, 30\) pixels \(height, width\), but its header says \(30, 9\)"
    with pytest.raises(InputError, match=message):
        _evaluate(_config(), variables, Lying())


@pytest.mark.slow
@pytest.mark.parametrize("told", [False, True])
def test_the_verb_scores_boundaries_unless_told_not_to(tiny_run, few_scenes, tmp_path, told):
    shutil.copytree(tiny_run, tmp_path / "run")
    predictions = tmp_path / "run" / "predictions" / "val"
    off = ["--config.eval.boundary=false"] if told else []
    where = ["--workdir", str(tmp_path / "run")]
    assert run(["eval", *where, "--save_predictions", *off]) == 0
    assert run(["eval", *where, "--predictions", str(predictions), *off]) == 0
    for folder in (tmp_path / "run", predictions):
        summary = json.loads((folder / "eval.json").read_text())
        assert ("BF" in summary) != told and summary["eval"]["mode"] == "whole"
