"""A folder with the programs of a run, which needs JAX and NumPy to go on: `engines.on_jax.runner` says what is in it.

Batches travel as training takes them: so they are exact for every recipe, whatever its order, augmentation and mixing,
of which the runner need know nothing. The price is size, 12 MB for 30 batches of 128 images of CIFAR-10.
"""

import functools
import hashlib
import inspect
import itertools
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

import robust_keras
from robust_keras import own_folders, ownership, storage
from robust_keras.data.training_batches import TrainingData
from robust_keras.engines import replicas
from robust_keras.models import weights
from robust_keras.training import inputs
from robust_keras.training import train as training
from robust_keras.training.program import Program, build
from robust_keras.training.recipes import Cadence, Layout, Recipe
from robust_keras.training.run_state import RunState, state_of

gfile = tf.io.gfile
_RUNNER = "run.py"
_UNFINISHED = "unfinished"  # Written first, and removed last.
_OF_IMAGES = ("image", "label", "seeds")  # What the validation takes.


class Extent(NamedTuple):
    """How much of a run travels.

    Attributes:
        num_steps: steps whose batches do, at most; a run has no more than it has left.
        num_images: images held out that do, at most; None for all.
        from_run: folder of the run whose newest snapshot is gone on from; None to begin anew.
    """

    num_steps: int = 30
    num_images: int | None = None
    from_run: str | None = None


class Travelling(NamedTuple):
    """What a folder holds: of which steps batches, after `step`, and how many images held out."""

    step: int
    num_steps: int
    num_images: int


class _Made(NamedTuple):
    """A program, and what it is given and returns besides variables, by name: specifications."""

    artifact: Any  # An `artifacts.Artifact`.
    batch: Mapping[str, tf.TensorSpec]
    values: Mapping[str, tf.TensorSpec]


def write(
    directory: str,
    *,
    recipe: Recipe,
    layout: Layout,
    cadence: Cadence,
    config: str,
    extent: Extent = Extent(),  # noqa: B008  It cannot change.
    data_dir: str | None = None,
) -> Travelling:
    """Writes the programs of a run, their arrays and the runner, in the scope of `strategies.by_itself()`.

    What an interrupted call left is written anew.

    Args:
        directory: any `tf.io.gfile` path.
        recipe: of the run.
        layout: of the run; one device computes, without XLA's parts inside the step.
        cadence: of the run.
        config: of the run, gin text.
        extent: how much of it travels.
        data_dir: given to the recipe's `data`.

    Raises:
        lowering.Refused: for an operation that does not lower.
        ValueError: for settings or data that do not fit together, a snapshot of another run, and a folder that holds
            anything else.
        run_state.NonFiniteLoss: for weights that are not finite.
    """
    for name, value in (("num_steps", extent.num_steps), ("num_images", extent.num_images)):
        if value is not None and value < 1:
            raise ValueError(f"Expected {name} as an integer >= 1. Received: {value}")
    training.check_settings(recipe, layout, cadence)
    directory = str(directory)
    with ownership.lock(directory, what="an export of a program"):
        _check_folder(directory)
        data = inputs.checked(recipe.data(data_dir=data_dir))
        return _write(_Folder(directory), _Run(recipe, layout, cadence, config), extent, data)


class _Run(NamedTuple):
    """What `write` is given of a run."""

    recipe: Recipe
    layout: Layout
    cadence: Cadence
    config: str


