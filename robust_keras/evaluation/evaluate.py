"""Robust accuracy over a data set: attacks in sequence on what still stands, every adversarial image verified."""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from robust_keras import failures, losses, ownership, threats
from robust_keras.attacks.attack import Attack, checked
from robust_keras.engines import replicas
from robust_keras.evaluation import (
    batching,
    examples,
    gradient_masking,
    kept_verdicts,
    results,
    saved_state,
    verification,
)
from robust_keras.evaluation import plan as plans
from robust_keras.models import any_network, outputs, searching

# The diagnosis looks at so many examples, or at a batch of them where that is more.
_DIAGNOSED = 32


def correct_under_attack(
    logits_fn: Callable, x: tf.Tensor, labels: tf.Tensor, *, seeds: tf.Tensor, attack: Callable
) -> tuple[tf.Tensor, tf.Tensor]:
    """Whether each example is classified correctly, clean and under one attack.

    Args:
        logits_fn: images to logits.
        x: float32 `[batch, ...]` in [0, 1].
        labels: int `[batch]`.
        seeds: int32 `[batch, 2]`.
        attack: `(logits_fn, x, labels, *, seeds) -> x_adv`.

    Returns:
        (clean, robust): bool `[batch]` each. What the clean image gets wrong is not robust.

    Raises:
        ValueError: for an attack that returns anything but images like `x`.
    """
    logits, _, adversarial_logits = _passes(logits_fn, x, labels, seeds, attack)
    return _right(logits, adversarial_logits, labels)


def seen_under_attack(
    logits_fn: Callable, x: tf.Tensor, labels: tf.Tensor, *, seeds: tf.Tensor, attack: Callable
) -> tuple[tf.Tensor, ...]:
    """What `correct_under_attack` says, and what it saw.

    Args:
        logits_fn: see there, like all others.

    Returns:
        (clean, robust, clean margin, robust margin, x_adv): `losses.margin` is float32 `[batch]`, `x_adv` like `x`.

    Raises:
        ValueError: see there.
    """
    logits, x_adv, adversarial_logits = _passes(logits_fn, x, labels, seeds, attack)
    margins = (losses.margin(each, labels) for each in (logits, adversarial_logits))
    return *_right(logits, adversarial_logits, labels), *margins, x_adv


def _passes(logits_fn, x, labels, seeds, attack):
    logits = logits_fn(x)
    name = getattr(getattr(attack, "func", attack), "__name__", "that is given")
    x_adv = checked(attack(logits_fn, x, labels, seeds=seeds), x, name)
    return logits, x_adv, logits_fn(x_adv)


def _right(logits, adversarial_logits, labels):
    clean = ~losses.is_wrong(logits, labels)
    return clean, clean & ~losses.is_wrong(adversarial_logits, labels)


