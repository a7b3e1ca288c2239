"""Times a step of each attack against its floor: the passes through the network that it cannot do without.

    python scripts/benchmark_attacks.py --saved_model=runs/at/saved_model --input_shape=32,32,3

Steps and floor run in turn, and medians are printed, with the median of the pairs' ratios. Images are random, and no
example leaves its batch: what packing saves is in results.json of an evaluation (`steps`, `steps_without_packing`).
"""

from robust_keras.commands import launcher  # isort: skip  Before TensorFlow is imported.

import statistics
import time

from absl import flags


def run(*, saved_model, input_shape, norm="Linf", epsilon="8/255", batch_size=64, num_steps=5, num_pairs=5):
    """Prints a table, and returns it: `{name: (milliseconds a step, milliseconds of its floor, ratio)}` per example."""
    import tensorflow as tf

    from robust_keras import losses, noise, threats
    from robust_keras.attacks import stepwise
    from robust_keras.attacks.apgd import apgd, apgd_targeted
    from robust_keras.attacks.fab import fab
    from robust_keras.attacks.multi_targeted import multi_targeted
    from robust_keras.attacks.square import square
    from robust_keras.saved_models import load

    logits_fn = load.load_logits_fn(saved_model)
    threat = threats.threat(norm=norm, epsilon=epsilon)
    seeds = noise.example_seeds(0, 0, tf.range(batch_size))
    x = noise.uniform(seeds, input_shape)
    clean_logits = logits_fn(x)
    labels = tf.argmax(clean_logits, axis=-1, output_type=tf.int32)

    def forward(x):
        return logits_fn(x)

    def backward(x):
        return stepwise.value_and_gradient(logits_fn, x, lambda logits: losses.cross_entropy(logits, labels))[2]

    # Each search, and how often a step needs a forward pass and one with its gradient.
    measured = {
        "apgd-ce": (apgd.search(threat=threat), 0, 1),
        "apgd-t": (apgd_targeted.search(threat=threat), 0, 1),
        "fab-t": (fab.search(threat=threat, targeted=True, num_restarts=1), 1, 1),
        "square": (square.search(threat=threat), 1, 0),
        "multi-targeted": (multi_targeted.search(threat=threat), 0, 1),
    }
    table = {}
    for name, (search, num_forward, num_backward) in measured.items():

        def floor(x, num_forward=num_forward, num_backward=num_backward):
            def body(i, x):
                # The next passes wait for these.
                for passes, function in ((num_forward, forward), (num_backward, backward)):
                    for _ in range(passes):
                        x += 1e-30 * tf.reduce_mean(function(x))
                return i + 1, x

            return tf.while_loop(lambda i, _: i < num_steps, body, (0, x))[1]

        def steps(x, search=search):
            progress = stepwise.begin(search, x, labels, clean_logits, seeds, tf.zeros_like(labels))
            return stepwise.advance(search, logits_fn, x, labels, progress, num_steps).found

        compiled = [tf.function(function) for function in (steps, floor)]
        pairs = [[_seconds(function, x) for function in compiled] for _ in range(num_pairs + 1)][1:]
        scale = 1e3 / batch_size / num_steps
        times = [scale * statistics.median(column) for column in zip(*pairs)]
        table[name] = (*times, statistics.median(a / b for a, b in pairs))
        if len(table) == 1:
            print(f"{'attack':16}{'ms a step':>12}{'floor':>10}{'ratio':>8}")
        print(f"{name:16}{table[name][0]:12.3f}{table[name][1]:10.3f}{table[name][2]:8.2f}", flush=True)
    return table


def _seconds(function, x):
    started = time.perf_counter()
    function(x).numpy()
    return time.perf_counter() - started


def define_flags(values):
    flags.DEFINE_string("saved_model", None, "A SavedModel's folder or a .keras file.", flag_values=values)
    flags.DEFINE_list("input_shape", ["32", "32", "3"], "Of one image: height,width,channels.", flag_values=values)
    flags.DEFINE_string("norm", "Linf", "Linf, L2 or L1.", flag_values=values)
    flags.DEFINE_string("epsilon", "8/255", "The radius, a number or a fraction.", flag_values=values)
    flags.DEFINE_integer("batch_size", 64, "Images in a batch.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("num_pairs", 5, "How often steps and floor are timed.", flag_values=values, lower_bound=1)
    flags.mark_flags_as_required(["saved_model"], flag_values=values)


def main(values):
    run(
        saved_model=values.saved_model,
        input_shape=tuple(int(size) for size in values.input_shape),
        norm=values.norm,
        epsilon=values.epsilon,
        batch_size=values.batch_size,
        num_pairs=values.num_pairs,
    )


def command():
    launcher.launch(main, define_flags, __doc__)


if __name__ == "__main__":
    command()
