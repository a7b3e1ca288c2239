"""Tries out, in about a minute, whether training and evaluation work on the hardware at hand.

    python scripts/self_test.py --strategy=tpu

Trains a small network on the digits that come with the package and checks its steps, weight averaging, checkpoints,
going on from one, export, and an attack: pass or FAIL each. The first thing to run on a new TPU or GPU machine.
"""

from robust_keras.commands import launcher  # isort: skip  Before TensorFlow is imported.

import contextlib
import io
import itertools
import posixpath
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
from absl import flags

_NUM_STEPS = 4
_TAU = 0.5
# Of a loss that two kinds of devices compute: TPUs multiply in bfloat16.
_TOLERANCE = 0.05


def run(*, strategy: str | None = None, tpu: str | None = None, workdir: str | None = None) -> bool:
    """Runs the checks and prints a line for each.

    Args:
        strategy: see `strategies.strategy`, 'auto' by default.
        tpu: see there.
        workdir: a new folder for what the checks write, which several processes share; a temporary one by default.

    Returns:
        Whether all passed.

    Raises:
        ValueError: for a strategy that is not there, or a folder in use, before any check.
    """
    import tensorflow as tf

    from robust_keras.engines import replicas, strategies

    chosen = strategies.strategy(strategy or "auto", tpu=tpu)
    with chosen.scope():
        num_processes, process = replicas.num_processes(), replicas.process_index()

    def meet():
        """Each process has what the first one wrote."""
        with chosen.scope():
            replicas.all_processes(0)

    with contextlib.ExitStack() as stack:
        if workdir is None:
            if num_processes > 1:
                raise ValueError("Expected a --workdir that all processes share. Received: none")
            workdir = stack.enter_context(tempfile.TemporaryDirectory())
        with chosen.scope():
            in_use = any(replicas.all_processes(tf.io.gfile.exists(posixpath.join(workdir, "run"))))
        if in_use:
            raise ValueError(f"Expected a new --workdir. Received: {workdir}")
        num_replicas = chosen.num_replicas_in_sync
        print(strategies.announcement(strategy or "auto", tpu=tpu))
        print(
            f"{type(chosen).__name__}, {num_replicas} replicas, {num_processes} processes, TensorFlow {tf.__version__}"
        )
        test = _Test(workdir, num_replicas, {"strategy": strategy, "tpu": tpu}, process, meet)
        checks = (test.step, test.averaging, test.checkpoint, test.restore, test.export, test.attack)
        passed = [_passes(check, meet) for check in checks]
    return all(passed)


def _passes(check: Callable[[], str], meet: Callable[[], None]) -> bool:
    """Runs one check and prints its line."""
    meet()
    started = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found, right = check(), True
    except Exception as error:  # Whatever a device may raise is what is asked for.
        found, right = " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]]), False
    seconds = time.perf_counter() - started
    print(f"{'pass' if right else 'FAIL'}  {check.__name__:<10}  {seconds:5.1f} s  {found}", flush=True)
    return right


