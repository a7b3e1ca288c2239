"""Robust accuracy over a data set: attacks in sequence on what still stands, every adversarial image verified."""

import functools
import inspect
import math
import time
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from robust_keras import failures, losses
from robust_keras.engines import replicas
from robust_keras.evaluation import batching, gradient_masking, verification


def correct_under_attack(logits_fn, x, labels, *, seeds, attack):
    """Whether each example is classified correctly, clean and under one attack.

    Args:
        logits_fn: images to logits.
        x: float32 `[batch, ...]` in [0, 1].
        labels: int `[batch]`.
        seeds: int32 `[batch, 2]`.
        attack: `(logits_fn, x, labels, *, seeds) -> x_adv`.

    Returns:
        (clean, robust): bool `[batch]` each. What the clean image gets wrong is not robust.
    """
    clean = ~losses.is_wrong(logits_fn(x), labels)
    return clean, clean & ~losses.is_wrong(logits_fn(attack(logits_fn, x, labels, seeds=seeds)), labels)


class Evaluation(NamedTuple):
    """What `evaluate` returns.

    Attributes:
        results: a dictionary as results.json holds it, but for `model`, `dataset` and `versions`.
        examples: NumPy arrays by name as examples.npz holds them.
    """

    results: dict
    examples: dict


def evaluate(
    logits_fn,
    source,
    *,
    attacks,
    threat,
    baseline=None,
    individual=False,
    num_examples=None,
    batch_size=128,
    seed=0,
    jit_compile=False,
    allow_chance=False,
    diagnose=True,
    save_directory=None,
    save_every=10.0,
    progress=True,
):
    """Clean and robust accuracy of a classifier.

    Attacks run in order, each on the examples that all before it left standing. An example counts as broken only where
    a fresh forward pass on its adversarial image, after that was checked to lie inside the threat model, is wrong. Full
    batches of one fixed size are packed from whatever is active, so everything is compiled once. All replicas of the
    strategy in scope share the batches; of several processes, each calls this, and the first writes.

    Args:
        logits_fn: float32 images `[batch, ...]` in [0, 1] to logits `[batch, num_classes]`; loaded in the same scope.
        source: a `data.sources.Source`: uint8 images and labels.
        attacks: `(logits_fn, x, labels, *, seeds) -> x_adv` each, functions with bound arguments; all for `threat`.
        threat: the `threats.Threat` that adversarial images must obey.
        baseline: a weaker attack to compare with, on every correctly classified example; what it breaks still stands.
        individual: whether each attack runs on every correctly classified example.
        num_examples: how many examples, the first ones; None for all.
        batch_size: of every forward pass and attack, over all replicas.
        seed: of the attacks' noise.
        jit_compile: whether to compile attacks with XLA.
        allow_chance: whether to go on where the clean accuracy is not above chance.
        diagnose: whether to look for masked gradients first, see `gradient_masking.diagnose`.
        save_directory: where to keep what is done so far, and where to resume from; None for nowhere.
        save_every: seconds between two saves.
        progress: whether to show progress with time left per attack.

    Returns:
        An `Evaluation`.

    Raises:
        ValueError: for labels outside the classes, outputs that are probabilities, non-finite logits on clean images,
            clean accuracy at chance, an attack bound to another threat, or an adversarial image outside the threat
            model.
    """
    if num_examples is not None and not 1 <= num_examples <= len(source.labels):
        raise ValueError(f"Expected num_examples from 1 to {len(source.labels)}. Received: {num_examples!r}")
    num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if batch_size < 1 or batch_size % num_replicas:
        raise ValueError(f"Expected a batch_size that divides among {num_replicas} replicas. Received: {batch_size}")
    plan = [*([] if baseline is None else [baseline]), *attacks]
    searches = [_search(attack) for attack in plan]  # Bad settings show before any attack runs.
    names = [search.name if search else attack.func.__name__ for attack, search in zip(plan, searches)]
    for attack, name in zip(plan, names):
        bound = attack.keywords["threat"]
        if (bound.norm, bound.epsilon) != (threat.norm, threat.epsilon):
            raise ValueError(
                f"Expected attacks on the threat model {threat.norm} {threat.epsilon_fraction}. "
                f"Received: {name} on {bound.norm} {bound.epsilon_fraction}"
            )
    images, labels = source.images[:num_examples], source.labels[:num_examples]
    if images.dtype != np.uint8 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"Expected uint8 images and integer labels. Received: {images.dtype} and {labels.dtype}")
    predict_fn = replicas.over_replicas(logits_fn)
    clean_logits = verification.predict(predict_fn, images, batch_size)
    _check_logits(clean_logits, labels)
    num_classes = clean_logits.shape[-1]
    correct = ~losses.is_wrong(clean_logits, labels).numpy()
    if not allow_chance:
        _check_above_chance(correct, num_classes)

    def sized_logits_fn(x):  # A loaded model may not tell how many classes it has.
        return tf.ensure_shape(tf.cast(logits_fn(x), tf.float32), (x.shape[0], num_classes))

    judge = verification.Judge(predict_fn, images, labels, threat, batch_size)
    found = verification.Verdicts(len(plan), len(labels), save_directory)
    saved = found.restore()
    if saved is not None and found.position < len(plan):
        print(f"Resuming from attack {found.position + 1} of {len(plan)}", flush=True)
    if diagnose and correct.any() and "diagnosis" not in found.notes:
        looked_at = np.flatnonzero(correct)[:32]
        looked_at = np.resize(looked_at, max(len(looked_at) // num_replicas, 1) * num_replicas)
        batch = batching.inputs(images, labels, looked_at, seed)
        found.notes["diagnosis"] = gradient_masking.diagnose(sized_logits_fn, *batch, threat=threat)

    first = len(plan) - len(attacks)  # The first attack that counts.
    for position in range(found.position, len(plan)):
        attack, found.position = plan[position], position
        before = slice(first, first if individual else max(position, first))
        active = np.flatnonzero(correct & ~found.broken[before].any(axis=0))
        found.attacked[position] = len(active)
        search = searches[position]
        options = {"batch_size": batch_size, "seed": seed, "jit_compile": jit_compile}
        if search is None:
            work = batching.Batchwise(attack, sized_logits_fn, images, labels, active, **options)
        else:
            work = batching.Packing(search, sized_logits_fn, images, labels, clean_logits, active, **options)
        if saved:
            work.restore(saved)
            saved = None
        _run(work, found, judge, names[position], save_every, progress)
        found.position = position + 1
        found.save({})
    return _conclude(
        found, plan, names, first, correct, clean_logits, images, labels, threat, seed, individual, logits_fn
    )


def _conclude(found, plan, names, first, correct, clean_logits, images, labels, threat, seed, individual, logits_fn):
    """The `Evaluation` of finished verdicts; attacks before `first` do not count."""
    broken, broken_uint8 = found.broken[first:], found.broken_uint8[first:]
    standing = correct & ~broken.any(axis=0)
    parameters = [_parameters(attack) for attack in plan]
    records = [
        {
            "name": names[k],
            "parameters": parameters[k],
            "seconds": round(float(found.seconds[k]), 3),
            "examples_attacked": int(found.attacked[k]),
            "examples_broken": int(found.broken[k].sum()),
            "steps": int(found.steps[k]),
            "steps_without_packing": int(found.steps_without_packing[k]),
        }
        for k, attack in enumerate(plan)
    ]
    figures = found.notes.get("diagnosis")
    warnings = ["non_finite_logits"] if found.notes.get("non_finite_logits") else []
    warnings += gradient_masking.flags(figures) if figures else []
    warnings += gradient_masking.attack_flags(names[first:], broken, standing, found.broken[0] if first else None)
    warnings += gradient_masking.class_flags(names, [p.get("num_targets") for p in parameters], clean_logits.shape[-1])
    results = {
        "num_examples": len(labels),
        "clean_accuracy": float(correct.mean()),
        "robust_accuracy": float(standing.mean()),
        "robust_accuracy_uint8": float((correct & ~broken_uint8.any(axis=0)).mean()),
        "robust_accuracy_after": [
            {"attack": name, "robust_accuracy": float((correct & ~broken[: k + 1].any(axis=0)).mean())}
            for k, name in enumerate(names[first:])
        ],
        "norm": threat.norm,
        "epsilon": threat.epsilon,
        "epsilon_fraction": threat.epsilon_fraction,
        "attacks": records[first:],
        "individual": individual,
        "confidence_interval_95": wilson_interval(int(standing.sum()), len(labels)),
        "warnings": warnings,
        "seed": seed,
    }
    if figures:
        results["diagnosis"] = figures
    if getattr(logits_fn, "outputs", None) == "probabilities":
        results["saturated_examples"] = num_saturated = int(_is_saturated(clean_logits).sum())
        warnings += ["saturated_probabilities"] if num_saturated else []
    if first:
        results["baseline"] = {**records[0], "robust_accuracy": float((correct & ~found.broken[0]).mean())}
    broken_by = np.where(standing, -1, 0)
    for k in reversed(range(len(broken))):
        broken_by[broken[k]] = k + 1
    examples = {
        "index": np.arange(len(labels)),
        "label": labels,
        "clean_prediction": clean_logits.argmax(axis=-1).astype(np.int32),
        "robust": standing,
        "broken_by": broken_by.astype(np.int32),
        "adversarial": found.adversarial(images, np.where(broken_by > 0, broken_by - 1 + first, -1)),
    }
    return Evaluation(results, examples)


def _run(work, found, judge, name, save_every, progress):
    """Runs an attack to its end, and saves now and then."""
    position, seconds_before = found.position, found.seconds[found.position]
    found.steps_without_packing[position] = work.num_steps
    started = saved_at = time.perf_counter()
    proposed = []

    def verify():
        if proposed:
            indices, images = (np.concatenate(parts) for parts in zip(*proposed))
            found.add(indices, images, *judge.judge(name, indices, images))
            found.notes["non_finite_logits"] = judge.non_finite or found.notes.get("non_finite_logits", False)
        proposed.clear()
        found.steps[position] = work.steps_taken
        found.seconds[position] = seconds_before + time.perf_counter() - started

    with tqdm(desc=name, unit="step", total=work.steps_left, disable=not progress, leave=False) as bar:
        while (new := work.advance()) is not None:
            failures.work_begins()  # Settings that cannot be traced have shown by now.
            proposed.append(new)
            # All processes save when the first one does.
            if replicas.all_processes(time.perf_counter() - saved_at)[0] >= save_every:
                verify()
                found.save(work.save())
                saved_at = time.perf_counter()
            elif sum(len(indices) for indices, _ in proposed) >= judge.batch_size:
                verify()
            bar.total = work.steps_taken + work.steps_left
            bar.update(work.steps_taken - bar.n)
    verify()


def summary(results):
    """The main numbers of a results dictionary, as lines of text."""
    low, high = (100 * bound for bound in results["confidence_interval_95"])
    lines = [
        f"{results['num_examples']} examples, {results['norm']} {results['epsilon_fraction']}",
        f"clean accuracy: {100 * results['clean_accuracy']:.2f} %",
    ]
    lines += [
        f"robust accuracy after {after['attack']}: {100 * after['robust_accuracy']:.2f} %"
        for after in results["robust_accuracy_after"]
    ]
    if "baseline" in results:
        baseline = results["baseline"]
        lines.append(f"baseline {baseline['name']} alone: {100 * baseline['robust_accuracy']:.2f} %")
    lines.append(
        f"robust accuracy (an upper bound of the true one): {100 * results['robust_accuracy']:.2f} %, "
        f"95 % interval {low:.2f} to {high:.2f} %"
    )
    lines += [f"warning: {warning}" for warning in results["warnings"]]
    return "\n".join(lines)


def wilson_interval(num_successes, num_trials):
    """The 95 % Wilson score interval of a proportion, [low, high]."""
    z = 1.959963984540054
    p, n = num_successes / num_trials, num_trials
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return [max(centre - half, 0.0), min(centre + half, 1.0)]


def _check_logits(logits, labels):
    if not np.isfinite(logits).all():
        raise ValueError("Expected finite logits on clean images. Received: some that are not")
    outside = labels[(labels < 0) | (labels >= logits.shape[-1])]
    if len(outside):
        raise ValueError(f"Expected labels of the model's {logits.shape[-1]} classes. Received: {outside[0]}")
    if (logits >= 0).all() and np.allclose(logits.sum(axis=-1), 1.0, atol=1e-3):
        raise ValueError(
            "Expected logits. Received: rows that sum to 1; for a model of probabilities, say --outputs=probabilities"
        )


def _is_saturated(log_probabilities):
    """Which examples have a probability of exactly 0 or 1, whose gradient is lost."""
    lowest = np.log(np.finfo(np.float32).tiny)
    return (log_probabilities.max(axis=-1) >= 0.0) | (log_probabilities.min(axis=-1) <= lowest + 1e-3)


def _check_above_chance(correct, num_classes):
    chance = 1 / num_classes
    # As high as one in twenty blind guessers gets; with few examples nothing can be told.
    limit = chance + 1.645 * math.sqrt(chance * (1 - chance) / len(correct))
    if len(correct) >= 50 and correct.mean() <= limit:
        raise ValueError(
            f"Expected clean accuracy above chance, {100 * chance:.2f} %. Received: {100 * correct.mean():.2f} % of "
            f"{len(correct)} examples. Do --input_range, --input_layout, --logits_output and --dataset fit the model? "
            "evaluate.allow_chance = True goes on all the same"
        )


def _search(attack):
    """The `Search` of an attack, None for a plain function."""
    build = getattr(attack.func, "search", None)
    return build(*attack.args, **attack.keywords) if build else None


def _parameters(attack):
    """Arguments as JSON can hold them, defaults too; the threat model stands beside the attacks."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(attack.func).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    arguments = {**defaults, **attack.keywords}
    return {name: _described(value) for name, value in arguments.items() if name != "threat"}


def _described(value):
    if isinstance(value, functools.partial):
        arguments = ", ".join(
            f"{name}={_described(bound)}" for name, bound in value.keywords.items() if name != "threat"
        )
        return value.func.__name__ + (f"({arguments})" if arguments else "")
    if callable(value) or hasattr(value, "name"):
        return getattr(value, "name", None) or value.__name__
    return value
