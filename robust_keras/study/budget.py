"""How much of a scale fits into a budget of time, by what its parts take on the device at hand.

    fitted = fit(plan, jobs, left=left, flops_per_second=1e11, measure=measure)
    images = num_images(fitted, jobs, models, left=left())

Steps and networks are planned before training, test images again after it: by then it is known how many images each
network gets right, which is what the time of an evaluation depends on.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from robust_keras import ownership, storage
from robust_keras.evaluation import comparison
from robust_keras.study import costs, planning

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
# What is advised is above what was reckoned, so that a second measurement comes to the same end.
_MARGIN = 1.1
VALIDATION_BATCH = 128  # Batches of a validation are full.


class Timings(NamedTuple):
    """What the parts of a configuration's runs take on the device at hand.

    Attributes:
        starting: seconds of a training run beside its steps and validations: data, tracing and compiling of steps,
            validations and averages, snapshots, export.
        step: seconds of a training step.
        evaluating: seconds of an evaluation beside its passes: data, model, tracing and compiling, results.
        flops_per_second: in passes of attacks on the network.
    """

    starting: float
    step: float
    evaluating: float
    flops_per_second: float


class Fitted(NamedTuple):
    """What fits.

    Attributes:
        plan: the `planning.Plan`.
        timings: `Timings` by name of the configuration; empty where an older version made the plan.
        seconds: that all of it takes, by these.
    """

    plan: planning.Plan
    timings: dict[str, Timings]
    seconds: float


class Model(NamedTuple):
    """A trained model that is to be evaluated.

    Attributes:
        name: of its configuration.
        clean: accuracy on the validation images, a fraction.
        robust: under PGD-40.
    """

    name: str
    clean: float
    robust: float


def parse(budget: str) -> float:
    """The seconds of a budget such as '90m' or '3h'.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", budget)
    if not match or not float(match[1]):
        raise ValueError(f"Expected a budget such as 90m or 3h. Received: {budget!r}")
    return float(match[1]) * _UNITS[match[2]]


