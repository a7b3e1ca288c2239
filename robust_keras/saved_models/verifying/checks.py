"""What is checked of a model that runs: each check returns what was seen, or raises where it contradicts the claim."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from robust_keras.saved_models.verifying.attacks import BATCH_SIZE, Model, attack, is_wrong
from robust_keras.saved_models.verifying.claim import Claim, as_floats, upper_bound, wilson_interval

_DIFFERENCE = np.float32(1 / 255)


# Of fewer attacked images, even none broken leaves one in ten unknown.
FEWEST = 30


class NothingShownError(Exception):
    """A check that could tell nothing, of which it says why."""


class Case(NamedTuple):
    """What the checks of a model look at: the `Model`, the `Claim`, a NumPy generator, and how many to attack."""

    model: Model
    claim: Claim
    rng: np.random.Generator
    num_attacked: int

    @property
    def robust(self) -> np.ndarray:
        """Positions of the bundled images that are claimed to be robust, in a fresh order."""
        return self.rng.permutation(np.flatnonzero(self.claim.verdicts[self.claim.positions] == -1))


def check_logits(case: Case) -> str:
    """Clean images are right; logits are as recorded, the same in every pass and company, and say how sure they are."""
    x, labels, recorded = case.claim.images, case.claim.labels, case.claim.logits
    logits = case.model.logits(x)
    if num_wrong := is_wrong(logits, labels).sum():
        raise ValueError(f"{num_wrong} of {len(x)} clean images are wrong that are claimed to be right")
    if recorded.shape != logits.shape:
        raise ValueError(f"logits {logits.shape} where {recorded.shape} are recorded")
    spread = np.std(logits, axis=-1, keepdims=True) + 1e-30
    others = np.stack([x, 1.0 - x[::-1]], axis=1).reshape(-1, *x.shape[1:])
    passes = {
        "recorded": recorded,
        "of a second pass": case.model.logits(x),
        "among other images": case.model.logits(others)[::2],
        "alone": np.concatenate([case.model.logits(x[k : k + 1]) for k in range(min(4, len(x)))]),
    }
    for name, others in passes.items():
        differ = np.abs(others - logits[: len(others)]) / spread[: len(others)]
        if not differ.max() < 2e-3:
            raise ValueError(f"logits {name} differ by {differ.max():.2g} of their spread")
    probability = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probability /= probability.sum(axis=-1, keepdims=True)
    chance = 1 / logits.shape[1]
    sure = float(probability.max(axis=-1).mean() - chance) / (1 - chance)
    # What is right hardly more often than by chance is hardly sure, and robust models are less sure than right.
    skill = float((case.claim.verdicts != 0).mean() - chance) / (1 - chance)
    two = np.sort(logits, axis=-1)[:, -2:]
    margin, distinct = float(np.median(two[:, 1] - two[:, 0])), len(np.unique(logits)) / logits.size
    if sure < min(0.1, 0.2 * skill) or margin > 50 or distinct < 0.5:
        raise ValueError(
            f"logits hide how sure the model is: confidence {sure:.2g} above chance where all are right, median margin "
            f"{margin:.3g}, {100 * distinct:.0f} % of the values distinct"
        )
    return f"{len(x)} clean images right; logits as recorded, in every pass and company"


def check_signatures(case: Case) -> str:
    """All signatures and outputs say the same of bytes, in the bundled images and in mixtures of them."""
    drawn = case.claim.images[case.rng.permutation(len(case.claim.images))[:BATCH_SIZE]]
    mixed = np.concatenate([drawn[::2], (drawn + drawn[::-1])[1::2] / 2])
    from_bytes = np.round(255 * mixed).astype(np.uint8)
    x = as_floats(from_bytes)
    logits, seen = case.model.logits(x), []
    for name in sorted(set(case.model.signatures) & {"serving_default", "serving_uint8"}):
        signature = case.model.signatures[name]
        ((argument, spec),) = signature.structured_input_signature[1].items()
        outputs = signature(
            **{argument: _tensor(from_bytes if spec.dtype.is_integer else x, spec.dtype.as_numpy_dtype)}
        )
        found = {key: value.numpy() for key, value in outputs.items()}
        exact = np.exp(logits - logits.max(axis=-1, keepdims=True))
        expected = {"logits": logits, "probabilities": exact / exact.sum(axis=-1, keepdims=True)}
        for output, values in expected.items():
            if output in found and not np.allclose(found[output], values, rtol=1e-3, atol=1e-3 * np.std(values)):
                raise ValueError(f"{name} returns other {output} than its logits are")
        if "class" in found and not np.array_equal(found["class"], found.get("logits", logits).argmax(axis=-1)):
            raise ValueError(f"{name} returns other classes than its logits say")
        seen.append(name)
    others = sorted(set(case.model.signatures) - {*seen, "gradient"})
    return f"{', '.join(seen)} agree" + (f"; not checked: {', '.join(others)}" if others else "")


def check_replay(case: Case) -> str:
    """The bundled adversarial images are in the ball, and still fool the model."""
    claim = case.claim
    if not (num := len(claim.adversarial)):
        raise NothingShownError("none is claimed to be broken")
    x, labels = claim.images[:num], claim.labels[:num]
    if num_outside := (~claim.ball.is_inside(claim.adversarial, x)).sum():
        raise ValueError(f"{num_outside} of {num} adversarial images are outside of the threat model")
    logits = case.model.logits(claim.adversarial)
    at_label = logits[np.arange(num), labels]
    others = _without(logits, labels).max(axis=1)
    # On the verge, where attacks stop, other machines round otherwise.
    if num_right := (at_label - others > 1e-3 * np.std(logits, axis=-1)).sum():
        raise ValueError(f"{num_right} of {num} adversarial images do not fool the model")
    return f"{num} adversarial images inside the ball, all of them fool the model"


def check_gradients(case: Case) -> str:
    """Gradients are those of the logits: as differences along random directions say, at three kinds of points."""
    claim, h = case.claim, _DIFFERENCE
    drawn = case.rng.permutation(len(claim.positions))[:64]
    x, labels = claim.images[drawn].clip(h, 1 - h), claim.labels[drawn]
    targets = np.argmax(_without(case.model.logits(x), labels), axis=1)
    rows = np.arange(len(x))

    def margin_of(points):
        found = case.model.logits(points).astype(np.float64)
        return found[rows, targets] - found[rows, labels]

    def cross_entropy_of(points):
        found = case.model.logits(points).astype(np.float64)
        top = found.max(axis=-1)
        return np.log(np.exp(found - top[:, None]).sum(axis=-1)) + top - found[rows, labels]

    random_points = claim.ball.start(x, case.rng)
    steps = claim.ball.direction(case.model.loss(random_points, labels, targets)[2])
    attacked = claim.ball.project(random_points + claim.ball.epsilon * steps, x)
    found = []
    for name, points in {"clean": x, "random": random_points, "attacked": attacked}.items():
        points = points.clip(h, 1 - h)  # Pixels at the edge have no room for a difference.
        gradient = case.model.loss(points, labels, targets)[2].astype(np.float64)
        gradient *= np.std(case.model.logits(points), axis=-1).reshape(-1, 1, 1, 1) / 3.0  # Of the margin as it is.
        found.append(_alike(f"gradients at {name} images", margin_of, gradient, points, case.rng))
    if "gradient" in case.model.signatures:
        told = case.model.signatures["gradient"](image=_tensor(x, np.float32), label=_tensor(labels, np.int64))
        gradient = told["gradient"].numpy().astype(np.float64)
        found.append(_alike("gradients of its signature", cross_entropy_of, gradient, x, case.rng))
    return f"correlation with differences at least {min(found):.3f} at clean, random and attacked points"


def _alike(what: str, value_of: Callable, gradient: np.ndarray, points: np.ndarray, rng: np.random.Generator) -> float:
    """The correlation of a gradient with differences of a value, along random signs; too small a one raises."""
    size = np.sqrt((gradient**2).sum(axis=(1, 2, 3)))
    if (size == 0).mean() > 0.05:
        raise ValueError(f"{what}: {(size == 0).sum()} of {len(size)} are zero")
    by_gradient, by_difference = [], []
    for _ in range(4):
        step = _DIFFERENCE * np.sign(rng.normal(size=points.shape)).astype(np.float32)
        by_difference.append((value_of(points + step) - value_of(points - step)) / 2)
        by_gradient.append((gradient * step).sum(axis=(1, 2, 3)))
    ours, theirs = (np.stack(each)[:, size > 0] / size[size > 0] for each in (by_difference, by_gradient))
    slope = (ours * theirs).sum() / (theirs**2).sum()
    alike = float((ours * theirs).sum() / math.sqrt((ours**2).sum() * (theirs**2).sum() + 1e-30))
    if not (alike > 0.9 and 0.8 < slope < 1.25):
        raise ValueError(
            f"{what} are not those of the logits: correlation with differences {alike:.3f}, slope {slope:.3g}"
        )
    return alike


def _without(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Logits, of the label minus infinity."""
    return np.where(np.arange(logits.shape[1]) == labels[:, None], -np.inf, logits)


