"""Functions that TensorFlow traces, as functions of JAX arrays.

    program = programs.lower(fn, *specs)
    results = program(*arrays, *constants, *variables)  # Inside `jax.jit`.

The StableHLO that TensorFlow makes becomes the lowering of a JAX primitive, so that `jit`, its donation, `shard_map`,
loops and the cache of compiled programs apply to it. As much as `jax2tf.call_tf` does for functions that assign no
variables.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import tensorflow as tf
from jax.extend.core import Primitive
from jax.interpreters import mlir

from robust_keras.engines import lowering

_call = Primitive("robust_keras_program")
_call.multiple_results = True
# Of StableHLO's element types NumPy's, where the names differ from bits and a letter.
_DTYPES = {"i1": np.bool_, "f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": jax.numpy.bfloat16}
_CALLS = ("callee", "called_computations", "decomposition")  # Attributes that name functions.


class Program:
    """A lowered function; `lower` makes it.

    Attributes:
        results: a nest of `tf.TensorSpec` like what the function returns.
        constants: tensors that it takes after its arguments.
        variables: `tf.Variable`s whose values it takes after those.
        written: those of them that it assigns, whose new values it returns after its flat results.
        outputs: shapes and types of all that it returns.
    """

    def __init__(self, traced: lowering.Traced, *, exact: bool) -> None:
        self.results = traced.results
        self.constants = [each for each in traced.captured if not isinstance(each, tf.Variable)]
        self.variables = [each for each in traced.captured if isinstance(each, tf.Variable)]
        context = mlir.make_ir_context()
        with context:
            module = mlir.ir.Module.parse(traced.program("stablehlo_serialized", exact=exact))
            outputs = _main(module).type.results
            num_arguments = len(_main(module).type.inputs) - len(traced.captured)
            # Where the arrays of `captured`, in its order, are among `constants` and `variables`.
            by_kind = [*self.constants, *self.variables]
            self._captured = [next(k for k, each in enumerate(by_kind) if each is wanted) for wanted in traced.captured]
            self._num_results = len(tf.nest.flatten(self.results))
            self.written = [traced.captured[number - num_arguments] for number in _written(module)]
            _tidy(module)
            self.bytecode = mlir.module_to_bytecode(module)
            text = str(module.operation.get_asm(enable_debug_info=False))
            self.outputs = tuple(_aval(output) for output in outputs)
        if len(self.outputs) != self._num_results + len(self.written):
            raise ValueError(
                f"Expected a program that returns {self._num_results} results and {len(self.written)} variables. "
                f"Received: {len(self.outputs)} values"
            )
        # The same in each process that makes the same program, as the cache of compiled ones needs it.
        self.name = f"program_{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def packed(self, results: Sequence[Any]) -> Any:
        """Flat results as the function's nest of them."""
        return tf.nest.pack_sequence_as(self.results, list(results))

    def __call__(self, arguments: Sequence[Any], constants: Sequence[Any], variables: Sequence[Any]) -> tuple:
        """`(results, written)`: a flat list of results and the new values of `written`; call it inside `jax.jit`."""
        captured = [*constants, *variables]
        outputs = _call.bind(*arguments, *(captured[k] for k in self._captured), program=self)
        return outputs[: self._num_results], outputs[self._num_results :]


def lower(fn: Callable, *args: Any, exact: bool = False) -> Program:
    """Lowers a function for arguments of the shapes of `args`.

    Args:
        fn: of tensors, see `lowering.trace`.
        *args: nests of `tf.TensorSpec` or tensors.
        exact: see `lowering.Traced.program`.

    Raises:
        lowering.Refused: for an operation that does not lower, which is named.
    """
    return Program(lowering.trace(fn, *args), exact=exact)


@_call.def_abstract_eval
def _abstract(*arguments: Any, program: Program) -> tuple:
    del arguments
    return tuple(jax.core.ShapedArray(output.shape, output.dtype) for output in program.outputs)


def _lower(context: Any, *operands: Any, program: Program) -> Any:
    module = mlir.ir.Module.parse(program.bytecode, context.module_context.context)
    types = list(_main(module).type.results)
    name = mlir.merge_mlir_modules(context.module_context.module, program.name, module)
    call = mlir.ir.Operation.create(
        "func.call",
        results=types,
        operands=list(operands),
        attributes={"callee": mlir.ir.FlatSymbolRefAttr.get(name)},
    )
    return list(call.results)


mlir.register_lowering(_call, _lower)


def _main(module: Any) -> Any:
    return next(each for each in module.body.operations if each.attributes["sym_name"].value == "main")


def _written(module: Any) -> list[int]:
    """The numbers of the parameters that main returns new values of, in the order of these."""
    aliases = [
        (int(each["output_index"][0]), each["alias"]["parameter_number"].value)
        for each in module.operation.attributes["mhlo.input_output_alias"]
    ]
    return [number for _, number in sorted(aliases)]


def _aval(output: Any) -> jax.ShapeDtypeStruct:
    element = str(output.element_type)
    dtype = _DTYPES.get(element) or np.dtype(element.replace("ui", "uint") if "ui" in element else f"int{element[1:]}")
    return jax.ShapeDtypeStruct(tuple(output.shape), dtype)


def _tidy(module: Any) -> None:
    """Leaves out what only TensorFlow asks for, and names and orders the functions anew: both count traces."""
    operation = module.operation
    names = [getattr(each, "name", each) for each in operation.attributes]  # Names, of newer versions.
    for attribute in [name for name in names if name.startswith("mhlo.")]:
        del operation.attributes[attribute]
    operation.attributes["sym_name"] = mlir.ir.StringAttr.get("program")
    copies: list = []
    operation.walk(lambda each: _note_copy(each, copies))
    for copy in copies:
        copy.result.replace_all_uses_with(copy.operands[0])
        copy.erase()
    functions = {each.attributes["sym_name"].value: each for each in module.body.operations}
    called = ["main"]
    for name in called:  # And those that these call.
        functions[name].operation.walk(lambda each: _note_calls(each, called))
    for name in functions.keys() - called:
        functions.pop(name).erase()
    last = functions["main"]
    for k, name in enumerate(called[1:]):
        functions[name].move_after(last)
        last = functions[name]
        mlir.ir.SymbolTable.set_symbol_name(last, f"_{k}")
        mlir.ir.SymbolTable.replace_all_symbol_uses(name, f"_{k}", operation)


def _note_calls(operation: Any, called: list) -> Any:
    for attribute in _CALLS:
        if attribute in operation.attributes:
            names = re.findall(r'@"?([^",\]\s]+)', str(operation.attributes[attribute]))
            called += [name for name in names if name not in called]
    return mlir.ir.WalkResult.ADVANCE


def _note_copy(operation: Any, copies: list) -> Any:
    if operation.name == "mhlo.copy":
        copies.append(operation)
    return mlir.ir.WalkResult.ADVANCE
