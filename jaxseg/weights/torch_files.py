"""What `torch.save` writes, without torch, and without running anything of it.

A pickle is a program for a small stack machine. The machine here builds dicts, lists, tuples and
the descriptions of tensors; it imports and calls nothing. Of names from outside it knows the few
that checkpoints need, and refuses the file at the first other one.

Sources: torch/serialization.py and torch/_utils.py (torch 2.13); Python's pickletools.py.
"""

import io
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxseg.errors import InputError
from jaxseg.weights import dtypes

STORAGES = {
    **{"torch.DoubleStorage": "float64", "torch.FloatStorage": "float32"},
    **{"torch.HalfStorage": "float16", "torch.BFloat16Storage": "bfloat16"},
    **{"torch.LongStorage": "int64", "torch.IntStorage": "int32", "torch.ShortStorage": "int16"},
    **{"torch.CharStorage": "int8", "torch.ByteStorage": "uint8", "torch.BoolStorage": "bool"},
    **{"torch.ComplexFloatStorage": "complex64", "torch.ComplexDoubleStorage": "complex128"},
    **{"torch.UntypedStorage": "uint8", "torch.storage.UntypedStorage": "uint8"},
}
TENSORS = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
PARAMETERS = {
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.nn.parameter.Parameter",  # before torch 0.4
}
VALUES = ("set", "frozenset", "complex", "bytearray")  # of Python
NUMPY = ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
# What checkpoints carry beside the weights. It stays a name: allowed there, refused as a weight.
BESIDE = {
    "argparse.Namespace",  # the "args" of torchvision's and timm's training scripts
    "collections.Counter",  # the milestones of a schedule
    "mmengine.logging.history_buffer.HistoryBuffer",  # the curves in "message_hub"
    *("numpy.ndarray", "numpy.dtype", "_codecs.encode"),  # numbers in these curves
    *(f"numpy.{core}.{name}" for core in ("core", "_core") for name in NUMPY),
    *(f"{module}.{kind}" for module in ("__builtin__", "builtins") for kind in VALUES),
    *("torch.Size", "torch.device", *(f"torch.{dtype}" for dtype in dtypes.NAMES)),
}
KNOWN = {"collections.OrderedDict", *STORAGES, *TENSORS, *PARAMETERS, *BESIDE}
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model")  # the first is taken
LEGACY = 0x1950A86A20F9469CFC6C  # the first pickle of torch's format before 1.6
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
ARGUMENTS = {  # opcodes that put their own argument on the stack
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("BINSTRING", "SHORT_BINSTRING", "STRING"),  # Python 2
}
RESAVE = (
    "Where it was made, save the weights alone: "
    'torch.save(model.state_dict(), "weights.pth"), or as .safetensors.'
)
DISTRUST = (
    "Weights need no such thing. Nothing of it was run; do not trust the file unless it is your "
    f"own. {RESAVE}"
)


class Name(NamedTuple):
    """A function or class that a pickle names, such as "torch.FloatStorage"."""

    name: str


class Storage(NamedTuple):
    """A run of `count` numbers under the name `key`."""

    key: str
    dtype: str
    count: int

    def bytes(self) -> int:
        return self.count * dtypes.width(self.dtype)


