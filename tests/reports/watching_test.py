"""The page of a run under way: who may ask for it, and when it is made again."""

import contextlib
import http.client
import os
import pathlib
import signal
import socket
import threading

import pytest
from absl import flags

from robust_keras.commands import report
from robust_keras.reports import page, watching

HEADER = "step,loss,val_clean,val_robust\n"


@contextlib.contextmanager
def answering(shown):
    """A server in a thread, and `ask(method, path, **headers)` -> (status, headers, text)."""
    with watching.served(shown, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def ask(method="GET", path="/", host="localhost"):
            connection = http.client.HTTPConnection(*server.server_address, timeout=30)
            connection.putrequest(method, path, skip_host=True)
            if host:
                connection.putheader("Host", host)
            connection.endheaders()
            answer = connection.getresponse()
            text = answer.read().decode()
            connection.close()
            return answer.status, dict(answer.getheaders()), text

        try:
            yield server, ask
        finally:
            server.shutdown()
            thread.join()


def test_it_is_for_browsers_of_this_machine_that_read_one_page():
    with answering(lambda: "<p>a page</p>") as (server, ask):
        assert server.server_address[0] == "127.0.0.1"
        status, headers, text = ask()
        assert (status, text) == (200, "<p>a page</p>")
        assert headers["Refresh"] == "15" and headers["Content-Type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in headers["Content-Security-Policy"] and "script" not in str(headers)
        assert ask("HEAD") == (200, {**headers, "Date": ask("HEAD")[1]["Date"]}, "")
        for host in ("127.0.0.1", "localhost:6007", "LOCALHOST:1", "[::1]:80"):
            assert ask(host=host)[0] == 200
        for host in (
            "",
            "evil.example",
            "localhost.evil.example",
            "evil.example:6007",
            "localhost:6007@evil",
            "1.1.1.1",
        ):
            status, headers, text = ask(host=host)
            assert status == 421 and "a page" not in text and "evil" not in text
        for path in ("/metrics.csv", "/?x", "/..", "/%2e%2e/etc/passwd", "http://localhost/", "*"):
            status, headers, text = ask(path=path)
            assert (status, text) == (404, "There is one page, /.\n")
            assert "Refresh" not in headers and headers["Content-Type"] == "text/plain; charset=utf-8"
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "<b>"):
            status, _, text = ask(method)
            assert status == 501 and "a page" not in text and "<b>" not in text


def test_what_is_no_request_is_answered_without_a_word_of_it(capfd):
    with answering(lambda: "a page") as (server, _):
        for sent in (b"GET\x1b[31m<b> / HTTP/9.9\r\n\r\n", b"\xff\xfe\r\n\r\n", b"GET / HTTP/1.1\r\nHost"):
            with socket.create_connection(server.server_address, timeout=30) as connection:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                answer = b"".join(iter(lambda: connection.recv(4096), b""))
            assert b"a page" not in answer and b"<b>" not in answer and b"\x1b" not in answer
    assert capfd.readouterr() == ("", "")


def test_it_is_made_again_when_there_is_something_new(monkeypatch, tmp_path):
    monkeypatch.setattr(watching, "_SHARE", 1)
    made = []
    shown = watching.WatchedPage([str(tmp_path)], lambda: made.append(None) or f"page {len(made)}")
    assert "Nothing to show yet" in shown() and not made
    (tmp_path / "metrics.csv").write_text(HEADER)
    assert [shown(), shown()] == ["page 1", "page 1"]
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("1,2.3,,\n")
    assert [shown(), shown()] == ["page 2", "page 2"]
    (tmp_path / "autoattack").mkdir()
    (tmp_path / "autoattack" / "log.txt").write_text("under way")
    assert shown() == "page 2"
    (tmp_path / "autoattack" / "results.json").write_text("{}")
    assert shown() == "page 3"
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "log.txt",
        "metrics.csv",
        "results.json",
    ]


def test_making_it_takes_a_tenth_of_the_time_at_most(monkeypatch, tmp_path):
    clock = [100.0]
    monkeypatch.setattr(watching.time, "monotonic", lambda: clock[0])

    def make():
        clock[0] += 2.0
        return f"page at {clock[0]:.0f}"

    shown = watching.WatchedPage([str(tmp_path)], make)
    for row, now, expected in ((1, 100.0, 102), (2, 119.0, 102), (3, 121.0, 123)):
        with open(tmp_path / "metrics.csv", "a") as file:
            file.write(f"{row}\n")
        clock[0] = now
        assert shown() == f"page at {expected}"


def test_what_cannot_be_shown_is_said_and_tried_again(monkeypatch, tmp_path):
    monkeypatch.setattr(watching, "_SHARE", 1)
    found = [ValueError("<script>alert(1)</script>\x1b[31m"), FileNotFoundError("gone"), "a page"]

    def make():
        if isinstance(next_one := found.pop(0), str):
            return next_one
        raise next_one

    shown = watching.WatchedPage([str(tmp_path)], make)
    (tmp_path / "metrics.csv").write_text(HEADER)
    said = shown()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in said and "<script>" not in said and "\x1b" not in said
    assert "gone" in shown()
    assert [shown(), shown()] == ["a page", "a page"]


def test_the_report_of_a_run_that_is_being_written(monkeypatch, tmp_path):
    monkeypatch.setattr(watching, "_SHARE", 1)
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    folder.mkdir()
    (folder / "metrics.csv").write_text(HEADER)
    shown = watching.WatchedPage([str(folder)], lambda: page.html([str(folder)]))
    assert "Nothing is logged yet" in shown()
    (folder / "metrics.csv").write_text(HEADER + "10,2.3,0.5,0.4\n20,1.")
    text = shown()
    assert ": 10 steps" in text and "<img src=x" not in text
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.csv"]


def test_a_port_or_a_folder_that_cannot_be_had(tmp_path):
    with watching.served(lambda: "", 0) as server:
        port = server.server_address[1]
        with pytest.raises(ValueError, match=f"Expected a free --port to serve at. Received: {port} "):
            watching.watch([str(tmp_path)], lambda: "", port=port)
    with pytest.raises(ValueError, match="Expected a free --port to serve at. Received: 70000 "):
        watching.watch([str(tmp_path)], lambda: "", port=70000)
    with pytest.raises(ValueError, match="Expected the folder of a run to watch. Received: .*nothing, which is none"):
        watching.WatchedPage([str(tmp_path / "nothing")], lambda: "")


def test_ctrl_c_ends_it_with_a_line(capsys, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    watching.watch([str(tmp_path)], lambda: "", port=0)
    begin, end = capsys.readouterr().out.splitlines()
    assert begin.startswith(f"Watching {tmp_path} at http://127.0.0.1:") and end == "Stopped watching"
    assert signal.getsignal(signal.SIGINT) is before
    assert not list(pathlib.Path(tmp_path).iterdir())


def test_the_command_watches_or_writes(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(watching, "watch", lambda folders, make, **options: called.append((folders, make(), options)))

    def command(*arguments):
        values = flags.FlagValues()
        report.define_flags(values)
        values(["report", f"--workdir={tmp_path}", "--watch", *arguments])
        report.main(values)

    (tmp_path / "metrics.csv").write_text(HEADER)
    command("--port=7000")
    ((folders, text, options),) = called
    assert (folders, options) == ([str(tmp_path)], {"port": 7000}) and "Nothing is logged yet" in text
    with pytest.raises(ValueError, match="Expected --output or --watch, which writes nothing. Received: both, there"):
        command("--output=there")
