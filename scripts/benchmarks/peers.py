"""Another program that is timed alternately with this one.

It is started once and stays alive, so that what it compiles is paid for once. For each measurement it gets one line on
its standard input, a JSON object, and answers with one line on its standard output, a JSON object too:

    {"case": "apgd-ce", "settings": {"batch_size": 64}, "given": "/tmp/x/given.npz"}
    {"seconds": 1.25}

`case` names what is timed, `settings` says how it is set, and `given` is a file of arrays, or null: what the subject
hands over, so that both sides work on the same weights and images. `seconds` is what the program took for it by its own
clock; further values are kept in the results. Answers to the first lines of a case, as many as there are warm-ups, do
not count. Lines that are no JSON object are not answers. At the end of its input the program ends.
"""

import contextlib
import json
import shlex
import subprocess
from typing import Any


class Peer:
    """Such a program.

    Args:
        command: how it is started.
    """

    def __init__(self, command: str) -> None:
        self.command = command
        self._process = subprocess.Popen(
            shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        """Its answer to a request.

        Raises:
            ValueError: where it ends instead, or its answer has no seconds.
        """
        process = self._process
        answer: Any = None
        try:
            process.stdin.write(json.dumps(request) + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            for line in process.stdout:  # type: ignore[union-attr]
                if line.startswith("{"):
                    answer = json.loads(line)
                    break
        except BrokenPipeError:
            pass
        if not isinstance(answer, dict) or not isinstance(answer.get("seconds"), (int, float)):
            raise ValueError(f'Expected an answer with "seconds" from {self.command}. Received: {answer}')
        return answer

    def close(self) -> None:
        """Ends it."""
        with contextlib.suppress(BrokenPipeError):  # It may have ended already.
            self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()
