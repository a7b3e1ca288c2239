"""Runs rows of the paper's tables, and writes the paper's numbers next to the measured ones.

    python scripts/reproduce.py --list
    python scripts/reproduce.py --table=7 --setting=80mti --dry_run
    python scripts/reproduce.py --table=8 --row=Swish/SiLU --setting=cifar10 --scale=mini --workdir=runs/study

Every row is trained, evaluated with AA+MT and compared with its baseline, which is run too. Tables share their runs,
and the same command goes on where it was. Tables 9, 6, 7 and 8 are drawn as well: they are Figures 2 to 5.
"""

from robust_keras.commands import launcher  # isort: skip  Before TensorFlow is imported.

import json
import math
import posixpath
import re
from typing import Any, NamedTuple

from absl import flags

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Configuration(NamedTuple):
    """What a row of the study runs, at a scale.

    Attributes:
        files: gin files.
        bindings: gin bindings, without the seed.
        job: the `planning.Job`.
        dataset: name of the data set.
        extra_data: name of the extra data, or None.
        threat: gin bindings of the evaluation's threat model.
    """

    files: tuple
    bindings: tuple
    job: Any
    dataset: str
    extra_data: str | None
    threat: tuple


def run(
    *,
    table=None,
    row=(),
    setting=None,
    scale="paper",
    budget=None,
    workdir="runs/study",
    data_dir=None,
    num_runs=None,
    gin_params=(),
):
    """Trains and evaluates rows with their baselines, and writes the tables they stand in.

    Args:
        table: its number; None for all.
        row: names of rows; none for all.
        setting: 'cifar10', '80mti', or None for both.
        scale: a key of `planning.PLANS`.
        budget: such as '3h': all of this call is made to fit. None for no limit.
        workdir: where runs and tables go.
        data_dir: where data sets are.
        num_runs: models per configuration, all of which are evaluated; None for the scale's own protocol.
        gin_params: further bindings of every row, such as "EXTRA_DATA = 'npz:FILE'".

    Returns:
        The paths of the tables and figures.

    Raises:
        ValueError: for bad input, before anything is trained.
    """
    from robust_keras.data import sources
    from robust_keras.study import rows as study
    from robust_keras.study import tables

    manifest = study.read()
    chosen = _select(manifest, table, row, setting)
    plan = _plan(scale, num_runs)
    configurations = _configurations(manifest, chosen, plan, gin_params)
    for extra_data in dict.fromkeys(each.extra_data for each in configurations.values()):
        if extra_data is not None:  # Missing data shows now, not after hours of training something else.
            sources.find_extra(extra_data, data_dir=data_dir)
    if budget is not None:
        plan = _within(budget, plan, {name: each.job for name, each in configurations.items()}, workdir)
        configurations = _configurations(manifest, chosen, plan, gin_params)
    folder = posixpath.join(workdir, plan.name)
    measured = {}
    for count, (name, configuration) in enumerate(configurations.items()):
        print(f"Configuration {count + 1} of {len(configurations)}: {name}", flush=True)
        measured[name] = _measure(plan, configuration, posixpath.join(folder, name), data_dir)
    paths = []
    for number in dict.fromkeys(each.table for each in chosen):
        rows = study.select(manifest, table=number, setting=setting)
        # What earlier calls finished stays in the table.
        for name, configuration in _configurations(manifest, rows, plan, gin_params).items():
            if name not in measured and (finished := _finished(configuration, posixpath.join(folder, name))):
                measured[name] = finished
        shown = [each for each in rows if not each.runnable or study.run_name(each) in measured or each in chosen]
        compared = tables.compare_rows(manifest, shown, measured)
        paths += tables.write_study(folder, number, compared, scale=_described(plan))
    print("\n".join(paths))
    return paths


def list_rows(*, table=None, row=(), setting=None):
    """Prints rows with the paper's numbers."""
    from robust_keras.evaluation import report
    from robust_keras.study import rows as study
    from robust_keras.study import tables

    print(report.markdown(tables.paper_columns(_select(study.read(), table, row, setting))))


