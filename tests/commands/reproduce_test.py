"""scripts/reproduce.py on tiny images, from rows to tables."""

import csv
import json
import pathlib
import re
import types

import numpy as np
import pytest

from robust_keras import ownership
from robust_keras.commands import evaluate, reproduce, train
from robust_keras.data import sources
from robust_keras.evaluation import gradient_masking
from robust_keras.study import budget, measured, planning, throughput, trials
from robust_keras.training import recorder

TINY = {
    "BATCH_SIZE": "8",
    "STATISTICS_GROUP_SIZE": "4",
    "TRAIN_STEPS": "4",
    "training_data.num_validation": "8",
    "training/pgd.num_steps": "1",
    "train.validate_every": "2",
    "train.checkpoint_every": "2",
    "train.validation_batch_size": "8",
    "train.progress": "False",
    "pgd40/pgd.num_steps": "2",
}
ROW = {"table": 7, "row": ["tau=0.995"], "setting": "cifar10"}


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    """Bindings for runs of seconds on 64 small images in 4 classes."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    random = np.random.RandomState(0)
    np.savez(path, image=random.randint(0, 256, (64, 8, 8, 3)).astype(np.uint8), label=np.arange(64) % 4)
    return [f"{name} = {value}" for name, value in {**TINY, "DATASET": f"'npz:{path}'"}.items()]


@pytest.fixture(autouse=True)
def no_diagnosis(monkeypatch):
    """Evaluations look at no gradients, which takes longer than the attacks of these tests."""
    figures = dict.fromkeys(("logits_spread", "zero_gradients", "gradient_mismatch"), 0.0)
    figures |= {"margin": -1.0, "margin_5_steps": 1.0, "margin_50_steps": 1.0}

    def diagnose(logits_fn, x, *args, **settings):
        return gradient_masking.Diagnosis(dict(figures), [x.numpy()])

    monkeypatch.setattr(gradient_masking, "diagnose", diagnose)


@pytest.fixture
def small(monkeypatch):
    """Plans with an attack of seconds."""
    for name, plan in list(planning.PLANS.items()):
        changed = plan._replace(evaluation="eval/pgd40.gin", num_examples=12, size="mini", num_baseline_runs=2)
        monkeypatch.setitem(planning.PLANS, name, changed)


def lines(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_and_its_baseline_from_training_to_the_table(monkeypatch, tmp_path, params, small):
    run = {**ROW, "scale": "mini", "workdir": str(tmp_path), "gin_params": params, "num_runs": 1}
    paths = reproduce.run(**run)
    assert [path.rpartition(".")[2] for path in paths] == ["md", "csv", "png", "pdf"]
    baseline, line = lines(paths[1])
    assert (baseline["row"], baseline["kind"], baseline["seeds"]) == ("no averaging", "baseline", "0")
    # The paper's Table 7: .995 gets 52.10 %, no averaging 50.80 %.
    assert (line["row"], float(line["paper_robust"]), float(line["paper_difference"])) == ("tau=0.995", 52.1, 1.3)
    assert line["seeds"] == "0"
    # Four steps on noise: nothing is told of such networks, and nothing advised.
    assert (line["verdict"], line["difference"], line["images_needed"], line["seeds_needed"]) == (
        "at chance",
        "",
        "",
        "",
    )
    folder = tmp_path / "mini" / "at-tau=0.995" / "seed0"
    results = json.loads((folder / "evaluation" / "results.json").read_text())
    assert float(line["measured_robust"]) == pytest.approx(100 * results["robust_accuracy"])
    assert results["num_examples"] == 12
    config = (tmp_path / "mini" / "at-tau=0.995" / "seed0" / "config.gin").read_text()
    assert "TAU = 0.995" in config and "SEED = 0" in config and "DEPTH = 10" in config
    other = (tmp_path / "mini" / "at" / "seed0" / "config.gin").read_text()
    assert "TAU = None" in other
    text = (tmp_path / "mini" / "table7.md").read_text()
    assert "WRN-10-1 for the paper's WRN-28-10" in text and "| 52.10 " in text
    assert "no difference can be told: at chance on clean images at-tau=0.995 of seed 0" in text
    assert (tmp_path / "mini" / "table7.png").read_bytes().startswith(b"\x89PNG")
    # The figure alone, of what is finished.
    same = {name: run[name] for name in ("setting", "scale", "workdir", "gin_params", "num_runs")}
    assert reproduce.draw(figure=4, **same) == paths[2:]

    # Again, and with the baseline alone: nothing is trained, and the table is the same.
    monkeypatch.setattr(train, "run", lambda **_: pytest.fail("trained again"))
    for row in (["tau=0.995"], ["no averaging"]):
        assert reproduce.run(**{**run, "row": row}) == paths
        assert (tmp_path / "mini" / "table7.md").read_text() == text

    # Other settings in the same folder are another run.
    with pytest.raises(ValueError, match="Expected a workdir of this run.*multistep.base"):
        reproduce.run(**{**run, "gin_params": [*params, "multistep.base = 0.2"]})


def test_the_papers_protocol_evaluates_the_better_of_two_by_validation(monkeypatch, tmp_path, small):
    robust = {"at": [0.4, 0.5], "at-tau=0.995": [0.6, 0.3]}
    evaluated = []

    def trained(*, workdir, **_):
        name, seed = workdir.split("/")[-2:]
        card = {"validation": {"best": {"metrics": {"val_robust": robust[name][int(seed[4:])]}}}}
        (tmp_path / "paper" / name / seed / "saved_model").mkdir(parents=True)
        (tmp_path / "paper" / name / seed / "saved_model" / "model_card.json").write_text(json.dumps(card))

    monkeypatch.setattr(train, "run", trained)
    monkeypatch.setattr(sources, "load", lambda *_, **__: types.SimpleNamespace(labels=range(12)))
    monkeypatch.setattr(evaluate, "run", lambda *, workdir, **_: evaluated.append(workdir.split("/")[-3:-1]))
    monkeypatch.setattr(
        "robust_keras.study.measured.read",
        lambda *_, seed, validation, chosen_of, **__: measured.Measured(
            seed, 1.0, None, 1.0, False, np.arange(12) < 3, [], {}, validation, chosen_of
        ),
    )
    paths = reproduce.run(**ROW, workdir=str(tmp_path))
    # Both models of the baseline, and of the row the one that validation prefers.
    assert evaluated == [["at", "seed0"], ["at", "seed1"], ["at-tau=0.995", "seed0"]]
    assert [line["seeds"] for line in lines(paths[1])] == ["0 1", "0"]


def test_a_claim_from_training_to_its_file(monkeypatch, tmp_path, small):
    evaluated, stands = [], np.arange(12) < 9

    def trained(*, workdir, **_):
        folder = pathlib.Path(workdir) / "saved_model"
        folder.mkdir(parents=True)
        (folder / "model_card.json").write_text(json.dumps({"validation": {"best": {"metrics": {"val_robust": 0.5}}}}))

    monkeypatch.setattr(train, "run", trained)
    monkeypatch.setattr(sources, "load", lambda *_, **__: types.SimpleNamespace(labels=range(12)))
    monkeypatch.setattr(
        evaluate, "run", lambda *, workdir, gin_files, **_: evaluated.append((*workdir.split("/")[-3:], *gin_files))
    )
    monkeypatch.setattr(
        "robust_keras.study.measured.read",
        lambda *_, seed, attacks, validation, chosen_of, **__: measured.Measured(
            seed,
            1.0,
            None,
            1.0,
            False,
            stands & (np.arange(12) > seed),
            [],
            dict.fromkeys(attacks, stands),
            validation,
            chosen_of,
        ),
    )
    paths = reproduce.run(claim=["margin-masks", "drop-at-margin"], setting="cifar10", workdir=str(tmp_path))
    # Two models of the baseline, one of two of the inner margin, by AA+MT and by PGD-40 alone.
    models = [("at", "seed0"), ("at", "seed1"), ("at-training.loss_fn=margin", "seed0")]
    both = (("evaluation", planning.PLANS["paper"].evaluation), ("evaluation_pgd40", "eval/pgd40.gin"))
    assert evaluated == [(*model, *how) for model in models for how in both]
    assert [path.rpartition("/")[2] for path in paths][::2] == ["claim-drop-at-margin.md", "claim-margin-masks.md"]
    (line,) = lines(paths[3])
    assert (line["side_seeds"], line["against_seeds"], line["verdict"]) == ("0", "0 1", "not resolved")
    assert float(line["side_mean"]) == pytest.approx(-100 / 12) and float(line["paper_difference"]) == -2.86


def test_a_small_data_set_is_evaluated_whole(monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "run", lambda **given: asked.append(given["num_examples"]))
    commands = reproduce._commands(None, None, None)
    for num_examples in (500, 100, None):
        commands.evaluate(
            types.SimpleNamespace(dataset="digits", threat=[]), "eval/pgd40.gin", "run", num_examples, "evaluation"
        )
    assert asked == [360, 100, None]


def test_claims_are_listed_and_costed(capsys):
    reproduce.list_rows(claim=["silu"])
    listed = capsys.readouterr().out
    assert "The text says +0.8; Table 8's numbers differ by 0.60" in listed and "| 8:Swish/SiLU" in listed
    assert "best_wrn70_16" not in listed  # No rows.
    reproduce.list_rows()
    assert "prior-art-l2" in (listed := capsys.readouterr().out) and "Engstrom" in listed
    reproduce.list_rows(table=8)
    assert "prior-art-l2" not in capsys.readouterr().out
    reproduce.dry_run(claim=["smoothing-both"])
    said = capsys.readouterr().out
    assert "at_80mti-extra_label_smoothing=0.1-label_smoothing=0.1" in said and "| 10, 10 evaluated" in said


def test_runs_and_evaluations_compute_where_the_study_is_told_to(monkeypatch, small):
    asked = []
    monkeypatch.setattr(train, "run", lambda **given: asked.append(given))
    monkeypatch.setattr(evaluate, "run", lambda **given: asked.append(given))
    commands = reproduce._commands("data", "jax", None)
    commands.train(["at.gin"], [], "run")
    commands.evaluate(types.SimpleNamespace(dataset="digits", threat=[]), "eval/aa_mt.gin", "run", None, "evaluation")
    assert [(given["strategy"], given["tpu"]) for given in asked] == [("jax", None)] * 2


def test_a_diverged_configuration_is_left_out(monkeypatch, tmp_path, capsys, small):
    def diverges(**_):
        raise recorder.NonFiniteLoss("Expected a finite loss. Received: nan at step 3")

    monkeypatch.setattr(train, "run", diverges)
    paths = reproduce.run(**ROW, scale="mini", workdir=str(tmp_path))
    for line, paper in zip(lines(paths[1]), ("50.8", "52.1"), strict=True):
        assert line["measured_robust"] == "" and line["paper_robust"] == paper
    assert "Seed 0 diverged and is left out" in capsys.readouterr().out


def test_a_budget_from_trials_to_tables(monkeypatch, tmp_path, params):
    changed = planning.PLANS["mini"]._replace(evaluation="eval/pgd40.gin", num_examples=48)
    monkeypatch.setitem(planning.PLANS, "mini", changed)
    monkeypatch.setattr(throughput, "device_throughput", lambda: 1e9)
    monkeypatch.setattr(throughput, "attack_throughput", lambda *_: 1e12)
    trained = []
    run = train.run
    monkeypatch.setattr(train, "run", lambda **given: trained.append(given["workdir"]) or run(**given))
    monkeypatch.setattr(budget, "all_at_chance", lambda *_: False)
    given = {**ROW, "row": ["no averaging"], "budget": "9h", "workdir": str(tmp_path), "gin_params": params}
    given |= {"scale": "mini", "num_runs": 1}
    paths = reproduce.run(**given)
    folder = tmp_path / "mini-9h"
    assert trained == [str(folder / "trial"), str(folder / "at" / "seed0")]
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["images"] == 48 and plan["share"] == 1.0
    assert all(timings[1] > 0 and timings[0] > 0 and timings[2] > 0 for timings in plan["timings"].values())
    assert [line["seeds"] for line in lines(paths[1])] == ["0"]
    assert not (folder / "trial").exists()
    assert reproduce.run(**given) == paths and len(trained) == 2


def test_a_second_live_command_is_refused(tmp_path):
    with ownership.lock(str(tmp_path / "mini"), what="another study"):
        with pytest.raises(ownership.FolderInUse, match="another study"):
            reproduce.run(**ROW, scale="mini", workdir=str(tmp_path))


def test_list_and_dry_run(capsys):
    reproduce.list_rows(table=5, setting="80mti")
    listed = capsys.readouterr().out
    assert "| 72.91* " in listed and "* reported by others" in listed
    assert "| 65.87 " in listed and "reference" in listed and "best_wrn70_16_80mti.gin" in listed
    reproduce.dry_run(table=5, row=["Ours (WRN-70-16)"], setting="cifar10")
    said = capsys.readouterr().out
    reproduce.dry_run(table=5, row=["Ours (WRN-70-16, CIFAR-100)"], setting="cifar10", gin_params=["TRAIN_STEPS = 123"])
    other = capsys.readouterr().out
    assert "266,888,756" in other and "| 123 " in other
    # TRADES at batch 128: clean prediction, ten steps of the attack, two passes with the weights' gradient.
    assert f"{77_528_420_352 * 128 * (1 + 20 + 6):.4g} FLOP" in said
    assert "WRN-70-16" in said and "266,796,506" in said and "78,000" in said and "32 TPU v3 cores" in said


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--table=11"], "Expected a table out of 1, 2, 3.*Received: 11"),
        (["--table=7", "--row=tau=0.5"], "Expected a row of Table 7 out of no averaging,.*Received: tau=0.5"),
        (["--claim=silo"], "Expected a claim, such as silu, .*; see --list. Received: silo"),
        (["--claim=silu", "--table=8"], "Expected --claim with neither --table nor --row"),
        (["--claim=calibration-rice"], "Expected a claim that can be run. Received: calibration-rice: Their weights"),
        (
            ["--claim=200k-to-500k", "--setting=cifar10"],
            "Expected a claim of cifar10, such as .*Received: 200k-to-500k",
        ),
        (["--table=4"], "Fetch it with"),
        (
            ["--table=5", "--setting=80mti", "--row=Ours (WRN-70-16, L2)"],
            "tfrecord:80mti/500k.*scripts/pseudo_label.py",
        ),
        (["--table=7", "--budget=3 hours"], "Expected a budget such as 90m or 3h. Received: '3 hours'"),
        (["--table=7", "--scale=tiny"], "tiny"),
        (["--figure=4", "--table=7"], "Expected --figure without --table"),
        (["--evaluation=runs/mine"], "Expected --evaluation with --figure=1.*without --figure"),
        (["--figure=2", "--evaluation=runs/mine"], "Expected --evaluation with --figure=1.*--figure=2"),
        (["--figure=1", "--evaluation=none"], "Expected the folder of a finished evaluation. Received: none"),
        (["--figure=1", "--evaluation=none,2020-13"], "Expected a date such as 2020-10 or 2020-10-07.*2020-13"),
        (["--figure=6"], "--figure"),
        (["--table=7", "--dry_run", "--budget=1h"], "Expected --budget with neither --list nor --dry_run"),
        (
            ["--table=7", "--setting=cifar10", "--budget=12m", "--scale=mini"],
            r"Expected a budget of \d+m or more, for 30 models of 200 steps.*Received: 720 s",
        ),
    ],
)
def test_bad_input(monkeypatch, capsys, tmp_path, flags, expected):
    monkeypatch.setattr(throughput, "device_throughput", lambda: 1e9)
    slow = budget.Timings(60.0, 1.0, 30.0, 1e9)
    monkeypatch.setattr(trials, "time_trials", lambda plan, by_name, *_, **__: dict.fromkeys(by_name, slow))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(train, "run", lambda **_: pytest.fail("trained"))
    monkeypatch.setattr("sys.argv", ["reproduce", f"--workdir={tmp_path}", *flags])
    with pytest.raises(SystemExit) as exit:
        reproduce.command()
    assert exit.value.code == 2
    assert re.search(expected, capsys.readouterr().err)
