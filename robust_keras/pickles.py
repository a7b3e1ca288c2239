"""Reads a pickle that other people made, without running anything it contains.

A pickle is a program. This reader interprets only the instructions that build dicts, lists, tuples,
strings, bytes, numbers and NumPy arrays of numbers, and answers the few names that such a file
refers to with stand-ins of its own (`pickled_names`), so nothing that the file names is ever imported or called:

    arrays = pickles.load("ti_500K_pseudo_labeled.pickle")

Files of every pickle protocol, from Python 2 or 3 and from NumPy 1 or 2, are understood. Readers of files that hold
pickles among other things, such as checkpoints, run `interpret` with further names.
"""

import pickle
import struct
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np
import tensorflow as tf

from robust_keras import foreign_files, pickled_names
from robust_keras.pickled_names import Name, Stateful, checked, shown

# A list of five million numbers has as many instructions; arrays, which are what is wanted, have a handful.
_MAX_INSTRUCTIONS = 10_000_000
_BUFFER_BYTES = 1 << 16
_TRUNCATED = "the file is truncated, or no pickle"
# Complex numbers can be chosen so that all of them have one hash.
_KEYS = (str, bytes, int, float, bool, type(None), np.integer, np.floating, np.bool_, np.character)


def load(path: str) -> Any:
    """The object in a pickle file, if it consists of plain data only.

    Args:
        path: a path that `tf.io.gfile` can open.

    Returns:
        Dicts, lists, tuples, strings, bytes, numbers and NumPy arrays, nested as they were stored. Keys of dicts are
        text, bytes or numbers. Arrays may be read-only.

    Raises:
        ValueError: if the file holds or refers to anything else, or is not a whole pickle. Nothing
            that it names has been imported or called.
    """
    num_bytes = tf.io.gfile.stat(path).length
    with foreign_files.open_regular(path, follow=True) as file:
        try:
            return interpret(BoundedFile(file, num_bytes))
        except Exception as error:  # A damaged or hostile file can fail in any way.
            reason = foreign_files.printable(" ".join(str(error).split()), most=300) or type(error).__name__
            raise ValueError(
                "Expected a pickle of dicts, lists, tuples, strings, numbers and numeric NumPy "
                f"arrays only. Received: {path} ({reason})"
            ) from error


class BoundedFile:
    """A file that refuses to read past its end before any memory is set aside for it.

    Args:
        file: can seek and read; at its start.
        num_bytes: how many it has.
    """

    def __init__(self, file: BinaryIO | tf.io.gfile.GFile, num_bytes: int) -> None:
        self._file = file
        self._buffer, self._next = b"", 0
        self._num_ahead = num_bytes  # Bytes after those in the buffer.
        self.num_bytes = num_bytes

    @property
    def position(self) -> int:
        """How many bytes of it have been read."""
        return self.num_bytes - self._num_ahead - len(self._buffer) + self._next

    def read(self, num_bytes: int) -> bytes:
        """So many bytes.

        Raises:
            ValueError: where there are fewer.
        """
        end = self._next + num_bytes
        if self._next <= end <= len(self._buffer):
            data = self._buffer[self._next : end]
            self._next = end
            return data
        ahead = end - len(self._buffer)
        if num_bytes < 0 or ahead > self._num_ahead:
            raise ValueError(_TRUNCATED)
        if num_bytes < _BUFFER_BYTES:
            self._fill()
            return self.read(num_bytes)
        # In one piece: a gigabyte is not joined of two.
        self._file.seek(self.num_bytes - self._num_ahead + ahead - num_bytes)
        self._buffer, self._next = b"", 0
        self._num_ahead -= ahead
        return self._from_disk(num_bytes)

    def line(self) -> bytes:
        """The bytes up to the next line feed, which is left out."""
        while (end := self._buffer.find(b"\n", self._next)) < 0:
            if not self._num_ahead:
                raise ValueError(_TRUNCATED)
            self._fill()
        begin, self._next = self._next, end + 1
        return self._buffer[begin:end]

    def _fill(self) -> None:
        rest = self._buffer[self._next :]
        num_bytes = min(self._num_ahead, max(_BUFFER_BYTES, len(rest)))  # Twice as much each time for a long line.
        self._num_ahead -= num_bytes
        self._buffer, self._next = rest + self._from_disk(num_bytes), 0

    def _from_disk(self, num_bytes: int) -> bytes:
        data = self._file.read(num_bytes)
        if len(data) < num_bytes:
            raise ValueError(_TRUNCATED)
        return data


