"""The warnings that results carry: machine-readable names, and what verdicts, classes and models call for them."""

import math
from collections.abc import Sequence

import numpy as np

from robust_keras.attacks import attack as attacks_of

# What was seen, by the name in results.json. `{attack}` is an attack's name.
WARNINGS = {
    "non_finite_logits": "an attack found logits that are no finite numbers, which count as wrong",
    "randomized_model": "five passes over the same images differ",
    "zero_gradients": "the margin, or the loss of an attack that `diagnosis` names, has no gradient on some images",
    "non_finite_gradients": "gradients, or images that attacks made of them, are no finite numbers",
    "gradient_mismatch": "finite differences contradict the gradients",
    "loss_did_not_rise": "50 steps of PGD reach less than 5",
    "batch_dependent_model": "an image's logits depend on the other images of its batch",
    "{attack}_beats_white_box": "an attack without gradients broke what those with gradients did not",
    "baseline_gap_above_5_points": "the baseline alone flatters the model by more than 5 points",
    "baseline_beats_attacks": "the attacks together broke less than the baseline, which does not count",
    "diagnosis_beats_attacks": "the attacks together broke less than the short PGD of the diagnosis, on its images",
    "outside_threat_model": "images that an attack proposed left the threat model, and count not",
    "dlr_fell_back_to_margin": "too few classes for the difference of logits ratio",
    "targeted_dlr_fell_back_to_margin": "too few classes for the targeted difference of logits ratio",
    "fewer_target_classes": "fewer wrong classes than an attack would aim at",
    "fewer_targets_than_classes": "an attack aims at some of the wrong classes only, fewer than upstream's standard",
    "straight_through_cast": "the model takes integers; gradients pass straight through the rounding",
    "outputs_between_0_and_1": "all outputs lie between 0 and 1: are they probabilities? Say --outputs=probabilities",
    "saturated_probabilities": "probabilities of exactly 0 or 1, whose gradient is lost",
}

# Attacks that ask the attacked classifier for no gradients.
BLACK_BOX = ("square", "transfer")
# Attacks that aim at classes.
TARGETED = ("apgd-t", "fab-t", "multi-targeted")
# As many wrong classes as upstream's standard version aims at; in L1, APGD-T takes five.
_STANDARD_TARGETS = {"apgd-t": 9, "fab-t": 9}
# Verdicts that differ on two examples in a thousand may do so by chance.
_BY_CHANCE = 0.002


def of_verdicts(
    names: Sequence[str], broken: np.ndarray, standing: np.ndarray, baseline_broken: np.ndarray | None
) -> list[str]:
    """The warnings that verdicts call for.

    Args:
        names: of the attacks, in order.
        broken: bool `[num_attacks, num_examples]`.
        standing: bool `[num_examples]`, what no attack broke.
        baseline_broken: bool `[num_examples]`, what the baseline broke; None without one.
    """
    num_examples = len(standing)
    black = np.array([name in BLACK_BOX for name in names], bool)
    found = []
    if black.any() and not black.all():
        by_white = broken[~black].any(axis=0)
        for name, verdicts in zip(names, broken):
            if name in BLACK_BOX and (verdicts & ~by_white).sum() > _BY_CHANCE * num_examples:
                found.append(f"{name}_beats_white_box")
    if baseline_broken is not None and len(names):
        missed = (broken.any(axis=0) & ~baseline_broken).sum() - (baseline_broken & standing).sum()
        if missed > 0.05 * num_examples:
            found.append("baseline_gap_above_5_points")
        if -missed > _BY_CHANCE * num_examples:
            found.append("baseline_beats_attacks")
    return found


def of_diagnosis(by_diagnosis: int, by_attacks: int) -> list[str]:
    """The warnings that a comparison of the attacks with the diagnosis' own calls for.

    Attacks that are as strong break as many of the examples on which the two differ, or more. Whether they break fewer
    is a one-sided sign test at 5 %: with none that the attacks alone broke, five that the diagnosis alone broke.

    Args:
        by_diagnosis: how many examples it alone broke.
        by_attacks: how many of those that it looked at the attacks alone broke.
    """
    return ["diagnosis_beats_attacks"] if sign_test(by_diagnosis, by_attacks) < 0.05 else []


def sign_test(num: int, num_others: int) -> float:
    """The probability that of `num + num_others` throws of a coin so many as `num`, or more, are heads."""
    total = num + num_others
    return sum(math.comb(total, k) for k in range(num, total + 1)) / 2**total


def of_classes(attacks: Sequence[attacks_of.Attack], num_classes: int) -> list[str]:
    """The warnings that the number of classes calls for."""
    names = [attack.name for attack in attacks]
    found = []
    if num_classes < 3 and "apgd-dlr" in names:
        found.append("dlr_fell_back_to_margin")
    if num_classes < 4 and "apgd-t" in names:
        found.append("targeted_dlr_fell_back_to_margin")
    aimed = [(a, a.parameters["num_targets"]) for a in attacks if a.name in TARGETED and "num_targets" in a.parameters]
    if any(num_targets > num_classes - 1 for _, num_targets in aimed):
        found.append("fewer_target_classes")
    if any(num_targets < min(num_classes - 1, _standard_targets(attack)) for attack, num_targets in aimed):
        found.append("fewer_targets_than_classes")
    return found


def _standard_targets(attack):
    if attack.name == "apgd-t" and attack.threat is not None and attack.threat.norm == "L1":
        return 5
    return _STANDARD_TARGETS.get(attack.name, float("inf"))
