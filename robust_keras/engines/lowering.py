"""A function of tensors, and of the variables that it reads and assigns, as the program that XLA takes.

    traced = lowering.trace(model.train_step, batch)
    text = traced.program("stablehlo")

Nothing is run: TensorFlow lowers the function for the CPU.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from robust_keras import compilation

_LIBRARIES = tuple(os.path.dirname(module.__file__) + os.sep for module in (tf, keras))
_NO_KERNEL = re.compile(r"(\w+) \(No registered '\1' OpKernel[^{]*{{node ([^}]+)}}")
_NODE = re.compile(r"{{node ([^}]+)}}")


class Refused(ValueError):
    """TensorFlow cannot lower a function.

    Attributes:
        lines: why not, a line each.
        operations: TensorFlow's operations, by name.
    """

    def __init__(self, lines: tuple, operations: Mapping[str, tf.Operation]) -> None:
        first = lines[0] if lines else "unknown"
        super().__init__(f"Expected operations that XLA compiles. Received: {first}")
        self.lines, self.operations = lines, operations


class Traced:
    """A function that is traced for arguments of given shapes, made by `trace`.

    Attributes:
        operations: TensorFlow's operations, by name.
        results: a nest of `tf.TensorSpec` like what the function returns.
        captured: what the program takes after the flat arguments, in order: a `tf.Variable` or a tensor each.
    """

    def __init__(self, function: Any, specs: list[tf.TensorSpec]) -> None:
        concrete = function.get_concrete_function(*specs)
        self._function, self._specs = function, specs
        self.operations = dict(_operations(concrete.graph))
        self.results = tf.nest.map_structure(
            lambda each: tf.TensorSpec(each.shape, each.dtype), concrete.structured_outputs
        )
        variables = {id(variable.handle): variable for variable in concrete.graph.variables}
        self.captured = [variables.get(id(each), each) for each in concrete.captured_inputs]

    def program(self, stage: str, *, exact: bool = False) -> Any:
        """The lowered program.

        Args:
            stage: 'stablehlo' for its text, 'stablehlo_serialized' for bytes.
            exact: whether products of float32 are float32 on every device: by themselves, TPUs round their factors to
                bfloat16, and GPUs to TensorFloat-32.

        Raises:
            Refused: where TensorFlow cannot make it.
        """
        before = tf.config.experimental.tensor_float_32_execution_enabled()
        tf.config.experimental.enable_tensor_float_32_execution(before and not exact)
        try:
            return self._function.experimental_get_compiler_ir(*self._specs)(stage=stage)
        except (ValueError, tf.errors.OpError) as error:
            raise Refused(tuple(_refusals(str(error), self.operations)), self.operations) from error
        finally:
            tf.config.experimental.enable_tensor_float_32_execution(before)


def trace(fn: Callable, *args: Any) -> Traced:
    """Traces a function as XLA would have it, with no functions of its own compiled inside.

    Args:
        fn: a function of tensors, as `tf.function(autograph=False)` takes it; it may read and assign variables.
        *args: what to call it with: nests of tensors or of `tf.TensorSpec`, whose values don't matter.

    Raises:
        Refused: for Python that asks for a tensor's value.
        ValueError: as the function does while it is traced, for arguments of unknown shape, and with TensorFlow 2.18,
            which makes no StableHLO.
    """
    if tuple(map(int, tf.__version__.split(".")[:2])) < (2, 19):
        raise ValueError(f"Expected TensorFlow 2.19 or newer, which makes StableHLO. Received: {tf.__version__}")
    # Of arguments that are tensors XLA would know the values, and take shapes that depend on them.
    specs = [_spec(each) for each in tf.nest.flatten(args)]
    compiled = compilation.function(lambda *flat: fn(*tf.nest.pack_sequence_as(args, flat)), jit_compile=True)
    try:
        return Traced(compiled, specs)
    except tf.errors.OperatorNotAllowedInGraphError as error:
        asks = f"Python that asks for a tensor's value: {str(error).partition('. ')[0]}"
        raise Refused((asks,), {}) from error


def named(operation: tf.Operation) -> str:
    """An operation's type and name, and the line of Python that made it."""
    frames = [frame for frame in operation.traceback or () if not frame.filename.startswith(_LIBRARIES)]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{operation.type} {operation.name}{place}"


def _spec(each: Any) -> tf.TensorSpec:
    if isinstance(each, tf.TensorSpec):
        return each
    tensor = tf.convert_to_tensor(each)
    return tf.TensorSpec(tensor.shape, tensor.dtype)


def _operations(graph: Any) -> Iterator[tuple[str, tf.Operation]]:
    """Names and operations of a graph and of the functions that it calls; the outermost of a name comes last."""
    for function in getattr(graph, "_functions", {}).values():
        if inner := getattr(function, "graph", None):
            yield from _operations(inner)
    for operation in graph.get_operations():
        yield operation.name, operation


def _refusals(message: str, operations: Mapping[str, tf.Operation]) -> Iterator[str]:
    """Lines about the operations that the bridge's message names."""
    message = message.removeprefix("Failed getting HLO text: ").strip("'")
    without_kernel = dict.fromkeys(_NO_KERNEL.findall(message))
    for kind, _ in without_kernel:
        every = [named(operation) for operation in operations.values() if operation.type == kind]
        yield from (f"no kernel of XLA: {each}" for each in every or [kind])
    if not without_kernel:
        reason = re.split(r"\n\s*\n|\n(?=The op is created)|\t", message)[0]
        names = [named(operations[name]) if name in operations else name for name in _NODE.findall(message)]
        yield f"not compiled: {', '.join([*dict.fromkeys(names), ' '.join(_NODE.sub('', reason).split())])}"
