"""What `torch.save` writes, read without PyTorch: zip archives, and what it wrote before version 1.6."""

import functools
import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from robust_keras import pickles, zip_files
from robust_keras.pickled_names import Name, Stateful, checked
from robust_keras.saved_models.weights_in.tensors import BFLOAT16, Storage, Tensor

_PICKLE_BYTES = 2**26  # WRN-106-16's has 60 KB.
_MOST_MEMBERS, _DIRECTORY_BYTES = 100_000, 2**24
# What `torch.save` wrote first, before version 1.6.
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_BEGIN = b"\x80\x02\x8a\x0a" + _MAGIC.to_bytes(10, "little") + b"."
_DTYPES = {
    "FloatStorage": np.dtype("f4"),
    "DoubleStorage": np.dtype("f8"),
    "HalfStorage": np.dtype("f2"),
    "BFloat16Storage": BFLOAT16,
    "LongStorage": np.dtype("i8"),
    "IntStorage": np.dtype("i4"),
    "ShortStorage": np.dtype("i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_OTHER_NAMES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


class _StorageType(Name):
    """What a name such as `torch.FloatStorage` stands for; it can be referred to, not called."""

    def __init__(self, dtype: np.dtype) -> None:
        super().__init__(None)
        self.dtype = dtype


class _Dict(dict, Stateful):
    """An `OrderedDict`, made empty; its own attributes, such as a state dict's `_metadata`, are left out."""

    def __init__(self) -> None:
        super().__init__()

    def set_state(self, state: Any) -> None:
        """Leaves it."""
        checked(state, dict if type(state) is dict else _Dict)


class _Settings(Stateful):
    """An `argparse.Namespace`, as training scripts keep beside weights; what it says is left out."""

    def set_state(self, state: Any) -> None:
        """Leaves it."""
        checked(state, dict)


def is_legacy(begin: bytes) -> bool:
    """Whether a file that begins so is of PyTorch before version 1.6."""
    return begin.startswith(_BEGIN)


def read_zip(file: BinaryIO, num_bytes: int) -> Any:
    """The object in an archive of `torch.save`: containers of names, numbers and `Tensor`s.

    Args:
        file: can seek and read.
        num_bytes: how many it has.

    Raises:
        Exception: of any kind, for anything else, and for a damaged archive. No more was unpacked than the object's own
            pickle.
    """
    archive = zipfile.ZipFile(_Bounded(file, num_bytes))  # type: ignore[arg-type, call-overload]
    members = {info.filename: info for info in archive.infolist()}
    if len(members) != len(archive.infolist()) or len(members) > _MOST_MEMBERS:
        raise ValueError("an archive with members of one name, or too many")
    if len(found := [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]) != 1:
        raise ValueError("an archive without a data.pkl, or with several")
    folder = found[0].removesuffix("data.pkl")
    if any(name.startswith(f"{folder}code/") for name in members):
        raise ValueError(
            "a TorchScript archive, which is a program, where torch.save(model.state_dict(), FILE) is read"
        )
    member = functools.partial(_member, file, num_bytes)
    order = _byte_order(member, members.get(f"{folder}byteorder"))

    def make(key, dtype, num_elements):
        if (info := members.get(f"{folder}data/{key}")) is None:
            raise ValueError(f"a storage {key[:100]} that is not in the archive")
        return Storage(key, dtype.newbyteorder(order), info.file_size, member(info))

    size = members[found[0]].file_size
    content = io.BytesIO(member(members[found[0]], most_bytes=_PICKLE_BYTES)(0, size))
    return pickles.interpret(pickles.BoundedFile(content, size), names=_NAMES, persistent=_Storages(make))


def read_legacy(file: BinaryIO, num_bytes: int) -> Any:
    """The object in a file of PyTorch before version 1.6; see `read_zip`."""
    bounded = pickles.BoundedFile(file, num_bytes)
    places: dict[str, int] = {}  # Known behind the object that refers to them.

    def read(key, begin, end):
        file.seek(places[key] + begin)
        return file.read(end - begin)

    def make(key, dtype, num_elements):
        num_bytes = num_elements * dtype.itemsize
        return Storage(key, dtype.newbyteorder("<"), num_bytes, functools.partial(read, key))

    bounded.read(len(_BEGIN))
    if pickles.interpret(bounded) != _PROTOCOL:
        raise ValueError("another protocol of torch.save")
    if checked(pickles.interpret(bounded), dict).get("little_endian") is not True:
        raise ValueError("numbers with their highest byte first, or no word on it")
    storages = _Storages(make)
    content = pickles.interpret(bounded, names=_NAMES, persistent=storages)
    keys = [checked(key, str) for key in checked(pickles.interpret(bounded), list)]
    if sorted(keys) != sorted(storages.made):
        raise ValueError("other storages than its tensors have")
    position = bounded.position
    for key in keys:
        file.seek(position)
        (count,) = struct.unpack("<q", file.read(8)) if position + 8 <= num_bytes else (-1,)
        storage = storages.made[key]
        places[key], position = position + 8, position + 8 + storage.num_bytes
        if count * storage.dtype.itemsize != storage.num_bytes or position > num_bytes:
            raise ValueError(f"a storage {key[:100]} that is cut off, or of another size than was said")
    return content


class _Storages:
    """Makes storages of what a pickle says of them, one for each key.

    Args:
        make: makes one of its key, the type and the number of its elements.

    Attributes:
        made: by their keys.
    """

    def __init__(self, make: Callable[[str, np.dtype, int], Storage]) -> None:
        self._make = make
        self.made: dict[str, Storage] = {}

    def __call__(self, reference: Any) -> Storage:
        """The storage that is referred to."""
        kind, storage_type, key, _place, num_elements, *view = checked(reference, tuple)
        if kind != "storage" or not isinstance(storage_type, _StorageType) or view not in ([], [None]):
            raise ValueError("a reference to another thing than a storage")
        if type(num_elements) is not int or not 0 <= num_elements < 2**40:
            raise ValueError("a storage of an impossible size")
        if checked(key, str) not in self.made:
            self.made[key] = self._make(key, storage_type.dtype, num_elements)
        storage = self.made[key]
        if storage.dtype.newbyteorder("=") != storage_type.dtype:
            raise ValueError(f"a storage {key[:100]} of two types")
        if storage.num_bytes != num_elements * storage.dtype.itemsize:
            raise ValueError(f"a storage {key[:100]} of {storage.num_bytes:,} bytes for {num_elements:,} numbers")
        return storage


class _Bounded:
    """A file of which no large part is read at once: what a directory says of its own size is not believed."""

    def __init__(self, file: BinaryIO, num_bytes: int) -> None:
        self._file, self._num_bytes = file, num_bytes
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, num_bytes: int = -1) -> bytes:
        if num_bytes > _DIRECTORY_BYTES:
            raise ValueError("an archive whose directory is too large")
        left = min(self._num_bytes - self._file.tell(), _DIRECTORY_BYTES)
        return self._file.read(left if num_bytes < 0 else min(num_bytes, left))


def _member(
    file: BinaryIO, num_bytes: int, info: zipfile.ZipInfo, most_bytes: int | None = None
) -> Callable[[int, int], bytes]:
    """A function that reads from one byte of a member to another, and checks the whole member first, once."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
        raise ValueError(f"a compressed or encrypted {info.filename[:100]}")
    if most_bytes is not None and info.file_size > most_bytes:
        raise ValueError(f"{info.filename[:100]} of {info.file_size:,} bytes")
    begin = zip_files.begin_of(file, info)
    if begin + info.file_size > num_bytes:
        raise ValueError(f"{info.filename[:100]} that is cut off")
    is_whole: list[bool] = []

    def read(first: int, end: int) -> bytes:
        if not is_whole:
            file.seek(begin)
            is_whole.append(_checksum(file, info.file_size) == info.CRC)
        if not is_whole[0]:
            raise ValueError(f"damaged bytes in {info.filename[:100]}")
        file.seek(begin + first)
        return file.read(end - first)

    return read


def _checksum(file: BinaryIO, num_bytes: int) -> int:
    found = 0
    while num_bytes > 0 and (part := file.read(min(num_bytes, 2**20))):
        found, num_bytes = zlib.crc32(part, found), num_bytes - len(part)
    return found


def _byte_order(member: Callable, info: zipfile.ZipInfo | None) -> str:
    said = b"little" if info is None else member(info, most_bytes=10)(0, info.file_size)
    if said not in (b"little", b"big"):
        raise ValueError("numbers in another order of their bytes than little or big")
    return "<" if said == b"little" else ">"


def _rebuilt(storage: Any, first: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    del rest  # Whether it has a gradient, hooks, metadata.
    return Tensor(storage, first, shape, strides)


def _parameter(data: Any, *rest: Any) -> Tensor:
    del rest
    return checked(data, Tensor)


_NAMES = {
    **{("torch", name): _StorageType(dtype) for name, dtype in _DTYPES.items()},
    **{("torch", name): Name(None) for name in _OTHER_NAMES},
    ("torch._utils", "_rebuild_tensor"): Name(_rebuilt),
    ("torch._utils", "_rebuild_tensor_v2"): Name(_rebuilt),
    ("torch._utils", "_rebuild_parameter"): Name(_parameter),
    ("torch", "Size"): Name(lambda sizes: checked(sizes, tuple)),
    ("torch", "device"): Name(lambda kind, index=0: f"{checked(kind, str)}:{checked(index, int)}"),
    ("collections", "OrderedDict"): Name(_Dict),
    ("argparse", "Namespace"): Name(_Settings),
}
