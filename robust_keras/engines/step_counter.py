"""The number of a training step, whatever the optimiser makes of it."""

import keras


def of(optimizer: keras.optimizers.Optimizer) -> keras.Variable:
    """The variable in which an optimiser counts the steps, one a batch, that it has taken.

    Its `iterations` are that variable, except with `gradient_accumulation_steps`: then they count updates of weights,
    of several batches each, and are no variable.
    """
    inner = _inner(optimizer)
    if in_an_update(optimizer) == 1:
        return inner.iterations
    return next(variable for variable in inner.variables if variable.name == "iteration")


def in_an_update(optimizer: keras.optimizers.Optimizer) -> int:
    """How many of these steps an optimiser takes for one update of weights."""
    return getattr(_inner(optimizer), "gradient_accumulation_steps", None) or 1


def _inner(optimizer):
    """The optimiser that counts: a `LossScaleOptimizer` leaves it to the one inside."""
    return getattr(optimizer, "inner_optimizer", optimizer)
