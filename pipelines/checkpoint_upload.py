"""Checkpoints on their way to the store, while the training goes on."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from infra import scratch
from infra.s3_errors import StoreRefuses
from pipelines.checkpoint_store import CheckpointStore

log = logging.getLogger(__name__)

SECONDS_WITHOUT_STORE = 1800.0  # of refused checkpoints; then a training is no longer worth its GPUs
SECONDS_BETWEEN_TRIES = 5.0


@dataclass(frozen=True, kw_only=True)
class _Written:
    folder: str
    cleanup: ExitStack
    num_images_seen: int
    score: float | None


class CheckpointUpload:
    """Hands checkpoints to a `CheckpointStore` from a thread of its own, one at a time and in order.

    While the store is slow or away the training goes on: one checkpoint waits on this node's disk, and a
    newer one takes its place. A store that has refused all for `SECONDS_WITHOUT_STORE` ends the training.

    Args:
        is_ours: whether the training is still this driver's; asked before each checkpoint is published.
    """

    def __init__(self, store: CheckpointStore, is_ours: Callable[[], bool] = lambda: True) -> None:
        self._store, self._is_ours = store, is_ours
        self._waiting: _Written | None = None
        self._busy_since: float | None = None
        self._is_closed = False
        self._refusing_since: float | None = None
        self._error: OSError | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="checkpoint-upload", daemon=True)
        self._thread.start()

    def submit(self, write: Callable[[str], None], num_images_seen: int, score: float | None) -> None:
        """Has `write(folder)` write a checkpoint into a new folder here, and uploads it later.

        Raises:
            OSError: the store has refused checkpoints for too long.
        """
        self._raise_error()
        with ExitStack() as stack:
            folder = stack.enter_context(scratch.folder("nst-checkpoint-"))
            write(folder)
            written = _Written(
                folder=folder, cleanup=stack.pop_all(), num_images_seen=num_images_seen, score=score
            )
        with self._changed:
            replaced, self._waiting = self._waiting, written
            self._changed.notify_all()
        if replaced is not None:
            log.warning(
                "the store is slow: the checkpoint at %d images is skipped for that at %d",
                replaced.num_images_seen,
                num_images_seen,
            )
            replaced.cleanup.close()

    def flush(self, timeout_s: float) -> bool:
        """Waits until the newest checkpoint is in the store, at most `timeout_s` seconds; True when it is.

        Raises:
            OSError: the store has refused checkpoints for too long.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_idle or self._error, timeout_s)
            is_done = self._is_idle
        self._raise_error()
        return is_done

    @property
    def _is_idle(self) -> bool:
        return self._waiting is None and self._busy_since is None

    def close(self) -> None:
        """Ends the thread and drops what still waits."""
        with self._changed:
            self._is_closed = True
            dropped, self._waiting = self._waiting, None
            self._changed.notify_all()
        if dropped is not None:
            dropped.cleanup.close()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    return
                written, self._waiting, self._busy_since = self._waiting, None, time.monotonic()
            assert written is not None
            try:
                self._upload(written)
            except Exception as error:  # noqa: BLE001 - it reaches the training at its next call
                self._error = error if isinstance(error, OSError) else OSError(f"{self._store.uri}: {error}")
            finally:
                with contextlib.suppress(OSError):
                    written.cleanup.close()
                with self._changed:
                    self._busy_since = None
                    self._changed.notify_all()

    def _upload(self, written: _Written) -> None:
        while True:
            if not self._is_ours():
                raise OSError("another driver has this training now")
            try:
                self._store.publish(written.folder, written.num_images_seen, written.score)
            except (OSError, StoreRefuses) as error:
                now = time.monotonic()
                self._refusing_since = self._refusing_since or now
                if now - self._refusing_since > SECONDS_WITHOUT_STORE:
                    raise
                log.warning("%s did not take a checkpoint (%s); trying again", self._store.uri, error)
                with self._changed:
                    # a newer one is worth more than this one
                    if self._changed.wait_for(
                        lambda: self._waiting or self._is_closed, SECONDS_BETWEEN_TRIES
                    ):
                        return
            else:
                self._refusing_since = None
                return

    def _raise_error(self) -> None:
        if self._error is not None:
            raise OSError(f"checkpoints do not reach {self._store.uri}: {self._error}") from self._error
        busy_since = self._busy_since
        if busy_since is not None and time.monotonic() - busy_since > SECONDS_WITHOUT_STORE:
            raise OSError(f"{self._store.uri} has not taken a checkpoint for {SECONDS_WITHOUT_STORE:.0f} s")
