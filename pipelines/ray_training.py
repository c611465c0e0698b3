"""Ray Train's part of `nst train`: workers that come and go, until the training is done or cannot go on."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from infra import cluster, scratch
from pipelines.checkpoint_store import CheckpointStore
from pipelines.console import Progress, StageFailed, interruptible, say
from pipelines.progress_board import ProgressBoard
from pipelines.train_worker import WorkerSettings, train_on_worker

log = logging.getLogger(__name__)

SECONDS_TO_START = 120.0  # the workers' processes, once their nodes are there
SECONDS_TO_STOP = 30.0  # at a checkpoint, when the driver is interrupted
SECONDS_BETWEEN_RESIZES = 60.0
# A hundredth less than a CPU, so that beside N workers a node of N CPUs has room for the driver of the job.
CPUS_PER_WORKER = 0.99


@dataclass(frozen=True, kw_only=True)
class Workers:
    """What the workers are to be: settings of a run, never part of its configuration.

    Attributes:
        num_workers: (least, most).
        max_restarts: in a row, without a new checkpoint between them.
        wait_for_nodes_s: how long an autoscaler may take for the nodes.
        are_here: on this machine's own Ray, which nobody else starts, drains or takes away.
    """

    num_workers: tuple[int, int]
    use_gpu: bool
    max_restarts: int
    wait_for_nodes_s: float
    are_here: bool


def fit(settings: WorkerSettings, workers: Workers) -> int:
    """Trains to the end, through restarts, from the newest checkpoint if there is one.

    Returns:
        How often the workers had to be restarted. A node that is taken away with notice does not count.

    Raises:
        StageFailed: the workers failed more often than allowed, never came, or stood still.
        ValueError: what they were told is the user's mistake.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    num_images = settings.identity["config"]["num_images"]
    store = CheckpointStore(settings.checkpoints_uri)
    num_restarts = num_in_vain = 0
    done = _images_in(store)
    while done < num_images:
        problem = _try_to_fit(settings, workers, num_images, done)
        before, done = done, _images_in(store)
        if problem is None and done > before:
            continue  # done; or all went as agreed when a node was about to go
        problem = problem or "the workers ended without a new checkpoint"
        num_in_vain = 0 if done > before else num_in_vain + 1
        if num_in_vain > workers.max_restarts:
            raise StageFailed(f"the training failed {num_in_vain} times in a row at {done} images: {problem}")
        num_restarts += 1
        say(f"{problem}; going on from {done} images")
    return num_restarts


def _try_to_fit(settings: WorkerSettings, workers: Workers, num_images: int, done: int) -> str | None:
    """One life of Ray Train's controller; what ended it too early, in one line."""
    least, most = workers.num_workers
    start_timeout_s = max(workers.wait_for_nodes_s, SECONDS_TO_START)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(start_timeout_s)
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(settings.hang_timeout_s)
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(2 * settings.hang_timeout_s)
    os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "2"
    # one process less to start where no node can be preempted
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0" if workers.are_here else "1"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ProgressBoard.options(scheduling_strategy=here).remote()
    resources = {"CPU": CPUS_PER_WORKER, **({"GPU": 1.0} if workers.use_gpu else {})}
    # Checkpoints are in our own store: what Ray Train keeps for itself is nothing that has to last.
    with scratch.folder("nst-ray-train-") as folder:
        trainer = TorchTrainer(
            train_on_worker,
            train_loop_config={"settings": settings, "board": board},
            torch_config=TorchConfig(timeout_s=round(settings.hang_timeout_s)),
            scaling_config=ScalingConfig(
                num_workers=least if least == most else (least, most),
                # what a resize costs is the time since the last checkpoint
                elastic_resize_monitor_interval_s=min(settings.checkpoint_seconds, SECONDS_BETWEEN_RESIZES),
                use_gpu=workers.use_gpu,
                resources_per_worker=resources,
            ),
            run_config=RunConfig(
                name="run",
                storage_path=folder,
                # Whether to try again is decided by what was achieved, and here.
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            ),
        )
        patience_s = (workers.max_restarts + 1) * start_timeout_s + settings.hang_timeout_s
        try:
            _follow(_in_background(trainer.fit), board, num_images, done, patience_s)
        except TrainingFailedError as error:
            return _complaint_on(board) or _in_one_line(error)
    return None


def _in_background(function: Callable[[], Any]) -> Future[Any]:
    """Ray Train answers to signals in its own way where it has the main thread."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - is raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name="ray-train", daemon=True).start()
    return future


def _follow(training: Future[Any], board: Any, num_images: int, done: int, patience_s: float) -> None:
    """Shows what rank 0 writes on the board until the training has ended; raises what that raised.

    Raises:
        StageFailed: nothing was written for `patience_s` seconds: Ray Train would wait without end.
        KeyboardInterrupt: Ctrl-C or SIGTERM. The workers make a checkpoint before, unless it comes twice.
    """
    first_sign, last_sign, last_change = None, None, time.monotonic()
    interrupted_at: float | None = None
    with Progress("train", total=num_images, initial=done) as progress, interruptible():
        shown = done
        while not training.done():
            try:
                wait([training], timeout=0.5)
                sign, seen, figures = _read(board) or (last_sign, shown, {})
                now = time.monotonic()
                first_sign = sign if first_sign is None else first_sign
                if sign != last_sign:
                    last_sign, last_change = sign, now
                if now - last_change > patience_s:
                    raise StageFailed(
                        f"no worker gave a sign of life for {patience_s:.0f} s; are their nodes there? The "
                        "same command goes on"
                    )
                if interrupted_at is not None and now - interrupted_at > SECONDS_TO_STOP:
                    raise KeyboardInterrupt
                progress.advance(max(seen - shown, 0), **figures)
                shown = max(seen, shown)
            except KeyboardInterrupt:
                is_at_work = last_sign != first_sign
                if interrupted_at is not None or not is_at_work:
                    raise
                interrupted_at = time.monotonic()
                board.ask_to_stop.remote()
                say("stopping at a checkpoint; once more stops at once")
    if interrupted_at is not None:
        raise KeyboardInterrupt
    training.result()


def _read(board: Any) -> tuple[int, int, dict[str, Any]] | None:
    try:
        return ray.get(board.read.remote(), timeout=10)
    except RayError:
        return None


def _complaint_on(board: Any) -> str | None:
    try:
        return ray.get(board.complaint.remote(), timeout=10)
    except RayError:
        return None


def _images_in(store: CheckpointStore) -> int:
    found = store.stored()
    return found[0].num_images_seen if found else 0


def _in_one_line(error: TrainingFailedError) -> str:
    """The cause, not its consequences: a rank that died before those whose collectives then failed.

    Raises:
        ValueError: our own code says that it is the user's mistake.
    """
    if not isinstance(error, WorkerGroupError):
        return " ".join(str(getattr(error, "controller_failure", error)).split())[:500]
    failures = sorted(error.worker_failures.items())
    for _, failure in failures:
        cause = getattr(failure, "_base_exc", None)
        if isinstance(cause, ValueError) and cluster.was_raised_by_us(str(failure)):
            raise ValueError(str(cause)) from error
    deaths = [(rank, failure) for rank, failure in failures if isinstance(failure, RayActorError)]
    rank, failure = (deaths or failures)[0]
    what = "died" if deaths else "failed"
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    # a traceback ends with its error; what Ray says of a death begins with it
    return f"worker {rank} {what}: {lines[0 if deaths else -1] if lines else type(failure).__name__}"
