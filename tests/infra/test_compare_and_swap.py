"""`storage.replace_bytes`: of several writers who have read the same, one wins and the others are told."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from infra import storage
from tests.servers import S3Server


class ConditionalStore(BaseHTTPRequestHandler):
    """A bucket that knows conditions on puts as AWS does; the tests' own store does not."""

    objects: dict[str, bytes] = {}  # noqa: RUF012 - one bucket for the whole server
    lock = threading.Lock()

    def do_GET(self) -> None:
        self._answer(200 if self.path in self.objects else 404)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.lock:
            wanted = self.headers["If-Match"] or ("" if self.headers["If-None-Match"] == "*" else None)
            holds = wanted in (None, self._etag())
            if holds:
                self.objects[self.path] = body
        self._answer(200 if holds else 412)

    def _etag(self) -> str:
        return f'"{hashlib.md5(self.objects[self.path]).hexdigest()}"' if self.path in self.objects else ""

    def _answer(self, status: int) -> None:
        body = self.objects.get(self.path, b"") if self.command == "GET" else b""
        self.send_response(status)
        self.send_header("ETag", self._etag())
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def conditional_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), ConditionalStore) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
        yield "s3://bucket/prefix"
        server.shutdown()
    ConditionalStore.objects.clear()


@pytest.fixture(params=["local", "conditional_store"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "root") if request.param == "local" else request.getfixturevalue(request.param)


@pytest.mark.parametrize("expected", [None, b"before"])
def test_one_of_many_wins(root: str, expected: bytes | None) -> None:
    uri = storage.join(root, "corpus.json")
    if expected is not None:
        storage.write_bytes(uri, expected)
    barrier = threading.Barrier(8)

    def replace(number: int) -> bool:
        barrier.wait()
        return storage.replace_bytes(uri, b"from %d" % number, expected=expected)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(replace, range(8)))
    assert won.count(True) == 1
    assert storage.read_bytes(uri) == b"from %d" % won.index(True)
    if not storage.is_remote(root):
        assert [path.name for path in Path(root).iterdir()] == ["corpus.json"]  # no lock is left


def test_what_is_not_as_expected_stays(root: str) -> None:
    uri = storage.join(root, "x")
    assert not storage.replace_bytes(uri, b"new", expected=b"old")
    assert not storage.exists(uri)
    assert storage.replace_bytes(uri, b"old", expected=None)
    assert not storage.replace_bytes(uri, b"new", expected=None)
    assert not storage.replace_bytes(uri, b"new", expected=b"other")
    assert storage.read_bytes(uri) == b"old"
    assert storage.replace_bytes(uri, b"new", expected=b"old")
    assert storage.replace_bytes(uri, b"new", expected=b"old")  # it is there, whoever wrote it
    assert storage.read_bytes(uri) == b"new"


def test_a_store_without_conditions_is_told_and_works(s3: S3Server, caplog: pytest.LogCaptureFixture) -> None:
    storage._say_not_atomic.cache_clear()
    uri = storage.join(s3.create_bucket(), "x")
    storage.write_bytes(uri, b"old")
    with caplog.at_level(logging.WARNING):
        assert storage.replace_bytes(uri, b"new", expected=b"old")
    assert "no conditional writes" in caplog.text
    assert not storage.replace_bytes(uri, b"newer", expected=b"old")
    assert storage.read_bytes(uri) == b"new"
