"""How the ranks of a training under Ray Train stay together: who takes part, when all look up from their
work, and what they then decide alike."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import ray.train
import ray.util
import torch.distributed as dist
from ray.train.collective import broadcast_from_rank_zero

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 2.0  # a notice may come 30 s before the end, and a look costs some milliseconds
MAX_STEPS_BETWEEN_LOOKS = 1000


class Decision(NamedTuple):
    """Rank 0's, at a look, for all ranks alike."""

    next_step: int  # of the look that follows
    is_checkpoint_due: bool
    is_stop_wanted: bool


class Lookout:
    """Every rank calls `look` before each step, and about every two seconds all of them look together: is a
    node about to be taken away, does somebody want the training to stop, is it time for a checkpoint?

    Args:
        checkpoint_seconds: between two checkpoints, by rank 0's clock.
        ask: whether the training shall stop; only rank 0's is asked.

    Attributes:
        is_over: all ranks stop now.
    """

    def __init__(self, checkpoint_seconds: float, ask: Callable[[], bool]) -> None:
        self.is_over = False
        self._checkpoint_seconds, self._ask = checkpoint_seconds, ask
        self._is_first = ray.train.get_context().get_world_rank() == 0
        self._is_checkpoint_due = False
        self._next_step: int | None = None
        self._last_look = self._last_checkpoint = time.monotonic()
        self._steps_between = 1

    def look(self, step: int) -> None:
        if self._next_step is not None and step < self._next_step:
            return
        now = time.monotonic()
        if self._next_step is not None:
            seconds_per_step = (now - self._last_look) / self._steps_between
            wanted = int(SECONDS_BETWEEN_LOOKS / max(seconds_per_step, 1e-6))
            # Not at once: the first steps are slow, and a jump to many could miss a notice.
            self._steps_between = max(1, min(wanted, 2 * self._steps_between, MAX_STEPS_BETWEEN_LOOKS))
        self._last_look = now
        mine = None
        if self._is_first:
            is_due = now - self._last_checkpoint > self._checkpoint_seconds
            mine = Decision(step + self._steps_between, is_due, self._ask())
        is_preempted, decision = _together(mine)
        assert decision is not None
        self._next_step, self._is_checkpoint_due, is_stop_wanted = decision
        self.is_over = is_preempted or is_stop_wanted
        if is_preempted:
            log.warning("a node of this training will be taken away: checkpoint and restart at step %d", step)

    def take_checkpoint_due(self) -> bool:
        """Whether one was found due at the last look; it is asked once."""
        is_due, self._is_checkpoint_due = self._is_checkpoint_due, False
        return is_due

    def checkpoint_taken(self) -> None:
        self._last_checkpoint = time.monotonic()

    def close(self) -> None:
        """Lets the spare ranks go; for every rank that trains, at the end."""
        if not self.is_over:
            _together(None)


def keep_watch() -> None:
    """What a spare rank does: it takes part in every look until the training ends or is to stop."""
    log.warning("this worker is a spare: the batch cannot be shared by all of them")
    while True:
        is_preempted, decision = _together(None)
        if is_preempted or decision is None or decision.is_stop_wanted:
            return


def _together(mine: Decision | None) -> tuple[bool, Decision | None]:
    """(whether a node will go, what rank 0 has decided). Every rank waits here for all others."""
    info = ray.train.get_preemption_info()
    return info is not None, broadcast_from_rank_zero(mine)


def form_group(world_sizes: tuple[int, ...], timeout_s: float) -> bool:
    """Makes PyTorch's process group as large as the batch allows; False on a rank that is left over.

    Args:
        world_sizes: what the batch can be shared among, in rising order, from 1.
        timeout_s: for each collective.
    """
    context = ray.train.get_context()
    rank, given = context.get_world_rank(), context.get_world_size()
    size = max(size for size in world_sizes if size <= given)
    if size == given:
        return True
    backend = dist.get_backend()
    dist.destroy_process_group()
    here = f"tcp://{ray.util.get_node_ip_address()}:{_free_port()}"
    meeting_point = broadcast_from_rank_zero(here)
    if rank < size and size > 1:
        dist.init_process_group(
            backend,
            init_method=meeting_point,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
        )
    return rank < size


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
