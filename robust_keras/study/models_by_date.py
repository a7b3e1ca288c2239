"""Robust classifiers of CIFAR-10 by date of publication, and one's own: what the paper's Figure 1 shows.

    models = [*read(rows.read()), *measured(rows.read(), "runs/study/paper"), of_evaluation("runs/mine/autoattack")]

The models of others are `gin/models_by_date.csv`: AutoAttack's list of CIFAR-10, Linf 8/255, as it was on 1 October
2020, six days before the paper. A date is the month of a paper's first version, as its arXiv identifier says.
"""

import csv
import datetime
import os
import posixpath
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from robust_keras import storage
from robust_keras.evaluation import report
from robust_keras.shown_text import printable
from robust_keras.study import rows as study

_COLUMNS = "model,date,extra_data,robust,label,source"
_EPSILON = 8 / 255
_TEST_IMAGES = 10_000


class Model(NamedTuple):
    """A classifier of CIFAR-10 and its accuracy in Linf at 8/255.

    Attributes:
        name: for people.
        date: of its publication, or on which its results.json was last modified, by the file system.
        setting: 'cifar10' without additional data, '80mti' with, None where nothing tells.
        robust: accuracy in percent under AutoAttack or AA+MT.
        spread: standard deviation over seeds, in points; None for one model.
        label: its name in a figure; '' for none.
        source: where its accuracy is from.
        is_own: whether it was measured here.
    """

    name: str
    date: datetime.date
    setting: str | None
    robust: float
    spread: float | None = None
    label: str = ""
    source: str = ""
    is_own: bool = False


