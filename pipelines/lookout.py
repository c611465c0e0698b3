"""How the ranks of a training under Ray Train stay together: when all look up from their work, and what they
then decide alike."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import ray.train
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
        is_preempted: since a node is about to go.
    """

    def __init__(self, checkpoint_seconds: float, ask: Callable[[], bool]) -> None:
        self.is_over = self.is_preempted = False
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
        # Both wait for every rank: all enter them as often.
        self.is_preempted = ray.train.get_preemption_info() is not None
        decision: Decision | None = broadcast_from_rank_zero(mine)
        assert decision is not None
        self._next_step, self._is_checkpoint_due, is_stop_wanted = decision
        self.is_over = self.is_preempted or is_stop_wanted
        if self.is_preempted:
            log.warning("a node of this training will be taken away: checkpoint and restart at step %d", step)

    def take_checkpoint_due(self) -> bool:
        """Whether one was found due at the last look; it is asked once."""
        is_due, self._is_checkpoint_due = self._is_checkpoint_due, False
        return is_due

    def checkpoint_taken(self) -> None:
        self._last_checkpoint = time.monotonic()
