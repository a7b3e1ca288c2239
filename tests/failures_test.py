import pytest

from robust_keras import failures


def fail(*, after):
    if after:
        failures.work_begins()
    raise ValueError("it broke")


def test_an_error_after_work_has_begun_leaves_its_traceback(tmp_path):
    with pytest.raises(ValueError) as error, failures.running(tmp_path / "run"):
        fail(after=True)
    assert failures.traceback_path(error.value) == str(tmp_path / "run" / "error.txt")
    text = (tmp_path / "run" / "error.txt").read_text()
    assert text.startswith("Traceback") and "in fail\n" in text and text.endswith("ValueError: it broke\n")


def test_an_error_before_leaves_nothing(tmp_path):
    with pytest.raises(ValueError) as error, failures.running(tmp_path / "run"):
        fail(after=False)
    assert failures.traceback_path(error.value) is None
    assert not (tmp_path / "run").exists()
    failures.work_begins()  # Of no run.
    with pytest.raises(ValueError) as error, failures.running(tmp_path / "run"):
        fail(after=False)
    assert failures.traceback_path(error.value) is None


def test_the_next_attempt_removes_what_the_last_one_left(tmp_path):
    (tmp_path / "error.txt").write_text("Traceback")
    with pytest.raises(ValueError), failures.running(tmp_path):
        fail(after=False)
    assert (tmp_path / "error.txt").exists()  # Bad input is no attempt.
    with failures.running(tmp_path):
        failures.work_begins()
    assert not (tmp_path / "error.txt").exists()


def test_a_run_inside_another_keeps_the_traceback(tmp_path):
    with pytest.raises(ValueError) as error, failures.running(tmp_path / "study"):
        failures.work_begins()
        with failures.running(tmp_path / "study" / "row"):
            fail(after=True)
    assert failures.traceback_path(error.value) == str(tmp_path / "study" / "row" / "error.txt")
    assert not (tmp_path / "study" / "error.txt").exists()


def test_each_process_has_its_own_file(tmp_path):
    with pytest.raises(ValueError) as error, failures.running(tmp_path, process=2):
        fail(after=True)
    assert failures.traceback_path(error.value) == str(tmp_path / "error-2.txt")


def test_a_folder_that_cannot_be_written_hides_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="it broke") as error, failures.running(tmp_path / "file" / "run"):
        fail(after=True)
    assert failures.traceback_path(error.value) is None
