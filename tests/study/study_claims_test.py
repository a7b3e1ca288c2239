"""The claims of the text: the paper's numbers, and configurations that are what the claim says."""

import inspect
import pathlib
import re
import shlex

import pytest

from robust_keras.commands import configuration, train_settings
from robust_keras.data import training_batches
from robust_keras.study import claims, measured, rows

ROOT = pathlib.Path(__file__).parents[2]
PAPER_TEXT = ROOT.parent / "shared" / "reference" / "gowal2020_uncovering_the_limits.txt"
MANIFEST = rows.read()
CLAIMS = claims.read(MANIFEST)
OWN = [(claim, row) for claim in CLAIMS for row in claim.rows if not row.table]

# Typed from the text of Gowal et al. 2020, or reckoned from its tables as it does: cifar10, 80mti; None for no number, and
# where there is no such claim.
PAPER = {
    "wrn-34-20-as-rice": (52.91 - 53.38, None),
    "trades-as-carmon": (None, 59.45 - 59.47),
    "calibration-rice": (53.38 - 53.42, None),
    "calibration-carmon": (None, 59.47 - 59.53),
    "best-after-second-decay": (100 * 75 / 90 - 75, None),
    "trades-beats-at": (51.91 - 50.80, 59.45 - 58.41),
    "mart-does-not-always": (51.93 - 50.80, 58.25 - 58.41),
    "mart-wrn-70-16": (None, 60.63 - 71.08),
    "drop-at-xent": (50.80 - 53.87, 58.41 - 61.46),
    "drop-at-kl": (48.53 - 50.67, 56.89 - 59.49),
    "drop-at-margin": (48.79 - 54.72, -6.35),
    "drop-trades-xent": (52.76 - 54.19, 58.98 - 61.25),
    "drop-trades-kl": (51.91 - 53.85, 59.45 - 61.11),
    "drop-trades-margin": (51.28 - 54.47, 57.82 - 61.37),
    "margin-masks": ((48.79 - 54.72) - (50.80 - 53.87), -6.35 - (58.41 - 61.46)),
    "trades-margin-masks": ((51.28 - 54.47) - (52.76 - 54.19), (57.82 - 61.37) - (58.98 - 61.25)),
    "trades-masks-less": ((51.28 - 54.47) - (48.79 - 54.72), (57.82 - 61.37) + 6.35),
    "trades-beats-at-xent": (52.76 - 50.80, 58.98 - 58.41),
    "trades-beats-at-kl": (51.91 - 48.53, 59.45 - 56.89),
    "trades-beats-at-margin": (51.28 - 48.79, 57.82 - 55.18),
    "at-is-cleaner": (84.85 - 82.74, 90.93 - 88.36),
    "trades-inner-loss": (52.76 - 51.91, 59.45 - 58.98),
    "larger-radius": (51.81 - 50.80, 58.77 - 58.41),
    "larger-radius-clean": (83.60 - 84.85, 89.39 - 90.93),
    "larger-radius-as-trades": (51.81 - 51.91, None),
    "regenerated-500k": (None, 0.71),
    "regenerated-500k-largest": (None, 65.87 - 65.06),
    "200k-to-500k": (None, 1.83),
    "500k-to-1m": (None, -0.23),
    "more-unlabelled": (None, 0.95),
    "less-unlabelled": (None, 56.58 - 58.41),
    "hardly-unlabelled": (None, 51.79 - 50.80),
    "deeper-beats-wider": (0.96, 0.66),
    "larger-is-more-robust": (53.24 - 50.80, 61.14 - 58.41),
    "larger-is-cleaner": (87.22 - 84.85, 92.08 - 90.93),
    "averaging": (1.41, 0.73),
    "averaging-as-trades": (52.10 - 51.91, None),
    "silu": (51.40 - 50.80, 1.13),
    "elu": (49.20 - 50.80, 56.48 - 58.41),
    "softplus": (50.61 - 50.80, 57.83 - 58.41),
    "gelu": (50.66 - 50.80, 59.37 - 58.41),
    "prior-art": (2.69, 6.34),
    "prior-art-equal-size": (2.3, 3.29),
    "prior-art-l2": (73.57 - 69.24, 80.45 - 72.91),
    "prior-art-cifar100": (30.54 - 18.95, 9.28),
    "sixty-percent": (None, 65.87 - 60),
}
# Of these the paper gives no number.
WITHOUT = {
    "fewer-steps",
    "fewer-steps-robust",
    "more-steps",
    "mart-masks",
    "trades-larger-radius",
    "cifar100-extra-data",
}
WITHOUT |= {"smoothing-labelled", "smoothing-unlabelled", "smoothing-both", "averaging-plateau", "averaging-early"}
WITHOUT |= {"beats-models-with-data", "cosine-beyond-wrn-28-10", "cosine-wrn-70-16"}


def one(name, setting="80mti"):
    (claim,) = claims.select(CLAIMS, [name], setting=setting)
    return claim