def evaluate(
    logits_fn: Callable,
    source: Any,
    *,
    attacks: Sequence[Attack | Callable],
    threat: threats.Threat,
    baseline: Attack | Callable | None = None,
    individual: bool = False,
    num_examples: int | None = None,
    batch_size: int = 128,
    seed: int = 0,
    jit_compile: bool = False,
    search_dtype: str = "float32",
    allow_chance: bool = False,
    diagnose: bool = True,
    model_identity: Any = None,
    save_directory: str | None = None,
    save_every: float = 10.0,
    progress: bool = True,
) -> results.Evaluation:
    """Clean and robust accuracy of a classifier.

    Attacks run in order, each on what all before it left standing. An example is broken only where a fresh pass on an
    image that was checked to be inside the threat model is wrong. Each process calls this, and the first writes.

    Args:
        logits_fn: float32 images `[batch, ...]` in [0, 1] to logits; attributes may say more, see `any_network`.
        source: a `data.sources.Source`: uint8 images and labels.
        attacks: see `attacks.attack.as_attack`; all for `threat`.
        threat: the `threats.Threat` that adversarial images must obey.
        baseline: a weaker attack to compare with, on every correctly classified example; what it breaks still stands.
        individual: whether each attack runs on every correctly classified example.
        num_examples: how many examples, the first ones; None for all.
        batch_size: of every forward pass and attack, over all replicas; less where there are fewer examples.
        seed: of the attacks' noise.
        jit_compile: whether to compile attacks with XLA.
        search_dtype: 'bfloat16' to search in, for CPUs with AMX, see `plan.make`; verdicts are of float32 passes.
        allow_chance: whether to go on where the clean accuracy is not above chance.
        diagnose: whether to look for masked gradients first, see `gradient_masking.diagnose`.
        model_identity: what tells the model from others, as JSON can hold it.
        save_directory: where to keep what is done so far, and where to resume from; None for nowhere.
        save_every: seconds between two saves.
        progress: whether to show progress with time left per attack.

    Returns:
        An `Evaluation`.

    Raises:
        ValueError: before any attack: for images, labels, outputs or batches that cannot be meant, clean accuracy at
            chance, an attack bound to another threat, or a `save_directory` of another evaluation, or in use by one.
    """
    plan = plans.make(attacks, baseline, threat, individual=individual, seed=seed, search_dtype=search_dtype)
    chosen = examples.first(source, num_examples)
    batches = batches_of(logits_fn, len(chosen[0]), batch_size, seed, jit_compile)
    seen, predict_fn = look(logits_fn, *chosen, batches.batch_size, allow_chance)
    found = saved_state.Verdicts(*plan.size(seen), save_directory, plan.identity(seen, model_identity), save_every)
    judge = verification.Judge(predict_fn, seen.images, seen.labels, threat, batches.batch_size)
    with _locked(save_directory):
        _attack(outputs.attackable(logits_fn, seen.clean_logits), plan, seen, found, judge, batches, diagnose, progress)
    return results.conclude(plan, seen, found, logits_fn, judge.predict)


def check_batch_size(logits_fn: Callable, batch_size: int) -> None:
    """Raises ValueError for a batch that replicas cannot share, or of another size than the only one of a model."""
    num_replicas = replicas.num_replicas()
    if batch_size < 1 or batch_size % num_replicas:
        raise ValueError(f"Expected a batch_size that divides among {num_replicas} replicas. Received: {batch_size}")
    only = getattr(logits_fn, "batch_size", None)
    if only is not None and batch_size != only * num_replicas:
        raise ValueError(
            f"Expected evaluate.batch_size = {only * num_replicas}: a replica takes batches of {only} alone. "
            f"Received: {batch_size}"
        )


