"""What a run is going to do, found by a thread as fast as it can and kept on disk until it is taken: nothing
waits for a whole listing, the total is known as soon as there is one, and memory does not grow with it."""

from __future__ import annotations

import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

MAX_IN_A_BATCH = 1_000
NUM_AT_HAND, SECONDS_AHEAD = 10_000, 1.0  # how far it gets while it is held
SECONDS_TO_CLOSE = 30.0
LENGTH = struct.Struct("<I")

Entry = TypeVar("Entry")


class Backlog(Generic[Entry]):
    """
    Args:
        entries: is gone through by a thread of the backlog's own.
        folder: for its file.
        write, read: an entry as a line of text, and back.
        kind: of an entry, to count and to wait for.
        is_closing: is set where nobody takes any more, for `entries` to come to an end.
    """

    def __init__(
        self,
        entries: Iterable[Entry],
        folder: str,
        *,
        write: Callable[[Entry], str],
        read: Callable[[str], Entry],
        kind: Callable[[Entry], str],
        is_closing: threading.Event,
    ) -> None:
        self._entries, self._write, self._read, self._kind = entries, write, read, kind
        path = Path(folder, "backlog")
        self._to, self._from = path.open("wb"), path.open("rb")
        self._at_hand: list[Entry] = []  # the next one last
        self.num_found = self._num_taken = self._num_batches = self._num_batches_read = 0
        self._changed = threading.Condition()
        self._is_closing, self._is_complete = is_closing, False
        self._held_at, self._may_run_ahead = 0.0, threading.Event()
        self._may_run_ahead.set()
        self._error: BaseException | None = None
        self.num_of_kind: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._fill, name="backlog", daemon=True)

    def __enter__(self) -> Backlog[Entry]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None
    ) -> None:
        self._is_closing.set()
        self._may_run_ahead.set()
        self._thread.join(SECONDS_TO_CLOSE)
        self._to.close()
        self._from.close()

    @property
    def is_complete(self) -> bool:
        """Whether all there is has been found."""
        return self._is_complete

    @property
    def num_left(self) -> int | None:
        """How many are not taken yet; None while that is not known."""
        return self.num_found - self._num_taken if self._is_complete else None

    def hold(self) -> None:
        """From now on no more are looked for than 10,000, or what a second finds, until `run_ahead` or until
        those are taken: workers that start need the processor more."""
        self._held_at = time.monotonic()
        self._may_run_ahead.clear()

    def run_ahead(self) -> None:
        self._may_run_ahead.set()

    def wait_for(self, kind: str) -> bool:
        """Waits until one of this kind is found; False if there is none. Raises what `entries` raised."""
        with self._changed:
            while not self.num_of_kind[kind] and not self._is_complete:
                self._changed.wait(1.0)
        if not self.num_of_kind[kind]:
            self._raise_error()
        return self.num_of_kind[kind] > 0

    def take(self, num: int) -> list[Entry]:
        """The next ones, `num` at most, without waiting: fewer or none where no more are found yet.

        Raises what `entries` raised, once all that was found is taken.
        """
        taken: list[Entry] = []
        while len(taken) < num and (self._at_hand or self._read_batch()):
            taken.append(self._at_hand.pop())
        self._num_taken += len(taken)
        if not taken:
            self.run_ahead()
        if not taken and self.num_left == 0:
            self._raise_error()
        return taken

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _read_batch(self) -> bool:
        if self._num_batches_read == self._num_batches:
            return False
        (length,) = LENGTH.unpack(self._from.read(LENGTH.size))
        lines = zlib.decompress(self._from.read(length)).decode().splitlines()
        self._at_hand = [self._read(line) for line in reversed(lines)]
        self._num_batches_read += 1
        return True

    def _fill(self) -> None:
        try:
            self._find()
        except BaseException as error:  # noqa: BLE001 - it is raised where the entries are taken
            self._error = error
        with self._changed:
            self._is_complete = True
            self._changed.notify_all()

    def _find(self) -> None:
        waiting: list[Entry] = []
        stored_at = time.monotonic()
        try:
            for entry in self._entries:
                if self._is_closing.is_set():
                    return
                waiting.append(entry)
                # the first ones at once; later ones together, which takes less
                num_wanted = min(1 + self.num_found, MAX_IN_A_BATCH)
                if len(waiting) >= num_wanted or time.monotonic() - stored_at > 1.0:
                    self._store(waiting)
                    waiting, stored_at = [], time.monotonic()
                    has_enough = self.num_found - self._num_taken >= NUM_AT_HAND
                    if has_enough or stored_at - self._held_at > SECONDS_AHEAD:
                        self._may_run_ahead.wait()
        finally:
            if waiting and not self._is_closing.is_set():
                self._store(waiting)

    def _store(self, entries: Sequence[Entry]) -> None:
        data = zlib.compress("\n".join(map(self._write, entries)).encode(), 1)
        self._to.write(LENGTH.pack(len(data)) + data)
        self._to.flush()
        with self._changed:
            self._num_batches += 1
            self.num_found += len(entries)
            self.num_of_kind.update(map(self._kind, entries))
            self._changed.notify_all()
