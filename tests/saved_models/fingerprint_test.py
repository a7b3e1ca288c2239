"""The SHA-256 of a model's files: what is the model counts, where it lies does not."""

import hashlib
import os
import shutil

import pytest
import tensorflow as tf

from robust_keras.saved_models import export, load, safety


@pytest.fixture(scope="module")
def exported(tmp_path_factory, linear):
    path = str(tmp_path_factory.mktemp("export") / "saved_model")
    export.export(linear, path, card={})
    return path


def test_fingerprint_by_hand(tmp_path):
    (tmp_path / "variables").mkdir()
    (tmp_path / "variables" / "index").write_bytes(b"one")
    (tmp_path / "saved_model.pb").write_bytes(b"two")
    lines = [f"{hashlib.sha256(b'two').hexdigest()}  saved_model.pb\n"]
    lines += [f"{hashlib.sha256(b'one').hexdigest()}  variables/index\n"]
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert load.fingerprint(tmp_path) == load.fingerprint(f"{tmp_path}/") == expected
    in_memory = "ram://export_test/model"
    tf.io.gfile.makedirs(f"{in_memory}/variables")
    for name, content in (("variables/index", b"one"), ("saved_model.pb", b"two")):
        with tf.io.gfile.GFile(f"{in_memory}/{name}", "wb") as file:
            file.write(content)
    assert load.fingerprint(in_memory) == expected


def test_fingerprint_is_of_the_model_and_not_of_its_card(exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    original = load.fingerprint(exported)
    assert load.fingerprint(copy) == original
    (copy / "model_card.json").write_text("{}")
    assert load.fingerprint(copy) == original
    (copy / "model_card.json").unlink()
    assert load.fingerprint(copy) == original
    variables = copy / "variables" / "variables.data-00000-of-00001"
    content = bytearray(variables.read_bytes())
    content[len(content) // 2] ^= 1
    variables.write_bytes(content)
    assert load.fingerprint(copy) != original
    content[len(content) // 2] ^= 1
    variables.write_bytes(content)
    assert load.fingerprint(copy) == original
    variables.rename(copy / "variables" / "other")
    assert load.fingerprint(copy) != original


def test_fingerprint_of_a_file(tmp_path):
    path = tmp_path / "model.keras"
    path.write_bytes(b"one")
    line = f"{hashlib.sha256(b'one').hexdigest()}  model.keras\n"
    assert load.fingerprint(path) == hashlib.sha256(line.encode()).hexdigest()
    path.write_bytes(b"two")
    assert load.fingerprint(path) != hashlib.sha256(line.encode()).hexdigest()


def test_a_model_that_was_moved_is_the_same(exported, tmp_path, monkeypatch):
    original = load.fingerprint(exported)
    moved = shutil.copytree(exported, tmp_path / "elsewhere" / "under another name")
    (tmp_path / "link").symlink_to(moved)
    monkeypatch.chdir(moved.parent)
    for path in (moved, f"{moved}/", f"{moved}//", "under another name", "./under another name/", tmp_path / "link"):
        assert load.fingerprint(path) == original


def test_links_are_refused_and_count_as_what_they_point_to_in_a_trusted_model(exported, tmp_path):
    original = load.fingerprint(exported)
    stored = shutil.copytree(exported, tmp_path / "stored")
    model = tmp_path / "model"
    model.mkdir()
    for path in stored.iterdir():
        (model / path.name).symlink_to(path)
    with pytest.raises(ValueError, match="Expected regular files below a folder. Received: .*, a symbolic link"):
        load.fingerprint(model)
    with safety.trusting():
        assert load.fingerprint(model) == original


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes in folders")
def test_a_pipe_is_refused_and_not_waited_for(exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    os.mkfifo(copy / "assets" / "pipe")
    for is_trusted in (False, True):
        with safety.trusting(is_trusted), pytest.raises(ValueError, match="Received: assets/pipe, a pipe"):
            load.fingerprint(copy)
    os.mkfifo(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=r"model.keras, a pipe"):
        load.fingerprint(tmp_path / "model.keras")


def test_an_asset_is_part_of_the_model_whatever_its_name(exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "assets").mkdir(exist_ok=True)
    (copy / "assets" / "model_card.json").write_text("{}")
    assert load.fingerprint(copy) != load.fingerprint(exported)


def test_what_a_command_leaves_beside_a_model_is_no_part_of_it(exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "claims").mkdir()
    for name in ("in_use.json", "unfinished", "MODEL_CARD.md", "manifest.json", "verify.py", "claims/claims.json"):
        (copy / name).write_text("{}")
    assert load.fingerprint(copy) == load.fingerprint(exported)
    # Further down such a file may be anything.
    (copy / "assets").mkdir(exist_ok=True)
    (copy / "assets" / "verify.py").write_text("{}")
    assert load.fingerprint(copy) != load.fingerprint(exported)


def test_the_name_of_a_file_counts_but_not_its_folder(tmp_path):
    for path in ("one/model.keras", "two/model.keras", "one/other.keras"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"one")
    one, two, other = (
        load.fingerprint(tmp_path / p) for p in ("one/model.keras", "two/model.keras", "one/other.keras")
    )
    assert one == two != other


def test_fingerprint_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="Received: .*missing"):
        load.fingerprint(tmp_path / "missing")
