"""Times AutoAttack's standard version end to end, from the first test images to the verified verdict.

    python scripts/benchmark.py standard --network=FILE.keras --dataset=cifar10 --data_dir=DIR --num_images=256
    python scripts/benchmark.py standard --network=FILE.keras --dataset=cifar10 --data_dir=DIR --num_images=256 \\
        --against='torch_env/bin/python scripts/peers/upstream_autoattack.py --checkout=DIR'

With --search_dtype=bfloat16 attacks search in it, and verdicts are float32's as ever. Tracing is part of it. `found`
has how many images are left, and the seconds of each attack.
"""

from absl import flags

from benchmarks import attack, timing, victims


def define_flags(values: flags.FlagValues) -> None:
    """Defines the subject's flags."""
    victims.define_flags(values, num_images=256)
    flags.DEFINE_enum("search_dtype", "float32", ["float32", "bfloat16"], "Of searches.", flag_values=values)


def measure(values: flags.FlagValues, bench: timing.Bench) -> None:
    """Times the evaluation."""
    of = victims.victim(values, bench, all_right=False)
    bench.time(
        "standard",
        lambda: attack.whole("standard", of, search_dtype=values.search_dtype),
        work=timing.Work(len(of.labels)),
        settings=of.settings,
        given=victims.handed_over(of, bench),
    )
