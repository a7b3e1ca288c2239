import numpy as np
import pytest
import tensorflow as tf

from robust_keras import compilation, threats
from robust_keras.attacks.fab import project

pytestmark = pytest.mark.oldest


@compilation.fused
def double(x):
    return 2.0 * x


def compiled_calls(function, *args):
    """Names of functions that the traced program of `function` calls with XLA."""
    graph = function.get_concrete_function(*args).graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    return [node.name for node in nodes if "_XlaMustCompile" in node.attr and node.attr["_XlaMustCompile"].b]


def doubled(x):
    return double(x)


X = tf.constant([1.0, 2.0])


def test_is_compiled_eagerly_and_inside_a_plain_program():
    np.testing.assert_array_equal(double(X), [2.0, 4.0])
    assert compiled_calls(compilation.function(doubled), X)
    np.testing.assert_array_equal(compilation.function(doubled)(X), [2.0, 4.0])


def test_is_called_plainly_inside_a_compiled_program():
    function = compilation.function(doubled, jit_compile=True)
    assert not compiled_calls(function, X)
    np.testing.assert_array_equal(function(X), [2.0, 4.0])
    # Afterwards, and after an error, all is as before.
    with pytest.raises(ZeroDivisionError):
        compilation.function(lambda x: 1 / 0, jit_compile=True)(X)
    assert compiled_calls(compilation.function(doubled), X)


def test_is_called_plainly_on_a_tpu(monkeypatch):
    strategy = object.__new__(tf.distribute.TPUStrategy)
    monkeypatch.setattr(tf.distribute, "get_strategy", lambda: strategy)
    assert not compiled_calls(tf.function(doubled, autograph=False), X)


def test_what_somebody_asked_to_compile_is_not_compiled_again_inside_a_compiled_program(monkeypatch):
    def outer(x):
        return compilation.function(lambda x: 2.0 * x, jit_compile=True)(x)

    assert compiled_calls(tf.function(outer, autograph=False), X)
    assert not compiled_calls(compilation.function(outer, jit_compile=True), X)
    strategy = object.__new__(tf.distribute.TPUStrategy)
    monkeypatch.setattr(tf.distribute, "get_strategy", lambda: strategy)
    assert not compiled_calls(tf.function(outer, autograph=False), X)


def test_is_called_plainly_where_there_is_no_xla(monkeypatch):
    def function(fn, jit_compile=None, **_):
        assert jit_compile

        def call(*args):
            raise tf.errors.NotFoundError(None, None, "could not find registered platform with id: 0x10")

        return call

    assert compilation.has_xla()
    compilation.has_xla.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(tf, "function", function)
        assert not compilation.has_xla()
    assert not compiled_calls(tf.function(doubled, autograph=False), X)
    np.testing.assert_array_equal(double(X), [2.0, 4.0])
    compilation.has_xla.cache_clear()


def test_is_found_out_while_a_program_is_traced(mirrored):
    compilation.has_xla.cache_clear()

    @tf.function(autograph=False)
    def on_replicas(x):
        return mirrored.experimental_local_results(mirrored.run(doubled, args=(x,)))

    np.testing.assert_array_equal(on_replicas(X), [[2.0, 4.0]] * 2)
    assert compilation.has_xla.cache_info().misses == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: threats.l1_nearest(x - 0.3, 0.5 * x, epsilon=0.7),
        lambda x: project(0.5 * x, x - 0.3, tf.fill((2, 1, 1, 1), 0.1), "L2"),
        lambda x: threats.order_statistic(x, tf.constant([3, 10])),
    ],
    ids=["l1_nearest", "project", "order_statistic"],
)
def test_small_functions_are_the_same_without(function, monkeypatch):
    x = tf.constant(np.random.default_rng(0).random((2, 4, 4, 3)), tf.float32)
    plain = tf.function(function, autograph=False)
    expected = plain(x)
    assert compiled_calls(plain, x)
    monkeypatch.setattr(compilation, "has_xla", lambda: False)
    plain = tf.function(function, autograph=False)
    assert not compiled_calls(plain, x)
    np.testing.assert_allclose(plain(x), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(function(x), expected, rtol=0, atol=1e-6)
