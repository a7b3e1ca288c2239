"""How a model card reads: its text follows from model_card.json alone, so that whoever checks one checks the other."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from robust_keras.shown_text import as_code

_ACCURACIES = ("clean_accuracy", "robust_accuracy")
INTENDED_USE = (
    "To classify images of the kind that it was trained on, where somebody may change each a little on purpose, and to "
    "study attacks and defences. It was not made for decisions about people, nor for images of another kind: nothing "
    "here was measured of either."
)
LIMITS = (
    "A robust accuracy is an upper bound: it counts the images on which the attacks that were run found nothing, so "
    "that another attack can only lower it. It is no certificate for any single image.",
    "It says nothing of other norms, larger radii, patches, rotations, blur, noise or weather, other data, or of what "
    "a camera or a compression does to an image before it gets here.",
    "The interval covers the choice of the test images and nothing else: not training with another seed, and no "
    "stronger attack.",
    "Probabilities were not calibrated: a confident answer is no safe one.",
    "Images with values outside [0, 1] by more than 0.0001, or NaN, end in an error, but for servers "
    "that compile the graph by XLA, which drops this check: look at values before.",
)


def readable(card: Mapping[str, Any]) -> str:
    """A card in Markdown; whatever came from a file or a user stands as code, so that it steers no page."""
    parts = [f"# Model card: {_code(card['name'])}", *_paragraphs(card)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _paragraphs(card: Mapping[str, Any]) -> Iterator[str]:
    yield _bullets(
        [
            ("Parameters", f"{card['num_parameters']:,}"),
            ("Classes", ", ".join(map(_code, card.get("class_names") or [card["num_classes"]]))),
            ("Trained on", _code(card.get("dataset"))),
            ("With extra data", _code(card["extra_data"]) if card.get("extra_data") else "none"),
            ("Trained against", _threat(card.get("threat_model"))),
            ("Weights", _code(card.get("weights"))),
            ("After step", _code(card.get("step"))),
            *_source(card.get("source"), card.get("published")),
            ("SHA-256 of the weights", _code(card["weights_sha256"])),
            ("SHA-256 of the recipe", _code(card.get("config_sha256"))),
            ("Licence", _code(card.get("licence"))),
        ]
    )
    yield "## Measured under attack"
    yield _evaluation(card.get("evaluation"))
    yield "## Validation"
    yield _validation(card.get("validation"))
    yield "## Intended use"
    yield textwrap.fill(card["intended_use"], 110)
    yield "## What these numbers do not say"
    yield "\n".join(textwrap.fill(f"- {limit}", 110, subsequent_indent="  ") for limit in card["limits"])
    yield "## Inputs and outputs"
    yield _bullets(
        [(_code(name), "; ".join(f"{_code(k)} {_code(v)}" for k, v in takes.items())) for name, takes in _items(card)]
    )
    yield "## Versions"
    yield ", ".join(f"{_code(name)} {_code(version)}" for name, version in card["versions"].items())
    yield "`model_card.json` has all of this for programs, and the recipe. `manifest.json` lists the files; " + (
        "`python verify.py` checks them, and what is claimed here."
    )


def _source(source: Any, published: Any) -> Iterator[tuple[str, str]]:
    """Where imported weights are from, and what others have measured of them."""
    if isinstance(source, Mapping):
        yield "Imported from", f"{_code(source.get('file'))}, SHA-256 {_code(source.get('sha256'))}"
    if isinstance(published, Mapping):
        clean, robust = (_percent(published.get(name)) for name in _ACCURACIES)
        yield "Published by others", f"{clean} clean, {robust} robust under {_code(published.get('attacks'))}"


def _items(card):
    yield from card["inputs"].items()
    yield "outputs", card["output"]


def _evaluation(found: Mapping[str, Any] | None) -> str:
    if not found:
        return "Nothing beyond validation: no evaluation of these weights was given to the export."
    low, high = (_percent(bound) for bound in found["confidence_interval_95"])
    data = found.get("dataset")
    data = data if isinstance(data, Mapping) else {}
    lines = [
        ("Threat model", _threat(found)),
        ("Images", f"{found['num_examples']:,} of {_code(data.get('name'))}, {_code(data.get('split'))}"),
        ("Clean accuracy", _percent(found["clean_accuracy"])),
        ("Robust accuracy, at most", f"{_percent(found['robust_accuracy'])}, in {low} to {high} at 95 %"),
        ("Attacks", ", ".join(_code(each["name"]) for each in found["attacks"])),
        ("Seed", _code(found.get("seed"))),
        ("Warnings", ", ".join(map(_code, map(_warning, found["warnings"]))) or "none"),
        ("SHA-256 of the evaluated model", _code(found["model_sha256"])),
        ("SHA-256 of results.json", _code(found["results_sha256"])),
    ]
    return _bullets(lines)


def _warning(warning: Any) -> Any:
    return warning.get("name", warning) if isinstance(warning, Mapping) else warning


def _validation(found: Any) -> str:
    if not isinstance(found, Mapping) or not found:
        return "None is known."
    lines = []
    for name, of in found.items():
        metrics = of.get("metrics") if isinstance(of, Mapping) else None
        if isinstance(metrics, Mapping):
            shown = ", ".join(f"{_code(column)} {_percent(value)}" for column, value in metrics.items())
            lines.append((_code(name), f"step {_code(of.get('step'))}: {shown}"))
    return (
        "On images held out of training, by a short attack. The best of several was chosen by these numbers, so that "
        "they flatter it.\n\n" + _bullets(lines)
        if lines
        else "None is known."
    )


def _threat(threat: Any) -> str:
    if not isinstance(threat, Mapping):
        return _code(None)
    return f"{_code(threat.get('norm'))}, radius {_code(threat.get('epsilon_fraction'))}"


def _percent(value: Any) -> str:
    return f"{100 * value:.2f} %" if isinstance(value, (int, float)) else _code(value)


def _bullets(lines: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in lines)


def _code(text: Any) -> str:
    return "not stated" if text is None else as_code(text)
