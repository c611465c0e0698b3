"""Ray Train's part of `nst train`: workers that come and go, until the training is done or cannot go on."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import PreemptionError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from infra import scratch
from infra.cluster_nodes import Demand, room_for, wait_for_room
from infra.s3_errors import StoreRefuses
from nst import allocator
from pipelines.checkpoint_store import CheckpointStore
from pipelines.console import Progress, StageFailed, say
from pipelines.progress_board import ProgressBoard
from pipelines.rank_failures import in_one_line
from pipelines.train_worker import WorkerSettings, train_on_worker

log = logging.getLogger(__name__)

SECONDS_TO_START = 120.0  # the workers' processes, once there is room for them
SECONDS_TO_STOP = 30.0  # at a checkpoint, when the driver is interrupted
SECONDS_TO_SETTLE = 10.0  # until Ray has what an ended life of the workers had taken
SECONDS_BETWEEN_LOOKS_FOR_ROOM = 20.0
SECONDS_OF_GRACE = 120.0  # for a checkpoint on its way while a node goes
SECONDS_WITHOUT_STORE = 600.0
SECONDS_BETWEEN_TRIES = 10.0
# Less than a CPU, so that beside N workers a node of N CPUs has room for the driver of the job; and exact in
# binary, since Ray adds and divides it.
CPUS_PER_WORKER = 63 / 64
NOTICE = "a node is about to go"

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """What the workers are to be: settings of a run, never part of its configuration.

    Attributes:
        sizes: how many there may be, in rising order: those that are wanted and can share a batch.
        max_restarts: in a row, without a new checkpoint between them.
        wait_for_nodes_s: how long an autoscaler may take for the nodes of the smallest size.
        are_here: on this machine's own Ray, which nobody else starts, drains or takes away.
    """

    sizes: tuple[int, ...]
    use_gpu: bool
    max_restarts: int
    wait_for_nodes_s: float
    are_here: bool

    @property
    def demand(self) -> Demand:
        return Demand(
            num_workers=(self.sizes[0], self.sizes[-1]),
            gpus_per_worker=int(self.use_gpu),
            cpus_per_worker=CPUS_PER_WORKER,
        )

    def best_size(self, room: int) -> int:
        """The largest that fits, 0 if none does."""
        return max((size for size in self.sizes if size <= room), default=0)


@dataclass(frozen=True, kw_only=True)
class _End:
    """How a life of the workers ended before the training did.

    Attributes:
        why: in one line.
        wanted: for how many there should be room now, or in a moment.
        is_planned: with notice, or for more workers: no failure that counts.
    """

    why: str
    wanted: int
    is_planned: bool = False


def fit(
    settings: WorkerSettings,
    workers: Workers,
    *,
    check: Callable[[], None],
    look_at_nodes: Callable[[], None],
) -> int:
    """Trains to the end, through restarts, from the newest checkpoint if there is one. With several sizes
    each life of the workers has the largest there is room for, and ends at a checkpoint when there is room
    for a larger one.

    Args:
        check: raises if this process must not go on; called about twice a second.
        look_at_nodes: before each life of the workers; ValueError says what is wrong with a node that came
            since. Like a life that failed it counts for nothing but a restart: it may be the store that
            was away.

    Returns:
        How often the workers had to be restarted. A node that is taken away with notice does not count, nor
        does a change of size.

    Raises:
        StageFailed: the workers failed more often than allowed, never came, or stood still; or `check`.
        ValueError: what they were told is the user's mistake.
        KeyboardInterrupt: Ctrl-C or SIGTERM, where the caller has made them that (`console.interruptible`).
    """
    num_images = settings.identity["config"]["num_images"]
    store = CheckpointStore(settings.checkpoints_uri)
    num_restarts = num_in_vain = wanted = 0
    done = _images_in(store)
    while done < num_images:
        size = _wait_for_size(workers, wanted)
        try:
            look_at_nodes()
        except ValueError as error:
            time.sleep(SECONDS_BETWEEN_TRIES)
            end = _End(why=str(error), wanted=size)
        else:
            end = _live(settings, workers, size, num_images, done, check)
        before, done, wanted = done, _images_in(store), end.wanted
        if done >= num_images:
            break
        if not end.is_planned:
            num_in_vain = 0 if done > before else num_in_vain + 1
            if num_in_vain > workers.max_restarts:
                raise StageFailed(
                    f"the training failed {num_in_vain} times in a row at {done} images: {end.why}"
                )
            num_restarts += 1
        say(f"{end.why}; going on from {done} images")
    return num_restarts


def _wait_for_size(workers: Workers, wanted: int) -> int:
    """How many workers to start now. `wanted`: for how many there should be room in a moment, when all that
    an ended life of the workers had taken is free again; 0 at the start.

    Raises:
        StageFailed: there is no room for the fewest, and none came.
    """
    deadline = time.monotonic() + SECONDS_TO_SETTLE
    while (size := workers.best_size(room_for(workers.demand).now)) < wanted and time.monotonic() < deadline:
        time.sleep(0.5)
    if not size:
        patience_s = max(workers.wait_for_nodes_s, SECONDS_TO_START)
        say(f"waiting for room for {workers.sizes[0]} workers, up to {patience_s:.0f} s")
        if not wait_for_room(workers.demand, patience_s, tell=lambda seconds: None):
            raise StageFailed(
                f"no room for {workers.sizes[0]} workers in {patience_s:.0f} s; the same command goes on"
            )
        size = workers.best_size(room_for(workers.demand).now) or workers.sizes[0]
    return size


def _live(
    settings: WorkerSettings,
    workers: Workers,
    size: int,
    num_images: int,
    done: int,
    check: Callable[[], None],
) -> _End:
    """One life of `size` workers, to the end of the training or until something else ends it."""
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(SECONDS_TO_START)
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(settings.hang_timeout_s)
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(2 * settings.hang_timeout_s)
    os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "2"
    # one process less to start where no node can be preempted
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0" if workers.are_here else "1"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ProgressBoard.options(scheduling_strategy=here).remote()
    # Checkpoints are in our own store: what Ray Train keeps for itself is nothing that has to last.
    with scratch.folder("nst-ray-train-") as folder:
        trainer = TorchTrainer(
            train_on_worker,
            train_loop_config={"settings": settings, "board": board},
            torch_config=TorchConfig(timeout_s=round(settings.hang_timeout_s)),
            scaling_config=ScalingConfig(
                num_workers=size,
                use_gpu=workers.use_gpu,
                resources_per_worker=workers.demand.bundle,
                # GPUs of one node reach each other fastest; on CPUs a rank's threads want a node of their own
                placement_strategy="PACK" if workers.use_gpu else "SPREAD",
            ),
            run_config=RunConfig(
                name="run",
                storage_path=folder,
                worker_runtime_env={"env_vars": allocator.ENVIRONMENT},
                # Whether to try again is decided by what was achieved, and here.
                failure_config=FailureConfig(
                    max_failures=0,
                    controller_failure_limit=0,
                    max_preemption_failures=0,
                    preemption_grace_s=SECONDS_OF_GRACE,
                ),
            ),
        )
        follower = _Follower(board, settings, workers, size)
        try:
            follower.follow(_in_background(trainer.fit), num_images, done, check)
        except PreemptionError as error:
            why = "a node went before its workers could stop" if error.drain_timed_out else NOTICE
            return _End(why=why, wanted=size, is_planned=True)
        except TrainingFailedError as error:
            return _End(why=_ask(board.complaint) or in_one_line(error), wanted=size)
        if follower.next_size:
            why = f"there is room for {follower.next_size} workers"
            return _End(why=why, wanted=follower.next_size, is_planned=True)
        if _ask(board.is_preempted):  # Ray Train took that for the end of the work
            return _End(why=NOTICE, wanted=size, is_planned=True)
    return _End(why="the workers ended without a new checkpoint", wanted=size)


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


class _Follower:
    """Follows one life of the workers from the driver.

    Attributes:
        next_size: if not 0, they were asked to stop, since so many have room now.
    """

    def __init__(self, board: Any, settings: WorkerSettings, workers: Workers, size: int) -> None:
        self.next_size = 0
        self._board, self._workers, self._size = board, workers, size
        self._patience_s = SECONDS_TO_START + 2 * settings.hang_timeout_s + SECONDS_OF_GRACE

    def follow(self, training: Future[Any], num_images: int, done: int, check: Callable[[], None]) -> None:
        """Shows what the ranks write on the board until the training has ended; raises what that raised.

        Raises:
            Exception: what `check` raises.
            StageFailed: nothing was written for too long: Ray Train would wait without end.
            KeyboardInterrupt: Ctrl-C or SIGTERM. The workers make a checkpoint before, unless it comes twice.
        """
        first_sign, last_sign, last_change = None, None, time.monotonic()
        interrupted_at: float | None = None
        last_look = time.monotonic()
        with Progress("train", total=num_images, initial=done) as progress:
            shown = done
            while not training.done():
                try:
                    wait([training], timeout=0.5)
                    check()
                    sign, seen, figures, notes = _ask(self._board.read) or (last_sign, shown, {}, [])
                    now = time.monotonic()
                    for note in notes:
                        say(note)
                    first_sign = sign if first_sign is None else first_sign
                    if sign != last_sign:
                        last_sign, last_change = sign, now
                    is_at_work = last_sign != first_sign
                    if now - last_change > self._patience_s:
                        raise StageFailed(
                            f"no sign of life from the workers for {self._patience_s:.0f} s; the same "
                            "command goes on"
                        )
                    if interrupted_at is not None and now - interrupted_at > SECONDS_TO_STOP:
                        say("the workers did not stop in time: what came after the last checkpoint is lost")
                        raise KeyboardInterrupt
                    if is_at_work and now - last_look > SECONDS_BETWEEN_LOOKS_FOR_ROOM:
                        last_look = now
                        self._grow_if_there_is_room()
                    progress.advance(max(seen - shown, 0), **figures)
                    shown = max(seen, shown)
                except KeyboardInterrupt:
                    if interrupted_at is not None or last_sign == first_sign:
                        raise
                    interrupted_at = time.monotonic()
                    self._board.ask_to_stop.remote()
                    say("stopping at a checkpoint; once more stops at once")
        if interrupted_at is not None:
            raise KeyboardInterrupt
        training.result()

    def _grow_if_there_is_room(self) -> None:
        if self.next_size or self._size == self._workers.sizes[-1]:
            return
        best = self._workers.best_size(self._size + room_for(self._workers.demand).now)
        if best > self._size:
            self.next_size = best
            self._board.ask_to_stop.remote()


def _ask(method: Any) -> Any:
    """What a method of the board answers; None if it does not."""
    try:
        return ray.get(method.remote(), timeout=10)
    except RayError:
        return None


def _images_in(store: CheckpointStore) -> int:
    found = patiently(store.stored)
    return found[0].num_images_seen if found else 0


def patiently(request: Callable[[], Result]) -> Result:
    """What the training's store answers; it may be away for some minutes."""
    deadline = time.monotonic() + SECONDS_WITHOUT_STORE
    while True:
        try:
            return request()
        except (OSError, StoreRefuses) as error:
            if time.monotonic() > deadline:
                raise
            log.warning("%s; trying again", error)
            time.sleep(SECONDS_BETWEEN_TRIES)
