"""Threat models and attacks in plain words, for who sees a report and nothing else."""

import math
from collections.abc import Sequence
from typing import Any

# Of attacks, by name: what they do.
ATTACKS = {
    "pgd": "follows the gradient; its settings say beforehand how long its steps are (PGD, Madry et al. 2018)",
    "apgd-ce": "follows the gradient of the cross-entropy; adapts its steps (Croce and Hein 2020)",
    "apgd-dlr": "follows the gradient of the difference of logits ratio, which is the same at any scale of the logits",
    "apgd-t": "follows the gradient of the difference of logits ratio to one wrong class after the other",
    "fab": "looks for the nearest image of another class (Croce and Hein 2020)",
    "fab-t": "looks for the nearest image of one wrong class after the other",
    "square": "changes random squares and sees the outputs alone, no gradients (Andriushchenko et al. 2020)",
    "multi-targeted": "follows the gradient of the margin to one wrong class after the other (Gowal et al. 2019)",
    "transfer": "takes the images that an attack made for another model; sees no gradients of this one",
}
# Of the sanity checks, by name: what they look for.
CHECKS = {
    "unbounded_attack_wins": "An attack without a limit breaks every image",
    "more_steps_no_worse": "More steps break no fewer images",
    "larger_radius_no_better": "A larger radius leaves no more images right",
    "black_box_weaker": "Attacks without gradients are no stronger than those with them",
    "random_noise_weaker": "Random noise is weaker than the attack",
}
# Lists of attacks that claims can rest on, and of each attack the least that they run.
_LISTS = {
    "AutoAttack's standard version": {
        "apgd-ce": {"num_steps": 100},
        "apgd-t": {"num_steps": 100, "num_targets": 5},
        "fab-t": {"num_steps": 100, "num_targets": 9},
        "square": {"num_queries": 5000},
    },
    "AA+MT, the protocol of Gowal et al. (2020)": {
        "apgd-ce": {"num_steps": 100, "num_restarts": 5},
        "apgd-dlr": {"num_steps": 100, "num_restarts": 5},
        "multi-targeted": {"num_steps": 200, "num_restarts": 10, "num_targets": 9},
    },
}

_COUNTS = (
    ("num_steps", "step", "steps"),
    ("num_queries", "query", "queries"),
    ("num_restarts", "restart", "restarts"),
    ("num_targets", "target", "targets"),
)


def threat(norm: str, epsilon_fraction: str) -> str:
    """What an attacker may do, as the rest of a sentence that begins with "may"."""
    return {
        "Linf": f"change each value of each pixel by at most {epsilon_fraction} of the range from black to white",
        "L2": f"change the image by at most {epsilon_fraction} in L2: the root of the sum of squared changes, where "
        "black is 0 and white is 1",
        "L1": f"change the image by at most {epsilon_fraction} in L1: the sum of changes, where black is 0 and white "
        "is 1",
    }.get(norm, f"change the image by at most {epsilon_fraction} in the norm {norm}")


def full_list(attacks: Sequence[dict[str, Any]], wrong_classes: int | None) -> str | None:
    """The name of a list of attacks that claims can rest on and that ran whole; None where none did.

    Args:
        attacks: their records in results.json.
        wrong_classes: how many there are, which is as many as an attack can aim at; None where that is not known.
    """
    for name, needed in _LISTS.items():
        if all(
            any(_is_as_long(each, wanted, least, wrong_classes) for each in attacks) for wanted, least in needed.items()
        ):
            return name
    return None


def strength(attacks: Sequence[dict[str, Any]], wrong_classes: int | None) -> str:
    """What is known of attacks that ran together; arguments as of `full_list`."""
    if whole := full_list(attacks, wrong_classes):
        return f"These are the attacks of {whole}, or more, with as many steps: the usual ground for claims."
    for name, needed in _LISTS.items():
        if needed.keys() <= {each["name"] for each in attacks}:
            return (
                f"These are the attacks of {name}, but with fewer steps, restarts or targets: the full ones may well "
                "leave less, and claims should not rest on this number."
            )
    return (
        "These are fewer than AutoAttack's standard version or AA+MT has: those may well leave less, and claims should "
        "not rest on this number."
    )


def _is_as_long(record: dict[str, Any], name: str, least: dict[str, int], wrong_classes: int | None) -> bool:
    found = record.get("parameters", {})
    if "num_targets" in least and wrong_classes is not None:
        least = {**least, "num_targets": min(least["num_targets"], wrong_classes)}
    return record["name"] == name and all(
        is_count(found.get(key)) and found[key] >= number for key, number in least.items()
    )


def parameters(record: dict[str, Any]) -> str:
    """How an attack ran, of its record in results.json: steps, restarts, targets and so on, as far as it says."""
    found = record.get("parameters", {})
    told = [
        f"{found[name]:,} {one if found[name] == 1 else several}"
        for name, one, several in _COUNTS
        if is_count(found.get(name))
    ]
    if isinstance(found.get("loss_fn"), str):
        told.append(f"loss {found['loss_fn'].replace('_', ' ')}")
    if isinstance(found.get("step_rule"), str):
        told.append(f"step rule {found['step_rule']}")
    if isinstance(found.get("step_size"), (str, int, float)):
        told.append(f"step size {found['step_size']}")
    if isinstance(found.get("random_start"), bool):
        told.append("from a random start" if found["random_start"] else "from the image itself")
    if isinstance(found.get("search_dtype"), str):
        told.append(f"searched in {found['search_dtype']}")
    return ", ".join(told) or "\N{EN DASH}"


def is_count(value: Any) -> bool:
    """Whether it is a number of something."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def seconds(value: Any) -> str:
    """A time as people say it; a dash where it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        return "\N{EN DASH}"
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"
