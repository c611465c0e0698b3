"""The agent hears what a cloud says of its machine, and a real Ray cluster hears it from the agent. A server
on loopback plays the clouds' metadata services."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import requests

from infra import spot_agent
from tests.servers import REPOSITORY, RayCluster, free_port, ray_cluster

AWS_ACTION = "/latest/meta-data/spot/instance-action"
AWS_REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
AWS_TOKEN = "/latest/api/token"
GCP_PREEMPTED = "/computeMetadata/v1/instance/preempted"
WORKER_NODE = "--node-ip-address=127.0.0.2"
SECONDS_FOR_AN_AGENT = 60


@dataclass
class Metadata:
    """What the services say. `documents` of a path are served; `token` is the only one that AWS takes."""

    url: str
    is_aws: bool = True
    is_gcp: bool = True
    token: str = "first"
    documents: dict[str, str] = field(default_factory=dict)
    num_requests: Counter[str] = field(default_factory=Counter)


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            seconds = int(self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", 0))
            known = said.is_aws and self.path == AWS_TOKEN and 1 <= seconds <= 21600
            self.answer(200 if known else 404, said.token if known else "")

        def do_GET(self) -> None:
            if self.path == GCP_PREEMPTED and said.is_gcp:
                allowed = self.headers.get("Metadata-Flavor") == "Google"
                self.answer(200 if allowed else 403, said.documents.get(self.path, "FALSE"))
            elif self.headers.get("X-aws-ec2-metadata-token") != said.token:
                self.answer(401, "")
            else:
                document = said.documents.get(self.path)
                self.answer(404 if document is None else 200, document or "")

        def answer(self, status: int, text: str) -> None:
            said.num_requests[self.path] += 1
            self.send_response(status)
            self.send_header("Metadata-Flavor", "Google")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        said = Metadata(url=f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=[0.02], daemon=True)
        thread.start()
        yield said
        server.shutdown()
        thread.join(timeout=10)


def aws_action(ends_at: float, action: str = "terminate") -> str:
    moment = datetime.fromtimestamp(ends_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return json.dumps({"action": action, "time": moment})


def test_aws_is_asked_with_a_token_and_tells_when_the_end_is(metadata: Metadata) -> None:
    cloud = spot_agent.Aws(metadata.url)
    assert cloud.notice() is None
    assert cloud.notice() is None
    metadata.documents[AWS_ACTION] = aws_action(1_900_000_000, "stop")
    notice = cloud.notice()
    assert notice is not None
    assert notice.ends_at == 1_900_000_000
    assert "stop" in notice.why
    assert metadata.num_requests == {AWS_TOKEN: 1, AWS_ACTION: 3}


def test_a_token_that_has_run_out_is_replaced(metadata: Metadata) -> None:
    cloud = spot_agent.Aws(metadata.url)
    assert cloud.notice() is None
    metadata.token = "second"
    with pytest.raises(requests.RequestException, match="401"):
        cloud.notice()
    metadata.documents[AWS_ACTION] = aws_action(1_900_000_000)
    assert cloud.notice() is not None


def test_a_recommendation_to_rebalance_counts_only_where_it_is_wanted(metadata: Metadata) -> None:
    metadata.documents[AWS_REBALANCE] = json.dumps({"noticeTime": "2026-10-27T08:22:00Z"})
    assert spot_agent.Aws(metadata.url).notice() is None
    notice = spot_agent.Aws(metadata.url, heed_rebalance=True).notice()
    assert notice is not None
    assert "rebalance" in notice.why


def test_gcp_gives_half_a_minute(metadata: Metadata) -> None:
    cloud = spot_agent.Gcp(metadata.url)
    assert cloud.notice() is None
    metadata.documents[GCP_PREEMPTED] = "TRUE\n"
    notice = cloud.notice()
    assert notice is not None
    assert notice.ends_at - time.time() == pytest.approx(30, abs=2)


@pytest.mark.parametrize("is_aws", [True, False])
def test_the_cloud_is_recognised_by_who_answers(metadata: Metadata, is_aws: bool) -> None:
    metadata.is_aws, metadata.is_gcp = is_aws, not is_aws
    metadata.documents = {AWS_ACTION: aws_action(1_900_000_000), GCP_PREEMPTED: "TRUE"}
    clouds = [spot_agent.Aws(metadata.url), spot_agent.Gcp(metadata.url)]
    notice = spot_agent.wait_for_notice(clouds, poll_seconds=0.01)
    assert notice.why.startswith("AWS" if is_aws else "GCP")


def test_no_proxy_is_asked(metadata: Metadata, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("no_proxy", "")
    assert spot_agent.Aws(metadata.url).notice() is None


def test_a_service_that_says_nothing_or_nonsense_is_asked_again(
    metadata: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spot_agent, "SECONDS_TO_ANSWER", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        cloud = spot_agent.Aws(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(requests.RequestException):
            cloud.notice()
    cloud = spot_agent.Aws(metadata.url)
    metadata.documents[AWS_ACTION] = "{}"
    threading.Timer(0.2, metadata.documents.update, [{AWS_ACTION: aws_action(1_900_000_000)}]).start()
    assert spot_agent.wait_for_notice([cloud], poll_seconds=0.02).ends_at == 1_900_000_000
    assert metadata.num_requests[AWS_ACTION] > 2


class Busy:
    """A driver with an actor on the worker node (one that drains and is idle ends at once), in a process of
    its own: Ray keeps a token for the life of a process."""

    PROGRAM = """
