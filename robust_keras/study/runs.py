"""What the study trains and evaluates, in which order, and within which time."""

import functools
import posixpath
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import tensorflow as tf

from robust_keras import storage
from robust_keras.saved_models import export
from robust_keras.study import budget as budgets
from robust_keras.study import (
    claim_verdicts,
    claims,
    drawing,
    figures,
    measured,
    models_by_date,
    planning,
    rows,
    tables,
    throughput,
    trials,
)
from robust_keras.study.configurations import Configuration
from robust_keras.training import recorder

Validations = Mapping[int, Mapping[str, float]]  # By seed, the accuracies of a run's best weights.
EVALUATION = "evaluation"  # The sub-folder of a run's folder with its evaluation by AA+MT.


class Commands(NamedTuple):
    """What the study has done by others.

    Attributes:
        train: `(gin files, bindings, workdir)`: trains into a folder, or goes on there, and exports.
        evaluate: `(configuration, gin file, workdir, num_examples, folder)`: evaluates the model of a run's folder into
            a sub-folder, on all images where num_examples is None; returns the results.
        differences: `(gin files, bindings, workdir)`: in what the run in a folder differs, one line each.
    """

    train: Callable[[Sequence[str], Sequence[str], str], None]
    evaluate: Callable[[Configuration, str, str, int | None, str], dict]
    differences: Callable[[Sequence[str], Sequence[str], str], list[str]]


class Study(NamedTuple):
    """Rows of the study that are run together.

    Attributes:
        manifest: all `rows.Row`s.
        chosen: those to run, with their baselines.
        setting: of the rows in a table; None for both.
        configured: `(rows, plan)`: the configurations of rows and their baselines at a plan, by name.
        folder: of the runs.
        commands: what trains and evaluates.
    """

    manifest: Sequence[rows.Row]
    chosen: Sequence[rows.Row]
    setting: str | None
    configured: Callable[[Sequence[rows.Row], planning.Plan], dict[str, Configuration]]
    folder: str
    commands: Commands


class Trained(NamedTuple):
    """What is trained so far.

    Attributes:
        plan: by which it is.
        validations: `Validations` by name of the configuration; what is not in it is still to be trained.
        is_at_chance: whether all of it is at chance, so that there is nothing to compare.
    """

    plan: planning.Plan
    validations: dict[str, Validations]
    is_at_chance: bool = False


def measure(study: Study, trained: Trained) -> list[str]:
    """Trains what is not trained yet, evaluates, and writes the tables in which the chosen rows stand.

    Returns:
        The paths of the tables and figures; none where nothing can be compared.
    """
    if (found := _models(study, trained, {})) is None:
        return []
    paths = []
    for table in dict.fromkeys(each.table for each in study.chosen):
        shown: Sequence[rows.Row] = rows.select(study.manifest, table=table, setting=study.setting)
        # What earlier calls finished stays in the table.
        for name, configuration in study.configured(shown, trained.plan).items():
            folder = posixpath.join(study.folder, name)
            if name not in found and (finished := finished_models(configuration, folder, study.commands)):
                found[name] = finished
        shown = [each for each in shown if not each.runnable or rows.run_name(each) in found or each in study.chosen]
        compared = tables.compare_rows(study.manifest, shown, found)
        paths += tables.write_study(study.folder, table, compared, scale=trained.plan.description)
        paths += _draw_table(study, trained.plan, table, compared)
    return paths


def measure_claims(study: Study, trained: Trained, chosen: Sequence[claims.Claim]) -> list[str]:
    """Trains what the claims' sides and baselines want, evaluates, and writes what that says of each claim.

    Returns:
        The paths; none where nothing can be compared.
    """
    attacks: dict[str, set[str]] = {}
    for claim in chosen:
        for row in (*claim.rows, claims.baseline_of(study.manifest, claim)):
            if row is not None:
                attacks.setdefault(rows.run_name(row), set()).add(measured.MEASURES[claim.measure].attack)
    if (found := _models(study, trained, attacks)) is None:
        return []
    paths = []
    for name in dict.fromkeys(claim.name for claim in chosen):
        judged = [claim_verdicts.judge(study.manifest, claim, found) for claim in chosen if claim.name == name]
        paths += claim_verdicts.write(study.folder, judged, scale=trained.plan.description)
    return paths


