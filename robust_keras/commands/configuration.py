"""Everything that gin may bind, registered in one place.

A reference with parentheses resolves once, when the configured function is called: `@training/pgd()` is `pgd`
with the arguments bound in scope `training`, a plain `functools.partial` that knows nothing of gin.
"""

import contextlib
import copy
import functools
import inspect
import os
import pathlib
import posixpath

import tensorflow as tf

import gin
from robust_keras import losses, schedules, threats
from robust_keras.attacks import apgd, autoattack, fab, multi_targeted, pgd, square, step_rules, transfer
from robust_keras.commands import label_pool_settings, train_settings
from robust_keras.data import augmentation, training_batches
from robust_keras.engines import strategies
from robust_keras.evaluation import evaluate as evaluation
from robust_keras.models import wide_resnet
from robust_keras.pseudo_labelling import records as labelling_records
from robust_keras.saved_models import load
from robust_keras.training import objectives, records

# Bindings that do not identify a run: they may change when it is resumed.
_NOT_THE_RECIPE = {
    "evaluate.progress",
    "evaluate.save_every",
    "training_data.cache_dir",
    *(f"label_pool.{name}" for name in (*labelling_records.Sets._fields, *labelling_records.Layout._fields)),
} | {f"train.{name}" for name in (*records.Layout._fields, *records.Cadence._fields)}


def gin_directory():
    """The folder of the recipes: in the installed package, or beside it in a checkout."""
    package = pathlib.Path(__file__).parents[1]
    return next(path for path in (package / "gin", package.parent / "gin") if path.is_dir())


def _partial(function):
    """A function with the signature of `function` that returns it with the given arguments bound."""

    @functools.wraps(function)
    def bind(**kwargs):
        return functools.partial(function, **kwargs)

    bind.__signature__ = inspect.signature(function)
    return bind


def _register(function, given=()):
    """Registers `function`; the arguments `given` are the caller's and cannot be bound."""
    return gin.external_configurable(function, module="robust_keras", denylist=list(given))


for _function, _given in {
    apgd.apgd: (),
    apgd.apgd_targeted: (),
    multi_targeted.multi_targeted: (),
    pgd.pgd: ("seeds",),
    transfer.transfer: ("seeds",),
    augmentation.crop_and_flip: (),
    evaluation.correct_under_attack: ("seeds",),
    fab.fab: (),
    losses.cross_entropy: (),
    losses.dlr: (),
    losses.kl_divergence: (),
    load.load_weights: (),
    losses.margin: (),
    training_batches.batches: ("seed", "num_steps", "start_step", "num_hosts", "host"),
    training_batches.cutmix: (),
    training_batches.training_data: ("data_dir",),
    wide_resnet.wide_resnet: ("num_classes", "mean", "std", "input_shape"),
    objectives.adversarial_training: (),
    objectives.mart: (),
    objectives.standard_training: (),
    objectives.trades: (),
    schedules.cosine: ("num_steps",),
    schedules.exponential: ("num_steps",),
    schedules.multistep: ("num_steps",),
    schedules.piecewise_constant: (),
    schedules.warm_up: ("num_steps",),
    square.square: (),
}.items():
    _register(_partial(_function), _given)

# These make a value; nothing is left to be called later.
for _function in (step_rules.adam, step_rules.steepest, autoattack.autoattack, load.load_logits_fn, threats.threat):
    _register(_function)

train = _register(train_settings.train)
label_pool = _register(label_pool_settings.label_pool)
evaluate = _register(_partial(evaluation.evaluate), ("individual", "num_examples", "model_identity", "save_directory"))


def parse(gin_files, gin_params=()):
    """Replaces the configuration.

    Args:
        gin_files: paths, taken as they are, or relative to the folder of the recipes (with or without `gin/`).
        gin_params: further bindings, such as "EPSILON = '4/255'"; later ones win.

    Raises:
        ValueError: for a missing file, a syntax error, an unknown name, or a reference without parentheses.
    """
    gin.clear_config()
    try:
        files = [_find(path) for path in gin_files]
        with _in_directory(gin_directory()):  # What includes are relative to.
            gin.parse_config_files_and_bindings(files, list(gin_params))
    except (ValueError, SyntaxError, OSError, TypeError, AttributeError) as error:
        raise ValueError(f"Expected a valid configuration. Received: {' '.join(str(error).split())}") from error
    for binding, reference in _references():
        if not reference.evaluate:
            name = reference.scoped_selector.removeprefix("robust_keras.")
            raise ValueError(f"Expected a reference with parentheses, @{name}(), for {binding}. Received: @{name}")


