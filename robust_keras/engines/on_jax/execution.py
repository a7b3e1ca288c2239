"""Executions of training steps on JAX's devices."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorflow as tf
from jax import lax
from jax.sharding import PartitionSpec

from robust_keras.engines.halves import Halves
from robust_keras.engines.on_jax import programs
from robust_keras.engines.on_jax.strategy import AXIS, EVERYWHERE, JaxStrategy, running, unbroken

_IN_FLIGHT = 2  # Executions that devices may have before them.


class Others(NamedTuple):
    """What a device takes from the other ones that share a batch.

    Attributes:
        number: `() -> int32`, which of them it is.
        sum: of arrays over all of them.
        mean: the same.
        joined: their parts of an array, one after another.
    """

    number: Callable
    sum: Callable
    mean: Callable
    joined: Callable


_AROUND = Others(
    lambda: lax.axis_index(AXIS).astype(np.int32),
    functools.partial(lax.psum, axis_name=AXIS),
    functools.partial(lax.pmean, axis_name=AXIS),
    functools.partial(lax.all_gather, axis_name=AXIS, tiled=True),
)
NOBODY = Others(lambda: np.int32(0), *[lambda array: array] * 3)  # Of a device by itself.


class Execution:
    """`(batches) -> (logs, sums)`, as `engines.execution` has it, of a model whose steps have two halves.

    On each device a program attacks its part of a batch and differentiates; what it finds is added up over devices, and
    a second program updates the variables, which stay there. Several steps are one loop on the devices.

    Args:
        model: compiled in the strategy's scope, with `begin_step`; see `training.steps`.
        strategy: over JAX's devices.

    Raises:
        ValueError: for another model.
    """

    def __init__(self, model: Any, strategy: JaxStrategy) -> None:
        if not hasattr(model, "begin_step"):
            raise ValueError(f"Expected an AdversarialModel for the strategy jax. Received: a {type(model).__name__}")
        if model.run_eagerly:
            raise ValueError("Expected run_eagerly=False for the strategy jax. Received: True")
        self._model, self._strategy = model, strategy
        self._compiled: dict[tuple, Steps] = {}
        self._steps: Steps | None = None  # Whose variables `_state` are.
        self._state: list[jax.Array] = []
        self._in_flight: list = []

    def __call__(self, batches: list) -> tuple[Mapping, Mapping]:
        """Takes a step on each batch; see the class."""
        most = self._model.steps_per_execution
        flat = [[np.asarray(each) for each in tf.nest.flatten(batch)] for batch in batches]
        key = tuple((each.dtype, each.shape) for each in flat[0])
        if key not in self._compiled:
            self._compiled[key] = Steps(self._model, self._strategy, batches[0], most)
        steps = self._compiled[key]
        # One shape, however many there are.
        filled = flat + flat[-1:] * (most - len(flat))
        stacked = flat[0] if most == 1 else [np.stack(values) for values in zip(*filled)]
        with running():
            with unbroken():
                if self._steps is not steps:
                    self._steps, self._state = steps, self._strategy.variables.arrays(steps.variables)
                self._state, logs, sums = steps.take(self._state, stacked, len(batches))
                self._strategy.variables.replace(steps.variables, self._state)
            self._in_flight.append(logs)
            if len(self._in_flight) > _IN_FLIGHT:
                jax.block_until_ready(self._in_flight.pop(0))
        return logs, sums

    def look_again(self) -> None:
        """Has the next step start from what the variables hold by then."""
        self._steps = None


class Steps:
    """The steps of a model on batches of one shape, at most so many in a call.

    Attributes:
        variables: whose values the steps take and give.
        batch: specifications of a batch's arrays, by sorted names.
        constants: what the two programs of a step take besides.
    """

    def __init__(self, model: Any, strategy: JaxStrategy, batch: Any, most: int) -> None:
        self._strategy, self._most = strategy, most
        self.batch = {name: tf.TensorSpec(each.shape, each.dtype) for name, each in sorted(batch.items())}
        share = {name: strategy.share(each) for name, each in self.batch.items()}
        halves = Halves(model)
        self._begin = programs.lower(halves.begin, tf.TensorSpec((), tf.int32), share)
        added, averaged, same, predictions = self._begin.results
        # Only metrics read the batch once more, all of it.
        predictions = tf.nest.map_structure(strategy.whole, predictions)
        read = {name: each for name, each in self.batch.items() if name != "image"} if model.has_metrics else {}
        self._read = list(read)
        self._update = programs.lower(halves.update, added, averaged, same, predictions, read)
        used = {id(each): each for each in [*self._begin.variables, *self._update.variables]}
        self.variables = list(used.values())
        self._place = {key: k for k, key in enumerate(used)}
        self.constants = [strategy.constants(self._begin), strategy.constants(self._update)]
        batches = PartitionSpec(AXIS) if most == 1 else PartitionSpec(None, AXIS)
        self._spec = batches
        self._counts: dict[int, jax.Array] = {}  # Numbers of steps, on the devices.
        run = strategy.on_each(
            self._one if most == 1 else self._several, (EVERYWHERE, batches, EVERYWHERE, EVERYWHERE), EVERYWHERE
        )
        self._run = jax.jit(run, donate_argnums=0)

    @property
    def logs(self) -> Mapping[str, tf.TensorSpec]:
        """Specifications of what a step returns, by sorted names."""
        return dict(sorted(self._update.results.items()))

    def take(self, state: list, batch: list, num_steps: int) -> tuple[list, Mapping, Mapping]:
        """Takes steps.

        Args:
            state: what the variables hold; gone afterwards.
            batch: NumPy arrays of a batch by sorted names; of several, one after another along a new first axis.
            num_steps: of those in `batch`.

        Returns:
            `(state, logs, sums)`: new values of the variables, what the last step returned, and the sums over all.
        """
        if num_steps not in self._counts:
            self._counts[num_steps] = self._strategy.put(np.asarray(num_steps, np.int32))
        arrays = [self._strategy.put(each, self._spec) for each in batch]
        return self._run(state, arrays, self._counts[num_steps], self.constants)

    def _one(self, state, batch, num_steps, constants):
        del num_steps
        state, logs = self.step(state, batch, constants, _AROUND)
        return state, logs, logs

    def _several(self, state, batches, num_steps, constants):
        def step(k, carried):
            state, _, sums = carried
            state, logs = self.step(state, [values[k] for values in batches], constants, _AROUND)
            return state, logs, jax.tree.map(lax.add, sums, logs)

        none = {name: np.zeros(each.shape, each.dtype.as_numpy_dtype) for name, each in self._update.results.items()}
        return lax.fori_loop(0, num_steps, step, (state, none, none))

    def step(self, state: list, batch: list, constants: list, others: Others) -> tuple[list, Mapping]:
        """One step on a device, inside `jax.jit`.

        Args:
            state: what the variables hold.
            batch: the device's part, arrays by sorted names.
            constants: of the programs, as `constants` has them.
            others: with which the batch is shared.

        Returns:
            `(state, logs)`.
        """
        of_begin, of_update = constants
        found, _ = self._begin([others.number(), *batch], of_begin, self._held(state, self._begin))
        added, averaged, same, predictions = self._begin.packed(found)
        added = [others.sum(each) for each in tf.nest.flatten(added)]
        averaged = [others.mean(each) for each in tf.nest.flatten(averaged)]
        read = [others.joined(each) for name, each in zip(self.batch, batch) if name in self._read]
        given = [*added, *averaged, *tf.nest.flatten(same), *map(others.joined, tf.nest.flatten(predictions)), *read]
        logs, written = self._update(given, of_update, self._held(state, self._update))
        state = list(state)
        for variable, value in zip(self._update.written, written, strict=True):
            state[self._place[id(variable)]] = value
        return state, self._update.packed(logs)

    def _held(self, state: list, program: programs.Program) -> list:
        return [state[self._place[id(variable)]] for variable in program.variables]
