"""Archives: what is in them arrives, what would escape or burst does not, and nothing is left."""

import io
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from jaxseg.data import archives, catalog
from jaxseg.data.colours import save_label
from jaxseg.errors import InputError

MODES = {".tar": "w", ".tar.gz": "w:gz", ".tgz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}


def _packed(folder: Path, archive: Path, inside: str = "") -> Path:
    """All files of a folder in an archive, below `inside`."""
    suffix = next((s for s in MODES if archive.name.endswith(s)), ".zip")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [str(Path(inside) / path.relative_to(folder)) for path in files]
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as zipped:
            for path, name in zip(files, names, strict=True):
                zipped.write(path, name)
    else:
        with tarfile.open(archive, MODES[suffix]) as tar:
            for path, name in zip(files, names, strict=True):
                tar.add(path, name)
    return archive


@pytest.mark.parametrize("inside", ["", "mine"])
@pytest.mark.parametrize("suffix", [*MODES, ".zip"])
def test_a_data_set_may_be_an_archive(tmp_path, write_folder, suffix, inside):
    folder = write_folder(tmp_path / "plain", size=(8, 9), train=2, val=1)
    archive = _packed(folder, tmp_path / f"set{suffix}", inside)
    ours, theirs = (catalog.open_split(str(place), "train") for place in (archive, folder))
    assert len(ours) == 2 and ours.classes == theirs.classes
    for i in range(2):
        np.testing.assert_array_equal(ours[i]["image"], theirs[i]["image"])
        np.testing.assert_array_equal(ours[i]["label"], theirs[i]["label"])
    assert {p.name for p in tmp_path.iterdir()} == {"plain", archive.name, "set"}


def test_it_is_unpacked_once(tmp_path, write_folder):
    folder = write_folder(tmp_path / "plain", size=(8, 9), train=1, val=1)
    archive = _packed(folder, tmp_path / "set.tar.gz")
    catalog.open_split(str(archive), "train")
    before = (tmp_path / "set/classes.json").stat().st_mtime_ns
    archive.touch()
    assert len(catalog.open_split(str(archive), "val")) == 1
    assert (tmp_path / "set/classes.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("suffix", [".tar.gz", ".zip", ".tar"])
def test_a_folder_that_is_not_the_archives_is_not_taken_for_it(tmp_path, write_folder, suffix):
    """Masks that were exported anew, and a folder that has nothing to do with the archive."""
    folder = write_folder(tmp_path / "plain", size=(8, 9), train=1, val=1)
    archive = _packed(folder, tmp_path / f"set{suffix}")
    catalog.open_split(str(archive), "train")
    label = catalog.read_classes(folder / "classes.json")
    save_label(folder / "train/masks/00.png", np.ones((8, 9), np.uint8), label)
    _packed(folder, archive)
    with pytest.raises(InputError, match=r"set is not what set\..* holds now: remove that folder"):
        catalog.open_split(str(archive), "train")
    shutil.rmtree(tmp_path / "set")
    assert (catalog.open_split(str(archive), "train")[0]["label"] == 1).all()
    shutil.rmtree(tmp_path / "set")
    shutil.copytree(folder, tmp_path / "set")
    with pytest.raises(InputError, match="or name the folder instead of the archive"):
        catalog.open_split(str(archive), "train")


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    member.size = 4 if kind == tarfile.REGTYPE else 0
    return member


EVIL = {
    "above": _member("../escaped"),
    "above, deep": _member("a/b/../../../escaped"),
    "absolute": _member("/escaped"),
    "windows": _member("..\\escaped"),
    "drive": _member("C:\\escaped"),
    "symlink": _member("link", tarfile.SYMTYPE, "../escaped"),
    "symlink inside": _member("link", tarfile.SYMTYPE, "good"),
    "hard link": _member("link", tarfile.LNKTYPE, "../escaped"),
    "device": _member("device", tarfile.CHRTYPE),
    "pipe": _member("pipe", tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("name", EVIL)
def test_a_tar_never_escapes(tmp_path, name):
    archive, member = tmp_path / "in/evil.tar.gz", EVIL[name]
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(_member("good"), io.BytesIO(b"good"))
        tar.addfile(member, io.BytesIO(b"evil"))
    with pytest.raises(InputError, match="evil.tar.gz holds .*: not unpacked") as error:
        archives.unpack(archive, tmp_path / "in/evil")
    assert repr(member.name) in str(error.value)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [archive]
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["evil.tar.gz"]


@pytest.mark.parametrize("name", ["../escaped", "a/../../escaped", "/escaped", "..\\escaped"])
def test_a_zip_never_escapes(tmp_path, name):
    archive = tmp_path / "in/evil.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("good", "good")
        zipped.writestr(zipfile.ZipInfo(name), "evil")
    with pytest.raises(InputError, match="outside of its folder: not unpacked"):
        archives.unpack(archive, tmp_path / "in/evil")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [archive]


def test_a_link_in_a_zip_is_refused(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as zipped:
        zipped.writestr(link, "../escaped")
    with pytest.raises(InputError, match="'link', which is a link"):
        archives.unpack(tmp_path / "evil.zip", tmp_path / "evil")


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_a_bomb_does_not_go_off(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(archives, "SMALL", 100_000)
    (tmp_path / "big").mkdir()
    (tmp_path / "big/zeros").write_bytes(bytes(20_000_000))
    archive = tmp_path / f"bomb{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
            zipped.write(tmp_path / "big/zeros", "zeros")
    else:
        _packed(tmp_path / "big", archive)
    with pytest.raises(InputError, match="taken for a decompression bomb"):
        archives.unpack(archive, tmp_path / "bomb")
    assert not (tmp_path / "bomb").exists() and len(list(tmp_path.iterdir())) == 2


def test_what_does_not_fit_on_the_disk_is_not_begun(tmp_path, monkeypatch):
    (tmp_path / "big").mkdir()
    (tmp_path / "big/zeros").write_bytes(bytes(20_000))
    archive = _packed(tmp_path / "big", tmp_path / "set.tar")
    usage = archives.shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="needs more than"):
        archives.unpack(archive, tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz", ".tar.xz", ".tar"])
def test_a_broken_archive_is_named_and_leaves_nothing(tmp_path, write_folder, suffix):
    folder = write_folder(tmp_path / "plain", size=(8, 9), train=2, val=1)
    archive = _packed(folder, tmp_path / f"set{suffix}")
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(InputError, match=f"cannot unpack .*set{suffix}"):
        catalog.open_split(str(archive), "train")
    assert {p.name for p in tmp_path.iterdir()} == {"plain", archive.name}
