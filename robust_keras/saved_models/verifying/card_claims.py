"""Whether both cards say what the claim says, and no more: what no export writes is refused, or told as not checked."""

import hashlib
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from robust_keras.saved_models.verifying.card import INTENDED_USE, LIMITS, readable
from robust_keras.saved_models.verifying.claim import Claim
from robust_keras.saved_models.verifying.files import CARDS, read_json, text_of

# What a card says of an evaluation, in the words of results.json, and what else it knows of one.
_SAID_TWICE = {"num_examples", "clean_accuracy", "robust_accuracy", "norm", "epsilon", "epsilon_fraction", "seed"}
_SAID_TWICE |= {"confidence_interval_95", "attacks", "robust_accuracy_after", "warnings", "dataset"}
_THREAT = {"norm", "epsilon", "epsilon_fraction"}
# The keys of a card that hold objects, and their keys.
_OBJECTS = {
    "evaluation": _SAID_TWICE | {"versions", "model_sha256", "results_sha256"},
    "inputs": {"serving_default", "serving_uint8", "gradient"},
    "output": {"logits", "probabilities", "class"},
    "versions": {"robust_keras", "tensorflow", "keras", "python", "jax"},
    "threat_model": _THREAT,
    "validation": {"best", "last", "last_validation"},
    "source": {"file", "sha256", "size", "format", "key", "url"},
    "published": {"name", "clean_accuracy", "robust_accuracy", "attacks", "num_examples", "paper", *_THREAT},
    "normalization": {"mean", "std", "padding"},
}
_NUMBERS = {"size", "epsilon", "clean_accuracy", "robust_accuracy", "num_examples", "mean", "std", "padding"}
_COUNTS = {"num_parameters", "num_classes", "step"}
_TEXTS = {"name", "weights_sha256", "config_sha256", "config", "intended_use", "limits", "weights", "dataset"}
_TEXTS |= {"extra_data", "extra_data_is_the_papers", "licence", "class_names", "architecture", "activation"}
_METRICS = {"val_clean", "val_robust", "val_clean_averaged", "val_robust_averaged"}
# Looked at on their own, and texts that are the package's own or the recipe.
_CHECKED = {"evaluation", "validation"}
_PROSE = {"evaluation", "config", "intended_use", "limits"}
# What nobody checks of these: they are the maker's word.
_ON_TRUST = ("validation", "published", "config", "class_names", "licence")
_DIGEST = re.compile("[0-9a-f]{64}")
_ACCURACY = re.compile(r"(?i)\d\s*(%|\u066a|\ufe6a|\uff05|per ?cent)|(?<![\w.])0?\.[1-9]\d*(?![\w.])|accura|certified")


def check_cards(claim: Claim | None, folder: pathlib.Path) -> str:
    """Whether both cards say what the claim says, and no more.

    Returns:
        What of them is the maker's word.

    Raises:
        ValueError: for a readable card that is not what model_card.json says, an accuracy that is not claimed, and
            keys that no export writes and that hold numbers.
    """
    card, text = read_json(folder / CARDS[0]), text_of(folder / CARDS[1])
    unknown = _unknown(card)
    if text != readable(card):
        raise ValueError(f"{CARDS[1]} does not read as {CARDS[0]} says")
    config = card.get("config")
    if isinstance(config, str) and card.get("config_sha256") != hashlib.sha256(config.encode()).hexdigest():
        raise ValueError(f"{CARDS[0]} has another recipe than its SHA-256 says")
    if "evaluation" in card and not claim:
        raise ValueError(f"{CARDS[0]} has an evaluation, and nothing beside the model shows it")
    told = claim.told if claim else {}
    if claim and {card["num_classes"], len(card.get("class_names") or claim.logits[0])} != {claim.logits.shape[1]}:
        raise ValueError(f"{CARDS[0]} has another number of classes than the model")
    if differ := [name for name, value in card.get("evaluation", {}).items() if _differs(name, value, told)]:
        raise ValueError(f"{CARDS[0]} and the claim differ in {', '.join(differ)}")
    published = card.get("published") or {}
    if (
        claim
        and _same_threat(published, told)
        and published["robust_accuracy"] > told["confidence_interval_95"][1] + 0.02
    ):
        raise ValueError(f"{CARDS[0]} has a published robust accuracy above the claimed one")
    for name, value in _stated(card):
        # Of a short attack on validation images, or by others, but no more than are right without any.
        if claim and value > told["clean_accuracy"] + 0.1:
            raise ValueError(
                f"{CARDS[0]} says {name} {value:.4g}; {told['clean_accuracy']:.4g} is claimed without attack"
            )
    on_trust = [*(name for name in _ON_TRUST if card.get(name)), *unknown]
    return "say what is claimed" + (f"; not checked: {', '.join(on_trust)}" if on_trust else "")


