"""What one sees of a run: in TensorBoard each step once, whatever was interrupted; in a terminal one line."""

import collections
import contextlib
import csv
import io
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.plugins.hparams import plugin_data_pb2

from robust_keras.data import sources
from robust_keras.training import hyper_parameters, progress, recipes, tensorboard_events, validation
from tests.training.train_test import NUM_STEPS, tiny_data, tiny_run, tiny_settings


def events(folder):
    """(step, summary value) of all event files of a run."""
    for path in sorted((folder / "events").iterdir()):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(record)
            for value in event.summary.value:
                yield event.step, value


def tags(folder):
    found = collections.defaultdict(list)
    for step, value in events(folder):
        found[value.tag].append(step)
    return dict(found)


@pytest.fixture(scope="module")
def log():
    """What the run said, whose stderr is a file."""
    return io.StringIO()


@pytest.fixture(scope="module")
def run(tmp_path_factory, log):
    workdir = tmp_path_factory.mktemp("run")
    with contextlib.redirect_stderr(log):
        tiny_run(workdir, progress=True)
    return workdir


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_has_whole_lines(run, log):
    assert "\r" not in log.getvalue()
    begin, *validations = log.getvalue().splitlines()
    assert begin == f"Step 0 of {NUM_STEPS}: the first step compiles"
    assert [line.partition(":")[0] for line in validations] == ["Step 3", f"Step {NUM_STEPS}"]
    assert all("val_robust_averaged" in line and "; best weights averaged " in line for line in validations)
    assert " left; " in validations[0] and " left" not in validations[1]


def test_a_validation_leaves_a_picture_and_margins(run):
    values = {(value.tag, step): tf.make_ndarray(value.tensor) for step, value in events(run)}
    with open(run / "metrics.csv") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file) if row["val_clean"]}
    assert rows.keys() == {3, NUM_STEPS}
    for step, row in rows.items():
        width, height, *pictures = values["images/clean_adversarial_difference", step]
        assert (int(width), int(height), len(pictures)) == (80, 30, 1)  # 8 x 3 images of 8 x 8 with a frame each.
        picture = tf.io.decode_png(pictures[0]).numpy()
        for k, image in enumerate(tiny_data().validation.images):
            np.testing.assert_array_equal(picture[1:9, 10 * k + 1 : 10 * k + 9], image)
        assert np.abs(picture[10:20].astype(int) - picture[:10]).max() > 0
        difference = picture[21:29].reshape(8, 8, 10, 3)[:, :, 1:9]
        assert {0, 255} & {*np.unique(difference).tolist()}
        for ending in ("", "_averaged"):
            for name in ("clean", "robust"):
                buckets = values[f"margins/{name}{ending}", step]
                assert buckets[:, 2].sum() == 8
                right = float(row[f"val_{name}{ending}"]) * 8
                assert buckets[buckets[:, 0] > 0, 2].sum() <= right <= buckets[buckets[:, 1] >= 0, 2].sum()


def test_the_run_is_told_apart_by_what_it_was_told(run):
    (value,) = [value for _, value in events(run) if value.tag.startswith("_hparams_")]
    content = plugin_data_pb2.HParamsPluginData.FromString(value.metadata.plugin_data.content)
    found = {name: each.string_value or each.number_value for name, each in content.session_start_info.hparams.items()}
    recipe = tiny_settings().recipe
    assert found == {**hyper_parameters.of(recipe), "seed": 0.0}
    assert {name: found[name] for name in ("norm", "objective", "batch_size", "train_steps", "tau")} == {
        "norm": "L2",
        "objective": "adversarial_training",
        "batch_size": 8,
        "train_steps": NUM_STEPS,
        "tau": 0.9,
    }
    assert found["epsilon"] == pytest.approx(128 / 255)


def test_without_an_attack_in_training_the_radius_is_that_of_validation():
    found = hyper_parameters.of(tiny_settings(attack=None, tau=None).recipe)
    assert found["norm"] == "L2" and "tau" not in found and "attack_steps" not in found


@pytest.mark.oldest
def test_a_run_that_was_killed_writes_no_step_twice_and_a_terminal_has_one_line(run, monkeypatch, tmp_path):
    whole = tags(run)
    assert whole["loss"] == list(range(1, NUM_STEPS + 1)) and whole["margins/robust"] == [3, NUM_STEPS]
    killed = tmp_path / "killed"
    shutil.copytree(run, killed)
    for path in (killed / "checkpoints").glob(f"step-{NUM_STEPS:08d}*"):
        path.unlink()
    (path,) = (killed / "events").iterdir()
    with open(path, "ab") as file:
        file.write(b"the beginning of a record")
    terminal = Terminal()
    monkeypatch.setattr(progress, "_TERMINAL", 0.0)
    with contextlib.redirect_stderr(terminal):
        tiny_run(killed, progress=True)
    assert len(list((killed / "events").iterdir())) == 2
    assert {**tags(killed), "examples_per_second": []} == {**whole, "examples_per_second": []}
    check_line(terminal.getvalue())


