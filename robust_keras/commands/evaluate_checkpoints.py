"""Attacks the checkpoints of a training run, each as it is written, in a process beside the one that trains.

    python scripts/evaluate_checkpoints.py --run=runs/at --gin_file=gin/eval/pgd40.gin --num_examples=1000

Each has an evaluation in a folder of its own, and a line in accuracies.csv. The command ends with the run's last step,
and goes on where it was when it is given again. It reads the run's folder, and changes nothing of the run.
"""

from robust_keras.commands import launcher  # isort: skip  Before TensorFlow is imported.

import functools
import pathlib
import posixpath
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from robust_keras.commands import evaluate, evaluated_images

if TYPE_CHECKING:
    from robust_keras import storage

COLUMNS = ("step", "num_examples", "clean_accuracy", "robust_accuracy", "interval_low", "interval_high")
WEIGHTS = ("raw", "averaged")
HELD_OUT = "held_out"
_STEP = re.compile(r"step-(\d{8})/?")
_KEPT = "weights"  # Folder of those of the snapshot that is evaluated: the run may remove it meanwhile.


class _Run(NamedTuple):
    """A run that is followed.

    Attributes:
        folder: its own.
        config: its gin configuration; empty where it was started from Python.
        weights: which of `WEIGHTS` are evaluated.
        dataset: what on, as results.json has it.
        last_step: its last one, or None where that is not known.
    """

    folder: str
    config: str
    weights: str
    dataset: dict[str, Any]
    last_step: int | None


def run(
    *,
    run: str,
    gin_files: Sequence[str],
    workdir: str | None = None,
    gin_params: Sequence[str] = (),
    weights: str | None = None,
    dataset: str | None = None,
    split: str = "test",
    num_examples: int | None = None,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    timeout: float | None = None,
    strategy: str | None = None,
    tpu: str | None = None,
) -> dict[int, dict[str, Any]]:
    """Evaluates the snapshots of a run that there are, and those that come, the oldest first.

    Args:
        run: the run's folder; it may be about to be made.
        gin_files: what to attack with, read in order.
        workdir: where evaluations go; by default `run`/evaluations/<the name of the gin files>-<weights>.
        gin_params: further bindings.
        weights: 'raw' or 'averaged'; by default averaged ones where the run averages.
        dataset: as `data.sources.load` takes it; the run's own by default.
        split: see there, or 'held_out' for the images by which the run chooses its best weights.
        num_examples: how many examples, the first ones; None for all.
        data_dir: where data sets are, see there, like `cache_dir`.
        timeout: seconds to wait for the next snapshot; None for ever, 0 for those alone that there are.
        strategy: see `strategies.strategy`, 'auto' by default, like `tpu`.

    Returns:
        The results of all snapshots that have been evaluated, by step, dictionaries as in results.json.

    Raises:
        ValueError: for bad input, before any attack; for a run that does not begin in time, and a folder of other
            evaluations, or in use by a command.
    """
    from robust_keras import ownership
    from robust_keras.engines import replicas
    from robust_keras.evaluation import examples

    # A run begins at chance.
    gin_params = ["evaluate.allow_chance = True", *gin_params]
    attacks = evaluate.configured(gin_files, gin_params, strategy=strategy, tpu=tpu)
    with attacks.within.scope():
        if (num_processes := replicas.num_processes()) > 1:
            raise ValueError(f"Expected one process to evaluate a run's checkpoints. Received: {num_processes}")
    given = {"name": dataset, "split": split, "num_examples": num_examples}
    of = _described(run, _config_of(run, timeout), weights, given)
    places = {"data_dir": data_dir, "cache_dir": cache_dir}
    load_images = functools.cache(functools.partial(evaluated_images.source, of.dataset, **places))
    examples.first(load_images(), num_examples)  # What is missing shows now.
    workdir = workdir or _default_workdir(of, gin_files)
    with ownership.lock(workdir, what="an evaluation of a run's checkpoints"):
        _claim(workdir, of, attacks.config)
        _follow(of, workdir, attacks, load_images, timeout)
        return _tell(workdir)


def _config_of(folder: str, timeout: float | None) -> str:
    """The configuration of a run; waits until there is one, or a snapshot of a run from Python."""
    import tensorflow as tf

    from robust_keras import storage
    from robust_keras.training import following

    since, told = time.monotonic(), False
    while True:
        config = storage.read_text(posixpath.join(folder, "config.gin"))
        if config or storage.steps(posixpath.join(folder, "checkpoints")):
            return config
        is_late = timeout is not None and time.monotonic() - since >= timeout
        if is_late or tf.io.gfile.exists(posixpath.join(folder, "results.json")):
            raise ValueError(f"Expected the folder of a training run. Received: {folder}, without one")
        if not told:
            missing = "" if tf.io.gfile.isdir(folder) else " (there is no such folder yet)"
            print(f"Waiting for a run in {folder}{missing}", flush=True)
            told = True
        time.sleep(following.EVERY)


