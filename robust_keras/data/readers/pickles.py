"""Reads a pickle that other people made, without running anything it contains.

A pickle is a program. This reader interprets only the instructions that build dicts, lists, tuples,
strings, bytes, numbers and NumPy arrays of numbers, and answers the few names that such a file
refers to with stand-ins of its own, so nothing that the file names is ever imported or called:

    arrays = pickles.load("ti_500K_pseudo_labeled.pickle")

Files of every pickle protocol, from Python 2 or 3 and from NumPy 1 or 2, are understood.
"""

import math
import pickle
import re
import reprlib

import numpy as np
import tensorflow as tf

# Left out, and so refused: persistent ids, the extension registry, instances, sets, buffers.
_INSTRUCTIONS = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK),
    *(pickle.GET, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.FLOAT, pickle.BINFLOAT),
    *(pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2),
    *(pickle.LONG, pickle.LONG1, pickle.LONG4),
    *(pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING),
    *(pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
    *(pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.LIST, pickle.EMPTY_DICT, pickle.DICT),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL),
)
# A list of five million numbers has as many instructions; arrays, which are what is wanted, have a handful.
_MAX_INSTRUCTIONS = 10_000_000
# Numbers, bytes and text of a fixed size: never objects, structures or pointers.
_DTYPE = re.compile("[biufcSU][1-9][0-9]{0,8}")


def load(path):
    """The object in a pickle file, if it consists of plain data only.

    Args:
        path: a path that `tf.io.gfile` can open.

    Returns:
        Dicts, lists, tuples, strings, bytes, numbers and NumPy arrays, nested as they were stored.
        Arrays may be read-only.

    Raises:
        ValueError: if the file holds or refers to anything else, or is not a whole pickle. Nothing
            that it names has been imported or called.
    """
    num_bytes = tf.io.gfile.stat(path).length
    with tf.io.gfile.GFile(path, "rb") as file:
        try:
            return _Unpickler(_BoundedFile(file, num_bytes)).load()
        except Exception as error:  # A damaged or hostile file can fail in any way.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                "Expected a pickle of dicts, lists, tuples, strings, numbers and numeric NumPy "
                f"arrays only. Received: {path} ({reason[:300]})"
            ) from error


class _BoundedFile:
    """A file that refuses to read past its end before any memory is set aside for it."""

    def __init__(self, file, num_bytes):
        self._file = file
        self._num_left = num_bytes
        self.num_bytes = num_bytes

    def read(self, num_bytes):
        if not 0 <= num_bytes <= self._num_left:
            raise ValueError("the file is truncated, or no pickle")
        self._num_left -= num_bytes
        return self._file.read(num_bytes)

    def readline(self):
        line = self._file.readline()
        self._num_left -= len(line)
        return line


class _Instructions(dict):
    """The functions of the instructions that are allowed, so many times as a file may have any."""

    num_left = _MAX_INSTRUCTIONS

    def __getitem__(self, opcode):
        self.num_left -= 1
        if self.num_left < 0:
            raise ValueError(f"it has more than {_MAX_INSTRUCTIONS:,} instructions")
        return super().__getitem__(opcode)

    def __missing__(self, opcode):
        raise ValueError(f"the instruction {bytes([opcode])!r} is not allowed")


class _Name:
    """What a name in the file stands for: something to call, or (None) only to refer to."""

    def __init__(self, function):
        self.function = function


class _Dtype:
    """A dtype in the making: its byte order arrives after the file has first referred to it."""

    def __init__(self, dtype):
        self.dtype = dtype


