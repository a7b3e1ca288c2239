"""The page asks for nothing, says what the files say, and shows as text whatever they hold."""

import html.parser
import itertools
import json
import re

import numpy as np
import pytest

from robust_keras.commands import report
from robust_keras.reports import contents, document, markdown, page
from tests.reports import made_folders


class Parsed(html.parser.HTMLParser):
    """Tags with their attributes, text, and whether every element is closed."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open, self.titles = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]

    @property
    def words(self):
        return re.sub(r"\s+", " ", "".join(self.text))


def parsed(text):
    found = Parsed(text)
    assert found.open == []
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The report of a run with an evaluation that has everything, and what was written."""
    folder = tmp_path_factory.mktemp("run")
    run = made_folders.run(folder / "at")
    _, images = made_folders.evaluation(folder / "at" / "eval", warnings=["zero_gradients", "square_beats_white_box"])
    made_folders.security(folder / "at" / "eval")
    return document.read([run], load_images=lambda dataset: images)


def test_the_page_asks_for_nothing(whole):
    text = page.of(whole)
    found = parsed(text)
    attributes = [(tag, name, value) for tag, each in found.tags for name, value in each.items()]
    links = [
        value for _, name, value in attributes if name in ("src", "href", "xlink:href", "srcset", "data", "action")
    ]
    assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert not {tag for tag, _ in found.tags} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
        "audio",
        "video",
    }
    assert not [name for _, name, _ in attributes if name.startswith("on")]
    assert not re.search(r"@import|url\((?!#)", text)
    (policy,) = [each["content"] for each in found.all("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and "script" not in policy and "http" not in policy


def test_identifiers_are_of_one_thing_and_lead_to_it(whole):
    found = parsed(page.of(whole))
    ids = [each["id"] for _, each in found.tags if "id" in each]
    assert len(ids) == len(set(ids))
    targets = [each["href"][1:] for _, each in found.tags if each.get("href", "").startswith("#")]
    targets += [
        name for _, each in found.tags for name in re.findall(r"url\(#([^)]+)\)", " ".join(filter(None, each.values())))
    ]
    assert len(targets) > 20 and set(targets) <= set(ids)


def test_the_page_can_be_read_without_seeing_it(whole):
    found = parsed(page.of(whole))
    assert found.tags[0] == ("html", {"lang": "en"}) and len(found.all("title")) == len(found.all("h1")) == 1
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in itertools.pairwise(levels))
    images = found.all("svg") + found.all("img")
    assert len(found.all("svg")) == 6 and len(found.all("img")) == 24
    assert all(len(each.get("aria-label") or each["alt"]) > 10 for each in images)
    assert all(each.get("scope") in ("col", "row") for each in found.all("th"))
    assert len(found.all("caption")) == len(found.all("table"))


def test_the_numbers_are_those_of_the_files(whole):
    words = parsed(page.of(whole)).words
    for told in (
        "Of 60 images of made (the first of its part test), the model m gets 85.00 % right as they are, and 55.00 %",
        "after apgd-ce and square changed them within Linf 8/255.",
        "Whether these images were used to train the model",
        "Whether an attack made for this very model would break more",
        "it is after more attacks. The noise of each radius is drawn by itself",
        "results.json last modified (by the file system)",
        "95 % interval 42.49 to 66.91 %",
        "Linf 8/255",
        "wrong as they are15.00 %85.00 %",
        "apgd-ce20.00 %65.00 %",
        "square10.00 %55.00 %",
        "400 of 500 steps",
        "step 300: 60.00 % right on the images held out, 37.50 % under the validation attack",
        "8/25555.00 %80.00 %",
        "FAILED",
        "not measured",
        "The curve reaches 0 at 32/255.",
        "zero_gradients",
        "trust attacks that need none (Square), a transfer or another loss",
        "gradients are masked: the true accuracy is lower still",
        "0" * 64,
    ):
        assert told in words, told


def test_a_class_has_its_own_numbers(tmp_path):
    folder, _ = made_folders.evaluation(tmp_path / "eval", num=200)
    with np.load(tmp_path / "eval" / "examples.npz") as arrays:
        of = arrays["label"] == 3
        clean = (arrays["clean_prediction"] == 3)[of].mean()
        robust, taken = arrays["robust"][of].mean(), (arrays["adversarial_prediction"] == 4)[of].sum()
    found = document.read([folder])
    (by_class,) = [block for block in found.blocks if block.title == ("By class",)]
    plot, confusion = by_class.blocks
    row = next(line for line in plot.numbers.lines if line[0] == "3")
    assert row[1:4] == ("20", f"{100 * clean:.1f} %", f"{100 * robust:.1f} %")
    assert confusion.lines[0][5] == "4" and confusion.lines[4][0] == "3" and confusion.lines[4][5] == str(taken)
    assert sum(int(cell) for line in confusion.lines[1:] for cell in line[1:]) == 200


def test_many_classes_and_none_that_is_known(tmp_path):
    folder, _ = made_folders.evaluation(tmp_path / "eval", num=200)
    with np.load(tmp_path / "eval" / "examples.npz") as arrays:
        arrays = dict(arrays)
    arrays |= {
        name: arrays[name] + 1000 * (np.arange(200) % 30)
        for name in ("label", "clean_prediction", "adversarial_prediction")
    }
    np.savez(tmp_path / "eval" / "examples.npz", **arrays)
    words = parsed(page.html([folder])).words
    assert "Of 30 classes, the 10 with the lowest and the highest robust accuracy" in words
    assert "most often, of" in words


@pytest.mark.parametrize("broken, wrong", [((0, 0), 0), ((60, 0), 0), ((0, 0), 60)])
def test_all_right_all_broken_all_wrong(tmp_path, broken, wrong):
    folder, images = made_folders.evaluation(tmp_path / "eval", broken=broken, wrong=wrong)
    found = parsed(page.html([folder], load_images=lambda dataset: images))
    assert f"{100.0 if not wrong and not sum(broken) else 0.0:.2f} %" in found.words
    assert ("No attack broke an image" in found.words) == (not sum(broken))


def test_what_is_not_there_is_said(tmp_path):
    folder, _ = made_folders.evaluation(tmp_path / "eval", robust_accuracy_after=[], dataset=None, versions=None)
    with np.load(tmp_path / "eval" / "examples.npz") as arrays:
        old = {
            name: arrays[name] for name in ("index", "label", "clean_prediction", "robust", "broken_by", "adversarial")
        }
    np.savez(tmp_path / "eval" / "examples.npz", **old)
    words = parsed(page.html([folder])).words
    assert (
        "taken for what under attack is not recorded" in words and "this report was made without the data set" in words
    )
    assert "Not measured: how accuracy falls with the radius" in words
    (tmp_path / "eval" / "examples.npz").unlink()
    assert "there is no examples.npz" in parsed(page.html([folder])).words


def words_of(folder, **changes):
    made, _ = made_folders.evaluation(folder, **changes)
    return parsed(page.html([made])).words


def record(name, **parameters):
    counts = {"num_steps": 200, "num_restarts": 10, "num_targets": 9, "num_queries": 5000}
    return {"name": name, "parameters": {**counts, **parameters}}


AA_MT = ["apgd-ce", "apgd-dlr", "multi-targeted"]


def test_which_images_it_was(tmp_path):
    of = {"name": "made", "split": "test", "num_examples": None}
    assert "of made (all of its part test), the model" in words_of(tmp_path / "all", dataset=of)
    words = words_of(tmp_path / "held_out", dataset={**of, "split": "train", "held_out": 60})
    assert "(all of the 60 images that the run holds out, and chooses its weights by, of its part train)" in words
    assert "the run chose its weights by the 60 that it held out" in words and "split train, held_out 60" in words
    assert "Whether these images were used" not in words


def test_attacks_without_gradients_are_not_said_to_know_them(tmp_path):
    attacks = [record("square"), record("transfer", surrogate="other.keras")]
    words = words_of(tmp_path / "black", changed={"attacks": attacks})
    assert "The attacks saw no gradients of the model. Images of transfer were made for other.keras." in words
    assert "Whether an attack with gradients breaks more" in words and "knows the model" not in words
    words = words_of(tmp_path / "white", changed={"attacks": [record(n) for n in AA_MT]})
    assert "The attacker knows the model and its gradients." in words and "with gradients breaks more" not in words


@pytest.mark.parametrize(
    "targets, num_classes, warnings, is_full",
    [
        (9, 10, [], True),
        (1, 10, [], False),
        (2, 3, [], True),
        (2, 3, ["fewer_targets_than_classes"], False),
        (9, 100, ["fewer_targets_than_classes"], True),
    ],
)
def test_what_claims_can_rest_on(tmp_path, targets, num_classes, warnings, is_full):
    attacks = [record(name, num_targets=targets) for name in AA_MT]
    changed = {"attacks": attacks, "warnings": warnings}
    folder, _ = made_folders.evaluation(tmp_path / "a", broken=(9, 9, 9), attacks=AA_MT, changed=changed)
    with np.load(tmp_path / "a" / "examples.npz") as arrays:
        arrays = dict(arrays)
    label, of = arrays["label"], arrays["label"] % (num_classes - 1)
    for name in ("label", "clean_prediction", "adversarial_prediction"):
        arrays[name] = np.where(arrays[name] == label, of, num_classes - 1)
    np.savez(tmp_path / "a" / "examples.npz", **arrays)
    words = parsed(page.html([folder])).words
    assert words.count("the usual ground for claims") == 2 * is_full
    assert words.count("with fewer steps, restarts or targets") == 2 * (not is_full)
    assert ("masked gradients, weak attacks" in words) == (is_full and not warnings)


def test_the_settings_of_steps_are_told(tmp_path):
    steps = record("pgd", step_rule="adam(beta_1=0.9)", step_size=0.01, random_start=True)
    words = words_of(tmp_path / "pgd", changed={"attacks": [steps] * 2})
    assert "step rule adam(beta_1=0.9), step size 0.01, from a random start" in words
    assert "(masked gradients, broken outputs) was seen" in words


def test_queries_beside_the_curve_do_not_stand_for_an_attack(tmp_path):
    folder, _ = made_folders.evaluation(tmp_path / "eval", attacks=("pgd", "apgd-ce"))
    made_folders.security(tmp_path / "eval")
    path = tmp_path / "eval" / "security.json"
    found = json.loads(path.read_text())
    found["checks"][2]["passed"] = True
    path.write_text(json.dumps({**found, "attack": "PGD, Square, 500 queries", "num_examples": 40}))
    words = parsed(page.html([folder])).words
    assert "none of these is one; beside the curve Square had 500 queries on 40 images only." in words
    assert "it is of the first 40 of 60 images, and after more attacks" in words


def test_images_that_are_others_are_not_shown(tmp_path):
    folder, (clean, label) = made_folders.evaluation(tmp_path / "eval")
    for images in ((255 - clean, label), (clean, label[::-1]), (clean[:, :4], label)):
        text = page.html([folder], load_images=lambda dataset, images=images: images)
        assert "others than those that were evaluated" in text and "data:image/png" not in text


def test_a_page_of_many_images_is_small(tmp_path):
    folder, images = made_folders.evaluation(tmp_path / "many", num=512, broken=(90, 90), side=32)
    made_folders.security(tmp_path / "many")
    text = page.html([folder] * 2, load_images=lambda dataset: images)
    assert document.MOST_IN_FULL / 2 * len(text) < 3e6 and text.count("data:image/png") == 2 * 24
    assert len(page.html([folder] * 50)) < 1e6
    large, images = made_folders.evaluation(tmp_path / "large", num=20, broken=(9, 9), wrong=0, side=200)
    text = page.html([large], load_images=lambda dataset: images)
    assert len(text) < 2e6 and text.count("data:image/png") == 24 and "Shown smaller, by 2.1" in text


# Text of files that somebody else wrote.


def test_hostile_names_stay_text(tmp_path):
    harm = made_folders.HARM
    run = made_folders.run(tmp_path / "m")
    (tmp_path / "m" / "saved_model").mkdir()
    names = [f"{harm}{k}" for k in range(9)] + ["x" * 10_000]
    (tmp_path / "m" / "saved_model" / "model_card.json").write_text(
        json.dumps({"class_names": names, "versions": {harm: harm}})
    )
    (tmp_path / "m" / "config.gin").write_text(f"DATASET = '{harm}'\n</pre>{harm}\n```\n# heading\n")
    _, images = made_folders.evaluation(
        tmp_path / "m" / "eval",
        attacks=(harm, "<img src=x onerror=alert(1)>"),
        name=f"{harm}/m/saved_model",
        norm=harm,
        epsilon_fraction=harm,
        warnings=[harm],
        versions={harm: harm},
        dataset={"name": harm, "split": harm, "sha256": harm},
    )
    made_folders.security(tmp_path / "m" / "eval")
    path = tmp_path / "m" / "eval" / "security.json"
    path.write_text(path.read_text().replace("Linf", json.dumps(harm)[1:-1]).replace("pgd", json.dumps(harm)[1:-1]))
    report = document.read([run], load_images=lambda dataset: images)
    text, plain = page.of(report), markdown.of(report)
    found = parsed(text)
    assert not {tag for tag, _ in found.tags} & {"script", "a b"} and text.count("<img") == text.count(
        '<img src="data:'
    )
    assert not [name for _, each in found.tags for name in each if name.startswith("on")]
    assert "<script>alert(1)</script>" in found.words
    assert all(each.isprintable() or each == "\n" for each in plain)
    assert all(each.isprintable() or each == "\n" for each in text)
    assert "<script" not in re.sub(r"`[^`]*`|^    .*$", "", plain, flags=re.M)
    assert not re.search(r"(?<!\\)\]\(javascript", re.sub(r"`[^`]*`|^    .*$", "", plain, flags=re.M))


def test_markdown_says_what_the_page_says(whole):
    text = markdown.of(whole)
    assert text.startswith("# At most 55.00 % robust under Linf 8/255: m\n")
    for told in (
        "| apgd-ce",
        "20.00 %",
        "`zero_gradients`",
        "FAILED",
        "## What is not known",
        "`8/255`"[1:-1],
        "image ",
    ):
        assert told in text, told


BAD = {
    "not json": ("results.json", "{", "JSON in .*results.json"),
    "an accuracy of 2": ("results.json", {"clean_accuracy": 2.0}, "results of an evaluation in .*an accuracy"),
    "no number": ("results.json", {"robust_accuracy": float("nan")}, "results of an evaluation in .*an accuracy"),
    "attacks of no name": ("results.json", {"baseline": {"parameters": {}}}, "results of an evaluation in"),
    "a data set of text": ("results.json", {"dataset": "x"}, "results of an evaluation in"),
    "other numbers": ("results.json", {"robust_accuracy": 0.5}, "the robust_accuracy of results.json, 0.5000"),
    "of others": ("results.json", {"num_examples": 61}, "arrays of 61 examples"),
    "no npz": ("examples.npz", "text", "whole npz file"),
    "security of format 2": ("security.json", '{"format": 2}', "security curve in .*security.json"),
    "no security": ("security.json", '{"format": 1, "curve": 3}', "security curve in"),
    "no curve": ("metrics.csv", "a,b\n1,2\n", "rows of metrics in .*no column step"),
    "text in a curve": ("metrics.csv", "step,loss\n1,high\n", "rows of metrics in .*high"),
    "steps that fall": ("metrics.csv", "step,loss\n2,1\n1,1\n", "rows of metrics in .*do not rise"),
    "an accuracy of 5": ("metrics.csv", "step,val_clean\n2,5\n", "rows of metrics in .*val_clean outside"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_line(tmp_path, name):
    file, damage, match = BAD[name]
    folder, _ = made_folders.evaluation(tmp_path / "eval", **(damage if isinstance(damage, dict) else {}))
    if isinstance(damage, str):
        (tmp_path / "eval" / file).write_text(damage)
    with pytest.raises(ValueError, match=f"^Expected (.* )?{match}[^\n]*$"):
        page.html([folder])


def test_a_security_curve_of_another_model_is_refused(tmp_path):
    folder, _ = made_folders.evaluation(tmp_path / "eval")
    made_folders.security(tmp_path / "eval", model="1" * 64)
    with pytest.raises(ValueError, match="the security curve of this evaluation in .*security.json"):
        page.html([folder])


def test_a_folder_of_nothing(tmp_path):
    with pytest.raises(ValueError, match=f"Received: {tmp_path}, with neither"):
        contents.read([str(tmp_path)])


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    run = made_folders.run(tmp_path / "run", steps=10)
    with open(tmp_path / "run" / "metrics.csv", "a") as file:
        file.write("11,0.")
    (found,) = contents.read([run]).runs
    assert found.curve["step"].tolist() == list(range(1, 11)) and found.best_step == 300
    assert "There was no validation yet." in page.html([run])


def test_a_link_in_a_run_is_not_followed(tmp_path):
    run = made_folders.run(tmp_path / "run")
    made_folders.evaluation(tmp_path / "private")
    (tmp_path / "run" / "eval").symlink_to(tmp_path / "private")
    assert contents.read([run]).evaluations == ()


# The command.


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["report", *arguments])
    report.command()
    return capsys.readouterr().out


def test_one_folder_gets_its_report_and_nothing_else_changes(monkeypatch, capsys, tmp_path):
    folder, _ = made_folders.evaluation(tmp_path / "eval")
    before = {path.name: path.read_bytes() for path in (tmp_path / "eval").iterdir()}
    for _ in range(2):
        said = command(monkeypatch, capsys, f"--workdir={folder}")
        assert "| m     | 60" in said and f"Report: {folder}/report.html" in said
    after = {path.name: path.read_bytes() for path in (tmp_path / "eval").iterdir()}
    assert after.keys() - before.keys() == {"report.md", "report.html"}
    assert {name: after[name] for name in before} == before
    assert (
        "not at hand" in after["report.html"].decode()
        and "made is no prepared set here" in after["report.html"].decode()
    )


def test_several_folders_get_one_report_where_it_is_to_go(monkeypatch, capsys, tmp_path):
    one, _ = made_folders.evaluation(tmp_path / "one")
    two, _ = made_folders.evaluation(tmp_path / "two", broken=(20, 10))
    said = command(monkeypatch, capsys, f"--workdir={one}", f"--workdir={two}")
    assert "--output=FOLDER" in said and not list(tmp_path.rglob("report.*"))
    flags = [f"--workdir={one}", f"--baseline={two}", f"--output={tmp_path / 'both'}"]
    said = command(monkeypatch, capsys, *flags)
    (told,) = [line for line in said.splitlines() if line.startswith("robust: ")]
    text = (tmp_path / "both" / "report.html").read_text()
    assert told.removeprefix("robust: ") in parsed(text).words
    assert "Images, threat model and attacks are the same for all." in text


def test_the_images_are_where_the_user_says(monkeypatch, capsys, tmp_path):
    folder, (images, labels) = made_folders.evaluation(tmp_path / "eval", dataset={"name": "npz:/etc/passwd"})
    np.savez(tmp_path / "images.npz", image=images, label=labels)
    command(monkeypatch, capsys, f"--workdir={folder}")
    assert "npz:/etc/passwd is no prepared set here" in (tmp_path / "eval" / "report.html").read_text()
    command(monkeypatch, capsys, f"--workdir={folder}", f"--dataset=npz:{tmp_path / 'images.npz'}")
    assert "data:image/png" in (tmp_path / "eval" / "report.html").read_text()
    before = (tmp_path / "eval" / "report.html").read_bytes()
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, capsys, f"--workdir={folder}", "--dataset=npz:none.npz")
    assert ended.value.code == 2 and "none.npz" in capsys.readouterr().err
    assert (tmp_path / "eval" / "report.html").read_bytes() == before


def test_a_report_is_written_over_no_link(monkeypatch, capsys, tmp_path):
    folder, _ = made_folders.evaluation(tmp_path / "eval")
    (tmp_path / "private").write_text("private")
    (tmp_path / "eval" / "report.html").symlink_to(tmp_path / "private")
    with pytest.raises(SystemExit):
        command(monkeypatch, capsys, f"--workdir={folder}")
    assert (tmp_path / "private").read_text() == "private"
