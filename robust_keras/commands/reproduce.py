"""Runs rows of the paper's tables, or the claims of its text, and writes the paper's numbers next to the measured ones.

    python scripts/reproduce.py --list
    python scripts/reproduce.py --table=7 --setting=80mti --dry_run
    python scripts/reproduce.py --table=8 --row=Swish/SiLU --setting=cifar10 --scale=mini --workdir=runs/study
    python scripts/reproduce.py --figure=1 --evaluation=runs/mine/autoattack

Every row is trained, evaluated with AA+MT and compared with its baseline, which is run too. Tables share their runs,
and the same command goes on where it was. Tables 5, 9, 6, 7 and 8 are drawn as well: they are Figures 1 to 5.
`--figure` draws one of what is finished so far, and trains nothing.
"""

from robust_keras.commands import exit_codes, launcher  # isort: skip  Before TensorFlow is imported.

import functools
import posixpath
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

_STARTED = time.monotonic()  # What a command imports next takes seconds of its budget.


def run(
    *,
    table: int | None = None,
    row: Sequence[str] = (),
    setting: str | None = None,
    claim: Sequence[str] = (),
    scale: str = "paper",
    budget: str | None = None,
    workdir: str = "runs/study",
    data_dir: str | None = None,
    num_runs: int | None = None,
    gin_params: Sequence[str] = (),
    strategy: str | None = None,
    tpu: str | None = None,
    started: float | None = None,
) -> list[str]:
    """Trains and evaluates rows with their baselines, and writes the tables they stand in.

    Args:
        table: its number; None for all, like `row`, names of rows, and `setting`, 'cifar10' or '80mti'.
        claim: names of claims, in place of rows.
        scale: a key of `planning.PLANS`.
        budget: such as '3h': all of this call is made to fit. None for no limit.
        workdir: where runs and tables go.
        data_dir: where data sets are.
        num_runs: models per configuration, all of which are evaluated; None for the scale's own protocol.
        gin_params: further bindings of every row, such as "EXTRA_DATA = 'npz:FILE'".
        strategy: where it computes, see `strategies.strategy`; 'auto' by default, like `tpu`.
        started: when the budget began to run, by `time.monotonic`; now by default.

    Returns:
        The paths of the tables and figures; none where a budget has left all networks at chance.

    Raises:
        ValueError: for bad input, and for a budget that is too small to tell anything, before anything is trained.
    """
    from robust_keras import ownership
    from robust_keras.data import sources
    from robust_keras.engines import strategies
    from robust_keras.study import configurations, planning, rows, runs

    started, manifest = time.monotonic() if started is None else started, rows.read()
    (chosen, claimed), plan = _chosen(manifest, claim, table, row, setting), planning.plan_of(scale, num_runs)
    configured = functools.partial(configurations.configurations, manifest, bindings=gin_params, resolve=_resolve)
    for each in configured(chosen, plan).values():
        if each.extra_data is not None:  # Missing data shows now, not after hours of training something else.
            sources.find_extra(each.extra_data, data_dir=data_dir, dataset=each.dataset)
    folder = posixpath.join(workdir, plan.name if budget is None else f"{plan.name}-{budget}")
    study = runs.Study(manifest, chosen, setting, configured, folder, _commands(data_dir, strategy, tpu))
    within = strategies.strategy(strategy or "auto", tpu=tpu)
    with ownership.lock(folder, what="a study"):
        trained = runs.Trained(plan, {})
        if budget is not None:
            with within.scope():  # What it gets done is measured there.
                trained = runs.train_within(budget, plan, study, started=started)
        paths = runs.measure_claims(study, trained, claimed) if claimed else runs.measure(study, trained)
    if budget is not None:
        print(f"Took {time.monotonic() - started:,.0f} s of {budget}")
    print("\n".join(paths))
    return paths


