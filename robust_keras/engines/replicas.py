"""Batches, functions and sums over the replicas and processes of a strategy.

Functions mean the strategy whose scope they are called in; without one, that is one device.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from robust_keras import compilation

# The strategy over JAX's devices in whose scope this is, and the number of the replica whose program is being traced.
_on_jax: contextvars.ContextVar[Any] = contextvars.ContextVar("on_jax", default=None)
_number: contextvars.ContextVar[Any] = contextvars.ContextVar("number", default=None)


def current() -> Any:
    """The strategy in whose scope this is: a `tf.distribute.Strategy` or an `on_jax.strategy.JaxStrategy`."""
    return _on_jax.get() or tf.distribute.get_strategy()


def of(model: Any) -> Any:
    """The strategy that a model was made under, like `current`.

    Raises:
        ValueError: for one on JAX's devices in whose scope it was not made.
    """
    strategy = getattr(model, "strategy", None)
    if is_on_jax() and strategy is not current():
        received = f"a {type(model).__name__}" if strategy is None else "one that was made outside"
        raise ValueError(f"Expected an AdversarialModel, made in the scope of the strategy jax. Received: {received}")
    return strategy if is_on_jax(strategy) else model.distribute_strategy


def is_on_jax(strategy: Any = None) -> bool:
    """Whether a strategy, by default the current one, computes on JAX's devices."""
    return hasattr(strategy or current(), "bring_back")


@contextlib.contextmanager
def entered(strategy: Any) -> Iterator[None]:
    """Inside the context, a strategy over JAX's devices is the current one."""
    token = _on_jax.set(strategy)
    try:
        yield
    finally:
        _on_jax.reset(token)


def num_replicas() -> int:
    """How many replicas of all processes share a batch."""
    return current().num_replicas_in_sync


def number() -> tf.Tensor:
    """Which of them this is, int32, from 0; from inside a replica."""
    given = _number.get()
    return tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.int32) if given is None else given


@contextlib.contextmanager
def numbered(number: tf.Tensor) -> Iterator[None]:
    """Inside the context, where a replica's program is traced on its own, `number` says which one it is."""
    token = _number.set(number)
    try:
        yield
    finally:
        _number.reset(token)


@contextlib.contextmanager
def kept_there(execution: Any) -> Iterator[None]:
    """Inside the context, an execution of training steps may keep variables on JAX's devices from call to call."""
    look_again(execution)
    try:
        yield
    finally:
        bring_back()


def bring_back() -> None:
    """Has variables hold what they were last assigned on JAX's devices, where a program has left it there."""
    if is_on_jax():
        current().bring_back()


def look_again(execution: Any) -> None:
    """Has an execution of training steps start from what variables hold now, where it keeps them on JAX's devices."""
    if is_on_jax():
        execution.look_again()


def num_processes() -> int:
    """How many processes run this program together."""
    return len(_tasks())


def process_index() -> int:
    """Which of them this is, from 0; the first one writes the files."""
    strategy = tf.distribute.get_strategy()
    if not _has_processes(strategy):
        return 0
    return _tasks().index((strategy.cluster_resolver.task_type, strategy.cluster_resolver.task_id))


def _tasks():
    strategy = tf.distribute.get_strategy()
    if not _has_processes(strategy):
        return [("worker", 0)]
    cluster = strategy.cluster_resolver.cluster_spec()
    return [(kind, k) for kind in ("chief", "worker") if kind in cluster.jobs for k in cluster.task_indices(kind)]


def _has_processes(strategy):
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def all_processes(number: float) -> list[float]:
    """The numbers, one of each process, that they call this with at the same point: a list of floats."""
    if num_processes() == 1:
        return [float(number)]
    strategy = tf.distribute.get_strategy()
    per_process = strategy.num_replicas_in_sync // num_processes()
    mine = strategy.experimental_distribute_values_from_function(lambda _: tf.constant([float(number)]))
    return _gather(strategy)(mine).numpy()[::per_process].tolist()


@functools.cache
def _gather(strategy):
    # The identity has a device, which an argument has not.
    return tf.function(functools.partial(_run_and_gather, strategy, tf.identity), autograph=False)


def expect_same(number: float, directory: str) -> None:
    """Raises ValueError where processes found different snapshots, by number, in what should be one folder."""
    if len(set(found := all_processes(number))) > 1:
        numbers = ", ".join(f"{number:.0f}" for number in found)
        raise ValueError(f"Expected a folder that all processes share. Received: {directory} with snapshots {numbers}")


