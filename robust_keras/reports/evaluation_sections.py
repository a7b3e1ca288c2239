"""What a report says of one evaluation, a section for each question."""

import re

import numpy as np

from robust_keras.evaluation import warnings
from robust_keras.evaluation.results import named_by_warnings
from robust_keras.reports import class_sections, explanations, plots, reading, thumbnails
from robust_keras.reports.blocks import Code, Items, Listing, Paragraph, Picture, Pictures, Plot, Section, Table
from robust_keras.reports.contents import Evaluation

_READING = ("weights", "step", "input_range", "input_layout", "outputs", "logits_output")
_DASH = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"
_TIMES = "\N{MULTIPLICATION SIGN}"


def sections(evaluation: Evaluation, picture_bytes: int, trained_for: str | None) -> tuple[Section, ...]:
    """All sections of an evaluation.

    Args:
        evaluation: one.
        picture_bytes: how many bytes its pictures may take.
        trained_for: the norm and radius that its model was trained for; None where that is not known.
    """
    return (
        Section(("Warnings",), tuple(_warnings(evaluation))),
        Section(("What is not known",), (_unknown(evaluation, trained_for),)),
        Section(("Attack by attack",), tuple(_attacks(evaluation))),
        Section(("Robust accuracy against the radius",), tuple(_radius(evaluation))),
        Section(("By class",), tuple(class_sections.blocks(evaluation))),
        Section(("What the attacks changed",), tuple(_pictures(evaluation, picture_bytes))),
        Section(("Margins",), tuple(_margins(evaluation))),
        Section(("Where the numbers come from",), tuple(_provenance(evaluation))),
    )


def _warnings(evaluation):
    names = evaluation.results.get("warnings")
    if names is None:
        yield Paragraph(("Not recorded: the evaluation is of an older version.",))
    elif not names:
        yield Paragraph(("None: nothing was seen that speaks against these numbers.",))
    else:
        lines: list[tuple[str, ...]] = [("warning", "what was seen", "here", "what to do")]
        here = named_by_warnings(evaluation.results)
        for name in names:
            known = warnings.explained(name)
            seen, advice = known if known else ("not known to this version", "see the version that evaluated")
            named = Code(here[name]) if here.get(name) else _DASH
            lines.append((Code(name), seen.replace("`", ""), named, advice.replace("`", "")))
        yield Paragraph(("These speak against the numbers: look into them before you believe them.",), is_alert=True)
        yield Table("Warnings", tuple(lines))
    yield Paragraph((reading.strength(evaluation),))


def _attacks(evaluation):
    results = evaluation.results
    after = results.get("robust_accuracy_after", [])
    if after:
        low, high = (100 * bound for bound in results["confidence_interval_95"])
        names = ["wrong as they are", *(each["attack"] for each in after)]
        left = [100 * results["clean_accuracy"], *(100 * each["robust_accuracy"] for each in after)]
        lines = [("step", "takes away", "still right")]
        for name, before, share in zip(names, [100.0, *left], left):
            lines.append((Code(name), f"{before - share:.2f} %", f"{share:.2f} %"))
        told = ", then ".join(f"{line[0]} takes {line[1]} and leaves {line[2]}" for line in lines[1:])
        yield Plot(
            plots.waterfall(names, left, (low, high)),
            f"Bars of all images: {told}. The interval of what is left is {low:.2f} to {high:.2f} %.",
            "What each attack takes away, in the order in which they ran; the last bar is the robust accuracy with its "
            "95 % interval.",
            Table("What each attack takes away", tuple(lines)),
        )
    rows = [("attack", "what it does", "settings", "images attacked", "images broken", "time")]
    for each in results["attacks"]:
        counts = (each.get("examples_attacked"), each.get("examples_broken"))
        rows.append(
            (
                Code(each["name"]),
                explanations.ATTACKS.get(each["name"], "an attack of the evaluator's own"),
                explanations.parameters(each),
                *(f"{count:,}" if explanations.is_count(count) else _DASH for count in counts),
                explanations.seconds(each.get("seconds")),
            )
        )
    yield Table("The attacks, in order", tuple(rows))
    kind = "every image that was right" if results.get("individual") else "what the attacks before it left standing"
    yield Paragraph(
        (
            f"Each attack ran on {kind}. An image counts as broken where a fresh pass of the model on the adversarial "
            "image is wrong, after a check that it lies in the threat model.",
        )
    )
    if baseline := results.get("baseline"):
        alone = reading.percent(baseline["robust_accuracy"])
        yield Paragraph(("The baseline ", Code(baseline["name"]), f" alone leaves {alone}; it does not count above."))