def check_attack(case: Case) -> str:
    """Images that are claimed to be robust are so under a fresh attack."""
    chosen = case.robust[: case.num_attacked]
    if not (num := len(chosen)):
        raise NothingShownError("none is claimed to be robust")
    x, labels = case.claim.images[chosen], case.claim.labels[chosen]
    x_adv, broken = attack(case.model, case.claim.ball, x, labels, case.rng, steps=(40, 25), num_queries=300)
    num_broken = int((broken & case.claim.ball.is_inside(x_adv, x) & case.model.is_wrong(x_adv, labels)).sum())
    told = f"{num_broken} of {num} broken: at most {100 * upper_bound(num_broken, num):.1f} % at 95 %"
    # What a stronger attack breaks of a claim that holds is less than one in a hundred.
    if 1 - upper_bound(num - num_broken, num) > 0.01:
        raise ValueError(told)
    if num < FEWEST:
        raise NothingShownError(f"{told}, fewer than {FEWEST}")
    return told


def check_neighbours(case: Case) -> str:
    """Mixtures of these images with others, outside of the ball, withstand attacks too where they are right."""
    chosen = case.robust[: max(case.num_attacked, 100)]  # Of fewer, too few may be right.
    x, labels = case.claim.images[chosen], case.claim.labels[chosen]
    weights = case.rng.uniform(0.1, 0.3, (len(chosen), 1, 1, 1))
    others = case.claim.images[case.rng.permutation(len(case.claim.positions))[: len(chosen)]]
    mixed = ((1 - weights) * x + weights * others).astype(np.float32)
    right = ~case.model.is_wrong(mixed, labels)
    seen = f"of {len(mixed)} mixtures with other images {right.sum()} are right"
    if upper_bound(int(right.sum()), len(mixed)) < 0.4:  # Of models whose robustness is their own, most are.
        raise ValueError(f"{seen}: the model knows the bundled images")
    if right.sum() < 10:
        raise NothingShownError(f"{seen}, fewer than ten")
    _, broken = attack(case.model, case.claim.ball, mixed[right], labels[right], case.rng, steps=(20, 0), num_queries=0)
    told = f"{seen}, {(~broken).sum()} of them under attack"
    # Of models whose robustness is their own, from half (of weak ones, in large balls) to nine in ten.
    if upper_bound(int((~broken).sum()), int(right.sum())) < 0.5:
        raise ValueError(f"{told}: the model knows the bundled images")
    return told


