"""Weight files of other programs as numpy arrays, read as if a stranger had made them.

`.safetensors`, numpy's `.npz`, and what `torch.save` writes (`.pth`, `.pt`, `.bin`, `.ckpt`).
Nothing in a file is run. Source: the section "Format" of the README of safetensors.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxseg.errors import InputError, unknown
from jaxseg.weights import dtypes, torch_files
from jaxseg.weights.torch_files import RESAVE

SAFETENSORS = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "bool", "C64": "complex64"},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}
ZIP, PICKLE = b"PK\x03\x04", b"\x80"
LOOKS = {  # the first bytes of what people have in place of weights
    ZIP: "a zip archive, such as torch (.pth) and numpy (.npz) write",
    PICKLE: "a pickle",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip file",
    b"\x93NUMPY": "a single numpy array (.npy)",
    b"version https://git-lfs": "a Git LFS pointer in place of the file (git lfs pull gets it)",
    b"<": "a web page in place of the file",
}
TENSORFLOW = bytes.fromhex("57fb808b247547db")  # the last bytes of a TensorFlow checkpoint


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The weights in a file: name -> array, in the order and with the shapes of the file.

    bfloat16 and float8 become float32, all else keeps its type. The arrays are read-only, and may
    be views of one another. A checkpoint is unwrapped ("state_dict", "model_state_dict",
    "model_state", "model"), and "module." is taken off where every name has it.

    Raises InputError for whatever is no such file, is damaged, or names more than weights need.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError(_no_file(path))
        if path.suffix.lower() not in READERS:
            raise InputError(
                f'its ending is "{path.suffix}", and weights are read from {", ".join(READERS)}. '
                f"{RESAVE}"
            )
        weights = READERS[path.suffix.lower()](path)
    except InputError as error:
        raise InputError(f"cannot read the weights {path}: {_printable(error)}") from error
    except Exception as error:  # a damaged or hostile file can provoke any kind
        raise InputError(
            f"cannot read the weights {path}: the file is damaged or cut off "
            f"({type(error).__name__}: {_printable(error)}). Download or save it again."
        ) from error
    if all(name.startswith("module.") for name in weights):  # torch's DataParallel
        weights = {name.removeprefix("module."): array for name, array in weights.items()}
    return weights


def _printable(error: Exception) -> str:
    """The message, which may quote the file, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in str(error)[:800])


def _no_file(path: Path) -> str:
    if Path(f"{path}.index").is_file():
        return f"it is a TensorFlow checkpoint: needs {', '.join(READERS)}."
    return "it is a folder: give a file in it." if path.is_dir() else "there is no such file."


def _looks(raw: bytes) -> str:
    """What a file seems to be that is not what its ending says."""
    if not raw:
        return "it is empty. Download or save it again."
    if raw.endswith(TENSORFLOW):
        return f"it is a TensorFlow checkpoint: needs {', '.join(READERS)}."
    if raw[8:9] == b"{":
        return "it looks like safetensors: rename it to .safetensors."
    looks = (text for start, text in LOOKS.items() if raw[:64].lstrip().startswith(start))
    return f"it looks like {next(looks, 'something else')}, not what its ending says. {RESAVE}"


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    """8 bytes: the header's length n; n bytes of JSON; the arrays one after another, no gaps."""
    raw = path.read_bytes()
    if raw[8:9] != b"{":
        raise InputError(_looks(raw))
    start = 8 + int.from_bytes(raw[:8], "little")
    if start > len(raw):
        raise InputError(
            f"its header is said to end at byte {start}, and the file has {len(raw)}. "
            "It is cut off or no safetensors: download it again."
        )
    header = json.loads(raw[8:start], object_pairs_hook=_no_repeats)
    header.pop("__metadata__", None)
    data, weights, at = memoryview(raw)[start:], {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in SAFETENSORS:
            raise unknown(f"dtype of {name}", dtype, SAFETENSORS)
        dtype, size = SAFETENSORS[dtype], dtypes.count(shape)
        if size is None:
            raise InputError(f"{name} has the shape {shape}, which is none. Save the file again.")
        need = size * dtypes.width(dtype)
        if begin != at or end - begin != need or end > len(data):
            raise InputError(
                f"{name} of shape {shape} and type {dtype} is said to lie at bytes {begin} to "
                f"{end} of {len(data)}: needs {need} bytes from {at}. The file is cut off or "
                "damaged: download it again."
            )
        weights[name], at = dtypes.decode(data[begin:end], dtype).reshape(shape), end
    if at != len(data) or not weights:
        raise InputError(
            f"its header names {len(weights)} arrays of {at} bytes, and {len(data)} follow. "
            "Download or save it again."
        )
    return {name: weights[name] for name in header}


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise InputError("its header has a name twice. Save the file again.")
    return dict(pairs)


def _npz(path: Path) -> dict[str, np.ndarray]:
    """numpy's own reader, which is told to unpickle nothing."""
    if _start(path) != ZIP:
        raise InputError(_looks(path.read_bytes()))
    with zipfile.ZipFile(path) as archive:
        strange = [name for name in archive.namelist() if not name.endswith(".npy")]
    if strange:
        raise InputError(f"it holds {strange[0]}, which is no array. {RESAVE}")
    weights = {}
    with np.load(path, allow_pickle=False) as file:
        for name in file.files:
            try:
                weights[name] = file[name]
            except ValueError as error:
                raise InputError(f"{name} holds no plain numbers ({error}). {RESAVE}") from error
            if weights[name].dtype.kind not in "biufc":
                dtype = weights[name].dtype
                raise InputError(f"{name} has type {dtype}: needs numbers. Save it as float32.")
            weights[name].flags.writeable = False
    return weights


def _torch(path: Path) -> dict[str, np.ndarray]:
    """What torch.save wrote, in the format of torch 1.6 and later or the one before."""
    start = _start(path)
    if start == ZIP:
        return torch_files.read_zip(path)
    if start.startswith(PICKLE):
        return torch_files.read_stream(path)
    raise InputError(_looks(path.read_bytes()))


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


READERS = {
    **{".safetensors": _safetensors, ".npz": _npz},
    **dict.fromkeys((".pth", ".pt", ".bin", ".ckpt"), _torch),
}
