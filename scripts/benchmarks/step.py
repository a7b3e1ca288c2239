"""Times a training step: the attack on the batch, the objective, the update.

    python scripts/benchmark.py step --depth=16 --width=2 --batch_size=64 --attack_steps=10
    python scripts/benchmark.py step --against='torch_env/bin/python scripts/peers/pytorch_step.py --channels_last'

Images are random. --profile traces one more step and shows where its time goes, as `traces` says. --part times a single
pass through the network instead, with statistics of the batch: what a step needs no less of, time and memory.
"""

import tensorflow as tf
from absl import flags

from benchmarks import counting, networks, timing, traces

# Passes by name, and how many forward ones each costs.
_PASSES = {"forward": 1, "images": 2, "weights": 3}


def define_flags(values: flags.FlagValues) -> None:
    """Defines the subject's flags."""
    networks.define_flags(values)
    flags.DEFINE_integer("batch_size", 64, "Images of a step.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("attack_steps", 10, "Of PGD.", flag_values=values, lower_bound=0)
    flags.DEFINE_string("objective", "adversarial_training", "By name.", flag_values=values)
    flags.DEFINE_integer("groups", 1, "Of batch normalisation.", flag_values=values, lower_bound=1)
    flags.DEFINE_enum("attack_batch_norm", "batch", ["batch", "moving"], "Statistics.", flag_values=values)
    flags.DEFINE_integer("replicas", 1, "Logical CPU devices that share a batch.", flag_values=values, lower_bound=1)
    flags.DEFINE_bool("profile", False, "Whether to trace a step.", flag_values=values)
    flags.DEFINE_enum("part", "step", ["step", *_PASSES], "What is timed.", flag_values=values)


def measure(values: flags.FlagValues, bench: timing.Bench) -> None:
    """Times the step."""
    names = ("depth", "width", "activation", "dtype", "batch_size", "attack_steps", "objective", "groups")
    settings = {name: values[name].value for name in (*names, "attack_batch_norm", "replicas")}
    network, run = made(**settings)
    counted = counting.count(network)
    dtype = "bfloat16" if values.dtype == "mixed_bfloat16" else "float32"
    passes = num_passes(values.objective, values.attack_steps)
    if values.part != "step":
        run, passes = single_pass(network, values.batch_size, values.part), _PASSES[values.part]
    work = timing.passes(counted, values.batch_size, passes, dtype)
    name = f"{values.part}, WRN-{values.depth}-{values.width} {values.activation}"
    bench.time(name, run, work=work, settings=settings, describe=lambda value: {"loss": value})
    if values.profile:
        bench.notes["profile"] = traces.show(run)


def num_passes(objective: str, attack_steps: int) -> int:
    """Forward passes that a step costs, as `study.costs` counts them: a backward one as much for each gradient."""
    from robust_keras.study import costs

    name = {"standard": "standard_training"}.get(objective, objective)
    return round(
        costs.training_flops(
            1,
            batch_size=1,
            num_steps=1,
            attack_steps=attack_steps,
            objective=name,
            clean_prediction=objective == "trades" and attack_steps > 0,
        )
    )


def made(
    *, depth, width, activation, dtype, batch_size, attack_steps, objective, groups, attack_batch_norm, replicas=1
):
    """The network, and a function that takes a step and returns its loss."""
    from robust_keras.engines import replicas as engine
    from robust_keras.engines import strategies

    if replicas > 1:
        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
    strategy = strategies.strategy("mirrored" if replicas > 1 else "one")
    group_size = None if groups == 1 else engine.part_size(batch_size, groups, "groups")
    with strategy.scope():
        network = networks.wide_resnet(depth, width, activation, dtype=dtype, group_size=group_size)
        model = networks.model(network, objective=objective, attack_steps=attack_steps, batch_norm=attack_batch_norm)
        batch = engine.to_replicas(networks.batch(batch_size))
    step = compiled(model, strategy)

    def run():
        with strategy.scope():
            return float(step(batch))

    return network, run


def compiled(model, strategy=None):
    """A function of a batch that takes a step and returns its loss, as `fit` compiles one."""
    strategy = strategy or tf.distribute.get_strategy()

    @tf.function(autograph=False)
    def step(batch):
        return strategy.experimental_local_results(strategy.run(model.train_step, args=(batch,))["loss"])[0]

    return step


def single_pass(network, batch_size, part):
    """A function that takes a batch through the network, forward, or back too: to the images, or to the weights."""
    from robust_keras import losses
    from robust_keras.models.normalization import BATCH, batch_norm_mode

    batch = networks.batch(batch_size)
    images, weights = tf.cast(batch["image"], tf.float32) / 255.0, [each.value for each in network.trainable_weights]

    @tf.function(autograph=False)
    def run(x):
        with tf.GradientTape() as tape, batch_norm_mode(BATCH):
            tape.watch(x)
            loss = tf.reduce_sum(losses.cross_entropy(network(x), batch["label"]))
        if part == "forward":
            return loss
        gradients = tape.gradient(loss, [x] if part == "images" else weights)
        return tf.add_n([tf.reduce_sum(each) for each in gradients])  # All of them are waited for.

    return lambda: float(run(images))
