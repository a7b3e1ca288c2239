"""How the numbers of evaluations are to be read: what was attacked, how, how sure they are, what can be compared."""

from collections.abc import Sequence

from robust_keras.evaluation import warnings
from robust_keras.reports import explanations
from robust_keras.reports.blocks import Code, Items, Paragraph
from robust_keras.reports.contents import Evaluation

_UPPER_BOUND = (
    "Robust accuracy is the share of images that the model gets right and that none of the attacks changed so that it "
    "gets them wrong. It is an upper bound of the true one: an image that still stands may fall to a better attack.",
)


def percent(share: float) -> str:
    """A share as the tables have it."""
    return f"{100 * share:.2f} %"


def sentence(evaluation: Evaluation) -> Paragraph:
    """What was measured, in one sentence."""
    results = evaluation.results
    low, high = results["confidence_interval_95"]
    names = list(dict.fromkeys(each["name"] for each in results["attacks"]))
    threat = Code(f"{results['norm']} {results['epsilon_fraction']}")
    return Paragraph(
        (
            f"Of {results['num_examples']:,} images{'' if not _dataset(evaluation) else ' of '}",
            *_dataset(evaluation),
            ", the model ",
            Code(results["model"]["path"]),
            f" gets {percent(results['clean_accuracy'])} right as they are, and {percent(results['robust_accuracy'])} "
            f"(95 % interval {100 * low:.2f} to {100 * high:.2f} %) after ",
            *((*listed(names), " changed them within ", threat) if names else ("no attack, within ", threat)),
            ".",
        )
    )


def points(evaluation: Evaluation) -> Items:
    """How the numbers are to be read: what was attacked, how, and how sure they are."""
    results = evaluation.results
    low, high = results["confidence_interval_95"]
    threat = explanations.threat(results["norm"], results["epsilon_fraction"])
    items: list[tuple[str, ...]] = [
        (*_knowledge(evaluation), f" The attacker may {threat}."),
        _UPPER_BOUND,
        (strength(evaluation),),
        (
            f"The interval (Wilson), {100 * low:.2f} to {100 * high:.2f} %, is for other images of the same kind "
            f"({results['num_examples']:,} were attacked). It speaks neither of better attacks nor of models trained "
            "with another seed.",
        ),
        _about_warnings(evaluation) if "warnings" in results else ("Warnings were not recorded.",),
    ]
    if results.get("robust_accuracy_uint8") is not None:
        in_bytes = percent(results["robust_accuracy_uint8"])
        items.append((f"With adversarial images rounded to whole bytes, as a picture file holds them: {in_bytes}.",))
    if evaluation.security is not None:
        counts = [sum(each["passed"] is kind for each in evaluation.security["checks"]) for kind in (True, False, None)]
        items.append(("Sanity checks: {} passed, {} failed, {} not measured.".format(*counts),))
    return Items(tuple(items))


def together(evaluations: Sequence[Evaluation]) -> Items:
    """How the numbers of several evaluations are to be read, and whether they can be compared."""
    facets = {
        "images": [_images(each) for each in evaluations],
        "threat models": [(each.results["norm"], each.results["epsilon_fraction"]) for each in evaluations],
        "attacks": [[(one["name"], one.get("parameters")) for one in each.results["attacks"]] for each in evaluations],
    }
    differ = [name for name, values in facets.items() if any(value != values[0] for value in values)]
    same = [name for name in facets if name not in differ]
    threats = dict.fromkeys(facets["threat models"])
    items: list[tuple[str, ...]] = [
        (f"{norm} {radius}: the attacker may {explanations.threat(norm, radius)}.",) for norm, radius in threats
    ]
    for words in dict.fromkeys(_knowledge(each) for each in evaluations):
        of = [each.folder for each in evaluations if _knowledge(each) == words]
        items.append((*listed(of), ": ", *words))
    items.append(_UPPER_BOUND)
    if differ:
        also = f" (the {' and '.join(same)} are the same)" if same else ""
        items.append((f"The {' and the '.join(differ)} differ{also}: a difference of accuracies may come from there.",))
    else:
        items.append(("Images, threat model and attacks are the same for all.",))
    for told in dict.fromkeys(strength(each) for each in evaluations):
        of = [each.folder for each in evaluations if strength(each) == told]
        items.append((*listed(of), f": {told}"))
    items.append(("Intervals (Wilson) are for other images of the same kind, not for models of other seeds.",))
    return Items(tuple(items))


