"""Makes pseudo-labelled sets out of a pool of unlabelled images, or goes on where it was interrupted.

python scripts/pseudo_label.py --gin_file=gin/pseudo_label.gin --gin_param="POOL = 'tiny_images:tiny_images.bin'" \
  --data_dir=DIR --workdir=80mti

Several processes share the work: give each the same command with --num_workers=N and its own --worker from 0 to N - 1.
Each scores on all devices of its --strategy.
"""

from robust_keras.commands import launcher  # isort: skip  Before TensorFlow is imported.

import functools
import math
import posixpath
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from robust_keras.commands import train


class _Configured(NamedTuple):
    """What the recipes say: a training of a classifier with its configuration, a labelling, and the configuration of
    all that counts.
    """

    train: Any  # A `ConfiguredRun`, whose import loads TensorFlow.
    training_config: str
    label_pool: Any
    config: str


def run(
    *,
    gin_files: list[str],
    gin_params: tuple | list = (),
    data_dir: str | None = None,
    workdir: str = "runs/pseudo_label",
    strategy: str | None = None,
    tpu: str | None = None,
    init_from: str | None = None,
    saved_model: str | None = None,
    reading: dict[str, Any] | None = None,
    worker: int = 0,
    num_workers: int = 1,
) -> list[str]:
    """Trains a plain classifier or takes a saved one, labels the pool with it, and writes the sets.

    Args:
        gin_files: recipes, read in order.
        gin_params: further bindings.
        data_dir: where data sets are.
        workdir: where the classifier, the scores and the sets go.
        strategy: binds `train.strategy` and `label_pool.strategy` where it is not None, like the one after it.
        tpu: binds `train.tpu` and `label_pool.tpu`.
        init_from: see `train.run`.
        saved_model: a classifier to use, for which what the recipe says of training does not count; None to train one.
        reading: how `saved_model` is read, arguments of `saved_models.load.load_logits_fn`.
        worker: which process this is, from 0; the first trains the classifier.
        num_workers: processes that share the work.

    Returns:
        The folders of the sets.

    Raises:
        ValueError: for bad input, before anything is trained.
    """
    if saved_model is not None and init_from is not None:
        raise ValueError(f"Expected --saved_model or --init_from. Received: both, {saved_model} and {init_from}")
    bindings = train.bindings(strategy, tpu, init_from, functions=("train", "label_pool"))
    configured = _resolved(gin_files, [*gin_params, *bindings], trains=saved_model is None)

    from robust_keras import failures, ownership
    from robust_keras.pseudo_labelling import pseudo_labels, recipes

    if saved_model is None:
        classifier = _trained_classifier(configured, data_dir=data_dir, workdir=workdir, trains=worker == 0)
    else:
        classifier = _saved_classifier(saved_model, reading or {})
    lock = ownership.lock(workdir, what=pseudo_labels.LABELLING, part=f"worker-{worker}")
    with failures.running(workdir, process=worker), lock:
        if worker == 0:
            _claim(workdir, configured.config)
        share = recipes.Share(worker, num_workers)
        return configured.label_pool(classifier=classifier, workdir=workdir, data_dir=data_dir, share=share)


def _resolved(gin_files: list[str], gin_params: list[str], *, trains: bool) -> _Configured:
    """What the recipes configure.

    Raises:
        ValueError: for one that is wrong, or labels the very images that a set must not hold.
    """
    from robust_keras.commands import configuration

    configuration.parse(gin_files, gin_params)
    with configuration.strategy("train").scope():
        train_classifier = configuration.resolve(configuration.train, is_last=False)
    training_config = configuration.operative_config()
    label_pool = configuration.resolve(configuration.label_pool)
    if not trains:  # How another one would be trained is no part of what the scores are of.
        configuration.parse(gin_files, gin_params)
        configuration.resolve(configuration.label_pool, is_last=False)
    labelled, test_set = _labelled_set(train_classifier), label_pool.recipe.test_set
    if test_set == labelled and labelled.startswith(("npz:", "tfrecord:")):  # Which is one set, whatever the split.
        raise ValueError(f"Expected TEST_SET to name other images than DATASET. Received: {test_set!r} for both")
    return _Configured(train_classifier, training_config, label_pool, configuration.operative_config())


