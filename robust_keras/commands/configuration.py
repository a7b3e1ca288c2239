"""Everything that gin may bind, registered in one place, and what of it identifies a run.

A reference with parentheses resolves once, when the configured function is called: `@training/pgd()` is `pgd`
with the arguments bound in scope `training`, a plain `functools.partial` that knows nothing of gin.
"""

import contextlib
import functools
import inspect
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

import gin
from robust_keras import losses, ownership, schedules, threats
from robust_keras.attacks import step_rules, transfer
from robust_keras.attacks.apgd import apgd, apgd_targeted
from robust_keras.attacks.autoattack import autoattack
from robust_keras.attacks.fab import fab
from robust_keras.attacks.multi_targeted import multi_targeted
from robust_keras.attacks.pgd import pgd
from robust_keras.attacks.square import square
from robust_keras.commands import bound_functions, gin_text, label_pool_settings, recipe_files, train_settings
from robust_keras.commands.recipe_files import gin_directory as gin_directory
from robust_keras.data import augmentation, training_batches
from robust_keras.engines import strategies
from robust_keras.evaluation import evaluate as evaluation
from robust_keras.models import application, preact_resnet, wide_resnet
from robust_keras.pseudo_labelling import recipes as labelling_recipes
from robust_keras.saved_models import load, warm_start
from robust_keras.training import objectives, optimizer
from robust_keras.training import recipes as training_recipes

# Of each configurable, the parameters that may change when a run is resumed: they do not identify it.
MAY_CHANGE: dict[str, frozenset[str]] = {}
# Bindings of the present configuration that need not be used: what referred to them was replaced.
_LEFT_OVER: set[str] = set()
_AT_DEFAULTS = "# Of these, at the defaults of the version that ran:"


def _register(function, given=(), may_change=()):
    """Registers `function`; `given` are the caller's arguments, and `may_change` do not identify a run."""
    MAY_CHANGE[function.__name__] = frozenset(may_change)
    return gin.external_configurable(function, module="robust_keras", denylist=list(given))


# What a model is given, by the data.
_OF_DATA = ("num_classes", "mean", "std", "input_shape")
_function: Any
for _function, _given in {
    apgd: (),
    apgd_targeted: (),
    multi_targeted: (),
    pgd: ("seeds",),
    transfer.transfer: ("seeds",),
    augmentation.crop_and_flip: (),
    augmentation.random_resized_crop: (),
    evaluation.correct_under_attack: ("seeds",),
    fab: (),
    losses.cross_entropy: (),
    losses.dlr: (),
    losses.kl_divergence: (),
    losses.margin: (),
    training_batches.batches: ("seed", "num_steps", "start_step", "num_hosts", "host"),
    training_batches.cutmix: (),
    application.application: _OF_DATA,
    preact_resnet.preact_resnet: _OF_DATA,
    warm_start.load_network: _OF_DATA,
    wide_resnet.wide_resnet: _OF_DATA,
    objectives.adversarial_training: (),
    objectives.mart: (),
    objectives.standard_training: (),
    objectives.trades: (),
    optimizer.adamw: ("learning_rate",),
    schedules.cosine: ("num_steps",),
    schedules.exponential: ("num_steps",),
    schedules.multistep: ("num_steps",),
    schedules.piecewise_constant: (),
    schedules.warm_up: ("num_steps",),
    square: (),
}.items():
    _register(bound_functions.partial(_function, (*_given, "seeds")), _given)  # Of searches gin does not see the seeds.

# These make a value; nothing is left to be called later.
for _function in (step_rules.steepest, autoattack, load.load_logits_fn, threats.threat):
    _register(bound_functions.complete(_function))

# Recipes hold for all norms: in L2 and L1 the steps that they call Adam's are those of the norm.
gin.external_configurable(step_rules.by_norm, name="adam", module="robust_keras")

_register(bound_functions.partial(training_batches.training_data, ["data_dir"]), ["data_dir"], may_change=["cache_dir"])
_register(bound_functions.partial(load.load_weights, (), positional=True))
train = _register(
    bound_functions.complete(train_settings.train),
    may_change=(*training_recipes.Layout._fields, *training_recipes.Cadence._fields),
)
label_pool = _register(
    bound_functions.complete(label_pool_settings.label_pool),
    may_change=(*labelling_recipes.Sets._fields, *labelling_recipes.Layout._fields),
)
evaluate = _register(
    bound_functions.partial(evaluation.evaluate),
    ["individual", "num_examples", "model_identity", "save_directory"],
    may_change=["progress", "save_every"],
)


def parse(gin_files: Iterable[str | os.PathLike], gin_params: Sequence[str] = ()) -> None:
    """Replaces the configuration. Files and bindings run nothing: they bind and include, see `recipe_files`.

    Args:
        gin_files: paths, taken as they are, or relative to the folder of the recipes (with or without `gin/`). What
            they include is relative to that folder.
        gin_params: further bindings, such as "EPSILON = '4/255'"; later ones win.

    Raises:
        ValueError: for a missing file, a syntax error, an import, an unknown name, or a reference without parentheses.
    """
    bind(gin_files, gin_params)
    for binding, bound in gin_text.bindings(gin.config_str()).items():
        for name in bound.undefined:
            raise ValueError(f"Expected a value for the macro {name} of {binding}. Received: none")
        for name in bound.functions:
            raise ValueError(f"Expected a reference with parentheses, {name}(), for {binding}. Received: {name}")
    with _one_line():
        gin.finalize()


