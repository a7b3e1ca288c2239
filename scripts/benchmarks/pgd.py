"""Times PGD on images, as it is called from Python: steps along the signs from a random point of an Linf ball.

    python scripts/benchmark.py pgd --network=FILE.keras --dataset=cifar10 --data_dir=DIR
    python scripts/benchmark.py pgd --network=FILE.keras --dataset=cifar10 --data_dir=DIR \\
        --against='torch_env/bin/python scripts/peers/pgd_peers.py --library=torchattacks'

Tracing is part of it. `found` has how many images are left.
"""

from absl import flags

from benchmarks import timing, victims


def define_flags(values: flags.FlagValues) -> None:
    """Defines the subject's flags."""
    victims.define_flags(values, num_images=1024)
    flags.DEFINE_integer("attack_steps", 40, "Of PGD.", flag_values=values, lower_bound=1)
    flags.DEFINE_string("step_size", "2/255", "Of each.", flag_values=values)


def measure(values: flags.FlagValues, bench: timing.Bench) -> None:
    """Times the attack."""
    import robust_keras as rk
    from robust_keras import losses

    of = victims.victim(values, bench, all_right=False)

    def run():
        return rk.attacks.pgd(
            of.network,
            *of.data,
            norm=values.norm,
            epsilon=values.epsilon,
            batch_size=values.batch_size,
            num_steps=values.attack_steps,
            step_size=values.step_size,
            loss_fn=losses.cross_entropy,
        )

    def describe(x_adv):
        predictions = of.network.predict(x_adv, verbose=0).argmax(-1)
        return {"num_robust": int((predictions == of.labels).sum())}

    bench.time(
        f"PGD-{values.attack_steps}",
        run,
        describe=describe,
        work=timing.passes(of.counted, len(of.labels), 2 * values.attack_steps),
        settings={**of.settings, "attack_steps": values.attack_steps, "step_size": values.step_size},
        given=victims.handed_over(of, bench),
    )
