"""A real Ray cluster of several nodes on this machine, for tests and trials.

A head without CPUs, and workers with addresses of their own on loopback: 127.0.0.2, 127.0.0.3, … Each is a
`ray start` with a raylet of its own, so a node can die, drain or join as it does elsewhere. Two things differ
from several machines: the nodes share one file system, and drivers are clients of the head's raylet. (Ray's
reader of a job's log is one, too: `ray job logs` looks into the head's folder, `nst logs` in the right one.)
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil
import requests

from infra.cluster import num_usable_cpus
from infra.local_servers import SECONDS_TO_START, SECONDS_TO_STOP, end_of, free_port, mlflow_server

FIRST_ADDRESS = ipaddress.ip_address("127.0.0.2")
SECONDS_TO_ANSWER = 10.0
SECONDS_TO_DRAIN = 60.0
SECONDS_OF_GRACE = 2.0
OBJECT_STORE_BYTES = 100_000_000
# All that a node starts inherits it, whatever becomes of the parents: how a node's processes are found.
MARK = "NST_LOCAL_NODE"
OF_ANOTHER_CLUSTER = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
)
RAY = (sys.executable, "-m", "ray.scripts.scripts")


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node of the cluster: its address, its id in Ray (hex), its `ray start` and what that started."""

    address: str
    node_id: str
    raylet_process_id: int
    process: subprocess.Popen[bytes] = field(repr=False)
    mark: str = field(repr=False)

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None


