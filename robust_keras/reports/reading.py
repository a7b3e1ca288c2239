"""How the numbers of evaluations are to be read: what was attacked, how, how sure they are, what can be compared."""

from collections.abc import Sequence

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
    return Paragraph(
        (
            f"Of {results['num_examples']:,} images{'' if not _dataset(evaluation) else ' of '}",
            *_dataset(evaluation),
            ", the model ",
            Code(results["model"]["path"]),
            f" gets {percent(results['clean_accuracy'])} right as they are, and {percent(results['robust_accuracy'])} "
            f"(95 % interval {100 * low:.2f} to {100 * high:.2f} %) however they were changed within ",
            Code(f"{results['norm']} {results['epsilon_fraction']}"),
            " by ",
            *(listed(names) if names else ("nothing: no attack ran",)),
            ".",
        )
    )


def points(evaluation: Evaluation) -> Items:
    """How the numbers are to be read: what was attacked, how, and how sure they are."""
    results = evaluation.results
    low, high = results["confidence_interval_95"]
    threat = explanations.threat(results["norm"], results["epsilon_fraction"])
    items: list[tuple[str, ...]] = [
        (f"The attacker knows the model and its gradients, and may {threat}.",),
        _UPPER_BOUND,
        (explanations.strength(results["attacks"]),),
        (
            f"The interval (Wilson), {100 * low:.2f} to {100 * high:.2f} %, is for other images of the same kind "
            f"({results['num_examples']:,} were attacked). It speaks neither of better attacks nor of models trained "
            "with another seed.",
        ),
        _about_warnings(results["warnings"]) if "warnings" in results else ("Warnings were not recorded.",),
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
        (f"{norm} {radius}: the attacker knows the model, and may {explanations.threat(norm, radius)}.",)
        for norm, radius in threats
    ]
    items.append(_UPPER_BOUND)
    if differ:
        also = f" (the {' and '.join(same)} are the same)" if same else ""
        items.append((f"The {' and the '.join(differ)} differ{also}: a difference of accuracies may come from there.",))
    else:
        items.append(("Images, threat model and attacks are the same for all.",))
    for told in dict.fromkeys(explanations.strength(each.results["attacks"]) for each in evaluations):
        of = [each.folder for each in evaluations if explanations.strength(each.results["attacks"]) == told]
        items.append((*listed(of), f": {told}"))
    items.append(("Intervals (Wilson) are for other images of the same kind, not for models of other seeds.",))
    return Items(tuple(items))


def _images(evaluation):
    dataset = evaluation.results.get("dataset") or {}
    return dataset.get("sha256") or (dataset.get("name"), dataset.get("split"), evaluation.results["num_examples"])


def _about_warnings(names: list[str]) -> tuple[str, ...]:
    if not names:
        return ("Nothing that the evaluation looks for (masked gradients, weak attacks, broken outputs) was seen.",)
    return (
        f"{len(names)} warning{'s speak' if len(names) > 1 else ' speaks'} against these numbers: ",
        *listed(names),
        ".",
    )


def _dataset(evaluation: Evaluation) -> tuple[str, ...]:
    dataset = evaluation.results.get("dataset") or {}
    if not isinstance(dataset.get("name"), str):
        return ()
    part = dataset.get("split")
    return (Code(dataset["name"]), *((" (the first of its part ", Code(part), ")") if isinstance(part, str) else ()))


def listed(names: Sequence[str]) -> tuple[str, ...]:
    """Names with commas and an 'and'."""
    words: list[str] = []
    for k, name in enumerate(names):
        words += [", " if 0 < k < len(names) - 1 else " and " if k else "", Code(name)]
    return tuple(word for word in words if word)
