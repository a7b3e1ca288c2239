"""Files that somebody else made."""

import os
import socket

import pytest

from robust_keras import foreign_files


def make(kind, path):
    if kind == "link":
        path.with_name("elsewhere").write_text("private")
        os.symlink(path.with_name("elsewhere"), path)
    elif kind == "dangling link":
        os.symlink(path.with_name("nowhere"), path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        os.symlink("/dev/zero", path)
    elif kind == "folder":
        path.mkdir()
    else:
        server = socket.socket(socket.AF_UNIX)
        here = os.getcwd()
        os.chdir(path.parent)  # A socket's path is short.
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)
            server.close()


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "device", "folder", "socket"])
def test_what_is_no_regular_file_is_refused_before_it_is_opened(tmp_path, kind):
    make(kind, tmp_path / "file")
    for function in (foreign_files.check_regular, foreign_files.open_regular):
        with pytest.raises(ValueError, match="Expected a regular file. Received: .*file, a"):
            function(tmp_path / "file")
    if kind != "folder":
        with pytest.raises(ValueError, match="Received: file, a"):
            list(foreign_files.regular_files(tmp_path))


def test_a_link_that_the_user_typed_is_followed_to_a_regular_file_alone(tmp_path):
    make("link", tmp_path / "file")
    with foreign_files.open_regular(tmp_path / "file", follow=True) as file:
        assert file.read() == b"private"
    make("device", tmp_path / "zero")
    with pytest.raises(ValueError, match="a device"):
        foreign_files.open_regular(tmp_path / "zero", follow=True)


def test_files_have_a_largest_size(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    foreign_files.check_regular(tmp_path / "file", most_bytes=5)
    foreign_files.check_regular(tmp_path / "nothing", most_bytes=5)
    with pytest.raises(ValueError, match="at most 4 bytes. Received: .* of 5"):
        foreign_files.open_regular(tmp_path / "file", most_bytes=4)


def test_files_below_a_folder_are_sorted_and_counted(tmp_path, monkeypatch):
    for name in ("b", "a/z", "a/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert [name for name, _ in foreign_files.regular_files(tmp_path)] == ["a/c", "a/z", "b"]
    monkeypatch.setattr(foreign_files, "MOST_FILES", 2)
    with pytest.raises(ValueError, match="at most 2 files"):
        list(foreign_files.regular_files(tmp_path))


def test_text_of_files_stays_on_its_line_and_steers_nothing():
    assert foreign_files.printable("a name, ein Name, 名前") == "a name, ein Name, 名前"
    assert foreign_files.printable("a\nb\x1b[31m\u202ec\u2028d\u200b") == "a\\nb\\x1b[31m\\u202ec\\u2028d\\u200b"
    assert foreign_files.printable("x" * 300, most=3) == "xxx..."


@pytest.mark.parametrize(
    "path, local",
    [
        ("/data/x.npz", "/data/x.npz"),
        ("x", "x"),
        ("file:///data/x", "/data/x"),
        ("gs://bucket/x", None),
        ("ram://x", None),
        ("s3+https://x", None),
        ("/data/a://b", "/data/a://b"),
    ],
)
def test_local_path(path, local):
    assert foreign_files.local_path(path) == local


def test_a_link_is_one_by_its_other_name_too(tmp_path):
    make("link", tmp_path / "file")
    for function in (foreign_files.check_regular, foreign_files.open_regular):
        with pytest.raises(ValueError, match="a symbolic link"):
            function(f"file://{tmp_path}/file")
    with pytest.raises(ValueError, match="a symbolic link"):
        list(foreign_files.regular_files(f"file://{tmp_path}"))
