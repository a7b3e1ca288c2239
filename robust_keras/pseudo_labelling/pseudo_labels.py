"""Pseudo-labelled sets out of a pool of unlabelled images (section 4.3.1 of Gowal et al. 2020).

What duplicates the test set is left out, a plain classifier labels and scores the rest, and of each class the images
with the highest scores are kept, so that smaller sets are part of larger ones:

    scoring.score(pool, logits_fn, directory="scores", test_images=test.images)
    found = selection.select("scores", num_classes=10, sizes=(200_000, 500_000))
    record_sets.write_set(pool, found.sets[500_000], "500k", manifest=found.statistics)

A pool is scored in chunks, each a file with a marker, and a set is written in parts, each with its checksum. What is
there is kept, so each function goes on where it was killed, to the same bytes, and several processes share the work.
"""

import posixpath
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from robust_keras import losses, ownership
from robust_keras.data import sources
from robust_keras.engines import replicas, strategies
from robust_keras.pseudo_labelling import chunks, recipes, scoring, selection
from robust_keras.pseudo_labelling.recipes import Layout, Recipe, Scoring, Sets, Share
from robust_keras.pseudo_labelling.record_sets import Chosen, set_name, write_set

_SECONDS_BETWEEN_LOOKS = 10
LABELLING = "the labelling of a pool"  # What locks a worker's share of a folder.


def label_pool(
    *,
    classifier: Callable,
    workdir: str,
    recipe: Recipe,
    sets: Sets,
    layout: Layout = Layout(),  # noqa: B008  It cannot change.
    share: Share = Share(),  # noqa: B008
    data_dir: str | None = None,
) -> list[str]:
    """Makes pseudo-labelled sets out of a pool: `workdir`/scores and a folder for each set, such as `workdir`/500k.

    Args:
        classifier: `(image_shape) -> (num_classes, obtain)`, called in the strategy's scope before any long work; it
            refuses what does not fit such images. `obtain() -> (load, identity)` trains or finds the classifier, once
            all else has been checked; `load()` is its logits_fn, made in the scope, and the identity is JSON, with a
            `path` that may change.
        workdir: any `tf.io.gfile` path.
        recipe: what is labelled, a `recipes.Recipe`.
        sets: which sets are wanted, a `recipes.Sets`.
        layout: where, a `recipes.Layout`.
        share: of the work, a `recipes.Share`; all workers wait until the whole pool is scored.
        data_dir: see `sources.load`.

    Returns:
        The folders of the sets.

    Raises:
        ValueError: for bad input, before the classifier is trained, and for a folder where another command is at this
            worker's share; see also `score`, `select` and `write_set`.
    """
    strategy = strategies.strategy(layout.strategy, tpu=layout.tpu)
    recipes.check(recipe.scoring, share, strategy.num_replicas_in_sync)
    print(strategies.announcement(layout.strategy, tpu=layout.tpu), file=sys.stderr, flush=True)
    with strategy.scope():
        _check_alone()
        test = sources.load(recipe.test_set, "test", data_dir=data_dir, cache_dir=layout.cache_dir)
        test = test._replace(images=np.asarray(test.images))
        num_classes, obtain = classifier(test.images.shape[1:])
    _check_classes(test, num_classes, sets.sizes)
    scores = posixpath.join(workdir, "scores")
    with ownership.lock(workdir, what=LABELLING, part=f"worker-{share.worker}"):
        _wait_for_the_first(scores, share)
        images = _pool(recipe.pool, max(sets.sizes), test.images.shape[1:], data_dir, layout.cache_dir)
        load, identity = obtain()
        with strategy.scope():
            logits_fn = load()
            accuracy = _accuracy(logits_fn, test, recipe.scoring.batch_size)
            _check_accuracy(accuracy, num_classes, sets.allow_chance)
            settings = recipe.scoring
            _score_with_others(images, logits_fn, scores, test.images, identity, settings, share, layout.progress)
        found = selection.select(scores, num_classes=num_classes, sizes=sets.sizes)
        manifest = _manifest(recipe, found, {**identity, "test_accuracy": accuracy}, sets.licence)
        return [_write(images, chosen, workdir, manifest, share) for chosen in found.sets.values()]


