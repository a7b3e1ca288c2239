"""The files of an export as a verifier reads them: regular ones, as the manifest lists them, and of bounded size."""

import hashlib
import json
import math
import os
import pathlib
import re
import stat
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

MANIFEST, PROGRAM, CLAIMS, EXAMPLES = "manifest.json", "verify.py", "claims/claims.json", "claims/examples.npz"
CARDS = ("model_card.json", "MODEL_CARD.md")
# What is no part of the model's identity: as of robust_keras.saved_models.load.fingerprint.
BESIDE_THE_MODEL = {MANIFEST, PROGRAM, CLAIMS, EXAMPLES, *CARDS}
OURS = BESIDE_THE_MODEL | {"saved_model.pb", "fingerprint.pb"}
_CODE = {".py", ".pyc", ".pyd", ".so", ".dylib", ".dll", ".pth"}
_VARIABLES = re.compile(r"variables/variables\.(index|data-\d{5}-of-\d{5})")
MOST_FILES, _MOST_TEXT, _MOST_ARRAYS = 10_000, 1 << 24, 1 << 30


def manifest_text(files: list[dict]) -> str:
    """The one way in which a manifest is written, of `name`, `bytes` and `sha256` of each file."""
    manifest = {"format": 1, "files": sorted(files, key=lambda file: file["name"])}
    return json.dumps(manifest, indent=1, sort_keys=True) + "\n"


def check_manifest(folder: pathlib.Path) -> str:
    """Compares every file below a folder with its manifest.

    Raises:
        ValueError: for a file that is missing, is too many, differs, is code, or is a link or no regular file.
    """
    found = dict(files_below(folder))
    path = found.pop(MANIFEST, None)
    if path is None:
        raise ValueError(f"no {MANIFEST}")
    manifest = read_json(path)
    try:
        listed = [{"name": str(f["name"]), "bytes": f["bytes"], "sha256": f["sha256"]} for f in manifest["files"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST} is none") from error
    if path.read_bytes() != manifest_text(listed).encode():
        raise ValueError(f"{MANIFEST} is not as it is written by an export")
    if differ := sorted(set(found) ^ {file["name"] for file in listed}):
        raise ValueError(f"files that are missing, or not listed in {MANIFEST}: {', '.join(differ[:5])}")
    for file in listed:
        path = found[file["name"]]
        if (path.stat().st_size, sha256_of(path)) != (file["bytes"], file["sha256"]):
            raise ValueError(f"{file['name']} is another than in {MANIFEST}")
    if code := [name for name in found if pathlib.Path(name).suffix.lower() in _CODE and name != PROGRAM]:
        raise ValueError(f"code beside the model: {', '.join(code[:5])}")
    others = [name for name in found if not (name in OURS or _VARIABLES.fullmatch(name))]
    return f"{len(listed)} files, each as listed" + (f"; not checked: {', '.join(others[:5])}" if others else "")


def check_signature(folder: pathlib.Path, public_key: str, signature: str) -> str:
    """Checks a signature by OpenSSF's model-signing over every file of the folder."""
    try:
        from model_signing import verifying
    except ImportError as error:
        raise ValueError("pip install model-signing pyopenssl checks signatures") from error
    verifying.Config().use_elliptic_key_verifier(public_key=public_key).verify(folder, signature)
    return f"all files, by the key {public_key}"


def fingerprint(folder: pathlib.Path) -> str:
    """The model's identity, as results.json has it."""
    files = [(name, path) for name, path in sorted(files_below(folder)) if name not in BESIDE_THE_MODEL]
    return hashlib.sha256("".join(f"{sha256_of(path)}  {name}\n" for name, path in files).encode()).hexdigest()


def files_below(folder: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
    """The files below a folder, as (relative path with slashes, path).

    Raises:
        ValueError: for a link or a special file, or very many.
    """
    num_files = 0
    for root, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = pathlib.Path(root, name)
            mode, num_files = path.lstat().st_mode, num_files + 1
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or num_files > MOST_FILES:
                raise ValueError(f"a link, a special file, or too many files: {path.relative_to(folder)}")
            if stat.S_ISREG(mode):
                yield path.relative_to(folder).as_posix(), path


def sha256_of(path: pathlib.Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def text_of(path: pathlib.Path) -> str:
    """What a text file holds, of bounded size."""
    if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size > _MOST_TEXT:
        raise ValueError(f"{path.name} is no regular file of at most {_MOST_TEXT:,} bytes")
    return path.read_text(encoding="utf-8")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    try:
        found = json.loads(text_of(path))
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return found


def read_arrays(path: pathlib.Path, names: set[str]) -> dict[str, np.ndarray]:
    """Arrays by name, of an npz file that holds these and no others, stored as they are."""
    if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size > _MOST_ARRAYS:
        raise ValueError(f"{path.name} is no regular file of at most {_MOST_ARRAYS:,} bytes")
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            if {entry.filename for entry in archive.infolist()} != {f"{name}.npy" for name in names}:
                raise ValueError(f"{path.name} has other arrays than {', '.join(sorted(names))}")
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError(f"{path.name} claims more than it holds")
            for entry in archive.infolist():
                with archive.open(entry) as file:
                    version = np.lib.format.read_magic(file)
                    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                    size = math.prod(shape) * dtype.itemsize
                    # What is stored takes no more memory than the file.
                    if version != (1, 0) or fortran or dtype.kind not in "iuf" or entry.compress_type:
                        raise ValueError(f"{path.name} has an array of another form")
                    content = file.read(size)
                    if len(content) != size or file.read(1):
                        raise ValueError(f"{path.name} is not whole")
                    arrays[entry.filename.removesuffix(".npy")] = np.frombuffer(content, dtype).reshape(shape)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path.name} is no npz file") from error
    return arrays