def to_replicas(batch: Any) -> Any:
    """Cuts this process's share of a batch among its replicas, in order.

    Args:
        batch: a nest of tensors `[share, ...]`; scalars go to each replica.

    Returns:
        A nest of values as `strategy.run` takes them.

    Raises:
        ValueError: for a share that does not divide among the replicas.
    """
    strategy = tf.distribute.get_strategy()
    num_replicas = strategy.num_replicas_in_sync // num_processes()
    if num_replicas == 1:
        return batch
    first = process_index() * num_replicas

    def part(context):
        k = context.replica_id_in_sync_group - first

        return _cut(batch, k, num_replicas, "replicas")

    return strategy.experimental_distribute_values_from_function(part)


def part_size(size: int, count: int, what: str = "replicas") -> int:
    """The examples in each of `count` equal parts of a batch.

    Raises:
        ValueError: for a batch that does not divide.
    """
    if size % count:
        raise ValueError(f"Expected a batch that divides among {count} {what}. Received: {size}")
    return size // count


def _cut(batch, k, count, what):
    """The k-th of `count` equal parts of a nest of tensors; scalars are in each."""

    def cut(values):
        size = part_size(values.shape[0], count, what)
        return values[k * size : (k + 1) * size]

    return tf.nest.map_structure(lambda values: cut(values) if values.shape.rank else values, batch)


def over_replicas(fn: Callable, *, jit_compile: bool = False) -> Callable:
    """Compiles a function of a batch, over all replicas of all processes.

    Args:
        fn: tensors and nests of tensors `[batch, ...]`, or scalars, to a nest of tensors `[batch, ...]`, each example
            for itself. Python's control flow is not converted, which takes longer than all other tracing.
        jit_compile: whether to compile it with XLA.

    Returns:
        A function like `fn`, to be called with the same arguments in every process. It is compiled once for each size
        of the batch, which all replicas together must divide.
    """
    if is_on_jax():
        return current().over_replicas(fn)
    # A strategy over one replica is one too: what was loaded in its scope runs nowhere else.
    strategy, has_strategy = tf.distribute.get_strategy(), tf.distribute.has_strategy()
    by_size = {}

    def compiled():
        # A new object: inner functions of one code, as of several attacks, are one to TensorFlow, which warns of a
        # function that is traced again and again.
        function = compilation.function(functools.partial(fn), jit_compile=jit_compile)
        if not has_strategy:
            return function

        run = tf.function(functools.partial(_run_and_gather, strategy, function), autograph=False)

        def call(*args):
            args = tf.nest.map_structure(tf.convert_to_tensor, args)
            with strategy.scope():
                return run(*to_replicas(_cut(args, process_index(), num_processes(), "processes")))

        return call

    def call(*args):
        size = len(tf.nest.flatten(args[0])[0])
        if size not in by_size:
            by_size[size] = compiled()
        return by_size[size](*args)

    return call


def _run_and_gather(strategy, fn, *args):
    """Runs `fn` on every replica; its results, one after another, reach every process."""
    travels = _has_processes(strategy)

    def on_replica(*args):
        results = fn(*args)
        if not travels:
            return results
        # Flags and bytes do not travel between processes.
        types = tf.nest.map_structure(lambda values: values.dtype, results)
        small = (tf.bool, tf.uint8)
        numbers = tf.nest.map_structure(lambda v: tf.cast(v, tf.int32) if v.dtype in small else v, results)
        numbers = tf.distribute.get_replica_context().all_gather(numbers, axis=0)
        return tf.nest.map_structure(tf.cast, numbers, types)

    def whole(values):
        parts = strategy.experimental_local_results(values)
        return parts[0] if travels else tf.concat(parts, axis=0)

    return tf.nest.map_structure(whole, strategy.run(on_replica, args=args))


def all_reduce(operation: str, values: list[tf.Tensor]) -> list[tf.Tensor]:
    """Sums or means over replicas, from inside a replica; between processes in one message.

    Args:
        operation: 'SUM' or 'MEAN'.
        values: a list of float32 tensors.

    Returns:
        A list like it.
    """
    if is_on_jax():  # Which does it between the halves of a step.
        return values
    context = tf.distribute.get_replica_context()
    if not _has_processes(context.strategy):
        return context.all_reduce(operation, values)
    reduced = context.all_reduce(operation, tf.concat([tf.reshape(value, (-1,)) for value in values], axis=0))
    pieces = tf.split(reduced, [value.shape.num_elements() for value in values])
    return [tf.reshape(piece, value.shape) for piece, value in zip(pieces, values)]


def update(assign: Callable, variables: Sequence[tf.Variable], *values: Sequence) -> None:
    """Calls `assign(variable, *its values)` on every replica's copy of each variable, from inside a replica.

    Args:
        assign: changes a variable.
        variables: `tf.Variable`s of the strategy.
        values: lists as long as `variables`: tensors, the same on all replicas, or variables.
    """

    extended = tf.distribute.get_strategy().extended
    for variable, *arguments in zip(variables, *values):
        extended.update(variable, assign, args=tuple(arguments), group=False)