def check_line(said):
    """What a terminal was sent by a run that goes on from step 3."""
    parts = [part.strip() for part in said.replace("\n", "\r").split("\r") if part.strip()]
    lines = [part for part in parts if part.startswith("Step ")]
    assert [line.partition(":")[0] for line in lines] == [f"Step {NUM_STEPS}"] and "best" not in lines[0]
    bars = [part for part in parts if not part.startswith("Step ")]
    assert bars[0].startswith("50%") and "3/6, the first step compiles, robust " in bars[0]
    assert any("5/6, more than 00:0" in bar for bar in bars)
    assert any("6/6, validating, " in bar for bar in bars)
    assert bars[-1].startswith("100%") and "6/6, robust " in bars[-1] and ", loss " in bars[-1]
    assert ", averaged " in bars[-1] and ", best weights averaged " in bars[-1] and said.endswith("\n")


def test_a_run_that_begins_anew_leaves_no_event_of_before(run, tmp_path):
    shutil.copytree(run / "events", tmp_path / "events")
    tensorboard_events.cut_off(str(tmp_path / "events"), 0)
    assert list((tmp_path / "events").iterdir()) == []


@pytest.mark.parametrize(
    "tail",
    [b"begun", b"\xff" * 12, (5).to_bytes(8, "little") + b"abcd" + b"\xff" * 9],
    ids=["torn", "vast", "no event"],
)
def test_what_is_no_event_is_cut_off_with_what_follows(run, tmp_path, tail):
    (path,) = (run / "events").iterdir()
    whole, copy = path.read_bytes(), tmp_path / path.name
    for step in (NUM_STEPS, 3):
        copy.write_bytes(whole + tail)
        tensorboard_events.cut_off(str(tmp_path), step)
        assert whole.startswith(copy.read_bytes()) and (copy.stat().st_size == len(whole)) == (step == NUM_STEPS)
    before = copy.stat().st_mtime_ns
    tensorboard_events.cut_off(str(tmp_path), 3)
    assert copy.stat().st_mtime_ns == before and copy.stat().st_size > 0


def test_a_link_among_the_events_is_refused(tmp_path):
    (tmp_path / "private").write_bytes(b"private")
    os.symlink(tmp_path / "private", tmp_path / "a.tfevents.b")
    for step in (0, 3):
        with pytest.raises(ValueError, match="a symbolic link"):
            tensorboard_events.cut_off(str(tmp_path), step)
    assert (tmp_path / "private").read_bytes() == b"private"


@pytest.mark.parametrize("num_steps, every", [(6, 3), (100, 1), (100_000, 1), (78_125, 1000), (12_345, 7)])
def test_a_long_run_is_pictured_a_hundred_times(num_steps, every):
    validated = [step for step in range(1, num_steps + 1) if step % every == 0 or step == num_steps]
    due = [step for step in validated if tensorboard_events.is_due(step, num_steps, every)]
    assert due[-1] == num_steps and len(due) <= 101
    assert len(due) >= min(len(validated), 50)


@pytest.mark.parametrize("shape, few", [((32, 32, 3), 8), ((224, 224, 3), 5), ((600, 600, 1), 1)])
def test_large_images_are_pictured_less_often(tiny_model, shape, few):
    source = sources.Source("made", np.zeros((20, *shape), np.uint8), np.zeros(20, np.int32), 4)
    how = recipes.Validation(lambda: None)
    made = validation.Validator(tiny_model, None, source, how, batch_size=4, seed=0)
    assert made.pictured.shape == (few, *shape)


@pytest.mark.parametrize("channels, pictures", [(1, 1), (2, 0), (3, 1), (4, 0)])
def test_what_is_drawn_of_images_of_any_kind(tmp_path, channels, pictures):
    images = np.full((2, 5, 7, channels), 51, np.uint8)
    adversarial = np.float32(images / 255)
    adversarial[0, 0, 0], adversarial[1, 0, 0], adversarial[1, 1, 1] = 0.3, 0.15, np.nan
    seen = validation.Seen(np.float32([np.nan, 1]), np.float32([np.inf, -np.inf]), adversarial)
    (tmp_path / "events").mkdir()
    with tf.summary.create_file_writer(str(tmp_path / "events")).as_default(step=1):
        tensorboard_events.write_validation(images, {"": seen})
    found = {value.tag: tf.make_ndarray(value.tensor) for _, value in events(tmp_path)}
    assert found["margins/clean"][:, 2].sum() == 1 and found["margins/robust"][:, 2].sum() == 0
    assert len(found) == 2 + pictures
    if pictures:
        picture = tf.io.decode_png(found["images/clean_adversarial_difference"][2]).numpy()
        assert picture.shape == (21, 18, channels)
        np.testing.assert_array_equal(picture[1:6, 1:8], images[0])
        assert (picture[15, 1] == 191).all() and (picture[15, 10] == 96).all() and (picture[16, 1] == 128).all()
        assert (picture[9, 11] == 0).all() and (picture[16, 11] == 0).all()  # No number counts as black.