class Tensor(NamedTuple):
    """A view of a storage, unchecked; offset and strides count numbers, as in torch."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_zip(path: Path) -> dict[str, np.ndarray]:
    """The weights in a zip archive NAME/data.pkl, NAME/byteorder, NAME/data/KEY per storage.

    Raises InputError for an archive that torch did not write, and many kinds for a damaged one.
    """
    with zipfile.ZipFile(path) as archive:
        root, members = _root(archive, path.stat().st_size)
        order = "little"  # before torch 2.1 nothing said so
        if f"{root}/byteorder" in members:
            order = archive.read(f"{root}/byteorder").decode()
        if order not in ("little", "big"):
            raise InputError(f'its byte order is "{order}": needs little or big. {RESAVE}')

        def fetch(storage: Storage) -> bytes:
            name = f"{root}/data/{storage.key}"
            size = members[name].file_size if name in members else 0
            if name not in members or size != storage.bytes():
                raise InputError(
                    f"the storage {name} has {size} bytes: needs {storage.bytes()}. "
                    "Download or save the file again."
                )
            return archive.read(name)

        tree, _ = _unpickle(io.BytesIO(archive.read(f"{root}/data.pkl")))
        return _weights(tree, fetch, "<" if order == "little" else ">")


def _root(archive: zipfile.ZipFile, total: int) -> tuple[str, dict[str, zipfile.ZipInfo]]:
    """(the NAME before all others, the members); the members are as torch writes them.

    total: the bytes of the file. Since none is compressed, the members have no more.
    """
    infos = archive.infolist()
    members = {info.filename: info for info in infos}
    outside = any({"..", ""} & set(name.replace("\\", "/").split("/")) for name in members)
    if outside or len(members) < len(infos):
        raise InputError(f"the zip archive has members outside of its folder, or twice. {DISTRUST}")
    if any(info.compress_type or info.file_size != info.compress_size for info in infos):
        raise InputError(f"the zip archive is compressed, which torch's never is. {RESAVE}")
    if sum(info.file_size for info in infos) > total:
        raise InputError(f"the members of the zip archive overlap. {DISTRUST}")
    roots = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1 or f"{roots[0]}/constants.pkl" in members:
        script = "a program (TorchScript)"
        kind = script if len(roots) == 1 else f"a zip archive with {len(roots)} data.pkl"
        raise InputError(f"it is {kind}, not the weights that torch.save writes. {RESAVE}")
    return roots[0], members


def read_stream(path: Path) -> dict[str, np.ndarray]:
    """The weights in torch's format before 1.6: pickles, then the storages.

    The pickles: magic number, protocol, system, object, keys of the storages. Each storage: its
    count of numbers in 8 bytes, then these, in little endian.
    Raises InputError for a file that torch did not write, and many kinds for a damaged one.
    """
    raw = path.read_bytes()
    file = io.BytesIO(raw)
    if _unpickle(file)[0] != LEGACY:
        raise InputError(f"it is a pickle that torch.save did not write. {RESAVE}")
    _, _, (tree, storages), (keys, _) = (_unpickle(file) for _ in range(4))
    if not all(isinstance(key, str) for key in keys):
        raise TypeError("a key that is no text")
    at, places = file.tell(), {}
    for key in keys:
        begin, size = at + 8, storages[key].bytes()
        count = int.from_bytes(raw[at:begin], "little")
        if count != storages[key].count or begin + size > len(raw):
            raise InputError(
                f"storage {key} has {count} numbers in {max(0, len(raw) - begin)} bytes: needs "
                f"{storages[key].count} in {size}. Download or save the file again."
            )
        at = begin + size
        places[key] = memoryview(raw)[begin:at]
    return _weights(tree, lambda storage: places[storage.key], "<")


def _unpickle(file: io.BytesIO) -> tuple[Any, dict[str, Storage]]:
    """(the value of the pickle that starts here, its storages); the file stands behind it.

    Only string keys of dicts are kept: no other can name a weight. What an object would be told of
    its state is dropped.
    """
    stack, marks, memo, storages = [], [], {}, {}

    def pop(count: int) -> list:
        values = stack[-count:] if count else []
        del stack[len(stack) - len(values) :]
        return values

    def above_mark() -> list:
        return pop(len(stack) - marks.pop())

    for op, value, _ in pickletools.genops(file):
        match op.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop(), storages
            case "MARK":
                marks.append(len(stack))
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case name if name in ARGUMENTS:
                stack.append(value)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(int(op.name[-1]))))
            case "TUPLE":
                stack.append(tuple(above_mark()))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "APPEND" | "SETITEM":
                values = pop(1 if op.name == "APPEND" else 2)
                _fill(stack[-1], values)
            case "APPENDS" | "ADDITEMS" | "SETITEMS":
                values = above_mark()
                _fill(stack[-1], values)
            case "GLOBAL":
                stack.append(_known(value.replace(" ", ".")))
            case "STACK_GLOBAL":
                stack.append(_known(".".join(pop(2))))
            case "BINPERSID":
                storage = _storage(stack.pop())
                if storages.setdefault(storage.key, storage) != storage:
                    raise InputError(f"storage {storage.key} has two types or sizes. {RESAVE}")
                stack.append(storage)
            case "REDUCE" | "NEWOBJ":
                stack.append(_made(*pop(2)))
            case "BUILD":
                stack.pop()
            case _:
                raise InputError(f"its pickle uses {op.name} {value or ''}. {DISTRUST}")
    raise EOFError("a pickle without an end")


def _fill(target: Any, values: list) -> None:
    """Appends to a list; sets the pairs key, value, key, value, ... of a dict; else nothing."""
    if isinstance(target, list):
        target.extend(values)
    if isinstance(target, dict):
        pairs = zip(values[::2], values[1::2], strict=True)
        target.update((key, value) for key, value in pairs if isinstance(key, str))


def _known(name: str) -> Name:
    if name not in KNOWN:
        raise InputError(f"its pickle names {name}. {DISTRUST}")
    return Name(name)


def _storage(identity: tuple) -> Storage:
    """The storage that torch's persistent id stands for."""
    word, maker, key, _, count, *view = identity
    good = isinstance(maker, Name) and isinstance(key, str) and isinstance(count, int)
    if not good or word != "storage" or count < 0 or any(view):
        raise InputError(f"its pickle describes a storage as torch 1 and 2 do not. {RESAVE}")
    return Storage(key, STORAGES[maker.name], count)


