"""Times a part of the project, alone or next to another program.

    python scripts/benchmark.py SUBJECT [--json=FILE] [--num_runs=5] [--against=COMMAND] ...

`python scripts/benchmark.py SUBJECT --help` says what a subject is. Each prints a table: medians of `--num_runs`, and
from the fastest to the slowest; images a second; operations a second by the network's own count of convolutions and
dense layers, and what share that is of the operations a second in one large convolution; likewise the bytes that these
have to read and write, and a copy of memory; memory at the peak, over what the process held before the first run. What
the machine reaches is measured in the same call.

With --against, another program runs alternately, as `peers` says, and `ratio` is its time over ours, pair by pair: the
median, from the lowest to the highest.
"""

from robust_keras.commands import launcher  # isort: skip  Before TensorFlow is imported.

import importlib
import pathlib
import sys

from absl import flags

# Modules of the folder that subjects share.
_SHARED = {"__init__", "command", "counting", "machine", "networks", "peers", "timing", "traces", "victims"}


def subjects() -> list[str]:
    """Names of all subjects."""
    names = {path.stem for path in pathlib.Path(__file__).parent.glob("*.py")}
    return sorted(names - _SHARED)


def define_flags(values: flags.FlagValues, subject: str) -> None:
    """Defines the flags that all subjects have, and the subject's own."""
    flags.DEFINE_string("json", None, "File for what was measured.", flag_values=values)
    flags.DEFINE_integer("num_runs", 5, "How often each is timed.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("num_warmups", 2, "How often before that.", flag_values=values, lower_bound=0)
    flags.DEFINE_string("against", None, "Another program, see scripts/peers.", flag_values=values)
    importlib.import_module(f"benchmarks.{subject}").define_flags(values)


def main(subject: str, values: flags.FlagValues) -> None:
    """Measures a subject, prints the table and writes the file."""
    from benchmarks import timing

    own = {name: values[name].value for name in values if not values[name].using_default_value}
    with timing.Bench(values.num_runs, values.num_warmups, values.against) as bench:
        importlib.import_module(f"benchmarks.{subject}").measure(values, bench)
        if values.json:
            bench.write(values.json, subject, own)


def command() -> None:
    """Runs the command as it was typed."""
    known = ", ".join(subjects())
    subject = sys.argv.pop(1) if sys.argv[1:] and not sys.argv[1].startswith("-") else None
    if subject not in subjects():
        if subject is None and "--help" in sys.argv:
            print(f"{__doc__.strip()}\n\nSubjects: {known}.")
            return
        print(f"error: Expected a subject out of {known}. Received: {subject}", file=sys.stderr)
        sys.exit(2)
    launcher.launch(
        lambda values: main(subject, values),
        lambda values: define_flags(values, subject),
        importlib.import_module(f"benchmarks.{subject}").__doc__ or "",
    )
