"""Short runs of the study's own configurations, which tell how long the long ones take on the device at hand.

A trial trains a few steps and evaluates a few images with the very functions that the study runs, so that its timings
hold what operations do not tell: loading data, tracing and compiling, snapshots, export.
"""

import csv
import io
import posixpath
import time
from collections.abc import Callable, Mapping

import tensorflow as tf

from robust_keras import own_folders, storage
from robust_keras.study import budget, costs, planning, throughput
from robust_keras.study.configurations import Configuration

STEPS = 16
IMAGES = 64  # Some of which a network that has learned nothing gets right, so that every attack runs.


def time_trials(
    plan: planning.Plan,
    by_name: Mapping[str, Configuration],
    folder: str,
    *,
    train: Callable[[Configuration, list[str]], None],
    evaluate: Callable[[Configuration, int], dict],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, budget.Timings]:
    """What the parts of each configuration's runs take, by name: one trial for all that run the same program.

    Args:
        plan: the scale.
        by_name: configurations.
        folder: for the trials; it is emptied before each, and gone afterwards.
        train: trains a configuration with all these bindings in the folder, and exports.
        evaluate: evaluates that model on so many images; returns results as results.json has them.
        clock: to read the time from, in seconds.
    """
    timings: dict[planning.Job, budget.Timings] = {}
    for configuration in by_name.values():
        job = configuration.job
        if program(plan, job) in timings:
            continue
        _remove(folder)  # Of a call that was stopped.
        flops_per_second = throughput.attack_throughput(plan, job)
        started = clock()
        train(configuration, [*configuration.with_seed(0), *bindings(job.validation_images)])
        trained = clock()
        results = evaluate(configuration, min(IMAGES, plan.examples))
        evaluated = clock()
        timings[program(plan, job)] = take_apart(
            plan,
            job,
            training=trained - started,
            examples_per_second=_examples_per_second(folder),
            evaluation=evaluated - trained,
            attack_steps=sum(
                attack["steps"] for attack in (*results["attacks"], results.get("baseline", {"steps": 0}))
            ),
            flops_per_second=flops_per_second,
        )
        _remove(folder)
    return {name: timings[program(plan, each.job)] for name, each in by_name.items()}


def program(plan: planning.Plan, job: planning.Job) -> planning.Job:
    """What the timings of a job depend on: the same for all jobs with the same network and step."""
    depth, width = plan.network(job.depth, job.width)
    depends = job._replace(depth=depth, width=width, train_steps=0, num_runs=0, num_evaluated=0)
    return depends._replace(validations=0, validation_images=0)


def bindings(num_validation: int) -> list[str]:
    """gin bindings of a trial, which are read last."""
    every = [f"train.{name}_every = {STEPS}" for name in ("validate", "checkpoint", "log")]
    images = min(planning.FEWEST_VALIDATION_IMAGES, num_validation)
    return [f"TRAIN_STEPS = {STEPS}", *every, f"training_data.num_validation = {images}"]


def take_apart(
    plan: planning.Plan,
    job: planning.Job,
    *,
    training: float,
    examples_per_second: float,
    evaluation: float,
    attack_steps: int,
    flops_per_second: float,
) -> budget.Timings:
    """The timings that follow from those of a trial.

    Args:
        plan: the scale.
        job: of the configuration.
        training: seconds of the trial's training, which ends with one validation.
        examples_per_second: of its steps after the first, as it has recorded them.
        evaluation: seconds of its evaluation.
        attack_steps: of all its attacks, summed over examples. What compiled steps of all but empty batches take is
            left with the rest: the last batches of a long evaluation are like that, too.
        flops_per_second: in passes of attacks on the network.
    """
    forward, step = planning.forward_flops(plan, job), job.batch_size / examples_per_second

    def seconds(num_images: int) -> float:
        return costs.attack_flops(forward, num_images=num_images, num_passes=1) / flops_per_second

    validation = seconds(job.validation_passes * budget.VALIDATION_BATCH)
    attacks = seconds(attack_steps)
    return budget.Timings(
        starting=max(training - STEPS * step - validation, 0.0),
        step=step,
        evaluating=max(evaluation - attacks, 0.0),
        flops_per_second=flops_per_second,
    )


def _examples_per_second(workdir: str) -> float:
    text = storage.read_text(posixpath.join(workdir, "metrics.csv"))
    return float([line["examples_per_second"] for line in csv.DictReader(io.StringIO(text))][-1])


def _remove(folder: str) -> None:
    if tf.io.gfile.exists(folder):
        own_folders.remove_folder(folder)