def _radius(evaluation):
    found = evaluation.security
    if found is None:
        yield Paragraph(
            (
                "Not measured: how accuracy falls with the radius, and the sanity checks of Carlini et al. (2019). ",
                Code("scripts/evaluate.py --security_curve"),
                " measures them.",
            )
        )
        return
    noise = {point["epsilon"]: point["robust_accuracy"] for point in found["random_noise"]}
    lines = [("radius", "right under attack", "right under random noise")]
    for each in found["curve"]:
        under_noise = reading.percent(noise[each["epsilon"]]) if each["epsilon"] in noise else "not measured"
        lines.append((each["epsilon_fraction"], reading.percent(each["robust_accuracy"]), under_noise))
    told = ", ".join(f"{share} at {radius}" for radius, share, _ in lines[1:])
    yield Paragraph((found["told"],), is_alert=any(each["passed"] is False for each in found["checks"]))
    yield Plot(
        plots.security_curve(found, evaluation.results["epsilon"]),
        f"Robust accuracy falls with the radius: {told}.",
        f"Robust accuracy of the first {found['num_examples']:,} images against the radius. The attack: "
        f"{found['attack']}. A curve that does not reach 0 is a sign that gradients are masked.",
        Table("Robust accuracy against the radius", tuple(lines)),
    )
    results = evaluation.results
    of = f"of the first {found['num_examples']:,} of {results['num_examples']:,} images, and "
    of = of if found["num_examples"] < results["num_examples"] else ""
    yield Paragraph(
        (
            f"At {results['norm']} {results['epsilon_fraction']} the number may differ from the robust accuracy above: "
            f"it is {of}after more attacks. The noise of each radius is drawn by itself, so that its numbers may rise.",
        )
    )
    words = {True: "passed", False: "FAILED", None: "not measured"}
    checks = [("check", "verdict", "what was seen")]
    checks += [(explanations.CHECKS.get(c["name"], c["name"]), words[c["passed"]], c["told"]) for c in found["checks"]]
    yield Table("Sanity checks of Carlini et al. (2019)", tuple(checks))


def _pictures(evaluation, most_bytes):
    examples, results = evaluation.examples, evaluation.results
    if examples is not None and not (examples.get("broken_by", np.zeros(1)) > 0).any():
        yield Paragraph(("No attack broke an image: there is nothing to show.",))
        return
    grid = thumbnails.grid(evaluation, most_bytes)
    if grid is None:
        yield Paragraph((f"Not shown: {evaluation.no_clean or 'images of this form are not drawn'}.",))
        return
    times = f"{grid.times:.{0 if grid.times > 10 else 1}f}"
    pictures = []
    for index, images in zip(grid.examples, grid.images):
        label, _clean = (
            class_sections.named(evaluation, examples[name][index]) for name in ("label", "clean_prediction")
        )
        attack = results["attacks"][examples["broken_by"][index] - 1]["name"] if _has_attacks(evaluation) else "?"
        words = [(f"image {index}: ", Code(label)), ("broken by ", Code(attack))]
        taken_for = ""
        if "adversarial_prediction" in examples:
            taken_for = class_sections.named(evaluation, examples["adversarial_prediction"][index])
            words.append(("taken for ", Code(taken_for)))
        alts = (
            f"clean image {index}, of class {label}",
            f"image {index} after {attack}{f', predicted {taken_for}' if taken_for else ''}",
            f"difference of the two, {_TIMES} {times}",
        )
        pictures.append(Picture(tuple(words), tuple(zip(alts, images))))
    shrunk = "" if grid.shrunk <= 1 else f" Shown smaller, by {grid.shrunk:.1f}."
    yield Pictures(
        f"Images that attacks broke, of each attack in turn: clean, adversarial, and the difference {_TIMES} {times}, "
        f"where grey is none.{shrunk}",
        tuple(pictures),
    )


def _has_attacks(evaluation):
    return evaluation.examples["broken_by"].max() <= len(evaluation.results["attacks"])