def training_seconds(plan: planning.Plan, job: planning.Job, timings: Timings) -> float:
    """Of one training run."""
    images = -(-plan.validation_images(job.validation_images) // VALIDATION_BATCH) * VALIDATION_BATCH
    validation = costs.attack_flops(
        planning.forward_flops(plan, job),
        num_images=plan.validations(job.validations) * images,
        num_passes=job.validation_passes,
    )
    steps = plan.steps(job.train_steps) * timings.step
    return timings.starting + steps + validation / timings.flops_per_second


def evaluation_seconds(
    plan: planning.Plan, job: planning.Job, timings: Timings, accuracy: tuple[float, float] | None = None
) -> float:
    """Of one evaluation, of a model with this (clean, robust) accuracy; the plan's by default."""
    flops = plan.examples * planning.image_flops(plan, job, accuracy or plan.accuracy)
    return timings.evaluating + flops / timings.flops_per_second


def total_seconds(plan: planning.Plan, jobs: Mapping[str, planning.Job], timings: Mapping[str, Timings]) -> float:
    """Of all runs and evaluations of jobs, by name."""
    return sum(
        job.num_runs * training_seconds(plan, job, timings[name])
        + job.num_evaluated * evaluation_seconds(plan, job, timings[name])
        for name, job in jobs.items()
    )


def fit(
    plan: planning.Plan,
    jobs: Mapping[str, planning.Job],
    *,
    seconds: float,
    left: Callable[[], float],
    flops_per_second: float,
    measure: Callable[[planning.Plan], dict[str, Timings]],
) -> Fitted:
    """The plan, shrunk until all `jobs` fit.

    Networks shrink first, to a half, a quarter and then the miniature's, skipping sizes at which two of them would be
    the same; then steps, held-out images and test examples do, by one factor. Batches, ratios, radii and schedules
    (which are fractions of the steps) stay.

    Args:
        plan: a `planning.Plan`.
        jobs: the `planning.Job`s that are still to be run, by name.
        seconds: the budget.
        left: how much of it is left, after what `measure` took too.
        flops_per_second: of the device, roughly: sizes that cannot fit by their operations are not measured.
        measure: a plan to the `Timings` of each job at it.

    Raises:
        ValueError: where not even the smallest that tells anything fits; it says which budget would do.
    """
    sizes = list(_sizes(plan, jobs.values()))
    for size in sizes:
        plan = plan._replace(size=size)
        flops = sum(planning.cost(plan, job, accuracy=plan.accuracy).total for job in jobs.values())
        if size != sizes[-1] and flops / flops_per_second > left():
            continue
        timings = measure(plan)
        if (total := total_seconds(plan, jobs, timings)) <= left():
            return Fitted(plan, timings, total)
    return _shortened(plan, jobs, timings, seconds, left())


def _sizes(plan: planning.Plan, jobs: Collection[planning.Job]) -> Iterator[planning.Size]:
    yield plan.size
    if plan.size == "mini":
        return
    networks = {(job.depth, job.width) for job in jobs}
    for size in ((1, 2), (1, 4)):
        smaller = plan._replace(size=size)
        if len({smaller.network(*network) for network in networks}) == len(networks):
            yield size
    yield "mini"


def _shortened(
    plan: planning.Plan,
    jobs: Mapping[str, planning.Job],
    timings: dict[str, Timings],
    seconds: float,
    left: float,
) -> Fitted:
    """The greatest share of a plan's steps and images that fits."""
    steps = min((job.train_steps for job in jobs.values()), default=planning.FEWEST_STEPS)
    fewest = max(planning.FEWEST_STEPS / steps, planning.FEWEST_EXAMPLES / plan.most_examples)
    fewest = min(math.ceil(1000 * fewest), 1000)  # Who asks for fewer steps than that gets all of them.
    for thousandths in range(1000, fewest - 1, -1):
        shortened = plan._replace(share=thousandths / 1000)
        if (total := total_seconds(shortened, jobs, timings)) <= left:
            return Fitted(shortened, timings, total)
    needed = math.ceil((_MARGIN * (total + seconds - left)) / 60)
    trained, evaluated = (sum(getattr(job, name) for job in jobs.values()) for name in ("num_runs", "num_evaluated"))
    raise ValueError(
        f"Expected a budget of {needed}m or more, for {trained} models of {shortened.steps(steps):,} steps, of which "
        f"{evaluated} are evaluated on {shortened.examples:,} images: less would compare networks at chance, or tell "
        f"nothing. Received: {seconds:.0f} s; --num_runs and --row ask for less"
    )


def all_at_chance(plan: planning.Plan, jobs: Mapping[str, planning.Job], models: Sequence[Model]) -> bool:
    """Whether no model is above chance on its validation images: nothing can be told by comparing such networks."""
    return not any(
        model.clean > comparison.luckiest(1 / job.num_classes, plan.validation_images(job.validation_images))
        for model in models
        for job in (jobs[model.name],)
    )


def num_images(fitted: Fitted, jobs: Mapping[str, planning.Job], models: Sequence[Model], *, left: float) -> int:
    """On how many test images trained models can be evaluated in the time that is left, at least `FEWEST_EXAMPLES`.

    Args:
        fitted: what `fit` returned.
        jobs: the jobs, by name.
        models: those to evaluate.
        left: seconds.
    """
    plan, starting, an_image = fitted.plan, 0.0, 0.0
    for model in models:
        timings = fitted.timings[model.name]
        starting += timings.evaluating
        flops = planning.image_flops(plan, jobs[model.name], (model.clean, model.robust))
        an_image += flops / timings.flops_per_second
    affordable = int((left - starting) / an_image) if an_image else plan.most_examples
    return min(max(affordable, planning.FEWEST_EXAMPLES), plan.most_examples)


def read(path: str, plan: planning.Plan, jobs: Mapping[str, planning.Job]) -> Fitted | None:
    """The plan that `write` wrote, or None where there is none.

    Raises:
        ValueError: for one that was made for other jobs, or is none.
    """
    saved = storage.read_object(path)
    if saved is None:
        return None
    if not isinstance(saved.get("jobs"), dict) or not {"size", "share"} <= saved.keys():
        raise ValueError(f"Expected what a budget was planned for in {path}. Received: something else")
    if saved["jobs"].keys() != jobs.keys():
        raise ValueError(
            f"Expected what {path} was made for, {', '.join(saved['jobs'])}, or another workdir. "
            f"Received: {', '.join(jobs)}"
        )
    ownership.claim(
        path,
        {name: job._asdict() for name, job in jobs.items()},
        what="what its budget was planned for",
        writes=False,
        parse=lambda text: json.loads(text)["jobs"],
    )
    size = tuple(saved["size"]) if isinstance(saved["size"], list) else saved["size"]
    timings = {name: Timings(*values) for name, values in saved.get("timings", {}).items()}
    fitted = plan._replace(size=size, share=saved["share"], images=saved.get("images"))
    return Fitted(fitted, timings, saved.get("seconds", 0.0))


def write(path: str, fitted: Fitted, jobs: Mapping[str, planning.Job]) -> None:
    """Keeps a plan, so that the same command goes on with it."""
    plan = fitted.plan
    kept = {
        "size": plan.size,
        "share": plan.share,
        "images": plan.images,
        "seconds": fitted.seconds,
        "timings": fitted.timings,
        "jobs": {name: job._asdict() for name, job in jobs.items()},
    }
    storage.write_json(path, kept)
