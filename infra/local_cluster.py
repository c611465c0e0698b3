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
import logging
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
from pathlib import Path
from typing import Any

import click
import psutil
import requests

from infra.cluster import LOOPBACK_ADDRESS, num_usable_cpus
from infra.local_node import MARK, Node, kill_all, marked, processes_of
from infra.local_servers import SECONDS_TO_START, SECONDS_TO_STOP, end_of, free_port, mlflow_server

log = logging.getLogger(__name__)

FIRST_ADDRESS = ipaddress.ip_address("127.0.0.2")
SECONDS_TO_ANSWER = 10.0
SECONDS_TO_DRAIN = 60.0
SECONDS_OF_GRACE = 2.0
NUM_TRIES = 2  # to start a cluster: of some hundred, one had a head that answered itself, and no worker
OBJECT_STORE_BYTES = 100_000_000
OF_ANOTHER_CLUSTER = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
)
RAY = (sys.executable, "-m", "ray.scripts.scripts")


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
        head += [f"--node-ip-address={LOOPBACK_ADDRESS}", "--dashboard-host=127.0.0.1"]
        head += [f"--dashboard-port={jobs_port}"]
        process, mark, log_path = self._start(*head, f"--ray-client-server-port={free_port()}")
        # Ray replaces a busy port.
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
        try:
            node = self._node(address, process, mark, log_path)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{self._state_of_head()}") from error
        self.workers.append(node)
        return node

    def kill_node(self, node: Node) -> None:
        """The node's machine is gone: all its processes freeze and are killed, jobs' drivers included."""
        kill_all(node.mark)
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
        psutil.wait_procs(marked(self._mark), timeout=SECONDS_OF_GRACE)
        kill_all(self._mark)
        for process in self._processes:
            process.wait(timeout=SECONDS_TO_STOP)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _state_of_head(self) -> str:
        """What it runs, and its own last words: a worker's log says only that it does not answer."""
        running = [f"{process.name()} ({process.status()})" for process in processes_of(self.head)]
        logs = Path(self._folder) / "session_latest" / "logs"
        words = [end_of(path) for path in (logs / "gcs_server.out", logs / "gcs_server.err") if path.exists()]
        return "\n".join((f"the head runs: {', '.join(running) or 'nothing'}", *words))

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
                raylets = [child.pid for child in marked(mark) if child.name() == "raylet"]
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
    Linux, RuntimeError with the ends of Ray's logs if nodes do not start, not even in a second cluster.
    """
    for num_tries_left in reversed(range(NUM_TRIES)):
        with contextlib.closing(LocalCluster(environment)) as cluster:
            try:
                cluster.start_head(jobs_port=jobs_port)
                for _ in range(num_workers):
                    cluster.add_worker(num_cpus=cpus_per_worker)
            except RuntimeError as error:
                if not num_tries_left:
                    raise
                log.warning("the cluster is started once more: %s", error)
                continue
            yield cluster
            return


def _wait_for(pattern: str, log_path: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(pattern, log_path.read_text(errors="replace")):
            return found.group(1)
        time.sleep(0.1)
    raise RuntimeError(f"a node of Ray does not start:\n{end_of(log_path)}")


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