def _images(evaluation):
    dataset = evaluation.results.get("dataset") or {}
    named = tuple(dataset.get(name) for name in ("name", "split", "held_out"))
    return dataset.get("sha256") or (*named, evaluation.results["num_examples"])


def strength(evaluation: Evaluation) -> str:
    """What claims can rest on, of the attacks that ran."""
    return explanations.strength(evaluation.results["attacks"], _wrong_classes(evaluation))


def _wrong_classes(evaluation: Evaluation) -> int | None:
    """How many wrong classes an image has, as far as names or numbers of classes show."""
    examples = evaluation.examples
    if "fewer_targets_than_classes" in evaluation.results.get("warnings", ()):
        return None
    if evaluation.class_names:
        return max(len(evaluation.class_names) - 1, 1)
    if examples is None:
        return None
    names = {"label", "clean_prediction", "adversarial_prediction"} & examples.keys()
    return max(1, *(int(examples[name].max()) for name in names))


def sees_no_gradients(evaluation: Evaluation) -> bool:
    """Whether there were attacks, none of which saw gradients of the model."""
    attacks = evaluation.results["attacks"]
    return bool(attacks) and all(each["name"] in warnings.BLACK_BOX for each in attacks)


def _knowledge(evaluation: Evaluation) -> tuple[str, ...]:
    """What the attacks knew of the model."""
    if not sees_no_gradients(evaluation):
        return ("The attacker knows the model and its gradients.",)
    records = [each.get("parameters", {}) for each in evaluation.results["attacks"] if each["name"] == "transfer"]
    surrogates = [each["surrogate"] for each in records if isinstance(each.get("surrogate"), str)]
    made_for = (" Images of ", Code("transfer"), " were made for ", *listed(surrogates), ".") if surrogates else ()
    return ("The attacks saw no gradients of the model.", *made_for)


def _about_warnings(evaluation: Evaluation) -> tuple[str, ...]:
    names = evaluation.results["warnings"]
    if not names:
        is_full = explanations.full_list(evaluation.results["attacks"], _wrong_classes(evaluation))
        weak = "weak attacks, " if is_full else ""
        return (f"Nothing that the evaluation looks for (masked gradients, {weak}broken outputs) was seen.",)
    return (
        f"{len(names)} warning{'s speak' if len(names) > 1 else ' speaks'} against these numbers: ",
        *listed(names),
        ".",
    )


def _dataset(evaluation: Evaluation) -> tuple[str, ...]:
    dataset = evaluation.results.get("dataset") or {}
    if not isinstance(dataset.get("name"), str):
        return ()
    name, part = Code(dataset["name"]), dataset.get("split")
    if not isinstance(part, str):
        return (name,)
    some = "all of " if dataset.get("num_examples", 0) is None else "the first of "
    held_out = held_out_of(evaluation)
    which = "its part "
    if held_out is not None:
        which = f"the {held_out:,} images that the run holds out, and chooses its weights by, of its part "
    return (name, f" ({some}{which}", Code(part), ")")


def held_out_of(evaluation: Evaluation) -> int | None:
    """How many images the run holds out and chooses its weights by, where those were attacked; None for others."""
    held_out = (evaluation.results.get("dataset") or {}).get("held_out")
    return held_out if explanations.is_count(held_out) else None


def listed(names: Sequence[str]) -> tuple[str, ...]:
    """Names with commas and an 'and'."""
    words: list[str] = []
    for k, name in enumerate(names):
        words += [", " if 0 < k < len(names) - 1 else " and " if k else "", Code(name)]
    return tuple(word for word in words if word)