# The interpreter that is written in Python: the one in C cannot leave instructions out.
class _Unpickler(pickle._Unpickler):
    dispatch = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _INSTRUCTIONS}

    def __init__(self, file):
        super().__init__(file, encoding="latin1")  # What Python 2 called a string is bytes.
        self.dispatch = _Instructions(self.dispatch)
        self._num_bytes = file.num_bytes
        # Bytes that were read once can be asked for again and again. Every array takes its own twice, at most.
        self._num_left = 4 * file.num_bytes
        self._empty_arrays = []

    def find_class(self, module, name):
        try:
            return _NAMES[module.replace("numpy._core.", "numpy.core.", 1), name]
        except KeyError:
            raise ValueError(f"the name {module[:100]}.{name[:100]} is not allowed") from None

    def load_reduce(self):
        arguments = self.stack.pop()
        name = self.stack.pop()
        if type(name) is not _Name or name.function is None or type(arguments) is not tuple:
            raise ValueError(f"a call of {_shown(name)} is not allowed")
        result = name.function(*arguments)
        if name is _RECONSTRUCT:
            self._empty_arrays.append(result)
        elif type(result) is bytes:
            self._count(len(result))
        self.append(result)

    dispatch[pickle.REDUCE[0]] = load_reduce

    def _count(self, num_bytes):
        self._num_left -= num_bytes
        if self._num_left < 0:
            raise ValueError("it makes more of its bytes than there are")

    def load_build(self):
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is _Dtype:
            target.dtype = _dtype_from_state(target.dtype, state)
            return
        for i, array in enumerate(self._empty_arrays):
            if array is target:
                del self._empty_arrays[i]
                _fill(array, state)
                self._count(array.nbytes)
                return
        raise ValueError(f"setting the state of {_shown(target)} is not allowed")

    dispatch[pickle.BUILD[0]] = load_build

    def load_appends(self):
        items = self.pop_mark()
        _checked(self.stack[-1], list).extend(items)

    dispatch[pickle.APPENDS[0]] = load_appends

    def load_append(self):
        item = self.stack.pop()
        _checked(self.stack[-1], list).append(item)

    dispatch[pickle.APPEND[0]] = load_append

    def load_setitems(self):
        items = self.pop_mark()
        _checked(self.stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_setitem(self):
        value = self.stack.pop()
        key = self.stack.pop()
        _checked(self.stack[-1], dict)[key] = value

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_bytearray8(self):
        num_bytes = int.from_bytes(self.read(8), "little")
        if num_bytes > self._num_bytes:
            raise ValueError("the file is truncated, or no pickle")
        data = bytearray(num_bytes)
        self.readinto(data)
        self.append(data)

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def _encode(text, encoding):
    # How protocols 0 to 2 store bytes.
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise ValueError(f"_codecs.encode with {_shown(encoding)} is not allowed")
    return text.encode("latin1")


def _no_bytes():
    return b""


def _make_dtype(code, align=False, copy=True):
    del align, copy  # They change structures and identity alone.
    if type(code) is not str or not _DTYPE.fullmatch(code):
        raise ValueError(f"the dtype {_shown(code)} is not allowed")
    return _Dtype(np.dtype(code))


def _dtype_from_state(dtype, state):
    version, byte_order, *structure = _checked(state, tuple)[:5]
    if version not in (3, 4) or byte_order not in ("|", "<", ">", "=") or structure != [None] * 3:
        raise ValueError(f"a dtype with the state {_shown(state)} is not allowed")
    return dtype.newbyteorder(byte_order)


def _reconstruct(array_type, shape, code):
    del shape, code  # The state that follows has the real ones.
    if array_type is not _NDARRAY:
        raise ValueError(f"an array of the type {_shown(array_type)} is not allowed")
    return np.ndarray((0,), np.uint8)


def _fill(array, state):
    _version, shape, dtype, is_fortran, data = _checked(state, tuple)
    if type(data) is str:  # As Python 2 wrote it.
        data = data.encode("latin1")
    _check_data(data, bytes, dtype, shape)
    array.__setstate__((1, shape, dtype.dtype, bool(is_fortran), data))


def _from_buffer(data, dtype, shape, order):
    _check_data(data, (bytes, bytearray), dtype, shape)
    if order not in ("C", "F"):
        raise ValueError(f"an array of the order {_shown(order)} is not allowed")
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


def _scalar(dtype, data):
    # NumPy's own would unpickle `data` where the dtype is object.
    if type(data) is str:
        data = data.encode("latin1")
    _check_data(data, bytes, dtype, ())
    return np.frombuffer(data, dtype.dtype)[0]


def _check_data(data, types, dtype, shape):
    """Checks that an array has as many bytes as its shape says, before any memory is set aside."""
    _checked(dtype, _Dtype)
    if not all(type(size) is int and 0 <= size < 2**48 for size in _checked(shape, tuple)):
        raise ValueError(f"an array of the shape {_shown(shape)} is not allowed")
    if not isinstance(data, types) or len(data) != math.prod(shape) * dtype.dtype.itemsize:
        raise ValueError(f"an array of {dtype.dtype} {_shown(shape)} holds {_shown(data)}")


def _checked(value, expected_type):
    if type(value) is not expected_type:
        raise ValueError(f"{_shown(value)} stands where a {expected_type.__name__} should")
    return value


def _shown(value):
    if type(value) is _Name:
        return next(".".join(key) for key, name in _NAMES.items() if name is value)
    return type(value).__name__ if type(value) is _Dtype else reprlib.repr(value)


_NDARRAY = _Name(None)
_RECONSTRUCT = _Name(_reconstruct)
_NAMES = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Name(_make_dtype),
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.multiarray", "scalar"): _Name(_scalar),
    ("numpy.core.numeric", "_frombuffer"): _Name(_from_buffer),
    ("_codecs", "encode"): _Name(_encode),
    ("__builtin__", "bytes"): _Name(_no_bytes),
    ("builtins", "bytes"): _Name(_no_bytes),
}