def dry_run(*, table=None, row=(), setting=None, scale="paper", num_runs=None, gin_params=()):
    """Prints what `run` would take: steps, operations, and hours by the throughputs of `costs.DEVICES`."""
    from robust_keras.evaluation import report
    from robust_keras.study import costs, planning
    from robust_keras.study import rows as study

    manifest, plan = study.read(), _plan(scale, num_runs)
    configurations = _configurations(manifest, _select(manifest, table, row, setting), plan, gin_params)
    header = (
        "configuration",
        "network",
        "parameters",
        "steps",
        "a step",
        "models",
        "training",
        "evaluation, at most",
        "in all",
    )
    lines = [(*header, *(f"hours on {device.title}" for device in costs.DEVICES.values()))]
    total = 0.0
    for name, configuration in configurations.items():
        job, cost = configuration.job, planning.cost(plan, configuration.job)
        network = plan.network(job.depth, job.width)
        lines.append(
            (
                name,
                "WRN-{}-{}".format(*network),
                f"{costs.num_parameters(*network, num_classes=job.num_classes):,}",
                f"{plan.steps(job.train_steps):,}",
                f"{planning.step_flops(plan, job):.4g} FLOP",
                f"{job.num_runs}, {job.num_evaluated} evaluated",
                f"{cost.training:.3g} FLOP",
                f"{cost.evaluation:.3g} FLOP",
                f"{cost.total:.3g} FLOP",
                *(_hours(cost.total, device) for device in costs.DEVICES.values()),
            )
        )
        total += cost.total
    lines.append(("all", *[""] * 7, f"{total:.3g} FLOP", *(_hours(total, device) for device in costs.DEVICES.values())))
    print(report.markdown(lines))
    for device in costs.DEVICES.values():
        print(f"{device.title}: {device.flops_per_second:.2g} FLOP/s, {device.source}")


def _hours(flops, device):
    return f"{flops / device.flops_per_second / 3600:,.1f}"


def _select(manifest, table, names, setting):
    from robust_keras.study import rows as study

    if not names:
        return study.select(manifest, table=table, setting=setting)
    return tuple(each for name in names for each in study.select(manifest, table=table, row=name, setting=setting))


def _plan(scale, num_runs):
    from robust_keras.study import planning

    if scale not in planning.PLANS:
        raise ValueError(f"Expected a scale out of {', '.join(planning.PLANS)}. Received: {scale!r}")
    plan = planning.PLANS[scale]
    if num_runs is not None:
        plan = plan._replace(num_runs=num_runs, num_baseline_runs=num_runs, evaluates_all=True)
    return plan


def _configurations(manifest, chosen, plan, gin_params):
    """The `Configuration`s of rows and of their baselines, baselines first, by name."""
    from robust_keras.study import rows as study

    rows = [each for each in chosen if each.runnable]
    rows = [baseline for each in rows if (baseline := study.baseline_of(manifest, each))] + rows
    baselines = {study.run_name(each) for each in manifest if each.kind == "baseline"}
    return {
        name: _configuration(each, plan, gin_params, name in baselines)
        for name, each in {study.run_name(each): each for each in rows}.items()
    }


def _configuration(row, plan, gin_params, is_baseline):
    from robust_keras.commands import configuration as configurables
    from robust_keras.study import planning

    def resolved(files, bindings):
        configurables.parse(files, bindings)
        return configurables.resolve(configurables.train)

    bindings, files = (*row.bindings, *gin_params), row.files + plan.overlay
    network = resolved(row.files, bindings).recipe.model.keywords
    size = network["depth"], network["width"]
    scaled = resolved(files, bindings)
    steps, num_validation = scaled.recipe.train_steps, scaled.recipe.data.keywords["num_validation"]
    bindings += tuple(plan.bindings(*size, steps, num_validation))
    train = resolved(files, bindings).recipe
    attack = train.attack
    validation = train.validation.correct_fn.keywords["attack"].keywords
    num_runs = plan.num_baseline_runs if is_baseline else plan.num_runs
    job = planning.Job(
        depth=size[0],
        width=size[1],
        num_classes=100 if train.data.keywords["dataset"] == "cifar100" else 10,
        batch_size=train.batches.keywords["batch_size"],
        train_steps=steps,
        attack_steps=attack.attack_fn.keywords["num_steps"] if attack else 0,
        objective=train.objective.func.__name__,
        clean_prediction=attack is not None and attack.target == "clean_prediction",
        validations=math.ceil(steps / scaled.cadence.validate_every),
        validation_images=num_validation,
        validation_passes=validation["num_steps"] * (1 if train.averaging is None else 2),
        num_runs=num_runs,
        num_evaluated=num_runs if plan.evaluates_all or is_baseline else 1,
    )
    data, threat = train.data.keywords, validation["threat"]
    evaluated = (f"NORM = {threat.norm!r}", f"EPSILON = {threat.epsilon_fraction!r}", "evaluate.allow_chance = True")
    return Configuration(files, bindings, job, data["dataset"], data["extra_data"], evaluated)


