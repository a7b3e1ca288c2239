"""What an evaluation comes to: the dictionary of results.json, the arrays of examples.npz, and the numbers as text."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from robust_keras import losses
from robust_keras.evaluation import gradient_masking, security_file, warnings
from robust_keras.evaluation.examples import Examples
from robust_keras.evaluation.plan import Plan
from robust_keras.evaluation.saved_state import Verdicts
from robust_keras.foreign_files import printable
from robust_keras.models import outputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class _Measured(NamedTuple):
    results: dict[str, Any]
    examples: dict[str, np.ndarray]


class Evaluation(_Measured):
    """What `evaluate` returns; printed, it is the `summary`. As a tuple it is `(results, examples)`.

    Attributes:
        results: a dictionary as results.json holds it, perhaps without `model`, `dataset` and `versions`.
        examples: NumPy arrays by name as examples.npz holds them.
        security: a dictionary as security.json holds it; None where no security curve was measured.
    """

    security: dict[str, Any] | None = None

    def with_security(self, security: dict[str, Any] | None) -> "Evaluation":
        """The same with a security curve."""
        found = Evaluation(*self)
        found.security = security
        return found

    @property
    def clean_accuracy(self) -> float:
        """The share of examples that are right before any attack."""
        return self.results["clean_accuracy"]

    @property
    def robust_accuracy(self) -> float:
        """The share that no attack broke: an upper bound of the true robust accuracy."""
        return self.results["robust_accuracy"]

    @property
    def robust_accuracy_after(self) -> dict[str, float]:
        """The same after each attack, by its name, in order; of several of one name the last."""
        return {after["attack"]: after["robust_accuracy"] for after in self.results["robust_accuracy_after"]}

    @property
    def confidence_interval_95(self) -> tuple[float, float]:
        """Of the robust accuracy, for other images of the same kind."""
        low, high = self.results["confidence_interval_95"]
        return low, high

    @property
    def warnings(self) -> list[str]:
        """Names of what was seen that speaks against these numbers; `evaluation.warnings.WARNINGS` explains them."""
        return self.results["warnings"]

    def pictures(self, network: Any, data: Any, **options: Any) -> "Figure":
        """A figure of images that attacks broke: clean, adversarial and their magnified difference, with the classes.

        Args:
            network: what was evaluated.
            data: on what.
            **options: `bounds` and `from_logits` as in the evaluation, `class_names`, and `limit`, 8 images unless
                said; see `evaluation.pictures.of_evaluation`.

        Raises:
            ValueError: for data that is other than the evaluated, or is not to be drawn.
        """
        from robust_keras.evaluation import pictures  # matplotlib is for those who draw.

        return pictures.of_evaluation(self.results, self.examples, network, data, **options)

    def chart(self) -> "Figure":
        """A figure of the accuracy before any attack and after each, in order; the last one with its 95 % interval."""
        from robust_keras.evaluation import pictures

        return pictures.chart(self.results)

    def __repr__(self) -> str:
        lines = [summary(self.results), *([security_file.summary(self.security)] if self.security else [])]
        return "\n".join(lines)


def conclude(
    plan: Plan, examples: Examples, verdicts: Verdicts, logits_fn: Any, predict: Callable[[np.ndarray], np.ndarray]
) -> Evaluation:
    """The `Evaluation` of finished verdicts.

    Args:
        plan: what ran.
        examples: on what.
        verdicts: what was found.
        logits_fn: the model, whose attributes say how it was read.
        predict: the model once more, of float32 images `[n, ...]`: its logits `[n, num_classes]`.
    """
    broken, broken_uint8 = verdicts.broken[plan.first :], verdicts.broken_uint8[plan.first :]
    correct = examples.correct
    standing = correct & ~broken.any(axis=0)
    in_bytes = examples.images.dtype == np.uint8
    records = [_record(attack, k, verdicts) for k, attack in enumerate(plan.attacks)]
    results: dict[str, Any] = {
        "num_examples": len(correct),
        "clean_accuracy": float(correct.mean()),
        "robust_accuracy": float(standing.mean()),
        "robust_accuracy_uint8": float((correct & ~broken_uint8.any(axis=0)).mean()) if in_bytes else None,
        "robust_accuracy_after": [
            {"attack": attack.name, "robust_accuracy": float((correct & ~broken[: k + 1].any(axis=0)).mean())}
            for k, attack in enumerate(plan.attacks[plan.first :])
        ],
        "norm": plan.threat.norm,
        "epsilon": plan.threat.epsilon,
        "epsilon_fraction": plan.threat.epsilon_fraction,
        "attacks": records[plan.first :],
        "individual": plan.individual,
        "confidence_interval_95": wilson_interval(int(standing.sum()), len(correct)),
        "warnings": _warnings(plan, examples, verdicts, logits_fn),
        "seed": plan.seed,
    }
    if figures := verdicts.notes.get("diagnosis"):
        results["diagnosis"] = {**figures, **_diagnosed(plan, verdicts)}
    if outputs.are_log_probabilities(logits_fn):
        results["saturated_examples"] = outputs.num_saturated(examples.clean_logits)
    if plan.has_baseline:
        results["baseline"] = {**records[0], "robust_accuracy": float((correct & ~verdicts.broken[0]).mean())}
    return Evaluation(results, _arrays(plan, examples, verdicts, predict))


def _record(attack, k, verdicts):
    record = {
        "name": attack.name,
        "parameters": attack.parameters,
        "seconds": round(float(verdicts.seconds[k]), 3),
        "examples_attacked": int(verdicts.attacked[k]),
        "examples_broken": int(verdicts.broken[k].sum()),
        "steps": int(verdicts.steps[k]),
        "steps_without_packing": int(verdicts.steps_without_packing[k]),
    }
    refused = {name: verdicts.counted(name, k) for name in ("non_finite_images", "outside_threat_model")}
    return {**record, **{name: number for name, number in refused.items() if number}}


def _diagnosed(plan, verdicts):
    """On how many examples the diagnosis and the attacks differ; nothing without attacks, or of an older version."""
    if "diagnosed" not in verdicts.notes or len(plan.attacks) == plan.first:
        return {}
    examples, by_diagnosis = (np.array(verdicts.notes["diagnosed"][name], int) for name in ("examples", "broken"))
    by_attacks = np.flatnonzero(verdicts.broken[plan.first :].any(axis=0))
    return {
        "examples": len(examples),
        "examples_broken": len(by_diagnosis),
        "broken_by_diagnosis_alone": len(np.setdiff1d(by_diagnosis, by_attacks)),
        "broken_by_attacks_alone": len(np.setdiff1d(np.intersect1d(examples, by_attacks), by_diagnosis)),
    }


def _warnings(plan, examples, verdicts, logits_fn):
    notes, names = verdicts.notes, [attack.name for attack in plan.attacks]
    broken = verdicts.broken[plan.first :]
    standing = examples.correct & ~broken.any(axis=0)
    found = ["non_finite_logits"] if notes.get("non_finite_logits") else []
    found += gradient_masking.flags(notes["diagnosis"]) if notes.get("diagnosis") else []
    if any(notes.get("non_finite_images", ())) and "non_finite_gradients" not in found:
        found.append("non_finite_gradients")
    found += ["outside_threat_model"] if any(notes.get("outside_threat_model", ())) else []
    baseline_broken = verdicts.broken[0] if plan.has_baseline else None
    found += warnings.of_verdicts(names[plan.first :], broken, standing, baseline_broken)
    if differ := _diagnosed(plan, verdicts):
        found += warnings.of_diagnosis(differ["broken_by_diagnosis_alone"], differ["broken_by_attacks_alone"])
    found += warnings.of_classes(plan.attacks, examples.num_classes)
    if getattr(logits_fn, "straight_through_cast", False):
        # Differences of less than a byte are rounded away, which contradicts any gradient.
        found = [*(name for name in found if name != "gradient_mismatch"), "straight_through_cast"]
    if outputs.are_log_probabilities(logits_fn):
        found += ["saturated_probabilities"] if outputs.num_saturated(examples.clean_logits) else []
    elif outputs.is_within_0_1(examples.clean_logits):
        found.append("outputs_between_0_and_1")
    return found


def _arrays(plan, examples, verdicts, predict):
    broken = verdicts.broken[plan.first :]
    standing = examples.correct & ~broken.any(axis=0)
    broken_by = np.where(standing, -1, 0)
    for k in reversed(range(len(broken))):
        broken_by[broken[k]] = k + 1
    position = np.where(broken_by > 0, broken_by - 1 + plan.first, -1)
    adversarial = verdicts.adversarial(examples.images, position)
    prediction = examples.clean_logits.argmax(axis=-1).astype(np.int32)
    return {
        "index": np.arange(len(examples.labels)),
        "label": examples.labels,
        "clean_prediction": prediction,
        "robust": standing,
        "broken_by": broken_by.astype(np.int32),
        "adversarial": adversarial,
        "adversarial_prediction": _taken_for(prediction, examples.labels, broken_by > 0, adversarial, predict),
        "clean_margin": -losses.margin(examples.clean_logits, examples.labels).numpy(),
    }


def _taken_for(prediction, labels, is_broken, adversarial, predict):
    """The class that an image ends as: the clean prediction, or that of the image that broke it, which is no label."""
    found = prediction.copy()
    if len(broken := np.flatnonzero(is_broken)):
        logits = np.nan_to_num(predict(adversarial[broken]), nan=-np.inf)
        # It was wrong when it was judged; in other batches, rounding may make an image at the border right again.
        logits[np.arange(len(broken)), labels[broken]] = -np.inf
        found[broken] = logits.argmax(axis=-1)
    return found


def summary(results: dict[str, Any]) -> str:
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
    named = named_by_warnings(results)
    lines += [f"warning: {name}{f' ({named[name]})' if named.get(name) else ''}" for name in results["warnings"]]
    return "\n".join(printable(line, most=1000) for line in lines)


def named_by_warnings(results: dict[str, Any]) -> dict[str, str]:
    """What warnings of a results dictionary speak of, by name: attacks, and how many of their images."""
    records = [*([results["baseline"]] if results.get("baseline") else []), *results["attacks"]]

    def counts(name):
        return ", ".join(f"{record[name]} of {record['name']}" for record in records if name in record)

    diagnosis = results.get("diagnosis") or {}
    alone = diagnosis.get("broken_by_diagnosis_alone")
    return {
        "diagnosis_beats_attacks": f"{alone} of {diagnosis.get('examples')} images" if alone else "",
        "zero_gradients": ", ".join(gradient_masking.without_gradients(diagnosis)),
        "non_finite_gradients": counts("non_finite_images"),
        "outside_threat_model": counts("outside_threat_model"),
    }


def wilson_interval(num_successes: int, num_trials: int) -> list[float]:
    """The 95 % Wilson score interval of a proportion, [low, high]."""
    z = 1.959963984540054
    p, n = num_successes / num_trials, num_trials
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return [max(centre - half, 0.0), min(centre + half, 1.0)]
