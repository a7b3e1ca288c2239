"""Verdicts on claims from made results: of rows, of their own recipes, against numbers and of learning curves."""

import csv

import numpy as np
import pytest

from robust_keras.evaluation import comparison
from robust_keras.study import claim_verdicts, claims, measured, rows

MANIFEST = rows.read()
CLAIMS = claims.read(MANIFEST)


def one(name, setting="cifar10"):
    (claim,) = claims.select(CLAIMS, [name], setting=setting)
    return claim


def made(robust, *, seed=0, num_images=2000, clean=0.9, pgd=0.6, shift=0, **given):
    """A `Measured` that is right on so many images; a model's seed moves them a little."""
    position = (np.arange(num_images) + 7 * seed + shift) % num_images / num_images
    right = {"clean": position < clean, "pgd20": position < pgd, "pgd40": position < pgd}
    stands = position < robust
    return measured.Measured(
        seed, 100 * clean, None, 100 * robust, False, stands, given.pop("curve", []), right, **given
    )


def baselines(robust, num=10, **given):
    return [made(robust + 0.002 * (k % 3 - 1), seed=k, validation=0.5 + 0.001 * k, **given) for k in range(num)]


def curve(robust, column="val_robust"):
    return [{"step": 100.0 * (k + 1), "val_robust": 0.0, column: value} for k, value in enumerate(robust)]


def judged(name, models, setting="cifar10"):
    return claim_verdicts.judge(MANIFEST, one(name, setting), models)


def test_the_papers_protocol_one_model_each_and_the_spread_of_ten():
    names = [rows.run_name(row) for row in one("deeper-beats-wider").rows]
    models = {name: [made(robust, chosen_of=2, validation=0.5)] for name, robust in zip(names, (0.55, 0.5))}
    assert judged("deeper-beats-wider", models).compared.verdict == "not resolved"  # Nothing tells what seeds matter.
    models["at"] = baselines(0.48)
    found = judged("deeper-beats-wider", models)
    assert found.compared.verdict == "shown" and found.compared.difference == pytest.approx(0.05)
    assert "1 seed against 1 x 2,000 images: shown" in found.verdict
    models[names[0]], models[names[1]] = models[names[1]], models[names[0]]
    assert judged("deeper-beats-wider", models).compared.verdict == "contradicted"


def test_a_drop_within_one_model():
    name = "at-training.loss_fn=margin"
    models = {name: [made(0.5, chosen_of=2, validation=0.6)], "at": baselines(0.57)}
    found = judged("drop-at-margin", models)
    assert found.compared.verdict == "shown" and found.compared.difference == pytest.approx(-0.1)
    # Both sides' drops, of which the margin's is the larger: 10 against 3 points.
    found = judged("margin-masks", models)
    assert found.compared.verdict == "shown" and found.compared.difference == pytest.approx(-0.07, abs=0.002)
    assert found.compared.num_baseline_seeds == 10


def test_no_more_and_the_same_have_limits():
    name = "at-activation=elu"
    for robust, verdict in ((0.4, "shown"), (0.5, "not resolved"), (0.6, "contradicted")):
        models = {name: [made(robust, chosen_of=2, validation=0.5)], "at": baselines(0.5)}
        found = judged("elu", models)
        assert found.compared.verdict == verdict
        assert found.compared.difference == pytest.approx(robust - 0.5, abs=0.003)  # Not from the limit.
    (name,) = (rows.run_name(row) for row in one("wrn-34-20-as-rice").rows)
    for robust, verdict in ((0.40, "contradicted"), (0.66, "contradicted"), (0.533, "not resolved")):
        models = {name: [made(robust, validation=0.5)], "at": baselines(0.5)}
        assert judged("wrn-34-20-as-rice", models).compared.verdict == verdict
    many = [made(0.5338 + 0.0001 * (k % 2), seed=k, num_images=100_000) for k in range(6)]
    assert judged("wrn-34-20-as-rice", {name: many}).compared.verdict == "shown"


