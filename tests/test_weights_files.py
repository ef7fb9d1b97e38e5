"""Weight files: every number right, and every damaged or other file refused by one InputError."""

import json
import pickle
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from weight_files import (
    NUMBERS,
    SMALL,
    TYPES,
    as_numpy,
    assert_same,
    dump,
    entry,
    layouts,
    save,
    save_members,
    save_safetensors,
    save_stream,
    tensor,
    values_of,
)

from jaxseg.errors import InputError
from jaxseg.weights.files import read

PLAIN = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "C64": "complex64", "BOOL": "bool"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
}


@pytest.mark.parametrize("code", PLAIN)
def test_safetensors_of_every_type(tmp_path, code):
    values, tail = values_of(PLAIN[code]), np.float32(4.5)
    raw = values.tobytes()
    header = {
        "__metadata__": {"format": "pt"},
        "scalar": entry("F32", [], len(raw), len(raw) + 4),
        "w": entry(code, [2, 3], 0, len(raw)),
        "none": entry(code, [0, 3], len(raw), len(raw)),
    }
    path = save_safetensors(tmp_path / "w.safetensors", header, raw + tail.tobytes())
    none = np.zeros((0, 3), values.dtype)
    assert_same(read(path), {"scalar": np.asarray(tail), "w": values, "none": none})


@pytest.mark.parametrize("code", SMALL)
def test_small_floats_become_float32(tmp_path, code):
    kind = np.dtype(getattr(ml_dtypes, SMALL[code]))
    codes = np.arange(256**kind.itemsize, dtype=f"u{kind.itemsize}")  # all there are
    header = {"w": entry(code, [codes.size], 0, codes.nbytes)}
    path = save_safetensors(tmp_path / "w.safetensors", header, codes.tobytes())
    assert_same(read(path), {"w": codes.view(kind).astype(np.float32)})


def test_npz(tmp_path):
    arrays = {"conv/kernel": NUMBERS.reshape(4, 6), "half": NUMBERS.astype(np.float16), "n": 3}
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez_compressed(tmp_path / "b.npz", **arrays)
    arrays["n"] = np.asarray(3)
    for name in ("a.npz", "b.npz"):
        assert_same(read(str(tmp_path / name)), arrays)


