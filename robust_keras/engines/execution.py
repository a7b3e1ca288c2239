"""`fit` in exact steps, several in one call, under any strategy.

Stock Keras is not able to (3.5 to 3.15, TensorFlow 2.18 to 2.21):
- an epoch of 7 steps, three in an execution, takes 9 of them;
- several steps in an execution fail on several replicas (since https://github.com/keras-team/keras/pull/20396);
- MultiWorkerMirroredStrategy fails (https://github.com/keras-team/keras/issues/20585).

`tests/engines/execution_test.py` tells when that has changed and this module can go.
"""

import functools
import itertools
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from robust_keras.engines import replicas, step_counter

_READ_TOGETHER = 1000  # Values of executions.


def fit(
    model: keras.Model,
    dataset: tf.data.Dataset | Callable[[int], Iterable],
    *,
    epochs: int = 1,
    steps_per_epoch: int | None = None,
    initial_epoch: int = 0,
    callbacks: Sequence[keras.callbacks.Callback] | None = None,
    verbose: str | int = "auto",
    pause_every: Sequence[int] = (),
    prepare: Callable[[Any, int], Any] | None = None,
    validate: Callable[[int], Callable[[], Mapping[str, float]] | None] | None = None,
    means: Container[str] | None = None,
) -> keras.callbacks.History:
    """Calls `model.train_step` on batch after batch, as `keras.Model.fit` does.

    As many steps as `model.compile(steps_per_execution=...)` says run in one compiled call. Callbacks then get the
    index and the values of its last step; at the end of an epoch they get means over its examples.

    Args:
        model: compiled in its strategy's scope. Its `train_step` returns scalars by name, alike on all replicas.
        dataset: a `tf.data.Dataset` of this process's share of each batch: nests of tensors of static shapes. It is
            read on through all epochs where `steps_per_epoch` is given, and once in each otherwise. Or a function from
            an epoch's number to its batches.
        epochs: the epoch before which to stop.
        steps_per_epoch: steps; None for the dataset's length, or, of a function, until its batches end.
        initial_epoch: the first epoch, where no callback such as `BackupAndRestore` knows better.
        callbacks: see `keras.Model.fit`, like `verbose`.
        pause_every: numbers of steps; an execution also ends at their multiples, counted by the optimiser.
        prepare: called with each batch and the optimiser's number of its step; what `train_step` gets in its place.
        validate: of the number of an epoch at its end: a function that measures further values for callbacks, or None.
        means: names of values to take means of, None for all; of others, running means, the last counts.

    Raises:
        ValueError: for a dataset of unknown length without `steps_per_epoch`, or one that ends early.
    """
    num_steps = steps_per_epoch if callable(dataset) else _length(dataset, steps_per_epoch)
    shown = {"add_progbar": verbose != 0, "verbose": 1 if verbose == "auto" else verbose}
    lengths = {"epochs": epochs, "steps": num_steps}
    told = keras.callbacks.CallbackList(callbacks, add_history=True, **shown, **lengths, model=model)
    with replicas.of(model).scope():
        _prepare(model)
        batches_of = dataset if callable(dataset) else _read_on(dataset, from_start=steps_per_epoch is None)
        logs: dict[str, float] = {}
        told.on_train_begin()
        # `BackupAndRestore` leaves it on the model.
        for epoch in range(getattr(model, "_initial_epoch", None) or initial_epoch, epochs):
            model.reset_metrics()
            told.on_epoch_begin(epoch)
            take = functools.partial(_take, iter(batches_of(epoch)), prepare, num_steps is not None)
            with replicas.kept_there(model.train_function):
                ends = _epoch(model, take, num_steps, told, pause_every)
            logs = {name: mean if means is None or name in means else last for name, (last, mean) in ends.items()}
            if validate is not None and not model.stop_training:
                logs |= _validated(validate(epoch), told)
            told.on_epoch_end(epoch, logs)
            if model.stop_training:
                break
        told.on_train_end(logs)
    return model.history


def _validated(measure, callbacks):
    """What a validation finds, if one is due; callbacks hear of its begin and its end."""
    if measure is None:
        return {}
    callbacks.on_test_begin()
    values = measure()
    callbacks.on_test_end(dict(values))
    return values


def _length(dataset, steps_per_epoch):
    num_steps = steps_per_epoch or int(dataset.cardinality())
    if num_steps < 1:
        raise ValueError(f"Expected steps_per_epoch, or a dataset that knows its length. Received: {num_steps}")
    return num_steps


def _read_on(dataset, *, from_start):
    """`(epoch) -> batches`: from the dataset's start in each epoch, or from where the last one ended."""
    if from_start:
        return lambda epoch: dataset
    iterator = iter(dataset)
    return lambda epoch: iterator


def _prepare(model):
    if not model.optimizer.built:  # No compiled step of several replicas can make variables.
        model.optimizer.build(model.trainable_variables)
    if model.train_function is None:
        model.train_function = _execution(model)
    model.stop_training = False