def interpret(
    file: BoundedFile,
    *,
    names: Mapping[tuple[str, str], Name] | None = None,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The object that a pickle makes, which begins where the file is; the file is then behind it.

    Args:
        file: the pickle, or what holds it.
        names: what else may be named, by (module, name), also to make a new object of it.
        persistent: makes an object of what the file refers to it by; None where it may not.

    Raises:
        Exception: of any kind, for anything that is not allowed, and for what is damaged.
    """
    return _Machine(file, names or {}, persistent).run()


class _Machine:
    """What a pickle's instructions work on: a stack, which marks cut into pieces, and a memo of numbered objects."""

    def __init__(self, file: BoundedFile, names: Mapping[tuple[str, str], Name], persistent: Callable | None):
        self.file, self.names, self.persistent = file, names, persistent
        self.stack: list = []
        self.below: list[list] = []  # The pieces of the stack under each mark.
        self.memo: dict[int, Any] = {}
        # Bytes that were read once can be asked for again and again. Every array takes its own twice, at most.
        self._num_left = 4 * file.num_bytes
        self._empty_arrays: list[np.ndarray] = []

    def run(self) -> Any:
        """What the instructions make, each of which `_ACTIONS` has to know."""
        read, actions = self.file.read, _ACTIONS | (_FURTHER_ACTIONS if self.names else {})
        for _ in range(_MAX_INSTRUCTIONS):
            code = read(1)
            if code == pickle.STOP:
                return self.stack.pop()
            if (action := actions.get(code)) is None:
                raise ValueError(f"the instruction {code!r} is not allowed")
            action(self)
        raise ValueError(f"it has more than {_MAX_INSTRUCTIONS:,} instructions")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list:
        """What was put on the stack since the last mark, which is removed with it."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def put(self, index: int) -> None:
        if not 0 <= index < 2**32:  # Of larger ones, many can have one hash.
            raise ValueError("it numbers an object too high")
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def tuple_of(self, num: int) -> None:
        if len(self.stack) < num:
            raise ValueError("it takes more from its stack than there is")
        self.stack[-num:] = [tuple(self.stack[-num:])]

    def append(self, items: list) -> None:
        checked(self.stack[-1], list).extend(items)

    def set_items(self, items: list) -> None:
        target = self.stack[-1]
        checked(target, type(target) if isinstance(target, dict) else dict).update(_dict(items))

    def call(self) -> None:
        """Calls what a name stands for."""
        arguments = self.stack.pop()
        name = self.stack.pop()
        if type(name) is not Name or name.function is None or type(arguments) is not tuple:
            raise ValueError(f"a call of {shown(name)} is not allowed")
        result = name.function(*arguments)
        if name is pickled_names.RECONSTRUCT:
            self._empty_arrays.append(result)
        elif type(result) is bytes:
            self._count(len(result))
        self.stack.append(result)

    def refer(self) -> None:
        """Puts what lies elsewhere on the stack."""
        if self.persistent is None:
            raise ValueError("a reference to what lies elsewhere is not allowed")
        self.stack.append(self.persistent(self.stack.pop()))

    def set_state(self) -> None:
        """Gives a dtype its byte order, or an empty array what it holds; each once."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Stateful):
            target.set_state(state)
            return
        for i, array in enumerate(self._empty_arrays):
            if array is target:
                del self._empty_arrays[i]
                pickled_names.fill(array, state)
                self._count(array.nbytes)
                return
        raise ValueError(f"setting the state of {shown(target)} is not allowed")

    def _count(self, num_bytes: int) -> None:
        self._num_left -= num_bytes
        if self._num_left < 0:
            raise ValueError("it makes more of its bytes than there are")


def _dict(items: list) -> dict:
    for key in items[::2]:
        if not isinstance(key, _KEYS):  # The hash of tuples in tuples could take more than the processor's stack.
            raise ValueError(f"{shown(key)} stands where a key should")
        if type(key) is int and abs(key) >= 2**64:  # Of larger ones, many can have one hash.
            raise ValueError("a number of more than 64 bits stands where a key should")
    return dict(zip(items[::2], items[1::2], strict=True))


def _integer(line: bytes) -> int | bool:
    return line == b"01" if line in (b"00", b"01") else int(line, 0)


def _string(line: bytes) -> str:
    """What Python 2 called a string, with escapes for all that is not ASCII, in quotes."""
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise ValueError("a string stands without its quotes")
    return line[1:-1].decode("unicode_escape")


def _check_protocol(machine: _Machine, protocol: int) -> None:
    del machine
    if protocol > pickle.HIGHEST_PROTOCOL:
        raise ValueError(f"the protocol {protocol} is not known")


def _check_frame(machine: _Machine, num_bytes: int) -> None:
    if num_bytes > machine.file.num_bytes:
        raise ValueError(_TRUNCATED)


def _find(machine: _Machine, module: Any, name: Any) -> None:
    key = checked(module, str), checked(name, str)
    machine.push(machine.names[key] if key in machine.names else pickled_names.find(*key))


# An instruction is one byte and what follows it in the file; each of these returns what one does.
_Action = Callable[[_Machine], None]


def _with_number(form: str, act: Callable[[_Machine, Any], None]) -> _Action:
    """Reads a number, of the form that `struct` names so."""
    number = struct.Struct(form)
    return lambda machine: act(machine, *number.unpack(machine.file.read(number.size)))


def _with_bytes(form: str, make: Callable[[bytes], Any]) -> _Action:
    """Reads how many bytes there are, and then as many; pushes what is made of them."""
    return _with_number(form, lambda machine, count: machine.push(make(machine.file.read(count))))


def _with_line(act: Callable[[_Machine, bytes], None]) -> _Action:
    return lambda machine: act(machine, machine.file.line())


def _pushed(make: Callable[[Any], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, value: machine.push(make(value))


def _constant(make: Callable[[], Any]) -> _Action:
    return lambda machine: machine.push(make())


def _since_mark(act: Callable[[_Machine, list], None]) -> _Action:
    return lambda machine: act(machine, machine.since_mark())


def _latin1(data: bytes) -> str:
    return data.decode("latin1")


def _signed(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


# Left out, and so refused: persistent ids as text, the extension registry, instances, sets, buffers.
_ACTIONS: dict[bytes, _Action] = {
    pickle.PROTO: _with_number("B", _check_protocol),
    pickle.FRAME: _with_number("<Q", _check_frame),
    pickle.MARK: _Machine.mark,
    pickle.POP: _Machine.pop,
    pickle.POP_MARK: _since_mark(lambda machine, items: None),
    pickle.GET: _with_line(lambda machine, line: machine.get(int(line))),
    pickle.BINGET: _with_number("B", _Machine.get),
    pickle.LONG_BINGET: _with_number("<I", _Machine.get),
    pickle.PUT: _with_line(lambda machine, line: machine.put(int(line))),
    pickle.BINPUT: _with_number("B", _Machine.put),
    pickle.LONG_BINPUT: _with_number("<I", _Machine.put),
    pickle.MEMOIZE: lambda machine: machine.put(len(machine.memo)),
    pickle.NONE: _constant(lambda: None),
    pickle.NEWTRUE: _constant(lambda: True),
    pickle.NEWFALSE: _constant(lambda: False),
    pickle.FLOAT: _with_line(_pushed(float)),
    pickle.BINFLOAT: _with_number(">d", _Machine.push),
    pickle.INT: _with_line(_pushed(_integer)),
    pickle.BININT: _with_number("<i", _Machine.push),
    pickle.BININT1: _with_number("B", _Machine.push),
    pickle.BININT2: _with_number("<H", _Machine.push),
    pickle.LONG: _with_line(_pushed(lambda line: int(line.removesuffix(b"L"), 0))),
    pickle.LONG1: _with_bytes("B", _signed),
    pickle.LONG4: _with_bytes("<i", _signed),
    pickle.STRING: _with_line(_pushed(_string)),
    pickle.BINSTRING: _with_bytes("<i", _latin1),
    pickle.SHORT_BINSTRING: _with_bytes("B", _latin1),
    pickle.UNICODE: _with_line(_pushed(lambda line: line.decode("raw-unicode-escape"))),
    pickle.SHORT_BINUNICODE: _with_bytes("B", _text),
    pickle.BINUNICODE: _with_bytes("<I", _text),
    pickle.BINUNICODE8: _with_bytes("<Q", _text),
    pickle.SHORT_BINBYTES: _with_bytes("B", bytes),
    pickle.BINBYTES: _with_bytes("<I", bytes),
    pickle.BINBYTES8: _with_bytes("<Q", bytes),
    pickle.BYTEARRAY8: _with_bytes("<Q", bytearray),
    pickle.EMPTY_TUPLE: _constant(tuple),
    pickle.TUPLE: _since_mark(_pushed(tuple)),
    pickle.TUPLE1: lambda machine: machine.tuple_of(1),
    pickle.TUPLE2: lambda machine: machine.tuple_of(2),
    pickle.TUPLE3: lambda machine: machine.tuple_of(3),
    pickle.EMPTY_LIST: _constant(list),
    pickle.LIST: _since_mark(_pushed(list)),
    pickle.APPEND: lambda machine: machine.append([machine.stack.pop()]),
    pickle.APPENDS: _since_mark(_Machine.append),
    pickle.EMPTY_DICT: _constant(dict),
    pickle.DICT: _since_mark(_pushed(_dict)),
    pickle.SETITEM: lambda machine: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
    pickle.SETITEMS: _since_mark(_Machine.set_items),
    pickle.GLOBAL: lambda machine: _find(machine, *(machine.file.line().decode() for _ in range(2))),
    pickle.STACK_GLOBAL: lambda machine: _find(machine, machine.stack.pop(-2), machine.stack.pop()),
    pickle.REDUCE: _Machine.call,
    pickle.BUILD: _Machine.set_state,
}
# With names of other libraries.
_FURTHER_ACTIONS: dict[bytes, _Action] = {pickle.NEWOBJ: _Machine.call, pickle.BINPERSID: _Machine.refer}
