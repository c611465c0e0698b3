"""The private Ray of this machine, in processes of its own; joining another; bounded task submission."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import ray
from ray.exceptions import WorkerCrashedError

from infra import cluster, cluster_nodes, places, scratch, tracking_server
from infra.cluster_nodes import Demand
from pipelines import preflight
from tests.servers import REPOSITORY, MlflowServer, ray_cluster


def run_program(program: str, home: Path, *within: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `program` in a fresh process (of the command `within`) with an empty home and none of Ray's
    settings."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [*within, sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={**environment, "HOME": str(home), **variables},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


LOCAL_PROGRAM = """
import json, os
import ray  # before us, as a pipeline module does
from infra import cluster

@ray.remote
def look():
    import nst, infra, pipelines
    return os.environ["RAY_AUTH_MODE"]

first = cluster.connect(min_cpus=2)
again = cluster.connect(min_cpus=1)
larger = cluster.connect(min_cpus=first.num_cpus + 1)
mode = ray.get(look.remote())
mine = cluster._local.folder
cluster.disconnect()
print(json.dumps({"first": first.num_cpus, "again": again.num_cpus, "larger": larger.num_cpus,
                  "is_local": larger.is_local, "mode": mode, "left": os.path.exists(mine),
                  "token": len(os.environ["RAY_AUTH_TOKEN"])}))
"""


@pytest.mark.slow
def test_a_local_instance_is_private_quiet_and_leaves_nothing(tmp_path: Path) -> None:
    done = run_program(LOCAL_PROGRAM, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == ""
    seen = json.loads(done.stdout)  # nothing else is printed
    assert seen["first"] >= max(2, cluster.num_usable_cpus())
    assert seen["again"] == seen["first"]
    assert seen["larger"] == seen["first"] + 1
    assert seen["is_local"]
    assert seen["mode"] == "token"
    assert seen["token"] == 64
    assert not seen["left"]
    assert not (tmp_path / "home" / ".ray").exists()


KILLED_PROGRAM = """
import os, signal
from infra import cluster

cluster.connect(min_cpus=2)
print(cluster._local.folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.faults
def test_what_a_killed_program_left_goes_when_the_next_one_starts(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="nst-", dir="/tmp") as parent:  # short: Ray's sockets lie in it
        killed = run_program(KILLED_PROGRAM, tmp_path / "home", RAY_TMPDIR=parent)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        (left,) = Path(parent).iterdir()
        assert str(left) == killed.stdout.strip()
        os.utime(left / scratch.IN_USE, (0, 0))
        done = run_program(LOCAL_PROGRAM, tmp_path / "home", RAY_TMPDIR=parent)
        assert done.returncode == 0, done.stderr
        assert list(Path(parent).iterdir()) == []


MOVING_PROGRAM = """
import subprocess
import ray
from infra import cluster

def ip(words):
    subprocess.run(["ip", *words.split()], check=True)

@ray.remote
class Guest:
    def is_here(self):
        return True

ip("link set lo up")
ip("link add inside type veth peer name outside")
ip("link set outside up")
ip("link set inside up")
ip("address add 198.51.100.7/24 dev inside")
ip("route add default via 198.51.100.1")
cluster.connect(min_cpus=2)
assert ray.get(Guest.remote().is_here.remote(), timeout=60)
ip("address flush dev inside")
ip("address add 203.0.113.7/24 dev inside")
assert ray.get(Guest.remote().is_here.remote(), timeout=60)
print("still here")
"""


@pytest.mark.slow
def test_a_local_instance_outlives_a_change_of_networks(tmp_path: Path) -> None:
    unshare = ("unshare", "--map-root-user", "--net")
    make_link = ("ip", "link", "add", "inside", "type", "veth", "peer", "name", "outside")
    if subprocess.run(["env", *unshare, *make_link], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody have a network of their own")
    done = run_program(MOVING_PROGRAM, tmp_path / "home", *unshare)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "still here"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "nothing usable answers"),
        ("no-such-host.invalid:6379", "nothing usable answers"),
        ("http://127.0.0.1:8265", "nst submit"),
        ("ray://127.0.0.1:10001", "nst submit"),
        ("127.0.0.1:port", "nothing usable answers"),
    ],
)
def test_an_address_that_cannot_be_joined_says_so(
    monkeypatch: pytest.MonkeyPatch, address: str, message: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=message) as caught:
        cluster.connect()
    assert address in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_listener_that_is_no_ray_head_is_found_out_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listener.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(ValueError, match="no Ray head"):
            cluster.connect()
        assert time.monotonic() - started < 30