@pytest.mark.parametrize("dtype", TYPES)
def test_safetensors_own_files(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {n: v.clone().contiguous() for n, v in sorted(layouts(torch, dtype).items())}
    safetensors.save_file(tensors, tmp_path / "w.safetensors", {"format": "pt"})
    weights = read(tmp_path / "w.safetensors")
    for name, value in tensors.items():
        np.testing.assert_array_equal(weights[name], as_numpy(value), strict=True)
    assert weights.keys() == tensors.keys()


def _header(**changes) -> dict:
    return {"w": entry("F32", [2, 3], 0, 24) | changes, "v": entry("F32", [2], 24, 32)}


MISPLACED = {
    "overlap": _header(data_offsets=[0, 28]),
    "gap": _header(shape=[1], data_offsets=[0, 4]),
    "beyond": _header(data_offsets=[8, 64]),
    "negative": _header(data_offsets=[-24, 0]),
    "backwards": _header(data_offsets=[24, 0]),
    "larger_shape": _header(shape=[2, 4]),
    "smaller_shape": _header(shape=[2, 2]),
    "negative_shape": _header(shape=[-2, -3]),
    "text_shape": _header(shape=["a", 2**40]),
    "float_shape": _header(shape=[2.0, 3.0]),
    "huge_shape": _header(shape=[2**40, 2**40]),
    "many_axes": _header(shape=[1] * 99 + [6]),
}
TWICE = '{"w": %s, "w": %s}' % ((json.dumps(entry("U8", [32], 0, 32)),) * 2)
HEADERS = {
    "empty": ({}, "names 0 arrays"),
    "only_metadata": ({"__metadata__": {}}, "names 0 arrays"),
    "empty_huge": ({"w": entry("U8", [0, 2**62, 4], 0, 0)}, "damaged"),
    "dtype": (_header(dtype="F4"), 'unknown dtype of w "F4".*F32'),
    "no_dtype": (_header(dtype=None), "damaged"),
    "list": ("{" + "[1, 2]", "damaged"),
    "short": ('{"w": ', "damaged"),
    "twice": (TWICE, "twice"),
    "deep": ('{"w": ' + "[" * 10**5, "damaged"),
    "digits": ('{"w": ' + "9" * 10**5 + "}", "damaged"),
    "utf8": (b'{"w": "\xff"}', "damaged"),
} | {
    kind: (header, "[vw] (of shape .* is said to lie at|has the shape)")
    for kind, header in MISPLACED.items()
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_damaged_header(tmp_path, kind):
    header, words = HEADERS[kind]
    path = save_safetensors(tmp_path / "w.safetensors", header, bytes(32))
    with pytest.raises(InputError, match=words):
        read(path)


def test_the_header_of_these_tests_is_good(tmp_path):
    path = save_safetensors(tmp_path / "w.safetensors", _header(), NUMBERS[:8].tobytes())
    assert_same(read(path), {"w": NUMBERS[:6].reshape(2, 3), "v": NUMBERS[6:8]})
    for change in (-1, 1):
        content = path.read_bytes()
        damaged = content[:change] if change < 0 else content + b"\0"
        (tmp_path / "x.safetensors").write_bytes(damaged)
        with pytest.raises(InputError, match="32"):
            read(tmp_path / "x.safetensors")


def _samples(folder: Path) -> dict[str, Path]:
    np.savez(folder / "w.npz", w=NUMBERS)
    header = {"w": entry("F32", [24], 0, 96)}
    legacy = {"w": tensor("0", 24, (24,), legacy=True)}
    return {
        "npz": folder / "w.npz",
        "safetensors": save_safetensors(folder / "w.safetensors", header, NUMBERS.tobytes()),
        "zip": save(
            folder / "w.pth", dump({"w": tensor("0", 24, (24,))}), {"0": NUMBERS.tobytes()}
        ),
        "stream": save_stream(folder / "w.pt", legacy, {"0": NUMBERS}),
    }


@pytest.mark.parametrize("form", ["npz", "safetensors", "zip", "stream"])
def test_a_file_that_is_cut_off_anywhere(tmp_path, form):
    path = _samples(tmp_path)[form]
    content = path.read_bytes()
    assert_same(read(path), {"w": NUMBERS}) if form != "npz" else None
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(InputError):
            read(path)


@pytest.mark.parametrize("form", ["npz", "safetensors", "zip", "stream"])
def test_a_file_with_changed_bytes(tmp_path, form):
    """Either other numbers or one InputError."""
    path, rng = _samples(tmp_path)[form], np.random.default_rng(0)
    content = np.frombuffer(path.read_bytes(), np.uint8)
    refused = 0
    for _ in range(200):
        changed = content.copy()
        changed[rng.integers(0, len(changed), rng.integers(1, 4))] = rng.integers(0, 256)
        path.write_bytes(changed.tobytes())
        try:
            assert all(isinstance(a, np.ndarray) for a in read(path).values())
        except InputError:
            refused += 1
    assert refused > 50


PAGE = b"\n<!DOCTYPE html>\n<html>Sign in</html>"
OTHERS = {
    "page.pth": (PAGE, "web page"),
    "page.safetensors": (PAGE, "web page"),
    "page.npz": (PAGE, "web page"),
    "keras.bin": (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
    "lfs.safetensors": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "model.ckpt": (bytes(99) + bytes.fromhex("57fb808b247547db"), "TensorFlow"),
    "tar.pth": (b"pickle.tar" + bytes(999), "something else"),
    "mine.pth": (struct.pack("<Q", 2) + b"{}", "rename it to .safetensors"),
    "mine.safetensors": (b"PK\x03\x04" + bytes(99), "zip archive"),
    "list.pth": (pickle.dumps([1, 2], 2), "did not write"),
    "none.pt": (b"", "empty"),
    "none.safetensors": (b"", "empty"),
    "none.npz": (b"", "empty"),
    "noise.safetensors": (b"\xff" * 8 + b"{" + bytes(99), "cut off"),
    "model.h5": (b"\x89HDF", r'"\.h5".*\.safetensors, \.npz, \.pth'),
    "model.ckpt-9.index": (b"", r'"\.index"'),
    "weights": (b"PK", '""'),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_weight_file(tmp_path, name):
    content, words = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and str(caught.value).endswith(".")


def test_what_is_no_file(tmp_path):
    (tmp_path / "model.ckpt.index").touch()
    (tmp_path / "folder.pth").mkdir()
    for name, words in {
        "absent.pth": "no such file",
        "folder.pth": "folder",
        "model.ckpt": "TensorFlow",
    }.items():
        with pytest.raises(InputError, match=words):
            read(tmp_path / name)


def test_npz_with_anything_but_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, array, words in (
        ("object", np.array([print], object), "no plain numbers"),
        ("text", np.array(["a"]), "needs numbers"),
        ("void", np.zeros(2, "V2"), "needs numbers"),
    ):
        np.savez(tmp_path / "w.npz", **{name: array})
        with pytest.raises(InputError, match=f"{name}.*{words}"):
            read(tmp_path / "w.npz")
    with pytest.raises(InputError, match="no array"):
        read(save_members(tmp_path / "w.npz", [("a.txt", b"text")]))
    assert not Path("marker").exists()
