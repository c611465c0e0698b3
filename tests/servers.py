"""Real servers on loopback for the tests: an S3 store, MLflow, a Ray cluster of several nodes.

Each is a context manager that takes free ports, waits until the server answers, and ends by process id
exactly what it started.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import psutil
from botocore.config import Config

REPOSITORY = Path(__file__).parent.parent
SWIFT_S3 = Path(__file__).parent / "tools" / "swift-s3"
SECONDS_TO_INSTALL = 300
SECONDS_TO_START = 150
SECONDS_TO_STOP = 20


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """`environment` is all that a client needs: set it in the test's process or give it to a child."""

    endpoint: str
    environment: dict[str, str] = field(repr=False)

    def create_bucket(self) -> str:
        """A new bucket of its own name: `s3://…`."""
        bucket = f"test-{secrets.token_hex(6)}"
        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=self.environment["AWS_REGION"],
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            config=Config(s3={"addressing_style": "path"}),
        )
        client.create_bucket(Bucket=bucket)
        return f"s3://{bucket}"


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """OpenStack Swift with its S3 interface, installed once into `.venv-s3` (12 s, 79 MB). Linux only."""
    tool_environment = {
        **os.environ,
        "SWIFT_S3_HOME": os.environ.get("SWIFT_S3_HOME", str(REPOSITORY / ".venv-s3")),
        "SWIFT_S3_PYTHON": sys.executable,
        "SWIFT_S3_FSYNC": "0",
    }

    def tool(*arguments: str, timeout: float) -> str:
        command = [str(SWIFT_S3), *arguments]
        done = subprocess.run(command, env=tool_environment, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}: {done.stderr[-2000:] or done.stdout[-2000:]}")
        return done.stdout

    tool("install", timeout=SECONDS_TO_INSTALL)
    with tempfile.TemporaryDirectory(prefix="nst-s3-") as folder:
        try:
            tool("start", folder, "0", timeout=SECONDS_TO_START)
            lines = tool("env", folder, timeout=SECONDS_TO_START).splitlines()
            exports = (shlex.split(line)[1] for line in lines if line.startswith("export "))
            environment = dict(export.split("=", 1) for export in exports)
            yield S3Server(endpoint=environment["AWS_ENDPOINT_URL"], environment=environment)
        finally:
            tool("stop", folder, timeout=SECONDS_TO_STOP)


@dataclass(frozen=True, kw_only=True)
class MlflowServer:
    uri: str
    log_path: str
    process_id: int


@contextlib.contextmanager
def mlflow_server(
    folder: str | Path,
    *,
    backend_store_uri: str | None = None,
    artifacts_destination: str | None = None,
    environment: dict[str, str] | None = None,
) -> Iterator[MlflowServer]:
    """An MLflow tracking server with a SQLite store and proxied artifacts below `folder`, unless told
    otherwise (`artifacts_destination` may be `s3://…`, with the store's `environment`)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    port, log_path = free_port(), folder / "mlflow.log"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", backend_store_uri or f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", artifacts_destination or str(folder / "mlartifacts")]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **(environment or {}), "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        uri = f"http://127.0.0.1:{port}"
        wait_until_healthy(f"{uri}/health", process, log_path)
        yield MlflowServer(uri=uri, log_path=str(log_path), process_id=process.pid)
    finally:
        end_session(process)


def wait_until_healthy(
    url: str, process: subprocess.Popen[bytes], log_path: Path, *, token: str | None = None
) -> None:
    """Returns when `url` answers 200. Raises RuntimeError with the end of the log if that does not come."""
    deadline = time.monotonic() + SECONDS_TO_START
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"{url} does not answer:\n{log_path.read_text(errors='replace')[-3000:]}")


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that was started with `start_new_session=True`, and its children."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=SECONDS_TO_STOP)
            return


@dataclass(frozen=True, kw_only=True)
class RayCluster:
    """`environment` lets a process join it (RAY_ADDRESS), or submit jobs to it (RAY_API_SERVER_ADDRESS).
    `process_ids` are those that the worker nodes descend from."""

    address: str
    jobs_url: str
    process_ids: list[int]
    environment: dict[str, str] = field(repr=False)


@contextlib.contextmanager
def ray_cluster(num_workers: int = 1, *, cpus_per_worker: int = 2) -> Iterator[RayCluster]:
    """A real cluster of a head without CPUs and `num_workers` nodes on loopback, with token authentication
    (about 15 s for two nodes). Linux only: the nodes are told apart by their 127.0.0.x addresses."""
    port, jobs_port = free_port(), free_port()
    environment = {
        **{key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # a job's `python`
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    nodes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="nst-ray-", ignore_cleanup_errors=True) as folder:

        def start_node(name: str, *arguments: str) -> None:
            command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments]
            command += [
                "--dashboard-agent-listen-port",
                str(free_port()),
                "--object-store-memory",
                "100000000",
            ]
            command += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"]
            with (Path(folder) / f"{name}.log").open("wb") as log:
                process = subprocess.Popen(
                    command,
                    cwd=folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            nodes.append(process)

        try:
            head = ["--head", f"--port={port}", f"--temp-dir={folder}", "--num-cpus=0", "--num-gpus=0"]
            head += ["--dashboard-host=127.0.0.1", f"--dashboard-port={jobs_port}"]
            start_node("head", *head, f"--ray-client-server-port={free_port()}")
            log_path = Path(folder) / "head.log"
            health_url, token = f"http://127.0.0.1:{jobs_port}/api/version", environment["RAY_AUTH_TOKEN"]
            wait_until_healthy(health_url, nodes[0], log_path, token=token)
            _wait_for_text(log_path, "To terminate the Ray runtime", nodes[0])
            address = _address_in_log(log_path, port)
            for number in range(num_workers):  # one after the other: in parallel some time out
                name = f"worker-{number}"
                worker = [f"--address={address}", f"--node-ip-address=127.0.0.{number + 2}", "--num-gpus=0"]
                start_node(name, *worker, f"--num-cpus={cpus_per_worker}")
                _wait_for_text(Path(folder) / f"{name}.log", "Ray runtime started", nodes[-1])
            jobs_url = f"http://127.0.0.1:{jobs_port}"
            settings = {name: environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
            settings |= {"RAY_ADDRESS": address, "RAY_API_SERVER_ADDRESS": jobs_url}
            process_ids = [node.pid for node in nodes[1:]]
            yield RayCluster(
                address=address, jobs_url=jobs_url, process_ids=process_ids, environment=settings
            )
        finally:
            for process in reversed(nodes):
                _end_tree(process)


def _address_in_log(log_path: Path, port: int) -> str:
    """The head replaces a loopback address with the machine's own, and says so."""
    found = re.search(rf"\d[0-9.]+:{port}", log_path.read_text(errors="replace"))
    assert found, log_path.read_text(errors="replace")
    return found.group(0)


def _wait_for_text(log_path: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline and process.poll() is None:
        if text in log_path.read_text(errors="replace"):
            return
        time.sleep(0.2)
    raise RuntimeError(f"{text!r} does not come:\n{log_path.read_text(errors='replace')[-3000:]}")


def _end_tree(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that descend from it: Ray's own processes lead sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=SECONDS_TO_STOP)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=SECONDS_TO_STOP)
