"""Commands run from a notebook: what is said, shown and raised, and how they are stopped."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tensorflow as tf

from robust_keras.commands import notebook
from robust_keras.training import metrics_log

HEADER = ",".join(metrics_log.METRICS) + "\n"
# Adds a row after row until a signal, of which it says which it was.
TRAINS = """
import signal, sys, time
def stop(number, frame):
    print(f"error: Stopped by {signal.Signals(number).name}; saved", file=sys.stderr)
    sys.exit(75)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
with open(sys.argv[-1].removeprefix("--workdir=") + "/metrics.csv", "w", buffering=1) as file:
    file.write(HEADER)
    print("begins")
    for step in range(1, 600):
        file.write(f"{step},{1 / step},0.1,,1.0,,,,\\n")
        time.sleep(0.05)
"""


@pytest.fixture
def command(monkeypatch):
    """`command(program)`: Python text that runs in place of the command."""
    popen = subprocess.Popen

    def stand_in(program):
        def start(given, **options):
            assert given[:5] == [sys.executable, "-u", "-m", "robust_keras.commands.notebook", "train"]
            return popen([sys.executable, "-u", "-c", program, *given[5:]], **options)

        monkeypatch.setattr(notebook.subprocess, "Popen", start)

    return stand_in


@pytest.mark.parametrize("folder", ["{tmp_path}", "ram://runs"])
def test_a_curve_has_the_whole_rows_of_the_metrics(tmp_path, folder):
    workdir = folder.format(tmp_path=tmp_path)
    assert [axis.lines[:] for axis in notebook.learning_curve(workdir).axes] == [[], []]
    rows = "10,2.5,0.1,,1.0,,,,\n20,1.5,0.1,300.5,1.0,0.5,0.25,,\nbroken,,,\n30,nan,0.1,,1.0,,,0.75,0.5\n"
    tf.io.gfile.makedirs(workdir)
    with tf.io.gfile.GFile(f"{workdir}/metrics.csv", "w") as file:
        file.write(HEADER + rows + "40,1.2")  # It is being written.
    loss, accuracy = notebook.learning_curve(workdir).axes
    np.testing.assert_array_equal(loss.lines[0].get_data(), [[10, 20, 30], [2.5, 1.5, np.nan]])
    found = {line.get_label(): np.transpose(line.get_data()).tolist() for line in accuracy.lines}
    assert found == {
        "clean": [[20, 50]],
        "under attack": [[20, 25]],
        "clean, averaged weights": [[30, 75]],
        "under attack, averaged weights": [[30, 50]],
    }


def test_what_a_command_says_is_printed_and_its_code_returned(command, capsys, tmp_path):
    command("import sys; print(*sys.argv[1:]); print('I0000 00:00:1.5 x\\n5 %\\r50 %\\r    \\nété', file=sys.stderr)")
    assert notebook.run("train", ["--gin_file=a.gin", f"--workdir={tmp_path}"]) == 0
    assert capsys.readouterr().out == f"--gin_file=a.gin --workdir={tmp_path}\n50 %\nété\n"


@pytest.mark.parametrize(
    "program, expected",
    [
        ("import sys; print('error: Expected a. Received: b', file=sys.stderr); print('bye'); sys.exit(2)", "exit code 2, error: Expected a. Received: b"),
        ("import sys; print('9 % [1 step/s]error: Expected c'); sys.exit(1)", "exit code 1, error: Expected c"),
        ("print(1); print(2, end='\\r'); print(3); print('a' * 3, end=''); import os; os._exit(139)", "exit code 139, 1 | 3 | aaa"),
        ("import sys; sys.exit(75)", "exit code 75, "),
    ],
)  # fmt: skip
def test_a_failure_is_one_line_with_the_last_that_was_said(command, program, expected):
    command(program)
    with pytest.raises(RuntimeError) as error:
        notebook.run("train")
    assert str(error.value) == f"Expected train to end well. Received: {expected}"


def test_a_run_is_stopped_at_a_step(command, capsys, tmp_path):
    command(f"HEADER = {HEADER!r}\n{TRAINS}")
    assert notebook.run("train", [f"--workdir={tmp_path}"], stop_at_step=5) == 75
    said = capsys.readouterr().out
    assert "Stopping after step" in said and said.count("Stopped by SIGINT; saved") == 1
    steps = len((tmp_path / "metrics.csv").read_text().splitlines()) - 1
    assert 5 <= steps < 500
    # One that is there already does not stop: it would never get any further.
    command("print('finished')")
    assert notebook.run("train", [f"--workdir={tmp_path}"], stop_at_step=5) == 0


def test_the_stop_button_lets_the_command_save_first(command, capsys, tmp_path):
    command(f"HEADER = {HEADER!r}\n{TRAINS}")

    def press():
        while not (tmp_path / "metrics.csv").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # In a background job it is ignored.
    try:
        threading.Thread(target=press, daemon=True).start()
        with pytest.raises(KeyboardInterrupt, match="Stopped by SIGINT; saved"):
            notebook.run("train", ["--workdir", str(tmp_path)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().out.endswith("error: Stopped by SIGINT; saved\n")


def test_a_command_stops_once_its_notebook_is_gone(tmp_path):
    program = f"""
import sys, types
def command():
    HEADER = {HEADER!r}
    exec(compile({TRAINS!r}, "trains", "exec"), {{"HEADER": HEADER}})
sys.modules["robust_keras.commands.train"] = types.SimpleNamespace(command=command)
from robust_keras.commands import notebook
sys.argv = ["", "train", "--workdir={tmp_path}"]
notebook.main()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([sys.executable, "-u", "-c", program], **pipes)
    assert process.stdout.readline() == "begins\n"
    process.stdin.close()
    assert process.wait(timeout=20) == 75
    assert process.stdout.read() == "error: Stopped by SIGTERM; saved\n"
    process.stdout.close()


@pytest.mark.parametrize(
    "given, expected",
    [
        (("fit", []), r"Expected a command out of train, .*Received: 'fit'"),
        (("train", "--workdir=runs/at"), r"Expected a list of flags.*Received: '--workdir=runs/at'"),
    ],
)
def test_bad_input(given, expected):
    with pytest.raises(ValueError, match=expected):
        notebook.run(*given)


def test_a_line_that_names_a_file_is_shown_as_it_is(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(notebook, "_is_notebook", lambda: True)
    (tmp_path / "table8.png").write_bytes(b"\x89PNG")
    curve = notebook._LiveCurve(None)
    for status in ("100%", f"{tmp_path}/table8.png"):
        curve.draw(status, at_once=True)
        assert status in capsys.readouterr().out
