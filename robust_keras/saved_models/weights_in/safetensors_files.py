"""Safetensors files: a size, a header in JSON and numbers without gaps.

The format is that of https://huggingface.co/docs/safetensors.
"""

import functools
import json
from typing import Any, BinaryIO

import numpy as np

from robust_keras.saved_models.weights_in.tensors import BFLOAT16, Storage, Tensor, packed

MOST_HEADER_BYTES = 2**23  # WRN-106-16's has 80 KB.
_DTYPES = {
    **{"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": BFLOAT16},
    **{"I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1")},
    **{"U8": np.dtype("u1"), "BOOL": np.dtype("?")},
}


def read(file: BinaryIO, num_bytes: int) -> dict[str, Tensor]:
    """The tensors of a file by name.

    Args:
        file: at its start.
        num_bytes: how many it has.

    Raises:
        Exception: of any kind, for anything else, and for a damaged file.
    """
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(MOST_HEADER_BYTES, num_bytes - 8):
        raise ValueError(f"a header of {length:,} bytes")
    header = json.loads(file.read(length).decode(), object_pairs_hook=_object, parse_int=_integer)
    header.pop("__metadata__", None)
    tensors, begin = {}, 0

    def read_bytes(offset, first, end):
        file.seek(8 + length + offset + first)
        return file.read(end - first)

    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype = _DTYPES[entry["dtype"]]
        first, end = entry["data_offsets"]
        if type(first) is not int or type(end) is not int or first != begin or end < first:
            raise ValueError(f"a tensor {name[:100]} that overlaps another, or is behind a gap")
        storage = Storage(name, dtype, end - first, functools.partial(read_bytes, first))
        tensors[name] = packed(storage, tuple(_sizes(entry["shape"], storage, name)))
        begin = end
    if 8 + length + begin != num_bytes:
        raise ValueError(f"{num_bytes - 8 - length:,} bytes of numbers, not {begin:,}: the file may be cut off")
    return tensors


def _sizes(shape: Any, storage: Storage, name: str) -> list[int]:
    size = storage.dtype.itemsize
    if type(shape) is not list or len(shape) > 8:
        raise ValueError(f"a tensor {name[:100]} without a shape")
    for axis in shape:
        if type(axis) is not int or not 0 <= axis <= storage.num_bytes:
            raise ValueError(f"a tensor {name[:100]} of shape {shape}")
        size *= axis
    if size != storage.num_bytes:
        raise ValueError(f"a tensor {name[:100]} of shape {shape} in {storage.num_bytes:,} bytes")
    return shape


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a header that says a name twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > 20:  # Longer ones can take minutes to read.
        raise ValueError("a number of more than 20 digits")
    return int(digits)