def _measure(plan, configuration, folder, data_dir):
    """Trains and evaluates the models of a configuration: a list of `tables.Measured`."""
    import keras

    from robust_keras.commands import configuration as configurables
    from robust_keras.commands import evaluate, train
    from robust_keras.saved_models import export
    from robust_keras.study import tables
    from robust_keras.training import recorder

    validations, measured = {}, []
    for seed in range(configuration.job.num_runs):
        workdir = posixpath.join(folder, f"seed{seed}")
        saved_model = posixpath.join(workdir, "saved_model")
        try:
            if export.is_finished(saved_model):
                configurables.claim(workdir, _operative_config(configuration, seed), holds_results=True)
            else:
                train.run(
                    gin_files=configuration.files,
                    gin_params=_bindings(configuration, seed),
                    data_dir=data_dir,
                    workdir=workdir,
                )
        except recorder.NonFiniteLoss as error:
            print(f"Seed {seed} diverged and is left out. {error}", flush=True)
            continue
        finally:
            keras.backend.clear_session()
        metrics = json.loads(_read(posixpath.join(saved_model, export.CARD)))["validation"]["best"]["metrics"]
        validations[seed] = metrics.get("val_robust_averaged", metrics["val_robust"])
    best = sorted(validations, key=lambda seed: -validations[seed])  # Of equals the first.
    for seed in sorted(best[: configuration.job.num_evaluated]):
        workdir = posixpath.join(folder, f"seed{seed}")
        evaluation = posixpath.join(workdir, "evaluation")
        evaluate.run(
            saved_model=posixpath.join(workdir, "saved_model"),
            dataset=configuration.dataset,
            gin_files=[plan.evaluation],
            gin_params=configuration.threat,
            data_dir=data_dir,
            num_examples=None if plan.num_examples is None and plan.share == 1 else plan.examples,
            workdir=evaluation,
        )
        measured.append(tables.read_measured(evaluation, seed=seed, training=workdir))
    return measured


def _finished(configuration, folder):
    """What a configuration has of finished evaluations: a list of `tables.Measured`."""
    import tensorflow as tf

    from robust_keras.commands import configuration as configurables
    from robust_keras.study import tables

    measured = []
    for seed in range(configuration.job.num_runs):
        workdir = posixpath.join(folder, f"seed{seed}")
        evaluation = posixpath.join(workdir, "evaluation")
        if tf.io.gfile.exists(posixpath.join(evaluation, "results.json")):
            saved = _read(posixpath.join(workdir, "config.gin"))
            if not configurables.differences(_operative_config(configuration, seed), saved):
                measured.append(tables.read_measured(evaluation, seed=seed, training=workdir))
    return measured


def _bindings(configuration, seed):
    return [*configuration.bindings, f"SEED = {seed}"]


def _operative_config(configuration, seed):
    from robust_keras.commands import configuration as configurables

    configurables.parse(configuration.files, _bindings(configuration, seed))
    configurables.resolve(configurables.train)
    return configurables.operative_config()


def _within(budget, plan, jobs, workdir):
    """The plan that fits `jobs`, by name, into a budget: an earlier call's, or by the throughput of this device."""
    import tensorflow as tf

    from robust_keras.study import planning

    jobs = {key: job._asdict() for key, job in jobs.items()}
    name = f"{plan.name}-{budget}"
    path = posixpath.join(workdir, name, "plan.json")
    if tf.io.gfile.exists(path) and (text := _read(path)):
        saved = json.loads(text)
        if saved["jobs"] != json.loads(json.dumps(jobs)):
            raise ValueError(
                f"Expected what {path} was made for, {', '.join(saved['jobs'])}, or another workdir. "
                f"Received: {', '.join(jobs)}{' with other settings' if saved['jobs'].keys() == jobs.keys() else ''}"
            )
        size = tuple(saved["size"]) if isinstance(saved["size"], list) else saved["size"]
        fitted = plan._replace(size=size, share=saved["share"])
    else:
        speed = _throughput()
        fitted = planning.fit(
            plan, [planning.Job(**job) for job in jobs.values()], seconds=_seconds(budget), flops_per_second=speed
        )
        tf.io.gfile.makedirs(posixpath.dirname(path))
        kept = {"size": fitted.size, "share": fitted.share, "flops_per_second": speed, "jobs": jobs}
        with tf.io.gfile.GFile(path, "w") as file:
            file.write(json.dumps(kept) + "\n")
    print(f"In {budget}: {_described(fitted)}", flush=True)
    return fitted._replace(name=name)


