"""Makes pseudo-labelled sets out of a pool of unlabelled images, or goes on where it was interrupted.

python scripts/pseudo_label.py --gin_file=gin/pseudo_label.gin --gin_param="POOL = 'tiny_images:tiny_images.bin'" \
  --data_dir=DIR --workdir=80mti

Several processes share the work: give each the same command with --num_workers=N and its own --worker from 0 to N - 1.
Each scores on all devices of its --strategy.
"""

from robust_keras.commands import launcher  # isort: skip  Before TensorFlow is imported.

import functools
import posixpath

import numpy as np
from absl import flags

from robust_keras.commands import train


def run(
    *,
    gin_files,
    gin_params=(),
    data_dir=None,
    workdir="runs/pseudo_label",
    strategy=None,
    tpu=None,
    init_from=None,
    saved_model=None,
    reading=None,
    worker=0,
    num_workers=1,
):
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
    import tensorflow as tf

    from robust_keras.commands import configuration
    from robust_keras.data import sources
    from robust_keras.engines import replicas
    from robust_keras.saved_models import load as loading

    if saved_model is not None and init_from is not None:
        raise ValueError(f"Expected --saved_model or --init_from. Received: both, {saved_model} and {init_from}")
    bindings = train.bindings(strategy, tpu, init_from, functions=("train", "label_pool"))
    configuration.parse(gin_files, [*gin_params, *bindings])
    with configuration.strategy("train").scope():
        train_classifier = configuration.resolve(configuration.train, is_last=False)
    training_config = configuration.operative_config()
    label_pool = configuration.resolve(configuration.label_pool)
    if saved_model is not None:  # How another one would be trained is no part of what the scores are of.
        configuration.parse(gin_files, [*gin_params, *bindings])
        configuration.resolve(configuration.label_pool, is_last=False)
    config = configuration.operative_config()

    labelled, test_set = train_classifier.recipe.data.keywords["dataset"], label_pool.keywords["test_set"]
    if test_set == labelled and labelled.startswith("npz:"):  # Which is one set, whatever the split.
        raise ValueError(f"Expected TEST_SET to name other images than DATASET. Received: {test_set!r} for both")
    sha256 = saved_model and loading.fingerprint(saved_model)
    if worker == 0:
        scored = tf.io.gfile.exists(posixpath.join(workdir, "scores"))
        configuration.claim(workdir, config, holds_results=scored)

    def saved_classifier(image_shape):
        load = functools.partial(loading.load_logits_fn, saved_model, **(reading or {}))
        images = np.zeros((tf.distribute.get_strategy().num_replicas_in_sync, *image_shape), np.float32)
        shape = replicas.over_replicas(load())(images).shape
        if shape.rank != 2:
            raise ValueError(f"Expected a classifier that returns [batch, classes]. Received: {tuple(shape)}")
        return shape[1], lambda: (load, {"path": saved_model, "sha256": sha256, **(reading or {})})

    def trained_classifier(image_shape):
        source = sources.load(labelled, "train", data_dir=data_dir)
        if source.images.shape[1:] != image_shape:
            raise ValueError(
                f"Expected labelled images {image_shape}, as in {test_set!r}. Received: {source.images.shape[1:]}"
            )

        def obtain():
            folder = posixpath.join(workdir, "classifier")
            if worker == 0:
                train.train_and_export(train_classifier, training_config, data_dir=data_dir, workdir=folder)
            return _trained(folder)

        return source.num_classes, obtain

    return label_pool(
        classifier=trained_classifier if saved_model is None else saved_classifier,
        workdir=workdir,
        data_dir=data_dir,
        worker=worker,
        num_workers=num_workers,
    )


def _trained(folder):
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


def define_flags(values):
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


def main(values):
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


def command():
    launcher.launch(main, define_flags, __doc__)
