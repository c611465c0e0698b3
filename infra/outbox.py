"""Delivers records in order from a background thread, and keeps them on disk while the other side is away."""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.journal import Entry, delete_journal, open_journal

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 300.0
HURRIED_PAUSE_S = 0.5
SECONDS_TO_END = 1.0
MAX_ENTRIES_A_GROUP = 1000


class Outbox:
    """A bounded queue with one sender, so that whoever puts a record in never waits for a network.

    `deliver(kind, entries)` sends one or more entries of one kind; several neighbours of a kind in
    `grouped_kinds` are handed over together, unless an earlier process wrote only some of them. When it
    raises and `outage(error)` names a cause, the same entries are tried again after a growing pause and
    nothing overtakes them; None means that the other side refused them, and they are counted as lost. A full
    queue refuses what is new.

    The queue is a file at `path`: the next Outbox there sends first what this one could not, should the
    process be killed or `close` run out of time. An entry whose delivery was cut short is delivered again.
    None: the queue is in memory.
    """

    def __init__(
        self,
        name: str,
        deliver: Callable[[str, list[Entry]], None],
        outage: Callable[[Exception], str | None],
        *,
        path: Path | None,
        grouped_kinds: tuple[str, ...] = (),
        max_entries: int = 100_000,
        max_bytes: int = 256 * 2**20,
    ) -> None:
        self._name = name
        self._deliver = deliver
        self._outage = outage
        self._grouped_kinds = grouped_kinds
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._path, self._journal = path, open_journal(path)
        self._position = 0  # the id of the last entry that is done with, even if a full disk keeps it
        self._waiting, self._num_bytes = self._journal.sizes(after=self._position)
        self._lost: Counter[str] = Counter()
        self._has_warned: set[str] = set()
        self._num_one_by_one = 0
        self._in_a_hurry = False
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=f"outbox-{name}", daemon=True)
        self._thread.start()

    def put(
        self, kind: str, payload: Any, attachment: Path | None = None, *, beyond_bounds: bool = False
    ) -> bool:
        """Queues what JSON holds and a file's bytes; returns at once. False: there is no room for it, and it
        counts as lost. `beyond_bounds`: only a full disk leaves no room."""
        text = json.dumps(payload)
        num_bytes = len(text) + (attachment.stat().st_size if attachment else 0)
        with self._changed:
            assert not self._is_closed, f"{self._name} is closed"
            has_room = self._waiting.total() < self._max_entries
            has_room &= self._num_bytes + num_bytes <= self._max_bytes
            if not has_room and not beyond_bounds:
                self._lost[kind] += 1
                self._warn_once("full", f"{self._name}: the buffer is full; newer records are dropped")
                return False
            try:
                self._journal.append(kind, text, attachment.read_bytes() if attachment else None)
            except sqlite3.Error as error:
                self._lost[kind] += 1
                self._warn_of_disk(error)
                return False
            self._waiting[kind] += 1
            self._num_bytes += num_bytes
            self._changed.notify_all()
            return True

    def adopt(self, path: Path) -> bool:
        """Queues what the queue at `path` still holds; nobody may have that open. False: it cannot be."""
        with self._changed:
            try:
                self._journal.absorb(path)
                self._waiting, self._num_bytes = self._journal.sizes(after=self._position)
            except sqlite3.Error as error:
                log.warning("%s: cannot take up %s: %s", self._name, path, error)
                return False
            self._changed.notify_all()
            return True

    def flush(self, timeout_s: float) -> bool:
        """Waits until everything is delivered, for at most `timeout_s` seconds; True when it is."""
        with self._changed:
            self._in_a_hurry = True
            self._changed.notify_all()
            is_empty = self._changed.wait_for(lambda: not self._waiting.total(), timeout_s)
            self._in_a_hurry = False
            return is_empty

    def close(self, timeout_s: float) -> tuple[Counter[str], Counter[str]]:
        """Delivers what it can within `timeout_s` seconds and ends.

        Returns:
            How many of each kind are lost, and how many are kept on disk for the next Outbox at this place.
        """
        self.flush(timeout_s)
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            waiting = +self._waiting
            is_on_disk = self._journal.path is not None
        self._thread.join(SECONDS_TO_END)  # longer, only where it hangs in a request
        return (self._lost, waiting) if is_on_disk else (self._lost + waiting, Counter())

    @property
    def has_ended(self) -> bool:
        """Closed, and no delivery is under way that may still be recorded at its place."""
        return not self._thread.is_alive()

    def _work(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting.total() or self._is_closed)
                if self._is_closed:
                    self._journal.close()
                    return
            try:
                with self._changed:
                    group = self._first_group()
                self._deliver(group[0].kind, group)
            except sqlite3.Error as error:
                self._warn_of_disk(error)
                self._pause(pause_s)
                continue
            except Exception as error:  # noqa: BLE001 - a sender that dies would lose all that follows
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

    def _first_group(self) -> list[Entry]:
        (first,) = self._journal.read(after=self._position, limit=1)
        if self._num_one_by_one > 0 or first.kind not in self._grouped_kinds:
            return [first]
        group = []
        for entry in self._journal.read(after=self._position, limit=MAX_ENTRIES_A_GROUP):
            if (entry.kind, entry.is_recovered) != (first.kind, first.is_recovered):
                break
            group.append(entry)
        return group

    def _remove(self, group: list[Entry]) -> None:
        with self._changed:
            self._position = group[-1].id
            self._waiting[group[0].kind] -= len(group)
            self._num_bytes -= sum(entry.num_bytes for entry in group)
            try:
                self._journal.remove(up_to=self._position)
            except sqlite3.Error as error:  # on a full disk there is no room to remove anything, either
                self._warn_of_disk(error)
                if not self._waiting.total():
                    self._start_over()
            self._num_one_by_one = max(0, self._num_one_by_one - len(group))
            self._changed.notify_all()

    def _start_over(self) -> None:
        self._journal.close()
        if self._path is not None:
            delete_journal(self._path)
        self._journal, self._position = open_journal(self._path), 0

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

    def _count_refused(self, group: list[Entry], error: Exception) -> None:
        with self._changed:
            self._lost[group[0].kind] += len(group)
        log.warning("%s: refused %s: %s: %s", self._name, group[0].kind, type(error).__name__, error)

    def _tell_recovery(self) -> None:
        if "outage" in self._has_warned:
            self._has_warned.discard("outage")
            log.warning("%s: answers again; the kept records are being sent", self._name)

    def _warn_of_disk(self, error: sqlite3.Error) -> None:
        self._warn_once(
            "disk", f"{self._name}: the buffer {self._journal.path}: {error}; records are dropped"
        )

    def _warn_once(self, occasion: str, text: str) -> None:
        if occasion not in self._has_warned:
            self._has_warned.add(occasion)
            log.warning("%s", text)
