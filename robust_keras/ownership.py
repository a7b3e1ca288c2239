"""Who owns a folder: what its files belong to, and which live command works in it.

`claim` keeps an identity in a file of the folder, and refuses the folder to whatever has another one. `lock` keeps a
second live command out, and lets go when its process ends, however it ends:

    with ownership.lock(workdir, what="a training run"):
        ownership.claim(posixpath.join(workdir, "identity.json"), identity, what="this run")
        ...

The lock is the operating system's on the file `in_use.json`, which says who holds it. Where the file system has no
locks, as gs:// has none, that file is written again every few seconds, and counts as left behind once it stays as it
is.
"""

import contextlib
import datetime
import json
import os
import posixpath
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import tensorflow as tf
from absl import logging

from robust_keras import own_folders, storage

fcntl: Any
try:
    import fcntl
except ImportError:  # On Windows.
    fcntl = None

gfile = tf.io.gfile
BEAT = 15.0  # Seconds between two signs of life, where a file system has no locks.
_SHOWN = 3  # Differences that a refusal names.
SILENCE = 60.0  # Seconds without one after which a process counts as gone.
_LOCKED_BYTE = 1 << 30  # Windows lets nobody read a byte that is locked, so it is one that the file does not have.


class FolderInUse(ValueError):
    """Another live command works in the folder."""


class _Holder(NamedTuple):
    """Who holds a lock: what it does, process and host as read by people, `machine` as compared, a unique `token`."""

    what: str
    pid: int
    host: str
    machine: str
    since: str
    token: str


_holders: dict[str, tuple[int, _Holder]] = {}  # Of this process: lock file to thread and holder.
_holders_guard = threading.Lock()


def claim(
    path: str | os.PathLike,
    identity: dict,
    *,
    what: str,
    is_begun: bool = True,
    writes: bool = True,
    parse: Callable[[str], dict] = json.loads,
    compare: Callable[[dict, dict], list[str]] | None = None,
    text: str | None = None,
) -> None:
    """Writes to a file what its folder belongs to, or refuses the folder where the file says otherwise.

    Args:
        path: of the file, any `tf.io.gfile` path.
        identity: a dictionary, as JSON can hold it.
        what: what the identity is of, for the message, such as 'this run'.
        is_begun: whether the folder holds anything that must not be mixed with another identity's; where it does not,
            the file is written anew.
        writes: whether this process writes; of several processes of one run one does.
        parse: reads an identity from the text of the file.
        compare: `(saved, given) -> what differs`, `differences` by default.
        text: what the file is to hold; JSON of the identity by default.

    Raises:
        ValueError: naming what differs, with both values, or the file that cannot be parsed.
    """
    path = os.fspath(path)
    text = json.dumps(identity, indent=1) + "\n" if text is None else text
    saved = storage.read_text(path) if is_begun else ""
    # The beginning of the same text, or nothing, is what an interrupted write left behind.
    if not text.startswith(saved):
        try:
            different = (compare or differences)(storage.as_object(parse(saved), path), identity)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"Expected to read in {path} what its folder is of. Received: {storage.why(error)}"
            ) from error
        if different:
            shown = [*different[:_SHOWN], *([f"and {len(different) - _SHOWN} more"] if different[_SHOWN:] else [])]
            raise ValueError(
                f"Expected a folder of {what}, or a new one. Received: {posixpath.dirname(path)} of another, with "
                f"{'; '.join(shown)}"
            )
    if writes and saved != text:
        own_folders.make(posixpath.dirname(path))
        storage.write_text(path, text)


def differences(saved: dict, given: dict, *, complete: Callable[[dict], dict] | None = None) -> list[str]:
    """How two identities differ: 'key = the saved value, not the given one' for each key that does, sorted.

    Values are compared as JSON: a tuple is a list, 1 is 1.0. Keys of dictionaries inside are joined by dots. None and
    nothing are the same.

    Args:
        saved: a dictionary, as JSON can hold it.
        given: another one.
        complete: fills in the defaults of what an identity does not say.
    """
    one, other = (_flat(json.loads(json.dumps(complete(each) if complete else each))) for each in (saved, given))
    return [
        f"{name} = {_shown(one, name)}, not {_shown(other, name)}"
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    ]