def _write(folder: "_Folder", run: _Run, extent: Extent, data: TrainingData) -> Travelling:
    recipe, layout = run.recipe, run.layout.on_one_device()
    program = build(recipe, layout, data)
    state = state_of(program)
    snapshot = _begun(program, state, recipe, extent.from_run)
    step, num_images = snapshot.step if snapshot else 0, len(data.validation.labels)
    if step >= recipe.train_steps:
        raise ValueError(f"Expected a run that has steps left. Received: one that has taken all {step}")
    num_steps = min(extent.num_steps, recipe.train_steps - step)
    has = Travelling(step, num_steps, min(extent.num_images or num_images, num_images))
    batches = recipe.batches(data, seed=recipe.seed, num_steps=recipe.train_steps, start_step=step)
    training.checked_share(batches.element_spec, program, layout)
    held_out = dict(zip(_OF_IMAGES, program.validator.batch_of(np.arange(has.num_images))))
    some = {name: each[: layout.validation_batch_size] for name, each in held_out.items()}
    made = dict(_lowered(program, batches.element_spec, some))
    names, arrays = _state(state, made, snapshot, step)
    folder.begin()
    folder.add_arrays("state", arrays)
    folder.add_arrays("batches", _stacked(itertools.islice(batches, has.num_steps)))
    folder.add_arrays("images", {name: each.numpy() for name, each in held_out.items()})
    folder.add_programs(made, names)
    about = _about(program, recipe, run.cadence, data, has)
    folder.finish(about | {"kept": dict(state.kept), "recipe": run.config}, snapshot)
    return has


def _runner() -> Any:
    """The module that goes into the folder, which needs JAX."""
    from robust_keras.engines.on_jax import runner

    return runner


def _check_folder(directory: str) -> None:
    """Refuses a folder of anything but an interrupted call."""
    if gfile.exists(posixpath.join(directory, _UNFINISHED)):
        return
    if others := set(gfile.listdir(directory)) - {ownership.lock_name()}:
        what = "a program" if _runner().MANIFEST in others else min(others)
        raise ValueError(f"Expected an empty or new folder. Received: {directory}, which holds {what}")


def _begun(program: Program, state: RunState, recipe: Recipe, from_run: str | None) -> storage.Snapshot | None:
    """Gives the variables what the first step of training, or the one after a run's newest snapshot, finds."""
    snapshot = None
    if from_run is not None:
        path = posixpath.join(from_run, "checkpoints")
        snapshot = storage.read_newest(path)
        if snapshot is None:
            raise ValueError(f"Expected a run with a snapshot. Received: {from_run}")
        if snapshot.info.get("unfinished") is not None:
            raise ValueError(
                f"Expected a run whose last validation is finished; train.py does it. Received: {from_run}"
            )
        held = {name: each for name, each in snapshot.arrays.items() if not name.startswith(_runner().BEST)}
        state.restore(held, path)
    elif recipe.initial_weights is not None:
        weights.assign(program.network, recipe.initial_weights(), program.names)
    if program.averaging:
        program.averaging.start_from_model = snapshot is None
        program.averaging.set_model(program.model)
    return snapshot


def _lowered(
    program: Program, batch: Mapping[str, tf.TensorSpec], images: Mapping[str, tf.Tensor]
) -> Iterator[tuple[str, _Made]]:
    """The programs of a training step and of the validation of a batch of images, by name."""
    from robust_keras.engines.on_jax import artifacts, programs
    from robust_keras.engines.on_jax.execution import Steps

    steps = Steps(program.model, replicas.current(), batch, 1)
    yield "step", _Made(artifacts.of_steps(steps), steps.batch, steps.logs)
    specs = {name: tf.TensorSpec(each.shape, each.dtype) for name, each in images.items()}
    for ending, seen in program.validator.on_replica.items():
        lowered = programs.lower(functools.partial(_correct, seen), *specs.values(), exact=True)  # As over replicas.
        made = artifacts.of_program(lowered, list(specs.values()))
        yield f"correct{ending}", _Made(made, specs, dict(zip(("clean", "robust"), lowered.results)))


