"""Where a training meets its faults: three nodes, an object store that can refuse, an MLflow that can go
away, and trainings that are submitted as jobs, as a user does it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
from mlflow.entities import Metric, Run
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file
from torch import Tensor

from infra import storage
from infra.local_cluster import LocalCluster, local_cluster
from infra.local_node import Node, processes_of
from infra.local_servers import free_port, mlflow_server
from pipelines.checkpoint_store import CheckpointStore
from tests.fault_proxy import FaultProxy, fault_proxy
from tests.servers import REPOSITORY, S3Server

Found = TypeVar("Found")

NUM_NODES = 2  # beside the head
NUM_IMAGES, IMAGES_A_CHECKPOINT, IMAGES_A_FIGURE = 1280, 64, 32
TINY = ["--preset", "smoke", "--set", "batch.size=32", "--set", "model.content_widths=[8,8,8,8]"]
# What a node has of Ray when nobody works: no process of a training's.
OF_RAY_ITSELF = (
    "ray::IDLE",
    "ray::DashboardAgent",
    "ray::RuntimeEnvAgent",
    "ray::_AutoscalingCoordinatorActor",
)


def wait_for(
    condition: Callable[[], Found], seconds: float, what: str = "it", *, pause: float = 0.1
) -> Found:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(pause)
    raise AssertionError(f"{what} does not come in {seconds:.0f} s")


class Mlflow:
    """An MLflow server that can be away for a while; its address and its store stay."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self._running, self._is_here = contextlib.ExitStack(), False
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        if not self._is_here:
            self._running.enter_context(mlflow_server(self._folder, port=self._port))
            self._is_here = True

    def stop(self) -> None:
        self._running.close()
        self._is_here = False


@dataclass(frozen=True, kw_only=True)
class TrialCluster:
    cluster: LocalCluster
    proxy: FaultProxy
    mlflow: Mlflow
    root: str
    corpora: tuple[str, str]
    environment: dict[str, str] = field(repr=False)

    def train(self, name: str, *options: str, num_images: int = NUM_IMAGES) -> Submitted:
        """`nst submit -- train …` in a process of its own."""
        verb = ["train", "--content", self.corpora[0], "--style", self.corpora[1], *TINY]
        verb += ["--out", f"{self.root}/runs", "--name", name, "--images", str(num_images)]
        verb += ["--num-workers", "2", "--threads", "1", "--hang-timeout", "60"]
        verb += ["--set", f"checkpoint_every={IMAGES_A_CHECKPOINT}"]
        verb += ["--set", f"log_every={IMAGES_A_FIGURE}", "--set", f"preview_every={num_images}", *options]
        command = [sys.executable, "-m", "pipelines.cli", "submit", "--working-dir", str(REPOSITORY)]
        return Submitted(trial=self, name=name, num_images=num_images, command=[*command, "--", *verb])

    def processes(self, part: str) -> list[psutil.Process]:
        """Those of the cluster's nodes whose command line has `part` in it."""
        found = []
        for node in (self.cluster.head, *self.cluster.workers):
            found += [process for process in processes_of(node) if part in command_line(process)]
        return found

    def driver(self) -> psutil.Process:
        """Of the one training that runs (and not the shell that Ray starts it in)."""
        (found,) = (
            process
            for process in self.processes("pipelines.cli train")
            if command_line(process).startswith("python")
        )
        return found

    def node_without_driver(self) -> Node:
        """One where a rank is at work."""
        driver, ranks = self.driver(), self.ranks()
        for node in self.cluster.workers:
            found = set(processes_of(node))
            if driver not in found and not found.isdisjoint(ranks):
                return node
        raise AssertionError("every rank is on the driver's node")

    def restore(self) -> None:
        """What a test found here, whatever it left: two living nodes, a store that takes all, an MLflow."""
        self.proxy.script = None
        self.mlflow.start()
        living = {state["node_id"] for state in self.cluster.node_states() if state["state"] == "ALIVE"}
        dead = [node for node in self.cluster.workers if node.node_id not in living]
        surplus = [node for node in self.cluster.workers if node.node_id in living][NUM_NODES:]
        for node in (*dead, *surplus):
            self.cluster.kill_node(node)
        while len(self.cluster.workers) < NUM_NODES:
            self.cluster.add_worker(num_cpus=1)

    def ranks(self) -> list[psutil.Process]:
        """The training's workers, rank 0 first: it alone keeps figures for MLflow."""
        found = self.processes("RayTrainWorker")
        return sorted(
            found, key=lambda process: not any("nst-tracking-" in path for path in files_of(process))
        )