def _throughput(batch_size=64):
    """Operations per second of this device in the attack of a training step.

    Measured with a WRN-10-1, and where that is too little work for the device to show what it can, with a WRN-28-10.
    """
    for depth, width in ((10, 1), (28, 10)):
        seconds, flops = _time_of_a_pass(depth, width, batch_size)
        if seconds > 0.02:
            break
    return flops / seconds


def _time_of_a_pass(depth, width, batch_size):
    """Seconds and operations of a pass with the input's gradient, as in the attack of a training step."""
    import time

    import tensorflow as tf

    from robust_keras import losses
    from robust_keras.attacks import stepwise
    from robust_keras.models import normalization, wide_resnet
    from robust_keras.study import costs

    network = wide_resnet.wide_resnet(
        depth=depth,
        width=width,
        num_classes=10,
        activation="silu",
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        input_shape=(32, 32, 3),
        statistics_group_size=batch_size // 2,
    )
    labels = tf.zeros(batch_size, tf.int32)

    @tf.function
    def gradient(x):
        with normalization.batch_norm_mode(normalization.BATCH):
            return stepwise.value_and_gradient(network, x, lambda logits: losses.cross_entropy(logits, labels))[2]

    x = tf.zeros((batch_size, 32, 32, 3))
    gradient(x)
    passes, started = 0, time.perf_counter()
    while time.perf_counter() - started < 3.0:
        for _ in range(10):
            following = gradient(x)
        following.numpy()  # Waits for all of them.
        passes += 10
    flops = costs.attack_flops(costs.forward_flops(depth, width), num_images=batch_size, num_passes=1)
    return (time.perf_counter() - started) / passes, flops


def _seconds(budget):
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", budget)
    if not match or not float(match[1]):
        raise ValueError(f"Expected a budget such as 90m or 3h. Received: {budget!r}")
    return float(match[1]) * _UNITS[match[2]]


def _described(plan):
    network = (
        "WRN-{}-{} for the paper's WRN-28-10".format(*plan.network(28, 10)) if plan.size else "the paper's networks"
    )
    steps = "its steps" if plan.share == 1 else f"{100 * plan.share:.1f} % of its steps"
    return f"{plan.name} scale: {network}, {steps}, {plan.examples:,} test images, {plan.evaluation}"


def _read(path):
    import tensorflow as tf

    with tf.io.gfile.GFile(path) as file:
        return file.read()


def define_flags(values):
    flags.DEFINE_integer("table", None, "Number of the paper's table; all by default.", flag_values=values)
    flags.DEFINE_multi_string("row", [], "Name of a row; any number of times, all by default.", flag_values=values)
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
    flags.DEFINE_multi_string(
        "gin_param", [], "Binding for every row, such as \"EXTRA_DATA = 'npz:FILE'\".", flag_values=values
    )
    flags.DEFINE_string("data_dir", None, "Where data sets are, or are to be downloaded to.", flag_values=values)
    flags.DEFINE_string("workdir", "runs/study", "Where runs and tables go.", flag_values=values)
    flags.DEFINE_bool("list", False, "Print the rows with the paper's numbers.", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "Print steps, operations and hours on several devices.", flag_values=values)


def main(values):
    rows = {"table": values.table, "row": values.row, "setting": values.setting}
    scale = {"scale": values.scale, "num_runs": values.num_runs, "gin_params": values.gin_param}
    if values.budget is not None:
        _seconds(values.budget)
        if values.list or values.dry_run:
            raise ValueError("Expected --budget with neither --list nor --dry_run. Received: both")
    if values.list:
        list_rows(**rows)
    elif values.dry_run:
        dry_run(**rows, **scale)
    else:
        run(**rows, **scale, budget=values.budget, workdir=values.workdir, data_dir=values.data_dir)


def command():
    launcher.launch(main, define_flags, __doc__)