def _made(maker: Name, args: tuple) -> Any:
    """What stands for `maker(*args)`, which is not called."""
    if maker.name == "collections.OrderedDict":
        pairs = args[0] if args else ()
        return {key: value for key, value in pairs if isinstance(key, str)}
    if maker.name in TENSORS:
        storage, offset, shape, strides, *rest = args
        if not isinstance(storage, Storage):
            raise TypeError("a tensor without a storage")
        third = maker.name.endswith("_v3")  # for types that have no storage of their own
        dtype = rest[2].name.removeprefix("torch.") if third else storage.dtype
        return Tensor(storage, dtype, offset, shape, strides)
    return args[0] if maker.name in PARAMETERS else maker


def _weights(tree: Any, fetch: Callable[[Storage], bytes], order: str) -> dict[str, np.ndarray]:
    """The tensors of a state dict, which may lie inside a checkpoint.

    fetch: gives the bytes of a storage, of the right length.
    """
    for _ in WRAPPERS:  # one may lie in another
        inside = [tree[key] for key in WRAPPERS if key in tree] if isinstance(tree, dict) else []
        tree = next((value for value in inside if isinstance(value, dict)), tree)
    if not isinstance(tree, dict) or not any(isinstance(v, Tensor) for v in tree.values()):
        found = ", ".join(tree)[:200] if isinstance(tree, dict) else type(tree).__name__
        raise InputError(f"it holds no tensors by name, but: {found or 'nothing'}. {RESAVE}")
    flats, weights = {}, {}
    for name, tensor in tree.items():
        if isinstance(tensor, Name):
            raise InputError(f"{name} is a {tensor.name}: needs a tensor. {RESAVE}")
        if not isinstance(tensor, Tensor):
            continue  # a number or a text of the program that wrote it
        place = tensor.storage, tensor.dtype
        if place not in flats:
            flats[place] = dtypes.decode(fetch(tensor.storage), tensor.dtype, order)
        weights[name] = _view(name, tensor, flats[place])
    return weights


def _view(name: str, tensor: Tensor, flat: np.ndarray) -> np.ndarray:
    """The tensor as a view of its storage [n], no part of it outside.

    Nor larger than it: an expanded tensor, of stride 0, could claim any size.
    """
    _, _, offset, shape, strides = tensor
    size, reach = dtypes.count(shape), dtypes.count(strides)
    if (
        size is None
        or reach is None
        or dtypes.count([offset]) is None
        or len(shape) != len(strides)
    ):
        raise InputError(f"{name} has a shape, strides or an offset that are none. {DISTRUST}")
    end = offset + 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if size > len(flat) or size and end > len(flat):
        raise InputError(
            f"{name} of shape {shape}, strides {strides} and offset {offset} does not fit its "
            f"storage of {len(flat)} numbers. Save it contiguous(), or download the file again."
        )
    strides = [s * flat.itemsize for s in strides]
    return np.ndarray(shape, flat.dtype, flat, offset * flat.itemsize if size else 0, strides)
