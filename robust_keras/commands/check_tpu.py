"""Says whether a recipe is ready for TPU cores, and what it takes there. Needs neither a TPU nor the paper's data.

    python scripts/check_tpu.py --gin_file=gin/at_80mti.gin
    python scripts/check_tpu.py --gin_file=gin/best_wrn70_16.gin --gin_file=gin/eval/aa_mt.gin --num_cores=8

The training step and each attack are lowered for one core's share of a batch, and nothing is run. What a TPU would not
take, or not take well, goes to stderr, a line each, and the exit code is 1. An evaluation without a recipe of training
is checked on the network of gin/at.gin.
"""

from robust_keras.commands import launcher  # isort: skip  Before TensorFlow is imported.

import functools
import inspect
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

from absl import flags

NOT_READY = 1
# The paper's slice of a TPU v3, of which each chip has two cores with 16 GiB each.
_CORES = 32
_MEMORY_GIB = 16.0
# Shape of the images and number of classes, by the name of the set. Others have to be loaded.
_SETS = {"cifar10": ((32, 32, 3), 10), "cifar100": ((32, 32, 3), 100), "digits": ((32, 32, 3), 10)}


class Part(NamedTuple):
    """What a core runs at once.

    Attributes:
        name: for people.
        function: of tensors.
        arguments: of their shapes; their values don't matter.
    """

    name: str
    function: Callable
    arguments: tuple


