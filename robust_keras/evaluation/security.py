"""A security curve, robust accuracy against radius, and whether the attacks behind it do what attacks must.

    found = measure(logits_fn, source, threat=linf, evaluated=evaluation.examples)
    found["curve"], found["checks"], found["told"]

Biggio & Roli 2018 (https://arxiv.org/abs/1712.03141) draw the curve; `sanity_checks` has the checks.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from robust_keras import losses, threats
from robust_keras.attacks import stepwise
from robust_keras.attacks.apgd import apgd
from robust_keras.attacks.attack import Attack, as_attack
from robust_keras.attacks.pgd import pgd
from robust_keras.attacks.radii import at_radii
from robust_keras.attacks.random_noise import random_noise
from robust_keras.attacks.square import square
from robust_keras.evaluation import batching, examples, sanity_checks, saved_state, security_file, verification
from robust_keras.evaluation import evaluate as evaluation
from robust_keras.models import outputs, searching


def measure(
    logits_fn: Callable,
    source: Any,
    *,
    threat: threats.Threat,
    evaluated: dict[str, np.ndarray] | None = None,
    num_images: int = 128,
    num_steps: int = 40,
    num_queries: int = 500,
    batch_size: int = 128,
    seed: int = 0,
    jit_compile: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """The security curve of a classifier and the sanity checks, of the first images.

    At each radius, until gradient steps have broken all images, or to where any image may become any other: APGD on the
    margin, from the images themselves so that gradients alone lead it, and random noise, both on every image that is
    right, so that radii can be compared. At the evaluated radius also PGD of several numbers of steps, and Square. The
    curve counts whatever broke an image within a radius, in the evaluation too; each image that did is verified.

    Args:
        logits_fn: see `evaluate.evaluate`, like `source`, `batch_size`, `seed`, `jit_compile` and `progress`.
        threat: the evaluated one.
        evaluated: arrays of an evaluation within it, as examples.npz has them; None for none.
        num_images: how many, the first ones, or all where there are fewer.
        num_steps: of each gradient attack; PGD takes a quarter, a half and all of them.
        num_queries: of Square.

    Returns:
        What security.json holds, without `subject`.

    Raises:
        ValueError: for settings under 1, fewer than four steps, or a radius of zero.
    """
    stepwise.check_counts(num_images=num_images, num_steps=num_steps, num_queries=num_queries)
    if num_steps < 4:
        raise ValueError(f"Expected num_steps >= 4. Received: {num_steps}")
    check_radius(threat)
    images, labels = examples.first(source, min(num_images, len(source.labels)))
    batches = evaluation.batches_of(logits_fn, len(images), batch_size, seed, jit_compile)
    seen, predict_fn = evaluation.look(logits_fn, images, labels, batches.batch_size, True)
    network = outputs.attackable(logits_fn, seen.clean_logits)
    network = network if jit_compile else searching.search_fn(network)
    trial = _Trial(network, predict_fn, seen, threat, batches, progress)
    shares = _shares(threat, images.shape[1:])
    broken = _all_attacks(trial, shares, num_steps, num_queries)
    trial.take(evaluated)
    checked = sanity_checks.checks(broken)
    return {
        "format": security_file.FORMAT,
        "norm": threat.norm,
        "num_examples": len(images),
        "attack": _told_of_attacks(threat, num_steps, num_queries),
        **_curves(trial, [0.0, *shares[: len(broken.radii)]], broken.by_noise),
        "checks": checked,
        "told": sanity_checks.told(checked),
    }


def check_radius(threat: threats.Threat) -> None:
    """Raises ValueError for a threat model that has no larger and smaller ones: that of a radius of zero."""
    if threat.epsilon <= 0:
        raise ValueError(f"Expected a radius epsilon > 0 for a security curve. Received: {threat.epsilon_fraction}")


class _Trial:
    """Attacks on the same images, each verified within its own radius, and the smallest one that broke each image."""

    def __init__(self, network, predict_fn, seen, threat, batches, progress):
        self.threat, self.seen = threat, seen
        self._network, self._predict_fn, self._batches, self._progress = network, predict_fn, batches, progress
        self._least = np.where(seen.correct, np.inf, 0.0)  # Shares of the radius.

    def at_radii(self, given: Callable, shares: Sequence[float], **options: Any) -> Callable:
        """`(r) -> broken`, bool `[num_images]`, of a search within the share r of the radius."""
        attack = at_radii(given, threat=self.threat, shares=shares, **options)
        work = batching.Packing(attack, self._network, self.seen, np.zeros(0, int), self._batches)

        def run(r):
            work.begin(np.flatnonzero(self.seen.correct), [r])
            return self._broken(work, attack.name, shares[r])

        return run

    def run(self, attack: Attack) -> np.ndarray:
        """What an attack within the whole radius broke of the images that are right: bool `[num_images]`."""
        right = np.flatnonzero(self.seen.correct)
        return self._broken(batching.work_of(attack, self._network, self.seen, right, self._batches), attack.name, 1.0)

    def take(self, evaluated: dict[str, np.ndarray] | None) -> None:
        """Counts the images that broke something in an evaluation."""
        if evaluated is None:
            return
        broken_by, images = (evaluated[name][: len(self._least)] for name in ("broken_by", "adversarial"))
        chosen = np.flatnonzero((broken_by > 0) & self.seen.correct)
        if len(chosen):
            self._count(chosen[self._judge(1.0).judge(chosen, images[chosen]).wrong], 1.0)

    def robust_accuracy(self, share: float) -> float:
        """The share of the images that are right, and that nothing broke within this share of the radius."""
        return float((self._least > share).mean())

    def _judge(self, share):
        threat = threats.part_of(self.threat, share)
        return verification.Judge(
            self._predict_fn, self.seen.images, self.seen.labels, threat, self._batches.batch_size
        )

    def _broken(self, work, name, share):
        found = saved_state.Verdicts(1, len(self._least), save_every=math.inf)
        evaluation.run_to_end(work, found, self._judge(share), f"{name}, {share:.3g} of the radius", self._progress)
        self._count(found.broken[0], share)
        return found.broken[0]

    def _count(self, chosen, share):
        self._least[chosen] = np.minimum(self._least[chosen], share)


def _curves(trial: _Trial, shares: Sequence[float], by_noise: np.ndarray) -> dict[str, list]:
    """Robust accuracy, and accuracy under noise, up to the first radius at which nothing stands."""
    correct, shape = trial.seen.correct, trial.seen.images.shape[1:]
    accuracies = [trial.robust_accuracy(share) for share in shares]
    num_points = next((k + 1 for k, accuracy in enumerate(accuracies) if not accuracy), len(shares))
    under_noise = [correct.mean(), *(correct & ~by_noise).mean(axis=1)]
    curves: dict[str, list] = {"curve": [], "random_noise": []}
    for share, *pair in list(zip(shares, accuracies, under_noise))[:num_points]:
        point = {"epsilon": share * trial.threat.epsilon, "epsilon_fraction": _text(trial.threat, share, shape)}
        for name, accuracy in zip(curves, pair):
            curves[name].append({**point, "robust_accuracy": float(accuracy)})
    return curves


def _all_attacks(trial: _Trial, shares: Sequence[float], num_steps: int, num_queries: int) -> sanity_checks.Broken:
    correct, threat = trial.seen.correct, trial.threat
    names = [f"{threat.norm} {_text(threat, share, trial.seen.images.shape[1:])}" for share in shares]
    steps = functools.partial(apgd, loss_fn=losses.margin, num_steps=num_steps)
    gradient_steps = trial.at_radii(steps, shares, random_start=False)
    noise = trial.at_radii(random_noise, shares)
    at, rows = shares.index(1.0), []
    for r in range(len(shares)):
        rows.append((gradient_steps(r), noise(r)))
        if r >= at and np.any([row[0] for row in rows], axis=0)[correct].all():
            break
    by_gradient, by_noise = (np.array(row) for row in zip(*rows))
    by_steps = {n: trial.run(as_attack(_pgd(threat, n))) for n in (num_steps // 4, num_steps // 2, num_steps)}
    is_pictures = trial.seen.images.ndim == 4
    black_box = functools.partial(square, threat=threat, num_queries=num_queries)
    by_black_box = trial.run(as_attack(black_box)) if is_pictures else None
    return sanity_checks.Broken(correct, names[: len(rows)], at, by_gradient, by_noise, by_steps, by_black_box)


def _pgd(threat, num_steps):
    step_size = 2.5 * threat.epsilon / num_steps  # As Madry et al. 2017: enough to get anywhere from anywhere.
    return functools.partial(pgd, threat=threat, loss_fn=losses.margin, num_steps=num_steps, step_size=step_size)


def _shares(threat: threats.Threat, shape: Sequence[int]) -> list[float]:
    """Of the radius: fractions, multiples, and the one within which any image may become any other."""
    largest = threats.diameter(threat.norm, shape) / threat.epsilon
    multiples = [factor * 2.0**k for k in range(64) for factor in (1.0, 1.5)]
    smaller = [share for share in (0.25, 0.5, 0.75, *multiples) if share < largest * (1 - 1e-6)]
    return [*smaller, largest] if largest > 1 + 1e-6 else [0.25, 0.5, 0.75, 1.0]


def _text(threat, share, shape):
    """A share of the radius, in the radius' own fractions."""
    if share in (0.0, 1.0):
        return threat.epsilon_fraction if share else "0"
    if share > 1 and math.isclose(share * threat.epsilon, largest := threats.diameter(threat.norm, shape)):
        return f"{largest:.6g}"
    numerator, *denominator = threat.epsilon_fraction.split("/")
    return "/".join([f"{share * float(numerator):.6g}", *denominator])


def _told_of_attacks(threat, num_steps, num_queries):
    return (
        f"at each radius APGD on the margin from the image itself, {num_steps} steps, and 10 draws of random noise; "
        f"at {threat.norm} {threat.epsilon_fraction} also PGD on the margin, up to {num_steps} steps, Square, "
        f"{num_queries} queries, and what the evaluation found"
    )
