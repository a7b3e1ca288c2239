"""Every variable that the next step of a run depends on, by name."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from robust_keras.engines import replicas
from robust_keras.models import weights
from robust_keras.training.optimizer import NesterovSGD
from robust_keras.training.program import Program

_RANDOM = "random/"  # What the names of states begin with from which layers draw random numbers.


class NonFiniteLoss(ArithmeticError):
    """The loss of a step, or a weight after it, is not finite. Neither it nor anything after it was saved."""


class RunState(NamedTuple):
    """What a snapshot holds, made by `state_of`.

    Attributes:
        variables: by name; 'step' is the optimiser's.
        kept: the names in `variables` of the weights to keep when they are the best, by the name to keep them under.
        networks: whose weights are among the variables.
    """

    variables: Mapping[str, tf.Variable]
    kept: Mapping[str, str]
    networks: Sequence[keras.Model] = ()

    def read(self, step: int) -> dict[str, np.ndarray]:
        """The variables after `step`.

        Raises:
            NonFiniteLoss: for a value that is not finite: the update after the last finite loss can make one.
        """
        replicas.bring_back()
        arrays = {name: variable.numpy() for name, variable in self.variables.items()}
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise NonFiniteLoss(f"Expected finite weights. Received: {name} with others at step {step}")
        return arrays

    def best_of(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Of what `read` returned the weights to keep, under the name to keep them under."""
        return {kept: arrays[name] for kept, name in self.kept.items()}

    def restore(self, arrays: Mapping[str, np.ndarray], path: str) -> None:
        """Gives the variables what a snapshot in `path` holds.

        Raises:
            ValueError: where those are other variables.
        """
        variables = self.variables
        if not any(name.startswith(_RANDOM) for name in arrays):  # Of an older version, or there are none.
            variables = {name: variable for name, variable in variables.items() if not name.startswith(_RANDOM)}
        shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
        saved = {name: array.shape for name, array in arrays.items()}
        if shapes != saved:
            different = sorted(name for name in shapes.keys() | saved.keys() if shapes.get(name) != saved.get(name))
            raise ValueError(f"Expected this run's variables in {path}. Received: others, such as {different[0]}")
        for name, variable in variables.items():
            variable.assign(arrays[name])
        for network in self.networks:
            weights.refresh(network)


def state_of(program: Program) -> RunState:
    """The state of a program: weights, the optimiser's, averages, and what layers draw random numbers from."""
    network, twin, optimizer = program.network, program.twin, program.model.optimizer
    name_of = {id(weight): name for name, weight in zip(program.names, network.weights, strict=True)}
    variables = {"step": optimizer.iterations.value}
    variables |= {f"weights/{name_of[id(w)]}": w.value for w in network.weights}
    if isinstance(optimizer, NesterovSGD):
        momentums = zip(network.trainable_weights, optimizer.momentums, strict=True)
        variables |= {f"momentum/{name_of[id(weight)]}": momentum.value for weight, momentum in momentums}
    else:
        kept = [variable for variable in optimizer.variables if variable is not optimizer.iterations]
        variables |= {f"optimizer/{k:03d}": variable.value for k, variable in enumerate(kept)}
    if twin is not None:
        variables |= {f"averages/{name}": w.value for name, w in zip(program.names, twin.weights, strict=True)}
    variables |= {f"{_RANDOM}{k}": state.value for k, state in enumerate(weights.random_states(network))}
    folder = "weights" if twin is None else "averages"
    networks = (network,) if twin is None else (network, twin)
    return RunState(variables, {name: f"{folder}/{name}" for name in program.names}, networks)