def run(*, gin_files, gin_params=(), data_dir=None, num_cores=None, memory_gib=_MEMORY_GIB):
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
    train, evaluate = _resolve(gin_files, gin_params)
    settings = _settings_of_training(train)
    evaluation = _settings(evaluate) if "attacks" in evaluate.keywords else {}
    data = _data(settings["data"].keywords, data_dir)
    spec = settings["batches"](data, seed=0, num_steps=1).element_spec
    batch_size = spec["image"].shape[0]
    groups = settings["batches"].keywords.get("group_size") or 1
    sizes = {"batch": (batch_size, groups), "validation batch": (settings["validation_batch_size"], 1)}
    if evaluation:
        sizes["evaluation's batch"] = evaluation["batch_size"], 1
    num_cores = _cores(num_cores, sizes)
    batch = _zeros(spec, batch_size // num_cores)
    step, network = _training_step(settings, data, batch)
    in_training = [step, *_attacks_of_training(settings, network, batch, num_cores)]
    print(f"{sum(math.prod(w.shape) for w in network.trainable_weights):,} parameters")
    print(f"batches of {batch_size} images, {batch_size // num_cores} on each of {num_cores} cores")
    if flops := _flops(settings, data, batch_size):
        print(f"{flops:.4g} FLOP a step on all cores, by the architecture")
    in_evaluation = _attacks_of_evaluation(evaluation, network, data, num_cores) if evaluation else []
    rows, found, resident = [("on a core", "operations", "FLOP", "GiB", "GiB in tiles")], [], (0, 0)
    for part in in_training + in_evaluation:
        # A training run's weights, momentum and averages, arguments of its step, stay.
        row, problems, arguments = _measure(part, resident if part in in_training else (0, 0), memory_gib)
        resident = arguments if part is step else resident
        rows.append(row)
        found += problems
    from robust_keras.evaluation import report

    print(report.markdown(rows))
    print(f"{'not ready' if found else 'ready'}: cores of {memory_gib:g} GiB")
    return found


def _measure(part, resident, memory_gib):
    """A row of the table, findings, and bytes of the arguments, packed and in tiles; `resident` ones stay anyway."""
    from robust_keras.tpu_check import liveness, lowering, stablehlo

    program = lowering.lower(part.function, *part.arguments)
    found = [f"{part.name}: {problem}" for problem in lowering.problems(program)]
    if found:
        return (part.name, "", "", "", ""), found, (0, 0)
    flops, is_all = lowering.flops(program.module)
    num_operations = sum(1 for _ in stablehlo.walk(program.module))
    memories = [liveness.peak_memory(program.module, padded=padded) for padded in (False, True)]
    gib = [(m.peak + max(0, there - m.arguments)) / 2**30 for m, there in zip(memories, resident)]
    if gib[-1] > memory_gib:
        at = memories[-1].at.source or memories[-1].at.name
        found.append(f"{part.name}: too large, {gib[-1]:.2f} of {memory_gib:g} GiB on a core, at {at}")
    row = (
        part.name,
        f"{num_operations:,}",
        f"{flops:.4g}{'' if is_all else ' a turn'}",
        *(f"{each:.3f}" for each in gib),
    )
    return row, found, tuple(m.arguments for m in memories)


def _resolve(gin_files, gin_params):
    """The configured `train` and `evaluate`."""
    from robust_keras.commands import configuration

    for files in (gin_files, ["at.gin", *gin_files]):
        configuration.parse(files, gin_params)
        if configuration.is_bound("label_pool.pool"):  # Of a recipe that labels; only its training.
            configuration.resolve(configuration.label_pool, is_last=False)
        evaluate = configuration.resolve(configuration.evaluate, is_last=False)
        if configuration.is_bound("train.model") or "attacks" not in evaluate.keywords:
            break
    return configuration.resolve(configuration.train), evaluate


def _settings(configured):
    """Arguments of a configured function, with its defaults."""
    parameters = inspect.signature(configured.func).parameters
    defaults = {k: p.default for k, p in parameters.items() if p.default is not inspect.Parameter.empty}
    return {**defaults, **configured.keywords}


def _settings_of_training(run):
    """The settings of a configured run, by name."""
    recipe, layout = run.recipe, run.layout
    attack, averaging = recipe.attack, recipe.averaging
    return {
        **recipe._asdict(),
        **recipe.optimizer._asdict(),
        "attack": attack and attack.attack_fn,
        "attack_target": attack.target if attack else "label",
        "attack_batch_norm": attack.batch_norm if attack else "batch",
        "validation": recipe.validation.correct_fn,
        "tau": averaging and averaging.tau,
        "averaging_warm_up": averaging and averaging.warm_up,
        "accumulation_steps": layout.accumulation_steps,
        "validation_batch_size": layout.validation_batch_size,
    }


def _data(names, data_dir):
    """A `training_batches.TrainingData` of black images like those of the sets."""
    import numpy as np

    from robust_keras.data import sources, training_batches

    name = names["dataset"]
    if name.partition(":")[0] in _SETS:
        shape, num_classes = _SETS[name.partition(":")[0]]
    else:
        source = sources.load(name, "train", data_dir=data_dir)
        shape, num_classes = source.images.shape[1:], source.num_classes
    images, labels = np.zeros((num_classes, *shape), np.uint8), np.arange(num_classes, dtype=np.int32)
    source = sources.Source(name, images, labels, num_classes)
    extra = None if names.get("extra_data") is None else source
    return training_batches.TrainingData(source, source, extra, *sources.channel_statistics(source))


def _cores(num_cores, sizes):
    """The number of cores: what is asked for, or as many as all batches spread over. `sizes` are (images, group)."""
    if num_cores is None:
        return math.gcd(_CORES, *(size // group for size, group in sizes.values()))
    for what, (size, group) in sizes.items():
        if num_cores < 1 or size % (num_cores * group):
            whole = f"in whole groups of {group} images " if group > 1 else ""
            raise ValueError(f"Expected a {what} that spreads {whole}over {num_cores} cores. Received: one of {size}")
    return num_cores


def _zeros(spec, size):
    """A batch of `size` examples."""
    import tensorflow as tf

    return {name: tf.zeros((size, *each.shape[1:]), each.dtype) for name, each in spec.items()}


def _training_step(settings, data, batch):
    """The `Part` of the training step, with optimiser and averaging, and the network."""
    import keras

    from robust_keras.training import adversarial_model, weight_averaging
    from robust_keras.training import optimizer as optimizers

    def network():
        return settings["model"](
            num_classes=data.labelled.num_classes,
            mean=data.mean,
            std=data.std,
            input_shape=data.labelled.images.shape[1:],
        )

    keras.config.set_dtype_policy(settings.get("dtype_policy", "float32"))
    try:
        trained = network()
    finally:
        keras.config.set_dtype_policy("float32")
    names = inspect.signature(adversarial_model.AdversarialModel).parameters
    model = adversarial_model.AdversarialModel(trained, **{name: settings[name] for name in names if name in settings})
    learning_rate = functools.partial(settings["learning_rate"], num_steps=settings["train_steps"])
    optimizer = optimizers.NesterovSGD(
        learning_rate, momentum=settings["momentum"], weight_decay=settings["weight_decay"]
    )
    optimizer.build(trained.trainable_variables)
    model.compile(optimizer=optimizer, jit_compile=False)  # All of the step is, and not parts of it.
    if settings["tau"] is not None:
        averages = weight_averaging.WeightAveraging(
            network(), tau=settings["tau"], warm_up=settings["averaging_warm_up"], start_from_model=False
        )
        averages.set_model(model)
    return Part("training step", model.train_step, (batch,)), trained


def _attacks_of_training(settings, network, batch, num_cores):
    """The `Part`s of the training attack, where there is one, and of the validation with its own."""
    import tensorflow as tf

    from robust_keras.models import normalization

    def training_attack(x, target, seeds):
        with normalization.batch_norm_mode(settings["attack_batch_norm"]):
            return settings["attack"](lambda images: network(images, training=True), x, target, seeds=seeds)

    def validation(x, labels, seeds):
        return settings["validation"](lambda images: network(images, training=False), x, labels, seeds=seeds)

    def zeros(name, size, dtype=None):
        return tf.zeros((size, *batch[name].shape[1:]), dtype or batch[name].dtype)

    size = len(batch["image"]) // settings.get("accumulation_steps", 1)
    # A clean prediction is one as the targets are.
    target = "label" if settings["attack_target"] == "label" else "targets"
    attacked = zeros("image", size, tf.float32), zeros(target, size), zeros("seeds", size)
    size = settings["validation_batch_size"] // num_cores
    validated = zeros("image", size, tf.float32), zeros("label", size), zeros("seeds", size)
    attack = [] if settings["attack"] is None else [Part("training attack", training_attack, attacked)]
    return [*attack, Part("validation", validation, validated)]


def _attacks_of_evaluation(settings, network, data, num_cores):
    """The `Part`s of the attacks of an evaluation, as `batching` compiles them."""
    import tensorflow as tf

    from robust_keras.attacks import stepwise

    batch_size, num_classes = settings["batch_size"] // num_cores, data.labelled.num_classes
    x = tf.zeros((batch_size, *data.labelled.images.shape[1:]))
    labels, seeds = tf.zeros(batch_size, tf.int32), tf.zeros((batch_size, 2), tf.int32)

    def logits_fn(images):
        return tf.cast(network(images, training=False), tf.float32)

    parts = []
    for attack in [settings["baseline"], *settings["attacks"]]:
        if attack is None:
            continue
        if not hasattr(attack.func, "search"):
            function = functools.partial(_attack, attack, logits_fn)
            parts.append(Part(f"attack {attack.func.__name__}", function, (x, labels, seeds)))
            continue
        search = attack.func.search(*attack.args, **attack.keywords)
        begin = functools.partial(stepwise.begin, search)
        given = (x, labels, tf.zeros((batch_size, num_classes)), seeds, labels)
        progress = tf.function(begin, autograph=False).get_concrete_function(*given).structured_outputs
        progress = tf.nest.map_structure(lambda each: tf.zeros(each.shape, each.dtype), progress)
        advance = functools.partial(stepwise.advance, search, logits_fn)
        parts.append(Part(f"attack {search.name}, start", begin, given))
        parts.append(Part(f"attack {search.name}, steps", advance, (x, labels, progress, tf.constant(1))))
    return parts


def _attack(attack, logits_fn, x, labels, seeds):
    return attack(logits_fn, x, labels, seeds=seeds)


def _flops(settings, data, batch_size):
    """Operations of a training step by the architecture; None for one that `costs` does not know."""
    from robust_keras.models import wide_resnet
    from robust_keras.study import costs

    model, attack, objective = settings["model"], settings["attack"], settings["objective"].func
    attack_steps = attack.keywords.get("num_steps") if attack else 0
    if (
        model.func is not wide_resnet.wide_resnet
        or attack_steps is None
        or objective.__name__ not in costs.OUTER_PASSES
    ):
        return None
    size, _, channels = data.labelled.images.shape[1:]
    forward = costs.forward_flops(
        model.keywords["depth"],
        model.keywords["width"],
        num_classes=data.labelled.num_classes,
        size=size,
        channels=channels,
    )
    return costs.training_flops(
        forward,
        batch_size=batch_size,
        num_steps=1,
        attack_steps=attack_steps,
        objective=objective.__name__,
        clean_prediction=settings["attack_target"] == "clean_prediction",
    )


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    flags.DEFINE_multi_string(
        "gin_file", None, "Recipe, such as gin/at.gin; several are read in order.", flag_values=values
    )
    flags.DEFINE_multi_string(
        "gin_param", [], "Binding, such as \"NORM = 'L2'\"; any number of times.", flag_values=values
    )
    flags.DEFINE_string("data_dir", None, "Where data sets are, for the shapes of those not known.", flag_values=values)
    flags.DEFINE_integer(
        "num_cores", None, "Cores of the slice; 32 by default, or as many as share a smaller batch.", flag_values=values
    )
    flags.DEFINE_float("memory_gib", _MEMORY_GIB, "Memory of a core.", lower_bound=0.0, flag_values=values)
    flags.mark_flag_as_required("gin_file", flag_values=values)


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