def _models(
    study: Study, trained: Trained, attacks: Mapping[str, Iterable[str]]
) -> dict[str, list[measured.Measured]] | None:
    """Models of the chosen rows and their baselines by name, evaluated by AA+MT and, by name, by some of
    `measured.ATTACKS` too; None where all are at chance.
    """
    if trained.is_at_chance:
        print("All networks are at chance on their validation images: the budget is too small to compare", flush=True)
        return None
    found = {}
    by_name = study.configured(study.chosen, trained.plan)
    for count, (name, configuration) in enumerate(by_name.items()):
        print(f"Configuration {count + 1} of {len(by_name)}: {name}", flush=True)
        folder = posixpath.join(study.folder, name)
        validations = trained.validations.get(name)
        if validations is None:
            validations = train_models(configuration, folder, study.commands)
        further = sorted({*attacks.get(name, ())} - {""})
        found[name] = evaluate_models(trained.plan, configuration, folder, validations, study.commands, further)
    return found


def draw(study: Study, plan: planning.Plan, figure: int, own: Sequence[models_by_date.Model] = ()) -> list[str]:
    """Draws a figure of the paper with what is finished; nothing is trained.

    Args:
        study: whose setting alone is drawn, where it has one.
        plan: the scale.
        figure: its number, 1 to 5.
        own: further models for Figure 1.

    Returns:
        The paths.
    """
    if figure == 1:
        published, here = models_by_date.read(study.manifest), models_by_date.measured(study.manifest, study.folder)
        models = [*published, *here, *own]
        if study.setting is not None:
            models = [each for each in models if each.setting in (None, study.setting)]
        if not any(each.is_own for each in models):
            print(figures.NOTHING)
        return drawing.write(study.folder, "figure1", figures.by_date(models, scale=plan.description if here else ""))
    (table,) = (table for table, number in figures.NUMBERS.items() if number == figure)
    shown = rows.select(study.manifest, table=table, setting=study.setting)
    finished = {
        name: finished_models(configuration, posixpath.join(study.folder, name), study.commands)
        for name, configuration in study.configured(shown, plan).items()
    }
    if not any(finished.values()):
        print(figures.NOTHING)
    return _draw_table(study, plan, table, tables.compare_rows(study.manifest, shown, finished))


def _draw_table(study: Study, plan: planning.Plan, table: int, compared: Sequence[tables.StudyRow]) -> list[str]:
    """The figure in which the paper shows a table; none of most tables."""
    if table == 5:
        return draw(study, plan, 1)
    if table not in figures.NUMBERS:
        return []
    figure = figures.of_table(table, compared, scale=plan.description)
    return drawing.write(study.folder, f"table{table}", figure)


def train_models(configuration: Configuration, folder: str, commands: Commands) -> Validations:
    """Trains the models of a configuration, but for those that are there.

    Returns:
        What the best weights of each got on its validation images, by seed; a run that diverged is left out.

    Raises:
        ValueError: for a folder with finished runs of another configuration.
    """
    validations = {}
    for seed in range(configuration.job.num_runs):
        workdir, bindings = posixpath.join(folder, f"seed{seed}"), configuration.with_seed(seed)
        saved_model = posixpath.join(workdir, "saved_model")
        if not export.is_finished(saved_model):
            try:
                commands.train(configuration.files, bindings, workdir)
            except recorder.NonFiniteLoss as error:
                print(f"Seed {seed} diverged and is left out. {error}", flush=True)
                continue
        elif different := commands.differences(configuration.files, bindings, workdir):
            raise ValueError(f"Expected a workdir of this run. Received: {workdir} of another, {'; '.join(different)}")
        validations[seed] = _validation(workdir)
    return validations


def _validation(workdir: str) -> Mapping[str, float]:
    """What the best weights of a finished run got on its validation images."""
    card_path = posixpath.join(workdir, "saved_model", export.CARD)
    try:
        return (storage.read_object(card_path) or {})["validation"]["best"]["metrics"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"Expected the model card of a run in {card_path}. Received: {storage.why(error)}") from error


def evaluate_models(
    plan: planning.Plan,
    configuration: Configuration,
    folder: str,
    validations: Validations,
    commands: Commands,
    attacks: Iterable[str] = (),
) -> list[measured.Measured]:
    """Evaluates the models of a configuration that the protocol chooses, by AA+MT and by `measured.ATTACKS` alone."""
    models = []
    chosen = chosen_seeds(configuration, validations)
    num_examples = None if plan.evaluates_whole_set else plan.examples
    for seed in chosen:
        workdir = posixpath.join(folder, f"seed{seed}")
        folders = {name: f"evaluation_{name}" for name in attacks}
        commands.evaluate(configuration, plan.evaluation, workdir, num_examples, EVALUATION)
        for name, of in folders.items():
            commands.evaluate(configuration, measured.ATTACKS[name], workdir, num_examples, of)
        models.append(
            measured.read(
                posixpath.join(workdir, EVALUATION),
                seed=seed,
                training=workdir,
                attacks={name: posixpath.join(workdir, of) for name, of in folders.items()},
                validation=_accuracy(validations[seed], "robust"),
                chosen_of=_chosen_of(configuration, chosen, validations),
            )
        )
    return models


