"""`scripts/benchmark.py`: what it writes, how it talks to another program, and how it counts; no time is looked at."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from robust_keras.models import wide_resnet
from robust_keras.study import costs

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from benchmarks import command, counting, scaling, timing, traces  # noqa: E402

FAKE_PEER = """
import json, sys
print("starting")
for k, line in enumerate(sys.stdin):
    asked = json.loads(line)
    print(json.dumps({"seconds": 10.0 + k, "asked": asked["case"], "batch": asked["settings"].get("batch_size")}))
    sys.stdout.flush()
"""


def benchmark(folder, *arguments):
    """The exit code, what was printed, errors, and the file that was written, if any."""
    path = folder / "found.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *arguments, f"--json={path}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr, json.loads(path.read_text()) if path.exists() else None


def test_a_step_is_timed_traced_and_compared(tmp_path):
    (tmp_path / "peer.py").write_text(FAKE_PEER)
    small = ["--depth=10", "--width=1", "--batch_size=4", "--attack_steps=1", "--num_runs=2", "--num_warmups=1"]
    code, printed, errors, found = benchmark(
        tmp_path, "step", *small, "--profile", f"--against={sys.executable} {tmp_path / 'peer.py'}"
    )
    assert code == 0, errors
    assert {"subject", "flags", "machine", "reached", "rows", "profile"} <= found.keys()
    assert {"processor", "instructions", "threads", "versions"} <= found["machine"].keys()
    assert found["reached"].keys() == {"convolutions_float32", "copy"} and min(found["reached"].values()) > 0
    (row,) = found["rows"]
    assert row["settings"]["batch_size"] == row["images"] == 4 and len(row["runs"]) == 2
    assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
    assert row["flops"] == 4 * (2 + 3) * costs.forward_flops(10, 1)
    for name in ("images_per_second", "flops_per_second", "share_of_convolutions", "share_of_copy", "peak_bytes"):
        assert row[name] > 0
    assert all(np.isfinite(each["loss"]) for each in row["found"])
    # The answer of the warm-up does not count.
    assert [answer["seconds"] for answer in row["against"]["answers"]] == [11.0, 12.0]
    assert {answer["batch"] for answer in row["against"]["answers"]} == {4}
    assert row["against"]["ratios"] == [theirs / ours for theirs, ours in zip([11.0, 12.0], row["runs"])]
    assert sum(found["profile"]["shares"].values()) == pytest.approx(1.0, abs=0.2)
    assert found["profile"]["shares"]["convolutions"] > 0.05
    assert "ratio" in printed and "normalisation and activation" in printed


def test_a_program_that_does_not_answer_is_told_of(tmp_path):
    small = ["--depth=10", "--width=1", "--batch_size=4", "--part=forward", "--num_runs=1", "--num_warmups=1"]
    code, _, errors, _ = benchmark(tmp_path, "step", *small, f"--against={sys.executable} -c pass")
    assert code == 2 and 'Expected an answer with "seconds"' in errors.splitlines()[-1]


def test_an_unknown_subject_is_refused(tmp_path):
    code, _, errors, _ = benchmark(tmp_path, "nothing")
    assert code == 2 and errors.startswith("error: Expected a subject out of ") and "step" in errors


def test_layers_are_counted_as_the_study_counts_them():
    network = wide_resnet.wide_resnet(depth=16, width=2, num_classes=10)
    counted = counting.count(network)
    assert counted.flops == costs.forward_flops(16, 2)
    assert counted.numbers > 2 * 5 * 32 * 32 * 32
    work = timing.passes(counted, 8, 3, "bfloat16")
    assert (work.num_images, work.flops, work.num_bytes) == (8, 24 * counted.flops, 48 * counted.numbers)


def test_moments_are_shared_by_what_runs_in_them():
    a, b = ("x/conv", "Conv2D"), ("x/batchnorm_0/Mul", "Mul")
    found = list(traces.overlaps([[(0.0, 2.0, a)], [(1.0, 4.0, b)]]))
    assert [(length, sorted(running)) for length, running in found] == [(1.0, [a]), (1.0, [b, a]), (2.0, [b])]
    assert [traces.category(*each) for each in (a, b)] == ["convolutions", "normalisation and activation"]


def test_every_subject_says_what_it_is():
    from absl import flags

    for subject in command.subjects():
        values = flags.FlagValues()
        command.define_flags(values, subject)
        assert {"json", "num_runs", "against"} <= set(values)
        assert f"scripts/benchmark.py {subject}" in sys.modules[f"benchmarks.{subject}"].__doc__


def test_a_driver_answers_each_request(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "peers"))
    import answering

    prepared = []

    def prepare(request):
        prepared.append(request["case"])
        return lambda: 3, lambda found: {"num_robust": found, "size": request["settings"]["size"]}

    requests = [{"case": case, "settings": {"size": 2}, "given": None} for case in ("a", "a", "b")]
    monkeypatch.setattr("sys.stdin", [json.dumps(request) + "\n" for request in requests])
    answering.answer(prepare)
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert prepared == ["a", "b"] and [answer["num_robust"] for answer in answers] == [3, 3, 3]
    assert all(answer["seconds"] >= 0 and answer["size"] == 2 for answer in answers)


def test_a_line_is_fitted():
    rows = [{"seconds": 1.0 + 0.5 * x, "peak_bytes_over_before": 100} for x in (1, 2, 4)]
    fit = scaling.fitted([1, 2, 4], rows)
    assert (fit["a"], fit["b"], fit["r2"]) == pytest.approx((1.0, 0.5, 1.0))
    assert fit["peak_ratio"] == 1.0 and fit["points"] == [1, 2, 4]