@dataclass(kw_only=True)
class Submitted:
    """A training as its user sees it: a command that follows a job."""

    trial: TrialCluster
    name: str
    num_images: int
    command: list[str] = field(repr=False)
    process: subprocess.Popen[str] | None = None
    started: float = 0.0

    @property
    def uri(self) -> str:
        return f"{self.trial.root}/runs/{self.name}"

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(f"{self.uri}/checkpoints")

    def __enter__(self) -> Submitted:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """A test that failed leaves nothing to the next one."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        kill(*self.trial.processes("pipelines.cli train"), *self.trial.ranks())
        wait_for(lambda: not self.trial.ranks(), 60, "the end of the workers")

    def start(self) -> None:
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            self.command,
            env=self.trial.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPOSITORY,
        )

    def num_images_saved(self) -> int:
        """In the newest checkpoint."""
        found = self.store.stored()
        return found[0].num_images_seen if found else 0

    def num_images_logged(self) -> int:
        """In the newest figure that MLflow has."""
        return max((figure.step for run in self.runs() for figure in self.figures(run)), default=0)

    def runs(self) -> list[Run]:
        """Of this training, in MLflow."""
        client = MlflowClient(self.trial.mlflow.uri)
        experiment = client.get_experiment_by_name("nst")
        if experiment is None:
            return []
        return client.search_runs([experiment.experiment_id], f"tags.`nst.training` = '{self.uri}'")

    def figures(self, run: Run) -> list[Metric]:
        return MlflowClient(self.trial.mlflow.uri).get_metric_history(run.info.run_id, "generator/bands")

    def wait_until(
        self,
        share: float,
        seconds: float = 240,
        *,
        done: Callable[[Submitted], int] = num_images_saved,
    ) -> None:
        """Until that share of the training is done."""
        assert self.process is not None
        process = self.process
        wait_for(
            lambda: done(self) >= share * self.num_images or process.poll() is not None,
            seconds,
            "progress",
            pause=0.5,  # asking costs CPU, which the training would miss
        )
        assert process.poll() is None, process.communicate()[0]

    def result(self, exit_code: int = 0) -> Outcome:
        assert self.process is not None
        output, _ = self.process.communicate(timeout=900)
        assert self.process.returncode == exit_code, output
        seconds = time.monotonic() - self.started
        record = json.loads(storage.read_bytes(f"{self.uri}/run.json"))
        return Outcome(training=self, output=output, record=record, seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    training: Submitted
    output: str = field(repr=False)
    record: dict[str, Any]
    seconds: float

    def weights(self, folder: Path) -> dict[str, Tensor]:
        path = folder / "training.safetensors"
        storage.download_file(f"{self.record['result']['checkpoint']}/training.safetensors", str(path))
        return load_file(path)

    def assert_one_whole_run(self) -> None:
        """One MLflow run, FINISHED, with every figure once and in order."""
        runs = self.training.runs()
        assert [run.info.status for run in runs] == ["FINISHED"]
        assert runs[0].info.run_id == self.record["run_id"]
        names = set(runs[0].data.metrics)
        assert {"images_per_second", "optim/generator_learning_rate", "preview/distance"} <= names, names
        for kind in ("alarm/", "system/"):
            assert any(name.startswith(kind) for name in names), (kind, names)
        assert [figure.step for figure in self.training.figures(runs[0])] == list(
            range(IMAGES_A_FIGURE, self.training.num_images + 1, IMAGES_A_FIGURE)
        )

    def assert_nothing_is_left(self) -> None:
        """No process of the training lives on."""
        trial = self.training.trial

        def left() -> list[str]:
            found = map(command_line, (*trial.processes("ray::"), *trial.processes("pipelines.cli")))
            return [line for line in found if not line.startswith(OF_RAY_ITSELF)]

        wait_for(lambda: not left(), 30, "the end of its processes")
        assert left() == []


def command_line(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def files_of(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return [file.path for file in process.open_files()]
    return []


def kill(*processes: psutil.Process) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


@contextlib.contextmanager
def trial_cluster(store: S3Server, corpora: tuple[str, str], folder: Path) -> Iterator[TrialCluster]:
    """A head and two workers of one CPU each: one rank a node."""
    mlflow = Mlflow(folder / "mlflow")
    bucket = store.create_bucket()
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(fault_proxy(store))
        mlflow.start()
        stack.callback(mlflow.stop)
        settings = {**proxy.environment, "MLFLOW_TRACKING_URI": mlflow.uri, "NST_DEBUG": "1"}
        cluster = stack.enter_context(local_cluster(NUM_NODES, cpus_per_worker=1, environment=settings))
        client = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        reach = {name: value for name, value in cluster.environment.items() if name != "RAY_ADDRESS"}
        yield TrialCluster(
            cluster=cluster,
            proxy=proxy,
            mlflow=mlflow,
            root=bucket,
            corpora=corpora,
            environment={**client, **settings, **reach},
        )
