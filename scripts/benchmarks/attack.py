"""Times each attack on images that a network gets right, whole, or by the step next to the passes it cannot do without.

    python scripts/benchmark.py attack --network=FILE.keras --dataset=cifar10 --data_dir=DIR --num_images=64
    python scripts/benchmark.py attack --steps --num_images=64
    python scripts/benchmark.py attack --attacks=square --network=FILE.keras --dataset=cifar10 --data_dir=DIR \\
        --against='torch_env/bin/python scripts/peers/upstream_autoattack.py --checkout=DIR'

Whole: an evaluation by one run of this attack alone (one for each class it aims at), as `standard` has them, from the
images to the verified verdict, tracing included. `found` has how many images it broke, and the seconds of the attack
without what is around it. --share makes attacks shorter, of the other program too: steps of APGD-CE, classes that
targeted attacks aim at, queries of Square. With --steps: steps on a batch from which no image leaves, and the passes
forward and back that they need; `over_passes` is the ratio of times.
"""

import functools
import statistics

import tensorflow as tf
from absl import flags

from benchmarks import timing, victims

# How often a step needs a forward pass, and one with the gradient by the images.
_PASSES = {"apgd-ce": (0, 1), "apgd-dlr": (0, 1), "apgd-t": (0, 1), "fab": (1, 10), "fab-t": (1, 1), "square": (1, 0)}
_PASSES |= {"multi-targeted": (0, 1)}
_STANDARD = ["apgd-ce", "apgd-t", "fab-t", "square"]


def define_flags(values: flags.FlagValues) -> None:
    """Defines the subject's flags."""
    victims.define_flags(values, num_images=64)
    flags.DEFINE_list("attacks", _STANDARD, f"Out of {', '.join(_PASSES)}.", flag_values=values)
    flags.DEFINE_float("share", 1.0, "Of each attack.", flag_values=values, lower_bound=0.01, upper_bound=1.0)
    flags.DEFINE_bool("steps", False, "Whether to time steps.", flag_values=values)
    flags.DEFINE_integer("num_steps", 5, "In a run, with --steps.", flag_values=values, lower_bound=1)


def measure(values: flags.FlagValues, bench: timing.Bench) -> None:
    """Times the attacks."""
    of = victims.victim(values, bench, all_right=True)
    if values.steps:
        print(f"{values.num_steps} steps of {values.num_images} images, then the passes that they need")
        for name in values.attacks:
            measure_steps(name, of, values.num_steps, bench)
        return
    given = victims.handed_over(of, bench)
    for name in values.attacks:
        counts = counts_of(name, values.share)
        bench.time(
            name,
            functools.partial(whole, [_bound(name, counts, of)], of),
            work=timing.Work(len(of.labels)),
            settings={**of.settings, "attack": name, "counts": counts},
            given=given,
        )


def whole(attacks, of: victims.Victim, **options):
    """Evaluates by an attack, or a list by name: what is left, and the seconds of each attack."""
    import robust_keras as rk

    result = rk.evaluate(
        of.target,
        of.data,
        norm=of.settings["norm"],
        epsilon=of.settings["epsilon"],
        attacks=attacks,
        batch_size=min(of.settings["batch_size"], len(of.labels)),
        baseline=False,
        diagnose=False,
        allow_chance=True,
        progress=False,
        **options,
    )
    return {
        "num_robust": round(result.robust_accuracy * len(of.labels)),
        "attack_seconds": {each["name"]: each["seconds"] for each in result.results["attacks"]},
        "broken": {each["name"]: each["examples_broken"] for each in result.results["attacks"]},
    }


def counts_of(name: str, share: float) -> dict[str, int]:
    """The counts of an attack that is a share as long, by the names of our settings: one run, as in `standard`."""
    kinds = {"square": ("num_queries", 5000), "apgd-t": ("num_targets", 9), "fab-t": ("num_targets", 9)}
    kinds["multi-targeted"] = ("num_steps", 200)
    count, whole = kinds.get(name, ("num_steps", 100))
    return {"num_restarts": 1, count: max(1, round(share * whole))}


def _bound(name, counts, of):
    from robust_keras import threats
    from robust_keras.attacks import presets

    threat = threats.threat(norm=of.settings["norm"], epsilon=of.settings["epsilon"])
    return functools.partial(presets.choose(name, threat=threat).attacks[0], **counts)


def measure_steps(name: str, of: victims.Victim, num_steps: int, bench: timing.Bench) -> None:
    """Times steps of an attack and the passes that they need, in turn."""
    steps, passes, num_passes = _compiled(name, of, num_steps)
    work = timing.passes(of.counted, len(of.labels), num_steps * num_passes)
    both = [
        bench.time(f"{name}, {what}", run, work=work, settings={**of.settings, "attack": name}, is_compared=False)
        for what, run in (("steps", steps), ("passes", passes))
    ]
    both[0]["over_passes"] = statistics.median(a / b for a, b in zip(both[0]["runs"], both[1]["runs"]))
    print(f"{'':34}{both[0]['over_passes']:.2f} times their passes", flush=True)


def _compiled(name, of, num_steps):
    """Functions that take steps and make their passes, and how many forward passes a step costs."""
    from robust_keras import losses, noise, threats
    from robust_keras.attacks import presets, stepwise
    from robust_keras.attacks.attack import as_attack
    from robust_keras.models import any_network
    from robust_keras.saved_models import load

    threat = threats.threat(norm=of.settings["norm"], epsilon=of.settings["epsilon"])
    search = as_attack(presets.choose(name, threat=threat).attacks[0]).search
    logits_fn = any_network.sized(load.as_logits_fn(of.target), 10)
    x, labels = tf.constant(of.images, tf.float32) / 255.0, tf.constant(of.labels)
    clean_logits, seeds = logits_fn(x), noise.example_seeds(0, 0, tf.range(len(of.labels)))
    num_forward, num_backward = _PASSES[name]

    def backward(x):
        return stepwise.value_and_gradient(logits_fn, x, lambda logits: losses.cross_entropy(logits, labels))[2]

    @tf.function(autograph=False)
    def passes(x):
        def body(i, x):
            # The next passes wait for these.
            for count, function in ((num_forward, logits_fn), (num_backward, backward)):
                for _ in range(count):
                    x += 1e-30 * tf.reduce_mean(function(x))
            return i + 1, x

        return tf.while_loop(lambda i, _: i < num_steps, body, (0, x))[1]

    @tf.function(autograph=False)
    def steps(x):
        progress = stepwise.begin(search, x, labels, clean_logits, seeds, tf.zeros_like(labels))
        return stepwise.advance(search, logits_fn, x, labels, progress, num_steps).found

    return lambda: steps(x).numpy(), lambda: passes(x).numpy(), num_forward + 2 * num_backward
