"""Variables whose newest values are on devices, or are not."""

import gc
import types

import jax
import numpy as np
import pytest
import tensorflow as tf

from robust_keras.engines.on_jax import variables as variables_module
from robust_keras.engines.on_jax.variables import DeviceVariables


@pytest.fixture
def put():
    """A function that notes what it puts on the device."""
    calls = []

    def put(array):
        calls.append(array)
        return jax.device_put(array)

    put.calls = calls
    return put


@pytest.fixture
def variables(put):
    return DeviceVariables(put)


def values(variables, *wanted):
    return [np.asarray(each) for each in variables.arrays(wanted)]


def test_values_are_put_once_and_brought_back_when_asked_for(variables, put):
    one, other = tf.Variable([1.0, 2.0]), tf.Variable([3.0])
    np.testing.assert_array_equal(values(variables, one, other)[0], [1.0, 2.0])
    variables.replace([one], [jax.device_put(np.float32([5.0, 6.0]))])
    np.testing.assert_array_equal(one, [1.0, 2.0])
    np.testing.assert_array_equal(values(variables, one)[0], [5.0, 6.0])
    variables.bring_back()
    np.testing.assert_array_equal(one, [5.0, 6.0])
    np.testing.assert_array_equal(values(variables, one)[0], [5.0, 6.0])
    assert len(put.calls) == 2


@pytest.mark.parametrize("is_back", [True, False])
@pytest.mark.parametrize(
    "assign, expected",
    [
        (lambda v: v.assign([7.0, 8.0]), [7.0, 8.0]),
        (lambda v: v.assign([1.0, 2.0]), [1.0, 2.0]),  # What it held before.
        (lambda v: v[0].assign(7.0), None),
    ],
)
def test_what_is_assigned_in_between_wins(variables, assign, expected, is_back):
    variable = tf.Variable([1.0, 2.0])
    variables.arrays([variable])
    variables.replace([variable], [jax.device_put(np.float32([5.0, 6.0]))])
    if is_back:
        variables.bring_back()
    assign(variable)
    expected = expected or variable.numpy()
    np.testing.assert_array_equal(values(variables, variable)[0], expected)
    variables.bring_back()
    np.testing.assert_array_equal(variable, expected)


def test_additions_of_a_host_are_noticed(variables):
    variable = tf.Variable(np.arange(1000, dtype=np.float32))
    for k in range(3):
        np.testing.assert_array_equal(values(variables, variable)[0], np.arange(1000) + k)
        variable.assign_add(np.ones(1000, np.float32))


def test_a_variable_of_which_rows_were_assigned_keeps_what_devices_made_of_it(variables, put):
    variable = tf.Variable([1.0, 2.0])
    variable[0].assign(4.0)  # From now on TensorFlow copies it whenever it is read.
    variables.arrays([variable])
    variables.replace([variable], [jax.device_put(np.float32([5.0, 6.0]))])
    np.testing.assert_array_equal(values(variables, variable)[0], [5.0, 6.0])
    variables.bring_back()
    np.testing.assert_array_equal(variable, [5.0, 6.0])
    np.testing.assert_array_equal(values(variables, variable)[0], [5.0, 6.0])
    variable[1].assign(9.0)
    np.testing.assert_array_equal(values(variables, variable)[0], [5.0, 9.0])


def test_what_python_has_a_copy_of_is_told_by_its_values(variables, put, monkeypatch):
    variable = tf.Variable([1.0, 2.0])
    elsewhere = types.SimpleNamespace(device="/job:localhost/replica:0/task:0/device:GPU:0")
    assert variables_module._address(elsewhere) is None
    monkeypatch.setattr(variables_module, "_address", lambda tensor: None)
    for k in range(2):
        assert variables.arrays([variable])[0] is variables.arrays([variable])[0]
        variable.assign([3.0, 4.0 + k])
        np.testing.assert_array_equal(values(variables, variable)[0], [3.0, 4.0 + k])
    assert len(put.calls) == 3


@pytest.mark.parametrize(
    "value", [True, np.int64(2**40), np.uint8(200), tf.constant(1.5, tf.bfloat16), np.zeros((0, 3))]
)
def test_all_types_come_and_go(variables, value):
    variable = tf.Variable(value)
    with jax.experimental.enable_x64() if not hasattr(jax, "enable_x64") else jax.enable_x64(True):
        (array,) = variables.arrays([variable])
        assert array.dtype == variable.numpy().dtype
        again = variables.arrays([variable])[0]
        assert again is array
        variables.replace([variable], [array])
        variables.bring_back()
    assert variable.numpy().tobytes() == tf.convert_to_tensor(value).numpy().tobytes()


def test_variables_that_are_gone_take_no_memory(variables):
    kept, gone = tf.Variable([1.0]), tf.Variable([2.0])
    variables.arrays([kept, gone])
    variables.replace([gone], [jax.device_put(np.float32([3.0]))])
    del gone
    gc.collect()
    assert len(variables._copies) == 1
    variables.bring_back()