def read(manifest: Sequence[study.Row], path: str | os.PathLike | None = None) -> list[Model]:
    """Published models.

    Args:
        manifest: all `rows.Row`s, since the paper's own models are rows of its Table 5.
        path: a csv file like `gin/models_by_date.csv`, which None stands for; an accuracy is a number in percent, or
            'TABLE:ROW', the paper's.

    Returns:
        A list of `Model`, in the file's order.

    Raises:
        ValueError: for a malformed line.
    """
    path = study.folder() / "models_by_date.csv" if path is None else path
    with open(path, newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    if ",".join(header) != _COLUMNS:
        raise ValueError(f"Expected the columns {_COLUMNS}. Received: {','.join(header)}")
    return [_read(manifest, line) for line in lines]


def _read(manifest: Sequence[study.Row], line: Sequence[str]) -> Model:
    settings = {"no": "cifar10", "yes": "80mti"}
    if len(line) != _COLUMNS.count(",") + 1 or line[2] not in settings or not line[5]:
        raise ValueError(f"Expected a model with yes or no for its extra data, and a source. Received: {line}")
    name, date, extra_data, robust, label, source = line
    setting, accuracy = settings[extra_data], float(robust) if re.fullmatch(r"\d?\d(\.\d+)?", robust) else None
    if table := re.fullmatch(r"(\d+):(.+)", robust):
        (row,) = study.select(manifest, table=table[1], row=table[2], setting=setting)
        accuracy = row.robust
    if accuracy is None:
        raise ValueError(f"Expected an accuracy in percent, or TABLE:ROW, for {name}. Received: {robust!r}")
    return Model(name, as_date(date), setting, accuracy, label=label, source=source)


def as_date(text: str) -> datetime.date:
    """The day 'YYYY-MM-DD', or the first of the month 'YYYY-MM'.

    Raises:
        ValueError: for anything else.
    """
    try:
        if re.fullmatch(r"\d{4}-\d\d(-\d\d)?", text):
            return datetime.date.fromisoformat(text if len(text) == 10 else f"{text}-01")
    except ValueError:
        pass
    raise ValueError(f"Expected a date such as 2020-10 or 2020-10-07. Received: {printable(text)!r}")


def measured(manifest: Sequence[study.Row], folder: str) -> list[Model]:
    """The configurations of a study that are evaluated on CIFAR-10 in Linf at 8/255: means over their seeds.

    Args:
        manifest: all `rows.Row`s.
        folder: of the study's runs at one scale.

    Returns:
        A list of `Model`, dated by the last of the evaluations, as the file system has it; the best of each setting has
        a label.
    """
    settings = {study.run_name(row): row.setting for row in manifest if row.runnable}
    names = sorted(settings.keys() & set(_folders(folder)))
    found = [model for name in names if (model := _mean(name, settings[name], posixpath.join(folder, name)))]
    for setting in study.SETTINGS:
        if own := [model for model in found if model.setting == setting]:
            best = max(own, key=lambda model: model.robust)
            found[found.index(best)] = best._replace(label=best.name)
    return found


def _mean(name: str, setting: str, folder: str) -> Model | None:
    evaluations = (posixpath.join(folder, seed, "evaluation") for seed in sorted(_folders(folder)))
    finished = [each for each in evaluations if tf.io.gfile.exists(posixpath.join(each, "results.json"))]
    results = [each for each in report.read_results(finished) if not _why_not(each)]
    if not results:
        return None
    date = max(_date(each["workdir"]) for each in results)
    accuracies = [100 * each["robust_accuracy"] for each in results]
    spread = float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None
    return Model(name, date, setting, float(np.mean(accuracies)), spread, source=folder, is_own=True)


def of_evaluation(folder: str, *, date: datetime.date | None = None, setting: str | None = None) -> Model:
    """A model of one's own, as `scripts/evaluate.py` or `robust_keras.evaluate` measured it.

    Args:
        folder: of the finished evaluation.
        date: when; None for the day on which results.json was last modified, by the file system.
        setting: 'cifar10' where it was trained without additional data, '80mti' with; None where that is not known.

    Raises:
        ValueError: for a folder without results, and for an evaluation of something else than Figure 1 shows.
    """
    (results,) = report.read_results([folder])
    if reason := _why_not(results):
        raise ValueError(f"Expected an evaluation on CIFAR-10 in Linf 8/255 by AutoAttack or AA+MT. Received: {reason}")
    # What a reader of the figure has to know of it.
    few = [f"{results['num_examples']:,} images"] if results["num_examples"] < _TEST_IMAGES else []
    notes = ", ".join([*few, *(["with warnings"] if results.get("warnings") else [])])
    name, robust = printable(folder, most=40), 100 * results["robust_accuracy"]
    label = f"{name} ({notes})" if notes else name
    return Model(name, date or _date(folder), setting, robust, label=label, source=folder, is_own=True)


def _why_not(results: dict[str, Any]) -> str:
    """Why results do not belong into Figure 1; '' where they do."""
    dataset, epsilon = results.get("dataset"), results.get("epsilon")
    name = dataset.get("name") if isinstance(dataset, dict) else None
    attacks = [attack["name"] for attack in results["attacks"]]
    names = ", ".join(attacks)
    where = printable(results["workdir"])
    # Arrays and files may hold CIFAR-10; that is the word of who gives them.
    if not isinstance(name, str) or not (name in ("cifar10", "arrays", "dataset", "source") or ":" in name):
        return f"{where} of the data set {printable(name)}"
    if results["norm"] != "Linf" or not isinstance(epsilon, float) or abs(epsilon - _EPSILON) > 1e-6:
        return f"{where} in {printable(results['norm'])} {printable(results['epsilon_fraction'])}"
    if "apgd-ce" not in attacks or not any(name in attacks for name in ("apgd-t", "apgd-dlr", "multi-targeted")):
        return f"{where} by {printable(names)}"
    return ""


def _date(folder: str) -> datetime.date:
    return storage.modified(posixpath.join(folder, "results.json")).date()


def _folders(folder: str) -> list[str]:
    if not tf.io.gfile.isdir(folder):
        return []
    names = (name.rstrip("/") for name in tf.io.gfile.listdir(folder))
    return [name for name in names if tf.io.gfile.isdir(posixpath.join(folder, name))]