def test_a_number_of_others():
    (name,) = (rows.run_name(row) for row in one("prior-art").rows)
    found = judged("prior-art", {name: [made(0.60, validation=0.6)], "at": baselines(0.5)})
    assert found.compared.verdict == "shown" and found.compared.difference == pytest.approx(0.60 - 0.5374)
    assert found.against == ()


def test_learning_curves():
    model = made(0.5, curve=curve([0.1, 0.3, 0.495, 0.5, 0.492, 0.4, 0.5, 0.3]))
    # Within a point of the first best, of eight validations: the third to the fifth.
    assert measured.values("plateau", [model])[0] == pytest.approx([2 / 8])
    assert measured.values("best_at", [model])[0] == pytest.approx([4 / 8])
    assert measured.values("early", [model])[0] == pytest.approx([0.5])
    averaged = made(0.5, curve=curve([0.2, 0.4, 0.4, 0.395], "val_robust_averaged"))
    assert measured.values("plateau", [averaged])[0] == pytest.approx([2 / 4])
    assert measured.values("early", [averaged])[0] == pytest.approx([0.4])
    # Two of the ten have a second, higher peak a fifth later.
    peaked = [made(0.5, seed=k, curve=curve([0.1, 0.2, 0.3, 0.4, 0.1 + 0.301 * (k % 5 == 0)])) for k in range(10)]
    flat = made(0.5, curve=curve([0.1, 0.4, 0.401, 0.402, 0.4]))
    found = judged("averaging-plateau", {"at-tau=0.995": [flat], "at": peaked})
    assert found.compared.difference == pytest.approx(0.6 - 0.04) and found.compared.verdict == "shown"
    assert "% of the training" in found.verdict and "images" not in found.verdict
    found = judged("best-after-second-decay", {"at": peaked})
    assert found.compared.difference == pytest.approx(0.84 - 0.75) and found.compared.verdict == "shown"


def test_nothing_is_told_of_a_network_at_chance_or_of_none():
    name = "at-activation=elu"
    models = {name: [made(0.5)._replace(is_at_chance=True)], "at": baselines(0.5)}
    found = judged("elu", models)
    assert found.compared is None and found.verdict.endswith(f"at chance on clean images {name} of seed 0")
    found = judged("elu", {name: [made(0.5)], "at": []})
    assert found.compared is None and found.verdict == ""


def test_files(tmp_path):
    name = "at-activation=silu"
    models = {name: [made(0.6, chosen_of=2, validation=0.5)], "at": baselines(0.5)}
    paths = claim_verdicts.write(str(tmp_path), [judged("silu", models)], scale="a scale")
    assert [path.rpartition("/")[2] for path in paths] == ["claim-silu.md", "claim-silu.csv"]
    text = open(paths[0]).read()
    assert "Measured at a scale" in text and "| +0.60 " in text and ": shown" in text and "The text says +0.8" in text
    with open(paths[1], newline="") as file:
        (line,) = csv.DictReader(file)
    assert (line["verdict"], line["paper_difference"], line["against"]) == ("shown", "0.6", "8:ReLU")
    assert float(line["difference"]) == pytest.approx(10, abs=0.3) and float(line["difference_low"]) > 0
    assert (
        float(line["side_mean"]) == 60
        and line["side_deviation"] == ""
        and line["against_seeds"] == "0 1 2 3 4 5 6 7 8 9"
    )


def test_every_claim_that_can_be_run_is_judged_from_made_results(monkeypatch):
    monkeypatch.setattr(comparison, "least", lambda *args: (None, ""))
    robust = {"more": (0.6, 0.5), "less": (0.4, 0.5), "no more": (0.4, 0.5), "same": (0.5, 0.5)}
    for claim in CLAIMS:
        if claim.rows and claim.measure == "robust" and not isinstance(claim.against, float):
            sides = zip(claim.rows, robust[claim.expects])
            models = {rows.run_name(row): baselines(accuracy, 3) for row, accuracy in sides}
            found = claim_verdicts.judge(MANIFEST, claim, models).compared
            assert found.verdict == "shown", claim
