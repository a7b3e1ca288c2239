"""The number of a training step, whatever the optimiser makes of it."""

import keras


def of(optimizer: keras.optimizers.Optimizer) -> keras.Variable:
    """The variable in which an optimiser counts the steps, one a batch, that it has taken.

    Its `iterations` are that variable, except with `gradient_accumulation_steps`: then they count updates of weights,
    of several batches each, and are no variable.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # A `LossScaleOptimizer` leaves the counting to it.
    if not getattr(inner, "gradient_accumulation_steps", None):
        return inner.iterations
    return next(variable for variable in inner.variables if variable.name == "iteration")
