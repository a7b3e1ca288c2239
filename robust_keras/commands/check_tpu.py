"""Says whether a recipe is ready for TPU cores, and what it takes there. Needs neither a TPU nor the paper's data.

    python scripts/check_tpu.py --gin_file=gin/at_80mti.gin
    python scripts/check_tpu.py --gin_file=gin/best_wrn70_16.gin --gin_file=gin/eval/aa_mt.gin --num_cores=8

The very functions that training and evaluation compile are lowered, for one core's share of a batch: the two halves of
the training step, between which cores add up what they found, the validation, each attack. Nothing is run. What a TPU
would not take, or not take well, goes to stderr, a line each, and the exit code is 1. An evaluation without a recipe of
training is checked on the network of gin/at.gin.
"""

from robust_keras.commands import launcher  # isort: skip  Before TensorFlow is imported.

import inspect
import math
import sys
from typing import Any, NamedTuple

from absl import flags

NOT_READY = 1
# The paper's slice of a TPU v3, of which each chip has two cores with 16 GiB each. A chip of a TPU v5e has one of them.
_CORES = 32
_MEMORY_GIB = 16.0
# Shape of the images and number of classes, by the name of the set. Others have to be loaded.
_SETS = {
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "digits": ((32, 32, 3), 10),
    "mnist": ((28, 28, 1), 10),
    "svhn_cropped": ((32, 32, 3), 10),
}


class _Evaluation(NamedTuple):
    """Records of the attacks of an evaluation, a baseline too, and images in a batch over all cores."""

    attacks: tuple
    batch_size: int


def run(
    *,
    gin_files: list[str],
    gin_params: tuple | list = (),
    data_dir: str | None = None,
    num_cores: int | None = None,
    memory_gib: float = _MEMORY_GIB,
) -> list[str]:
    """Lowers what recipes run on a core, and prints what it takes.

    Args:
        gin_files: recipes of training, of evaluation or both, read in order.
        gin_params: further bindings.
        data_dir: where data sets are, which are needed for shapes that are not known.
        num_cores: over which batches are spread; by default the paper's 32, or as many as share a smaller batch.
        memory_gib: of a core.

    Returns:
        A list of lines, what there is to mend; none where the recipe is ready.

    Raises:
        ValueError: for bad input, such as a batch that does not spread over the cores in whole groups.
    """
    configured, evaluation = _resolve(gin_files, gin_params)

    from robust_keras.evaluation import report
    from robust_keras.tpu_check import parts, readiness
    from robust_keras.training import program as programs

    recipe, layout = configured.recipe, configured.layout.on_one_device()
    data = _data(recipe.data.keywords, data_dir)
    batch = recipe.batches(data, seed=0, num_steps=1).element_spec
    batch_size = batch["image"].shape[0]
    num_cores = _cores(num_cores, _sizes(batch_size, recipe, layout, evaluation))
    with parts.Cores(num_cores).scope():
        program = programs.build(recipe, layout, data)
        print(f"{sum(math.prod(w.shape) for w in program.network.trainable_weights):,} parameters")
        print(f"batches of {batch_size} images, {batch_size // num_cores} on each of {num_cores} cores")
        if flops := _flops(recipe, data, batch_size):
            print(f"{flops:.4g} FLOP a step on all cores, by the architecture")
        of_training = parts.of_training(program, recipe, layout, batch)
        rows, problems, kept_gib = readiness.check(of_training, memory_gib=memory_gib)
    if evaluation is not None:
        of_evaluation = parts.of_evaluation(
            program.network,
            evaluation.attacks,
            data.labelled.images.shape[1:],
            data.labelled.num_classes,
            batch_size=evaluation.batch_size // num_cores,
        )
        more = readiness.check(of_evaluation, memory_gib=memory_gib)
        rows, problems = rows + more.rows, problems + more.problems
    print(report.markdown([readiness.HEADER, *rows]))
    print("of it weights, momentum and averages: {:.3f} GiB, {:.3f} in tiles".format(*kept_gib))
    print(f"{'not ready' if problems else 'ready'}: cores of {memory_gib:g} GiB")
    return problems