def test_every_claim_has_the_papers_number():
    found = {(claim.name, claim.setting): claim.paper for claim in CLAIMS}
    expected = {
        (name, setting): number
        for name, numbers in PAPER.items()
        for setting, number in zip(rows.SETTINGS, numbers)
        if number is not None
    }
    assert {key: number for key, number in found.items() if number is not None} == pytest.approx(expected, abs=0.006)
    assert {name for (name, _), number in found.items() if number is None} == WITHOUT


@pytest.mark.skipif(not PAPER_TEXT.exists(), reason="the paper's text is not beside this checkout")
def test_what_the_text_says_in_numbers_stands_in_it():
    text = PAPER_TEXT.read_text()
    said = {claim.paper for claim in CLAIMS if claim.paper is not None and f"{claim.paper:+.2f}%" in text}
    assert said >= {-6.35, 0.71, 1.83, -0.23, 0.95, 0.96, 0.66, 1.41, 0.73, 1.11, 1.13, 2.69, 6.34, 3.29, 9.28}
    for claim in CLAIMS:  # Sentences and notes quote numbers of the paper, with their percent signs.
        for number in re.findall(r"(\d+\.\d+) %", claim.sentence):
            assert number in text, claim.sentence
    for number, name in (("+0.8%", "silu"), ("+7.58%", "prior-art-l2"), ("+1.41%", "averaging")):
        setting = "80mti" if name == "prior-art-l2" else "cifar10"
        assert number in text and number.strip("%") in one(name, setting).note


def test_a_number_is_on_the_side_that_is_expected():
    for claim in CLAIMS:
        if claim.paper is not None and claim.expects in ("more", "less"):
            assert (claim.paper > 0) == (claim.expects == "more"), claim
        elif claim.paper is not None and claim.expects == "no more":
            assert claim.paper < claims.MARGIN, claim


def test_the_papers_rows_differ_by_the_papers_number():
    accuracies = {"robust": lambda row: row.robust, "clean": lambda row: row.clean}
    accuracies["drop40"] = lambda row: row.robust - row.pgd40
    for claim in CLAIMS:
        if claim.paper is None or claim.measure not in accuracies or not all(row.table for row in claim.rows):
            continue
        accuracy = accuracies[claim.measure]
        against = claim.against
        other = 0.0 if against is None else against if isinstance(against, float) else accuracy(against)
        if claim.rows:
            assert claim.paper == pytest.approx(accuracy(claim.side) - other, abs=0.006), claim


def test_kinds():
    for claim in CLAIMS:
        if claim.kind == "not run":
            assert claim.rows == () and claim.note, claim
        elif claim.kind == "reference":
            assert len(claim.rows) == 1 and isinstance(claim.against, float), claim
        else:
            assert claim.rows and all(row.runnable for row in claim.rows), claim
    assert {claim.measure for claim in CLAIMS} == set(measured.MEASURES)


def resolved(row, *params):
    configuration.parse(row.files, [*row.bindings, *params])
    recipe = configuration.resolve(configuration.train).recipe
    assert not configuration.unused_bindings()
    return recipe


@pytest.mark.parametrize("row", {rows.run_name(row): row for _, row in OWN}.values(), ids=rows.run_name)
def test_a_recipe_of_a_claims_own_uses_every_binding_and_is_another(row):
    recipe = resolved(row)
    arguments = inspect.signature(train_settings.train).parameters
    known = inspect.signature(training_batches.batches).parameters
    for binding in row.bindings:
        selector, _, argument = binding.split(" = ")[0].rpartition(".")
        assert selector != "train" or argument in arguments
        assert selector != "batches" or argument in known
    if row.bindings:
        plain = resolved(row._replace(bindings=()))
        assert described(recipe) != described(plain)
    assert study_baseline(row) == ("at_80mti" if row.setting == "80mti" else "at")


def study_baseline(row):
    return rows.run_name(rows.baseline_of(MANIFEST, row))


def described(recipe):
    """What claims change."""
    attack, model = recipe.attack.attack_fn.keywords, recipe.model.keywords
    batches = {name: value for name, value in recipe.batches.keywords.items() if name != "augmentation"}
    rates = [float(recipe.optimizer.learning_rate(step, num_steps=100)) for step in (0, 30, 60, 90)]
    return attack["num_steps"], attack["threat"].epsilon, model["depth"], model["width"], batches, rates


def test_what_recipes_of_their_own_are():
    def batches(name):
        return resolved(one(name).side).batches.keywords

    assert batches("smoothing-labelled")["label_smoothing"] == 0.1 and "extra_label_smoothing" not in batches(
        "smoothing-labelled"
    )
    assert batches("smoothing-unlabelled")["extra_label_smoothing"] == 0.1
    assert {batches("smoothing-both")[f"{kind}label_smoothing"] for kind in ("", "extra_")} == {0.1}
    mart = resolved(one("mart-wrn-70-16").side)
    assert mart.objective.func.__name__ == "mart" and mart.model.keywords["depth"] == 70
    assert mart.model.keywords["width"] == 16 and mart.batches.keywords["batch_size"] == 1024
    assert resolved(one("fewer-steps", "cifar10").side).attack.attack_fn.keywords["num_steps"] < 7
    assert resolved(one("more-steps").side).attack.attack_fn.keywords["num_steps"] > 10
    trades = resolved(one("trades-larger-radius", "cifar10").side)
    assert trades.attack.attack_fn.keywords["threat"].epsilon == pytest.approx(9.6 / 255)
    assert trades.validation.correct_fn.keywords["attack"].keywords["threat"].epsilon == 8 / 255
    cosine = one("cosine-beyond-wrn-28-10")
    for row, ends in ((cosine.side, 0.0), (cosine.against, 0.001)):
        rate = resolved(row).optimizer.learning_rate
        assert float(rate(999_999, num_steps=1_000_000)) == pytest.approx(ends, abs=1e-6)
        assert resolved(row).model.keywords["depth"] == 34