def _chosen_of(configuration: Configuration, evaluated: Sequence[int], validations: Validations) -> int:
    """Of how many models validation has chosen the one that is evaluated."""
    return len(validations) if configuration.job.num_evaluated == len(evaluated) == 1 else 1


def chosen_seeds(configuration: Configuration, validations: Validations) -> list[int]:
    """Seeds of the models that are evaluated: the most robust ones on their validation images, of equals the first."""
    best = sorted(validations, key=lambda seed: -_accuracy(validations[seed], "robust"))
    return sorted(best[: configuration.job.num_evaluated])


def _accuracy(metrics: Mapping[str, float], kind: str) -> float:
    """Of the weights that are exported: the averaged ones, where there are any."""
    return metrics.get(f"val_{kind}_averaged", metrics[f"val_{kind}"])


def finished_models(configuration: Configuration, folder: str, commands: Commands) -> list[measured.Measured]:
    """What a configuration has of finished evaluations."""
    validations, evaluated = {}, []
    for seed in range(configuration.job.num_runs):
        workdir = posixpath.join(folder, f"seed{seed}")
        if not export.is_finished(posixpath.join(workdir, "saved_model")):
            continue
        if commands.differences(configuration.files, configuration.with_seed(seed), workdir):
            continue
        validations[seed] = _validation(workdir)
        if tf.io.gfile.exists(posixpath.join(workdir, EVALUATION, "results.json")):
            evaluated.append(seed)
    return [
        measured.read(
            posixpath.join(folder, f"seed{seed}", EVALUATION),
            seed=seed,
            training=posixpath.join(folder, f"seed{seed}"),
            validation=_accuracy(validations[seed], "robust"),
            chosen_of=_chosen_of(configuration, evaluated, validations),
        )
        for seed in evaluated
    ]


def train_within(
    budget: str,
    plan: planning.Plan,
    study: Study,
    *,
    started: float,
    clock: Callable[[], float] = time.monotonic,
) -> Trained:
    """Fits a plan into a budget, or takes an earlier call's, trains by it, and fits the evaluations into what is left.

    Args:
        budget: such as '3h'.
        plan: the scale.
        study: what is run; the plan is kept in its folder.
        started: when the budget began to run.
        clock: to read the time from, in seconds.

    Raises:
        ValueError: for a budget that is too small, and for a folder whose plan is for something else.
    """
    seconds, path = budgets.parse(budget), posixpath.join(study.folder, "plan.json")

    def left() -> float:
        return seconds - (clock() - started)

    jobs = {name: each.job for name, each in study.configured(study.chosen, plan).items()}
    fitted = budgets.read(path, plan, jobs)
    if fitted is None:
        print("Measuring what short runs take on this device", flush=True)
        fitted = budgets.fit(
            plan,
            jobs,
            seconds=seconds,
            left=left,
            flops_per_second=throughput.device_throughput(),
            measure=functools.partial(_time_trials, study, clock),
        )
        budgets.write(path, fitted, jobs)
        print(f"Planned: {fitted.seconds:,.0f} s of the {left():,.0f} s that are left", flush=True)
    print(f"In {budget}: {fitted.plan.description}", flush=True)
    if fitted.plan.images or not fitted.timings:
        return Trained(fitted.plan, {})
    by_name = study.configured(study.chosen, fitted.plan)
    trained = {
        name: train_models(each, posixpath.join(study.folder, name), study.commands) for name, each in by_name.items()
    }
    models = _trained_models(by_name, trained)
    if budgets.all_at_chance(fitted.plan, jobs, models):
        return Trained(fitted.plan, trained, is_at_chance=True)
    images = budgets.num_images(fitted, jobs, models, left=left())
    print(f"{images:,} test images fit into the {left():,.0f} s that are left", flush=True)
    fitted = fitted._replace(plan=fitted.plan._replace(images=images))
    budgets.write(path, fitted, jobs)
    return Trained(fitted.plan, trained)


def _trained_models(by_name: Mapping[str, Configuration], trained: Mapping[str, Validations]) -> list[budgets.Model]:
    return [
        budgets.Model(name, *(_accuracy(trained[name][seed], kind) for kind in ("clean", "robust")))
        for name, configuration in by_name.items()
        for seed in chosen_seeds(configuration, trained[name])
    ]


def _time_trials(study: Study, clock: Callable[[], float], plan: planning.Plan) -> dict[str, budgets.Timings]:
    folder, commands = posixpath.join(study.folder, "trial"), study.commands
    return trials.time_trials(
        plan,
        study.configured(study.chosen, plan),
        folder,
        train=lambda configuration, bindings: commands.train(configuration.files, bindings, folder),
        evaluate=lambda configuration, images: commands.evaluate(
            configuration, plan.evaluation, folder, images, EVALUATION
        ),
        clock=clock,
    )
