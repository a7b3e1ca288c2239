"""Lowered programs as files that JAX of other versions reads.

They are StableHLO in its portable form, of the oldest version of it that can say what the program does. `jax.export`
would write that of the last weeks: what JAX 0.10.2 writes, 0.7.2 does not run, and reading it takes flatbuffers.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorflow as tf
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir

from robust_keras.engines.on_jax import programs, runner
from robust_keras.engines.on_jax.execution import NOBODY, Steps
from robust_keras.engines.on_jax.strategy import running


class Artifact(NamedTuple):
    """A program in a portable form: `(*variables, *arguments) -> (*new values of variables, *results)`.

    Attributes:
        bytecode: as `stablehlo.deserialize_portable_artifact` reads it.
        text: the same for people.
        version: of StableHLO, the oldest that reads it.
        variables: whose values it takes.
    """

    bytecode: bytes
    text: str
    version: str
    variables: Sequence[tf.Variable]


def of_steps(steps: Steps) -> Artifact:
    """A training step on one device; it takes a batch's arrays by sorted names, and returns logs by sorted names.

    Raises:
        ValueError: for an operation that StableHLO does not define.
    """
    constants = [[np.asarray(each) for each in held] for held in steps.constants]

    def step(state, batch):
        state, logs = steps.step(state, batch, constants, NOBODY)
        return [*state, *tf.nest.flatten(logs)]

    return _portable(step, steps.variables, list(steps.batch.values()))


def of_program(program: programs.Program, specs: Sequence[tf.TensorSpec]) -> Artifact:
    """A program that assigns no variable.

    Args:
        program: made by `programs.lower`.
        specs: of its arguments, flat.

    Raises:
        ValueError: for an operation that StableHLO does not define.
    """
    constants = [each.numpy() for each in program.constants]
    return _portable(lambda state, given: program(given, constants, state)[0], program.variables, specs)


def _portable(fn: Callable, variables: Sequence[tf.Variable], specs: Sequence[tf.TensorSpec]) -> Artifact:
    avals = [
        [jax.ShapeDtypeStruct(tuple(each.shape), each.dtype.as_numpy_dtype) for each in some]
        for some in (variables, specs)
    ]
    with running():
        module: Any = jax.jit(fn, keep_unused=True).lower(*avals).compiler_ir("stablehlo")
    runner.check_operations(module)
    bytecode, version = _serialized(mlir.module_to_bytecode(module))
    return Artifact(bytecode, str(module), version, variables)


def _serialized(module: bytes) -> tuple[bytes, str]:
    """The portable form of a module's bytecode, and its version."""
    newest = stablehlo.get_current_version()
    oldest = stablehlo.get_version_from_compatibility_requirement(stablehlo.StablehloCompatibilityRequirement.MAX)
    for version in [oldest, *(f"1.{minor}.0" for minor in range(int(newest.split(".")[1])))]:
        with contextlib.suppress(ValueError):  # Something of it is newer.
            return _serialized_as(version, module), version
    return _serialized_as(newest, module), newest


def _serialized_as(version: str, module: bytes) -> bytes:
    with mlir.make_ir_context():
        return stablehlo.serialize_portable_artifact(mlir.ir.Module.parse(module), version)  # Which changes it.
