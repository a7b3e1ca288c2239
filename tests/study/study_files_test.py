"""The file that holds a study: one's own is read, and a malformed one is refused by its line."""

import re

import pytest

from robust_keras.study import rows as study

HEADER = "table,row,setting,kind,recipe,bindings,baseline,clean,clean_spread,pgd40,robust,robust_spread"
AT = "1,AT,cifar10,baseline,at.gin,,,84.85,1.20,,50.80,0.23"


def test_read_a_study_of_ones_own(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(f"{HEADER}\n{AT}\n11,new,cifar10,ours,at.gin; data/x.gin,TAU = 0.9; f.x = '=',1:AT,,,,7,\n")
    first, second = study.read(path)
    assert first == study.Row(1, "AT", "cifar10", "baseline", ("at.gin",), (), "", 84.85, 1.2, None, 50.8, 0.23)
    assert second[3:7] == ("ours", ("at.gin", "data/x.gin"), ("TAU = 0.9", "f.x = '='"), "1:AT")
    assert second[7:] == (None, None, None, 7.0, None, False)


@pytest.mark.parametrize(
    "line, message",
    [
        ("1,AT,80mti", "as many cells as columns in line 3 of mine.csv. Received: 3"),
        ("one,B,80mti,ours,at.gin,,,,,,,", "Expected the number of a table in line 3 of mine.csv. Received: 'one'"),
        ("1,,80mti,ours,at.gin,,,,,,,", "the name of a row in line 3"),
        ("1,B,80m,ours,at.gin,,,,,,,", "a setting out of cifar10, 80mti in line 3 of mine.csv. Received: '80m'"),
        ("1,B,80mti,our,at.gin,,,,,,,", "a kind out of baseline, ours, reference in line 3"),
        ("1,B,80mti,ours,at,,,,,,,", "Expected gin files in line 3 of mine.csv. Received: 'at'"),
        ("1,B,80mti,ours,../at.gin,,,,,,,", "Expected gin files in line 3"),
        ("1,B,80mti,ours,,,,,,,,", "Expected a recipe for a row of the kind ours in line 3"),
        ("1,B,80mti,reference,at.gin,,,,,,,", "Expected no recipe for a row of the kind reference in line 3"),
        ("1,B,80mti,ours,at.gin,TAU: 0.9,,,,,,", "Expected bindings NAME = VALUE in line 3"),
        ("1,B,80mti,ours,at.gin,TAU = ,,,,,,", "Expected bindings NAME = VALUE in line 3"),
        ("1,B,80mti,ours,at.gin,TAU = 0.9; ,,,,,,", "Expected bindings NAME = VALUE in line 3"),
        ("1,B,80mti,ours,at.gin,TAU = 0.9; TAU = 0.8,,,,,,", "Expected each name bound once in line 3"),
        ("1,B,80mti,reference,,TAU = 0.9,,,,,,", "Expected no bindings without a recipe in line 3"),
        ("1,B,cifar10,baseline,at.gin,,AT,,,,,", "Expected no baseline for a row of the kind baseline in line 3"),
        ("1,B,80mti,ours,at.gin,,,high,,,,", "Expected percent numbers in line 3 of mine.csv. Received: 'high'"),
        ("1,B,80mti,ours,at.gin,,,,,,nan,", "Expected percent numbers in line 3 of mine.csv. Received: 'nan'"),
        ("1,B,80mti,ours,at.gin,,,101,,,,", "Expected percent numbers in line 3 of mine.csv. Received: '101'"),
        ("1,B,80mti,ours,at.gin,,,,,-1,,", "Expected percent numbers in line 3 of mine.csv. Received: '-1'"),
        ("1,B,80mti,ours,at.gin,,,,,,50.8*,", "Expected percent numbers in line 3 of mine.csv. Received: '50.8*'"),
        ("1,B,80mti,reference,,,,50.8*,,,,", "Expected percent numbers in line 3 of mine.csv. Received: '50.8*'"),
        (AT, "Expected each row once. Received: Table 1, AT, cifar10 twice"),
        ("1,B,80mti,ours,at.gin,,AT,,,,,", "as baseline of Table 1, B, 80mti. Received: 'AT'"),
        ("2,B,cifar10,ours,at.gin,,AT,,,,,", "as baseline of Table 2, B, cifar10. Received: 'AT'"),
        (
            "1,R,80mti,reference,,,,,,,,\n1,B,80mti,ours,at.gin,,R,,,,,",
            "Expected a baseline that can be run for Table 1, B, 80mti. Received: 'R'",
        ),
        (
            "1,B,80mti,ours,at.gin,SEED = '1/2',,,,,,\n1,C,80mti,ours,at.gin,SEED = '1_2',,,,,,",
            "Expected one configuration named at-seed=1_2. Received: another, Table 1, C, 80mti",
        ),
    ],
)
def test_malformed_lines(tmp_path, line, message):
    path = tmp_path / "mine.csv"
    path.write_text(f"{HEADER}\n{AT}\n{line}\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        study.read(path)


@pytest.mark.parametrize("header", ["", HEADER.replace("recipe", "file"), f"{HEADER},notes"])
def test_other_columns(tmp_path, header):
    path = tmp_path / "mine.csv"
    path.write_text(f"{header}\n{AT}\n")
    with pytest.raises(ValueError, match=re.escape(f"Expected the columns {HEADER} in mine.csv. Received: {header}")):
        study.read(path)
