"""Weight files written byte by byte: what torch.save and safetensors write, without either."""

import json
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Name(NamedTuple):
    """GLOBAL: "torch._utils _rebuild_tensor_v2"."""

    text: str


class Call(NamedTuple):
    maker: Name
    args: Any


class Stored(NamedTuple):
    """A persistent id."""

    args: tuple


def put(value: Any) -> bytes:
    """The opcodes of protocol 2 that build `value`."""
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            size = (value.bit_length() + 8) // 8
            return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case Name():
            return b"c" + value.text.replace(" ", "\n").encode() + b"\n"
        case Call():
            return put(value.maker) + put(value.args) + b"R"
        case Stored():
            return put(value.args) + b"Q"
        case tuple():
            return b"(" + b"".join(map(put, value)) + b"t"
        case list():
            return b"](" + b"".join(map(put, value)) + b"e"
        case dict():
            return b"}(" + b"".join(put(x) for pair in value.items() for x in pair) + b"u"
    raise TypeError(value)


def dump(value: Any) -> bytes:
    return b"\x80\x02" + put(value) + b"."


def ordered(**items) -> Call:
    return Call(Name("collections OrderedDict"), ([[k, v] for k, v in items.items()],))


def tensor(key, count, shape, strides=None, offset=0, kind="FloatStorage", legacy=False) -> Call:
    """A tensor on the storage `key` of `count` elements; without strides, a contiguous one."""
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    place = ("storage", Name(f"torch {kind}"), key, "cpu", count) + (None,) * legacy
    rest = (offset, shape, strides, False, Call(Name("collections OrderedDict"), ()))
    return Call(Name("torch._utils _rebuild_tensor_v2"), (Stored(place), *rest))


def save(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, **extra) -> Path:
    """A zip archive as torch 2 writes it; extra: other members."""
    members = {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}
    members |= {f"data/{key}": raw for key, raw in (storages or {}).items()} | extra
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in members.items():
            archive.writestr(f"archive/{name}", raw)
    return path


def save_stream(path: Path, tree: Any, storages: dict[str, np.ndarray]) -> Path:
    """As torch before 1.6."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    parts = [dump(x) for x in (0x1950A86A20F9469CFC6C, 1001, system, tree, list(storages))]
    for values in storages.values():
        parts.append(struct.pack("<q", values.size) + values.tobytes())
    path.write_bytes(b"".join(parts))
    return path


def save_safetensors(path: Path, header: dict | str | bytes, data: bytes = b"") -> Path:
    text = json.dumps(header) if isinstance(header, dict) else header
    text = text.encode() if isinstance(text, str) else text
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


NUMBERS = np.random.default_rng(0).normal(size=24).astype(np.float32)


def save_members(
    path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED
) -> Path:
    with warnings.catch_warnings(action="ignore"):  # of a name that comes twice
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, raw in members:
                archive.writestr(name, raw)
    return path


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert list(ours) == list(theirs)
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype and ours[name].shape == array.shape, name
        np.testing.assert_array_equal(ours[name], array)
        assert not ours[name].flags.writeable


FLAT = {"a.weight": tensor("0", 24, (4, 6)), "b.bias": tensor("0", 24, (6,), offset=6)}
EXPECTED = {"a.weight": NUMBERS.reshape(4, 6), "b.bias": NUMBERS[6:12]}
ARRAY = Call(  # a numpy array
    Name("numpy.core.multiarray _reconstruct"),
    (Name("numpy ndarray"), (0,), Call(Name("_codecs encode"), ("b", "latin1"))),
)
SMALL = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


def values_of(dtype: str) -> np.ndarray:
    """2x3 numbers with both signs and, for integers, the largest and the smallest."""
    kind = np.dtype(dtype).kind
    if kind in "iu":
        ends = np.iinfo(dtype)
        return np.array([[ends.min, ends.max, 0], [1, 2, ends.max - 7]], dtype)
    values = np.array([[0.0, -1.5, 2.25], [3.0, 1e-3, -7.0]])
    return (values * (1 + 2j)).astype(dtype) if kind == "c" else values.astype(dtype)


TYPES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
)


def as_numpy(value) -> np.ndarray:
    """A tensor of torch as we read it."""
    small = str(value.dtype).removeprefix("torch.") in SMALL.values()
    return (value.float() if small else value).detach().numpy()


def layouts(torch, dtype: str) -> dict:
    """Tensors of torch: views of one storage, plain and not."""
    values = torch.arange(48).reshape(4, 12) % 2 if dtype == "bool" else torch.arange(48) - 20
    base = values.reshape(4, 12).to(getattr(torch, dtype))
    return {
        "whole": base,
        "shared": base,
        "row": base[2],
        "transposed": base.t(),
        "every_second": base[:, ::2],
        "inner": base[1:3, 3:7],
        "scalar": base[3, 5],
        "empty": base[:0],
        "channels_last": base.reshape(2, 3, 2, 4).to(memory_format=torch.channels_last),
    }
