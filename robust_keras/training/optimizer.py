"""The paper's optimiser."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from robust_keras.engines import replicas
from robust_keras.training import weight_decay as decayed


def adamw(
    learning_rate: Any,
    *,
    weight_decay: float = 0.05,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-8,
    undecayed: Sequence[str] = (),
) -> keras.optimizers.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), whose weight decay leaves scales and offsets of normalisation alone.

    Args:
        learning_rate: a float or a Keras schedule.
        weight_decay: of which a step takes its learning rate's part off the weights.
        beta_1: decay of the mean gradient.
        beta_2: decay of the mean squared gradient.
        epsilon: added to its root.
        undecayed: names of further weights that do not decay, such as 'bias'.
    """
    made = keras.optimizers.AdamW(
        learning_rate, weight_decay=weight_decay, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon
    )
    if undecayed:
        made.exclude_from_weight_decay(var_names=[f"^{name}$" for name in [*undecayed, *decayed.NAMES]])
    return made


_NOT_TAKEN = ("clipnorm", "clipvalue", "global_clipnorm", "use_ema", "loss_scale_factor", "gradient_accumulation_steps")


@keras.saving.register_keras_serializable(package="robust_keras")
class NesterovSGD(keras.optimizers.Optimizer):
    """SGD with Nesterov momentum, the learning rate outside the momentum, and coupled L2 weight decay.

        g = gradient + weight_decay * w;  v = momentum * v + g;  w = w - learning_rate * (g + momentum * v)

    `keras.optimizers.SGD` keeps the learning rate inside v, so the two part ways when the rate changes, and its weight
    decay is decoupled. Here the decay is the gradient of `weight_decay * ||w||^2 / 2` added to the loss. It covers
    kernels and biases, and never scales and offsets of normalisation, nor what `exclude_from_weight_decay` names.
    Gradients are summed over replicas, in one message between processes.

    Args:
        learning_rate: a float or a function of the step (int64 scalar, 0 at the first).
        momentum: of the buffer v, which starts at 0.
        weight_decay: factor of the L2 term.
        name: of the optimiser.
        **kwargs: of `keras.optimizers.Optimizer`, none of which changes gradients or weights.

    Raises:
        ValueError: for a clipping, averaging or scaling of Keras' own.
    """

    def __init__(
        self,
        learning_rate: float | Callable = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        name: str = "nesterov_sgd",
        **kwargs: Any,
    ) -> None:
        if given := [f"{name}={kwargs[name]!r}" for name in _NOT_TAKEN if kwargs.get(name)]:
            raise ValueError(f"Expected NesterovSGD without {', '.join(_NOT_TAKEN)}. Received: {', '.join(given)}")
        schedule = learning_rate
        if callable(schedule):
            learning_rate = lambda: schedule(self.iterations.value)  # noqa: E731
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.momentum = momentum
        # Not the base class' `weight_decay`, which would be decoupled.
        self.l2 = weight_decay
        self._undecayed: tuple[set[int], list[str]] = set(), []

    def exclude_from_weight_decay(
        self, var_list: Sequence[keras.Variable] | None = None, var_names: Sequence[str] | None = None
    ) -> None:
        """Names further variables that are not decayed; see `keras.optimizers.Optimizer.exclude_from_weight_decay`.

        Args:
            var_list: variables.
            var_names: regular expressions that are searched for in variables' paths, such as 'bias'.

        Raises:
            ValueError: for an optimiser that is already built.
        """
        if self.built:
            raise ValueError("Expected exclude_from_weight_decay before the optimiser is built. Received: after it")
        self._undecayed = {id(variable) for variable in var_list or ()}, list(var_names or ())

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Makes the momentum of each variable."""
        if self.built:
            return
        super().build(variables)
        self.momentums = [self.add_variable_from_reference(variable, name="momentum") for variable in variables]
        self._optimized = list(variables)
        undecayed, names = self._undecayed
        self._decays = [
            not (decayed.is_scale_or_offset(v) or id(v) in undecayed or any(re.search(name, v.path) for name in names))
            for v in variables
        ]

    def apply(
        self, grads: Sequence[tf.Tensor | None], trainable_variables: Sequence[keras.Variable] | None = None
    ) -> None:
        """Sums gradients over replicas and takes a step. A variable without a gradient (None) stays as it is.

        Args:
            grads: one for each variable.
            trainable_variables: those that the optimiser was built with, which builds it where it is not; None for all.

        Raises:
            ValueError: for other variables than the optimiser's.
        """
        if trainable_variables is not None and not self.built:
            self.build(list(trainable_variables))
        variables = self._optimized if trainable_variables is None else list(trainable_variables)
        index = {id(variable): k for k, variable in enumerate(self._optimized)}
        if len(grads) != len(variables) or any(id(variable) not in index for variable in variables):
            raise ValueError(
                "Expected a gradient for each of the variables that the optimiser was built with. Received: "
                f"{len(grads)} for {len(variables)}, others among them"
            )
        steps = [(index[id(v)], v, gradient) for v, gradient in zip(variables, grads) if gradient is not None]
        if steps:
            self._step(*zip(*steps))
        self.iterations.assign_add(1)

    def _step(self, indices, variables, gradients):
        rate = tf.cast(self.learning_rate, tf.float32)

        def step(variable, gradient, velocity, decays):
            learning_rate = tf.cast(rate, variable.dtype)
            if decays:
                gradient = gradient + self.l2 * variable
            velocity.assign(self.momentum * velocity + gradient)
            variable.assign_sub(learning_rate * (gradient + self.momentum * velocity))

        replicas.update(
            step,
            [variable.value for variable in variables],
            replicas.all_reduce("SUM", list(gradients)),
            [self.momentums[k].value for k in indices],
            [self._decays[k] for k in indices],
        )
        for variable in variables:
            if variable.constraint is not None:
                variable.assign(variable.constraint(variable))

    def get_config(self) -> dict:
        """The arguments, as Keras saves them."""
        return {**super().get_config(), "momentum": self.momentum, "weight_decay": self.l2}
