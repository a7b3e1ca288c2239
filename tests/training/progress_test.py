"""How long a run still takes, and what it says of itself in a log."""

import pytest

from robust_keras.training import progress, recipes, time_left


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def take_steps(left, clock, first, last, seconds):
    for step in range(first, last + 1):
        clock.now += seconds
        left.step(step)


def pause(left, clock, name, seconds):
    with left.pause(name):
        clock.now += seconds


def test_what_compiles_is_no_step_and_pauses_count_as_often_as_they_come(clock):
    left = time_left.TimeLeft(110, {"validating": 25, "saving": 50}, clock=clock)
    assert left.seconds(0) is None and left.takes_more(0)
    take_steps(left, clock, 1, 1, 300.0)
    assert left.seconds(1) is None
    take_steps(left, clock, 2, 25, 2.0)
    assert left.seconds(25) == pytest.approx(85 * 2.0) and left.takes_more(25)
    pause(left, clock, "validating", 40.0)  # At 50, 75, 100 and 110 again.
    assert left.seconds(25) == pytest.approx(85 * 2.0 + 4 * 40.0)
    take_steps(left, clock, 26, 50, 2.0)
    pause(left, clock, "validating", 30.0)  # The first one compiled.
    pause(left, clock, "saving", 1.0)
    assert left.seconds(50) == pytest.approx(60 * 2.0 + 3 * 30.0 + 2 * 1.0) and not left.takes_more(50)
    take_steps(left, clock, 51, 110, 2.0)
    assert left.seconds(110) == 0.0 and not left.takes_more(110)


def test_steps_that_nobody_waited_for_count_together(clock):
    left = time_left.TimeLeft(1000, {}, clock=clock)
    left.step(101)  # The first call of a run that goes on.
    clock.now = 100.0
    left.step(151)
    assert left.seconds(151) == pytest.approx(849 * 2.0)


def test_what_is_under_way_counts_with_the_rest_of_it(clock):
    left = time_left.TimeLeft(20, {"validating": 10}, clock=clock)
    take_steps(left, clock, 1, 10, 1.0)
    with left.pause("validating"):
        assert left.takes_more(20)
        clock.now += 50.0
    take_steps(left, clock, 11, 20, 1.0)
    with left.pause("validating"):
        clock.now += 20.0
        assert left.seconds(20) == pytest.approx(30.0) and not left.takes_more(20)
        clock.now += 40.0
        assert left.seconds(20) == 0.0


def test_the_past_is_forgotten(clock):
    left = time_left.TimeLeft(10_000, {}, clock=clock)
    take_steps(left, clock, 0, 1000, 10.0)
    take_steps(left, clock, 1001, 3000, 2.0)
    assert left.seconds(3000) == pytest.approx(7000 * 2.0, rel=0.1)


def test_a_log_hears_of_a_run_every_two_minutes(monkeypatch, capsys):
    clock = Clock()
    clock.now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", clock)
    said = progress.Progress(1000, recipes.Cadence(), writes=True)
    found = {"step": 90, "metrics": {"val_clean": 0.9, "val_robust": 0.5}}
    said.begin(100, found, found)
    for step in range(101, 401):
        clock.now += 1.0
        said.step(step, None if step % 2 else 1.5)  # Of every other one nobody knows the loss.
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" of 1000: ")[0] for line in lines] == ["Step 100", "Step 220", "Step 340"]
    assert lines[1].endswith("robust 50.0 %, best weights 50.0 % at 90, loss 1.5000")


@pytest.mark.parametrize("writes, shown", [(False, True), (True, False)])
def test_other_processes_say_nothing_and_who_wants_no_progress_hears_of_validations(capsys, writes, shown):
    said = progress.Progress(10, recipes.Cadence(progress=shown), writes=writes)
    found = {"step": 5, "metrics": {"val_clean": 0.9, "val_robust": 0.5}}
    said.begin(0, None, None)
    said.step(5, 1.0)
    with said.pause(progress.VALIDATING):
        said.go_on()
    said.validated(5, found, found)
    said.end()
    assert capsys.readouterr().err == ("Step 5: val_clean 90.00 %, val_robust 50.00 %\n" if writes else "")
