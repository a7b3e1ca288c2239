"""A network's own operations, called again with fewer passes over memory and, if asked, in bfloat16.

    search_fn = rewritten(logits_fn, dtype="bfloat16")

Any network is read from the graph that it traces: its weights are constants of an evaluation, so that what depends on
them alone is computed once, and what lies between two convolutions becomes one program that XLA compiles, with a
gradient that keeps its inputs alone. In bfloat16 the convolutions after the first one take and return bfloat16; the
pixels, all sums and what comes after the last convolution stay float32.

Values are those of the network but for rounding; gradients are those by the images.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import tensorflow as tf

from robust_keras import compilation
from robust_keras.models import graph_reading, norm_act
from robust_keras.models.graph_reading import Node, Unsupported

CONVOLUTIONS = ("Conv2D", "DepthwiseConv2dNative")
# These keep the type of their first input.
_REARRANGE = ("Pad", "MirrorPad", "MaxPool", "AvgPool", "Transpose", "Reshape", "Squeeze", "StridedSlice")
# Smaller tensors are not worth a call of a compiled program.
_WORTH_COMPILING = 2**14


def rewritten(logits_fn: Callable, *, dtype: str = "float32") -> Callable:
    """A function like `logits_fn`, of the same network with the weights that it has when it is first traced.

    Args:
        logits_fn: float32 images to logits, of TensorFlow's operations.
        dtype: of the convolutions after the first: 'float32' or 'bfloat16'.

    Returns:
        A function of images of a known shape, which raises Unsupported where the graph holds what is not understood
        here, such as a gradient of its own or a loop, and where nothing in it would be computed in bfloat16.
    """
    programs: dict[tuple, _Program] = {}

    @tf.autograph.experimental.do_not_convert
    def rewritten_fn(x):
        shape = tuple(x.shape)
        if shape not in programs:
            programs[shape] = _Program(graph_reading.read(logits_fn, tf.TensorSpec(shape)), is_low=dtype == "bfloat16")
        return programs[shape].run(x)

    return rewritten_fn


class _Part(NamedTuple):
    """An elementwise operation that has not run yet.

    Attributes:
        node: the operation.
        shape: of what it returns.
    """

    node: Node
    shape: tf.TensorShape


class _Program:
    """A graph that is called again.

    Attributes:
        is_low: whether it computes in bfloat16.
        low_convolutions: names of the convolutions that then do.
    """

    def __init__(self, graph: graph_reading.Graph, *, is_low: bool) -> None:
        self._graph, self.is_low = graph, is_low
        self._consumers: dict[str, list[Node]] = {}
        behind_convolution: set[str] = set()
        self.low_convolutions: set[str] = set()
        for node in graph.nodes:
            for reference in node.inputs:
                self._consumers.setdefault(reference, []).append(node)
            names = {reference.partition(":")[0] for reference in node.inputs}
            if node.op in CONVOLUTIONS and names & behind_convolution:
                self.low_convolutions.add(node.name)
            if node.op in CONVOLUTIONS or names & behind_convolution:
                behind_convolution.add(node.name)
        if is_low and not self.low_convolutions:
            raise Unsupported("a network without a second convolution")
        self._low_weights: dict[str, tf.Tensor] = {}

    def run(self, x: tf.Tensor) -> tf.Tensor:
        """The outputs for images `x`."""
        values: dict[str, Any] = dict(self._graph.known)
        values[self._graph.input] = x
        for node in self._graph.nodes:
            arguments = [values[reference] for reference in node.inputs]
            if self._is_elementwise(node, arguments):
                values[f"{node.name}:0"] = _Part(node, _shape_of(arguments))
                continue
            tensors = [
                self._tensor(reference, values) if isinstance(value, _Part) else value
                for reference, value in zip(node.inputs, arguments)
            ]
            for k, output in enumerate(graph_reading.call(node, self._converted(node, tensors))):
                values[f"{node.name}:{k}"] = output
        return tf.cast(self._tensor(self._graph.output, values), tf.float32)

    def _is_elementwise(self, node, arguments):
        if node.op not in graph_reading.ELEMENTWISE or not graph_reading.is_float32(node):
            return False
        if node.op == "BiasAdd" and node.attributes.get("data_format", b"NHWC") != b"NHWC":
            return False
        return (_shape_of(arguments).num_elements() or 0) >= _WORTH_COMPILING

    def _converted(self, node, tensors):
        """The inputs of an operation in the type that it computes in."""
        if node.op in _REARRANGE:
            return tensors
        is_low = self.is_low and node.name in self.low_convolutions
        wanted = tf.bfloat16 if is_low else tf.float32

        def converted(reference, tensor):
            if tensor.dtype not in (tf.float32, tf.bfloat16) or tensor.dtype == wanted:
                return tensor
            if reference not in self._graph.known:
                return tf.cast(tensor, wanted)
            if reference not in self._low_weights:
                with tf.init_scope():
                    self._low_weights[reference] = tf.cast(tensor, wanted)
            return self._low_weights[reference]

        return list(map(converted, node.inputs, tensors))

    def _tensor(self, reference, values):
        """The tensor of a reference; what has not run yet does now, and is kept."""
        if not isinstance(values[reference], _Part):
            return values[reference]
        inside = self._cluster(reference, values)
        places = {each: k for k, each in enumerate(inside)}
        leaves: list[str] = []

        def argument(reference):
            if reference in places:
                return "step", places[reference]
            if reference in self._graph.known and (number := _number(values[reference])) is not None:
                return "number", number
            if reference not in leaves:
                leaves.append(reference)
            return "leaf", leaves.index(reference)

        nodes = [values[each].node for each in inside]
        steps = tuple((n.op, n.attributes.get("alpha"), tuple(map(argument, n.inputs))) for n in nodes)
        tensors = [self._tensor(leaf, values) for leaf in leaves]
        is_constant = tuple(leaf in self._graph.known for leaf in leaves)
        values[reference] = _fused(steps, tensors, is_constant, self._type_of(reference, tensors))
        return values[reference]

    def _cluster(self, reference, values):
        """References of the operations that run as one with the last of them, in order: those whose values nobody else
        reads.
        """
        chosen = {reference}
        candidates = list(_parts_before(reference, values))
        for each in sorted(candidates, key=lambda name: -self._graph.places[name.partition(":")[0]]):
            readers = [f"{node.name}:0" for node in self._consumers.get(each, ())]
            if each != self._graph.output and readers and all(reader in chosen for reader in readers):
                chosen.add(each)
        return sorted(chosen, key=lambda name: self._graph.places[name.partition(":")[0]])

    def _type_of(self, reference, tensors):
        """The type in which the value of a cluster is kept."""
        readers = self._consumers.get(reference, ())
        low_inputs = any(tf.is_tensor(each) and each.dtype == tf.bfloat16 for each in tensors)
        feeds = any(node.name in self.low_convolutions for node in readers)
        goes_on = any(node.op in graph_reading.ELEMENTWISE or node.op in _REARRANGE[:4] for node in readers)
        return tf.bfloat16 if self.is_low and (feeds or (low_inputs and goes_on)) else tf.float32


def _parts_before(reference: str, values: dict) -> Iterator[str]:
    """References of the operations that have not run yet and that a value needs, each once."""
    waiting, seen = [reference], set()
    while waiting:
        for each in values[waiting.pop()].node.inputs:
            if each not in seen and isinstance(values[each], _Part):
                seen.add(each)
                waiting.append(each)
                yield each


def _number(constant):
    """The only number of a constant; None where it has more."""
    return constant.numpy().item() if constant.shape.num_elements() == 1 else None


def _shape_of(arguments):
    return functools.reduce(tf.broadcast_static_shape, (tf.TensorShape(each.shape) for each in arguments))


def _fused(steps, tensors, is_constant, dtype):
    """Elementwise operations on tensors, as one program with its own gradient; see `_compute` for `steps`."""
    varying = [each for each, constant in zip(tensors, is_constant) if not constant]
    constants = [each for each, constant in zip(tensors, is_constant) if constant]
    times = norm_act.channels_in_row(varying[0])
    if times == 1 or not _are_by_channel(varying, constants):
        return _run_fused(steps, varying, constants, is_constant, dtype)
    with tf.init_scope():
        constants = [tf.tile(tf.reshape(each, [-1]), [times]) for each in constants]
    rows = map(norm_act.in_rows, varying)
    return tf.reshape(_run_fused(steps, rows, constants, is_constant, dtype), varying[0].shape)


def _are_by_channel(varying, constants):
    """Whether tensors have one known shape, and constants a number for each channel."""
    shape = varying[0].shape
    same = shape.is_fully_defined() and all(each.shape == shape for each in varying)
    return same and all(each.shape.num_elements() == each.shape[-1] == shape[-1] for each in constants)


def _run_fused(steps, varying, constants, is_constant, dtype):
    @tf.custom_gradient
    def run(*varying):
        def gradient(upstream):
            return _gradient(steps, is_constant, varying, constants, upstream)

        return _forward(steps, is_constant, varying, constants, dtype), gradient

    return run(*varying)


@compilation.fused
def _forward(steps, is_constant, varying, constants, dtype):
    return norm_act.rounded(_compute(steps, is_constant, map(norm_act.as_float32, varying), constants), dtype)


@compilation.fused
def _gradient(steps, is_constant, varying, constants, upstream):
    tensors = [norm_act.as_float32(each) for each in varying]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(tensors)
        y = _compute(steps, is_constant, tensors, constants)
    found = tape.gradient(y, tensors, norm_act.as_float32(upstream), unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return [norm_act.rounded(each, tensor.dtype) for each, tensor in zip(found, varying)]


def _compute(steps, is_constant, varying, constants):
    """The last of `steps`, each an operation, its `alpha` and where its arguments come from."""
    varying, constants = iter(varying), iter(constants)
    leaves = [next(constants if constant else varying) for constant in is_constant]
    results: list[tf.Tensor] = []
    for op, alpha, arguments in steps:
        given = [{"step": results, "leaf": leaves}[kind][k] if kind != "number" else k for kind, k in arguments]
        results.append(graph_reading.raw(op, given, {} if alpha is None else {"alpha": alpha}))
    return results[-1]
