"""What is attached to an export: a manifest of every file, and the program that checks it."""

import json
import pathlib
import subprocess
import sys

import pytest

from robust_keras.saved_models import claims, export, load, verify


@pytest.fixture
def attached(tmp_path, linear):
    folder = tmp_path / "exported"
    export.export(linear, folder, card={})
    claims.attach(folder)
    return folder


def test_the_manifest_lists_every_file(attached):
    listed = [file["name"] for file in json.loads((attached / "manifest.json").read_text())["files"]]
    files = sorted(path.relative_to(attached).as_posix() for path in attached.rglob("*") if path.is_file())
    assert listed == [name for name in files if name != "manifest.json"]
    assert {"model_card.json", "verify.py", "saved_model.pb"} <= set(listed)
    before = (attached / "manifest.json").read_bytes()
    claims.attach(attached)
    assert (attached / "manifest.json").read_bytes() == before


def test_the_model_stays_the_same(attached, tmp_path):
    (tmp_path / "plain").mkdir()
    for path in attached.rglob("*"):
        if path.is_file() and path.name not in ("manifest.json", "verify.py"):
            copy = tmp_path / "plain" / path.relative_to(attached)
            copy.parent.mkdir(exist_ok=True, parents=True)
            copy.write_bytes(path.read_bytes())
    assert load.fingerprint(attached) == load.fingerprint(tmp_path / "plain")


def edited_card(folder):
    (folder / "model_card.json").write_text('{"val_robust": 0.99}')


def swapped_weights(folder):
    path = folder / "variables" / "variables.data-00000-of-00001"
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))


def extra_file(folder):
    (folder / "assets").mkdir(exist_ok=True)
    (folder / "assets" / "more").write_text("")


def missing_file(folder):
    (folder / "variables" / "variables.index").unlink()


def linked_file(folder):
    (folder / "model_card.json").rename(folder.parent / "card")
    (folder / "model_card.json").symlink_to(folder.parent / "card")


def linked_folder(folder):
    (folder / "variables").rename(folder.parent / "variables")
    (folder / "variables").symlink_to(folder.parent / "variables")


def another_form(folder):
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text().replace("\n", "\n\n", 1))


def no_manifest(folder):
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    "tamper",
    [edited_card, swapped_weights, extra_file, missing_file, linked_file, linked_folder, another_form, no_manifest],
)
def test_the_manifest_shows(tamper, attached):
    assert verify.check_manifest(pathlib.Path(attached)).endswith("manifest.json")
    tamper(attached)
    with pytest.raises(ValueError, match="^Expected .* Received: "):
        verify.check_manifest(pathlib.Path(attached))


def test_the_copy_needs_nothing_of_this_package(attached):
    command = [sys.executable, "-I", str(attached / "verify.py")]
    found = subprocess.run(command, cwd=attached.parent, capture_output=True, text=True, timeout=100)
    assert found.returncode == 0, found.stderr
    edited_card(attached)
    found = subprocess.run(command, cwd=attached.parent, capture_output=True, text=True, timeout=100)
    assert found.returncode == 1 and "model_card.json" in found.stderr