def _resolve(gin_files: list[str], gin_params: tuple | list) -> tuple[Any, _Evaluation | None]:
    """The configured training, of gin/at.gin where the recipes are of an evaluation alone, and evaluation, if any.

    Every configurable that recipes may bind is resolved: what none of them reads is refused.
    """
    from robust_keras.commands import configuration

    for files in (gin_files, ["at.gin", *gin_files]):
        configuration.parse(files, gin_params)
        if configuration.is_bound("label_pool.pool"):  # A recipe that labels, of which the training is checked.
            configuration.resolve(configuration.label_pool, is_last=False)
        evaluate = configuration.resolve(configuration.evaluate, is_last=False)
        evaluation = _evaluation(evaluate) if "attacks" in evaluate.keywords else None
        if configuration.is_bound("train.model") or evaluation is None:
            break
    return configuration.resolve(configuration.train), evaluation


def _evaluation(evaluate: Any) -> _Evaluation:
    from robust_keras.commands import bound_functions
    from robust_keras.evaluation import plan

    bound_functions.check_complete(evaluate)
    parameters = inspect.signature(evaluate.func).parameters
    settings = {name: parameter.default for name, parameter in parameters.items()} | evaluate.keywords
    attacks = plan.make(settings["attacks"], settings["baseline"], settings["threat"]).attacks
    return _Evaluation(attacks, settings["batch_size"])


def _data(names: dict, data_dir: str | None) -> Any:
    """A `training_batches.TrainingData` of black images like those of the sets."""
    from robust_keras.data import sources, training_batches
    from robust_keras.tpu_check import parts

    name, has_extra = names["dataset"], names.get("extra_data") is not None
    if name.partition(":")[0] in _SETS and names.get("image_size") is None:
        return parts.black_images(name, *_SETS[name.partition(":")[0]], has_extra=has_extra)
    source = sources.load(name, "train", data_dir=data_dir, **training_batches.reading(names))
    return parts.black_images(name, source.images.shape[1:], source.num_classes, has_extra=has_extra)


def _sizes(batch_size: int, recipe: Any, layout: Any, evaluation: _Evaluation | None) -> dict[str, tuple[int, int]]:
    """Images in each kind of batch, and in a group of it that must stay whole."""
    sizes = {
        "batch": (batch_size, recipe.batches.keywords.get("group_size") or 1),
        "validation batch": (layout.validation_batch_size, 1),
    }
    return sizes if evaluation is None else {**sizes, "evaluation's batch": (evaluation.batch_size, 1)}


def _cores(num_cores: int | None, sizes: dict[str, tuple[int, int]]) -> int:
    """The number of cores: what is asked for, or as many as all batches spread over. `sizes` are (images, group)."""
    if num_cores is None:
        return math.gcd(_CORES, *(size // group for size, group in sizes.values()))
    for what, (size, group) in sizes.items():
        if num_cores < 1 or size % (num_cores * group):
            whole = f"in whole groups of {group} images " if group > 1 else ""
            raise ValueError(f"Expected a {what} that spreads {whole}over {num_cores} cores. Received: one of {size}")
    return num_cores


def _flops(recipe: Any, data: Any, batch_size: int) -> float | None:
    """Operations of a training step by the architecture; None for one that `costs` does not know."""
    from robust_keras.models import wide_resnet
    from robust_keras.study import costs

    attack, objective = recipe.attack, recipe.objective.func.__name__
    attack_steps = attack.attack_fn.keywords.get("num_steps") if attack else 0
    is_known = recipe.model.func is wide_resnet.wide_resnet and objective in costs.OUTER_PASSES
    if not is_known or attack_steps is None:
        return None
    size, _, channels = data.labelled.images.shape[1:]
    forward = costs.forward_flops(
        recipe.model.keywords["depth"],
        recipe.model.keywords["width"],
        num_classes=data.labelled.num_classes,
        size=size + 2 * recipe.model.keywords.get("padding", 0),
        channels=channels,
    )
    return costs.training_flops(
        forward,
        batch_size=batch_size,
        num_steps=1,
        attack_steps=attack_steps,
        objective=objective,
        clean_prediction=attack is not None and attack.target == "clean_prediction",
    )


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    launcher.define_recipe(values)
    flags.DEFINE_integer(
        "num_cores", None, "Cores of the slice; 32 by default, or as many as share a smaller batch.", flag_values=values
    )
    flags.DEFINE_float("memory_gib", _MEMORY_GIB, "Memory of a core.", lower_bound=0.0, flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Runs the command with the values of its flags."""
    found = run(
        gin_files=values.gin_file,
        gin_params=values.gin_param,
        data_dir=values.data_dir,
        num_cores=values.num_cores,
        memory_gib=values.memory_gib,
    )
    for line in found:
        print(line, file=sys.stderr, flush=True)
    if found:
        sys.exit(NOT_READY)


def command() -> None:
    """Runs the command as it was typed."""
    launcher.launch(main, define_flags, __doc__)