def _correct(seen: Callable, *images: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """What is right, of all that is seen of images."""
    return seen(*images)[:2]


def _state(
    state: RunState, made: Mapping[str, _Made], snapshot: storage.Snapshot | None, step: int
) -> tuple[dict[int, str], dict[str, np.ndarray]]:
    """Names of all variables by `id`, and all arrays by name."""
    arrays = state.read(step)
    names = {id(variable): name for name, variable in state.variables.items()}
    for variable in [variable for each in made.values() for variable in each.artifact.variables]:
        if id(variable) not in names:
            names[id(variable)] = name = f"{_runner().UNSAVED}{len(names) - len(state.variables)}"
            arrays[name] = variable.numpy()
    best = {} if snapshot is None else snapshot.arrays
    return names, arrays | {name: each for name, each in best.items() if name.startswith(_runner().BEST)}


def _stacked(batches: Iterable[Mapping[str, tf.Tensor]]) -> dict[str, np.ndarray]:
    """Batches one after another, by name."""
    each = list(batches)
    return {name: np.stack([batch[name].numpy() for batch in each]) for name in each[0]}


def _about(program: Program, recipe: Recipe, cadence: Cadence, data: TrainingData, has: Travelling) -> dict[str, Any]:
    """What the manifest says of a run."""
    return {
        "step": has.step,
        "num_steps": has.num_steps,
        "train_steps": recipe.train_steps,
        "learning_rates": [float(program.learning_rate(has.step + k)) for k in range(has.num_steps)],
        "log_every": cadence.log_every,
        "validate_every": cadence.validate_every,
        "num_images": has.num_images,
        "has_all_images": has.num_images == len(data.validation.labels),
        "best_metric": program.validator.best_metric,
        "description": training.description(program, data),
    }


class _Folder:
    """What is written of a folder, and what its manifest says so far."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._arrays: dict[str, dict] = {}
        self._programs: dict[str, dict] = {}
        self._files: dict[str, str] = {}

    def begin(self) -> None:
        """Writes what needs no program; until `finish` the folder is unfinished."""
        path = posixpath.join(self._directory, _UNFINISHED)
        storage.write_text(path, "This export is under way, or was interrupted.\n")
        self._add(_RUNNER, inspect.getsource(_runner()).encode())

    def add_arrays(self, kind: str, arrays: dict[str, np.ndarray]) -> None:
        """Writes arrays by name."""
        name = f"{kind}.npz"
        self._files[name] = storage.write_arrays(posixpath.join(self._directory, name), arrays, compressed=True)
        self._arrays[kind] = {name: [array.dtype.name, *array.shape] for name, array in arrays.items()}

    def add_programs(self, made: Mapping[str, _Made], names: Mapping[int, str]) -> None:
        """Writes programs by name; `names` are those of variables by `id`."""
        for name, (artifact, batch, values) in made.items():
            self._add(f"{name}.stablehlo", artifact.bytecode)
            self._add(f"{name}.mlir", artifact.text.encode())
            self._programs[name] = {
                "stablehlo": artifact.version,
                "state": [names[id(variable)] for variable in artifact.variables],
                "batch": {name: [each.dtype.name, *each.shape] for name, each in batch.items()},
                "values": {name: [each.dtype.name, *each.shape] for name, each in values.items()},
            }

    def finish(self, about: dict[str, Any], snapshot: storage.Snapshot | None) -> None:
        """Writes the manifest."""
        info = {name: snapshot.info[name] if snapshot else None for name in ("best", "last_validation", "unfinished")}
        info |= {"rows": snapshot.info["rows"] if snapshot else [], "description": about.pop("description")}
        versions = {each.__name__: each.__version__ for each in (robust_keras, tf, keras, np)}
        versions["jax"] = replicas.current().version
        manifest = {
            "format": _runner().FORMAT,
            "format_version": _runner().FORMAT_VERSION,
            "made_by": versions,
            **about,
            "batch_size": self._arrays["batches"]["label"][2],
            "programs": self._programs,
            "arrays": self._arrays,
            "info": info,
            "files": self._files,
        }
        storage.write_json(posixpath.join(self._directory, _runner().MANIFEST), manifest)
        own_folders.remove(posixpath.join(self._directory, _UNFINISHED))

    def _add(self, name: str, content: bytes) -> None:
        with own_folders.open_file(posixpath.join(self._directory, name), "wb") as file:
            file.write(content)
        self._files[name] = hashlib.sha256(content).hexdigest()
