"""The settings of a training run as gin binds them, `train.tau` and so on: one flat list, which becomes records."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from robust_keras.attacks.attack import as_attack
from robust_keras.evaluation.evaluate import correct_under_attack, seen_under_attack
from robust_keras.training import epsilon_warm_up, recipes
from robust_keras.training import train as training

_LAYOUT, _CADENCE = recipes.Layout(), recipes.Cadence()
_ATTACK, _OPTIMIZER = recipes.InnerAttack._field_defaults, recipes.Optimizer._field_defaults
_AVERAGING, _VALIDATION = recipes.Averaging._field_defaults, recipes.Validation._field_defaults
_RECIPE = recipes.Recipe._field_defaults


class ConfiguredRun(NamedTuple):
    """A training run that only wants its folder: `run(workdir=..., data_dir=...)`.

    Attributes:
        recipe: a `recipes.Recipe`.
        layout: a `recipes.Layout`.
        cadence: a `recipes.Cadence`.
    """

    recipe: recipes.Recipe
    layout: recipes.Layout
    cadence: recipes.Cadence

    def __call__(self, *, workdir: str, data_dir: str | None = None) -> training.TrainedModel:
        """See `training.train.train`."""
        return training.train(workdir=workdir, data_dir=data_dir, **self._asdict())


def train(
    *,
    data: Callable,
    model: Callable,
    batches: Callable,
    objective: Callable,
    attack: Callable | None,
    validation: Callable,
    learning_rate: Callable,
    train_steps: int,
    seed: int,
    attack_target: str = _ATTACK["target"],
    attack_batch_norm: str = _ATTACK["batch_norm"],
    epsilon_warmup_steps: int = _ATTACK["epsilon_warmup_steps"],
    momentum: float = _OPTIMIZER["momentum"],
    weight_decay: float = _OPTIMIZER["weight_decay"],
    optimizer: Callable | None = None,
    tau: float | None = None,
    averaging_warm_up: bool = _AVERAGING["warm_up"],
    best_by: str = _VALIDATION["best_by"],
    dtype_policy: str = _RECIPE["dtype_policy"],
    initial_weights: Callable | None = None,
    strategy: str = _LAYOUT.strategy,
    tpu: str | None = _LAYOUT.tpu,
    accumulation_steps: int = _LAYOUT.accumulation_steps,
    steps_per_execution: int = _LAYOUT.steps_per_execution,
    validation_batch_size: int = _LAYOUT.validation_batch_size,
    jit_compile: bool = _LAYOUT.jit_compile,
    validate_every: int = _CADENCE.validate_every,
    checkpoint_every: int = _CADENCE.checkpoint_every,
    log_every: int = _CADENCE.log_every,
    num_checkpoints: int = _CADENCE.num_checkpoints,
    progress: bool = _CADENCE.progress,
) -> ConfiguredRun:
    """The run that these settings are; `training.recipes` says what each means."""
    for each in (attack, getattr(validation, "keywords", {}).get("attack")):
        if each is not None:
            as_attack(each)  # Bad settings show before any work.
    epsilon_warm_up.checked(epsilon_warmup_steps, attack)
    inner = recipes.InnerAttack(attack, attack_target, attack_batch_norm, epsilon_warmup_steps) if attack else None
    # Of another function nobody knows what it sees, nor whether it has to see what is wrong before any attack.
    is_known = getattr(validation, "func", None) is correct_under_attack
    seen_fn = functools.partial(seen_under_attack, **getattr(validation, "keywords", {})) if is_known else None
    layout = recipes.Layout(strategy, tpu, accumulation_steps, steps_per_execution, jit_compile, validation_batch_size)
    cadence = recipes.Cadence(validate_every, checkpoint_every, log_every, num_checkpoints, progress)
    recipe = recipes.Recipe(
        data=data,
        model=model,
        batches=batches,
        objective=objective,
        attack=inner,
        optimizer=recipes.Optimizer(learning_rate, momentum, weight_decay, optimizer),
        validation=recipes.Validation(validation, best_by, not is_known, seen_fn),
        train_steps=train_steps,
        seed=seed,
        averaging=None if tau is None else recipes.Averaging(tau, averaging_warm_up),
        dtype_policy=dtype_policy,
        initial_weights=initial_weights,
    )
    return ConfiguredRun(recipe, layout, cadence)