def _described(folder: str, config: str, weights: str | None, given: dict[str, Any]) -> _Run:
    """The run with what its configuration says where nothing is given."""
    from robust_keras.commands import gin_text

    bound = gin_text.bindings(config, posixpath.join(folder, "config.gin"))

    if config and "train.train_steps" not in bound:
        raise ValueError(f"Expected the folder of a training run. Received: {folder}, with another configuration")

    def value(name):
        return bound[name].value if name in bound else None

    weights = weights or WEIGHTS[value("train.tau") is not None]
    sizes = {} if given["name"] else {name: value(f"training_data.{name}") for name in ("image_size", "short_side")}
    name = given["name"] or value("training_data.dataset")
    if not isinstance(name, str):
        raise ValueError(f"Expected --dataset, where the run's configuration names none. Received: {folder}")
    dataset = {**given, "name": name, **{key: size for key, size in sizes.items() if size is not None}}
    if dataset["split"] == HELD_OUT:
        held_out = value("training_data.num_validation")
        if given["name"] or not isinstance(held_out, int):
            raise ValueError("Expected no --dataset with images that the run held out. Received: --split=held_out")
        dataset |= {"split": "train", "held_out": held_out}
    last_step = value("train.train_steps")
    return _Run(folder, config, weights, dataset, last_step if isinstance(last_step, int) else None)


def _default_workdir(of: _Run, gin_files: Sequence[str]) -> str:
    names = "+".join(pathlib.PurePath(path).stem for path in gin_files)
    return posixpath.join(of.folder, "evaluations", f"{names}-{of.weights}")


def _claim(workdir: str, of: _Run, config: str) -> None:
    """Refuses a folder of evaluations of another run, with other attacks, or on other images."""
    from robust_keras import ownership, storage
    from robust_keras.commands import workdirs
    from robust_keras.saved_models import measured

    path = posixpath.join(workdir, "run.json")
    is_begun = bool(storage.read_text(path))
    workdirs.claim(workdir, config, holds_results=is_begun)
    identity = {"weights": of.weights, "dataset": of.dataset}
    ownership.claim(path, identity, what="these evaluations", is_begun=is_begun)
    checkpoints = posixpath.join(of.folder, "checkpoints")
    for step, results in _finished(workdir).items():
        if step in storage.steps(checkpoints):
            try:
                arrays = _weights(storage.read(checkpoints, step), of.weights)
            except ValueError:  # Removed meanwhile, or damaged.
                continue
            if measured.weights_digest(arrays.values()) != results["model"].get("sha256"):
                raise ValueError(
                    f"Expected a folder with evaluations of this run, or a new one. Received: {workdir}, with other "
                    f"weights at step {step}"
                )


def _follow(of: _Run, workdir: str, attacks: evaluate.Configured, load_images: Any, timeout: float | None) -> None:
    """Evaluates what is not evaluated yet, first of all what was begun."""
    from robust_keras import own_folders, storage
    from robust_keras.commands import model_cards
    from robust_keras.evaluation import folder
    from robust_keras.saved_models import export, load, measured

    if line := model_cards.another_threat_of_run(of.config, attacks.evaluate.keywords["threat"]):
        print(line, flush=True)
    checkpoints, kept = posixpath.join(of.folder, "checkpoints"), posixpath.join(workdir, _KEPT)
    for snapshot in _snapshots(of, kept, set(_finished(workdir)), timeout):
        where = storage.stem_of(checkpoints, snapshot.step)
        sha256 = measured.weights_digest(snapshot.arrays.values())
        reading = {"input_range": [0.0, 1.0], "input_layout": "NHWC", "outputs": "logits", "logits_output": None}
        which = {"weights": of.weights, "step": snapshot.step}
        model = {"path": f"{where}.npz", "sha256": sha256, **which, **reading}

        def load_model(snapshot=snapshot, where=where):
            return load.as_logits_fn(export.network_of_snapshot(snapshot, where)[0])

        print(f"Step {snapshot.step}, {of.weights} weights", flush=True)
        subject = {"model": model, "dataset": of.dataset, "individual": False}
        at = folder.Folder(storage.stem_of(workdir, snapshot.step))
        evaluate.measure(attacks, subject, at, load_model, load_images)
        _write_table(workdir)
    if storage.steps(kept):
        own_folders.remove_folder(kept)