import json, sys
import ray

ray.init(log_to_driver=False, logging_level="ERROR")
nodes = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes()}

@ray.remote(num_cpus=1)
class Work:
    def is_done(self): return False

work = Work.remote()
ray.get(work.is_done.remote(), timeout=60)
print(json.dumps(nodes), flush=True)
for _ in sys.stdin:
    print(json.dumps(ray._private.state.state.get_draining_nodes()), flush=True)
"""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.nodes: dict[str, str] = self._read()

    def draining(self) -> dict[str, float]:
        """The draining nodes with their deadlines (Unix time in seconds)."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        return {node: deadline / 1000 for node, deadline in self._read().items()}

    def end(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=30)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="module")
def ray_nodes() -> Iterator[RayCluster]:
    with ray_cluster(1, cpus_per_worker=1) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def busy(ray_nodes: RayCluster) -> Iterator[Busy]:
    driver = Busy({**os.environ, **ray_nodes.environment})
    yield driver
    driver.end()


@pytest.fixture
def start_agent(ray_nodes: RayCluster, metadata: Metadata) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(*options: str, **variables: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            **ray_nodes.environment,
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.url,
            "GCE_METADATA_HOST": metadata.url.removeprefix("http://"),
            **variables,
        }
        command = [sys.executable, "-m", "infra.spot_agent", "--poll-seconds", "0.1", *options]
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=30)


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, log = process.communicate(timeout=SECONDS_FOR_AN_AGENT)
    return process.returncode, log


def wait_until_it_asks(metadata: Metadata, path: str) -> None:
    deadline = time.monotonic() + SECONDS_FOR_AN_AGENT
    while not metadata.num_requests[path]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.faults
def test_ray_drains_the_node_whose_machine_goes_and_only_that_one_once(
    busy: Busy, metadata: Metadata, start_agent: Callable[..., subprocess.Popen[str]]
) -> None:
    agent = start_agent(WORKER_NODE)
    wait_until_it_asks(metadata, AWS_ACTION)
    assert busy.draining() == {}
    end = time.time() + 120
    metadata.documents[AWS_ACTION] = aws_action(end)
    exit_code, log = end_of(agent)
    assert exit_code == 0, log
    draining = busy.draining()
    assert list(draining) == [busy.nodes["127.0.0.2"]]
    assert draining[busy.nodes["127.0.0.2"]] == pytest.approx(end - 5, abs=1.1)

    exit_code, log = end_of(start_agent(WORKER_NODE))
    assert exit_code == 0, log
    assert "draining already" in log
    assert busy.draining() == draining


@pytest.mark.faults
def test_a_head_that_is_away_is_told_when_it_is_back(
    ray_nodes: RayCluster,
    busy: Busy,
    metadata: Metadata,
    start_agent: Callable[..., subprocess.Popen[str]],
) -> None:
    metadata.is_aws = False
    metadata.documents[GCP_PREEMPTED] = "TRUE"
    port = free_port()
    agent = start_agent(WORKER_NODE, f"--address=127.0.0.1:{port}")
    assert agent.stderr is not None
    log = ""
    while "trying again" not in log:
        line = agent.stderr.readline()
        assert line, log
        log += line
    with Forwarding(port, ray_nodes.address):
        exit_code, rest = end_of(agent)
    assert exit_code == 0, log + rest
    assert 10 < busy.draining()[busy.nodes["127.0.0.2"]] - time.time() < 25  # earlier than any end before


@pytest.mark.faults
def test_it_fails_if_ray_cannot_be_told_in_time_and_stops_when_told(
    metadata: Metadata, start_agent: Callable[..., subprocess.Popen[str]]
) -> None:
    stopped = start_agent("--provider=gcp", WORKER_NODE)
    wait_until_it_asks(metadata, GCP_PREEMPTED)
    stopped.send_signal(signal.SIGTERM)
    exit_code, log = end_of(stopped)
    assert (exit_code, "SIGTERM" in log) == (0, True)

    metadata.documents[AWS_ACTION] = aws_action(time.time() - 1)
    exit_code, log = end_of(start_agent("--node-ip-address=127.0.0.9"))
    assert exit_code == 1
    assert "no living node at 127.0.0.9" in log

    exit_code, log = end_of(start_agent("--address=head"))
    assert exit_code == 2
    assert "'head'" in log


class Forwarding:
    """Passes the connections to a port on to `address`: a head that comes back."""

    def __init__(self, port: int, address: str) -> None:
        host, _, target_port = address.rpartition(":")
        self._target = (host, int(target_port))
        self._server = socket.create_server(("127.0.0.1", port))
        self._ends: list[socket.socket] = []

    def __enter__(self) -> None:
        threading.Thread(target=self._accept, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        for end in (self._server, *self._ends):
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            head = socket.create_connection(self._target, timeout=10)
            self._ends += [client, head]
            for source, sink in ((client, head), (head, client)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
