"""Hostile files: refused, read within bounds, and nothing in them ever run.

Each of the programs here, were it run, would make the file "marker".
"""

import contextlib
import copy
import io
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
from weight_files import (
    ARRAY,
    FLAT,
    NUMBERS,
    Call,
    Name,
    dump,
    put,
    save,
    save_members,
    save_stream,
    tensor,
)

from jaxseg.errors import InputError
from jaxseg.weights.files import read


class System:
    def __reduce__(self):
        return os.system, ("touch marker",)


class Evaluated:
    def __reduce__(self):
        return eval, ("open('marker', 'w').close()",)


class Fetched:
    def __reduce__(self):
        return getattr, (Evaluated(), "anything")


def _name(text: str, *args: Any) -> bytes:
    return dump({"state_dict": {**FLAT, "meta": Call(Name(text), args)}})


OPEN = "open('marker', 'w').close()"
PROGRAMS = {
    "reduce": (pickle.dumps(System(), 2), "posix.system"),
    "reduce_4": (pickle.dumps(System(), 4), "posix.system"),
    "eval": (pickle.dumps(Evaluated(), 2), "__builtin__.eval"),
    "getattr": (pickle.dumps(Fetched(), 3), "builtins.getattr"),
    "nested": (pickle.dumps({"meta": [{"a": (1, System())}]}, 2), "posix.system"),
    "instance": (b"(S'touch marker'\nios\nsystem\n.", "INST"),
    "object": (b"(cos\nsystem\nX\x0c\0\0\0touch markero.", "os.system"),
    "in_a_tensor": (_name("os system", "touch marker"), "os.system"),
    "exec": (_name("__builtin__ exec", OPEN), "__builtin__.exec"),
    "numpy": (_name("numpy.testing._private.utils runstring", OPEN, {}), "runstring"),
}


