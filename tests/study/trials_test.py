import invented_device
import pytest

from robust_keras.study import planning, throughput, trials

MINI = planning.PLANS["mini"]


@pytest.fixture
def throughputs(monkeypatch):
    measured = []
    speed = 2 * invented_device.FORWARD / invented_device.PASS
    monkeypatch.setattr(throughput, "attack_throughput", lambda plan, job: measured.append(job) or speed)
    return measured


def time_trials(device, by_name, folder):
    commands = device.commands
    return trials.time_trials(
        MINI,
        by_name,
        str(folder),
        train=lambda each, bindings: commands.train(each.files, bindings, str(folder)),
        evaluate=lambda each, images: commands.evaluate(each, "eval/aa_mt_mini.gin", str(folder), images, "evaluation"),
        clock=device.clock,
    )


def test_a_trials_time_is_taken_apart(tmp_path, throughputs):
    device = invented_device.Device(starting=47.0, step=1.25, evaluating=21.0)
    found = time_trials(device, {"at": invented_device.configuration(MINI)}, tmp_path / "trial")["at"]
    # Of 64 images six are attacked: a batch of PGD-40 is full and counted as six, two other attacks end half empty.
    empty = (128 * 40 - 6 + 2 * 50 * 64) * invented_device.PASS
    expected = (47.0, 1.25, 21.0 + empty, 2 * invented_device.FORWARD / invented_device.PASS)
    assert found == pytest.approx(expected)
    assert [steps for _, steps in device.trained] == [16] and [images for _, images in device.evaluated] == [64]


def test_one_trial_for_all_that_run_the_same_program(tmp_path, throughputs):
    device = invented_device.Device()
    by_name = {
        "at": invented_device.configuration(MINI),
        "at-activation=silu": invented_device.configuration(MINI, bindings=("ACTIVATION = 'silu'",)),
        "at-tau=0.995": invented_device.configuration(MINI, validation_passes=80),
        "longer": invented_device.configuration(MINI, train_steps=900, num_runs=2),
    }
    assert time_trials(device, by_name, tmp_path / "trial").keys() == by_name.keys()
    assert len(device.trained) == len(throughputs) == 2
    assert not (tmp_path / "trial").exists()


def test_what_a_call_left_that_was_stopped_is_no_trial(tmp_path, throughputs):
    (tmp_path / "trial" / "saved_model").mkdir(parents=True)
    device = invented_device.Device()
    time_trials(device, {"at": invented_device.configuration(MINI)}, tmp_path / "trial")
    assert len(device.trained) == 1


def test_bindings_of_a_trial():
    assert trials.bindings(256) == [
        "TRAIN_STEPS = 16",
        "train.validate_every = 16",
        "train.checkpoint_every = 16",
        "train.log_every = 16",
        "training_data.num_validation = 64",
    ]
    assert trials.bindings(8)[-1] == "training_data.num_validation = 8"


def test_programs_are_those_of_networks_at_the_scale():
    job = invented_device.configuration(MINI).job
    wider = job._replace(width=16)  # 15 and 16 are one width in miniature.
    assert trials.program(MINI, wider) == trials.program(MINI, job._replace(width=15))
    assert trials.program(MINI, wider) != trials.program(MINI, job)
    paper = planning.PLANS["paper"]
    assert trials.program(paper, wider) != trials.program(paper, job._replace(width=15))
