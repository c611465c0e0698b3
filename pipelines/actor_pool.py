"""Items over a pool of Ray actors: bounded in flight; what a dead actor held goes to its successor."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

SECONDS_BETWEEN_LOOKS = 5.0
SECONDS_TO_START = 900.0  # an autoscaler needs minutes for a machine
MAX_TRIES = 3
ITEMS_AT_AN_ACTOR = 2  # one at work, one at hand

Item = TypeVar("Item")


@dataclass(frozen=True)
class Outcome(Generic[Item]):
    """An item with what came of it; `result` is None if its actor died (or hung) every time."""

    item: Item
    result: Any
    num_tries: int


class WorkersKeepDying(Exception):
    """Actors do not start, or die before they finish anything; the message says how."""


@dataclass(eq=False)
class _Task(Generic[Item]):
    item: Item
    num_tries: int = 0


@dataclass(eq=False)
class _Actor(Generic[Item]):
    handle: Any
    starting: Any  # a reference that is there once the actor is; None from then on
    pending: deque[tuple[Any, _Task[Item]]] = field(default_factory=deque)  # oldest first
    busy_since: float = 0.0


class ActorPool(Generic[Item]):
    """
    Args:
        create: makes an actor.
        call: (actor, item) -> the object reference of its result.
        num_actors: how many there are at a time.
        seconds_for_an_item: an actor that works longer on one is killed, as if it had died.
    """

    def __init__(
        self,
        create: Callable[[], Any],
        call: Callable[[Any, Item], Any],
        *,
        num_actors: int,
        seconds_for_an_item: float,
    ) -> None:
        self._create, self._call = create, call
        self._seconds_for_an_item = seconds_for_an_item
        self._again: deque[_Task[Item]] = deque()
        self._num_deaths_in_a_row = 0
        self._max_deaths_in_a_row = MAX_TRIES * (num_actors + 1)
        self._last_ready = time.monotonic()
        self._actors: list[_Actor[Item]] = [self._new_actor() for _ in range(num_actors)]

    def run(self, items: Iterable[Item]) -> Iterator[Outcome[Item]]:
        """Outcomes as they come. An item whose actor died while working on it is tried three times.

        Raises:
            WorkersKeepDying: no actor starts within 15 minutes, or lives long enough to finish anything.
            ray.exceptions.RayTaskError: the actor's method raised.
        """
        remaining = iter(items)
        is_exhausted = False
        while True:
            while (actor := self._free_actor()) is not None and (self._again or not is_exhausted):
                if self._again:
                    self._submit(actor, self._again.popleft())
                elif (item := next(remaining, None)) is not None:
                    self._submit(actor, _Task(item))
                else:
                    is_exhausted = True
            if is_exhausted and not self._again and not any(one.pending for one in self._actors):
                return
            yield from self._look(SECONDS_BETWEEN_LOOKS)

    def drain(self, seconds: float) -> Iterator[Outcome[Item]]:
        """Outcomes of what is under way, for `seconds` at most; nothing new is begun."""
        until = time.monotonic() + seconds
        while any(actor.pending for actor in self._actors) and (left := until - time.monotonic()) > 0:
            yield from self._look(min(left, SECONDS_BETWEEN_LOOKS))

    def close(self) -> None:
        """Ends the actors, whatever they are doing."""
        for actor in self._actors:
            ray.kill(actor.handle)
        self._actors = []

    def _new_actor(self) -> _Actor[Item]:
        handle = self._create()
        return _Actor(handle, starting=handle.__ray_ready__.remote())

    def _free_actor(self) -> _Actor[Item] | None:
        """Only actors that have started get items: on a busy cluster some may never do."""
        free = [one for one in self._actors if one.starting is None and len(one.pending) < ITEMS_AT_AN_ACTOR]
        return min(free, key=lambda one: len(one.pending), default=None)

    def _submit(self, actor: _Actor[Item], task: _Task[Item]) -> None:
        if not actor.pending:
            actor.busy_since = time.monotonic()
        actor.pending.append((self._call(actor.handle, task.item), task))

    def _look(self, seconds: float) -> Iterator[Outcome[Item]]:
        """Waits for the next result or start; replaces what died or hangs."""
        heads = [one.starting or one.pending[0][0] for one in self._actors if one.starting or one.pending]
        ready, _ = ray.wait(heads, num_returns=1, timeout=seconds)
        now = time.monotonic()
        if any(one.starting is None for one in self._actors):
            self._last_ready = now
        elif now - self._last_ready > SECONDS_TO_START:
            minutes = SECONDS_TO_START / 60
            raise WorkersKeepDying(f"none could start within {minutes:.0f} minutes; is the cluster busy?")
        for index, actor in enumerate(self._actors):
            try:
                if actor.starting in ready:
                    ray.get(actor.starting, timeout=60)
                    actor.starting = None
                elif actor.pending and actor.pending[0][0] in ready:
                    result = ray.get(actor.pending[0][0], timeout=60)
                    _, task = actor.pending.popleft()
                    actor.busy_since = now
                    self._num_deaths_in_a_row = 0
                    yield Outcome(task.item, result, task.num_tries + 1)
                elif actor.pending and now - actor.busy_since > self._seconds_for_an_item:
                    yield from self._replace(index, f"no result within {self._seconds_for_an_item:.0f} s")
            except RayTaskError:
                raise  # the method's own exception; below is what can befall an actor or its result
            except RayError as error:
                yield from self._replace(index, str(error))

    def _replace(self, index: int, cause: str) -> Iterator[Outcome[Item]]:
        """A new actor for a dead one. Only the item at work counts a try; the one at hand is innocent."""
        dead = self._actors[index]
        ray.kill(dead.handle)
        self._num_deaths_in_a_row += 1
        if self._num_deaths_in_a_row > self._max_deaths_in_a_row:
            raise WorkersKeepDying(cause)
        self._actors[index] = self._new_actor()
        tasks = [task for _, task in dead.pending]
        if tasks:
            tasks[0].num_tries += 1
            if tasks[0].num_tries >= MAX_TRIES:
                yield Outcome(tasks.pop(0).item, None, MAX_TRIES)
        self._again.extend(tasks)
