"""What `tf.Variable`s hold, on JAX's devices.

A program's new values stay on the devices until somebody asks for them: `bring_back`. Whatever assigns to a variable in
between is noticed when it is looked at again, and wins.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import tensorflow as tf


class DeviceVariables:
    """Copies of variables on devices.

    Args:
        put: makes an array on all devices of a NumPy array.
    """

    def __init__(self, put: Callable[[np.ndarray], jax.Array]) -> None:
        self._put = put
        self._copies: dict[int, _Copy] = {}

    def arrays(self, variables: Sequence[tf.Variable]) -> list[jax.Array]:
        """What the variables hold, of those that were assigned to since they were last looked at anew."""
        return [self._copy_of(variable).array for variable in variables]

    def replace(self, variables: Sequence[tf.Variable], arrays: Sequence[jax.Array]) -> None:
        """Notes new values; the variables do not have them yet. The old arrays may be gone."""
        for variable, array in zip(variables, arrays, strict=True):
            copy = self._copies[id(variable)]
            copy.array, copy.is_newer = array, True

    def bring_back(self) -> None:
        """Gives the variables the values that only devices have."""
        newer = [copy for copy in self._copies.values() if copy.is_newer and not copy.array.is_deleted()]
        try:
            values = jax.device_get([copy.array for copy in newer])
        except jax.errors.JaxRuntimeError:  # Of the program that should have made them.
            for copy in newer:
                copy.array, copy.is_newer = None, False
            raise
        for copy, value in zip(newer, values):
            if (variable := copy.variable()) is None:
                continue
            variable.assign(np.array(value))  # Of its own: the array's memory may be used anew.
            copy.seen, copy.is_newer = _Content(variable), False

    def _copy_of(self, variable):
        copy = self._copies.get(id(variable))
        content = _Content(variable)
        if copy is None:
            copy = self._copies[id(variable)] = _Copy(weakref.ref(variable, self._forget(id(variable))))
        # An error between a program and `replace` leaves what the program was given: arrays that are gone.
        if copy.array is None or copy.array.is_deleted() or not content.is_same(copy.seen, variable):
            copy.array, copy.seen, copy.is_newer = self._put(content.tensor.numpy()), content, False
        return copy

    def _forget(self, key):
        copies = self._copies
        return lambda _: copies.pop(key, None)


class _Copy:
    """A variable's value on devices, and what the variable held when it was last the same."""

    def __init__(self, variable: weakref.ref) -> None:
        self.variable = variable
        self.array: Any = None
        self.seen: Any = None
        self.is_newer = False


class _Content:
    """What a variable holds. Its memory is not written to while this is kept: whoever assigns takes another."""

    def __init__(self, variable: tf.Variable) -> None:
        self.tensor = variable.read_value()
        self._address = _address(self.tensor)

    def is_same(self, other: "_Content", variable: tf.Variable) -> bool:
        """Whether nobody has assigned to the variable since it held the other one."""
        if self._address is not None and self._address == other._address:
            return True
        # TensorFlow copies a variable whenever it is read, once rows of it were assigned.
        if self._address is not None and self._address == _address(variable.read_value()):
            return False
        return self.tensor.numpy().tobytes() == other.tensor.numpy().tobytes()


def _address(tensor: tf.Tensor) -> int | None:
    try:
        return np.frombuffer(memoryview(tensor), np.uint8).ctypes.data
    except (ValueError, TypeError, BufferError):  # No elements, or of a type that Python's buffers do not know.
        return None