class LocalCluster:
    """What `local_cluster` starts.

    `environment` lets a process join the cluster (RAY_ADDRESS) and submit jobs to it
    (RAY_API_SERVER_ADDRESS); both need the token in it.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        if not sys.platform.startswith("linux"):
            raise ValueError(
                f"several nodes on one machine need Linux, where all of 127.0.0.0/8 is this machine; this is "
                f"{sys.platform}: `ray start --head` starts a cluster of one node"
            )
        self.address = self.jobs_url = ""
        self.head: Node
        self.workers: list[Node] = []
        self._token = secrets.token_hex(32)
        self._mark = secrets.token_hex(8)
        self._num_started = 0
        self._processes: list[subprocess.Popen[bytes]] = []
        # A short path: those of the sockets below it may have 107 characters.
        self._folder = tempfile.mkdtemp(prefix="nst-ray-", dir=os.environ.get("RAY_TMPDIR", "/tmp"))
        self._node_environment = {
            **{name: value for name, value in os.environ.items() if name not in OF_ANOTHER_CLUSTER},
            **(environment or {}),
            # a job's `python`
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "SPT_NOENV": "1",  # Ray's processes rename themselves, and would write over their environment
        }

    @property
    def environment(self) -> dict[str, str]:
        return {
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": self.jobs_url,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
        }

    def start_head(self, *, jobs_port: int = 0) -> Node:
        """The head; its jobs server listens on 127.0.0.1, at `jobs_port` or a free one."""
        head = ["--head", "--port=0", f"--temp-dir={self._folder}", "--num-cpus=0", "--num-gpus=0"]
        head += ["--dashboard-host=127.0.0.1", f"--dashboard-port={jobs_port}"]
        process, mark, log_path = self._start(*head, f"--ray-client-server-port={free_port()}")
        # Ray replaces a head's loopback address with the machine's own, and a busy port with another one.
        self.address = _wait_for(r"ray start --address='([^']+)'", log_path, process)
        self.jobs_url = _wait_for(r"RAY_API_SERVER_ADDRESS='([^']+)'", log_path, process)
        self.head = self._node(self.address.rpartition(":")[0], process, mark, log_path)
        return self.head

    def add_worker(
        self,
        *,
        num_cpus: int = 2,
        num_gpus: int = 0,
        resources: Mapping[str, float] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Node:
        """One more node, with `environment` beside that of all. `num_gpus` are logical: to schedule on."""
        address = str(FIRST_ADDRESS + self._num_started - 1)
        worker = [f"--address={self.address}", f"--node-ip-address={address}", f"--num-cpus={num_cpus}"]
        worker += [f"--num-gpus={num_gpus}", f"--resources={json.dumps(dict(resources or {}))}"]
        # Of one folder for all nodes each would unpack a job's files anew, under the feet of the others.
        worker += [f"--temp-dir={self._folder}/{self._num_started}"]
        process, mark, log_path = self._start(*worker, environment=environment)
        self.workers.append(self._node(address, process, mark, log_path))
        return self.workers[-1]

    def kill_node(self, node: Node) -> None:
        """The node's machine is gone: all its processes freeze and are killed, jobs' drivers included."""
        _kill(node.mark)
        node.process.wait(timeout=SECONDS_TO_STOP)
        self.workers = [worker for worker in self.workers if worker != node]

    def drain(self, node: Node, seconds: int) -> None:
        """Tells Ray what a cloud's notice says: the node will be gone in `seconds`."""
        command = [*RAY, "drain-node", f"--address={self.address}", f"--node-id={node.node_id}"]
        command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot notice"]
        command += [f"--deadline-remaining-seconds={seconds}"]
        done = subprocess.run(
            command,
            env={**self._node_environment, **self.environment},
            capture_output=True,
            text=True,
            timeout=SECONDS_TO_DRAIN,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{node.address} does not drain: {done.stderr[-2000:] or done.stdout[-2000:]}")

    def node_states(self) -> list[dict[str, Any]]:
        """What Ray says of its nodes, those that died included."""
        answer = requests.get(
            f"{self.jobs_url}/api/v0/nodes",
            headers={"Authorization": f"Bearer {self._token}"},
            timeout=SECONDS_TO_ANSWER,
        )
        answer.raise_for_status()
        return answer.json()["data"]["result"]["result"]

    def close(self) -> None:
        """Ends every process of the cluster and removes its folder."""
        for process in self._processes:
            process.terminate()
        psutil.wait_procs(_marked(self._mark), timeout=SECONDS_OF_GRACE)
        _kill(self._mark)
        for process in self._processes:
            process.wait(timeout=SECONDS_TO_STOP)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(
        self, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> tuple[subprocess.Popen[bytes], str, Path]:
        """(process, mark, log) of one `ray start`."""
        mark = f"{self._mark}/{self._num_started}"
        log_path = Path(self._folder) / f"node-{self._num_started}.log"
        self._num_started += 1
        command = [*RAY, "start", "--block", *arguments, "--disable-usage-stats"]
        command += ["--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=self._folder,
                env={**self._node_environment, **(environment or {}), MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a person's Ctrl-C is ours to handle
            )
        self._processes.append(process)
        return process, mark, log_path

    def _node(self, address: str, process: subprocess.Popen[bytes], mark: str, log_path: Path) -> Node:
        """Waits until Ray counts the node in. One after the other: started in parallel, some time out."""
        _wait_for("(Ray runtime started)", log_path, process)
        deadline = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(requests.RequestException):
                ids = [state["node_id"] for state in self.node_states() if state["node_ip"] == address]
                raylets = [child.pid for child in _marked(mark) if child.name() == "raylet"]
                if ids and raylets:
                    raylet, node_id = raylets[0], ids[0]
                    return Node(
                        address=address, node_id=node_id, raylet_process_id=raylet, process=process, mark=mark
                    )
            time.sleep(0.1)
        raise RuntimeError(f"the node at {address} does not join:\n{end_of(log_path)}")


@contextlib.contextmanager
def local_cluster(
    num_workers: int = 2,
    *,
    cpus_per_worker: int = 2,
    environment: Mapping[str, str] | None = None,
    jobs_port: int = 0,
) -> Iterator[LocalCluster]:
    """Starts a cluster (about 15 s with two workers) and ends all of it at the end.

    The nodes have this process's environment and `environment`. Raises ValueError on another system than
    Linux, RuntimeError with the end of Ray's log if a node does not start.
    """
    cluster = LocalCluster(environment)
    try:
        cluster.start_head(jobs_port=jobs_port)
        for _ in range(num_workers):
            cluster.add_worker(num_cpus=cpus_per_worker)
        yield cluster
    finally:
        cluster.close()


def processes_of(node: Node) -> list[psutil.Process]:
    """All that runs on the node: Ray's own processes, workers, drivers of jobs and what those started."""
    return _marked(node.mark)


def _wait_for(pattern: str, log_path: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(pattern, log_path.read_text(errors="replace")):
            return found.group(1)
        time.sleep(0.1)
    raise RuntimeError(f"a node of Ray does not start:\n{end_of(log_path)}")


def _marked(mark: str) -> list[psutil.Process]:
    """The processes of a node, or of all nodes for the part of the mark that they share."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # gone meanwhile, or somebody else's
            own = process.environ().get(MARK, "")
            if own == mark or own.startswith(f"{mark}/"):
                found.append(process)
    return found


def _kill(mark: str) -> None:
    """Freezes them first, again until there is none left, so that none starts another before it dies."""
    frozen: set[psutil.Process] = set()
    while running := set(_marked(mark)) - frozen:
        for process in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        frozen |= running
    for process in frozen:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(frozen, timeout=SECONDS_TO_STOP)


@click.command()
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Worker nodes.")
@click.option(
    "--cpus-per-worker", type=click.IntRange(min=1), help="[default: this machine's, shared among them]"
)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Of the jobs server. [a free one]")
@click.option(
    "--mlflow",
    "mlflow_folder",
    metavar="FOLDER",
    help="Start an MLflow server, too, with its store and artifacts below FOLDER; the nodes know it.",
)
@click.option("--env-file", metavar="PATH", help="Write the exports there as long as the cluster lives.")
def main(
    workers: int, cpus_per_worker: int | None, port: int, mlflow_folder: str | None, env_file: str | None
) -> None:
    """Start a Ray cluster of several nodes on this machine, print the settings that reach it, and end it with
    Ctrl-C. Linux only.

    \b
    Example:
      python -m infra.local_cluster --mlflow trial/mlflow --env-file trial.env &
      source trial.env                                       # once the file is there
      nst submit -- doctor
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # More than there are would have the threads of a training wait for each other.
    cpus_per_worker = cpus_per_worker or max(1, num_usable_cpus() // workers)
    try:
        with contextlib.ExitStack() as stack:
            shown = {}
            if mlflow_folder:
                shown["MLFLOW_TRACKING_URI"] = stack.enter_context(mlflow_server(mlflow_folder)).uri
            cluster = stack.enter_context(
                local_cluster(workers, cpus_per_worker=cpus_per_worker, environment=shown, jobs_port=port)
            )
            shown |= {name: value for name, value in cluster.environment.items() if name != "RAY_ADDRESS"}
            exports = "".join(
                f"export {name}={shlex.quote(value)}\n" for name, value in sorted(shown.items())
            )
            if env_file:
                stack.enter_context(_private_file(Path(env_file), exports))
            click.echo(f"{exports}# {workers} workers of {cpus_per_worker} CPUs; Ctrl-C ends them")
            while cluster.head.is_alive:
                time.sleep(1)
            raise click.ClickException("the head has ended by itself")
    except KeyboardInterrupt:
        click.echo("the cluster has ended")
    except ValueError as error:
        raise click.UsageError(str(error)) from error


@contextlib.contextmanager
def _private_file(path: Path, text: str) -> Iterator[None]:
    """A file that only its owner reads, there at once with all its text, and gone at the end."""
    descriptor, partial = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)  # mode 600
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    Path(partial).rename(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
