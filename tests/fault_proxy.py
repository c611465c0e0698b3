"""An HTTP proxy in front of a test's S3 server that misbehaves as a script tells it to.

    with fault_proxy(server, first_time(Fault.LOST_ANSWER)) as proxy:
        ...  # a client with proxy.environment

Signatures stay valid: the client signs the proxy's address as Host, and the proxy passes on what it was told.
"""

from __future__ import annotations

import contextlib
import enum
import http.client
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from urllib.parse import urlsplit

from tests.servers import S3Server

SECONDS_OF_DELAY = 0.3
SECONDS_FOR_THE_STORE = 60
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding"}


class Fault(enum.Enum):
    """What a client meets instead of an answer."""

    INTERNAL_ERROR = enum.auto()  # 500
    SLOW_DOWN = enum.auto()  # 503, as S3 throttles
    TOO_MANY_REQUESTS = enum.auto()  # 429, as other stores throttle
    DELAY = enum.auto()  # the right answer, late and in two pieces
    CUT_BEFORE = enum.auto()  # the connection ends before the store hears of the request
    CUT_IN_BODY = enum.auto()  # it ends in the middle of the answer
    LOST_ANSWER = enum.auto()  # the store has done what was asked; nobody hears of it


class Refusal(enum.Enum):
    """What a client meets that asking again does not help against."""

    FULL = enum.auto()  # 507, a store without room
    DENIED = enum.auto()  # 403


REFUSALS: dict[Fault | Refusal | None, tuple[int, str]] = {
    Fault.INTERNAL_ERROR: (500, "InternalError"),
    Fault.SLOW_DOWN: (503, "SlowDown"),
    Fault.TOO_MANY_REQUESTS: (429, "TooManyRequests"),
    Refusal.FULL: (507, "InsufficientStorage"),
    Refusal.DENIED: (403, "AccessDenied"),
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request as a script sees it. `target` is path and query without the bucket; `nth` counts from 1 how
    often this very request has come."""

    method: str
    target: str
    nth: int
    is_conditional: bool


Script = Callable[[Request], Fault | Refusal | None]


def always(fault: Fault, *methods: str) -> Script:
    """Every request (of these methods)."""
    return lambda request: fault if not methods or request.method in methods else None


def first_time(fault: Fault, *methods: str, times: int = 1) -> Script:
    """Each request (of these methods) the first time, or the first `times`, that it comes."""
    return lambda request: always(fault, *methods)(request) if request.nth <= times else None


def seeded(
    seed: int, *, share: float = 0.2, kinds: Sequence[Fault] = tuple(Fault), at_most: int = 2
) -> Script:
    """A share of the requests, none more often than `at_most` times. Which ones depends on the seed and the
    request, not on the order in which they come."""

    def script(request: Request) -> Fault | None:
        random = Random(f"{seed} {request.method} {request.target} {request.nth}")
        return random.choice(kinds) if request.nth <= at_most and random.random() < share else None

    return script


@dataclass(kw_only=True)
class FaultProxy:
    """`environment` makes a process its client. `script` may be replaced at any time; `faults` counts what
    was done, `num_requests` what has come."""

    environment: dict[str, str] = field(repr=False)
    script: Script | None
    faults: Counter[Fault | Refusal] = field(default_factory=Counter)
    seen: Counter[tuple[str, str]] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def num_requests(self) -> int:
        return self.seen.total()

    def fault_for(self, method: str, path: str, *, is_conditional: bool) -> Fault | Refusal | None:
        with self.lock:
            target = path.removeprefix("/").partition("/")[2]
            self.seen[method, target] += 1
            nth = self.seen[method, target]
            request = Request(method=method, target=target, nth=nth, is_conditional=is_conditional)
            fault = self.script(request) if self.script else None
            if fault is not None:
                self.faults[fault] += 1
            return fault


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    connections: set[socket.socket]

    def process_request(self, request: socket.socket, client_address: object) -> None:  # pyright: ignore
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:  # pyright: ignore
        self.connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Ends the connections that clients keep for their next request."""
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is nothing to print."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy
    store: str

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return None
        fault = self.proxy.fault_for(
            self.command, self.path, is_conditional=bool({"If-None-Match", "If-Match"} & set(self.headers))
        )
        body = self._body()
        if fault is Fault.CUT_BEFORE:
            return self._hang_up()
        if fault in REFUSALS:
            status, code = REFUSALS[fault]
            text = f"<Error><Code>{code}</Code><Message>says the proxy</Message></Error>".encode()
            return self._answer(status, [("Content-Type", "application/xml")], text, fault=None)
        status, headers, answer = self._ask_the_store(body)
        if fault is Fault.LOST_ANSWER or (fault is Fault.CUT_IN_BODY and not answer):
            return self._hang_up()
        return self._answer(status, headers, answer, fault=fault)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _ask_the_store(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.store, timeout=SECONDS_FOR_THE_STORE)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in HOP_BY_HOP | {"expect", "content-length"}:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, *, fault: Fault | Refusal | None
    ) -> None:
        self.send_response_only(status)
        is_head = self.command == "HEAD"
        for name, value in headers:
            if name.lower() not in HOP_BY_HOP and (is_head or name.lower() != "content-length"):
                self.send_header(name, value)
        if not is_head and status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2 if fault in (Fault.DELAY, Fault.CUT_IN_BODY) else len(body)
        self.wfile.write(b"" if is_head else body[:half])
        self.wfile.flush()
        if fault is Fault.CUT_IN_BODY:
            return self._hang_up()
        if fault is Fault.DELAY:
            time.sleep(SECONDS_OF_DELAY)
        self.wfile.write(b"" if is_head else body[half:])
        return None

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def fault_proxy(server: S3Server, script: Script | None = None) -> Iterator[FaultProxy]:
    """A proxy on a free port of loopback, until the block is left."""
    proxy = FaultProxy(environment={}, script=script)
    handler = type("Handler", (_Handler,), {"proxy": proxy, "store": urlsplit(server.endpoint).netloc})
    with _Server(("127.0.0.1", 0), handler) as listener:
        listener.connections = set()
        endpoint = f"http://127.0.0.1:{listener.server_port}"
        proxy.environment = server.environment | {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ENDPOINT_URL_S3": endpoint,
        }
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            listener.shutdown()
            listener.hang_up()
            thread.join(10)
