"""ADE20K, SUN RGB-D, CamVid, ISBI 2012, nuclei, pets: on real samples and in trees written here."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxseg.data import catalog
from jaxseg.errors import InputError

# SegNet's CamVid: pixels per class in the order of the classes, then void.
CAMVID = {
    "train": (
        *(10682767, 14750079, 623349, 20076880, 2845085, 6166762, 743859, 714595, 3719877),
        *(405385, 184967, 2503995),
    ),
    "val": (
        *(1601620, 4531180, 98499, 5053176, 1521751, 2851125, 155724, 537197, 304716),
        *(113531, 387010, 297271),
    ),
}


def _formats(data_root: Path, name: str) -> Path:
    if not (data_root / "formats" / name).is_dir():
        pytest.skip(f"needs formats/{name}")
    return data_root / "formats" / name


def _save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def test_the_samples_of_ade20k_ignore_0_exactly_once(data_root):
    folder = _formats(data_root, "ade20k")
    for split, count in (("train", 1), ("val", 3)):
        source = catalog.open_split(f"ade20k:{folder}", split)
        assert len(source) == count and len(source.classes) == 150
        for i in range(count):
            raw = np.asarray(Image.open(source.mask(i))).astype(int)
            label = source[i]["label"]
            np.testing.assert_array_equal(label, np.where(raw == 0, 255, raw - 1))
    lines = (folder / "ADEChallengeData2016/objectInfo150.txt").read_text().splitlines()[1:]
    names = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
    assert source.classes.names == tuple(names)
    # The full data set colours the same picture; its parts must be the parts of the label.
    whole = "ADE20K_2016_07_26/images/validation/a/abbey/ADE_val_00000001_seg.png"
    size = source.size(0)[::-1]
    colours = np.asarray(Image.open(folder / whole).resize(size, 0)).astype(int)  # the nearest
    classes = colours[..., 0] // 10 * 256 + colours[..., 1]
    label = source[0]["label"]
    assert source[0]["name"] == "ADE_val_00000001"
    for i in np.unique(label[label < 255]):
        values, counts = np.unique(classes[label == i], return_counts=True)
        assert counts.max() > 0.9 * counts.sum()


def test_the_samples_of_sun_rgbd(data_root):
    folder = _formats(data_root, "sunrgbd")
    for split in ("train", "val", "test"):
        source = catalog.open_split(f"sunrgbd:{folder}", split)
        assert len(source) == 1 and len(source.classes) == 37
        raw = np.asarray(Image.open(source.mask(0)))
        np.testing.assert_array_equal(source[0]["label"], raw)
        assert source[0]["image"].shape[:2] == raw.shape


def test_camvid_has_its_published_splits_classes_and_pixels(data_root):
    if not (data_root / "camvid").is_dir():
        pytest.skip("needs camvid")
    assert catalog.read_classes(data_root / "camvid/classes.json") == catalog.classes("camvid")
    for split, count in (("train", 367), ("val", 101)):
        source = catalog.open_split("camvid", split, str(data_root))
        assert len(source) == count and source[0]["image"].shape == (360, 480, 3)
        pixels = sum(np.bincount(source.label(i).ravel(), minlength=256) for i in range(count))
        assert (*pixels[:11], pixels[255]) == CAMVID[split]


def test_camvid_as_segnet_has_it_makes_11_void(tmp_path):
    label = np.array([[0, 10, 11]], np.uint8)
    _save(tmp_path / "camvid/CamVid/test/a.png", np.zeros((1, 3, 3), np.uint8))
    _save(tmp_path / "camvid/CamVid/testannot/a.png", label)
    source = catalog.open_split("camvid", "test", str(tmp_path))
    assert source[0]["label"].tolist() == [[0, 10, 255]] and len(source.classes) == 11
    with pytest.raises(InputError, match=r"no images in .*train(?s:.*)\{train,val,test\}annot"):
        catalog.open_split("camvid", "train", str(tmp_path))


@pytest.mark.parametrize("form", ["splits", "original"])
def test_the_32_colours_of_camvid(tmp_path, form):
    colours = np.array([[(64, 128, 64), (0, 0, 0), (64, 192, 0)]], np.uint8)
    names = ("train", "train_labels")
    if form == "original":
        names = ("701_StillsRaw_full", "LabeledApproved_full")
        (tmp_path / "train.txt").write_text("a.png\n")
    _save(tmp_path / names[0] / "a.png", np.zeros((1, 3, 3), np.uint8))
    _save(tmp_path / names[1] / "a_L.png", colours)
    source = catalog.open_split(f"camvid32:{tmp_path}", "train")
    names_of = (*source.classes.names, *["void"] * 225)
    assert [names_of[i] for i in source[0]["label"][0]] == ["Animal", "void", "Wall"]
    assert len(source.classes) == 31
    colours[0, 1] = (0, 0, 1)
    _save(tmp_path / names[1] / "a_L.png", colours)
    with pytest.raises(InputError, match=r"a_L\.png holds colours \(0, 0, 1\)"):
        source[0]


def test_isbi2012_is_a_volume_of_slices(tmp_path):
    slices = [Image.fromarray(np.full((4, 5), k, np.uint8)) for k in range(30)]
    truth = [Image.fromarray(np.array([[0, 255]] * 4, np.uint8).repeat(5, 1)[:, :5])] * 30
    for name, pages in (("train-volume", slices), ("train-labels", truth)):
        pages[0].save(tmp_path / f"{name}.tif", save_all=True, append_images=pages[1:])
    place = f"isbi2012:{tmp_path}"
    train, val = (catalog.open_split(place, split, channels=1) for split in ("train", "val"))
    assert (len(train), len(val)) == (24, 6)
    assert (val[0]["image"] == 24).all() and val[0]["name"] == "train-volume_024"
    assert set(np.unique(val[0]["label"])) == {0} and val.size(0) == (4, 5)
    white = [Image.fromarray(np.full((4, 5), 255, np.uint8))] * 30
    white[0].save(tmp_path / "train-labels.tif", save_all=True, append_images=white[1:])
    assert (val[0]["label"] == 1).all()


def test_isbi2012_has_24_and_6_slices(data_root):
    if not (data_root / "isbi2012").is_dir():
        pytest.skip("needs isbi2012")
    stats = json.loads((data_root / "isbi2012/stats.json").read_text())
    for split, count in (("train", 24), ("val", 6)):
        source = catalog.open_split("isbi2012", split, str(data_root), channels=1)
        assert len(source) == count
        assert {source.size(i) for i in range(count)} == {(512, 512)}
        pixels = sum(np.bincount(source.label(i).ravel(), minlength=2) for i in range(count))
        assert pixels.tolist() == list(stats[split]["class_pixels"].values())
    example = source[0]
    assert example["image"].shape == (512, 512, 1) and example["image"].std() > 10


def test_nuclei_have_a_file_each(tmp_path):
    for k in range(5):
        folder = tmp_path / f"nuclei/stage1_train/{k}"
        _save(folder / f"images/{k}.png", np.zeros((3, 4, 4), np.uint8))
        for n in range(2):
            mask = np.zeros((3, 4), np.uint8)
            mask[n, : 2 + n] = 255
            _save(folder / f"masks/{n}.png", mask)
    source = catalog.open_split("nuclei", "val", str(tmp_path), instances=True)
    assert len(source) == 1 and source[0]["name"] == "4"
    assert source[0]["label"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert source[0]["instances"]["masks"].sum(axis=(1, 2)).tolist() == [2, 3]
    assert source.size(0) == (3, 4)


def test_an_image_without_nuclei_has_an_empty_folder(tmp_path):
    for k in range(6):
        folder = tmp_path / f"nuclei/stage1_train/{k}"
        _save(folder / f"images/{k}.png", np.zeros((3, 4, 4), np.uint8))
        _save(folder / "masks/0.png", np.full((3, 4), 255, np.uint8))
    masks = tmp_path / "nuclei/stage1_train/0/masks"
    (masks / "0.png").rename(masks / ".hidden")
    source = catalog.open_split("nuclei", "train", str(tmp_path), instances=True)
    assert source[0]["label"].shape == (3, 4) and not source[0]["label"].any()
    assert source[0]["instances"]["masks"].shape == (0, 3, 4)
    assert source[1]["label"].all() and len(source[1]["instances"]["masks"]) == 1
    (masks / "0.svg").write_text("")
    with pytest.raises(InputError, match="0/masks needs masks, all of one size, or nothing at all"):
        source[0]
    for path in (*masks.iterdir(), masks):
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match="1 of 5 images have no mask"):
        catalog.open_split("nuclei", "train", str(tmp_path))


def test_the_nuclei_are_counted(data_root):
    if not (data_root / "nuclei").is_dir():
        pytest.skip("needs nuclei")
    stats = json.loads((data_root / "nuclei/stats.json").read_text())["val"]
    source = catalog.open_split("nuclei", "val", str(data_root), instances=True)
    assert len(source) == stats["images"] == 59
    counts, covered = [], 0
    for i in range(len(source)):
        objects = source.read_instances(source.labels[i])
        counts.append(len(objects["classes"]))
        covered += int(objects["masks"].sum())
        if i < 3:
            np.testing.assert_array_equal(objects["masks"].sum(axis=0), source.label(i))
    assert (sum(counts), max(counts)) == (stats["instances"], stats["max_instances"])
    assert covered / stats["pixels"] == pytest.approx(stats["foreground_fraction"])


def test_pets_ignore_the_border(tmp_path):
    names = [f"Abyssinian_{k}" for k in range(10)]
    for name in names:
        _save(tmp_path / f"pets/images/{name}.jpg", np.zeros((1, 3, 3), np.uint8))
        _save(tmp_path / f"pets/annotations/trimaps/{name}.png", np.array([[1, 2, 3]], np.uint8))
    lists = tmp_path / "pets/annotations"
    (lists / "trainval.txt").write_text("".join(f"{name} 1 1 1\n" for name in names[:9]))
    (lists / "test.txt").write_text(f"{names[9]} 1 1 1\n")
    sizes = {
        s: len(catalog.open_split("pets", s, str(tmp_path)))
        for s in catalog.splits("pets", str(tmp_path))
    }
    assert sizes == {"train": 8, "val": 1, "test": 1}
    source = catalog.open_split("pets", "val", str(tmp_path))
    assert source[0]["label"].tolist() == [[1, 0, 255]] and source[0]["name"] == names[4]
    assert source.classes.names == ("background", "pet")


@pytest.mark.parametrize(
    ("name", "tree"),
    [
        ("ade20k", "annotations/{training,validation}"),
        ("sunrgbd", "semseg-label37"),
        ("isbi2012", "train-labels.tif"),
        ("nuclei", "stage1_train/ID/masks"),
        ("pets", "trimaps"),
        ("camvid32", "701_StillsRaw_full"),
        ("kitti", "training/semantic"),
    ],
)
def test_a_missing_tree_is_shown(tmp_path, name, tree):
    (tmp_path / name).mkdir()
    with pytest.raises(InputError) as error:
        catalog.open_split(name, "train", str(tmp_path))
    assert tree in str(error.value)
