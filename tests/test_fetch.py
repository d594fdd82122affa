"""Fetching against a real server that misbehaves, and addresses that are never asked."""

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from evaclip import fetch as module
from evaclip.errors import InputError
from evaclip.fetch import RefusedAddressError, checked_addresses, fetch, is_public

BODY = bytes(range(256)) * 400


class Handler(BaseHTTPRequestHandler):
    """Answers by path; `/flaky` fails the first two times."""

    seen: ClassVar[dict[str, int]] = {}

    def do_GET(self) -> None:
        self.seen[self.path] = count = self.seen.get(self.path, 0) + 1
        if self.path.startswith("/redirect"):
            self.send_response(302)
            self.send_header("Location", self.path.partition("=")[2] or "/whole")
            self.end_headers()
        elif self.path == "/loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
            self.end_headers()
        elif self.path == "/flaky" and count < 3:
            self.send_error(503)
        elif self.path == "/missing":
            self.send_error(404)
        else:
            self.send_response(200)
            if self.path != "/unsized":
                self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            if self.path == "/slow":
                for _ in range(50):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.1)
            elif self.path == "/cut" and count < 3:
                self.wfile.write(BODY[:1000])
            else:
                self.wfile.write(BODY)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[str]:
    monkeypatch.setattr(module, "RETRY_AFTER", (0.01, 0.01, 0.01))
    Handler.seen.clear()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()


def got(url: str, tmp_path, **changes) -> int:
    limits = {"max_bytes": 10**6, "seconds": 20.0, "allow_private": True} | changes
    return fetch(url, tmp_path / "file", **limits)


@pytest.mark.parametrize("path", ["/whole", "/unsized", "/flaky", "/cut", "/redirect"])
def test_what_comes_is_whole(server, tmp_path, path):
    assert got(server + path, tmp_path) == len(BODY)
    assert (tmp_path / "file").read_bytes() == BODY
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("path", "changes", "sentence"),
    [
        ("/missing", {}, "answers 404"),
        ("/whole", {"max_bytes": 1000}, "102,400 bytes, more than the 1,000"),
        ("/unsized", {"max_bytes": 1000}, "more than the 1,000 bytes"),
        ("/slow", {"seconds": 0.3}, "too long"),
        ("/loop", {}, "more than 5 redirects"),
        ("/redirect=file:///etc/passwd", {}, "not an http or https address"),
    ],
)
def test_what_is_wrong_is_a_sentence_and_leaves_nothing(server, tmp_path, path, changes, sentence):
    began = time.monotonic()
    with pytest.raises(InputError, match=sentence):
        got(server + path, tmp_path, **changes)
    assert list(tmp_path.iterdir()) == [] and time.monotonic() - began < 10
    if path == "/missing":
        assert Handler.seen == {"/missing": 1}  # what is not there is not asked for again


def test_private_addresses_are_refused_before_anything_is_sent(server, tmp_path, monkeypatch):
    for url in (server + "/whole", "http://localhost:1/x", "http://[::1]/x", "http://0x7f.1/x", "http://2130706433/"):
        with pytest.raises(RefusedAddressError, match="not public"):
            fetch(url, tmp_path / "file", max_bytes=100, seconds=5)
    assert Handler.seen == {} and list(tmp_path.iterdir()) == []
    for url in (
        "file:///etc/passwd",
        "ftp://example.org/x",
        "//example.org",
        "http:///x",
        "http://a:99999/",
        "gopher:x",
    ):
        with pytest.raises(RefusedAddressError):
            fetch(url, tmp_path / "file", max_bytes=100, seconds=5)


def test_a_redirect_into_the_private_network_is_refused(server, tmp_path, monkeypatch):
    """The first host counts as public here; the one that it leads to does not."""
    port = int(server.rpartition(":")[2])
    monkeypatch.setattr(module, "is_public", lambda address: address != "127.0.0.2")
    with pytest.raises(RefusedAddressError, match=r"127\.0\.0\.2, which is not public"):
        fetch(f"{server}/redirect=http://127.0.0.2:{port}/whole", tmp_path / "file", max_bytes=10**6, seconds=5)


def test_a_name_with_one_private_address_is_refused(monkeypatch):
    answers = [(2, 1, 6, "", ("93.184.216.34", 80)), (2, 1, 6, "", ("10.0.0.7", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers)
    with pytest.raises(RefusedAddressError, match=r"10\.0\.0\.7"):
        checked_addresses("http://example.org/")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers[:1])
    assert checked_addresses("http://example.org/") == ["93.184.216.34"]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("::ffff:8.8.8.8", True),
        ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.1.1", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False),
        ("::1", False), ("fe80::1%eth0", False), ("fd00::1", False), ("::ffff:10.0.0.1", False),
        ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False), ("ff02::1", False),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address, public):
    assert is_public(address) is public
