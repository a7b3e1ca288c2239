"""What tells runs apart, as TensorBoard lists it: names, numbers and words of a recipe."""

from typing import Any

from robust_keras.training.recipes import Recipe


def of(recipe: Recipe) -> dict[str, bool | float | str]:
    """Settings by name, as far as a recipe's functions have them bound.

    `norm` and `epsilon`, in pixel units of [0, 1], are those of the attack of training, and of the validation's where
    training has none.
    """
    attack = _bound(recipe.attack.attack_fn) if recipe.attack else {}
    threat = {**_bound(_bound(recipe.validation.correct_fn).get("attack")), **attack}.get("threat")
    model, data = _bound(recipe.model), _bound(recipe.data)
    found = {
        "norm": getattr(threat, "norm", None),
        "epsilon": getattr(threat, "epsilon", None),
        "objective": _name(recipe.objective),
        "attack_steps": attack.get("num_steps"),
        "dataset": data.get("dataset"),
        "extra_data": data.get("extra_data"),
        "model": _name(recipe.model),
        **{name: model.get(name) for name in ("depth", "width", "activation")},
        "batch_size": _bound(recipe.batches).get("batch_size"),
        "train_steps": recipe.train_steps,
        "schedule": _name(recipe.optimizer.learning_rate),
        "learning_rate": _bound(recipe.optimizer.learning_rate).get("base"),
        "tau": recipe.averaging and recipe.averaging.tau,
        "seed": recipe.seed,
    }
    return {name: value for name, value in found.items() if isinstance(value, (bool, int, float, str))}


def _bound(function: Any) -> dict[str, Any]:
    return getattr(function, "keywords", {})


def _name(function: Any) -> str:
    function = getattr(function, "func", function)
    return getattr(function, "__name__", type(function).__name__)
