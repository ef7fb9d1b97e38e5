"""Inference and evaluation: whole images of any size, and scores equal to counting by hand."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from jaxseg import models
from jaxseg.config import default
from jaxseg.data.colours import IGNORE, Classes, voc_palette
from jaxseg.errors import InputError
from jaxseg.evaluate import cast, evaluate, make_eval_step, make_infer, open_source, report, table
from jaxseg.ops import metrics
from jaxseg.sharding import make_mesh, replicated

K = 4
SIZES = [(17, 23), (16, 16), (17, 23), (9, 30), (16, 16), (17, 23)]


class Noise:
    """Random images and labels of mixed sizes; class 3 is nowhere."""

    classes = Classes(("sky", "road", "car", "bird"), voc_palette(K))
    channels = 3

    def __len__(self) -> int:
        return len(SIZES)

    def size(self, index: int) -> tuple[int, int]:
        return SIZES[index]

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng(index)
        label = rng.integers(0, K - 1, SIZES[index], np.uint8)
        label[rng.random(label.shape) < 0.2] = IGNORE
        image = rng.integers(0, 256, (*SIZES[index], 3), np.uint8)
        return {"image": image, "label": label, "name": f"image{index}"}


def _config(**model) -> ConfigDict:
    config = default()
    config.data.crop = (16, 16)
    config.model.update(name="unet", num_classes=K, widths=(4, 8), padding="same", dropout=0.0)
    config.model.update(model)
    config.eval.batch = 3
    config.eval.pictures = 3
    models.complete(config)
    return config


def _variables(config: ConfigDict) -> dict:
    model, _, _ = models.build(config)
    image = jnp.zeros((1, *(model.fit(config.data.crop)), 3))
    variables = jax.jit(model.init, static_argnames="train")(jax.random.key(0), image, train=False)
    return {"batch_stats": {}, **variables}


@pytest.fixture(scope="module")
def network():
    config = _config()
    return config, jax.device_put(_variables(config), replicated(make_mesh(config.mesh)))


@pytest.fixture(scope="module")
def evaluated(network):
    config, variables = network
    mesh = make_mesh(config.mesh)
    return evaluate(make_eval_step(config, mesh), variables, Noise(), config, mesh)


def _alone(config: ConfigDict, variables: dict, index: int) -> np.ndarray:
    infer = jax.jit(make_infer(config), static_argnames="size")
    out = infer(variables, jnp.asarray(Noise()[index]["image"])[None], size=SIZES[index])
    return np.asarray(out["semantic"][0])


def _count(predictions: list[np.ndarray]) -> np.ndarray:
    counts = np.zeros((K, K), np.int64)
    for index, prediction in enumerate(predictions):
        for truth, found in zip(Noise()[index]["label"].flat, prediction.flat, strict=True):
            if truth != IGNORE:
                counts[truth, found] += 1
    return counts


def test_evaluation_counts_what_inference_of_each_image_alone_gives(network, evaluated):
    scores, confusion, drawn = evaluated
    predictions = [_alone(*network, index) for index in range(len(SIZES))]
    assert confusion.dtype == np.int64
    np.testing.assert_array_equal(confusion, _count(predictions))
    assert (confusion.sum(axis=0) > 0).sum() > 1
    assert scores == metrics.scores(confusion)
    hits, union = np.diag(confusion), confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    present = union > 0
    assert scores["mIoU"] == pytest.approx(np.mean(hits[present] / union[present]))
    assert scores["aAcc"] == pytest.approx(hits.sum() / confusion.sum())
    assert sorted(drawn) == [0, 2, 5]
    for index, prediction in drawn.items():
        np.testing.assert_array_equal(prediction, predictions[index])


def test_padding_examples_count_for_nothing(network):
    config, variables = network
    mesh = make_mesh(config.mesh)
    step = make_eval_step(config, mesh)
    batch = {
        "image": np.zeros((8, 16, 16, 3), np.uint8),
        "label": np.full((8, 16, 16), IGNORE, np.int32),
    }
    counts, semantic = step(variables, batch)
    assert not np.asarray(counts).any() and semantic.shape == (8, 16, 16)


def test_rows_over_space_give_the_same_counts_for_any_image_size(network, evaluated):
    config, variables = network
    config = config.copy_and_resolve_references()
    config.mesh.space = 2
    mesh = make_mesh(config.mesh)
    variables = jax.device_put(variables, replicated(mesh))
    _, confusion, _ = evaluate(make_eval_step(config, mesh), variables, Noise(), config, mesh)
    assert np.abs(confusion - evaluated[1]).sum() <= 2  # sums in another order may turn a tie


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (5, 40), (1, 1)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_inference_answers_at_the_size_of_the_image(size, padding):
    config = _config(padding=padding)
    image = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    out = jax.eval_shape(
        lambda v, x: make_infer(config)(v, x, size), _variables(config), jnp.asarray(image)
    )
    assert out["semantic"].shape == (2, *size) and out["semantic"].dtype == jnp.int32
    assert out["logits"].shape == (2, *size, K) and out["logits"].dtype == jnp.float32


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_an_image_is_mirrored_at_its_borders_where_the_network_needs_more(padding):
    config = _config(padding=padding)
    model, _, predict = models.build(config)
    variables = _variables(config)
    image = np.random.default_rng(0).integers(0, 256, (1, 13, 10, 3), np.uint8)
    need = model.fit((13, 10))
    before = [(n - h) // 2 for n, h in zip(need, (13, 10), strict=True)]
    pads = [(b, n - h - b) for b, n, h in zip(before, need, (13, 10), strict=True)]
    padded = np.pad(image, [(0, 0), *pads, (0, 0)], mode="symmetric")
    assert padded.shape != image.shape
    x = (padded - np.array(config.data.mean)) / np.array(config.data.std)
    x = jnp.asarray(x, jnp.float32)
    whole = np.asarray(predict(model.apply(variables, x, train=False), x)["logits"])
    lost = [(n - h) // 2 for n, h in zip(padded.shape[1:3], whole.shape[1:3], strict=True)]
    top, left = (b - gone for b, gone in zip(before, lost, strict=True))
    out = make_infer(config)(variables, jnp.asarray(image), (13, 10))
    expected = whole[:, top : top + 13, left : left + 10]
    np.testing.assert_allclose(out["logits"], expected, atol=1e-4)


def test_valid_and_padded_labels_are_where_the_image_is():
    config = _config(padding="valid", widths=(4, 8))
    variables = _variables(config)
    image = np.full((1, 21, 24, 3), 128, np.uint8)
    spot = image.copy()
    spot[0, 5, 18] = 255
    infer = make_infer(config)
    plain, marked = (
        np.asarray(infer(variables, jnp.asarray(x), (21, 24))["logits"]) for x in (image, spot)
    )
    changed = np.abs(plain - marked).max(axis=(0, 3))
    rows, columns = np.nonzero(changed > 1e-7)
    assert abs(rows.mean() - 5) < 3 and abs(columns.mean() - 18) < 3


def test_eval_scale_shrinks_what_the_network_sees_and_not_the_answer(network, evaluated):
    config, variables = network
    config = config.copy_and_resolve_references()
    config.eval.scale = 0.5
    mesh = make_mesh(config.mesh)
    _, confusion, drawn = evaluate(make_eval_step(config, mesh), variables, Noise(), config, mesh)
    assert confusion.sum() == evaluated[1].sum()
    assert (confusion != evaluated[1]).any()
    assert all(drawn[i].shape == SIZES[i] for i in drawn)


def test_parameters_are_cast_to_the_compute_dtype():
    params = {"conv": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    assert all(p.dtype == jnp.bfloat16 for p in jax.tree.leaves(cast(params, "bfloat16")))


def test_bfloat16_inference_gives_float32_logits_close_to_those_of_float32(network):
    config, variables = network
    half = config.copy_and_resolve_references()
    half.train.compute_dtype = "bfloat16"
    image = jnp.asarray(Noise()[1]["image"])[None]
    full, ours = (make_infer(c)(variables, image, SIZES[1])["logits"] for c in (config, half))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, full, atol=0.1 * float(jnp.abs(full).max()))
    assert (np.asarray(ours) != np.asarray(full)).any()


def test_a_class_count_that_is_not_the_data_sets_is_refused():
    config = _config()
    with pytest.raises(
        InputError, match=r"num_classes is 4, but shapes has 8 classes \(background"
    ):
        open_source(config, "val")
    config.model.num_classes = 8
    assert len(open_source(config, "val")) == 256


@pytest.fixture
def reported(evaluated, tmp_path):
    report(tmp_path, 12, *evaluated, Noise(), "val")
    return tmp_path


def test_eval_json_has_the_totals_as_fractions_and_each_class(evaluated, reported):
    scores, *_ = evaluated
    summary = json.loads((reported / "eval.json").read_text())
    assert (summary["step"], summary["split"], summary["images"]) == (12, "val", len(SIZES))
    for key in ("mIoU", "mAcc", "aAcc"):
        assert summary[key] == scores[key] and 0 <= summary[key] <= 1
    assert list(summary["per_class"]) == ["sky", "road", "car", "bird"]
    for number, values in enumerate(summary["per_class"].values()):
        assert values == {"IoU": scores["IoU"][number], "Acc": scores["Acc"][number]}
    assert summary["per_class"]["bird"]["Acc"] is None


def test_per_class_csv_names_absent_classes_and_counts_pixels(evaluated, reported):
    scores, confusion, _ = evaluated
    with (reported / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == list(Noise.classes.names)
    assert [int(row["id"]) for row in rows] == list(range(K))
    assert [int(row["pixels"]) for row in rows] == confusion.sum(axis=1).tolist()
    assert rows[3]["Acc"] == "absent" and rows[3]["pixels"] == "0"
    assert float(rows[0]["IoU"]) == pytest.approx(scores["IoU"][0], abs=1e-6)


def test_as_many_pictures_are_drawn_as_asked(reported):
    names = sorted(p.name for p in (reported / "pictures").iterdir())
    assert names == ["0_image0.png", "1_image2.png", "2_image5.png"]
    for path in [*(reported / "pictures").iterdir(), reported / "confusion.png"]:
        with Image.open(path) as picture:
            assert min(picture.size) > 50


@pytest.mark.parametrize(("pictures", "drawn"), [(0, 0), (1, 1), (6, 6), (50, 6)])
def test_pictures_are_spread_and_never_more_than_images(network, pictures, drawn):
    config, variables = network
    config = config.copy_and_resolve_references()
    config.eval.pictures = pictures
    mesh = make_mesh(config.mesh)

    def blank(_: dict, batch: dict) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((K, K), np.int32), np.zeros(batch["label"].shape, np.int32)

    assert len(evaluate(blank, variables, Noise(), config, mesh)[2]) == drawn


def test_the_table_calls_a_class_that_is_nowhere_absent():
    scores = metrics.scores(np.diag([3, 2, 1, 0]))
    lines = table(scores, Noise.classes).splitlines()
    assert lines[1].split() == ["sky", "1.000"] and lines[4].split() == ["bird", "absent"]
    assert lines[-1] == "mIoU 1.0000  mAcc 1.0000  aAcc 1.0000"


def test_the_table_of_no_pixels_is_all_absent():
    lines = table(metrics.scores(np.zeros((K, K))), Noise.classes).splitlines()
    assert all(line.endswith("absent") for line in lines[1:5])