def batches_of(
    logits_fn: Callable, num_examples: int, batch_size: int, seed: int, jit_compile: bool
) -> batching.Batches:
    """How examples are packed: where the model takes any number of them, in batches no larger than there are."""
    check_batch_size(logits_fn, batch_size)
    takes_any = getattr(logits_fn, "batch_size", None) is None
    if takes_any:
        num_replicas = replicas.num_replicas()
        batch_size = min(batch_size, max(-(-num_examples // num_replicas), 1) * num_replicas)
    return batching.Batches(batch_size, seed, jit_compile, takes_any)


def _locked(save_directory):
    if save_directory is None:
        return contextlib.nullcontext()
    return ownership.lock(save_directory, what="an evaluation", writes=replicas.process_index() == 0)


def look(
    logits_fn: Callable, images: np.ndarray, labels: np.ndarray, batch_size: int, allow_chance: bool
) -> tuple[examples.Examples, Callable]:
    """The `Examples`, once the model has seen the clean images and neither they nor it turn out to be wrong, and the
    compiled model.
    """
    predict_fn = replicas.over_replicas(logits_fn)
    seen = examples.Examples(images, labels, verification.first_look(predict_fn, images, batch_size))
    outputs.check(seen.clean_logits, are_log_probabilities=outputs.are_log_probabilities(logits_fn))
    losses.check_labels(labels, seen.num_classes)
    if not allow_chance:
        examples.check_above_chance(seen)
    return seen, predict_fn


def _attack(logits_fn, plan, seen, found, judge, batches, diagnose, progress):
    """Runs what has not run yet, attack by attack."""
    searched_in = functools.cache(functools.partial(searching.search_fn, logits_fn))  # Which reads its graph once.
    if any(map(plans.is_low, plan.attacks)):
        searched_in("bfloat16")  # Where nothing computes it, that shows now.
    saved = found.restore()
    if saved is not None:
        kept_verdicts.check_state(found, judge)
        where = f"what came before is read from {found.directory}, and checked as far as it is kept"
        if found.position < len(plan.attacks):
            print(f"Resuming from attack {found.position + 1} of {len(plan.attacks)}; {where}", flush=True)
        else:
            print(f"No attack is left to run; {where}", flush=True)
    if diagnose and seen.correct.any() and "diagnosis" not in found.notes:
        _diagnose(logits_fn, plan, seen, found, judge, batches)
    for position in range(found.position, len(plan.attacks)):
        found.position = position
        before = slice(plan.first, plan.first if plan.individual else max(position, plan.first))
        attack = plan.attacks[position]
        standing = seen.correct & ~found.broken[before].any(axis=0)
        doubtful = np.isin(np.arange(len(standing)), found.notes.get("broken_in_bfloat16_alone", []))
        if plans.is_again(attack) and attack.loss_fn is None:
            standing &= doubtful
        active = np.flatnonzero(standing)
        found.attacked[position] = len(active)
        if attack.search is None or (batches.jit_compile and not plans.is_low(attack)):
            search_fn = logits_fn
        else:
            search_fn = searched_in("bfloat16" if plans.is_low(attack) else "float32")
        work = batching.work_of(attack, search_fn, seen, active, batches)
        if plans.is_again(attack):
            work.take_first_run_only(~doubtful)
        if saved:
            work.restore(saved)
            saved = None
        run_to_end(work, found, judge, attack.name, progress)
        if plans.is_low(attack):
            doubtful |= work.broken & ~found.broken[position]
            found.notes["broken_in_bfloat16_alone"] = np.flatnonzero(doubtful).tolist()
        found.position = position + 1
        found.save({})


def _diagnose(logits_fn, plan, seen, found, judge, batches):
    """Looks at the first examples that are right, in batches of the evaluation's size, and notes what it finds."""
    looked_at = np.flatnonzero(seen.correct)[: max(_DIAGNOSED, batches.batch_size)]
    figures, proposed = gradient_masking.diagnose(
        any_network.sized(logits_fn, seen.num_classes),
        *batching.inputs(seen, looked_at, batches.seed),
        threat=plan.threat,
        attacks=plan.attacks,
        batch_size=batches.batch_size,
        takes_other_sizes=batches.shrinks,
    )
    wrong = np.any([judge.judge(looked_at, images).wrong for images in proposed], axis=0)
    found.notes["diagnosis"] = figures
    found.notes["diagnosed"] = {"examples": looked_at.tolist(), "broken": looked_at[wrong].tolist()}


def run_to_end(
    work: batching.Packing | batching.Batchwise,
    found: saved_state.Verdicts,
    judge: verification.Judge,
    name: str,
    progress: bool,
) -> None:
    """Runs an attack to its end, judges what it proposes, and saves now and then."""
    position, seconds_before = found.position, found.seconds[found.position]
    found.steps_without_packing[position] = work.num_steps
    started = time.perf_counter()
    proposed: list[tuple[np.ndarray, np.ndarray]] = []

    def verify():
        if proposed:
            indices, images = (np.concatenate(parts) for parts in zip(*proposed))
            judged = judge.judge(indices, images)
            found.add(indices, images, judged.wrong, judged.wrong_uint8)
            found.count("non_finite_images", judged.non_finite.sum())
            found.count("outside_threat_model", judged.outside.sum())
            found.notes["non_finite_logits"] = judge.non_finite or found.notes.get("non_finite_logits", False)
        proposed.clear()
        found.steps[position] = work.steps_taken
        found.seconds[position] = seconds_before + time.perf_counter() - started

    with tqdm(desc=name, unit=work.unit, total=work.steps_left, disable=not progress, leave=False) as bar:
        while (new := work.advance()) is not None:
            failures.work_begins()  # Settings that cannot be traced have shown by now.
            proposed.append(new)
            if found.is_due():
                verify()
                found.save(work.save())
            elif sum(len(indices) for indices, _ in proposed) >= judge.batch_size:
                verify()
            bar.total = work.steps_taken + work.steps_left
            bar.update(work.steps_taken - bar.n)
    verify()
