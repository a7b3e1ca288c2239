"""Downloads from a server of this process."""

import hashlib
import http.server
import json
import threading

import pytest

from robust_keras.saved_models.weights_in import download, published

CONTENT = bytes(range(256)) * 2000


class Handler(http.server.BaseHTTPRequestHandler):
    content, version, after, has_ranges, has_size, requests = CONTENT, '"1"', None, True, True, []

    def do_GET(self):
        begin = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-")
        self.requests.append(self.headers.get("Range"))
        fits = self.has_ranges and self.headers.get("If-Range", self.version) == self.version
        begin = int(begin) if fits else 0
        if begin > len(self.content):
            self.send_error(416)
            return
        self.send_response(206 if "Range" in self.headers and fits else 200)
        if self.has_size:
            self.send_header("Content-Length", str(len(self.content) - begin))
        if "Range" in self.headers and fits:
            self.send_header("Content-Range", f"bytes {begin}-{len(self.content) - 1}/{len(self.content)}")
        self.send_header("ETag", self.version)
        self.end_headers()
        self.wfile.write(self.content[begin : self.after])  # A part of it, where the connection then ends.

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """(handler, address): a server, with what it does to be set on the handler."""
    handler = type("Handler", (Handler,), {"requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield handler, f"http://127.0.0.1:{serving.server_port}/model.pt"
        serving.shutdown()
        thread.join()


def test_a_download_is_recorded_and_not_made_again(tmp_path, server):
    handler, url = server
    first = download.fetch(url, str(tmp_path / "new"))
    path = tmp_path / "new" / "model.pt"
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert first == (str(path), len(CONTENT), digest, False)
    assert path.read_bytes() == CONTENT
    assert json.loads((tmp_path / "new" / "model.pt.json").read_text()) == {
        "url": url,
        "size": len(CONTENT),
        "sha256": digest,
    }
    assert sorted(each.name for each in path.parent.glob("model*")) == ["model.pt", "model.pt.json"]
    assert download.fetch(url, str(tmp_path / "new")) == (*first[:3], True)
    assert len(handler.requests) == 1
    path.write_bytes(b"another")
    with pytest.raises(ValueError, match=r"Expected the SHA-256 that .*model.pt.json records. Received: "):
        download.fetch(url, str(tmp_path / "new"))


def test_an_interrupted_download_goes_on(tmp_path, server):
    handler, url = server
    handler.after = 300_000
    with pytest.raises(ValueError, match="Received: 300,000 of 512,000 bytes; the same command goes on") as error:
        download.fetch(url, str(tmp_path))
    assert str(tmp_path / "model.pt") in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "model.pt").exists()
    handler.after = None
    assert download.fetch(url, str(tmp_path)).num_bytes == len(CONTENT)
    assert (tmp_path / "model.pt").read_bytes() == CONTENT
    assert handler.requests == [None, "bytes=300000-"]


@pytest.mark.parametrize("change", ["version", "no ranges", "shorter", "record"])
def test_another_file_is_downloaded_anew(tmp_path, server, change):
    handler, url = server
    handler.after = 300_000
    with pytest.raises(ValueError, match="300,000"):
        download.fetch(url, str(tmp_path))
    handler.after, handler.content = None, CONTENT[::-1]
    if change == "version":
        handler.version = '"2"'
    elif change == "no ranges":
        handler.has_ranges = False
    elif change == "shorter":
        handler.content = CONTENT[:1000]
    else:
        (tmp_path / "model.pt.part.json").write_text("{")
    download.fetch(url, str(tmp_path))
    assert (tmp_path / "model.pt").read_bytes() == handler.content


def test_answers_without_a_size_and_too_large_ones(tmp_path, server, monkeypatch):
    handler, url = server
    handler.has_size = False
    with pytest.raises(ValueError, match="an answer of status 200 without a size"):
        download.fetch(url, str(tmp_path))
    handler.has_size = True
    monkeypatch.setattr(download, "_MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="a file of 512,000 bytes, more than 1,000"):
        download.fetch(url, str(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type("", (), {"free": 10}))
    with pytest.raises(ValueError, match="10 bytes of room on the disk for 512,000"):
        download.fetch(url, str(tmp_path))


def test_offline_it_says_where_to_put_the_file(tmp_path, server):
    _, url = server
    with pytest.raises(
        ValueError, match="Expected an answer from http://127.0.0.1:1/model.pt. Received: .*put the file"
    ):
        download.fetch("http://127.0.0.1:1/model.pt", str(tmp_path))
    (tmp_path / "model.pt").write_bytes(CONTENT)
    assert not download.fetch("http://127.0.0.1:1/model.pt", str(tmp_path)).is_known


def test_addresses_and_folders(tmp_path):
    with pytest.raises(ValueError, match="of http or https. Received: file:"):
        download.fetch("file:///etc/passwd", str(tmp_path))
    with pytest.raises(ValueError, match="a folder of this machine"):
        download.fetch("https://a/b", "gs://bucket/folder")


def test_the_published_networks():
    assert len(published.PUBLISHED) == 22
    for name, each in published.PUBLISHED.items():
        assert each.name == name and each.url.endswith(f"/{name}.pt")
        assert each.dataset in ("cifar10", "cifar100", "mnist") and 20 < each.robust < each.clean < 100
    known = published.find("cifar10_l2_wrn70-16_with")
    assert known.threat == ("L2", "128/255") and known.architecture == "WRN-70-16"
    assert published.find("mnist_linf_wrn28-10_without").threat == ("Linf", "0.3")
    assert published.find("cifar100_linf_resnet18_ddpm").architecture == "PreActResNet-18"
    with pytest.raises(ValueError, match="Expected --published out of .*cifar10_linf_wrn28-10_with.* Received: other"):
        published.find("other")