def _check_alone() -> None:
    if (num_processes := replicas.num_processes()) > 1:
        raise ValueError(
            f"Expected processes that share a pool as --num_workers. Received: {num_processes} in one strategy"
        )


def _check_classes(test: sources.Source, num_classes: int, sizes: tuple) -> None:
    # A file knows its classes by the labels that it has, and a test set need not have them all.
    is_whole = not test.name.startswith(("npz:", "tfrecord:"))
    if test.num_classes > num_classes or (test.num_classes < num_classes and is_whole):
        raise ValueError(f"Expected a test set of {num_classes} classes. Received: {test.num_classes} in {test.name!r}")
    selection.check_sizes(sizes, num_classes)


def _pool(name: str, num_images: int, image_shape: tuple, data_dir: str | None, cache_dir: str | None) -> Any:
    """A pool of at least so many images of that shape."""
    images = sources.open_pool(name, data_dir=data_dir, image_shape=image_shape, cache_dir=cache_dir)
    if num_images > len(images):
        raise ValueError(
            f"Expected a pool of at least {num_images:,} images, or smaller label_pool.sizes. Received: {len(images):,}"
        )
    return images


def _check_accuracy(accuracy: float, num_classes: int, allow_chance: bool) -> None:
    """Refuses a classifier that is hardly right more often than chance."""
    print(f"Accuracy of the classifier on the test images: {100 * accuracy:.2f} %", flush=True)
    chance = 1 / num_classes
    if accuracy < chance + 0.1 * (1 - chance) and not allow_chance:
        raise ValueError(
            "Expected a classifier that is right more often than chance, or label_pool.allow_chance = True. "
            f"Received: one that is right on {100 * accuracy:.2f} % of the test images"
        )


def _accuracy(logits_fn: Callable, test: sources.Source, batch_size: int) -> float:
    """Share of a labelled set that a classifier gets right."""
    num_right = 0

    def on_batch(images):
        return logits_fn(tf.cast(images, tf.float32) / 255.0)

    predict = replicas.over_replicas(on_batch)
    for start in range(0, len(test.labels), batch_size):
        chosen = np.arange(start, start + batch_size) % len(test.labels)
        right = ~losses.is_wrong(predict(test.images[chosen]), test.labels[chosen]).numpy()
        num_right += int(right[: len(test.labels) - start].sum())
    return num_right / len(test.labels)


def _wait_for_the_first(scores: str, share: Share) -> None:
    while share.worker and not chunks.is_claimed(scores):
        print("Waiting for worker 0 to convert the pool and train the classifier, where that is needed", flush=True)
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _score_with_others(
    images: Any,
    logits_fn: Callable,
    scores: str,
    test_images: Any,
    identity: dict[str, Any],
    settings: Scoring,
    share: Share,
    progress: bool,
) -> None:
    """Does this worker's share, and waits until the others have done theirs."""

    def score_mine():
        scoring.score(
            images,
            logits_fn,
            directory=scores,
            test_images=test_images,
            classifier={name: value for name, value in identity.items() if name != "path"},
            settings=settings,
            share=share,
            progress=progress,
        )

    score_mine()
    while absent := chunks.missing(scores):
        workers = sorted({chunk % share.num_workers for chunk in absent})
        if share.worker in workers:  # Another worker found it damaged.
            score_mine()
            continue
        print(f"Waiting for {len(absent):,} chunks of workers {', '.join(map(str, workers))}", flush=True)
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _manifest(recipe: Recipe, found: selection.Selection, classifier: dict, licence: str | None) -> dict[str, Any]:
    return {
        "pool": {"name": recipe.pool, **found.statistics["pool"]},
        "classifier": classifier,
        "duplicates": {"of": f"{recipe.test_set}, test", **found.statistics["duplicates"]},
        "licence": licence,
    }


def _write(images: Any, chosen: Chosen, workdir: str, manifest: dict[str, Any], share: Share) -> str:
    """Writes this worker's parts of a set, and returns its folder."""
    folder = posixpath.join(workdir, set_name(len(chosen.index)))
    is_complete = write_set(images, chosen, folder, manifest=manifest, share=share)
    print(f"{folder}{'' if is_complete else ', where other workers still write'}", flush=True)
    return folder
