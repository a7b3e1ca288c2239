"""Answers requests on standard input, as `scripts/benchmarks/peers.py` says. Needs nothing but Python."""

import json
import sys
import time


def answer(prepare):
    """Answers until there are no more requests.

    Args:
        prepare: `(request) -> (run, describe)`, called once for each case: `run()` does it once and is timed, and
            `describe(what it returned)` is a dictionary of what there is to tell.
    """
    case, run, describe = None, None, None
    for line in sys.stdin:
        request = json.loads(line)
        if request["case"] != case:
            case, (run, describe) = request["case"], prepare(request)
        started = time.perf_counter()
        found = run()
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, **describe(found)}), flush=True)
