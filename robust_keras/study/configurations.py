"""What rows of the study run at a scale: gin files and bindings, and what a cost is reckoned from.

chosen = choose(manifest, table=7, names=["tau=0.995"], setting="cifar10")
by_name = configurations(manifest, chosen, planning.plan_of("mini"), (), resolve)
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from robust_keras.study import planning
from robust_keras.study import rows as study
from robust_keras.training import recipes

# gin files and bindings to the run that they configure: it has a `recipe` and a `cadence`, as `training.records` says.
Resolve = Callable[[Sequence[str], Sequence[str]], Any]


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

    files: tuple[str, ...]
    bindings: tuple[str, ...]
    job: planning.Job
    dataset: str
    extra_data: str | None
    threat: tuple[str, ...]

    def with_seed(self, seed: int) -> list[str]:
        """All bindings of the training run of a seed."""
        return [*self.bindings, f"SEED = {seed}"]


def choose(
    manifest: Iterable[study.Row], *, table: int | None = None, names: Sequence[str] = (), setting: str | None = None
) -> tuple[study.Row, ...]:
    """The rows of any of `names`, of a table and a setting, as `rows.select` has them; all names if none is given."""
    return tuple(
        row for name in names or (None,) for row in study.select(manifest, table=table, row=name, setting=setting)
    )


def configurations(
    manifest: Iterable[study.Row],
    chosen: Iterable[study.Row],
    plan: planning.Plan,
    bindings: Sequence[str],
    resolve: Resolve,
) -> dict[str, Configuration]:
    """The `Configuration`s of rows and of their baselines, baselines first, by `rows.run_name`.

    Args:
        manifest: all rows.
        chosen: those to run; what cannot be run is left out.
        plan: the scale.
        bindings: further gin bindings of every row.
        resolve: reads gin files and bindings.
    """
    rows = [each for each in chosen if each.runnable]
    rows = [baseline for each in rows if (baseline := study.baseline_of(manifest, each))] + rows
    baselines = {study.run_name(each) for each in manifest if each.kind == "baseline"}
    return {
        name: _configuration(each, plan, tuple(bindings), name in baselines, resolve)
        for name, each in {study.run_name(each): each for each in rows}.items()
    }


def _configuration(
    row: study.Row, plan: planning.Plan, further: tuple[str, ...], is_baseline: bool, resolve: Resolve
) -> Configuration:
    files, bindings = row.files + plan.overlay, (*row.bindings, *further)
    paper, scaled = resolve(row.files, bindings), resolve(files, bindings)
    network, steps = paper.recipe.model.keywords, scaled.recipe.train_steps
    depth, width = network["depth"], network["width"]
    num_validation = scaled.recipe.data.keywords["num_validation"]
    bindings += tuple(plan.bindings(depth, width, steps, num_validation))
    recipe = resolve(files, bindings).recipe
    data, validation = recipe.data.keywords, recipe.validation.correct_fn.keywords["attack"].keywords
    num_runs = plan.num_baseline_runs if is_baseline else plan.num_runs
    job = planning.Job(
        depth=depth,
        width=width,
        num_classes=100 if data["dataset"] == "cifar100" else 10,
        batch_size=recipe.batches.keywords["batch_size"],
        train_steps=steps,
        attack_steps=recipe.attack.attack_fn.keywords["num_steps"] if recipe.attack else 0,
        objective=recipe.objective.func.__name__,
        clean_prediction=_moves_from_the_clean_prediction(recipe),
        validations=math.ceil(steps / scaled.cadence.validate_every),
        validation_images=num_validation,
        validation_passes=validation["num_steps"] * (1 if recipe.averaging is None else 2),
        num_runs=num_runs,
        num_evaluated=num_runs if plan.evaluates_all or is_baseline else 1,
    )
    threat = validation["threat"]
    evaluated = (f"NORM = {threat.norm!r}", f"EPSILON = {threat.epsilon_fraction!r}", "evaluate.allow_chance = True")
    return Configuration(files, bindings, job, data["dataset"], data["extra_data"], evaluated)


def _moves_from_the_clean_prediction(recipe: recipes.Recipe) -> bool:
    return recipe.attack is not None and recipe.attack.target == "clean_prediction"