def _differs(name: str, value: Any, told: Mapping[str, Any]) -> bool:
    """The evaluated model may be an export of the same weights, with another SHA-256."""
    return (name in _SAID_TWICE or name == "versions") and value != told.get(name)


def _same_threat(published: Mapping[str, Any], told: Mapping[str, Any]) -> bool:
    return published.get("norm") == told.get("norm") and published.get("epsilon") in (
        told.get("epsilon"),
        told.get("epsilon_fraction"),
    )


def _unknown(card: Mapping[str, Any]) -> list[str]:
    """Keys and texts of a card that no export writes, and that hold no number.

    Raises:
        ValueError: for those that hold one, and for accuracies in texts.
    """
    unknown = [key for key in card if not (key in _OBJECTS or key in _COUNTS or key in _TEXTS)]
    unknown += [key for key, ours in (("intended_use", INTENDED_USE), ("limits", [*LIMITS])) if card.get(key) != ours]
    if numbers := [key for key in unknown if _numbers({key: card.get(key)}, digits=True)]:
        raise ValueError(f"{CARDS[0]} has numbers where no export writes any: {', '.join(numbers)}")
    for key, value in card.items():
        inner = value if key in _OBJECTS and isinstance(value, dict) else {key: value}
        free = key in _COUNTS or key in _CHECKED
        if (
            (key in _OBJECTS and value is not None and (inner is not value or not inner.keys() <= _OBJECTS[key]))
            or (key in _COUNTS and type(value) not in (int, type(None)))
            or (not free and any(_numbers(each) for name, each in inner.items() if name not in _NUMBERS))
        ):
            raise ValueError(f"{CARDS[0]} has another {key} than an export writes")
    evaluation = card.get("evaluation") or {}
    for part in (card, evaluation, card.get("source") or {}):
        for key, value in part.items():
            if key.endswith("sha256") and not (value is None or _DIGEST.fullmatch(str(value))):
                raise ValueError(f"{CARDS[0]} has a {key} that is none")
    texts = {key: value for key, value in card.items() if key not in _PROSE}
    texts["shown"] = [evaluation.get("dataset"), evaluation.get("warnings"), evaluation.get("seed")]
    texts["attacks"] = [each["name"] for each in evaluation.get("attacks", [])]
    for each in _leaves(texts):
        if isinstance(each, str) and each not in _SAID_TWICE and _ACCURACY.search(each):
            raise ValueError(f"{CARDS[0]} has an accuracy in a text: {each}")
    return unknown


def _stated(card: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Accuracies under attack that a card states beside its evaluation."""
    for name, found in (card.get("validation") or {}).items():
        if found is None:
            continue
        if not isinstance(found, dict) or not found.keys() <= {"step", "metrics"} or type(found["step"]) is not int:
            raise ValueError(f"{CARDS[0]} has another validation than an export writes: {name}")
        if not found["metrics"].keys() <= _METRICS or not all(
            type(each) in (int, float) for each in found["metrics"].values()
        ):
            raise ValueError(f"{CARDS[0]} has other metrics than an export writes: {name}")
        yield from ((key, value) for key, value in found["metrics"].items() if "robust" in key)
    for name in ("clean_accuracy", "robust_accuracy") if card.get("published") else ():
        yield f"published {name}", card["published"][name]


def _leaves(value: Any) -> Iterator[Any]:
    """All keys and values in what JSON holds."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            waiting += [*each, *each.values()]
        elif isinstance(each, list):
            waiting += each
        else:
            yield each


def _numbers(value: Any, *, digits: bool = False) -> bool:
    """Whether it holds a number, or a text with digits."""
    return any(
        type(each) in (int, float) or (digits and isinstance(each, str) and re.search(r"\d", each) is not None)
        for each in _leaves(value)
    )