def _flat(value: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, entry in value.items():
        flat |= _flat(entry, f"{prefix}{name}.") if isinstance(entry, dict) else {prefix + name: entry}
    return flat


def _shown(flat: dict[str, Any], name: str) -> str:
    return str(flat[name]) if name in flat else "(nothing)"


@contextlib.contextmanager
def lock(
    folder: str | os.PathLike, *, what: str, part: str = "", writes: bool = True, patience: float = SILENCE
) -> Iterator[None]:
    """Inside the context, no other live command works in a folder; the folder is made where there is none.

    The same thread may lock a folder again for the same thing, as a command does whose library function locks it too.
    A folder that the context made and that is empty at its end is removed.

    Args:
        folder: any `tf.io.gfile` path.
        what: what is done in it, for the other's message, such as 'a training run'.
        part: what of the folder is locked, where several processes share it: those of other parts may enter.
        writes: whether this process writes; of several processes of one run only one does, and holds the lock for all.
        patience: seconds to look whether the other process is alive, where a file system has no locks; with 0 it
            counts as alive.

    Raises:
        FolderInUse: where another process, or another call in this one, holds it.
        ValueError: for a link in a folder that is locked, see `own_folders`.
    """
    if not writes:
        yield
        return
    own_folders.check(folder, typed=True)
    path = posixpath.join(_same(folder), lock_name(part))
    me = _myself(what)
    with _guard_in_process(path, me) as is_new:
        if not is_new or path.startswith("ram://"):  # Memory of this process alone.
            yield
            return
        with _made(posixpath.dirname(path)), own_folders.within(folder), _guard_in_system(path, me, patience):
            yield


def lock_name(part: str = "") -> str:
    """The name of the file that `lock` puts into a folder while it holds it."""
    return f"in_use-{part}.json" if part else "in_use.json"


def _same(folder: str | os.PathLike) -> str:
    """One path for all names of a folder."""
    folder = os.fspath(folder)
    return folder.rstrip("/") if "://" in folder else os.path.realpath(folder).replace(os.sep, "/")


def _myself(what: str) -> _Holder:
    since = datetime.datetime.now(datetime.timezone.utc).isoformat(" ", "seconds")
    host = socket.gethostname()
    return _Holder(what, os.getpid(), host, f"{host}/{uuid.getnode():x}", since, uuid.uuid4().hex)


def _refusal(path: str, holder: _Holder | None = None) -> FolderInUse:
    for _ in range(20):
        if holder := holder or _read(path):
            break
        time.sleep(0.01)  # It is being written.
    by = f"process {holder.pid} on {holder.host} since {holder.since}, {holder.what}" if holder else "another process"
    return FolderInUse(
        f"Expected a folder in which no other command is at work. Received: {posixpath.dirname(path)}, in use by {by}"
    )


@contextlib.contextmanager
def _guard_in_process(path: str, me: _Holder) -> Iterator[bool]:
    thread = threading.get_ident()
    with _holders_guard:
        if held := _holders.get(path):
            if held[0] != thread or held[1].what != me.what:
                raise _refusal(path, held[1])
        else:
            _holders[path] = thread, me
    try:
        yield not held
    finally:
        if not held:
            with _holders_guard:
                del _holders[path]


@contextlib.contextmanager
def _made(folder: str) -> Iterator[None]:
    is_new = not gfile.isdir(folder)
    own_folders.make(folder)
    try:
        yield
    finally:
        if is_new and "://" not in folder:
            with contextlib.suppress(OSError):
                os.rmdir(folder)  # If nothing is in it.


@contextlib.contextmanager
def _guard_in_system(path: str, me: _Holder, patience: float) -> Iterator[None]:
    file = None if "://" in path else _locked_file(path)
    if file is None:
        with _heartbeat(path, me, patience):
            yield
        return
    try:
        file.truncate(0)
        file.write(json.dumps(me._asdict()).encode())
        yield
    finally:
        if fcntl:  # Before others can lock it; Windows removes no open file.
            with contextlib.suppress(OSError):
                os.remove(path)
        file.close()
        if not fcntl:
            with contextlib.suppress(OSError):
                os.remove(path)


def _locked_file(path: str):
    """The lock file, open and locked; None where the file system has no locks."""
    while True:
        is_new = not os.path.exists(path)
        try:
            file = open(path, "a+b", buffering=0, opener=own_folders.opener)
        except FileNotFoundError:  # Another process removed the folder that it had made.
            os.makedirs(os.path.dirname(path), exist_ok=True)
            continue
        try:
            is_locked = _try_to_lock(file)
            if is_locked is False:
                raise _refusal(path)
            if is_locked is None:
                file.close()
                if is_new:
                    os.remove(path)
                return None
            with contextlib.suppress(FileNotFoundError):  # Its holder may have removed it meanwhile.
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    return file
            file.close()
        except BaseException:
            file.close()
            raise


def _try_to_lock(file) -> bool | None:
    """Whether the file is now locked by this process: False where it is by another, None where nobody can."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            file.seek(_LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _read(path: str) -> _Holder | None:
    """Who holds the lock of a file; None where it does not say, as while it is written."""
    with contextlib.suppress(ValueError, TypeError, OSError, tf.errors.OpError):
        holder = _Holder(**(storage.read_object(path) or {}))
        return holder if isinstance(holder.pid, int) else None
    return None


@contextlib.contextmanager
def _heartbeat(path: str, me: _Holder, patience: float) -> Iterator[None]:
    if _is_alive(path, me, patience):
        raise _refusal(path)
    storage.write_text(path, json.dumps(me._asdict()))
    time.sleep(min(1.0, BEAT / 10))  # Of two that come at once, the later write is the one that both find.
    if (holder := _read(path)) is None or holder.token != me.token:
        raise _refusal(path, holder)
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(path, me, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError, tf.errors.OpError):
            if (holder := _read(path)) and holder.token == me.token:
                own_folders.remove(path)


def _beat(path: str, me: _Holder, ended: threading.Event) -> None:
    count = 0
    while not ended.wait(BEAT):
        count += 1
        try:
            if (holder := _read(path)) and holder.token != me.token:
                logging.error("%s", _refusal(path, holder))
                return
            storage.write_text(path, json.dumps(me._asdict()) + " " * (count % 2))
        except (OSError, tf.errors.OpError) as error:  # The next beat may get through.
            logging.warning("Could not write %s: %s", path, error)


def _is_alive(path: str, me: _Holder, patience: float) -> bool:
    """Whether the lock file of a file system without locks is of a process that is alive."""
    if not gfile.exists(path):
        return False
    holder, found = _read(path), storage.read_text(path)
    if holder and holder.machine == me.machine and not _is_running(holder.pid):
        return False
    deadline = time.monotonic() + patience
    if patience:
        print(
            f"{posixpath.dirname(path)} may be in use; looking for signs of life, at most {patience:.0f} s", flush=True
        )
    while time.monotonic() < deadline:
        time.sleep(min(1.0, patience / 20))
        try:
            if storage.read_text(path) != found:
                return gfile.exists(path)
        except (OSError, tf.errors.OpError):  # It is being written.
            continue
    return not patience


def _is_running(pid: int) -> bool:
    """Whether a process of this machine runs that may hold a lock; this one holds none that it does not know of."""
    if pid == os.getpid():
        return False
    if not fcntl:  # Windows has no question to ask a process that does not end it.
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # Another user's.
        pass
    return True