class _Test:
    """The checks: each returns what it found, or raises."""

    def __init__(self, workdir: str, num_replicas: int, where: dict, process: int, meet: Callable[[], None]):
        self._run_path = posixpath.join(workdir, "run")
        self._process, self._meet = process, meet
        self._workdir, self._num_replicas, self._where = workdir, num_replicas, where

    def step(self) -> str:
        """The compiled step, against the same step on one device."""
        losses = self._losses(self._train("run", **self._where))
        one = self._losses(self._train(f"one_device_{self._process}", strategy="one"))
        _expect(np.isfinite(losses).all() and len(losses) == _NUM_STEPS, f"{_NUM_STEPS} finite losses", losses)
        difference = np.max(np.abs(np.divide(losses, one) - 1))
        _expect(difference < _TOLERANCE, f"losses within {_TOLERANCE:.0%} of one device's {one}", losses)
        return f"losses {losses[0]:.4f} to {losses[-1]:.4f}, within {difference:.1e} of one device"

    def averaging(self) -> str:
        """The averages after each step, from the weights after it."""
        storage = [self._snapshot(step).arrays for step in range(1, _NUM_STEPS + 1)]
        names = [name.removeprefix("momentum/") for name in storage[0] if name.startswith("momentum/")]
        largest = 0.0
        for step, (before, after) in enumerate(itertools.pairwise(storage), start=1):
            decay = min(_TAU, (1 + step) / (10 + step))
            for name in names:
                average = decay * before[f"averages/{name}"] + (1 - decay) * after[f"weights/{name}"]
                largest = max(largest, np.abs(after[f"averages/{name}"] - average).max())
        _expect(largest < 1e-5, "averages within 1e-5 of their recursion", largest)
        return f"{len(names)} averages, within {largest:.1e}"

    def checkpoint(self) -> str:
        """Complete and intact, after every step."""
        sizes = [sum(array.nbytes for array in self._snapshot(step).arrays.values()) for step in (1, _NUM_STEPS)]
        steps = [int(self._snapshot(step).arrays["step"]) for step in range(1, _NUM_STEPS + 1)]
        _expect(steps == list(range(1, _NUM_STEPS + 1)), "a checkpoint of each step", steps)
        return f"{_NUM_STEPS} checkpoints of {sizes[-1] / 2**20:.1f} MiB"

    def restore(self) -> str:
        """A run that goes on from the middle ends where the other did."""
        from robust_keras import storage

        middle = self._snapshot(_NUM_STEPS // 2)
        if self._process == 0:
            path = posixpath.join(self._workdir, "restored", "checkpoints")
            storage.write(path, middle.step, middle.arrays, middle.info)
        self._meet()
        losses = self._losses(self._train("restored", **self._where))
        expected = self._losses(self._run_path)
        difference = np.max(np.abs(np.divide(losses, expected) - 1))
        _expect(difference < 1e-3, f"losses of the undisturbed run, {expected}", losses)
        return f"losses within {difference:.1e} of the undisturbed run"

    def export(self) -> str:
        """The SavedModel gives the logits of the network."""
        import tensorflow as tf

        from robust_keras.data import sources
        from robust_keras.saved_models import export, load

        images = tf.constant(sources.load("digits", "test").images[:64], tf.float32) / 255.0
        network, _ = export.network_of_run(self._run_path)
        expected = network(images, training=False).numpy()
        served = load.load_logits_fn(posixpath.join(self._run_path, "saved_model"))
        difference = np.abs(served(images).numpy() - expected).max()
        _expect(difference < 1e-3 and np.ptp(expected) > 0, "the network's logits", f"a difference of {difference}")
        return f"logits within {difference:.1e}"

    def attack(self) -> str:
        """Attacked images, verified and counted, against the same on one device."""
        from robust_keras.commands import evaluate

        def robust(name, **where):
            return evaluate.run(
                saved_model=posixpath.join(self._run_path, "saved_model"),
                dataset="digits",
                gin_files=["eval/pgd40.gin", "threats/linf_digits.gin"],
                gin_params=[
                    "pgd40/pgd.num_steps = 4",
                    "evaluate.allow_chance = True",
                    "evaluate.progress = False",
                    f"evaluate.batch_size = {16 * self._num_replicas}",
                ],
                num_examples=128,
                workdir=posixpath.join(self._workdir, name),
                **where,
            )

        ours = robust("attack", **self._where)
        _expect(ours["robust_accuracy"] <= ours["clean_accuracy"], "no more robust than clean", ours)
        one = robust(f"attack_one_device_{self._process}", strategy="one")
        difference = abs(ours["robust_accuracy"] - one["robust_accuracy"])
        _expect(difference <= _TOLERANCE, f"a robust accuracy near {one['robust_accuracy']}", ours["robust_accuracy"])
        shown = [f"{100 * ours[name]:.1f} %" for name in ("clean_accuracy", "robust_accuracy")]
        return f"clean {shown[0]}, robust {shown[1]}, within {100 * difference:.1f} points of one device"

    def _train(self, name, **where):
        from robust_keras.commands import train

        workdir = posixpath.join(self._workdir, name)
        batch_size = 4 * self._num_replicas * max(1, 8 // self._num_replicas)
        train.run(
            gin_files=["quickstart.gin"],
            gin_params=[
                f"TRAIN_STEPS = {_NUM_STEPS}",
                f"TAU = {_TAU}",
                f"BATCH_SIZE = {batch_size}",
                "STATISTICS_GROUP_SIZE = 4",
                "train.checkpoint_every = 1",
                f"train.num_checkpoints = {_NUM_STEPS}",
                "train.log_every = 1",
                f"train.validate_every = {_NUM_STEPS}",
                f"train.validation_batch_size = {batch_size}",
                "train.progress = False",
                "pgd40/pgd.num_steps = 4",
            ],
            workdir=workdir,
            **where,
        )
        return workdir

    def _losses(self, workdir):
        from robust_keras import storage

        snapshot = storage.read(posixpath.join(workdir, "checkpoints"), _NUM_STEPS)
        return [row["loss"] for row in snapshot.info["rows"]]

    def _snapshot(self, step):
        from robust_keras import storage

        return storage.read(posixpath.join(self._run_path, "checkpoints"), step)


def _expect(is_right, expected, received):
    if not is_right:
        raise ArithmeticError(f"Expected {expected}. Received: {received}")


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    launcher.define_strategy(values)
    flags.DEFINE_string(
        "workdir", None, "A new folder, which several processes share; a temporary one by default.", flag_values=values
    )


def main(values: flags.FlagValues) -> None:
    """Runs the command with the values of its flags."""
    if not run(strategy=values.strategy, tpu=values.tpu, workdir=values.workdir):
        sys.exit(1)


def command() -> None:
    """Runs the command as it was typed."""
    launcher.launch(main, define_flags, __doc__)
