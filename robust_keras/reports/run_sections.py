"""What a report says of a training run."""

import re
from collections.abc import Iterator

import numpy as np

from robust_keras.reports import plots
from robust_keras.reports.blocks import Code, Items, Listing, Paragraph, Plot, Section, Table
from robust_keras.reports.contents import Run

# Lines of config.gin that are told, by what they are called here.
_TOLD = {
    "DATASET": "data set",
    "EXTRA_DATA": "extra data",
    "train.objective": "objective",
    "NORM": "norm",
    "EPSILON": "radius",
    "train.attack": "attack in training",
    "train.model": "network",
    "DEPTH": "depth",
    "WIDTH": "width",
    "ACTIVATION": "activation",
    "BATCH_SIZE": "batch size",
    "TRAIN_STEPS": "steps",
    "TAU": "weight averaging, tau",
    "train.validation": "validation",
    "training_data.num_validation": "images held out for it",
    "train.best_by": "best by",
    "SEED": "seed",
}
_COLUMNS = ("step", "loss", "val_clean", "val_robust", "val_clean_averaged", "val_robust_averaged")
_MOST_LINES = 40
_DASH = "\N{EN DASH}"


def sentence(run: Run) -> Paragraph:
    """What was trained, and how far it is."""
    told, curve = settings(run), run.curve
    steps = int(curve["step"][-1]) if len(curve["step"]) else 0
    whole = f" of {told['steps']}" if told.get("steps", "").isdigit() else ""
    words: list[str] = ["The run ", Code(run.folder)]
    words += [" trains on ", Code(told["data set"])] if "data set" in told else []
    words += [" against ", Code(trained_for)] if (trained_for := threat(run)) else []
    words.append(f": {steps:,}{whole} steps")
    if best := best_of(run):
        step, clean, robust = best
        words.append(
            f". Its best weights are those of step {step:,}: {100 * clean:.2f} % right on the images held out, "
            f"{100 * robust:.2f} % under the validation attack"
        )
    return Paragraph((*words, "."))


def best_of(run: Run) -> tuple[int, float, float] | None:
    """(step, clean, robust) of the best validation; None before there is one."""
    at = np.flatnonzero(run.curve["step"] == (-1 if run.best_step is None else run.best_step))
    if not len(at):
        return None
    last = "_averaged" if np.isfinite(run.curve["val_robust_averaged"][at[0]]) else ""
    clean, robust = (float(run.curve[f"val_{kind}{last}"][at[0]]) for kind in ("clean", "robust"))
    return (int(run.curve["step"][at[0]]), clean, robust) if np.isfinite([clean, robust]).all() else None


def settings(run: Run) -> dict[str, str]:
    """What config.gin says of a few things, as text."""
    found = dict(re.findall(r"^([\w./]+) = (.+)$", run.config, re.M))
    return {called: found[name].strip("'\"") for name, called in _TOLD.items() if found.get(name, "None") != "None"}


def threat(run: Run) -> str | None:
    """The norm and radius that it trains for; None where config.gin does not say."""
    told = settings(run)
    return f"{told['norm']} {told['radius']}" if {"norm", "radius"} <= told.keys() else None


def sections(run: Run) -> tuple[Section, ...]:
    """All sections of a run."""
    return (
        Section(("Learning curves",), tuple(_curves(run))),
        Section(("How it was trained",), tuple(_training(run))),
    )


def _curves(run: Run) -> Iterator[Paragraph | Plot]:
    curve = run.curve
    if not len(curve["step"]):
        yield Paragraph(("Nothing is logged yet.",))
        return
    validated = np.isfinite(curve["val_robust"]) | np.isfinite(curve["val_robust_averaged"])
    if not validated.any():
        yield Paragraph(("There was no validation yet.",))
    else:
        last = np.flatnonzero(validated)[-1]
        names = [name for name in _COLUMNS[2:] if np.isfinite(curve[name]).any()]
        told = ", ".join(f"{_called(name)} {100 * curve[name][last]:.1f} %" for name in names)
        marked = f"; the best step, {run.best_step:,}, is marked" if run.best_step is not None else ""
        yield Plot(
            plots.learning_curves(run),
            f"Accuracies against the step. At step {int(curve['step'][last]):,}: {told}{marked}.",
            f"Accuracy on the images held out, clean and under the validation attack{marked}. These images chose the "
            "best weights, and the validation attack is a weak one: an evaluation says more.",
            _numbers(run, np.flatnonzero(validated)),
        )
    losses = np.flatnonzero(np.isfinite(curve["loss"]))
    if len(losses):
        first, last = (curve["loss"][losses[k]] for k in (0, -1))
        rate = curve["learning_rate"][np.isfinite(curve["learning_rate"])]
        rates = f" The learning rate goes from {rate[0]:.3g} to {rate[-1]:.3g}." if len(rate) else ""
        yield Plot(
            plots.loss_and_rate(run),
            f"The loss goes from {first:.3f} to {last:.3f}.{rates}",
            "The training loss, of single batches, and the learning rate.",
            _numbers(run, losses),
        )


def _called(name: str) -> str:
    return name.removeprefix("val_").replace("_averaged", " (averaged weights)")


def _numbers(run: Run, rows: np.ndarray) -> Table:
    """Rows of metrics.csv, of many some at equal distances, the last one among them."""
    picked = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _MOST_LINES)).round().astype(int))]
    columns = [name for name in _COLUMNS if np.isfinite(run.curve[name]).any()]
    lines = [("step", *(name if name == "loss" else f"{_called(name)}, %" for name in columns[1:]))]
    for row in picked:
        values = [(name, run.curve[name][row]) for name in columns[1:]]
        cells = (_DASH if not np.isfinite(v) else f"{v:.3f}" if n == "loss" else f"{100 * v:.1f}" for n, v in values)
        lines.append((f"{int(run.curve['step'][row]):,}", *cells))
    some = "" if len(picked) == len(rows) else f", {len(picked)} of {len(rows):,} rows"
    return Table(f"From metrics.csv{some}", tuple(lines))


def _training(run: Run) -> Iterator[Items | Listing | Paragraph | Table]:
    if found := settings(run):
        yield Table(
            "As config.gin says", (("setting", "value"), *((name, Code(value)) for name, value in found.items()))
        )
    speed = run.curve["examples_per_second"]
    items: list[tuple[str, ...]] = [("metrics.csv was last modified, by the file system, on ", Code(run.date), ".")]
    if np.isfinite(speed).any():
        items.append((f"Speed: {np.nanmedian(speed):,.0f} examples a second (median), training alone.",))
    items += [("An evaluation that has not finished: ", Code(name), ".") for name in run.unfinished]
    if not run.evaluations:
        items.append(("No evaluation of this run has finished: what it withstands was not measured.",))
    versions = run.card.get("versions")
    if isinstance(versions, dict):
        items.append(("Versions: ", Code(", ".join(f"{name} {value}" for name, value in versions.items())), "."))
    yield Items(tuple(items))
    if run.config:
        yield Listing("The configuration of the run, config.gin", run.config)