def _margins(evaluation):
    examples = evaluation.examples
    if examples is None or "clean_margin" not in examples or "broken_by" not in examples:
        yield Paragraph(("Not recorded: the evaluation is of an older version, or its examples.npz is not here.",))
        return
    margin, broken_by = examples["clean_margin"].astype(np.float64), examples["broken_by"]
    finite = np.isfinite(margin)
    kinds = {"still right": broken_by < 0, "broken by an attack": broken_by > 0, "wrong as they are": broken_by == 0}
    of = {name: margin[chosen & finite] for name, chosen in kinds.items()}
    lines = [("what became of the image", "images", "lower quartile", "median", "upper quartile")]
    for name, values in of.items():
        found = (
            [f"{value:.2f}".replace("-", _MINUS) for value in np.quantile(values, (0.25, 0.5, 0.75))]
            if len(values)
            else []
        )
        lines.append((name, f"{len(values):,}", *(found or [_DASH] * 3)))
    if not finite.any():
        yield Paragraph(("The model's outputs are no finite numbers.",))
        return
    told = "; ".join(f"{line[0]}: {line[1]} images, median {line[3]}" for line in lines[1:])
    yield Plot(
        plots.margins(of),
        f"Histogram of margins. {told}.",
        "Margins of the clean images: by how much the true class's output is above the highest other one. What an "
        "attack breaks has small ones, as a rule; how near the others came to falling is not recorded.",
        Table("Margins of the clean images", tuple(lines)),
    )


def _unknown(evaluation, trained_for):
    results = evaluation.results
    names = [each["name"] for each in results["attacks"]]
    own = [name for name in dict.fromkeys(names) if name not in explanations.ATTACKS]
    held_out = reading.held_out_of(evaluation)
    norm, radius = results["norm"], results["epsilon_fraction"]
    items: list[tuple[str, ...]] = [
        ("By how much the true robust accuracy is lower than what these attacks found.",),
        (
            f"Anything about other changes than {norm} up to {radius}: other norms, rotations, weather, patches"
            f"{'' if evaluation.security else ', or larger radii'}.",
        ),
        ("Anything about images of another kind than these, or about models trained again with another seed.",),
    ]
    if held_out is not None:
        items.append((f"What holds on other images: the run chose its weights by the {held_out:,} that it held out.",))
    else:
        items.append(("Whether these images were used to train the model, or to choose it.",))
    if trained_for is None:
        items.append(("Which norm and radius the model was trained for.",))
    if own:
        items.append(("Whether ", *reading.listed(own), " (the evaluator's own) was made for this very model."))
    else:
        items.append(("Whether an attack made for this very model would break more: none of these is one.",))
    if reading.sees_no_gradients(evaluation):
        items.append(("Whether an attack with gradients breaks more: none of these sees them.",))
    if not set(names) & set(warnings.BLACK_BOX):
        told = f"none of these is one{_black_box_beside(evaluation.security)}"
        items.append((f"Whether an attack that needs no gradients would break more: {told}.",))
    if evaluation.security is None:
        items.append(("Whether the sanity checks hold: they were not run.",))
    items.append(
        (
            "Whether the files tell the truth: this report reads them and runs nothing. ",
            Code("scripts/verify.py"),
            " and attacking again do more.",
        )
    )
    return Items(tuple(items))


def _black_box_beside(security):
    """What an attack without gradients did beside the security curve, where one ran."""
    checks = (security or {}).get("checks", [])
    if not any(each["name"] == "black_box_weaker" and each["passed"] is not None for each in checks):
        return ""
    queries = re.search(r"Square, (\d{1,9}) queries", security["attack"])
    how = f"{int(queries[1]):,} queries on " if queries else "on "
    return f"; beside the curve Square had {how}{security['num_examples']:,} images only"


def _provenance(evaluation):
    results = evaluation.results
    model, dataset, versions = results["model"], results.get("dataset") or {}, results.get("versions") or {}
    lines: list[tuple[str, ...]] = [("what", "as the files say")]
    lines.append(("folder", Code(evaluation.folder)))
    for name, value in (
        ("model", model["path"]),
        ("SHA-256 of the model's files", model.get("sha256")),
        ("how the model was read", _pairs(model, _READING)),
        ("data set", _pairs(dataset, ("name", "split", "held_out", "num_examples", "image_size", "short_side"))),
        ("SHA-256 of images and labels", dataset.get("sha256")),
        ("seed of the attacks", results.get("seed")),
        ("versions", _pairs(versions, sorted(versions))),
        ("results.json last modified (by the file system)", evaluation.date),
    ):
        lines.append((name, "not recorded" if value in (None, "") else Code(value)))
    yield Table("Provenance", tuple(lines))
    if evaluation.config:
        yield Listing("The configuration of the evaluation, config.gin", evaluation.config)


def _pairs(of, names):
    return ", ".join(f"{name} {of[name]}" for name in names if of.get(name) is not None)