def bind(gin_files: Iterable[str | os.PathLike], gin_params: Sequence[str] = ()) -> None:
    """Replaces the configuration by files and bindings, of which some may be missing; see `parse`."""
    gin.clear_config()
    texts = recipe_files.read(gin_files, gin_params)
    _LEFT_OVER.clear()
    _LEFT_OVER.update(gin_text.left_over([text.getvalue() for text in texts]))
    with _one_line():
        for text in texts:
            gin.parse_config(text)


@contextlib.contextmanager
def _one_line():
    try:
        yield
    except (ValueError, SyntaxError, OSError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"Expected a valid configuration. Received: {' '.join(str(error).split())}") from error


def resolve(configurable: Callable, *, is_last: bool = True) -> Any:
    """Calls a configurable, such as `train`, and checks that every binding was used.

    Args:
        configurable: what to call.
        is_last: whether to check; False where bindings may be for another configurable that is resolved next.

    Returns:
        The function with all that is configured bound.

    Raises:
        ValueError: for a binding that changes nothing, such as one with a misspelt macro or scope, and for what the
            configured functions refuse.
    """
    try:
        bound = configurable()
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"Expected a complete configuration. Received: {' '.join(str(error).split())}") from error
    if is_last and isinstance(bound, functools.partial):
        bound_functions.check_complete(bound)
    if is_last and (unused := unused_bindings()):
        raise ValueError(f"Expected bindings that are used. Received: {', '.join(unused)}, which change nothing")
    return bound


def is_bound(name: str) -> bool:
    """Whether the configuration binds `name`, such as 'train.model'."""
    return name in gin_text.bindings(gin.config_str())


def strategy(function: str) -> tf.distribute.Strategy:
    """The `strategies.strategy` that `<function>.strategy` and `.tpu` bind: to be there before anything is resolved,
    which may load a network.
    """
    bound = gin_text.bindings(gin.config_str())
    name, tpu = (bound.get(f"{function}.{argument}") for argument in ("strategy", "tpu"))
    return strategies.strategy(name.value if name else "auto", tpu=tpu.value if tpu else None)


def unused_bindings() -> list[str]:
    """Names of the bindings that no configurable called so far has read, without what a replaced one referred to."""
    scopes: dict[tuple[str, str], list[str]] = {}
    for name in gin_text.bindings(gin.operative_config_str()):
        scope, selector, argument = gin_text.split(name)
        scopes.setdefault((selector, argument), []).append(f"{scope}/")

    def is_used(name):
        scope, selector, argument = gin_text.split(name)
        return any(used.startswith(f"{scope}/" if scope else "") for used in scopes.get((selector, argument), ()))

    bound = gin_text.bindings(gin.config_str())
    return sorted(name for name in bound if not is_used(name) and name not in _LEFT_OVER)


def operative_config() -> str:
    """All bindings and defaults that the configurables called so far have read, as gin text; comments say which of
    them are at their defaults.
    """
    text = gin.operative_config_str(max_line_length=120)
    names = [name for name, bound in gin_text.bindings(text).items() if bound.value == _default(name)]
    return "\n".join([text, _AT_DEFAULTS, *(f"#   {name}" for name in names), ""])


class _Setting(NamedTuple):
    value: Any
    macro: str | None
    is_default: bool


def recipe(config: str, name: str = "") -> dict[str, _Setting]:
    """What identifies a run: the bindings of an operative configuration, without those that may change.

    Args:
        config: gin text. Texts of older versions do not say what is at its default.
        name: of the file, for messages.
    """
    _, _, comments = config.partition(_AT_DEFAULTS)
    at_defaults = set(re.findall(r"^#   (\S+)$", comments, re.MULTILINE))
    found = {}
    for key, bound in gin_text.bindings(config, name).items():
        _, selector, argument = gin_text.split(key)
        if argument and argument not in MAY_CHANGE.get(selector, ()):
            found[key] = _Setting(bound.value, bound.macro, key in at_defaults)
    return found


def differences(saved: str, given: str) -> list[str]:
    """The bindings in which the recipes of two operative configurations differ, one line each, sorted.

    Values are compared, not how they are written. What one of them does not have counts as this version's default, or,
    where this version does not have it either, as the default that the other one says it is at.
    """
    return compare(recipe(saved), recipe(given))


def compare(saved: dict[str, _Setting], given: dict[str, _Setting]) -> list[str]:
    """The bindings in which two `recipe`s differ; see `differences`."""
    return ownership.differences(_filled(saved, given), _filled(given, saved))


def _filled(settings: dict[str, _Setting], others: dict[str, _Setting]) -> dict[str, Any]:
    """Values by name, with defaults for what only the others have; a macro that both use is named instead."""
    filled = {}
    for name, mine in settings.items():
        other = others.get(name)
        filled[mine.macro if mine.macro and other and mine.macro == other.macro else name] = mine.value
    for name in others.keys() - settings.keys():
        default = _default(name)
        if default is _NONE and others[name].is_default:
            default = others[name].value
        if default is not _NONE:
            filled[name] = default
    return filled


_NONE = object()


def _default(name: str) -> Any:
    """The default of what a binding's name says, as `gin_text.plain` has it; `_NONE` where there is none."""
    _, selector, argument = gin_text.split(name)
    try:
        parameter = inspect.signature(gin.get_configurable(selector)).parameters.get(argument)
    except (ValueError, KeyError):  # This version has none of that name, or several.
        return _NONE
    if parameter is None or parameter.default is parameter.empty or callable(parameter.default):
        return _NONE
    return gin_text.plain(parameter.default)