def draw(
    *,
    figure: int,
    evaluation: Sequence[str] = (),
    setting: str | None = None,
    scale: str = "paper",
    workdir: str = "runs/study",
    num_runs: int | None = None,
    gin_params: Sequence[str] = (),
) -> list[str]:
    """Draws a figure of the paper with what `run` has finished; trains and evaluates nothing.

    Args:
        figure: its number, 1 to 5.
        evaluation: further models of Figure 1, each 'FOLDER[,DATE][,SETTING]': a finished evaluation on CIFAR-10 in
            Linf at 8/255, its date, the day on which its results.json was last modified unless said, and the setting of
            its training.
        setting: see `run`, like the others.

    Returns:
        The paths of the figure.

    Raises:
        ValueError: for an evaluation that does not belong into Figure 1, or is given for another.
    """
    from robust_keras.study import configurations, models_by_date, planning, rows, runs

    if evaluation and figure != 1:
        raise ValueError(f"Expected --evaluation with --figure=1. Received: --figure={figure}")
    manifest, plan = rows.read(), planning.plan_of(scale, num_runs)
    own = [models_by_date.of_evaluation(**_evaluation(each)) for each in evaluation]
    configured = functools.partial(configurations.configurations, manifest, bindings=gin_params, resolve=_resolve)
    folder = posixpath.join(workdir, plan.name)
    study = runs.Study(manifest, (), setting, configured, folder, _commands(None, None, None))
    paths = runs.draw(study, plan, figure, own)
    print("\n".join(paths))
    return paths


def _evaluation(text: str) -> dict[str, Any]:
    """Arguments of `models_by_date.of_evaluation`."""
    from robust_keras.study import models_by_date, rows

    folder, *told = text.split(",")
    given: dict[str, Any] = {"folder": folder}
    for each in told:
        given |= {"setting": each} if each in rows.SETTINGS else {"date": models_by_date.as_date(each)}
    return given


def _chosen(manifest, claim, table, row, setting):
    """The rows to run, and the `claims.Claim`s that they are sides of; no claims where none is named."""
    from robust_keras.study import claims, configurations

    if not claim:
        return configurations.choose(manifest, table=table, names=row, setting=setting), ()
    if table is not None or row:
        raise ValueError("Expected --claim with neither --table nor --row. Received: both")
    claimed = claims.select(claims.read(manifest), claim, setting=setting)
    for each in claimed:
        if each.side is None:
            raise ValueError(f"Expected a claim that can be run. Received: {each.name}: {each.note}")
    return tuple(side for each in claimed for side in each.rows), claimed


def list_rows(
    *, table: int | None = None, row: Sequence[str] = (), setting: str | None = None, claim: Sequence[str] = ()
) -> None:
    """Prints rows with the paper's numbers, and claims where no table or row is named; claims alone where some are."""
    from robust_keras.evaluation import report
    from robust_keras.study import claim_verdicts, claims, configurations, rows, tables

    manifest = rows.read()
    if not claim:
        chosen = configurations.choose(manifest, table=table, names=row, setting=setting)
        print(report.markdown(tables.paper_columns(chosen)))
        if any(each.is_reported for each in chosen):
            print(tables.REPORTED)
    if claim or (table is None and not row):
        claimed = claims.select(claims.read(manifest), claim, setting=setting)
        print(report.markdown(claim_verdicts.paper_columns(claimed)))


def dry_run(
    *,
    table: int | None = None,
    row: Sequence[str] = (),
    setting: str | None = None,
    claim: Sequence[str] = (),
    scale: str = "paper",
    num_runs: int | None = None,
    gin_params: Sequence[str] = (),
) -> None:
    """Prints what `run` would take: steps, operations, and hours by the throughputs of `costs.DEVICES`."""
    from robust_keras.evaluation import report
    from robust_keras.study import configurations, costs, planning, rows, tables

    manifest, plan = rows.read(), planning.plan_of(scale, num_runs)
    chosen, _ = _chosen(manifest, claim, table, row, setting)
    by_name = configurations.configurations(manifest, chosen, plan, bindings=gin_params, resolve=_resolve)
    print(report.markdown(tables.cost_columns(plan, {name: each.job for name, each in by_name.items()})))
    for device in costs.DEVICES.values():
        print(f"{device.title}: {device.flops_per_second:.2g} FLOP/s, {device.source}")


def _resolve(files, bindings):
    """The run that gin files and bindings configure."""
    from robust_keras.commands import configuration

    configuration.parse(files, bindings)
    return configuration.resolve(configuration.train)