def _epoch(model, take, num_steps, callbacks, pause_every):
    """Takes the steps of an epoch, or as many as callbacks let it: of what they return the last value and the mean."""
    done, step, num_examples, logs, sums = int(step_counter.of(model.optimizer).numpy()), 0, 0, {}, _Sums()
    are_watched = any(map(_watches_steps, callbacks.callbacks))
    while step != num_steps and not model.stop_training:
        until = [every - done % every for every in pause_every] + ([] if num_steps is None else [num_steps - step])
        size = min([model.steps_per_execution, *until])
        if not (batches := take(size, done)):
            break
        # A smaller batch, the last one of a set, runs by itself, and so do those that have weights, or have none.
        for _, alike in itertools.groupby(batches, key=_form):
            together = list(alike)
            batch_size = _batch_size(together[0])
            callbacks.on_train_batch_begin(step)
            if are_watched:
                replicas.look_again(model.train_function)
            logs, added = model.train_function(together)
            if are_watched:
                replicas.bring_back()
            sums.add(added, batch_size)
            step, done = step + len(together), done + len(together)
            num_examples += batch_size * len(together)
            _tell(callbacks, step - 1, logs)
            if model.stop_training:
                break
    if not num_examples and not model.stop_training:
        raise ValueError("Expected batches in every epoch. Received: none in one of them")
    return {name: (float(logs[name]), value / num_examples) for name, value in sums.totals().items()}


def _tell(callbacks, step, logs):
    """Tells callbacks of the end of a step. Of JAX's devices, values come only for who does not ask when they are due:
    Keras' list of callbacks would wait for them at each step.
    """
    if not replicas.is_on_jax():
        callbacks.on_train_batch_end(step, logs)
        return
    numbers: dict[str, float] = {}
    for callback in callbacks.callbacks:
        if getattr(callback, "reads_when_due", False):
            callback.on_train_batch_end(step, logs)
        elif _hears_of(callback, {"on_batch_end", "on_train_batch_end"}):
            numbers = numbers or {name: float(value) for name, value in logs.items()}
            callback.on_train_batch_end(step, dict(numbers))


def _watches_steps(callback):
    """Whether a callback may read or change weights between steps: they have to be where Python finds them."""
    if not isinstance(callback, keras.callbacks.LambdaCallback):
        if type(callback).__module__.partition(".")[0] in ("keras", "robust_keras"):
            return isinstance(getattr(callback, "save_freq", None), int)
    return _hears_of(callback, {"on_batch_begin", "on_batch_end", "on_train_batch_begin", "on_train_batch_end"})


def _hears_of(callback, names):
    """Whether a callback has functions of its own by any of these names."""
    stock = keras.callbacks.Callback
    return any(name in vars(callback) or getattr(type(callback), name) is not getattr(stock, name) for name in names)


class _Sums:
    """Adds up what executions return, without waiting for each."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, Mapping[str, Any]]] = []
        self._totals: dict[str, float] = {}

    def add(self, values: Mapping[str, Any], factor: int) -> None:
        """Adds scalars by name, each `factor` times."""
        self._waiting.append((factor, values))
        if len(self._waiting) == _READ_TOGETHER:
            self.totals()

    def totals(self) -> dict[str, float]:
        """The sums so far."""
        for factor, values in self._waiting:
            for name, value in values.items():
                self._totals[name] = self._totals.get(name, 0.0) + factor * float(value)
        self._waiting.clear()
        return self._totals


def _form(batch):
    return [(tuple(each.shape), each.dtype) for each in tf.nest.flatten(batch)]


def _batch_size(batch):
    """The examples in a batch; 1 for what has none."""
    shape = tf.nest.flatten(batch)[0].shape
    return shape[0] if len(shape) else 1


def _take(iterator, prepare, must_be_there, size, step):
    """The next `size` batches; fewer, and none, at the end of what has no known length."""
    batches = []
    for k in range(size):
        try:
            batch = next(iterator)
        except StopIteration:
            if not must_be_there:
                break
            raise ValueError(
                f"Expected {size - k} more batches, for the steps of an epoch; a dataset's repeat() gives them. "
                "Received: the end of the dataset"
            ) from None
        batches.append(batch if prepare is None else prepare(batch, step + k))
    return batches


def _execution(model):
    """`(batches) -> (logs, sums)`: a step on each batch of a list, at most `steps_per_execution` of them, with what the
    last one returns and the sums over all of them.
    """
    strategy = replicas.of(model)
    most = model.steps_per_execution
    if replicas.is_on_jax(strategy):
        from robust_keras.engines.on_jax.execution import Execution  # JAX need not be there.

        return Execution(model, strategy)

    def run(step, *args):
        logs = strategy.run(step, args=args)
        return tf.nest.map_structure(lambda value: strategy.experimental_local_results(value)[0], logs)

    def one_step(batch):
        return run(model.train_step, batch)

    def step_of(batches, k):
        return model.train_step(tf.nest.map_structure(lambda values: values[:, k], batches))

    def indexed_step(batches, k):
        return run(step_of, batches, k)

    if not model.run_eagerly:
        # As Keras does, without converting Python's control flow, which takes longer than all other tracing.
        one_step, indexed_step = (tf.function(step, autograph=False) for step in (one_step, indexed_step))

    def all_steps(batches, num_steps):
        def another(k, _, sums):
            logs = indexed_step(batches, k)
            return k + 1, logs, tf.nest.map_structure(tf.add, sums, logs)

        logs = indexed_step(batches, tf.constant(0))
        first = tf.constant(1), logs, logs
        return tf.while_loop(lambda k, *_: k < num_steps, another, first, maximum_iterations=most - 1)[1:]

    if not model.run_eagerly:
        all_steps = tf.function(all_steps, autograph=False)

    def execute(batches):
        if most == 1:
            logs = one_step(replicas.to_replicas(batches[0]))
            return logs, logs
        # One shape, however many there are; the examples stay in front, where replicas are cut.
        filled = batches + batches[-1:] * (most - len(batches))
        stacked = tf.nest.map_structure(lambda *values: tf.stack(values, axis=1), *filled)
        return all_steps(replicas.to_replicas(stacked), tf.constant(len(batches)))

    return execute
