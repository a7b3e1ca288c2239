import io
import json

import numpy as np
import pytest

from robust_keras.commands import report
from robust_keras.evaluation import comparison, pictures
from robust_keras.evaluation import report as reporting
from robust_keras.evaluation import results as evaluation

FIRST = {
    "num_examples": 1000,
    "clean_accuracy": 0.8529,
    "robust_accuracy": 0.572,
    "norm": "Linf",
    "epsilon": 8 / 255,
    "epsilon_fraction": "8/255",
    "attacks": [{"name": "apgd-ce"}, {"name": "multi-targeted"}],
    "confidence_interval_95": [0.541119, 0.602321],
    "model": {"path": "runs/at/saved_model", "sha256": "0" * 64},
}
SECOND = {
    **FIRST,
    "num_examples": 7,
    "clean_accuracy": 1.0,
    "robust_accuracy": 0.0,
    "norm": "L2",
    "epsilon_fraction": "0.5",
    "attacks": [{"name": "pgd"}],
    "confidence_interval_95": [0.0, 0.35433],
    "model": {"path": "m.keras", "sha256": "1" * 64},
}
TABLE = """\
| model               | examples | threat model | attacks                 | clean    | robust (upper bound) | 95 % interval    |
|---------------------|----------|--------------|-------------------------|----------|----------------------|------------------|
| runs/at/saved_model | 1000     | Linf 8/255   | apgd-ce, multi-targeted | 85.29 %  | 57.20 %              | 54.11 to 60.23 % |
| m.keras             | 7        | L2 0.5       | pgd                     | 100.00 % | 0.00 %               | 0.00 to 35.43 %  |"""