def test_select_says_what_is_nearest():
    assert claims.select(CLAIMS) == CLAIMS
    assert [claim.setting for claim in claims.select(CLAIMS, ["silu"])] == ["cifar10", "80mti"]
    with pytest.raises(
        ValueError, match=r"Expected a claim of cifar10, such as [^,]+, [^,]+, [^,]+; see --list. Received: 200k-to"
    ):
        claims.select(CLAIMS, ["200k-to-500k"], setting="cifar10")
    with pytest.raises(ValueError, match=r"Expected a claim, such as silu, [^,]+, [^,]+; see --list. Received: sillu"):
        claims.select(CLAIMS, ["sillu"])


HEADER = "claim,section,setting,kind,sentence,measure,side,against,expects,paper,note"


@pytest.mark.parametrize(
    "line, message",
    [
        ("a,4,cifar10", "as many cells as columns in line 2 of mine.csv. Received: 3"),
        ("A b,4,cifar10,ours,S,robust,1:AT,,more,,", "a name of a claim in line 2 of mine.csv. Received: 'A b'"),
        ("a,4.x,cifar10,ours,S,robust,1:AT,,more,,", "a section in line 2"),
        ("a,4,c10,ours,S,robust,1:AT,,more,,", "a setting out of cifar10, 80mti in line 2 .* Received: 'c10'"),
        ("a,4,cifar10,our,S,robust,1:AT,,more,,", "a kind out of ours, reference, not run in line 2"),
        ("a,4,cifar10,ours,,robust,1:AT,,more,,", "a sentence in line 2"),
        ("a,4,cifar10,ours,S,robustness,1:AT,,more,,", "a measure out of robust, clean, .* in line 2"),
        ("a,4,cifar10,ours,S,robust,1:AT,,higher,,", "what is expected out of more, less, no more, same in line 2"),
        ("a,4,cifar10,ours,S,robust,,,more,,", "a side of a claim that is run, and of no other in line 2"),
        ("a,4,cifar10,not run,S,robust,1:AT,,more,,", "a side of a claim that is run, and of no other in line 2"),
        ("a,4,cifar10,reference,S,robust,1:AT,,more,,", "a number to compare with in line 2"),
        ("a,4,cifar10,ours,S,robust,1:AT,1:TRADES,more,high,", "a number of the paper in line 2"),
        ("a,4,cifar10,ours,S,robust,1:BT,,more,,", "Expected a row of Table 1 out of .* Received: BT, in line 2"),
        ("a,4,cifar10,ours,S,robust,5:Pang et al. (2020) (WRN-34-20),,more,,", "a row that can be run in line 2"),
        ("a,4,cifar10,ours,S,robust,at.gin; TAU: 1,,more,,", "bindings NAME = VALUE in line 2"),
        ("a,4,cifar10,ours,S,robust,TAU = 1,,more,,", "a recipe for a row of the kind ours in line 2"),
    ],
)
def test_a_malformed_line_is_refused_by_its_number(tmp_path, line, message):
    path = tmp_path / "mine.csv"
    path.write_text(f"{HEADER}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        claims.read(MANIFEST, path)


def test_a_claim_that_is_there_twice_and_other_columns_are_refused(tmp_path):
    path, line = tmp_path / "mine.csv", "a,4,cifar10,ours,S,robust,1:AT,,more,,"
    path.write_text(f"{HEADER}\n{line}\n{line}\n")
    with pytest.raises(ValueError, match="Expected each claim once in a setting. Received: a twice"):
        claims.read(MANIFEST, path)
    path.write_text(f"claim\n{line}\n")
    with pytest.raises(ValueError, match="Expected the columns claim,section,.* Received: claim"):
        claims.read(MANIFEST, path)


def test_the_command_for_cifar100s_extra_images():
    program, script, *words = shlex.split(one("cifar100-extra-data").note)
    assert program == "python"
    assert (ROOT / script).exists()
    given = dict(word.removeprefix("--").split("=", 1) for word in words)
    configuration.parse([given["gin_file"]], [given["gin_param"]])
    pool = configuration.resolve(configuration.label_pool, is_last=False)
    assert pool.recipe.test_set == "cifar100" and all(size % 100 == 0 for size in pool.sets.sizes)
    extra_data = resolved(one("prior-art-cifar100").side).data.keywords["extra_data"]
    assert extra_data.split("/")[0] == "tfrecord:" + given["workdir"].removeprefix(given["data_dir"] + "/")
