"""Parameters and state of Haiku in a `.npy` file or a plain pickle, read without JAX or Haiku."""

import re
from typing import Any, BinaryIO

import numpy as np

from robust_keras import pickled_names, pickles
from robust_keras.pickled_names import Dtype, Name, Stateful, checked
from robust_keras.saved_models.weights_in.tensors import BFLOAT16

NPY = b"\x93NUMPY"
# `np.save` of a pair, or of a dictionary, which become arrays of one or no axis of objects.
_HEADER = re.compile(
    rb"\{'descr': '\|O', 'fortran_order': (?:False|True), 'shape': \((?:|[1-9][0-9]?,)\),? *\} *\n?", re.DOTALL
)


def read_npy(file: BinaryIO, num_bytes: int) -> Any:
    """The objects in a `.npy` file: containers of names, numbers and NumPy arrays.

    Args:
        file: at its start.
        num_bytes: how many it has.

    Raises:
        Exception: of any kind, for anything else, and for a damaged file.
    """
    bounded = pickles.BoundedFile(file, num_bytes)
    version = bounded.read(len(NPY) + 2)[-2:]
    length = int.from_bytes(bounded.read(2 if version[0] == 1 else 4), "little")
    if version[0] not in (1, 2, 3) or length > 10_000 or not _HEADER.fullmatch(bounded.read(length)):
        raise ValueError("an array of numbers alone, where np.save((params, state)) writes objects")
    return checked(pickles.interpret(bounded, names=_NAMES), Array).content


def read_pickle(file: BinaryIO, num_bytes: int) -> Any:
    """The object in a pickle; see `read_npy`."""
    return pickles.interpret(pickles.BoundedFile(file, num_bytes), names=_NAMES)


class Array(Stateful):
    """An array in the making, of numbers or of objects: what it holds is its state.

    Attributes:
        content: a NumPy array, or a list of the objects.
    """

    content: np.ndarray | list

    def set_state(self, state: Any) -> None:
        """Takes what the array holds; its bytes are not copied."""
        _version, shape, dtype, is_fortran, data = checked(state, tuple)
        if checked(dtype, Dtype).dtype == object:
            self.content = checked(data, list)
            return
        if type(data) is str:  # As Python 2 wrote it.
            data = data.encode("latin1")
        pickled_names.check_data(data, (bytes,), dtype, shape)
        self.content = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if is_fortran else "C")


def _dtype(code: Any, *rest: Any) -> Dtype:
    if code is _BFLOAT16:
        return Dtype(BFLOAT16)
    return Dtype(np.dtype(object)) if code in ("O8", "O4") else pickled_names.make_dtype(code, *rest)


def _reconstruct(array_type: Any, *rest: Any) -> Array:
    del rest  # The state has the real shape.
    if array_type is not pickled_names.NDARRAY:
        raise ValueError("an array of a type of its own")
    return Array()


def _of_jax(function: Any, arguments: Any, state: Any, *rest: Any) -> Array:
    del rest  # Whether its type is weak.
    if function is not _RECONSTRUCT:
        raise ValueError("a JAX array of another making than NumPy's")
    array = _reconstruct(*checked(arguments, tuple))
    array.set_state(state)
    return array


_BFLOAT16, _RECONSTRUCT = Name(None), Name(_reconstruct)
_NAMES = {
    ("numpy", "dtype"): Name(_dtype),
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("ml_dtypes", "bfloat16"): _BFLOAT16,
    ("collections", "OrderedDict"): Name(lambda: {}),
    # By JAX's versions.
    ("jax._src.array", "_reconstruct_array"): Name(_of_jax),
    ("jax._src.device_array", "reconstruct_device_array"): Name(_of_jax),
    ("jax.interpreters.xla", "reconstruct_device_array"): Name(_of_jax),
    # By Haiku's.
    **{
        ("haiku._src.data_structures", name): Name(lambda mapping: checked(mapping, dict))
        for name in ("FlatMapping", "FlatMap", "frozendict")
    },
}
