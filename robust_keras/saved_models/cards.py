"""A model card, for programs and for people: what a network is, how it was made, and what was measured of it."""

import hashlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from robust_keras import foreign_files
from robust_keras.saved_models import measured, signatures

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
    f"Images with values outside [0, 1] by more than {signatures.ROUNDING:g}, or NaN, end in an error, but for servers "
    "that compile the graph by XLA, which drops this check: look at values before.",
)


def described(network: keras.Model, *, gradient: bool) -> dict[str, Any]:
    """What a card says of any network."""
    shape, num_classes = [*network.input_shape[1:]], network.output_shape[-1]
    image = {"image": f"float32 {['batch', *shape]} in [0, 1]"}
    return {
        "name": network.name,
        "num_parameters": sum(int(np.prod(weight.shape)) for weight in network.trainable_weights),
        "num_classes": num_classes,
        "inputs": {
            "serving_default": image,
            "serving_uint8": {"image": f"uint8 {['batch', *shape]}"},
            **({"gradient": {**image, "label": "int64 ['batch']"}} if gradient else {}),
        },
        "output": {
            "logits": f"float32 {['batch', num_classes]}",
            "probabilities": f"float32 {['batch', num_classes]}",
            "class": "int64 ['batch']",
        },
        "weights_sha256": measured.weights_digest(map(np.asarray, network.weights)),
        "intended_use": INTENDED_USE,
        "limits": list(LIMITS),
    }


def completed(card: Mapping[str, Any], *, num_classes: int) -> dict[str, Any]:
    """A card of a caller with the digest of its recipe.

    Raises:
        ValueError: for names of classes that are not as many as the network has.
    """
    names = card.get("class_names")
    if names is not None and len(names) != num_classes:
        raise ValueError(f"Expected {num_classes} class names, one for each output. Received: {len(names)}")
    config = card.get("config")
    digest = {"config_sha256": hashlib.sha256(config.encode()).hexdigest()} if isinstance(config, str) else {}
    return {**card, **digest}


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
    return "not stated" if text is None else foreign_files.as_code(text)
