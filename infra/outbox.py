"""Delivers records in order from a background thread, and keeps them while the other side is away."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 300.0
HURRIED_PAUSE_S = 0.5


@dataclass(frozen=True, kw_only=True)
class _Entry:
    kind: str
    payload: Any
    num_bytes: int


class Outbox:
    """A bounded queue with one sender, so that whoever puts a record in never waits for a network.

    `deliver(kind, payloads)` sends one or more payloads of one kind; several neighbours of a kind in
    `grouped_kinds` are handed over together. When it raises and `outage(error)` names a cause, the same
    payloads are tried again after a growing pause and nothing overtakes them; None means that the other
    side refused them, and they are counted as lost. A full queue refuses what is new.
    """

    def __init__(
        self,
        name: str,
        deliver: Callable[[str, list[Any]], None],
        outage: Callable[[Exception], str | None],
        *,
        grouped_kinds: tuple[str, ...] = (),
        max_entries: int = 10_000,
        max_bytes: int = 256 * 2**20,
    ) -> None:
        self._name = name
        self._deliver = deliver
        self._outage = outage
        self._grouped_kinds = grouped_kinds
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._entries: deque[_Entry] = deque()
        self._num_bytes = 0
        self._lost: Counter[str] = Counter()
        self._has_warned: set[str] = set()
        self._num_one_by_one = 0
        self._in_a_hurry = False
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=f"outbox-{name}", daemon=True)
        self._thread.start()

    def put(self, kind: str, payload: Any, *, num_bytes: int = 0) -> bool:
        """Queues a payload; returns at once. False: the queue is full and the payload counts as lost."""
        with self._changed:
            assert not self._is_closed, f"{self._name} is closed"
            is_full = len(self._entries) >= self._max_entries or self._num_bytes + num_bytes > self._max_bytes
            if is_full:
                self._lost[kind] += 1
                self._warn_once("full", f"{self._name}: the buffer is full; newer records are dropped")
                return False
            self._entries.append(_Entry(kind=kind, payload=payload, num_bytes=num_bytes))
            self._num_bytes += num_bytes
            self._changed.notify_all()
            return True

    def flush(self, timeout_s: float) -> bool:
        """Waits until everything is delivered, for at most `timeout_s` seconds; True when it is."""
        with self._changed:
            self._in_a_hurry = True
            self._changed.notify_all()
            is_empty = self._changed.wait_for(lambda: not self._entries, timeout_s)
            self._in_a_hurry = False
            return is_empty

    def close(self, timeout_s: float) -> dict[str, int]:
        """Delivers what it can within `timeout_s` seconds and ends. How many of each kind were lost."""
        self.flush(timeout_s)
        with self._changed:
            self._is_closed = True
            for entry in self._entries:
                self._lost[entry.kind] += 1
            self._entries.clear()
            self._changed.notify_all()
            return dict(self._lost)

    def _work(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._entries or self._is_closed)
                if self._is_closed:
                    return
                group = self._first_group()
            try:
                self._deliver(group[0].kind, [entry.payload for entry in group])
            except Exception as error:  # noqa: BLE001 - a sender that dies would lose all that follows
                if self._is_closed:
                    return
                if (cause := self._outage(error)) is not None:
                    self._warn_once("outage", f"{self._name}: {cause}; records are kept and sent later")
                    self._pause(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                    continue
                if len(group) > 1:  # one bad record must not take its neighbours with it
                    self._num_one_by_one = len(group)
                    continue
                self._count_refused(group, error)
            else:
                self._tell_recovery()
            pause_s = FIRST_PAUSE_S
            self._remove(group)

    def _first_group(self) -> list[_Entry]:
        first = self._entries[0]
        if self._num_one_by_one > 0:
            return [first]
        group = []
        for entry in self._entries:
            if entry.kind != first.kind or (group and first.kind not in self._grouped_kinds):
                break
            group.append(entry)
        return group

    def _remove(self, group: list[_Entry]) -> None:
        with self._changed:
            for _ in range(min(len(group), len(self._entries))):  # close() may have emptied the queue
                self._num_bytes -= self._entries.popleft().num_bytes
            self._num_one_by_one = max(0, self._num_one_by_one - len(group))
            self._changed.notify_all()

    def _pause(self, seconds: float) -> None:
        """Waits before the next attempt; a caller who waits for us shortens it."""
        start = time.monotonic()
        with self._changed:
            while not self._is_closed:
                pause = min(seconds, HURRIED_PAUSE_S) if self._in_a_hurry else seconds
                left = start + pause - time.monotonic()
                if left <= 0:
                    return
                self._changed.wait(left)

    def _count_refused(self, group: list[_Entry], error: Exception) -> None:
        with self._changed:
            self._lost[group[0].kind] += len(group)
        log.warning("%s: refused %s: %s: %s", self._name, group[0].kind, type(error).__name__, error)

    def _tell_recovery(self) -> None:
        if "outage" in self._has_warned:
            self._has_warned.discard("outage")
            log.warning("%s: answers again; the kept records are being sent", self._name)

    def _warn_once(self, occasion: str, text: str) -> None:
        if occasion not in self._has_warned:
            self._has_warned.add(occasion)
            log.warning("%s", text)