def test_table_of_two_evaluations(tmp_path):
    for name, results in (("one", FIRST), ("two", SECOND)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    workdirs = [str(tmp_path / "one"), str(tmp_path / "two")]
    results = reporting.read_results(workdirs)
    assert results == [{**FIRST, "workdir": workdirs[0]}, {**SECOND, "workdir": workdirs[1]}]
    assert reporting.table(results) == TABLE


def test_order_is_as_given():
    reverse = reporting.table([SECOND, FIRST]).splitlines()
    lines = TABLE.splitlines()
    assert reverse == [*lines[:2], lines[3], lines[2]]


def test_unfinished_evaluation(tmp_path):
    (tmp_path / "examples.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=f"Received: {tmp_path}, without results.json"):
        reporting.read_results([str(tmp_path)])


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "3",
        "{}",
        json.dumps({**FIRST, "attacks": [3]}),
        json.dumps({**FIRST, "confidence_interval_95": [0.1]}),
        json.dumps({**FIRST, "clean_accuracy": "high"}),
        json.dumps({**FIRST, "model": {}}),
    ],
)
def test_what_is_no_results_is_one_line_that_names_the_file(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^Expected .* in {path}. Received: [^\n]+$"):
        reporting.read_results([str(tmp_path)])


@pytest.mark.parametrize("damage", ["missing", "truncated", "other names", "text"])
def test_what_is_no_examples_is_one_line_that_names_the_file(tmp_path, damage):
    (workdir,) = evaluations(tmp_path, [[True, False]], [[True, True]], np.arange(2))
    path = tmp_path / "0" / "examples.npz"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "other names":
        np.savez(path, index=0)
    else:
        path.write_text("index")
    with pytest.raises(ValueError, match=f"^Expected the examples of an evaluation in {path}. Received: [^\n]+$"):
        reporting.examples(workdir)


def evaluations(folder, robust, clean, index):
    """Folders of evaluations, one for each line of bool `[seeds, images]`."""
    for seed, (stands, is_right) in enumerate(zip(robust, clean)):
        (folder / str(seed)).mkdir(parents=True)
        shares = {"clean_accuracy": float(np.mean(is_right)), "robust_accuracy": float(np.mean(stands))}
        results = {**FIRST, "num_examples": len(index), **shares}
        (folder / str(seed) / "results.json").write_text(json.dumps(results))
        label = np.arange(len(index)) % 10
        np.savez(
            folder / str(seed) / "examples.npz",
            index=index,
            label=label,
            clean_prediction=np.where(is_right, label, (label + 1) % 10),
            robust=stands,
            adversarial=np.zeros((len(index), 2, 2, 1), np.float32),
        )
    return [str(folder / str(seed)) for seed in range(len(robust))]


def test_evaluations_are_compared_pair_by_pair_on_the_same_images(monkeypatch, capsys, tmp_path):
    random = np.random.default_rng(0)
    robust, clean = random.random((2, 2, 300)) < np.array([0.6, 0.8])[:, None, None]
    worse, same = robust & (random.random((2, 300)) < 0.5), clean.copy()
    ours = evaluations(tmp_path / "ours", robust, clean, np.arange(300))
    others = evaluations(tmp_path / "others", worse, same, np.arange(300))
    found = reporting.compare_evaluations(ours, others)
    assert found == {
        "clean": comparison.compare(clean, same),
        "robust": comparison.compare(robust, worse),
    }
    assert found["robust"].interval[0] > 0.05 and found["clean"].difference == 0
    flags = [*(f"--workdir={path}" for path in ours), *(f"--baseline={path}" for path in others)]
    monkeypatch.setattr("sys.argv", ["report", *flags])
    report.command()
    assert f"robust: {comparison.summary(found['robust'])}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="a baseline for each of 2 evaluations. Received: 1"):
        reporting.compare_evaluations(ours, others[:1])
    moved = evaluations(tmp_path / "moved", worse, same, np.arange(1, 301))
    with pytest.raises(ValueError, match="Received: others in .*moved"):
        reporting.compare_evaluations(ours, moved)


def test_nothing_is_told_of_a_model_at_chance(monkeypatch, capsys, tmp_path):
    images = np.arange(300)
    right, guessed = (images < 200)[None], (images < 31)[None]
    ours = evaluations(tmp_path / "ours", right, right, images)
    others = evaluations(tmp_path / "others", guessed, guessed, images)
    assert reporting.at_chance([*ours, *others]) == others
    monkeypatch.setattr("sys.argv", ["report", f"--workdir={ours[0]}", f"--baseline={others[0]}"])
    report.command()
    said = capsys.readouterr().out
    assert f"robust: no difference can be told: at chance on clean images {others[0]}\n" in said
    assert "clean: +56.3 points" in said


# Text of files that somebody else wrote.

_HARM = "a|b\n<img src=x onerror=alert(1)>\x1b]0;title\x07 [link](javascript:x) \N{RIGHT-TO-LEFT OVERRIDE} $\\frac{$"


@pytest.mark.parametrize("text", [_HARM, "|" * 500, "\r", "\N{LINE SEPARATOR}", "\x00", "\ud800"])
def test_a_table_holds_text_as_text(text):
    table = reporting.markdown([["model", "attacks"], [text, "pgd"]])
    assert len(table.splitlines()) == 3 and all(line.isprintable() for line in table.splitlines())
    assert "<" not in table and "](" not in table
    header, _, row = table.splitlines()
    assert row.replace("\\|", "").count("|") == header.count("|") == 3


def test_a_summary_and_a_picture_hold_names_as_text():
    results = {
        "num_examples": 3,
        "norm": f"Linf{_HARM}",
        "epsilon_fraction": "$8/255",
        "clean_accuracy": 1.0,
        "robust_accuracy": 0.5,
        "robust_accuracy_after": [{"attack": _HARM, "robust_accuracy": 0.5}],
        "confidence_interval_95": [0.1, 0.9],
        "attacks": [{"name": _HARM}],
        "warnings": ["\x1b[2J"],
    }
    lines = evaluation.summary(results).split("\n")
    assert len(lines) == 5 and all(line.isprintable() for line in lines)
    pictures.chart(results).savefig(io.BytesIO())  # matplotlib would take what is between dollars for a formula.
