"""Downloads a file once: an interrupted download goes on, and what came the first time is what counts later."""

import http.client
import os
import re
import shutil
import urllib.error
import urllib.request
from typing import BinaryIO, NamedTuple

import tqdm

from robust_keras import foreign_files, own_folders, ownership, storage
from robust_keras.foreign_files import printable

_TIMEOUT = 60  # Seconds without a byte.
_MOST_BYTES = 2**34
_PART = 2**20
_RANGE = re.compile(r"bytes (\d{1,15})-\d{1,15}/(\d{1,15})")


class Downloaded(NamedTuple):
    """A whole file.

    Attributes:
        path: where it is.
        num_bytes: its size.
        sha256: of it.
        is_known: whether that is the one that was recorded at an earlier time.
    """

    path: str
    num_bytes: int
    sha256: str
    is_known: bool


def fetch(url: str, folder: str) -> Downloaded:
    """The file of an address in a folder, downloaded unless it is there.

    Beside a file FILE stands FILE.json with its address, size and SHA-256 as they were when it was first whole; nobody
    has published these. What has come of one that is not whole is in FILE.part.

    Args:
        url: of http or https.
        folder: of this machine, made if need be.

    Raises:
        ValueError: where the address cannot be reached, which says where else the file can be put; where it is another
            file than the first time; for a folder elsewhere.
        OSError: where the disk is full.
    """
    if not url.startswith(("https://", "http://")):
        raise ValueError(f"Expected an address of http or https. Received: {printable(url)}")
    if foreign_files.local_path(folder) is None:
        raise ValueError(f"Expected a folder of this machine to download to. Received: {printable(folder)}")
    path = os.path.join(folder, url.rsplit("/", 1)[-1])
    foreign_files.check_regular(path, follow=True)
    if not os.path.exists(path):
        with ownership.lock(folder, what="a download"):
            _download(url, path)
    num_bytes, sha256 = os.path.getsize(path), storage.sha256(path)
    recorded = storage.read_object(f"{path}.json")
    if recorded is None:
        storage.write_json(f"{path}.json", {"url": url, "size": num_bytes, "sha256": sha256})
    elif recorded.get("sha256") != sha256:
        raise ValueError(f"Expected the SHA-256 that {path}.json records. Received: {sha256} of {path}")
    return Downloaded(path, num_bytes, sha256, recorded is not None)


def _download(url: str, path: str) -> None:
    part = f"{path}.part"
    foreign_files.check_regular(part)
    version = _version_of(part)
    begin = os.path.getsize(part) if version and os.path.exists(part) else 0
    # The rest of what began, if the file is the same still; else all of it.
    headers = {"Range": f"bytes={begin}-", "If-Range": version} if begin and version else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT) as response:
            begin, num_bytes = _extent(response, begin)
            _check_room(path, num_bytes - begin)
            storage.write_json(f"{part}.json", {"version": response.headers.get("ETag")})
            with open(part, "r+b" if begin else "wb", opener=own_folders.opener) as file:
                file.seek(begin)
                _copy(response, file, begin, num_bytes)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code == 416 and begin:
            # It is shorter than what has come.
            os.remove(part)
            return _download(url, path)
        reason = printable(getattr(error, "reason", None) or error or type(error).__name__)
        hint = f"the same command goes on, or put the file there yourself: {os.path.abspath(path)}"
        raise ValueError(f"Expected an answer from {url}. Received: {reason}; {hint}") from error
    os.replace(part, path)  # On this machine that happens at once or not at all.
    os.remove(f"{part}.json")


def _version_of(part: str) -> str | None:
    """What the server called the version that a part is of, where it is known."""
    try:
        version = (storage.read_object(f"{part}.json") or {}).get("version")
    except ValueError:  # Cut off.
        return None
    return version if isinstance(version, str) and version.startswith('"') else None


def _extent(response: http.client.HTTPResponse, begin: int) -> tuple[int, int]:
    """Where in the file an answer begins, and the file's size."""
    match = _RANGE.fullmatch(response.headers.get("Content-Range", "")) if response.status == 206 else None
    length = response.headers.get("Content-Length", "")
    if match and int(match[1]) == begin:
        num_bytes = int(match[2])
    elif response.status == 200 and re.fullmatch(r"\d{1,15}", length):
        begin, num_bytes = 0, int(length)
    else:
        raise http.client.HTTPException(f"an answer of status {response.status} without a size")
    if num_bytes > _MOST_BYTES:
        raise http.client.HTTPException(f"a file of {num_bytes:,} bytes, more than {_MOST_BYTES:,}")
    return begin, num_bytes


def _check_room(path: str, num_bytes: int) -> None:
    free = shutil.disk_usage(os.path.dirname(path) or ".").free
    if free < num_bytes:
        raise OSError(f"{free:,} bytes of room on the disk for {num_bytes:,}")


def _copy(response: http.client.HTTPResponse, file: BinaryIO, begin: int, num_bytes: int) -> None:
    with tqdm.tqdm(total=num_bytes, initial=begin, unit="B", unit_scale=True, desc="Downloading") as progress:
        while begin < num_bytes and (data := response.read(min(_PART, num_bytes - begin))):
            file.write(data)
            begin += len(data)
            progress.update(len(data))
    if begin < num_bytes:
        raise http.client.HTTPException(f"{begin:,} of {num_bytes:,} bytes")
