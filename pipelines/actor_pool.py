"""Items over a pool of Ray actors that grows and shrinks with the cluster: in chunks, bounded in flight. What
a dead actor held is done again, item by item, so that one that kills its actor costs itself alone."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

SECONDS_BETWEEN_LOOKS = 5.0
SECONDS_BETWEEN_SIZES = 10.0
SECONDS_TO_START = 900.0  # an autoscaler needs minutes for a machine
SECONDS_WITHOUT_ITEMS = 0.1  # between looks for new ones
MAX_TRIES = 3
CHUNKS_AT_AN_ACTOR = 2  # one at work, one at hand
SECONDS_IN_A_CHUNK = 2.0
MAX_IN_A_CHUNK = 64

Item = TypeVar("Item")
Taken = TypeVar("Taken")


class Source(Protocol[Taken]):
    """Where the pool takes items from: without waiting, fewer or none if there are no more yet. `num_left` is
    None while nobody knows it."""

    def take(self, num: int) -> list[Taken]: ...

    @property
    def num_left(self) -> int | None: ...


@dataclass(frozen=True)
class Outcome(Generic[Item]):
    """An item with what came of it; `result` is None if its actor died (or hung) every time."""

    item: Item
    result: Any
    num_tries: int


class WorkersKeepDying(Exception):
    """Actors do not start, or die before they finish anything; the message says how."""


@dataclass(eq=False)
class _Chunk(Generic[Item]):
    """`is_suspect`: its actor died, of this or of what it did beside; now it is one item, alone at an actor.
    `num_deaths` counts those that were certainly its own."""

    items: list[Item]
    is_suspect: bool = False
    num_tries: int = 0
    num_deaths: int = 0


@dataclass(eq=False)
class _Actor(Generic[Item]):
    handle: Any
    starting: Any  # a reference that is there once the actor is; None from then on
    pending: dict[Any, _Chunk[Item]] = field(default_factory=dict)  # reference of the results -> chunk
    busy_since: float = 0.0

    @property
    def has_suspect(self) -> bool:
        return any(chunk.is_suspect for chunk in self.pending.values())


class ActorPool(Generic[Item]):
    """
    Args:
        create: makes an actor.
        call: (actor, items) -> the object reference of a list with a result for each.
        num_actors: how many there should be; asked again now and then.
        seconds_for_a_chunk: an actor that gives no result for longer is killed, as if it had died.
    """

    def __init__(
        self,
        create: Callable[[], Any],
        call: Callable[[Any, list[Item]], Any],
        *,
        num_actors: Callable[[], int],
        seconds_for_a_chunk: float,
    ) -> None:
        self._create, self._call, self._ask = create, call, num_actors
        self._seconds_for_a_chunk = seconds_for_a_chunk
        self._suspects: deque[_Chunk[Item]] = deque()
        self._finished: deque[Outcome[Item]] = deque()
        self._seconds_for_an_item = SECONDS_IN_A_CHUNK  # at an actor; a guess until there are results
        self._num_deaths_in_a_row = 0
        self._last_ready = self._sized_at = time.monotonic()
        self._num_wanted = max(1, num_actors())
        self._actors: list[_Actor[Item]] = [self._new_actor() for _ in range(self._num_wanted)]

    def run(self, source: Source[Item]) -> Iterator[Outcome[Item]]:
        """Outcomes as they come. An item whose actor dies while it is alone there is tried three times.

        Raises:
            WorkersKeepDying: no actor starts within 15 minutes, or lives long enough to finish anything.
            ray.exceptions.RayTaskError: the actor's method raised.
        """
        while True:
            self._submit_suspects()
            is_waiting = not self._suspects and not self._submit_new(source)
            if source.num_left == 0 and not self._suspects and not any(one.pending for one in self._actors):
                return
            self._look(SECONDS_WITHOUT_ITEMS if is_waiting else SECONDS_BETWEEN_LOOKS)
            yield from self._take_finished()
            if source.num_left != 0:
                self._resize()

    def drain(self, seconds: float) -> Iterator[Outcome[Item]]:
        """Outcomes of what is under way, for `seconds` at most; nothing new is begun."""
        until = time.monotonic() + seconds
        yield from self._take_finished()
        while any(actor.pending for actor in self._actors) and (left := until - time.monotonic()) > 0:
            self._look(min(left, SECONDS_BETWEEN_LOOKS))
            yield from self._take_finished()

    def close(self) -> None:
        """Ends the actors, whatever they are doing."""
        for actor in self._actors:
            ray.kill(actor.handle)
        self._actors = []

    @property
    def num_actors(self) -> int:
        return len(self._actors)

    @property
    def num_started(self) -> int:
        """Actors that take items."""
        return sum(actor.starting is None for actor in self._actors)

    def _take_finished(self) -> Iterator[Outcome[Item]]:
        """One by one: what an interrupted caller does not come to is there for `drain`."""
        while self._finished:
            yield self._finished.popleft()

    def _new_actor(self) -> _Actor[Item]:
        handle = self._create()
        return _Actor(handle, starting=handle.__ray_ready__.remote())

    def _free_actor(self, max_pending: int) -> _Actor[Item] | None:
        """Only actors that have started get items: on a busy cluster some may never do."""
        free = [
            one
            for one in self._actors
            if one.starting is None and len(one.pending) <= max_pending and not one.has_suspect
        ]
        return min(free, key=lambda one: len(one.pending), default=None)

    def _submit_suspects(self) -> None:
        while self._suspects and (actor := self._free_actor(0)) is not None:
            self._submit(actor, self._suspects.popleft())

    def _submit_new(self, source: Source[Item]) -> bool:
        """Fills the actors up. Returns False if one has to wait for items that may come."""
        while (actor := self._free_actor(CHUNKS_AT_AN_ACTOR - 1)) is not None:
            items = source.take(self._num_in_a_chunk(source.num_left))
            if not items:
                return source.num_left is not None
            self._submit(actor, _Chunk(items))
        return True

    def _num_in_a_chunk(self, num_left: int | None) -> int:
        """What takes some two seconds; less where few are left, for all to end at about the same time."""
        num = round(SECONDS_IN_A_CHUNK / max(self._seconds_for_an_item, 1e-6))
        if num_left is not None:
            num = min(num, -(-num_left // (CHUNKS_AT_AN_ACTOR * max(1, self.num_started))))
        return min(max(num, 1), MAX_IN_A_CHUNK)

    def _submit(self, actor: _Actor[Item], chunk: _Chunk[Item]) -> None:
        if not actor.pending:
            actor.busy_since = time.monotonic()
        chunk.num_tries += 1
        actor.pending[self._call(actor.handle, chunk.items)] = chunk

    def _look(self, seconds: float) -> None:
        """Waits for the next result or start; replaces what died or hangs."""
        references = [one.starting for one in self._actors if one.starting is not None]
        references += [reference for one in self._actors for reference in one.pending]
        if references:
            ready = set(ray.wait(references, num_returns=1, timeout=seconds)[0])
        else:
            time.sleep(seconds)
            ready = set()
        now = time.monotonic()
        if self.num_started:
            self._last_ready = now
        elif now - self._last_ready > SECONDS_TO_START:
            minutes = SECONDS_TO_START / 60
            raise WorkersKeepDying(f"none could start within {minutes:.0f} minutes; is the cluster busy?")
        for actor in list(self._actors):
            try:
                if actor.starting in ready:
                    ray.get(actor.starting, timeout=60)
                    actor.starting = None
                elif done := next((one for one in actor.pending if one in ready), None):
                    results = ray.get(done, timeout=60)
                    self._finish(actor, actor.pending.pop(done), results, now)
                elif actor.pending and now - actor.busy_since > self._seconds_for_a_chunk:
                    self._bury(actor, f"no result within {self._seconds_for_a_chunk:.0f} s")
            except RayTaskError:
                raise  # the method's own exception; below is what can befall an actor or its result
            except RayError as error:
                self._bury(actor, str(error))

    def _finish(self, actor: _Actor[Item], chunk: _Chunk[Item], results: list[Any], now: float) -> None:
        seconds = (now - actor.busy_since) / len(chunk.items)
        # at most twice as many next time: the first ones may have been small
        self._seconds_for_an_item = max(
            (self._seconds_for_an_item + seconds) / 2, self._seconds_for_an_item / 2
        )
        actor.busy_since = now
        self._num_deaths_in_a_row = 0
        pairs = zip(chunk.items, results, strict=True)
        self._finished.extend(Outcome(item, result, chunk.num_tries) for item, result in pairs)

    def _bury(self, dead: _Actor[Item], cause: str) -> None:
        """A new actor for a dead one, where one is still wanted; what it held is done again."""
        ray.kill(dead.handle)
        self._actors.remove(dead)
        self._num_deaths_in_a_row += 1
        if self._num_deaths_in_a_row > MAX_TRIES * (self._num_wanted + 1):
            raise WorkersKeepDying(cause)
        if len(self._actors) < self._num_wanted:
            self._actors.append(self._new_actor())
        for chunk in dead.pending.values():
            if not chunk.is_suspect:
                again = [_Chunk([item], is_suspect=True, num_tries=chunk.num_tries) for item in chunk.items]
                self._suspects.extend(again)
                continue
            chunk.num_deaths += 1
            if chunk.num_deaths < MAX_TRIES:
                self._suspects.append(chunk)
            else:
                self._finished.append(Outcome(chunk.items[0], None, chunk.num_tries))

    def _resize(self) -> None:
        """Follows the cluster: new nodes get actors; those that do not start are not waited for where there
        is no room for them."""
        now = time.monotonic()
        if now - self._sized_at < SECONDS_BETWEEN_SIZES:
            return
        self._sized_at = now
        self._num_wanted = max(1, self._ask())
        while len(self._actors) < self._num_wanted:
            self._actors.append(self._new_actor())
        for actor in [one for one in self._actors if one.starting is not None]:
            if len(self._actors) > self._num_wanted:
                ray.kill(actor.handle)
                self._actors.remove(actor)