def _snapshots(of: _Run, kept: str, seen: set[int], timeout: float | None) -> Iterator["storage.Snapshot"]:
    """Snapshots that are not in `seen`, each in the folder `kept` meanwhile; of their arrays the weights alone."""
    from robust_keras import storage
    from robust_keras.training import following

    begun = storage.read_newest(kept)
    if begun is not None and begun.step not in seen:
        seen.add(begun.step)
        yield begun
    for snapshot in following.follow(of.folder, seen=seen, last_step=of.last_step, timeout=timeout):
        arrays, info = _weights(snapshot, of.weights), {"description": snapshot.info.get("description")}
        storage.write(kept, snapshot.step, arrays, info, keep=1)
        yield storage.Snapshot(snapshot.step, info, arrays)


def _weights(snapshot: "storage.Snapshot", weights: str) -> dict[str, Any]:
    prefix = {"raw": "weights/", "averaged": "averages/"}[weights]
    arrays = {name.removeprefix(prefix): array for name, array in snapshot.arrays.items() if name.startswith(prefix)}
    if not arrays:
        raise ValueError(f"Expected a run that has {weights} weights. Received: none at step {snapshot.step}")
    return arrays


def _finished(workdir: str) -> dict[int, dict[str, Any]]:
    """The results of the snapshots that have been evaluated, by step, in rising order."""
    import tensorflow as tf

    from robust_keras.evaluation import report

    names = tf.io.gfile.listdir(workdir) if tf.io.gfile.isdir(workdir) else []
    steps = sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match)
    found = {}
    for step in steps:
        folder = posixpath.join(workdir, f"step-{step:08d}")
        if tf.io.gfile.exists(posixpath.join(folder, "results.json")):
            (found[step],) = report.read_results([folder])
    return found


def _row(step: int, results: Mapping[str, Any]) -> list[int | float]:
    return [step, *(results[name] for name in COLUMNS[1:4]), *results["confidence_interval_95"]]


def _write_table(workdir: str) -> None:
    from robust_keras import storage

    rows = [COLUMNS, *(_row(*each) for each in _finished(workdir).items())]
    text = "".join(",".join(map(str, row)) + "\n" for row in rows)
    storage.write_text(posixpath.join(workdir, "accuracies.csv"), text)


def _tell(workdir: str) -> dict[int, dict[str, Any]]:
    from robust_keras.evaluation import report

    found = _finished(workdir)
    lines = [("step", "clean", "robust (upper bound)", "95 % interval")]
    for step, results in found.items():
        _, _, *shares = _row(step, results)
        clean, robust, low, high = (f"{100 * share:.2f}" for share in shares)
        lines.append((str(step), f"{clean} %", f"{robust} %", f"{low} to {high} %"))
    _write_table(workdir)
    print(report.markdown(lines))
    print(f"Results: {posixpath.join(workdir, 'accuracies.csv')}")
    return found


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    flags.DEFINE_string("run", None, "Folder of a training run, which may still go on.", flag_values=values)
    launcher.define_recipe(values, "Attacks, such as gin/eval/pgd40.gin")
    flags.DEFINE_string(
        "workdir", None, "Where evaluations go; RUN/evaluations/<attacks>-<weights> by default.", flag_values=values
    )
    flags.DEFINE_enum(
        "weights", None, WEIGHTS, "Which; averaged ones by default, where the run averages.", flag_values=values
    )
    flags.DEFINE_string("dataset", None, "Data set by name; the run's own by default.", flag_values=values)
    flags.DEFINE_enum(
        "split",
        "test",
        ["test", "train", "validation", HELD_OUT],
        "Its part, or held_out: the training images that the run holds out for validation.",
        flag_values=values,
    )
    flags.DEFINE_integer("num_examples", None, "How many examples, the first ones; all by default.", flag_values=values)
    flags.DEFINE_string("cache_dir", None, "Where what has to be converted goes; beside the data.", flag_values=values)
    flags.DEFINE_float(
        "timeout",
        None,
        "Seconds to wait for the next checkpoint; for ever by default, and with 0 not at all.",
        lower_bound=0.0,
        flag_values=values,
    )
    launcher.define_strategy(values)
    flags.mark_flag_as_required("run", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Runs the command with the values of its flags."""
    run(
        run=values.run,
        gin_files=values.gin_file,
        workdir=values.workdir,
        gin_params=values.gin_param,
        weights=values.weights,
        dataset=values.dataset,
        split=values.split,
        num_examples=values.num_examples,
        data_dir=values.data_dir,
        cache_dir=values.cache_dir,
        timeout=values.timeout,
        strategy=values.strategy,
        tpu=values.tpu,
    )


def command() -> None:
    """Runs the command as it was typed."""
    launcher.launch(main, define_flags, __doc__)
