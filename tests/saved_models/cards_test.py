"""Cards for people: text of others changes nothing on the page."""

import pytest

from robust_keras.saved_models import cards

HOSTILE = "</code><script>x</script> | `a` [b](http://c) ![d](e)\n# f\x1b[31m ‮g"


def test_text_of_others_stays_code_on_its_line(linear):
    card = {**cards.described(linear, gradient=False), "versions": {HOSTILE: HOSTILE}, "name": HOSTILE}
    plain = cards.readable(card | {"name": "n", "versions": {"v": "1"}})
    threat = {"norm": HOSTILE, "epsilon_fraction": HOSTILE}
    card |= dict.fromkeys(("dataset", "extra_data", "weights", "step", "licence"), HOSTILE)
    card |= {"class_names": [HOSTILE] * 3, "threat_model": threat, "inputs": {HOSTILE: {HOSTILE: HOSTILE}}}
    numbers = {"clean_accuracy": 0.5, "robust_accuracy": 0.4, "confidence_interval_95": [0.3, 0.5], "num_examples": 9}
    told = {"attacks": [{"name": HOSTILE}], "warnings": [{"name": HOSTILE}, HOSTILE], "seed": HOSTILE}
    digests = {"model_sha256": HOSTILE, "results_sha256": HOSTILE}
    card["evaluation"] = numbers | threat | told | digests | {"dataset": {"name": HOSTILE, "split": HOSTILE}}
    card["source"], card["published"] = {"file": HOSTILE, "sha256": HOSTILE}, {"attacks": HOSTILE}
    card["validation"] = {HOSTILE: {"step": HOSTILE, "metrics": {HOSTILE: HOSTILE}}}
    text = cards.readable(card)
    assert text.count("script") > 40 and text.isprintable() is False and "\x1b" not in text and "‮" not in text
    outside = "".join(part for line in text.splitlines() for part in line.split("`")[::2])
    for piece in ("<", "|", "[b]", "http", "!["):
        assert piece not in outside.replace("[0, 1]", "")
    assert [line for line in text.splitlines() if line.startswith("#")][1:] == [
        line for line in plain.splitlines() if line.startswith("#")
    ][1:]


def test_as_many_class_names_as_classes():
    with pytest.raises(ValueError, match="3 class names, one for each output. Received: 2"):
        cards.completed({"class_names": ["a", "b"]}, num_classes=3)


def test_what_was_imported_says_from_where_and_what_others_measured(linear):
    given = {"clean_accuracy": 0.8948, "robust_accuracy": 0.628, "attacks": "AutoAttack"}
    card = {**cards.described(linear, gradient=False), "versions": {}, "published": given}
    text = cards.readable(card | {"source": {"file": "a.pt", "sha256": "ab"}})
    assert "- Imported from: `a.pt`, SHA-256 `ab`" in text
    assert "- Published by others: 89.48 % clean, 62.80 % robust under `AutoAttack`" in text


@pytest.mark.parametrize("validation", [None, {}, [], {"best": 3}, {"best": {"metrics": None}}])
def test_a_card_without_validation(linear, validation):
    card = {**cards.described(linear, gradient=False), "versions": {}, "validation": validation}
    assert "## Validation\n\nNone is known." in cards.readable(card)
