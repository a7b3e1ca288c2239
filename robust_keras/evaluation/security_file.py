"""security.json, the security curve and the sanity checks beside an evaluation's results.json."""

import math
import posixpath
from collections.abc import Callable
from typing import Any

from robust_keras import foreign_files, storage, threats

FORMAT = 1
NAME = "security.json"


def subject_of(described: dict[str, Any], threat: threats.Threat, seed: int) -> dict[str, Any]:
    """What a security curve is of.

    Args:
        described: `model` and `dataset` as results.json has them, with their digests as far as they are known.
        threat: of the evaluation.
        seed: of the evaluation.
    """
    digests = {name: described[of]["sha256"] for name, of in (("model", "model"), ("images", "dataset"))}
    return {**digests, "norm": threat.norm, "epsilon": threat.epsilon, "seed": seed}


def read(workdir: str, subject: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """What a folder's security.json holds, looked at as a stranger's file; None where there is none.

    Args:
        workdir: of the evaluation.
        subject: what it is to be of, as far as that is known; None for whatever it is.

    Raises:
        ValueError: naming the file, for one that holds something else, or is of another subject.
    """
    path = posixpath.join(workdir, NAME)
    found = storage.read_object(path)
    if found is None:
        return None
    if not _is_whole(found):
        raise ValueError(f"Expected a security curve in {path}. Received: something else")
    for name, value in (subject or {}).items():
        if (was := found["subject"].get(name)) != value:
            raise ValueError(
                f"Expected the security curve of this evaluation in {path}, {name} = {value}. Received: "
                f"{foreign_files.printable(was)}"
            )
    return found


def read_or_measure(
    workdir: str, subject: dict[str, Any], measure: Callable[[], dict[str, Any]], *, writes: bool
) -> dict[str, Any]:
    """The security curve of a folder, measured and written where there is none.

    Args:
        workdir: of the evaluation.
        subject: what it is of, as JSON can hold it.
        measure: see `security.measure`.
        writes: whether this process writes.

    Raises:
        ValueError: see `read`.
    """
    path = posixpath.join(workdir, NAME)
    if (found := read(workdir, subject)) is not None:
        print(f"Already there: {path}; it is read from this file, nothing of it was measured or checked now")
        return found
    found = {**measure(), "subject": subject}
    if writes:
        storage.write_json(path, found)
    return found


def summary(found: dict[str, Any]) -> str:
    """A curve and its checks as lines of text."""
    points = [f"{100 * point['robust_accuracy']:.1f} % at {point['epsilon_fraction']}" for point in found["curve"]]
    lines = [
        f"robust accuracy of the first {found['num_examples']} examples by {found['norm']} radius: {', '.join(points)}"
    ]
    verdicts = {True: "passed", False: "FAILED", None: "unknown"}
    lines += [f"{verdicts[check['passed']]}: {check['name']}: {check['told']}" for check in found["checks"]]
    return "\n".join(foreign_files.printable(line, most=4000) for line in [*lines, found["told"]])


def _is_whole(found):
    kinds = {"norm": str, "num_examples": int, "attack": str, "told": str, "subject": dict}
    return (
        found.get("format") == FORMAT
        and all(type(found.get(name)) is kind for name, kind in kinds.items())
        and all(isinstance(found.get(name), list) for name in ("curve", "random_noise", "checks"))
        and all(map(_is_point, [*found["curve"], *found["random_noise"]]))
        and all(map(_is_check, found["checks"]))
    )


def _is_point(point):
    if not isinstance(point, dict) or type(point.get("epsilon_fraction")) is not str:
        return False
    radius, accuracy = (point.get(name) for name in ("epsilon", "robust_accuracy"))
    if type(radius) not in (int, float) or type(accuracy) not in (int, float):
        return False
    return math.isfinite(radius) and radius >= 0 and 0 <= accuracy <= 1


def _is_check(check):
    if not isinstance(check, dict) or check.get("passed", "") not in (True, False, None):
        return False
    return type(check.get("name")) is str and type(check.get("told")) is str