def _labelled_set(train_classifier: Any) -> str:
    return train_classifier.recipe.data.keywords["dataset"]


def _claim(workdir: str, config: str) -> None:
    import tensorflow as tf

    from robust_keras.commands import workdirs

    scored = tf.io.gfile.exists(posixpath.join(workdir, "scores"))
    workdirs.claim(workdir, config, holds_results=scored)


def _saved_classifier(saved_model: str, reading: dict[str, Any]) -> Callable:
    """The `classifier` of `label_pool` for one in a file."""
    from robust_keras.saved_models import load as loading
    from robust_keras.saved_models import opening

    sha256 = loading.fingerprint(saved_model)
    opening.check(saved_model)

    def classifier(image_shape):
        from robust_keras.engines import replicas
        from robust_keras.evaluation import verification

        load = functools.partial(loading.load_logits_fn, saved_model, **reading)
        # Black and white pixels: a model that takes others, by the range that was given or by its own, says so now.
        images = np.arange(replicas.num_replicas() * math.prod(image_shape), dtype=np.float32).reshape(-1, *image_shape)
        logits = verification.first_look(replicas.over_replicas(load()), images % 2, len(images))
        return logits.shape[1], lambda: (load, {"path": saved_model, "sha256": sha256, **reading})

    return classifier


def _trained_classifier(configured: _Configured, *, data_dir: str | None, workdir: str, trains: bool) -> Callable:
    """The `classifier` of `label_pool` for one that is trained here, or by another worker."""
    from robust_keras.data import sources, training_batches

    names = configured.train.recipe.data.keywords
    labelled, test_set = _labelled_set(configured.train), configured.label_pool.recipe.test_set

    def classifier(image_shape):
        source = sources.load(labelled, "train", data_dir=data_dir, **training_batches.reading(names))
        if source.images.shape[1:] != image_shape:
            raise ValueError(
                f"Expected labelled images {image_shape}, as in {test_set!r}. Received: {source.images.shape[1:]}"
            )

        def obtain():
            folder = posixpath.join(workdir, "classifier")
            if trains:
                train.train_and_export(configured.train, configured.training_config, data_dir=data_dir, workdir=folder)
            return _trained(folder)

        return source.num_classes, obtain

    return classifier


def _trained(folder: str) -> tuple[Callable, dict[str, Any]]:
    """A function that loads the classifier that the first worker trained, and what identifies it."""
    from robust_keras import storage
    from robust_keras.saved_models import load as loading

    saved_model = posixpath.join(folder, "saved_model")
    # Of the weights: TensorFlow never writes the same SavedModel twice.
    best = posixpath.join(folder, "best")
    (step,) = storage.steps(best)
    weights = posixpath.join(best, f"step-{step:08d}.npz")
    identity = {"path": "classifier/saved_model", "sha256": storage.sha256(weights), "sha256_of": "its weights"}
    return functools.partial(loading.load_logits_fn, saved_model), identity


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    train.define_flags(values)
    values.set_default("workdir", "runs/pseudo_label")
    flags.DEFINE_string(
        "saved_model",
        None,
        "A classifier: a SavedModel's folder or a .keras file. None to train one.",
        flag_values=values,
    )
    launcher.define_reading(values)
    flags.DEFINE_integer("worker", 0, "Which process this is, from 0.", flag_values=values)
    flags.DEFINE_integer("num_workers", 1, "Processes that share the work.", lower_bound=1, flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Runs the command with the values of its flags."""
    if values.saved_model is None and (given := launcher.given_reading(values)):
        raise ValueError(f"Expected --saved_model with --{given[0]}. Received: none")
    run(
        gin_files=values.gin_file,
        gin_params=values.gin_param,
        data_dir=values.data_dir,
        workdir=values.workdir,
        strategy=values.strategy,
        tpu=values.tpu,
        init_from=values.init_from,
        saved_model=values.saved_model,
        reading=launcher.reading(values),
        worker=values.worker,
        num_workers=values.num_workers,
    )


def command() -> None:
    """Runs the command as it was typed."""
    launcher.launch(main, define_flags, __doc__)