def _commands(data_dir, strategy, tpu):
    """The `runs.Commands` of the study."""
    import keras

    from robust_keras import storage
    from robust_keras.commands import configuration as configurables
    from robust_keras.commands import evaluate as evaluation
    from robust_keras.commands import train as training
    from robust_keras.data import sources
    from robust_keras.study import runs

    def train(files, bindings, workdir):
        try:
            training.run(
                gin_files=files,
                gin_params=bindings,
                data_dir=data_dir,
                workdir=workdir,
                strategy=strategy,
                tpu=tpu,
            )
        finally:
            keras.backend.clear_session()

    @functools.cache
    def num_images(dataset):  # Read once: an evaluation reads the images itself.
        return len(sources.load(dataset, "test", data_dir=data_dir).labels)

    def evaluate(configuration, gin_file, workdir, num_examples, folder):
        if num_examples is not None:  # Where the data set has so many.
            num_examples = min(num_examples, num_images(configuration.dataset))
        return evaluation.run(
            saved_model=posixpath.join(workdir, "saved_model"),
            dataset=configuration.dataset,
            gin_files=[gin_file],
            gin_params=configuration.threat,
            data_dir=data_dir,
            num_examples=num_examples,
            workdir=posixpath.join(workdir, folder),
            strategy=strategy,
            tpu=tpu,
        )

    def differences(files, bindings, workdir):
        _resolve(files, bindings)
        saved = storage.read_text(posixpath.join(workdir, "config.gin"))
        return configurables.differences(saved, configurables.operative_config())

    return runs.Commands(train, evaluate, differences)


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    flags.DEFINE_integer("table", None, "Number of the paper's table; all by default.", flag_values=values)
    flags.DEFINE_multi_string("row", [], "Name of a row; any number of times, all by default.", flag_values=values)
    flags.DEFINE_multi_string(
        "claim", [], "Name of a claim of the text, in place of rows; any number of times.", flag_values=values
    )
    flags.DEFINE_enum(
        "setting", None, ["cifar10", "80mti"], "Without additional data, or with; both by default.", flag_values=values
    )
    flags.DEFINE_enum("scale", "paper", ["paper", "mini"], "The paper's, or minutes on a laptop.", flag_values=values)
    flags.DEFINE_string("budget", None, "Shrink what is run to fit, such as 90m or 3h.", flag_values=values)
    flags.DEFINE_integer(
        "num_runs",
        None,
        "Models per configuration, all evaluated; by default the scale's protocol.",
        flag_values=values,
        lower_bound=1,
    )
    launcher.define_bindings(values)
    launcher.define_strategy(values)
    flags.DEFINE_string("workdir", "runs/study", "Where runs and tables go.", flag_values=values)
    flags.DEFINE_integer(
        "figure",
        None,
        "Draw a figure of the paper of what is finished, and train nothing.",
        flag_values=values,
        lower_bound=1,
        upper_bound=5,
    )
    flags.DEFINE_multi_string(
        "evaluation",
        [],
        "A model of your own for --figure=1: FOLDER[,DATE][,SETTING], a finished evaluation; any number of times.",
        flag_values=values,
    )
    flags.DEFINE_bool("list", False, "Print rows and claims with the paper's numbers.", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "Print steps, operations and hours on several devices.", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Runs the command with the values of its flags."""
    rows = {"table": values.table, "row": values.row, "setting": values.setting, "claim": values.claim}
    scale = {"scale": values.scale, "num_runs": values.num_runs, "gin_params": values.gin_param}
    if values.budget is not None:
        from robust_keras.study import budget

        budget.parse(values.budget)
        if values.list or values.dry_run:
            raise ValueError("Expected --budget with neither --list nor --dry_run. Received: both")
    if values.evaluation and values.figure is None:
        raise ValueError(f"Expected --evaluation with --figure=1. Received: {values.evaluation} without --figure")
    if values.figure is not None:
        if others := [name for name in ("table", "row", "claim", "list", "dry_run", "budget") if values[name].value]:
            raise ValueError(f"Expected --figure without --{others[0]}. Received: both")
        draw(
            figure=values.figure,
            evaluation=values.evaluation,
            setting=values.setting,
            workdir=values.workdir,
            **scale,
        )
    elif values.list:
        list_rows(**rows)
    elif values.dry_run:
        dry_run(**rows, **scale)
    else:
        places: dict[str, Any] = {name: values[name].value for name in ("workdir", "data_dir", "strategy", "tpu")}
        paths = run(**rows, **scale, **places, budget=values.budget, started=_STARTED)
        if not paths:
            sys.exit(exit_codes.FAILED)


def command() -> None:
    """Runs the command as it was typed."""
    launcher.launch(main, define_flags, __doc__)
