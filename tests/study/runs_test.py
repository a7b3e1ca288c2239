"""Budgets from trials to tables, on devices whose seconds are invented."""

import csv
import datetime
import functools
import json

import invented_device
import pytest

from robust_keras.study import drawing, figures, models_by_date, planning, rows, runs, throughput

MINI = planning.PLANS["mini"]
MANIFEST = rows.read()
CHOSEN = rows.select(MANIFEST, table=7, row="tau=0.995", setting="cifar10")


@pytest.fixture(autouse=True)
def device_of_a_thousand_passes(monkeypatch):
    speed = 2 * invented_device.FORWARD / invented_device.PASS
    monkeypatch.setattr(throughput, "attack_throughput", lambda *_: speed)
    monkeypatch.setattr(throughput, "device_throughput", lambda: speed)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Their tests are elsewhere, and they take longer than the rest."""
    monkeypatch.setattr(figures, "of_table", lambda *_, **__: None)
    monkeypatch.setattr(drawing, "write", lambda *_: [])


def study_on(device, folder):
    def configured(chosen, plan):
        names = ("at", "at-tau=0.995")
        return {name: invented_device.configuration(plan, bindings=(f"name = {name}",)) for name in names}

    return runs.Study(MANIFEST, CHOSEN, "cifar10", configured, str(folder), device.commands)


def run_within(budget, device, folder):
    """Paths of the tables, and seconds taken."""
    started, study = device.now, study_on(device, folder)
    trained = runs.train_within(budget, MINI, study, started=started, clock=device.clock)
    return runs.measure(study, trained), device.now - started


def lines(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "device",
    [
        {},
        {"accuracy": (0.45, 0.3)},  # Evaluations take longer than planned,
        {"accuracy": (0.3, 0.12)},  # or less long,
        {"slower": 1.1},  # and so may training.
        {"starting": 200.0, "step": 0.1, "evaluating": 5.0},
        {"starting": 5.0, "step": 2.5, "evaluating": 100.0},
    ],
)
@pytest.mark.parametrize("share", [1.1, 1.5])
def test_a_budget_holds(tmp_path, device, share):
    with pytest.raises(ValueError, match=r"Expected a budget of \d+m or more") as refusal:
        run_within("1s", invented_device.Device(**device), tmp_path)
    least = 60 * int(str(refusal.value).split()[4].removesuffix("m"))
    made = invented_device.Device(**device)
    budget = share * least
    paths, seconds = run_within(f"{budget:.0f}s", made, tmp_path)
    whole = all(images == MINI.num_examples for _, images in made.evaluated[1:])
    assert seconds <= 1.02 * budget and (whole or seconds >= 0.85 * budget), (seconds, budget)
    steps = {steps for folder, steps in made.trained if not folder.endswith("trial")}
    images = {images for folder, images in made.evaluated if not folder.endswith("trial")}
    assert len(steps) == len(images) == 1 and steps.pop() >= 200 and images.pop() >= 100
    assert [line["row"] for line in lines(paths[1])] == ["no averaging", "tau=0.995"]
    assert json.loads((tmp_path / "plan.json").read_text())["images"] >= 100


def test_a_budget_that_is_refused_trains_trials_alone(tmp_path):
    device = invented_device.Device()
    with pytest.raises(ValueError, match="Received: 720 s"):
        run_within("12m", device, tmp_path)
    assert [folder for folder, _ in device.trained] == [str(tmp_path / "trial")]
    assert list(tmp_path.iterdir()) == []


def test_the_same_command_goes_on_with_its_plan(tmp_path, monkeypatch):
    device = invented_device.Device()
    study = study_on(device, tmp_path)
    first = runs.train_within("2h", MINI, study, started=0.0, clock=device.clock)
    assert first.plan.images and first.validations.keys() == {"at", "at-tau=0.995"}
    trained = len(device.trained)
    monkeypatch.setattr(throughput, "device_throughput", lambda: pytest.fail("measured again"))
    again = runs.train_within("2h", MINI, study, started=device.now, clock=device.clock)
    assert again.plan == first.plan and len(device.trained) == trained
    runs.measure(study, again)
    assert len(device.trained) == trained
    assert {images for folder, images in device.evaluated if "trial" not in folder} == {first.plan.images}


def test_networks_at_chance_are_not_compared(tmp_path, capsys):
    device = invented_device.Device(accuracy=(0.11, 0.05))
    paths, _ = run_within("2h", device, tmp_path)
    assert paths == [] and "at chance" in capsys.readouterr().out
    assert [folder for folder, _ in device.evaluated] == [str(tmp_path / "trial")]


def test_a_finished_run_of_something_else_is_refused(tmp_path):
    device = invented_device.Device()
    study = study_on(device, tmp_path)
    study = study._replace(commands=study.commands._replace(differences=lambda *_: ["TAU = 0.9, not 0.995"]))
    configuration = study.configured((), MINI)["at"]
    runs.train_models(configuration, str(tmp_path / "at"), study.commands)
    with pytest.raises(ValueError, match="Expected a workdir of this run. Received: .*seed0 of another, TAU = 0.9"):
        runs.train_models(configuration, str(tmp_path / "at"), study.commands)


def test_the_models_that_validation_prefers_are_evaluated():
    job = invented_device.configuration(MINI).job
    chosen = functools.partial(runs.chosen_seeds, validations={0: {"val_robust": 0.4}, 1: {"val_robust": 0.5}})
    assert chosen(invented_device.configuration(MINI)._replace(job=job._replace(num_evaluated=1))) == [1]
    assert chosen(invented_device.configuration(MINI)) == [0, 1]
    averaged = {seed: {"val_robust": 0.1 * seed, "val_robust_averaged": -0.1 * seed} for seed in range(3)}
    one = invented_device.configuration(MINI)._replace(job=job._replace(num_evaluated=1))
    assert runs.chosen_seeds(one, averaged) == [0]
    equal = {seed: {"val_robust": 0.5} for seed in range(3)}
    assert runs.chosen_seeds(one, equal) == [0]


def test_figure_1_has_the_settings_models_and_ones_own(tmp_path, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(figures, "by_date", lambda models, *, scale: shown.append((models, scale)))
    own = models_by_date.Model("mine", datetime.date(2026, 1, 1), None, 50.0, is_own=True)
    runs.draw(study_on(invented_device.Device(), tmp_path), MINI, 1, [own])
    assert capsys.readouterr().out == ""
    ((models, scale),) = shown
    assert models[-1] == own and {each.setting for each in models[:-1]} == {"cifar10"}
    assert scale == ""  # Nothing of the study is measured.
    for figure in (1, 4):
        runs.draw(study_on(invented_device.Device(), tmp_path), MINI, figure)
        assert capsys.readouterr().out == f"{figures.NOTHING}\n"
