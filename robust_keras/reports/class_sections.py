"""What a report says of the classes: accuracies of each, and what is taken for what under attack."""

from collections.abc import Iterator

import numpy as np

from robust_keras.evaluation.results import wilson_interval
from robust_keras.reports import plots
from robust_keras.reports.blocks import Code, Paragraph, Plot, Table
from robust_keras.reports.contents import Evaluation
from robust_keras.shown_text import printable

_MOST_DRAWN = 20  # Classes; of more the best and the worst are shown.
_MOST_NAME = 40


def named(evaluation: Evaluation, label: int) -> str:
    """What a class is called: its number where it has no name."""
    names = evaluation.class_names
    return printable(names[label], most=_MOST_NAME) if 0 <= label < len(names) else str(label)


def blocks(evaluation: Evaluation) -> Iterator[Paragraph | Plot | Table]:
    """Robust accuracy per class, then the confusion matrix under attack."""
    examples = evaluation.examples
    if examples is None:
        yield Paragraph(("Not known: there is no examples.npz in the folder.",))
        return
    label = examples["label"]
    clean = examples["clean_prediction"] == label
    found = []
    for each in np.unique(label):
        of = label == each
        num, right, robust = int(of.sum()), int(clean[of].sum()), int(examples["robust"][of].sum())
        found.append((named(evaluation, each), num, right / num, robust / num, wilson_interval(robust, num)))
    yield _by_class(found)
    yield from _confusion(evaluation)


def _by_class(found: list) -> Plot:
    ordered = sorted(found, key=lambda each: each[3])
    drawn, which = found, f"Accuracy of each of {len(found)} classes"
    if len(found) > _MOST_DRAWN:
        drawn = [*ordered[: _MOST_DRAWN // 2], *ordered[-_MOST_DRAWN // 2 :]]
        which = f"Of {len(found)} classes, the {_MOST_DRAWN // 2} with the lowest and the highest robust accuracy"
    lines = [("class", "images", "clean", "robust", "95 % interval")]
    for name, num, clean, robust, (low, high) in drawn:
        shares = (f"{100 * clean:.1f} %", f"{100 * robust:.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %")
        lines.append((Code(name), f"{num:,}", *shares))
    worst, best = ordered[0], ordered[-1]
    names, _, clean, robust, intervals = zip(*drawn)
    scaled = [tuple(100 * bound for bound in interval) for interval in intervals]
    return Plot(
        plots.by_row(names, [100 * c for c in clean], [100 * r for r in robust], scaled),
        f"{which}. Robust accuracy is lowest for {worst[0]}, {100 * worst[3]:.1f} %, and highest for {best[0]}, "
        f"{100 * best[3]:.1f} %.",
        f"{which}: clean, and robust with its 95 % interval, which is wide where there are few images of a class.",
        Table("Accuracy by class", tuple(lines)),
    )


def _confusion(evaluation: Evaluation) -> Iterator[Paragraph | Table]:
    examples = evaluation.examples or {}
    if "adversarial_prediction" not in examples:
        yield Paragraph(("What is taken for what under attack is not recorded, as by older versions.",))
        return
    label, predicted = examples["label"], examples["adversarial_prediction"]
    pairs, counts = np.unique(np.stack([label, predicted]), axis=1, return_counts=True)
    classes = np.unique(pairs)
    if len(classes) <= _MOST_DRAWN:
        place = {each: k for k, each in enumerate(classes.tolist())}
        matrix = np.zeros((len(classes), len(classes)), int)
        for (true, taken), count in zip(pairs.T.tolist(), counts.tolist()):
            matrix[place[true], place[taken]] = count
        names = [Code(named(evaluation, each)) for each in classes]
        shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        yield Table(
            "What is taken for what under attack: a line a true class, a column a prediction, in images. The "
            "prediction is that of the image that broke the model, and of the clean one where none did",
            (("true class", *names), *((name, *(str(n) for n in row)) for name, row in zip(names, matrix))),
            tuple(tuple(int(np.ceil(9 * share)) for share in row) for row in shares),
        )
        return
    wrong = np.flatnonzero(pairs[0] != pairs[1])
    wrong = wrong[np.argsort(-counts[wrong], kind="stable")][:_MOST_DRAWN]
    yield Table(
        f"What is taken for what under attack most often, of {len(classes)} classes",
        (
            ("true class", "taken for", "images"),
            *((*(Code(named(evaluation, each)) for each in pairs[:, k]), f"{counts[k]:,}") for k in wrong),
        ),
    )
