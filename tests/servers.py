"""Real servers on loopback for the tests: an S3 store, MLflow, a Ray cluster of several nodes.

Each is a context manager that takes free ports, waits until the server answers, and ends by process id
exactly what it started.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import boto3
from botocore.config import Config

from infra.local_cluster import LocalCluster, local_cluster
from infra.local_servers import (
    SECONDS_TO_START,
    SECONDS_TO_STOP,
    MlflowServer,
    end_session,
    free_port,
    mlflow_server,
    wait_until_healthy,
)

__all__ = [
    "MlflowServer",
    "RayCluster",
    "S3Server",
    "end_session",
    "free_port",
    "mlflow_server",
    "ray_cluster",
    "s3_server",
    "wait_until_healthy",
]

REPOSITORY = Path(__file__).parent.parent
SWIFT_S3 = Path(__file__).parent / "tools" / "swift-s3"
SECONDS_TO_INSTALL = 300


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


RayCluster = LocalCluster


def ray_cluster(
    num_workers: int = 1, *, cpus_per_worker: int = 2
) -> contextlib.AbstractContextManager[LocalCluster]:
    """A real cluster of a head without CPUs and `num_workers` nodes (about 15 s for two). Linux only."""
    return local_cluster(num_workers, cpus_per_worker=cpus_per_worker)
