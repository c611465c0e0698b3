"""Servers on this machine's loopback, for tests and trials: started, waited for, ended by process id."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import requests

SECONDS_TO_START = 150
SECONDS_TO_STOP = 20

# Without the jobs that judge language models the server starts in half the time, with eight processes less.
SERVER_SETTINGS = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def free_port() -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True, kw_only=True)
class MlflowServer:
    uri: str
    log_path: str
    process_id: int


@contextlib.contextmanager
def mlflow_server(
    folder: str | Path,
    *,
    port: int | None = None,
    backend_store_uri: str | None = None,
    artifacts_destination: str | None = None,
    is_proxy: bool = True,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[MlflowServer]:
    """An MLflow tracking server with a SQLite store and proxied artifacts below `folder`, unless told
    otherwise (`artifacts_destination` may be `s3://…`, with the store's `environment`).

    Args:
        is_proxy: artifacts go through the server; else clients go to `artifacts_destination` themselves.
        options: of the command line, beside those.
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    port, log_path = port or free_port(), folder / "mlflow.log"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", backend_store_uri or f"sqlite:///{folder}/mlflow.db"]
    destination = artifacts_destination or str(folder / "mlartifacts")
    if is_proxy:
        command += ["--artifacts-destination", destination]
    else:
        command += ["--no-serve-artifacts", "--default-artifact-root", destination]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*command, *options],
            cwd=folder,
            env={**os.environ, **(environment or {}), **SERVER_SETTINGS},
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
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(requests.RequestException):
            if requests.get(url, headers=headers, timeout=5).status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"{url} does not answer:\n{end_of(log_path)}")


def end_of(log_path: Path) -> str:
    """What a server printed last."""
    return log_path.read_text(errors="replace")[-3000:]


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that was started with `start_new_session=True`, and its children."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=SECONDS_TO_STOP)
            return
