"""Raw bytes as numbers, of every type that weight files have."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# Types by torch's names, which are numpy's but for those that numpy lacks.
NAMES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    *("bool", "complex64", "complex128"),
)
BITS = {  # read as these, then converted
    **{"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8", "bool": "uint8"}
}


def width(name: str) -> int:
    """The bytes of one number."""
    return np.dtype(BITS.get(name, name)).itemsize


def decode(raw: bytes | memoryview, name: str, order: str = "<") -> np.ndarray:
    """The numbers [n] in `raw`, read-only, in the byte order "<" or ">".

    bfloat16 and float8 become float32, which holds all their values.
    """
    stored = np.dtype(BITS.get(name, name))
    flat = np.frombuffer(raw, stored.newbyteorder(order)).astype(stored, copy=False)
    if name == "bool":
        flat = flat.astype(bool)
    elif name == "bfloat16":  # the upper half of a float32
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    elif name == "float8_e5m2":  # the upper half of a float16
        flat = (flat.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    elif name == "float8_e4m3fn":  # a float16's exponent has bias 15, this one's 7
        sign, size = (flat & 0x80).astype(np.uint16), (flat & 0x7F).astype(np.uint16)
        flat = (sign << 8 | size << 7).view(np.float16).astype(np.float32) * 256
        flat[size == 0x7F] = np.nan  # and infinity has no code
    flat.flags.writeable = False
    return flat


def count(shape: Sequence[Any]) -> int | None:
    """The numbers in an array of that shape; None where it is no shape at all.

    Also for the hostile ones: what is no size is not multiplied.
    """
    good = isinstance(shape, list | tuple) and len(shape) <= 64  # numpy's most
    good = good and all(isinstance(n, int) and 0 <= n < 2**63 for n in shape)
    return math.prod(shape) if good else None