@ray.remote
def double(number: int) -> int:
    return 2 * number


@ray.remote
def stumble(kind: str) -> None:
    if kind == "library":
        int("no number")
    places.join("out", "../climbs")


@ray.remote
def die_once(mark: str) -> str:
    if not Path(mark).exists():
        Path(mark).touch()
        os._exit(1)
    return "came back"


@ray.remote
def fail_at_one(number: int, mark: str) -> int:
    """The calls behind it are under way when it fails."""
    if number == 1:
        Path(mark).touch()
        raise OSError("it was 1")
    deadline = time.monotonic() + 60
    while number > 1 and not Path(mark).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5 if number > 1 else 0)
    return number


@ray.remote(max_retries=0)
def die() -> None:
    os._exit(1)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
class TestRunBounded:
    def test_arguments_are_taken_as_they_are_needed(self) -> None:
        taken: list[int] = []

        def arguments():
            for number in range(20):
                taken.append(number)
                yield (number,)

        results = cluster.run_bounded(double, arguments(), max_in_flight=3)
        first = next(results)
        assert len(taken) == 3
        assert sorted([first, *results]) == [2 * number for number in range(20)]

    def test_nothing_to_do_is_done(self) -> None:
        assert list(cluster.run_bounded(double, [], max_in_flight=1)) == []

    def test_a_users_mistake_stays_one_and_a_librarys_does_not(self) -> None:
        with pytest.raises(ValueError, match="climbs"):
            list(cluster.run_bounded(stumble, [("ours",)], max_in_flight=1))
        with pytest.raises(RuntimeError, match="no number"):
            list(cluster.run_bounded(stumble, [("library",)], max_in_flight=1))

    def test_a_killed_worker_is_replaced(self, tmp_path: Path) -> None:
        arguments = [(str(tmp_path / "mark"),)]
        assert list(cluster.run_bounded(die_once, arguments, max_in_flight=1)) == ["came back"]

    def test_one_that_always_dies_is_an_error(self) -> None:
        with pytest.raises(WorkerCrashedError):
            list(cluster.run_bounded(die, [()], max_in_flight=1))

    def test_an_error_waits_for_the_calls_under_way_and_starts_no_other(self, tmp_path: Path) -> None:
        taken: list[int] = []

        def arguments():
            for number in range(20):
                taken.append(number)
                yield number, str(tmp_path / "mark")

        results = []
        with pytest.raises(cluster.CallFailed, match="call 1: OSError: it was 1") as caught:  # noqa: PT012
            for result in cluster.run_bounded(
                fail_at_one, arguments(), max_in_flight=3, name_of=lambda number, _: f"call {number}"
            ):
                results.append(result)
        assert isinstance(caught.value.cause, OSError)
        assert {0, 2} <= set(results)
        assert sorted([*results, 1]) == taken
        assert len(taken) < 20

    def test_a_call_whose_worker_dies_is_named(self) -> None:
        with pytest.raises(cluster.CallFailed, match="the deadly one"):
            list(cluster.run_bounded(die, [()], max_in_flight=1, name_of=lambda: "the deadly one"))
        with pytest.raises(ValueError, match="climbs"):  # a user's mistake stays one
            list(cluster.run_bounded(stumble, [("ours",)], max_in_flight=1, name_of=lambda kind: kind))


@pytest.mark.parametrize(
    ("path", "is_ours"),
    [
        ("/home/me/style/nst/corpus.py", True),
        ("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/pipelines/tree.py", True),
        ("/usr/local/lib/python3.11/site-packages/nst/objectives/build.py", True),
        ("/usr/lib/python3/dist-packages/infra/places.py", True),
        ("/usr/local/lib/python3.11/site-packages/transformers/pipelines/base.py", False),
        ("/srv/nst/.venv/lib/python3.11/site-packages/torch/nn/functional.py", False),
        ("/usr/local/lib/python3.11/json/decoder.py", False),
    ],
)
def test_a_mistake_is_the_users_wherever_our_code_is_installed(path: str, is_ours: bool) -> None:
    """The text is what a worker's error has: the frames, then the message."""
    raised = f'''Traceback (most recent call last):
  File "/somewhere/nst/train.py", line 3, in run
    work()
  File "{path}", line 7, in check
    raise ValueError(f"{{value}} is too large")
'''
    assert cluster.was_raised_by_us(raised) is is_ours
    assert not cluster.was_raised_by_us(raised.replace("raise ValueError", "int"))


def process_id() -> int:
    return os.getpid()


def hang() -> None:
    time.sleep(60)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
