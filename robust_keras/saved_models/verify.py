"""Checks a SavedModel against what is claimed of it. It needs TensorFlow and NumPy, and nothing of robust_keras.

    python -m robust_keras.saved_models.verify exported
    python exported/verify.py

The second form runs the copy that came with the model: whoever can change the model can change that copy.
"""

import hashlib
import json
import os
import pathlib
import stat
import sys

MANIFEST, PROGRAM = "manifest.json", "verify.py"


def manifest_text(files: list[dict]) -> str:
    """The one way in which a manifest is written, of `name`, `bytes` and `sha256` of each file."""
    manifest = {"format": 1, "files": sorted(files, key=lambda file: file["name"])}
    return json.dumps(manifest, indent=1, sort_keys=True) + "\n"


def check_manifest(folder: pathlib.Path) -> str:
    """Compares every file below a folder with its manifest.

    Raises:
        ValueError: for a file that is missing, is too many, differs, or is a link or no regular file.
    """
    found = dict(_files(folder))
    path = found.pop(MANIFEST, None)
    if path is None:
        raise ValueError(f"Expected {MANIFEST}. Received: {folder} without one")
    text = path.read_text()
    listed = json.loads(text)["files"]
    if text != manifest_text(listed):
        raise ValueError(f"Expected {MANIFEST} as it is written. Received: another form of it")
    names = [file["name"] for file in listed]
    if sorted(found) != names:
        raise ValueError(f"Expected the files of {MANIFEST}. Received: {sorted(set(found) ^ set(names))} differ")
    for file in listed:
        content = found[file["name"]].read_bytes()
        if (len(content), hashlib.sha256(content).hexdigest()) != (file["bytes"], file["sha256"]):
            raise ValueError(f"Expected {file['name']} as in {MANIFEST}. Received: another content")
    return f"{len(listed)} files are those of {MANIFEST}"


def _files(folder):
    for root, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = pathlib.Path(root, name)
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                yield path.relative_to(folder).as_posix(), path
            elif not stat.S_ISDIR(mode):
                raise ValueError(f"Expected regular files. Received: {name!r}, a link or a special file")


def main(arguments: list[str]) -> int:
    """Checks the folder that is named, or in which this file lies; 0 where all is as claimed, else 1."""
    folder = pathlib.Path(arguments[0] if arguments else pathlib.Path(__file__).parent)
    try:
        print(check_manifest(folder))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
