"""Functions of TensorFlow as functions of JAX arrays."""

import jax
import numpy as np
import pytest
import tensorflow as tf

from robust_keras.engines import lowering
from robust_keras.engines.on_jax import programs, strategy


def run(program, *args):
    """The function's nest of results, and what it assigns, in the order of `written`; NumPy arrays."""
    with strategy.running():
        given = [[each.numpy() for each in of] for of in (program.constants, program.variables)]
        results, written = jax.jit(program)([np.asarray(each) for each in args], *given)
    return program.packed(map(np.asarray, results)), [np.asarray(each) for each in written]


def test_a_program_returns_what_the_function_does_and_what_it_assigns():
    kinds = {
        "read": (tf.float32, [1.0, 2.0]),
        "counted": (tf.int64, 2**40),
        "moved": (tf.float32, [0.5, 0.25]),
        "overwritten": (tf.float32, [9.0, 9.0]),
        "flag": (tf.bool, [True, False]),
        "bytes": (tf.uint8, [250, 3]),
        "narrow": (tf.bfloat16, [1.5, -2.0]),
    }
    v = {name: tf.Variable(tf.constant(value, dtype), name=name) for name, (dtype, value) in kinds.items()}
    table = tf.constant([[1.0, 2.0], [3.0, 4.0]])  # Captured, as layers do.

    def fn(x, count):
        v["counted"].assign_add(1)
        v["moved"].assign(0.5 * v["moved"] + x)
        v["overwritten"].assign(x * 2.0)  # Nobody reads it.
        v["flag"].assign(tf.logical_not(v["flag"]))
        v["bytes"].assign(v["bytes"] + tf.cast(count, tf.uint8))
        doubled = tf.while_loop(lambda k, y: k < count, lambda k, y: (k + 1, 2.0 * y), (0, v["read"] + x))[1]
        return {
            "doubled": doubled,
            "others": [tf.linalg.matvec(table, x), tf.cast(v["narrow"], tf.float32), v["narrow"]],
            "flags": (v["flag"].read_value(), v["bytes"].read_value(), v["counted"].read_value()),
        }

    before = {name: variable.numpy() for name, variable in v.items()}
    x, count = tf.constant([1.0, -1.0]), tf.constant(3)
    program = programs.lower(fn, x, count)
    results, written = run(program, x, count)
    for name, value in before.items():  # Nothing has been run by TensorFlow.
        np.testing.assert_array_equal(v[name].numpy(), value, err_msg=name)
    expected = fn(x, count)
    tf.nest.assert_same_structure(results, expected)
    for ours, theirs in zip(tf.nest.flatten(results), tf.nest.flatten(expected)):
        assert ours.dtype == theirs.numpy().dtype
        np.testing.assert_array_equal(ours, theirs)
    assert [each.name for each in program.variables] != [] and len(program.constants) == 1
    new = {variable.name.partition(":")[0]: value for variable, value in zip(program.written, written)}
    assert new.keys() == {"counted", "moved", "overwritten", "flag", "bytes"}
    for name, value in new.items():
        assert value.dtype == v[name].numpy().dtype
        np.testing.assert_array_equal(value, v[name].numpy(), err_msg=name)


def test_a_program_is_the_same_however_often_it_is_traced():
    """What is compiled is found by it in the cache of another process, which has traced other functions before."""
    weight = tf.Variable([2.0, 3.0])

    def fn(x):
        inner = tf.function(lambda y: y * weight, autograph=False)
        return inner(x) + tf.gather(weight, [1, 0])

    first = programs.lower(fn, tf.TensorSpec((2,), tf.float32))
    assert programs.lower(fn, tf.TensorSpec((2,), tf.float32)).name == first.name
    assert programs.lower(lambda x: fn(x) + 1.0, tf.TensorSpec((2,), tf.float32)).name != first.name
    np.testing.assert_array_equal(run(first, tf.ones(2))[0], [5.0, 5.0])


@pytest.mark.parametrize(
    "fn, operation",
    [
        (lambda x: tf.numpy_function(np.sin, [x], tf.float32), "PyFunc"),
        (lambda x: tf.random.stateless_gamma((2,), (1, 2), alpha=x), "StatelessRandomGamma"),
    ],
)
def test_an_operation_that_does_not_lower_is_named_in_a_line(fn, operation):
    with pytest.raises(lowering.Refused) as refused:
        programs.lower(fn, tf.TensorSpec((2,), tf.float32))
    message = str(refused.value)
    assert message.startswith("Expected operations that XLA compiles. Received: ")
    assert operation in message and "\n" not in message and __file__ in message