class TestNodes:
    def test_a_worker_has_its_whole_share_from_one_node(self) -> None:
        (node,) = cluster_nodes.living_nodes()
        num_cpus = int(node.total["CPU"])
        whole = Demand(num_workers=(1, 1), gpus_per_worker=0, cpus_per_worker=1)
        almost = Demand(num_workers=(1, 1), gpus_per_worker=0, cpus_per_worker=0.99)
        assert whole.num_that_fit({"CPU": 3.99}) == 3
        assert almost.num_that_fit({"CPU": 3.99}) == 4  # a job's driver takes the rest
        assert cluster_nodes.room_for(whole).ever == num_cpus
        too_large = Demand(num_workers=(1, 1), gpus_per_worker=0, cpus_per_worker=num_cpus + 1)
        assert cluster_nodes.room_for(too_large).ever == 0
        assert cluster_nodes.nodes_for(too_large) == []
        gpus = Demand(num_workers=(1, 1), gpus_per_worker=1, cpus_per_worker=1)
        assert cluster_nodes.room_for(gpus).ever == 0

    def test_each_node_answers_or_is_said_to_be_silent(self) -> None:
        (node,) = nodes = cluster_nodes.living_nodes()
        (answer,) = cluster_nodes.call_on_nodes(nodes, process_id).values()
        assert answer != os.getpid()
        answers = cluster_nodes.call_on_nodes(nodes, hang, timeout_s=0.5)
        assert isinstance(answers[node.address], TimeoutError)

    def test_one_node_tries_the_artifacts_of_mlflow(
        self, infra_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", infra_server.uri)
        (node,) = nodes = cluster_nodes.living_nodes()
        experiment = tracking_server.experiment_id(tracking_server.client(), "nst")
        reports = preflight.look_at_nodes(nodes, None, {})
        assert preflight.problems_on(reports[node.address]) == []
        kept = Path(infra_server.log_path).parent / "mlartifacts"
        assert not list(kept.rglob("*nst-check*"))
        tracking_server.client().delete_experiment(experiment)
        try:
            reports = preflight.look_at_nodes(nodes, None, {})
        finally:
            tracking_server.client().restore_experiment(experiment)
        (problem,) = preflight.problems_on(reports[node.address])
        assert problem.startswith(
            f"the artifacts of MLflow at {infra_server.uri}: the experiment 'nst' was del"
        )

    def test_a_training_here_asks_no_node_and_waits_for_none(self, tmp_path: Path) -> None:
        one_cpu = Demand(num_workers=(1, 2), gpus_per_worker=0, cpus_per_worker=0.99)
        started = time.monotonic()
        preflight.check(str(tmp_path / "run"), corpora={}, demand=one_cpu, wait_for_nodes_s=600)
        gpus = Demand(num_workers=(2, 2), gpus_per_worker=1, cpus_per_worker=0.99)
        with pytest.raises(ValueError, match="this machine has room for 0; try other --num-workers or --dev"):
            preflight.check(str(tmp_path / "run"), corpora={}, demand=gpus, wait_for_nodes_s=600)
        assert time.monotonic() - started < 10
        assert list((tmp_path / "run").iterdir()) == []


JOIN_PROGRAM = """
from infra import cluster, cluster_nodes
from pipelines import preflight
import ray

@ray.remote
def where():
    import nst
    return nst.__file__, ray.util.get_node_ip_address()

try:
    print(cluster.connect())
    print(sorted(set(cluster.run_bounded(where, [() for _ in range(6)], max_in_flight=4))))
    reports = preflight.look_at_nodes(cluster_nodes.living_nodes(), None, {})
    print([(name, report.problems) for name, report in reports.items()])
except ValueError as error:
    print("refused:", error)
"""


@pytest.mark.faults
def test_joining_a_cluster_needs_its_token(tmp_path: Path) -> None:
    with ray_cluster(2) as running:
        joined = run_program(JOIN_PROGRAM, tmp_path / "home", **running.environment)
        assert joined.returncode == 0, joined.stderr
        assert "num_cpus=4, num_gpus=0, num_nodes=3, is_local=False" in joined.stdout
        assert "[('127.0.0.2', {}), ('127.0.0.254', {}), ('127.0.0.3', {})]" in joined.stdout  # no problem
        wrong = {**running.environment, "RAY_AUTH_TOKEN": "0" * 64}
        started = time.monotonic()
        refused = run_program(JOIN_PROGRAM, tmp_path / "home", **wrong)
        assert time.monotonic() - started < 30
        assert refused.stdout.startswith("refused: RAY_ADDRESS is ")
        assert "RAY_AUTH_TOKEN" in refused.stdout