@pytest.mark.parametrize("form", ["zip", "stream", "plain"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_nothing_in_a_pickle_is_run(tmp_path, monkeypatch, program, form):
    monkeypatch.chdir(tmp_path)
    pickled, named = PROGRAMS[program]
    path = tmp_path / "w.pth"
    if form == "zip":
        save(path, pickled, {"0": NUMBERS.tobytes()})
    else:
        magic = dump(0x1950A86A20F9469CFC6C) + dump(1001) + dump({})
        path.write_bytes((magic if form == "stream" else b"") + pickled + dump([]))
    match = (
        "is a pickle|looks like" if not pickled.startswith(b"\x80") and form == "plain" else named
    )
    with pytest.raises(InputError, match=match):
        read(path)
    assert not Path("marker").exists()


@pytest.mark.parametrize("program", [p for p in PROGRAMS if p != "numpy"])
def test_these_programs_would_run(tmp_path, monkeypatch, program):
    """What the test above proves: the usual reader obeys them."""

    class Obedient(pickle.Unpickler):
        def persistent_load(self, _):
            return None

        def find_class(self, module, name):
            torch = module.startswith("torch")
            return (lambda *_: None) if torch else super().find_class(module, name)

    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(TypeError, AttributeError):
        Obedient(io.BytesIO(PROGRAMS[program][0])).load()
    assert Path("marker").exists()


def _doubled(depth: int) -> bytes:
    """A tuple of itself, doubled: a few bytes that would print as 2^depth."""
    return b")" + b"q\x01h\x01\x86" * depth


OUTSIDE = {
    "huge": dict(shape=(2**40,), strides=(1,)),
    "expanded": dict(shape=(2**40,), strides=(0,)),
    "too_many": dict(shape=(2**62, 2**62), strides=(0, 0)),
    "stride": dict(shape=(4, 6), strides=(7, 1)),
    "one_too_far": dict(shape=(4, 6), strides=(6, 1), offset=1),
    "huge_stride": dict(shape=(2, 2), strides=(2**61, 1)),
    "offset": dict(shape=(1,), strides=(1,), offset=24),
}
NO_TENSORS = {
    "beyond_numpy": dict(shape=(0, 2**70), strides=(1, 1)),
    "many_axes": dict(shape=(1,) * 100, strides=(1,) * 100),
    "huge_offset": dict(shape=(1,), strides=(1,), offset=2**64),
    "negative_offset": dict(shape=(4,), strides=(1,), offset=-1),
    "negative_stride": dict(shape=(4,), strides=(-1,), offset=8),
    "negative_size": dict(shape=(-1, -1), strides=(1, 1)),
    "fewer_strides": dict(shape=(4, 6), strides=(1,)),
    "text": dict(shape=("a", 2**40), strides=(1, 1)),
    "text_stride": dict(shape=(2**40,), strides=("a",)),
    "float": dict(shape=(4.0,), strides=(1,)),
    "no_shape": dict(shape=None, strides=()),
    "no_strides": dict(shape=(1,), strides={}),
}
NO_STORAGES = {
    "fewer": dict(count=23),
    "more": dict(count=25),
    "huge": dict(count=2**62),
    "negative": dict(count=-1),
}
HOSTILE_TENSORS = [
    *((OUTSIDE[kind], "does not fit its storage of 24") for kind in OUTSIDE),
    *((NO_TENSORS[kind], "a shape, strides or an offset that are none") for kind in NO_TENSORS),
    *(({"shape": (1,), **NO_STORAGES[kind]}, "storage") for kind in NO_STORAGES),
]


@pytest.mark.parametrize("form", ["zip", "stream"])
@pytest.mark.parametrize(
    ("args", "words"), HOSTILE_TENSORS, ids=[*OUTSIDE, *NO_TENSORS, *NO_STORAGES]
)
def test_no_tensor_reaches_outside_its_storage(tmp_path, args, words, form):
    tree = {"w": tensor("0", **{"count": 24} | args, legacy=form == "stream")}
    if form == "zip":
        path = save(tmp_path / "w.pth", dump(tree), {"0": NUMBERS.tobytes()})
    else:
        path = save_stream(tmp_path / "w.pth", tree, {"0": NUMBERS})
    with pytest.raises(InputError, match=words):
        read(path)


REBUILD, THIRD = (b"ctorch._utils\n_rebuild_tensor_%s\n" % version for version in (b"v2", b"v3"))
PICKLES = {
    "empty": b"",
    "no_end": b"\x80\x02}",
    "nothing": b"\x80\x02.",
    "underflow": b"\x80\x02uuu.",
    "memo": b"\x80\x02h\x07.",
    "large_memo": b"\x80\x02}r\xff\xff\xff\xff.",
    "bytes": b"\x80\x05\x8e" + b"\xff" * 7 + b"\x7f.",
    "odd": b"\x80\x02}(X\x01\0\0\0au.",
    "extension": b"\x80\x02\x82\x01.",
    "itself": b"\x80\x02}q\x01(X\x05\0\0\0modelh\x01u.",
    "deep": b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    "key": b"\x80\x02}" + _doubled(60) + b"Ns.",
    "storage": b"\x80\x02" + _doubled(60) + b"Q.",
    "called": b"\x80\x02" + _doubled(60) + b")R.",
    "shape": b"\x80\x02}X\x01\0\0\0w" + REBUILD + b"(" + put(FLAT["b.bias"].args[0]) + b"K\x00"
    + _doubled(60) + b")tRs.",
    "no_storage": b"\x80\x02}X\x01\0\0\0w" + REBUILD + b"(" + _doubled(60) + b"K\x00))tRs.",
    "no_storage_3": b"\x80\x02}X\x01\0\0\0w" + THIRD + b"(" + _doubled(60)
    + b"K\x00))NNctorch\nuint8\nNtRs.",
    "pairs": dump(Call(Name("collections OrderedDict"), ([[1, 2, 3]],))),
    "list": dump([1]),
    "number": dump(1),
    "one_tensor": dump(tensor("0", 24, (24,))),
    "no_tensor": dump({"net": FLAT, "epoch": 1}),
    "numpy_array": dump({**FLAT, "c": ARRAY}),
    "two_kinds": dump({**FLAT, "c": tensor("0", 24, (1,), kind="IntStorage")}),
    "no_such_storage": dump({"c": tensor("../0", 24, (1,))}),
    "whole_model": dump({"model": Call(Name("__main__ Net"), ())}),
}  # fmt: skip


@pytest.mark.parametrize("form", ["zip", "stream"])
@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_that_is_no_state_dict(tmp_path, kind, form):
    path = tmp_path / "w.pth"
    if form == "zip":
        save(path, PICKLES[kind], {"0": NUMBERS.tobytes()})
    else:
        magic = dump(0x1950A86A20F9469CFC6C) + dump(1001) + dump({})
        path.write_bytes(magic + PICKLES[kind] + dump([]))
    with pytest.raises(InputError, match=r"w\.pth.*\.$"):
        read(path)


GOOD = [("archive/data.pkl", dump(FLAT)), ("archive/data/0", NUMBERS.tobytes())]
ARCHIVES = {
    "parent": ([*GOOD, ("archive/../../evil.pth", b"x")], "outside"),
    "root": ([*GOOD, ("/etc/passwd", b"x")], "outside"),
    "backslash": ([*GOOD, ("archive\\..\\evil", b"x")], "outside"),
    "twice": ([*GOOD, GOOD[0]], "twice"),
    "two": ([*GOOD, ("other/data.pkl", dump(FLAT))], "2 data.pkl"),
    "larger": ([GOOD[0], ("archive/data/0", bytes(97))], "97 bytes: needs 96"),
    "smaller": ([GOOD[0], ("archive/data/0", bytes(95))], "95 bytes: needs 96"),
    "missing": ([GOOD[0]], "needs 96"),
    "byteorder": ([*GOOD, ("archive/byteorder", b"middle")], "middle"),
    "script": ([*GOOD, ("archive/constants.pkl", b"x")], "TorchScript"),
    "other": ([("word/document.xml", b"<w>")], "0 data.pkl"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_zip_archive_that_torch_did_not_write(tmp_path, kind):
    members, word = ARCHIVES[kind]
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    with pytest.raises(InputError, match=word):
        read(save_members(folder / "w.pth", members))
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [folder / "w.pth"]


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    size = 2**24
    tree = {"w": tensor("0", size, (size,), kind="ByteStorage")}
    members = [("a/data.pkl", dump(tree)), ("a/data/0", bytes(size))]
    path = save_members(tmp_path / "w.pth", members, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    tracemalloc.start()
    with pytest.raises(InputError, match="compressed"):
        read(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_members_do_not_overlap(tmp_path):
    """A thousand storages of the same bytes, which a directory of a zip archive can say."""
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", dump({"w": tensor("0", 2**14, (2**14,))}))
        archive.writestr("a/data/0", bytes(2**16))
        for i in range(1, 1000):
            twin = copy.copy(archive.filelist[1])
            twin.filename = f"a/data/{i}"
            archive.filelist.append(twin)
    with pytest.raises(InputError, match="overlap"):
        read(path)


def test_a_message_obeys_no_terminal(tmp_path):
    path = save(tmp_path / "w.pth", dump({"\x1b[2J\nall is well": 1}))
    with pytest.raises(InputError, match=r"\?\[2J\?all is well") as caught:
        read(path)
    assert str(caught.value).isprintable()


def test_a_stream_with_other_keys_views_or_an_early_end(tmp_path):
    good = {"w": tensor("0", 24, (1,), legacy=True)}
    content = save_stream(tmp_path / "w.pth", good, {"0": NUMBERS}).read_bytes()
    key, view = put("0"), put(24) + b"Nt"  # the last key in the file; the end of a persistent id
    at = content.rindex(key)
    for changed in (
        content[:at] + _doubled(60) + content[at + len(key) :],
        content[:at] + put("1") + content[at + len(key) :],
        content.replace(view, put(24) + put(("1", 0, 24)) + b"t"),
        content[:-4],
    ):
        assert changed != content
        (tmp_path / "w.pth").write_bytes(changed)
        with pytest.raises(InputError, match=r"w\.pth"):
            read(tmp_path / "w.pth")
