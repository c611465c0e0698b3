"""Before a training: each thing that is wrong with a real cluster is refused in one line, in time."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from infra import cluster, cluster_nodes, local_cluster, local_node, storage
from infra import s3 as s3_requests
from infra.cluster_nodes import Demand, living_nodes
from nst.corpus import Corpus
from nst.manifest import MANIFEST_NAME, REMEDY
from pipelines import lineage, preflight
from pipelines.node_check import Errand, check_versions, versions
from tests.corpora import make_corpus
from tests.servers import REPOSITORY, RayCluster, S3Server, ray_cluster

pytestmark = pytest.mark.slow

SECONDS_PROMISED = 30
ONE_CPU = Demand(num_workers=(1, 2), gpus_per_worker=0, cpus_per_worker=0.99)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the nodes share, with both corpora in it."""
    folder = tmp_path_factory.mktemp("shared")
    for role in ("content", "style"):
        make_corpus(folder / role, role, per_label=3)
    return folder


@pytest.fixture
def corpora(shared: Path, tmp_path: Path) -> dict[str, Corpus]:
    """Both, opened; a copy that a test may spoil."""
    shutil.copytree(shared, tmp_path / "shared")
    return {role: Corpus.open(str(tmp_path / "shared" / role)) for role in ("content", "style")}


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code as it is now, for the nodes: somebody may be working on it."""
    folder = tmp_path_factory.mktemp("code")
    for name in cluster.OUR_PACKAGES:
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    lineage.code_digest.cache_clear()
    lineage.code_digest()
    return folder


@pytest.fixture(scope="module")
def running(store: S3Server, code: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A cluster of one worker node with two CPUs, joined by this process as a job's driver is: the nodes have
    the code and the settings of the store by themselves."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(code))
        with ray_cluster(1) as started:
            for name, value in started.environment.items():
                patch.setenv(name, value)
            patch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
            patch.chdir(
                tmp_path_factory.mktemp("driver")
            )  # Ray would have the workers import from where the driver stands
            cluster.disconnect()
            cluster.connect()
            try:
                yield started
            finally:
                cluster.disconnect()


@contextmanager
def one_more_node(running: RayCluster, **options) -> Iterator[local_node.Node]:
    node = running.add_worker(**options)
    try:
        yield node
    finally:
        node.process.terminate()  # which tells the head, too: a kill has to be found out
        with suppress(subprocess.TimeoutExpired):
            node.process.wait(timeout=10)
        running.kill_node(node)
        wait_until(lambda: node.address not in {found.address for found in living_nodes()})


def wait_until(is_so: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@ray.remote
class SomebodyElse:
    def is_here(self) -> bool:
        return True


def somebody_else(**resources: float) -> Any:
    """Who uses these resources of the cluster, until `ray.kill`."""
    actor: Any = SomebodyElse.options(**resources).remote()
    assert ray.get(actor.is_here.remote(), timeout=60)
    return actor


def refusal(training_uri: str, corpora: dict[str, Corpus], demand: Demand = ONE_CPU, **options) -> str:
    """The line with which it is refused."""
    started = time.monotonic()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - what it says is the callers' business
        preflight.check(training_uri, corpora=corpora, demand=demand, **options)
    assert time.monotonic() - started < SECONDS_PROMISED
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("running")
class TestFromHere:
    """What the driver finds before it asks the cluster."""

    def test_a_sound_cluster_passes_and_nothing_is_left(
        self, corpora: dict[str, Corpus], store: S3Server, tmp_path: Path
    ) -> None:
        bucket = store.create_bucket()
        for role in ("content", "style"):
            storage.upload_dir(corpora[role].uri, f"{bucket}/{role}")
        remote = {
            role: Corpus.open(
                f"{bucket}/{role}", storage=storage.ObjectStorage(), cache_dir=str(tmp_path / "cache")
            )
            for role in corpora
        }
        num_objects = len(list(storage.list_objects(bucket, include_hidden=True)))
        two = Demand(num_workers=(2, 8), gpus_per_worker=0, cpus_per_worker=0.99)
        preflight.check(f"{bucket}/run", corpora=remote, demand=two)
        assert len(list(storage.list_objects(bucket, include_hidden=True))) == num_objects
        preflight.check(str(tmp_path / "run"), corpora=corpora, demand=two)
        assert list((tmp_path / "run").iterdir()) == []

    def test_a_corpus_that_has_changed_and_a_shard_that_was_cut_are_told_together(
        self, corpora: dict[str, Corpus], tmp_path: Path
    ) -> None:
        content, style = (Path(corpora[role].uri) for role in ("content", "style"))
        shutil.copy(content / MANIFEST_NAME, style / MANIFEST_NAME)
        shard = corpora["content"].manifest.shards[-1]
        cut, gone = content / shard.tar, content / shard.index
        size = cut.stat().st_size
        os.truncate(cut, size - 512)
        gone.unlink()
        line = refusal(str(tmp_path / "run"), corpora)
        assert f"{cut.name} has {size - 512:,} bytes instead of {size:,}" in line
        assert f"{gone.name} is missing; {REMEDY}" in line
        assert f"{style} is another corpus than the one that was opened" in line

    def test_storage_that_cannot_be_used_is_named_with_its_remedy(
        self, corpora: dict[str, Corpus], store: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        line = refusal(str(tmp_path / "file" / "run"), corpora)
        assert "Not a directory" in line
        assert "or choose another place" in line
        assert "there is no bucket 'nobodys-bucket'" in refusal("s3://nobodys-bucket/run", corpora)
        place = f"{store.create_bucket()}/run"
        with monkeypatch.context() as patch:
            patch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-one")
            line = refusal(place, corpora)
            assert "check AWS_ACCESS_KEY_ID" in line
            assert "a-wrong-one" not in line
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
            patch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
            assert "cannot reach http://127.0.0.1:1" in refusal(place, corpora)

    def test_storage_that_gives_no_answer_is_not_waited_for(
        self, corpora: dict[str, Corpus], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:  # takes connections, and says nothing
            endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
            monkeypatch.setattr(preflight, "SECONDS_HERE", 2.0)
            line = refusal("s3://somebodys-bucket/run", corpora)
            started = time.monotonic()
            with s3_requests.patience(0.5), pytest.raises(OSError, match="ReadTimeoutError"):
                storage.read_bytes("s3://somebodys-bucket/run")
            assert time.monotonic() - started < 10  # else a minute an answer
        assert "s3://somebodys-bucket/run gives no answer within 2 s" in line


@pytest.mark.parametrize("name", ["Python", "ray", "torch"])
def test_other_versions_than_the_drivers_are_named(name: str) -> None:
    here = versions()
    check_versions(Errand(versions=versions(), code_digest=lineage.code_digest()), here)
    check_versions(Errand(versions=versions(), code_digest=None), here)  # Ray has brought the code
    with pytest.raises(
        ValueError, match=rf"it has {name} 1\.0, the driver \d.*; install the same everywhere"
    ):
        check_versions(Errand(versions=versions(), code_digest=None), {**here, name: "1.0"})
    with pytest.raises(ValueError, match="its code is another than the driver's"):
        check_versions(Errand(versions=versions(), code_digest="0" * 64), here)


class TestRoom:
    @pytest.mark.usefixtures("running")
    def test_what_the_cluster_can_never_have_is_refused_with_the_remedy(
        self, corpora: dict[str, Corpus], tmp_path: Path
    ) -> None:
        gpus = Demand(num_workers=(2, 8), gpus_per_worker=1, cpus_per_worker=0.99)
        line = refusal(str(tmp_path), corpora, gpus)
        assert "2 workers need 1 GPU and 0.99 CPU each; the cluster of 2 nodes has room for 0" in line
        assert "try --wait-for-nodes SECONDS, other --num-workers or --device cpu" in line
        line = refusal(
            str(tmp_path), corpora, Demand(num_workers=(4, 4), gpus_per_worker=0, cpus_per_worker=0.99)
        )
        assert "has room for 2; try --wait-for-nodes SECONDS or --num-workers 2" in line

    @pytest.mark.usefixtures("running")
    def test_what_others_use_is_another_matter_and_can_be_waited_for(
        self, corpora: dict[str, Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(preflight, "SECONDS_TO_SETTLE", 0.5)
        other = somebody_else(num_cpus=2)
        line = refusal(str(tmp_path), corpora)
        assert "there is room for 2, but in use by other jobs: now for 0" in line
        threading.Timer(1.0, lambda: ray.kill(other)).start()
        preflight.check(str(tmp_path), corpora=corpora, demand=ONE_CPU, wait_for_nodes_s=60)

    def test_a_node_that_comes_is_waited_for_and_one_that_does_not_is_not(
        self, running: RayCluster, corpora: dict[str, Corpus], tmp_path: Path
    ) -> None:
        gpus = Demand(num_workers=(2, 2), gpus_per_worker=1, cpus_per_worker=0.99)
        line = refusal(str(tmp_path), corpora, gpus, wait_for_nodes_s=1)
        assert line.startswith("waited 1 s for nodes, in vain: 2 workers need 1 GPU")
        states = {group["state"] for group in ray.util.placement_group_table().values()}
        assert states == {"REMOVED"}  # an autoscaler is asked no longer
        with ThreadPoolExecutor(1) as pool:
            checked = pool.submit(
                preflight.check, str(tmp_path), corpora=corpora, demand=gpus, wait_for_nodes_s=90
            )
            with one_more_node(running, num_gpus=2) as node:
                checked.result(timeout=120)
                preflight.check(str(tmp_path), corpora=corpora, demand=gpus)  # what was held is free again
                busy = somebody_else(num_gpus=1)  # an idle node would go at once
                running.drain(node, 600)
                wait_until(lambda: any(found.is_draining for found in living_nodes()))
                assert "has room for 0" in refusal(str(tmp_path), corpora, gpus)
                ray.kill(busy)


@contextmanager
def odd_node(running: RayCluster, code: Path, folder: Path) -> Iterator[str]:
    """The address of a node with a disk of its own at `folder/private`, one that cannot be written at
    `folder/readonly`, other code, and a wrong secret for the store."""
    shutil.copytree(code, folder / "code", ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "code" / "pipelines" / "lineage.py").open("a") as file:
        file.write("\n# another version\n")
    private, readonly = folder / "private", folder / "readonly"
    mounts = (
        f"mount -t tmpfs tmpfs {private} && mount --bind {readonly} {readonly} && "
        f'mount -o remount,bind,ro {readonly} && exec "$@"'
    )
    unshare = ("unshare", "--map-root-user", "--mount", "sh", "-c")
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody have mounts of their own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_cluster, "RAY", (*unshare, mounts, "sh", *local_cluster.RAY))
        variables = {"PYTHONPATH": str(folder / "code"), "AWS_SECRET_ACCESS_KEY": "a-wrong-one"}
        with one_more_node(running, environment=variables) as node:
            yield node.address


@pytest.mark.faults
def test_what_only_one_node_lacks_is_found_there(
    running: RayCluster,
    code: Path,
    corpora: dict[str, Corpus],
    store: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("private", "readonly"):
        (tmp_path / name).mkdir()
    shutil.copytree(corpora["style"].uri, tmp_path / "private" / "style")
    partly = {**corpora, "style": Corpus.open(str(tmp_path / "private" / "style"))}
    bucket = store.create_bucket()
    place, digests = str(tmp_path / "later"), {each.uri: each.manifest.digest for each in corpora.values()}
    seen = preflight.check(place, corpora=corpora, demand=ONE_CPU)
    assert preflight.check_new_nodes(seen, "s3://nobody-asks", {}, demand=ONE_CPU) == seen
    with odd_node(running, code, tmp_path) as address:
        # one that comes during a training
        with pytest.raises(
            ValueError, match=f"^node {address}: its code is another .*everywhere, or let[^;]*$"
        ):
            preflight.check_new_nodes(seen, place, digests, demand=ONE_CPU)
        everyone = {node.node_id for node in cluster_nodes.nodes_for(ONE_CPU)}
        assert everyone > seen
        assert preflight.check_new_nodes(everyone, place, digests, demand=ONE_CPU) == everyone

        line = refusal(str(tmp_path / "private" / "run"), partly)
        assert line.startswith(f"node {address}: its code is another than the driver's")
        assert f"node {address}: {tmp_path}/private/run is not visible" in line
        assert f"{tmp_path}/private/style/corpus.json is not there (any more); use a shared folder" in line
        assert line.count("node ") == 3  # and nothing else of that node, nothing at all of the other

        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
        line = refusal(str(tmp_path / "readonly" / "run"), corpora)
        assert f"node {address}: [Errno 30] Read-only file system: '{tmp_path}/readonly/run'; let" in line
        assert f"nodes 127.0.0.2, {address}: MLflow at http://127.0.0.1:1: " in line
        assert "start that server, correct MLFLOW_TRACKING_URI" in line
        assert list((tmp_path / "readonly" / "run").iterdir()) == []

        # a server with a password is not passed on: each node has to know it
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hush-hush@127.0.0.1:1")
        line = refusal(f"{bucket}/run", corpora)
        assert f"node {address}: {bucket}/run: {store.endpoint} does not accept these credentials" in line
        assert "the node's own AWS_… variables count" in line
        assert f"nodes 127.0.0.2, {address}: its MLFLOW_TRACKING_URI leads to " in line
        assert "hush-hush" not in line
        assert "a-wrong-one" not in line
        assert list(storage.list_objects(bucket, include_hidden=True)) == []


@pytest.mark.faults
def test_a_node_that_gives_no_answer_is_named(
    running: RayCluster, corpora: dict[str, Corpus], tmp_path: Path
) -> None:
    with one_more_node(running) as node:
        raylet = psutil.Process(node.raylet_process_id)
        raylet.send_signal(signal.SIGSTOP)
        try:
            line = refusal(str(tmp_path), corpora)
        finally:
            raylet.send_signal(signal.SIGCONT)
    assert line.startswith(f"node {node.address}: ")
    assert "no answer within" in line
