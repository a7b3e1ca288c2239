"""Checkpoints as other libraries write them, and as a hostile hand would, without these libraries."""

import io
import json
import pickle
import struct
import zipfile

import numpy as np

STORAGES = {"f2": "HalfStorage", "f4": "FloatStorage", "f8": "DoubleStorage", "i8": "LongStorage"}


class Named:
    """Pickles as what a call of `module.name` makes of `arguments`."""

    def __init__(self, module, name, *arguments):
        self.target, self.arguments = (module, name), arguments


class Storage:
    """Pickles as a reference to a storage."""

    def __init__(self, kind, key, num_elements):
        self.reference = (Reference("torch", kind), key, "cpu", num_elements)


class Reference:
    """Pickles as a name alone."""

    def __init__(self, module, name):
        self.target = (module, name)


class _Pickler(pickle._Pickler):
    def persistent_id(self, value):
        return ("storage", *value.reference) if isinstance(value, Storage) else None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Reference):
            self.write("c{}\n{}\n".format(*value.target).encode())
        elif isinstance(value, Named):
            self.write("c{}\n{}\n".format(*value.target).encode())
            super().save(value.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(value, save_persistent_id)


def pickled(value, protocol=2):
    """The bytes of a pickle."""
    file = io.BytesIO()
    _Pickler(file, protocol).dump(value)
    return file.getvalue()


def tensor(key, shape, dtype="f4", first=0, strides=None, num_elements=None):
    """A tensor as `torch.save` refers to it."""
    size = int(np.prod(shape))
    strides = strides or tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    storage = Storage(STORAGES[dtype], key, size if num_elements is None else num_elements)
    hooks = Named("collections", "OrderedDict")
    return Named("torch._utils", "_rebuild_tensor_v2", storage, first, tuple(shape), strides, False, hooks)


def archive(path, content, data, *, compression=zipfile.ZIP_STORED, folder="archive"):
    """An archive of a pickle's bytes and storages by key."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(f"{folder}/data.pkl", content)
        for key, values in data.items():
            file.writestr(f"{folder}/data/{key}", values)


def save_torch(path, named, *, nested=lambda tensors: tensors, dtype="f4"):
    """A checkpoint of arrays by name; `nested` puts what stands for them into other things."""
    arrays = {name: np.asarray(array, "i8" if array.dtype.kind == "i" else dtype) for name, array in named.items()}
    tensors = {
        name: tensor(str(key), array.shape, array.dtype.str[1:]) for key, (name, array) in enumerate(arrays.items())
    }
    data = {str(key): array.tobytes() for key, array in enumerate(arrays.values())}
    archive(path, pickled(nested(tensors)), data)


def save_legacy(path, named):
    """A checkpoint as PyTorch wrote it before 1.6."""
    tensors = {name: tensor(str(key), array.shape) for key, (name, array) in enumerate(named.items())}
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    with open(path, "wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, system, tensors, [str(key) for key in range(len(named))]):
            file.write(pickled(value))
        for array in named.values():
            file.write(struct.pack("<q", array.size) + np.asarray(array, "<f4").tobytes())


def save_npy(path, pair):
    """`np.save` of parameters and state."""
    objects = np.empty(2, object)
    objects[:] = pair
    with open(path, "wb") as file:
        np.save(file, objects)


def save_safetensors(path, named, header=None):
    """A safetensors file of float32 arrays."""
    entries, begin = {}, 0
    for name, array in named.items():
        entries[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [begin, begin + array.nbytes]}
        begin += array.nbytes
    text = json.dumps(entries | {"__metadata__": {"format": "pt"}} if header is None else header).encode()
    content = b"".join(np.asarray(array, "<f4").tobytes() for array in named.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)
