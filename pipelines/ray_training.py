"""Ray Train's part of `nst train`: workers, restarts, progress, interruption, the last checkpoint."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import RayError
from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from infra import cluster, storage
from nst.checkpoint import CONFIG_FILE
from pipelines.console import Progress, StageFailed, interruptible, say
from pipelines.train_worker import ProgressBoard, WorkerSettings, train_on_worker

SECONDS_TO_WAIT_HERE = 60  # for the workers, on this machine
SECONDS_TO_WAIT_FOR_NODES = 900  # on a cluster whose autoscaler may have to start machines
SECONDS_TO_WAIT_FOR_A_COLLECTIVE = 300

Device = Literal["auto", "cpu", "gpu"]


@dataclass(frozen=True, kw_only=True)
class Workers:
    """What the workers are to be: settings of a run, never part of its configuration."""

    num_workers: int
    num_loader_workers: int
    max_restarts: int
    use_gpu: bool
    are_here: bool  # on this machine's own Ray, which nobody else starts, drains or takes away


def choose_workers(
    info: cluster.ClusterInfo, device: Device, num_workers: int, num_loader_workers: int, max_restarts: int
) -> Workers:
    """Raises ValueError if this machine can never have what is asked for."""
    use_gpu = device == "gpu" or (device == "auto" and info.num_gpus > 0)
    if info.is_local and use_gpu and info.num_gpus < num_workers:
        raise ValueError(f"--num-workers {num_workers} need as many GPUs; this machine has {info.num_gpus}")
    if device == "auto" and not use_gpu and not info.is_local:
        say("the cluster has no GPU now: training on CPUs (--device gpu waits for GPUs)")
    return Workers(
        num_workers=num_workers,
        num_loader_workers=num_loader_workers,
        max_restarts=max_restarts,
        use_gpu=use_gpu,
        are_here=info.is_local,
    )


def fit(training_uri: str, settings: WorkerSettings, workers: Workers) -> Result:
    """Trains to the end, through restarts, from Ray Train's last checkpoint below `training_uri` if there is
    one.

    Raises:
        StageFailed: the workers failed more often than allowed, or never came.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    filesystem, path = storage.pyarrow_filesystem(training_uri)
    seconds_to_start = SECONDS_TO_WAIT_HERE if workers.are_here else SECONDS_TO_WAIT_FOR_NODES
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(seconds_to_start))
    # one process less to start where no node can be preempted
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0" if workers.are_here else "1")
    board = ProgressBoard.remote()
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config={"settings": settings, "board": board},
        torch_config=TorchConfig(timeout_s=SECONDS_TO_WAIT_FOR_A_COLLECTIVE),
        scaling_config=ScalingConfig(num_workers=workers.num_workers, use_gpu=workers.use_gpu),
        run_config=RunConfig(
            name="ray",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=workers.max_restarts, controller_failure_limit=3),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    num_images = settings.identity["config"]["num_images"]
    with _shown_progress(board, num_images), interruptible():
        try:
            return trainer.fit()
        except TrainingFailedError as error:
            restarts = f"after {workers.max_restarts} restarts"
            raise StageFailed(f"the training failed {restarts}: {_root_cause(error)}") from error


def publish_checkpoint(result: Result, checkpoint_uri: str) -> None:
    """Copies Ray Train's last checkpoint to `checkpoint_uri`, config.json last."""
    if result.checkpoint is None:
        raise StageFailed("the training ended without a checkpoint")
    with tempfile.TemporaryDirectory(prefix="nst-checkpoint-") as folder:
        result.checkpoint.to_directory(folder)
        files = sorted(Path(folder).iterdir(), key=lambda path: path.name == CONFIG_FILE)
        for path in files:
            storage.upload_file(str(path), storage.join(checkpoint_uri, path.name))


@contextmanager
def _shown_progress(board: Any, num_images: int) -> Iterator[None]:
    """A bar that follows what rank 0 writes on the board."""
    done = threading.Event()

    def follow() -> None:
        with Progress("train", total=num_images) as progress:
            shown = 0
            while not done.wait(0.5):
                try:
                    seen, figures = ray.get(board.read.remote(), timeout=10)
                except RayError:
                    return  # the bar is a comfort: its loss must not end a training
                progress.advance(seen - shown, **figures)
                shown = seen

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        time.sleep(0.6)  # let the last figures reach the bar
        done.set()
        thread.join(timeout=15)


def _root_cause(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