def check_images(case: Case, path: str) -> str:
    """Other images, which nobody bundled: accuracies are in the claim's interval, as far as chance allows."""
    with np.load(path, allow_pickle=False) as arrays:
        images, labels = arrays["images"], np.asarray(arrays["labels"]).reshape(-1).astype(np.int32)
    told = case.claim.told
    chosen = case.rng.permutation(len(labels))[: case.num_attacked]
    x, labels = as_floats(images[chosen]), labels[chosen]
    _, broken = attack(case.model, case.claim.ball, x, labels, case.rng, steps=(40, 10), num_queries=100)
    num_right, num_robust = int((~case.model.is_wrong(x, labels)).sum()), int((~broken).sum())
    seen = f"of {len(x)} other images {num_right} are right, {num_robust} under attack"
    low = {"clean": wilson_interval(round(told["clean_accuracy"] * told["num_examples"]), told["num_examples"])[0]}
    low["robust"] = told["confidence_interval_95"][0]
    for name, number in (("clean", num_right), ("robust", num_robust)):
        if upper_bound(number, len(x)) < low[name]:
            raise ValueError(f"{seen}: the {name} accuracy is below the claimed one")
    return seen


def check_again(case: Case) -> str:
    """After all that the model is what it was, and no logits were infinite or no numbers."""
    if case.model.num_non_finite:
        raise ValueError(f"logits of {case.model.num_non_finite} images were no finite numbers")
    return check_logits(case)


def _tensor(values: np.ndarray, dtype: Any) -> Any:
    import tensorflow as tf

    return tf.constant(values.astype(dtype))


CHECKS: dict[str, Callable[[Case], str]] = {
    "logits": check_logits,
    "signatures": check_signatures,
    "replay": check_replay,
    "gradients": check_gradients,
    "attack": check_attack,
    "neighbours": check_neighbours,
}
