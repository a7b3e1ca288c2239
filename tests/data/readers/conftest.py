"""As on Windows: a file that this process has open, or mapped into memory, cannot be removed."""

import os
import pathlib
import shutil

import pytest


def in_use():
    """The files that this process has open or mapped."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:  # That of the list itself.
            continue
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        found += line.split(maxsplit=5)[5:]
    return [
        path for path in found if not os.path.basename(path).startswith("in_use")
    ]  # A lock, which POSIX removes so.


@pytest.fixture(autouse=True)
def no_file_is_removed_while_it_is_in_use(monkeypatch):
    def checked(function):
        def call(path, *args, **kwargs):
            if kwargs.get("dir_fd") is None:
                whole = os.path.realpath(path)
                held = [each for each in in_use() if each == whole or each.startswith(f"{whole}{os.sep}")]
                assert not held, f"{held} removed while in use"
            return function(path, *args, **kwargs)

        return call

    if os.path.isdir("/proc/self/fd"):
        for module, name in ((os, "remove"), (os, "unlink"), (shutil, "rmtree")):
            monkeypatch.setattr(module, name, checked(getattr(module, name)))
