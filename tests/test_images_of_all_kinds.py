"""Every verb on data sets of more than 8 bits and more than 3 channels, and on soft masks."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data_files import _tiff as write_tiff

import jaxseg
from jaxseg import main
from jaxseg.data import catalog
from jaxseg.data.colours import Classes, voc_palette
from jaxseg.errors import InputError

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SIZE = (44, 400)  # longer than what a report shows at its own size
SMALL = (
    *("train.steps=2", "train.batch=8", "train.log_every=1", "train.eval_every=0"),
    *("data.crop=(32,32)", "data.scale=(0.5,2.0)", "data.photometric=True"),
    *("model.widths=(4,8)", "eval.pictures=1", "data.rotate=5.0"),
)


def _folder(root: Path, kind: str) -> Path:
    """Eight images of train and two of val, 16 bits a channel, of dark sky over bright road."""
    rng = np.random.default_rng(0)
    for split, count in {"train": 8, "val": 2}.items():
        for part in ("images", "masks"):
            (root / split / part).mkdir(parents=True)
        for i in range(count):
            label = np.zeros(SIZE, np.uint8)
            label[10 + 3 * i :] = 1
            shape = (*SIZE, 5) if kind == "bands" else SIZE
            noise = rng.integers(0, 9000, shape)
            bright = 40_000 * (label[..., None] if kind == "bands" else label).astype(int)
            image = (noise + bright).astype(np.uint16)
            if kind == "bands":
                write_tiff(root / split / f"images/{i}.tif", image)
            else:
                Image.fromarray(image).save(root / split / f"images/{i}.png")
            Image.fromarray(label).save(root / split / f"masks/{i}.png")
    catalog.write_classes(root / "classes.json", Classes(("sky", "road"), voc_palette(2)))
    return root


def _run(*words: str, changes: tuple[str, ...] = ()) -> None:
    assert main.run([*words, *(f"--config.{change}" for change in changes)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "channels", "suffix"), [("bands", 5, "tif"), ("grey", 3, "png")])
def test_every_verb_takes_images_of_16_bits(tmp_path, capsys, kind, channels, suffix):
    folder, run = _folder(tmp_path / "deep", kind), str(tmp_path / "run")
    numbers = ",".join(["100.0"] * channels)
    config = f"{EXPERIMENTS / 'quickstart.py'}"
    changes = (*SMALL, f"data.dataset={folder}", f"data.channels={channels}", "model.num_classes=2")
    changes += (f"data.mean=({numbers})", f"data.std=({numbers})")
    _run("--config", config, "--workdir", run, changes=changes)
    _run("eval", "--workdir", run)
    assert (tmp_path / "run/worst.png").exists()
    images = str(folder / "val/images")
    _run("predict", "--workdir", run, "--input", images, "--output", str(tmp_path / "labels"))
    label = np.asarray(Image.open(tmp_path / "labels/0.png"))
    assert label.shape == SIZE and label.max() < 2
    _run("check", "--data", str(folder), "--channels", str(channels))
    _run("browse", "--config", config, "--output", str(tmp_path / "sheet.png"), changes=changes)
    packed = str(tmp_path / "packed")
    _run("pack", "--dataset", str(folder), "--output", packed, "--channels", str(channels))
    ours, theirs = (
        catalog.open_split(name, "val", packed, channels)[1] for name in ("tfds:deep", str(folder))
    )
    np.testing.assert_array_equal(ours["image"], theirs["image"])

    predictor = jaxseg.load(run)
    raw = (theirs["image"] * 257).round().astype(np.uint16)
    one, other = predictor(raw), predictor(theirs["image"])
    np.testing.assert_array_equal(one.label, np.asarray(Image.open(tmp_path / "labels/1.png")))
    np.testing.assert_allclose(one.logits, other.logits, atol=1e-4)
    assert one.overlay.shape == (*SIZE, 3) and one.overlay.dtype == np.uint8
    with pytest.raises(InputError, match="NaN"):
        predictor(np.full((8, 8, channels), np.nan, np.float32))


def _portraits(root: Path, train: int = 8) -> Path:
    """Bright discs with soft rims on a dark ground; alpha is what was blended."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:48, :48]
    for split, count in {"train": train, "val": 2}.items():
        for part in ("images", "alphas"):
            (root / split / part).mkdir(parents=True)
        for i in range(count):
            centre, radius = rng.uniform(16, 32, 2), rng.uniform(8, 14)
            far = np.hypot(y - centre[0], x - centre[1])
            alpha = ((radius - far) / 8 + 0.5).clip(0, 1)[..., None]
            image = alpha * (220, 180, 160) + (1 - alpha) * (30, 60, 40)
            image = (image + rng.normal(0, 3, image.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / split / f"images/{i}.png")
            deep = (alpha[..., 0] * 65535).round().astype(np.uint16)
            Image.fromarray(deep).save(root / split / f"alphas/{i}.png")
    classes = Classes(("background", "person"), voc_palette(2))
    catalog.write_classes(root / "classes.json", classes)
    return root


@pytest.mark.slow
def test_a_unet_learns_soft_masks(tmp_path, capsys):
    folder, run = _portraits(tmp_path / "portraits", train=4), str(tmp_path / "run")
    config = f"{EXPERIMENTS / 'unet.py'}:dataset={folder},variant=matting"
    changes = ("train.steps=150", "train.batch=8", "model.widths=(8,16)", "data.crop=(48,48)")
    changes += ("train.eval_every=0", "optim.warmup=10", "train.ema=0.9")
    changes += ("data.photometric=False", "optim.lr=0.01", "model.dropout=0.0")
    _run("--config", config, "--workdir", run, changes=changes)
    logs = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert any("alpha_loss" in log for log in logs)
    images = str(folder / "train/images")
    output = ("--output", str(tmp_path / "out"), "--save_alpha")
    _run("predict", "--workdir", run, "--input", images, *output)
    source = catalog.open_split(str(folder), "train")
    for i in range(len(source)):
        found = np.asarray(Image.open(tmp_path / f"out/{i}_alpha.png"))
        assert found.dtype == np.uint8 and found.shape == (48, 48)
        alpha = source[i]["alpha"]
        assert np.abs(found / 255 - alpha).mean() < 0.03
        soft = (alpha > 0.1) & (alpha < 0.9)
        assert np.abs(found / 255 - alpha)[soft].mean() < 0.15  # hard labels are 0.25 off
    summary = json.loads((tmp_path / "run/eval.json").read_text())
    assert summary["mIoU"] > 0.8
    assert 0 < summary["MSE"] < summary["MAD"] < 0.06
    assert summary["SAD"] == pytest.approx(summary["MAD"] * 48 * 48 / 1000, rel=1e-4)


@pytest.mark.slow
def test_soft_masks_need_the_host_and_alpha_two_classes(tmp_path, tiny_run):
    config = f"{EXPERIMENTS / 'unet.py'}:dataset={_portraits(tmp_path / 'x')},variant=matting"
    command = ["--config", config, "--workdir", str(tmp_path / "run"), "--dry_run"]
    changes = ["data.crop=(32,32)", "model.widths=(4,8)", "data.augment_on=device"]
    with pytest.raises(InputError, match="soft masks need data.augment_on=host"):
        main.run([*command, *(f"--config.{c}" for c in [*changes, "data.rotate=0.0"])])
    image = str(tmp_path / "x/val/images")
    words = ["predict", "--workdir", str(tiny_run), "--input", image, "--save_alpha"]
    with pytest.raises(InputError, match="--save_alpha needs a run with two classes"):
        main.run([*words, "--output", str(tmp_path / "out")])
