"""Real clusters of several nodes on this machine: side by side, losing nodes, leaving nothing behind."""

from __future__ import annotations

import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import requests

from infra import jobs
from infra.local_cluster import LocalCluster, local_cluster
from infra.local_node import Node, processes_of
from infra.local_servers import SECONDS_TO_START
from tests.servers import REPOSITORY

# A node that is gone is noticed in seconds; Ray by itself takes some fifteen.
IMPATIENT = {"RAY_health_check_initial_delay_ms": "0", "RAY_health_check_period_ms": "500"}


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=5)  # the system takes a moment to forget the dead
    assert not alive


def state_of(cluster: LocalCluster, node_id: str) -> str:
    (state,) = (node for node in cluster.node_states() if node["node_id"] == node_id)
    return state["state"]


def test_another_system_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match=r"need Linux.* this is darwin: `ray start --head`"):
        LocalCluster()


@pytest.mark.faults
def test_a_person_starts_one_and_ends_it(tmp_path: Path) -> None:
    env_file = tmp_path / "cluster.env"
    command = [sys.executable, "-m", "infra.local_cluster", "--workers", "1", "--cpus-per-worker", "3"]
    command += ["--mlflow", str(tmp_path / "mlflow"), "--env-file", str(env_file)]
    program = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    family: list[psutil.Process] = []
    try:
        wait_until(lambda: env_file.exists() or program.poll() is not None, "no env file")
        assert program.poll() is None
        family = psutil.Process(program.pid).children(recursive=True)
        assert stat.S_IMODE(env_file.stat().st_mode) == 0o600
        exports = [shlex.split(line) for line in env_file.read_text().splitlines()]
        variables = dict(assignment.split("=", 1) for _, assignment in exports)
        assert set(variables) == {
            "MLFLOW_TRACKING_URI",
            "RAY_API_SERVER_ADDRESS",
            "RAY_AUTH_MODE",
            "RAY_AUTH_TOKEN",
        }
        uri = variables["MLFLOW_TRACKING_URI"]
        assert requests.get(f"{uri}/health", timeout=10).status_code == 200
        raylets = [process for process in family if process.name() == "raylet"]
        assert [raylet.environ()["MLFLOW_TRACKING_URI"] for raylet in raylets] == [uri, uri]
        address, token = variables["RAY_API_SERVER_ADDRESS"], variables["RAY_AUTH_TOKEN"]
        nodes = requests.get(
            f"{address}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"}, timeout=10
        ).json()["data"]["result"]["result"]
        assert sorted(node["resources_total"].get("CPU", 0) for node in nodes) == [0, 3]
        assert requests.get(f"{address}/api/v0/nodes", timeout=10).status_code == 401
    finally:
        program.send_signal(signal.SIGTERM)
        output, _ = program.communicate(timeout=60)
    assert program.returncode == 0
    assert output.startswith("export MLFLOW_TRACKING_URI=http://127.0.0.1:")
    assert not env_file.exists()
    assert family
    assert_gone(family)


@pytest.mark.faults
def test_a_head_that_stops_answering_is_named_and_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start_head, heads = LocalCluster.start_head, []

    def start_a_head_that_freezes(cluster: LocalCluster, **options: int) -> Node:
        monkeypatch.setattr("infra.local_cluster.SECONDS_TO_START", SECONDS_TO_START)
        heads.append(start_head(cluster, **options))
        if len(heads) == 1:
            next(child for child in processes_of(heads[0]) if child.name() == "gcs_server").suspend()
            monkeypatch.setattr("infra.local_cluster.SECONDS_TO_START", 3)
        return heads[-1]

    monkeypatch.setattr(LocalCluster, "start_head", start_a_head_that_freezes)
    with local_cluster(1) as cluster:
        assert len(heads) == 2
        assert cluster.head == heads[1]
        assert not processes_of(heads[0])
        assert sorted(state["node_ip"] for state in cluster.node_states()) == ["127.0.0.2", "127.0.0.254"]
    assert "the cluster is started once more: a node of Ray does not start" in caplog.text
    assert "gcs_server (stopped)" in caplog.text


@pytest.mark.faults
def test_a_cluster_loses_nodes_and_leaves_nothing_beside_another() -> None:
    with local_cluster(1) as other:
        node = other.workers[0]
        folder = check_a_cluster_that_loses_nodes()
        assert not folder.exists()
        assert state_of(other, node.node_id) == "ALIVE"
        assert len(other.node_states()) == 2


def check_a_cluster_that_loses_nodes() -> Path:
    with local_cluster(1, environment=IMPATIENT) as cluster:
        first = cluster.workers[0]
        folder = Path(processes_of(first)[0].cwd())
        second = cluster.add_worker(num_cpus=1, num_gpus=2, resources={"spot": 1})
        assert (first.address, second.address) == ("127.0.0.2", "127.0.0.3")
        totals = {node["node_id"]: node["resources_total"] for node in cluster.node_states()}
        assert "CPU" not in totals[cluster.head.node_id]
        assert totals[first.node_id]["CPU"] == 2
        assert [totals[second.node_id][name] for name in ("CPU", "GPU", "spot")] == [1, 2, 1]

        processes = processes_of(first)
        assert {first.process.pid, first.raylet_process_id} < {process.pid for process in processes}
        cluster.kill_node(first)
        assert_gone(processes)
        assert cluster.workers == [second]
        wait_until(lambda: state_of(cluster, first.node_id) == "DEAD", "Ray does not miss the node")
        assert state_of(cluster, second.node_id) == "ALIVE"

        cluster.drain(second, 60)  # it has nothing to do, so Ray lets it go at once
        wait_until(lambda: state_of(cluster, second.node_id) == "DEAD", "Ray does not drain the node")
        (state,) = (node for node in cluster.node_states() if node["node_id"] == second.node_id)
        assert "preemption" in state["state_message"]

        with pytest.MonkeyPatch.context() as patch:
            for name, value in cluster.environment.items():
                patch.setenv(name, value)
            assert jobs.list_jobs(jobs.connect()) == []
        left = [process for node in (cluster.head, second) for process in processes_of(node)]
    assert_gone(left)
    return folder
