import pytest

from robust_keras.study import planning, throughput


def test_a_pass_is_timed():
    seconds, flops = throughput.time_of_a_pass(10, 1, batch_size=8)
    assert flops == 2 * 8 * 25_527_552 and 1e8 < flops / seconds < 1e15


@pytest.mark.parametrize("seconds_of_small, expected", [(0.1, 10.0), (0.001, 500.0)])
def test_a_fast_device_is_given_more_to_do(monkeypatch, seconds_of_small, expected):
    times = {(10, 1): (seconds_of_small, 1.0), (28, 10): (0.01, 5.0)}
    monkeypatch.setattr(throughput, "time_of_a_pass", lambda depth, width, **_: times[depth, width])
    assert throughput.device_throughput() == pytest.approx(expected)


def test_attacks_are_timed_on_the_network_that_is_run(monkeypatch):
    asked = []
    monkeypatch.setattr(throughput, "time_of_a_pass", lambda *size, **given: asked.append((size, given)) or (2.0, 6.0))
    job = planning.Job(34, 20, 100, 64, 600, 10, "trades", True, 6, 256, 40, 3, 3)
    assert throughput.attack_throughput(planning.PLANS["mini"], job) == 3.0
    assert asked == [((16, 3), {"batch_size": 128, "num_classes": 100})]
