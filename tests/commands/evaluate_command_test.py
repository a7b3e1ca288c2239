"""Evaluations as a user types them, of a tiny network: going on, and folders of others."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from command_line import call, failed, refused

from robust_keras import ownership, storage, threats
from robust_keras.commands import evaluate, model_cards
from robust_keras.evaluation import batching, security
from robust_keras.saved_models import export as exporting

ROOT = pathlib.Path(__file__).parents[2]
FEW = {
    "evaluate.attacks": "[@pgd40/pgd(), @apgd(), @square()]",
    "apgd.threat": "@threat()",
    "square.threat": "@threat()",
    "pgd40/pgd.num_steps": "2",
    "apgd.num_steps": "15",
    "apgd.num_restarts": "2",
    "square.num_queries": "1000",
    "evaluate.batch_size": "4",
    "evaluate.diagnose": "False",
    "evaluate.progress": "False",
    "evaluate.save_every": "0",
    "EPSILON": "'2/255'",
}
ONLY_PGD = {name: value for name, value in FEW.items() if not name.startswith(("apgd", "square", "evaluate.attacks"))}


@pytest.fixture(scope="module")
def network(make_tiny_model, tmp_path_factory):
    """A SavedModel, and an npz file of 12 images with its predictions on them, of which two are made wrong."""
    folder = tmp_path_factory.mktemp("network")
    model = make_tiny_model()
    exporting.export(model, folder / "saved_model", card={})
    image = np.random.RandomState(1).randint(0, 256, (12, 8, 8, 3)).astype(np.uint8)
    label = np.argmax(model(image / np.float32(255), training=False), axis=-1)
    label[[3, 8]] = (label[[3, 8]] + 1) % 4
    np.savez(folder / "images.npz", image=image, label=label)
    return folder


def evaluation_of(network, workdir, *extra, **changes):
    return [
        f"--saved_model={network}/saved_model",
        f"--dataset=npz:{network}/images.npz",
        "--gin_file=gin/eval/pgd40.gin",
        f"--workdir={workdir}",
        *[f"--gin_param={name} = {value}" for name, value in {**FEW, **changes}.items()],
        *extra,
    ]


def quick_evaluation_of(network, workdir, *extra):
    arguments = evaluation_of(network, workdir, *extra)
    others = tuple(f"--gin_param={name} " for name in FEW if name not in ONLY_PGD)
    return [argument for argument in arguments if not argument.startswith(others)]


def measured(workdir):
    """Results without seconds, and the arrays of examples.npz."""
    results = json.loads((workdir / "results.json").read_text())
    for record in results["attacks"]:
        del record["seconds"]
    with np.load(workdir / "examples.npz") as arrays:
        return results, dict(arrays)


def assert_measured_alike(one, other):
    (results, examples), (other_results, other_examples) = measured(one), measured(other)
    assert results == other_results
    assert examples.keys() == other_examples.keys()
    for name, array in other_examples.items():
        np.testing.assert_array_equal(examples[name], array, err_msg=name)


def interrupt(monkeypatch, network_arguments, num_calls):
    """An evaluation that breaks off after so many looks."""
    left = [num_calls]
    with monkeypatch.context() as patch:
        for kind in (batching.Packing, batching.Batchwise):

            def advance(self, whole=kind.advance):
                if left[0] == 0:
                    raise KeyboardInterrupt
                left[0] -= 1
                return whole(self)

            patch.setattr(kind, "advance", advance)
        with pytest.raises(KeyboardInterrupt):
            call(patch, evaluate, *network_arguments)


@pytest.mark.slow
def test_a_killed_evaluation_continues_to_the_same_result(monkeypatch, capsys, network, tmp_path):
    arguments = evaluation_of(network, tmp_path / "killed")
    process = subprocess.Popen(
        [sys.executable, "-u", ROOT / "scripts" / "evaluate.py", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # Anywhere in one of the three attacks.
    num_saves = int(np.random.default_rng().integers(1, 18))
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if max(storage.steps(tmp_path / "killed" / "state"), default=0) >= num_saves:
            break
        time.sleep(0.002)
    process.kill()
    output = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, (num_saves, output)
    assert not (tmp_path / "killed" / "results.json").exists()
    capsys.readouterr()
    call(monkeypatch, evaluate, *arguments)
    assert capsys.readouterr().out.startswith("Resuming from attack"), num_saves
    call(monkeypatch, evaluate, *evaluation_of(network, tmp_path / "whole"))
    assert_measured_alike(tmp_path / "killed", tmp_path / "whole")
    results, _ = measured(tmp_path / "whole")
    assert 0 < results["robust_accuracy"] < results["clean_accuracy"]
    assert sorted(os.listdir(tmp_path / "killed")) == ["config.gin", "examples.npz", "results.json"]


def test_individual_evaluation(monkeypatch, network, tmp_path):
    call(monkeypatch, evaluate, *evaluation_of(network, tmp_path, "--individual"))
    results, examples = measured(tmp_path)
    assert results["individual"] is True
    section = (
        (ROOT / "docs" / "evaluation.md").read_text().partition("## What the results say")[2].partition("\n## ")[0]
    )
    explained = set(re.findall(r"`(\w+)`", section))
    assert results.keys() | results["attacks"][0].keys() | examples.keys() | {"seconds"} <= explained
    assert [record["examples_attacked"] for record in results["attacks"]] == [10] * 3
    assert results["clean_accuracy"] == 10 / 12
    assert results["robust_accuracy"] == examples["robust"].mean()


def test_another_subject_in_a_begun_workdir_is_refused(monkeypatch, capsys, network, tmp_path):
    workdir = tmp_path / "run"
    interrupt(monkeypatch, quick_evaluation_of(network, workdir), 2)
    capsys.readouterr()
    for extra, named in (
        (["--num_examples=5"], ["with dataset.num_examples = None, not 5"]),
        (["--individual"], ["with individual = False, not True"]),
        (["--input_range=0,255"], ["with model.input_range = [0.0, 1.0], not [0.0, 255.0]"]),
        (["--outputs=probabilities"], ["with model.outputs = logits, not probabilities"]),
        (["--gin_param=EPSILON = '3/255'"], ["2/255", "3/255"]),
    ):
        line = refused(monkeypatch, capsys, evaluate, *quick_evaluation_of(network, workdir, *extra))
        assert "another" in line
        for text in named:
            assert text in line
    # Nor did any of them do harm.
    call(monkeypatch, evaluate, *quick_evaluation_of(network, workdir, "--gin_param=evaluate.save_every = 5"))
    assert capsys.readouterr().out.startswith("Resuming from attack 1 of 1")
    assert measured(workdir)[0]["num_examples"] == 12
    line = refused(monkeypatch, capsys, evaluate, *quick_evaluation_of(network, workdir, "--individual"))
    assert "individual = False, not True" in line


@pytest.mark.parametrize("name", ["state/subject.json", "config.gin", "results.json"])
def test_an_evaluation_killed_while_it_wrote_a_file_goes_on(monkeypatch, capsys, network, tmp_path, name):
    arguments = quick_evaluation_of(network, tmp_path)
    interrupt(monkeypatch, arguments, 2)
    (tmp_path / name).write_text("")  # Opened, and not written yet.
    call(monkeypatch, evaluate, *arguments)
    assert measured(tmp_path)[0]["num_examples"] == 12


def test_a_finished_evaluation_is_of_the_model_wherever_it_is(monkeypatch, capsys, network, tmp_path):
    shutil.copytree(network, tmp_path / "network")
    call(monkeypatch, evaluate, *quick_evaluation_of(tmp_path / "network", tmp_path / "run"))
    (tmp_path / "network").rename(tmp_path / "moved")
    for path in (f"{network}/saved_model/", tmp_path / "moved" / "saved_model"):
        arguments = quick_evaluation_of(network, tmp_path / "run", f"--saved_model={path}")
        arguments = [each.replace(f"{network}/images.npz", f"{tmp_path}/network/images.npz") for each in arguments]
        capsys.readouterr()
        call(monkeypatch, evaluate, *arguments)
        assert capsys.readouterr().out.startswith("Already finished")


def test_an_interrupted_evaluation_goes_on_with_the_model_wherever_it_is(monkeypatch, capsys, network, tmp_path):
    arguments = quick_evaluation_of(network, tmp_path / "run")
    interrupt(monkeypatch, arguments, 2)
    shutil.copytree(network / "saved_model", tmp_path / "moved")
    (tmp_path / "run").rename(tmp_path / "renamed")
    call(monkeypatch, evaluate, *arguments, f"--saved_model={tmp_path}/moved/", f"--workdir={tmp_path}/renamed/")
    assert "Resuming from attack 1 of 1" in capsys.readouterr().out
    assert measured(tmp_path / "renamed")[0]["num_examples"] == 12


def test_an_evaluation_of_an_older_version_goes_on(monkeypatch, capsys, network, tmp_path):
    arguments = quick_evaluation_of(network, tmp_path)
    interrupt(monkeypatch, arguments, 2)
    subject = json.loads((tmp_path / "state" / "subject.json").read_text())
    (tmp_path / "state" / "subject.json").write_text(json.dumps(subject))  # On one line.
    call(monkeypatch, evaluate, *arguments)
    assert sorted(os.listdir(tmp_path)) == ["config.gin", "examples.npz", "results.json"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name: results[name] for name in subject} == subject
    named = {"path", "sha256", "input_range", "input_layout", "outputs", "logits_output"}
    assert results["model"].keys() == named


def test_two_evaluations_in_one_folder(monkeypatch, capsys, network, tmp_path):
    arguments = quick_evaluation_of(network, tmp_path)
    with ownership.lock(tmp_path, what="another command"):
        assert "in use by process" in refused(monkeypatch, capsys, evaluate, *arguments)
        assert os.listdir(tmp_path) == ["in_use.json"]


def with_images(arguments, path):
    return [f"--dataset=npz:{path}" if each.startswith("--dataset=") else each for each in arguments]


def interrupted_before_a_move(monkeypatch, network, tmp_path):
    """(workdir, moved, other, arguments) of an interrupted evaluation, a copy of its images, and others of that form."""
    workdir, moved, other = tmp_path / "run", tmp_path / "moved.npz", tmp_path / "other.npz"
    shutil.copy(network / "images.npz", moved)
    with np.load(moved) as arrays:
        np.savez(other, image=arrays["image"], label=arrays["label"][::-1])
    arguments = quick_evaluation_of(network, workdir)
    interrupt(monkeypatch, arguments, 2)
    return workdir, moved, other, arguments


def test_images_are_the_same_wherever_they_are(monkeypatch, capsys, network, tmp_path):
    workdir, moved, other, arguments = interrupted_before_a_move(monkeypatch, network, tmp_path)
    named = f"dataset.name = npz:{network}/images.npz, not npz:{other}"
    assert named in refused(monkeypatch, capsys, evaluate, *with_images(arguments, other))
    call(monkeypatch, evaluate, *with_images(arguments, moved))
    assert "Resuming from attack 1 of 1" in capsys.readouterr().out
    call(monkeypatch, evaluate, *arguments)
    assert capsys.readouterr().out.startswith("Already finished")
    line = refused(monkeypatch, capsys, evaluate, *with_images(arguments, other))
    assert f"dataset.name = npz:{moved}, not npz:{other}" in line
    results = json.loads((workdir / "results.json").read_text())
    del results["dataset"]["sha256"]  # As an older version wrote it, which did not know.
    (workdir / "results.json").write_text(json.dumps(results))
    assert "dataset.name" in refused(monkeypatch, capsys, evaluate, *arguments)
    call(monkeypatch, evaluate, *with_images(arguments, moved))


def test_images_of_an_older_versions_state_are_the_same_wherever_they_are(monkeypatch, capsys, network, tmp_path):
    workdir, moved, other, arguments = interrupted_before_a_move(monkeypatch, network, tmp_path)
    subject = json.loads((workdir / "state" / "subject.json").read_text())
    del subject["dataset"]["sha256"]
    (workdir / "state" / "subject.json").write_text(json.dumps(subject))
    assert f"not npz:{other}" in refused(monkeypatch, capsys, evaluate, *with_images(arguments, other))
    call(monkeypatch, evaluate, *with_images(arguments, moved))
    assert "Resuming from attack 1 of 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "config, said",
    [
        ("threat.norm = 'Linf'\nthreat.epsilon = %EPSILON\nEPSILON = '2/255'\n", None),
        ("threat.norm = 'Linf'\nthreat.epsilon = '4/510'\n", None),
        ("threat.norm = 'Linf'\nthreat.epsilon = '8/255'\n", "Linf 8/255"),
        ("threat.norm = 'Linf'\nthreat.epsilon = '2/255'\ntraining/threat.epsilon = '2.2/255'\n", "Linf 2.2/255"),
        ("threat.norm = 'L2'\nthreat.epsilon = '2/255'\n", "L2 2/255"),
        ("threat.epsilon = 3", None),
        ("no gin", None),
        (None, None),
        ([], None),
    ],
)
def test_a_card_of_another_threat_model_is_told_of(tmp_path, config, said):
    (tmp_path / "model_card.json").write_text(json.dumps(config if config == [] else {"config": config}))
    line = model_cards.another_threat(str(tmp_path), threats.threat(norm="Linf", epsilon="2/255"))
    told = f"The model's card is for {said}; the attacks here are of Linf 2/255, as NORM and EPSILON say"
    assert line == (told if said else None)


def test_models_without_a_card(tmp_path):
    (tmp_path / "file.keras").write_bytes(b"")
    for name in ("none", "none.keras", "file.keras"):
        assert model_cards.another_threat(str(tmp_path / name), threats.threat(norm="Linf", epsilon=0.1)) is None


def test_a_keras_file_is_measured_as_its_export(monkeypatch, network, tmp_path, make_tiny_model):
    path = tmp_path / "model.keras"
    make_tiny_model().save(path)
    verdicts = []
    for model in (path, network / "saved_model"):
        workdir = tmp_path / f"of_{model.name}"
        arguments = quick_evaluation_of(network, workdir)
        arguments = [a for a in arguments if not a.startswith("--saved_model")] + [f"--saved_model={model}"]
        call(monkeypatch, evaluate, *arguments)
        verdicts.append(measured(workdir)[1]["broken_by"])
    np.testing.assert_array_equal(*verdicts)


def test_a_command_tells_of_it_and_goes_on(monkeypatch, capsys, network, tmp_path):
    monkeypatch.setattr(model_cards, "another_threat", lambda path, threat: f"{path} at {threat.epsilon_fraction}")
    call(monkeypatch, evaluate, *quick_evaluation_of(network, tmp_path))
    assert f"{network}/saved_model at 2/255" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name", ["state/subject.json", "config.gin", "results.json"])
@pytest.mark.parametrize("text", ["no json", '{"model": 3}', "[1]", "[]", "{}", "0", "\udcff"])
def test_a_malformed_file_of_an_evaluation_is_one_line_that_names_it(
    monkeypatch, capsys, network, tmp_path, name, text
):
    arguments = quick_evaluation_of(network, tmp_path)
    interrupt(monkeypatch, arguments, 1)
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    line = refused(monkeypatch, capsys, evaluate, *arguments)
    assert f"{tmp_path}/{name}" in line and "Error" not in line


def test_an_error_in_the_middle_of_an_evaluation_keeps_its_traceback(monkeypatch, capsys, network, tmp_path):
    arguments = quick_evaluation_of(network, tmp_path)

    def break_down(*args, **kwargs):
        raise ValueError("it broke")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", break_down)  # At the first save.
        line = failed(patch, capsys, evaluate, *arguments)
    assert line == f"error: it broke; the traceback is in {tmp_path}/error.txt"
    call(monkeypatch, evaluate, *arguments)
    assert sorted(os.listdir(tmp_path)) == ["config.gin", "examples.npz", "results.json"]


@pytest.mark.parametrize(
    "gin_file, changes, message",
    [
        ("autoattack", {"autoattack.version": "'custom'", "autoattack.attacks": "['apgd-ce', 'foo']"}, "foo"),
        ("autoattack", {"autoattack.version": "'custom'", "autoattack.attacks": "'square'"}, "'square'"),
        ("autoattack", {"autoattack.version": "'custom'"}, "None"),
        ("autoattack", {"autoattack.version": "'foo'"}, "foo"),
        ("autoattack", {"autoattack.attacks": "['square']"}, "custom"),
        ("autoattack", {"EPSILON": "'foo'"}, "foo"),
        ("pgd40", {"EPSILON": "'foo'"}, "foo"),
        ("aa_mt", {"EPSILON": "'-1/255'"}, "-1/255"),
        ("aa_mt", {"NORM": "'L3'"}, "L3"),
        ("autoattack", {"apgd.num_steps": "3"}, "apgd.num_steps"),
    ],
)
def test_bad_attacks_are_refused(monkeypatch, capsys, network, tmp_path, gin_file, changes, message):
    line = refused(
        monkeypatch, capsys, evaluate, f"--saved_model={network}/saved_model", f"--dataset=npz:{network}/images.npz",
        f"--gin_file=gin/eval/{gin_file}.gin", f"--workdir={tmp_path}/eval",
        *[f"--gin_param={name} = {value}" for name, value in changes.items()],
    )  # fmt: skip
    assert message in line
    assert not (tmp_path / "eval").exists()


def test_a_folder_of_images_that_differ_in_size(monkeypatch, capsys, network, tmp_path):
    """The first of them, resized once; another size is another evaluation."""
    for k in range(40):
        path = tmp_path / "set" / "val" / f"class {k % 4}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = np.random.RandomState(k).randint(0, 256, (9 + k % 3, 9 + k % 2, 3)).astype(np.uint8)
        path.write_bytes(tf.io.encode_png(image).numpy())

    given = [f"--dataset=images:{tmp_path}/set", "--num_examples=12", f"--cache_dir={tmp_path}/cache"]
    arguments = quick_evaluation_of(network, tmp_path / "results", *given)
    assert "Expected an image_size, to which images" in refused(monkeypatch, capsys, evaluate, *arguments)
    for _ in range(2):
        call(monkeypatch, evaluate, *arguments, "--image_size=8", "--short_side=9")
    said = capsys.readouterr().out
    assert said.count("Converting ") == 1 and "Already finished" in said
    results, examples = measured(tmp_path / "results")
    assert [results["dataset"][name] for name in ("num_examples", "image_size", "short_side")] == [12, 8, 9]
    assert set(examples["label"]) == {0, 1, 2, 3} and examples["adversarial"].shape == (12, 8, 8, 3)
    assert os.listdir(tmp_path / "cache") and os.listdir(tmp_path / "set") == ["val"]
    assert "short_side" in refused(monkeypatch, capsys, evaluate, *arguments, "--image_size=8")


def test_a_security_curve_is_added_to_what_has_finished(monkeypatch, capsys, network, tmp_path):
    call(monkeypatch, evaluate, *quick_evaluation_of(network, tmp_path))
    written, given = (tmp_path / "results.json").read_text(), []
    made = {"format": 1, "norm": "Linf", "num_examples": 12, "attack": "made", "curve": [], "random_noise": []}
    made |= {"checks": [{"name": "more_steps_no_worse", "passed": False, "told": "see here"}], "told": "all of it"}

    def measure(logits_fn, source, **options):
        given.append(options)
        return made

    monkeypatch.setattr(security, "measure", measure)
    capsys.readouterr()
    call(monkeypatch, evaluate, *quick_evaluation_of(network, tmp_path, "--security_curve"))
    assert "FAILED: more_steps_no_worse: see here\nall of it" in capsys.readouterr().out
    found = json.loads((tmp_path / "security.json").read_text())
    assert {name: found[name] for name in made} == made
    results = json.loads(written)
    digests = {"model": results["model"]["sha256"], "images": results["dataset"]["sha256"]}
    assert found["subject"] == {**digests, "norm": "Linf", "epsilon": 2 / 255, "seed": 0}
    assert given[0]["threat"].epsilon == 2 / 255 and given[0]["evaluated"]["broken_by"].shape == (12,)
    call(monkeypatch, evaluate, *quick_evaluation_of(network, tmp_path, "--security_curve"))
    assert "Already there" in capsys.readouterr().out and len(given) == 1
    assert (tmp_path / "results.json").read_text() == written
    found["subject"]["model"] = "of another"
    storage.write_json(str(tmp_path / "security.json"), found)
    line = refused(monkeypatch, capsys, evaluate, *quick_evaluation_of(network, tmp_path, "--security_curve"))
    assert "Expected the security curve of this evaluation" in line and line.endswith("Received: of another")
    # A radius of zero has no larger ones, and is refused before any work.
    nothing = quick_evaluation_of(network, tmp_path / "zero", "--security_curve", "--gin_param=EPSILON = 0")
    assert "radius epsilon > 0 for a security curve" in refused(monkeypatch, capsys, evaluate, *nothing)
