"""The page of a run that is under way, served to browsers of this machine alone.

It is made again when what it shows has changed, and kept in memory: nothing is written. The folder may be a stranger's,
and other pages that are open in the browser are strangers: there are no scripts, one path, nothing but reading, and no
answer to who asks by another name than this machine's, as a page does whose own name was pointed here (DNS rebinding).
"""

import contextlib
import html
import http.server
import posixpath
import re
import signal
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus

import tensorflow as tf

from robust_keras.reports.page import POLICY
from robust_keras.shown_text import printable

gfile = tf.io.gfile
ADDRESS = "127.0.0.1"
_REFRESH = 15  # Seconds after which the browser asks again.
_SHARE = 10  # Making the page takes this part of the time at most: the run wants the machine.
_FILES = ("metrics.csv", "results.json", "security.json")
_OURS = re.compile(r"(?:localhost|127\.0\.0\.1|\[::1\])(?::\d{1,5})?", re.IGNORECASE)
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'",  # Which a page cannot say of itself.
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_PLAIN = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>{title}</title></head>
<body><main><h1>{title}</h1><p>{text}</p></main></body></html>
"""


class WatchedPage:
    """The page of folders, made again by a call once there is something new in them.

    Args:
        folders: of runs and evaluations, any `tf.io.gfile` paths.
        make: returns the page, HTML; a ValueError or an error of a file is shown in its place.

    Raises:
        ValueError: for what is no folder.
    """

    def __init__(self, folders: Sequence[str], make: Callable[[], str]) -> None:
        for folder in folders:
            if not gfile.isdir(folder):
                raise ValueError(f"Expected the folder of a run to watch. Received: {folder}, which is none")
        self._folders, self._make = folders, make
        self._guard = threading.Lock()
        self._state: object = None
        self._page, self._due = "", 0.0

    def __call__(self) -> str:
        """The page as it is now."""
        with self._guard:
            started = time.monotonic()
            if started < self._due:
                return self._page
            state = [_state(folder) for folder in self._folders]
            if state != self._state:
                self._state = state
                self._page = self._made(state)
                ended = time.monotonic()
                self._due = ended + (_SHARE - 1) * (ended - started)
            return self._page

    def _made(self, state):
        if nothing := [folder for folder, found in zip(self._folders, state) if not found]:
            return _plain(
                "Nothing to show yet", f"There are neither rows of training nor results in {nothing[0]} so far."
            )
        try:
            return self._make()
        except (ValueError, OSError, tf.errors.OpError) as error:
            self._state = None  # The next one who asks has it tried again.
            return _plain("This cannot be shown", str(error))


def _state(folder):
    """What tells a change of the files that a page is of, in a folder and in those below it; empty without any."""
    with contextlib.suppress(OSError, tf.errors.OpError):
        found = {}
        for inside in ("", *sorted(gfile.listdir(folder))):
            for name in _FILES:
                with contextlib.suppress(OSError, tf.errors.OpError):
                    status = gfile.stat(posixpath.join(folder, inside, name))
                    found[inside, name] = status.length, status.mtime_nsec
        return found
    return {}


def _plain(title, text):
    return _PLAIN.format(
        title=title, text=html.escape(f"{printable(text, most=1000)} This page looks again by itself.")
    )


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True  # Of a server that has just ended.
    daemon_threads = True
    page: Callable[[], str]

    def handle_error(self, request: object, client_address: object) -> None:
        """Says what went wrong, unless it is that a browser has gone."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    timeout = 10.0  # For who says nothing.
    server_version, sys_version = "robust_keras", ""

    def do_GET(self) -> None:
        """Answers with the page."""
        if not _OURS.fullmatch(self.headers.get("Host", "")):
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST, explain="Expected to be asked for as localhost.")
        elif self.path != "/":
            self.send_error(HTTPStatus.NOT_FOUND, explain="There is one page, /.")
        else:
            self._answer(HTTPStatus.OK, "text/html", self.server.page())

    do_HEAD = do_GET

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answers with a line of text, in which nothing of the request stands."""
        self._answer(code, "text/plain", f"{explain or HTTPStatus(code).phrase}\n")

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: of what is asked for, nothing belongs into a terminal."""

    def _answer(self, code, kind, text):
        content = text.encode("utf-8", "replace")
        self.send_response(code)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        if code == HTTPStatus.OK:
            self.send_header("Refresh", str(_REFRESH))
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextlib.contextmanager
def served(page: Callable[[], str], port: int) -> Iterator[_Server]:
    """Inside the context, a socket of this machine alone is held for a page; `serve_forever` of the server answers.

    Args:
        page: returns the page, HTML.
        port: 0 for any that is free; `server_address` says which.

    Raises:
        ValueError: for a port that cannot be had.
    """
    try:
        server = _Server((ADDRESS, port), _Handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"Expected a free --port to serve at. Received: {port} ({reason})") from None
    server.page = page
    with server:
        yield server


def watch(folders: Sequence[str], make: Callable[[], str], *, port: int) -> None:
    """Serves the page of folders until Ctrl-C.

    Args:
        folders: see `WatchedPage`, like `make`.
        port: see `served`.

    Raises:
        ValueError: see there.
    """
    page = WatchedPage(folders, make)
    with served(page, port) as server:
        page()  # The first browser that asks does not wait for it.
        shown = printable(", ".join(folders), most=1000)
        print(f"Watching {shown} at http://{ADDRESS}:{server.server_address[1]}/ until Ctrl-C", flush=True)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("Stopped watching", flush=True)
        finally:
            signal.signal(signal.SIGINT, before)
