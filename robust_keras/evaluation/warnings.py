"""The warnings that results carry: machine-readable names, and what verdicts, classes and models call for them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from robust_keras.attacks import attack as attacks_of


class Explained(NamedTuple):
    """What a warning means; what is between backticks is code.

    Attributes:
        seen: what was seen.
        advice: what to do.
    """

    seen: str
    advice: str


# By the name in results.json, as docs/evaluation.md and reports show them. `{attack}` is an attack's name.
WARNINGS = {
    "randomized_model": Explained("five passes over the same images differ", "use `autoattack.version = 'rand'`"),
    "batch_dependent_model": Explained(
        "an image's logits depend on the other images of its batch; `batch_dependence` says how much",
        "export the model with moving statistics: accuracies here hold for this batch size alone",
    ),
    "zero_gradients": Explained(
        "the margin, or the loss of an attack that is named, has no gradient on some images",
        "trust attacks that need none (Square), a transfer or another loss; find what saturates",
    ),
    "non_finite_gradients": Explained(
        "gradients, or images that attacks made of them, are no finite numbers; such entries count as zero, such "
        "images not at all",
        "find the layer (a root or a power at 0); the other images' verdicts stand",
    ),
    "gradient_mismatch": Explained(
        "finite differences contradict the gradients", "look for rounding and custom gradients in the network"
    ),
    "loss_did_not_rise": Explained(
        "50 steps of PGD reach less than 5", "look for rounding and custom gradients in the network"
    ),
    "{attack}_beats_white_box": Explained(
        "`square` or `transfer`, which need no gradients, broke what attacks with gradients did not",
        "gradients are masked: the true accuracy is lower still",
    ),
    "baseline_gap_above_5_points": Explained(
        "the baseline, PGD-40, alone flatters the model by more than 5 points (the margin inside and MART, sections "
        "4.2.1 and 4.1 of the paper)",
        "do not compare such models by PGD-40",
    ),
    "baseline_beats_attacks": Explained(
        "the attacks together broke less than the baseline, which does not count",
        "the attacks are too weak for this model: take `autoattack.gin`",
    ),
    "diagnosis_beats_attacks": Explained(
        "on the images that the diagnosis looks at, its own PGD (5 and 50 steps on the margin) broke more than all "
        "attacks together, by more than chance (a sign test at 5 %); `broken_by_diagnosis_alone` says how many",
        "the attacks are too weak for this model, or its logits are of a scale or shape that blinds their loss: take "
        "`autoattack.gin`",
    ),
    "outside_threat_model": Explained(
        "images that an attack proposed left the threat model, and did not count",
        "some by rounding cost nothing; many make the attack weak",
    ),
    "straight_through_cast": Explained(
        "the model takes integers; images are rounded and gradients pass straight through",
        "evaluate the network before the cast if you can",
    ),
    "non_finite_logits": Explained(
        "an attack found logits that are no finite numbers, which count as wrong", "find where the network overflows"
    ),
    "outputs_between_0_and_1": Explained(
        "all outputs lie between 0 and 1", "if they are probabilities, say `--outputs=probabilities`"
    ),
    "saturated_probabilities": Explained(
        "probabilities of exactly 0 or 1, whose gradient is lost, counted in `saturated_examples`",
        "evaluate the logits",
    ),
    "dlr_fell_back_to_margin": Explained(
        "fewer classes than the attack's loss is made for", "none: the margin takes its place"
    ),
    "targeted_dlr_fell_back_to_margin": Explained(
        "fewer classes than the attack's loss is made for", "none: the margin takes its place"
    ),
    "fewer_target_classes": Explained("fewer wrong classes than an attack would aim at", "none"),
    "fewer_targets_than_classes": Explained(
        "an attack aims at some of the wrong classes only, as AA+MT's nine of the 99 of CIFAR-100",
        "more targets, `multi_targeted.num_targets = 99`, for a tighter bound",
    ),
}

# Attacks that ask the attacked classifier for no gradients.
BLACK_BOX = ("square", "transfer")
# Attacks that aim at classes.
TARGETED = ("apgd-t", "fab-t", "multi-targeted")
# As many wrong classes as upstream's standard version aims at; in L1, APGD-T takes five.
_STANDARD_TARGETS = {"apgd-t": 9, "fab-t": 9}
# Verdicts that differ on two examples in a thousand may do so by chance.
_BY_CHANCE = 0.002


def explained(name: str) -> Explained | None:
    """What a warning of results means; None of one that this version does not know."""
    if name not in WARNINGS and any(name == f"{attack}_beats_white_box" for attack in BLACK_BOX):
        name = "{attack}_beats_white_box"
    return WARNINGS.get(name)


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
