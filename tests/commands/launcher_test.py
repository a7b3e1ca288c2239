"""What every command does with errors and signals."""

import signal
import sys

import pytest
import tensorflow as tf
from absl import flags

from robust_keras.commands import (
    check_tpu,
    evaluate,
    evaluate_checkpoints,
    export_program,
    launcher,
    pseudo_label,
    reproduce,
    train,
)


def test_a_lost_process_is_one_line(monkeypatch, capsys):
    def lost(values):
        raise tf.errors.UnavailableError(None, None, "Connection reset\nby peer")

    monkeypatch.setattr(sys, "argv", ["train"])
    monkeypatch.setenv("TF_CONFIG", "{}")
    with pytest.raises(SystemExit) as exit:
        launcher.launch(lost, lambda values: None, "")
    assert exit.value.code == 1
    assert capsys.readouterr().err.startswith("error: Expected all processes to answer. Received: Connection reset;")
    monkeypatch.delenv("TF_CONFIG")
    with pytest.raises(tf.errors.UnavailableError):
        launcher.launch(lost, lambda values: None, "")


def test_a_folder_that_is_a_file_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(SystemExit) as exit:
        launcher.launch(lambda values: tf.io.gfile.makedirs(str(tmp_path / "file")), lambda values: None, "")
    assert exit.value.code == 1
    assert f"Received: {tmp_path}/file is not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_every_command_stops_on_a_signal(monkeypatch, capsys, number):
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]

    def main(values):
        signal.raise_signal(number)
        raise AssertionError

    monkeypatch.setattr(sys, "argv", ["any"])
    with pytest.raises(SystemExit) as exit:
        launcher.launch(main, lambda values: None, "")
    assert exit.value.code == 75
    line = f"error: Stopped by {number.name}; what was finished is kept\n"
    assert capsys.readouterr().err == line
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_a_command_that_is_stopped_while_it_starts(monkeypatch, capsys):
    class Interrupting:
        def find_spec(self, name, *args):
            if name == "robust_keras.training.run_state":
                signal.raise_signal(signal.SIGINT)

    monkeypatch.delattr("robust_keras.training.run_state")
    monkeypatch.delitem(sys.modules, "robust_keras.training.run_state")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    monkeypatch.setattr(sys, "argv", ["any"])
    with pytest.raises(SystemExit) as exit:
        launcher.launch(lambda values: None, lambda values: None, "")
    assert exit.value.code == 75
    assert capsys.readouterr().err == "error: Stopped by SIGINT; what was finished is kept\n"


@pytest.mark.parametrize("name", ["gin_file", "gin_param", "data_dir"])
def test_recipes_and_their_data_are_given_by_the_same_flags(name):
    said = set()
    for command in (
        train,
        check_tpu,
        evaluate,
        evaluate_checkpoints,
        export_program,
        pseudo_label,
        *([] if name == "gin_file" else [reproduce]),
    ):
        values = flags.FlagValues()
        command.define_flags(values)
        said.add((repr(values[name].default), values[name].help.partition(";")[2]))
    assert len(said) == 1


@pytest.mark.parametrize("given", ["0", "0,1,2", "nan,1", "0,inf", "0,1_0", "a,b"])
def test_an_input_range_is_two_numbers(given):
    values = flags.FlagValues()
    launcher.define_reading(values)
    values(["any", f"--input_range={given}"])
    with pytest.raises(ValueError, match=r"^Expected .*--input_range.* Received: "):
        launcher.reading(values)
    values(["any", "--input_range=-1,0.5"])
    assert launcher.reading(values)["input_range"] == [-1.0, 0.5]
