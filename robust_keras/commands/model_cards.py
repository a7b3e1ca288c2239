"""What the card beside a SavedModel says of the run that made it, and of its threat model."""

import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from robust_keras import storage, threats
from robust_keras.commands import gin_text
from robust_keras.foreign_files import printable
from robust_keras.reports import class_names as names_of_classes
from robust_keras.saved_models import opening


def of_run(
    card: Mapping[str, Any], *, licence: str | None = None, class_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """What a run says of its network, with the threat model of its recipe.

    Args:
        card: as `export.network_of_run` gives it.
        licence: of the weights.
        class_names: in order; None for those of a data set that the package knows.
    """
    threat = _threat_of(card.get("config"), "config")
    told: dict[str, Any] = {"licence": licence, "class_names": class_names and list(class_names)}
    if class_names is None:
        known = names_of_classes.BY_DATASET.get(card.get("dataset") or "")
        told["class_names"] = known and list(known)
    if threat is not None:
        told["threat_model"] = {
            "norm": threat.norm,
            "epsilon": threat.epsilon,
            "epsilon_fraction": threat.epsilon_fraction,
        }
    return {**card, **{name: value for name, value in told.items() if value is not None}}


def another_threat(saved_model: str, threat: threats.Threat) -> str | None:
    """A line for people where a model's card says that it was trained, or chosen, for another threat model.

    Args:
        saved_model: the path of a model, with or without a card.
        threat: what it is attacked within.
    """
    try:
        stated = _stated_threat(posixpath.join(saved_model, opening.CARD))
    except ValueError:  # Other tools write cards of that name too.
        return None
    return _differing("model's card", stated, threat)


def another_threat_of_run(config: str, threat: threats.Threat) -> str | None:
    """The same line of a run.

    Args:
        config: its gin configuration.
        threat: what it is attacked within.
    """
    return _differing("run", _threat_of(config, "config.gin"), threat)


def _differing(what: str, stated: threats.Threat | None, threat: threats.Threat) -> str | None:
    if stated is None or (stated.norm, stated.epsilon) == (threat.norm, threat.epsilon):
        return None
    return (
        f"The {what} is for {stated.norm} {stated.epsilon_fraction}; the attacks here are of {threat.norm} "
        f"{threat.epsilon_fraction}, as NORM and EPSILON say"
    )


def published(saved_model: str) -> str | None:
    """A line for people where a model's card says which accuracies were published of it.

    Args:
        saved_model: the path of a model, with or without a card.
    """
    try:
        stated = (storage.read_object(posixpath.join(saved_model, opening.CARD)) or {})["published"]
        clean, robust = (100 * float(stated[f"{kind}_accuracy"]) for kind in ("clean", "robust"))
        within = f"{stated['attacks']}, {stated['norm']} {stated['epsilon']}, {int(stated['num_examples']):,} images"
        return printable(f"Published, {stated['paper']}: clean {clean:.2f} %, robust {robust:.2f} % ({within})")
    except (ValueError, TypeError, KeyError, OverflowError):  # Of none, or other tools' cards.
        return None


def _stated_threat(path: str) -> threats.Threat | None:
    return _threat_of((storage.read_object(path) or {}).get("config"), path)


def _threat_of(config: Any, path: str) -> threats.Threat | None:
    bound = gin_text.bindings(config, path) if isinstance(config, str) else {}

    def stated(argument):  # What training attacks within comes before what validation does.
        names = (f"{scope}threat.{argument}" for scope in ("training/", "", "pgd40/"))
        return next((bound[name].value for name in names if name in bound), None)

    norm, epsilon = stated("norm"), stated("epsilon")
    return None if norm is None or epsilon is None else threats.threat(norm=norm, epsilon=epsilon)
