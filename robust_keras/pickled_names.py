"""What the names in a pickle stand for: stand-ins for the few functions of NumPy that arrays are made with."""

import math
import re
import reprlib
from collections.abc import Callable
from typing import Any

import numpy as np

# Numbers, bytes and text of a fixed size: never objects, structures or pointers.
_DTYPE = re.compile("[biufcSU][1-9][0-9]{0,8}")
_MOST_AXES = 32  # Of many, a product takes hours.


class Name:
    """What a name in the file stands for: something to call, or (None) only to refer to."""

    def __init__(self, function: Callable | None):
        self.function = function


class Stateful:
    """Takes a state that arrives after the file has first referred to it."""

    def set_state(self, state: Any) -> None:
        """Takes it.

        Raises:
            ValueError: for another one than it may have.
        """
        raise NotImplementedError


class Dtype(Stateful):
    """A dtype in the making: its byte order is its state."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype

    def set_state(self, state: Any) -> None:
        """Takes the byte order of a state, which must say nothing else."""
        version, byte_order, *structure = checked(state, tuple)[:5]
        if version not in (3, 4) or byte_order not in ("|", "<", ">", "=") or structure != [None] * 3:
            raise ValueError(f"a dtype with the state {shown(state)} is not allowed")
        self.dtype = self.dtype.newbyteorder(byte_order)


def find(module: str, name: str) -> Name:
    """The stand-in of a name.

    Raises:
        ValueError: for a name that has none.
    """
    try:
        return _NAMES[module.replace("numpy._core.", "numpy.core.", 1), name]
    except KeyError:
        raise ValueError(f"the name {module[:100]}.{name[:100]} is not allowed") from None


def fill(array: np.ndarray, state: Any) -> None:
    """Makes an empty array, as `_reconstruct` returns it, what a state says."""
    _version, shape, dtype, is_fortran, data = checked(state, tuple)
    if type(data) is str:  # As Python 2 wrote it.
        data = data.encode("latin1")
    check_data(data, bytes, dtype, shape)
    array.__setstate__((1, shape, dtype.dtype, bool(is_fortran), data))  # type: ignore[arg-type]


def checked(value: Any, expected_type: type) -> Any:
    """A value of exactly that type.

    Raises:
        ValueError: for another one.
    """
    if type(value) is not expected_type:
        raise ValueError(f"{shown(value)} stands where a {expected_type.__name__} should")
    return value


def shown(value: Any) -> str:
    """A value as a message may show it: short, on one line."""
    if isinstance(value, Name):
        return next((".".join(key) for key, name in _NAMES.items() if name is value), "a name")
    return type(value).__name__ if type(value) is Dtype else reprlib.repr(value)


def _encode(text, encoding):
    # How protocols 0 to 2 store bytes.
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise ValueError(f"_codecs.encode with {shown(encoding)} is not allowed")
    return text.encode("latin1")


def _no_bytes():
    return b""


def make_dtype(code: Any, align: Any = False, copy: Any = True) -> Dtype:
    """A dtype of numbers or text, of its code, such as 'f4'."""
    del align, copy  # They change structures and identity alone.
    if type(code) is not str or not _DTYPE.fullmatch(code):
        raise ValueError(f"the dtype {shown(code)} is not allowed")
    return Dtype(np.dtype(code))


def _reconstruct(array_type, shape, code):
    del shape, code  # The state that follows has the real ones.
    if array_type is not NDARRAY:
        raise ValueError(f"an array of the type {shown(array_type)} is not allowed")
    return np.ndarray((0,), np.uint8)


def _from_buffer(data, dtype, shape, order):
    check_data(data, (bytes, bytearray), dtype, shape)
    if order not in ("C", "F"):
        raise ValueError(f"an array of the order {shown(order)} is not allowed")
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


def _scalar(dtype, data):
    # NumPy's own would unpickle `data` where the dtype is object.
    if type(data) is str:
        data = data.encode("latin1")
    check_data(data, bytes, dtype, ())
    return np.frombuffer(data, dtype.dtype)[0]


def check_data(data: Any, types: Any, dtype: Any, shape: Any) -> None:
    """Raises ValueError unless data of one of the types has as many bytes as a shape says.

    No memory has been set aside before that.
    """
    checked(dtype, Dtype)
    are_few = len(checked(shape, tuple)) <= _MOST_AXES
    if not are_few or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
        raise ValueError(f"an array of the shape {shown(shape)} is not allowed")
    if not isinstance(data, types) or len(data) != math.prod(shape) * dtype.dtype.itemsize:
        raise ValueError(f"an array of {dtype.dtype} {shown(shape)} holds {shown(data)}")


NDARRAY = Name(None)
RECONSTRUCT = Name(_reconstruct)
_NAMES = {
    ("numpy", "ndarray"): NDARRAY,
    ("numpy", "dtype"): Name(make_dtype),
    ("numpy.core.multiarray", "_reconstruct"): RECONSTRUCT,
    ("numpy.core.multiarray", "scalar"): Name(_scalar),
    ("numpy.core.numeric", "_frombuffer"): Name(_from_buffer),
    ("_codecs", "encode"): Name(_encode),
    ("__builtin__", "bytes"): Name(_no_bytes),
    ("builtins", "bytes"): Name(_no_bytes),
}