def resolve(configurable, *, is_last=True):
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
    if is_last and (unused := unused_bindings()):
        raise ValueError(f"Expected bindings that are used. Received: {', '.join(unused)}, which change nothing")
    return bound


def is_bound(name):
    """Whether the configuration binds `name`, such as 'train.model'."""
    try:
        gin.query_parameter(name)
    except ValueError:
        return False
    return True


def strategy(function):
    """The `strategies.strategy` that `<function>.strategy` and `.tpu` bind: to be there before anything is resolved,
    which may load a network.
    """

    def bound(name, default):
        try:
            return copy.deepcopy(gin.query_parameter(f"{function}.{name}"))  # A copy of a macro is its value.
        except ValueError:
            return default

    return strategies.strategy(bound("strategy", "auto"), tpu=bound("tpu", None))


def unused_bindings():
    """Names of the bindings that no configurable called so far has read."""
    used = gin.config._OPERATIVE_CONFIG
    unused = []
    for (scope, selector), arguments in gin.config._CONFIG.items():
        for name in arguments:
            if not any(
                selector == used_selector
                and name in values
                and f"{used_scope}/".startswith(f"{scope}/" if scope else "")
                for (used_scope, used_selector), values in used.items()
            ):
                short = selector.removeprefix("robust_keras.")
                unused.append(scope if selector == "gin.macro" else f"{scope + '/' if scope else ''}{short}.{name}")
    return sorted(unused)


def operative_config():
    """All bindings and defaults that the configurables called so far have read, as gin text."""
    return gin.operative_config_str(max_line_length=120)


def recipe(config):
    """What identifies a run: the bindings of an operative configuration (gin text), values as text, by name."""
    bindings = {}
    for statement in gin.config_parser.ConfigParser(config, _AsText()):
        if isinstance(statement, gin.config_parser.BindingStatement):
            scope = f"{statement.scope}/" if statement.scope else ""
            argument = f".{statement.arg_name}" if statement.arg_name else ""
            bindings[f"{scope}{statement.selector}{argument}"] = repr(statement.value)
    return {name: value for name, value in bindings.items() if name not in _NOT_THE_RECIPE}


def differences(config, other_config):
    """The bindings in which the recipes of two operative configurations differ, one line each, sorted."""
    one, other = recipe(config), recipe(other_config)
    return [
        f"{name} = {one.get(name, '(not bound)')}, not {other.get(name, '(not bound)')}"
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    ]


def claim(workdir, config, *, holds_results, write=True):
    """Writes `config` to `workdir`/config.gin, or refuses a folder with the results of another run.

    Args:
        workdir: any `tf.io.gfile` path.
        config: an operative configuration, gin text.
        holds_results: whether the folder has anything that must not be mixed with another run.
        write: whether to write it; of several processes one does.

    Raises:
        ValueError: naming the bindings that differ.
    """
    path = posixpath.join(workdir, "config.gin")
    if holds_results:
        saved = ""
        if tf.io.gfile.exists(path):
            with tf.io.gfile.GFile(path) as file:
                saved = file.read()
        # An empty file is what an interrupted write left behind.
        if different := differences(config, saved) if saved else []:
            raise ValueError(f"Expected a workdir of this run. Received: {workdir} of another, {'; '.join(different)}")
    if not write:
        return
    tf.io.gfile.makedirs(workdir)
    with tf.io.gfile.GFile(path, "w") as file:
        file.write(config)


@contextlib.contextmanager
def _in_directory(path):
    previous = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(previous)


class _AsText(gin.config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name, evaluate):
        return f"@{scoped_configurable_name}{'()' if evaluate else ''}"

    def macro(self, macro_name):
        return f"%{macro_name}"


def _references():
    for (scope, selector), arguments in gin.config._CONFIG.items():
        for name, value in arguments.items():
            for leaf in gin.config._iterate_flattened_values(value):
                if isinstance(leaf, gin.config.ConfigurableReference) and leaf.configurable.name != "macro":
                    yield f"{selector.removeprefix('robust_keras.')}.{name}" if selector != "gin.macro" else scope, leaf


def _find(path):
    path = os.fspath(path)
    relative = path.replace("\\", "/").removeprefix("gin/")
    candidates = (path, str(gin_directory() / relative))
    for candidate in candidates:
        if os.path.isfile(candidate):
            return os.path.abspath(candidate)
    raise ValueError(f"no gin file {path}")
