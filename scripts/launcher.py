"""Starts a command: what TensorFlow reads when it is imported, and errors as one line and an exit code.

Import this before anything that imports TensorFlow.
"""

import os
import sys

# Convolutions on AVX2 machines are 1.4 to 2 times faster with it; it is off by default there.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

USAGE = 2  # bad input; nothing was trained or attacked
NON_FINITE_LOSS = 3
TERMINATED = 75  # saved and stopped on a termination signal; the same command goes on


def launch(main):
    """Parses flags, runs `main()` and exits: with 0, or with a line on stderr and one of the codes above."""
    from absl import flags

    try:
        rest = flags.FLAGS(sys.argv)[1:]
        if rest:
            raise flags.Error(f"Expected flags only. Received: {' '.join(rest)}")
    except flags.Error as error:
        _exit(USAGE, error)

    from robust_keras import recording

    try:
        main()
    except ValueError as error:
        if os.environ.get("ROBUST_KERAS_TRACEBACK"):
            raise
        _exit(USAGE, error)
    except recording.NonFiniteLoss as error:
        _exit(NON_FINITE_LOSS, error)
    except recording.Terminated as error:
        _exit(TERMINATED, error)


def _exit(code, error):
    # gin adds to a message where in the configuration the call came from.
    lines = [line for line in str(error).splitlines() if not line.lstrip().startswith("In call to configurable")]
    print(f"error: {' '.join(' '.join(lines).split())}", file=sys.stderr, flush=True)
    sys.exit(code)
