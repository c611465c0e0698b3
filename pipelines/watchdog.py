"""Ends a rank that hangs, so that the training is restarted: its peers would wait for it, or it for them."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable

EXIT_CODE = 75  # EX_TEMPFAIL: trying again may help
SECONDS_TO_TELL = 2.0


class Watchdog:
    """`beat` is called at every step. Where that stays out for `timeout_s` seconds, the stacks of all threads
    go to the log, `tell` gets a line for the driver, and the process ends."""

    def __init__(self, timeout_s: float, tell: Callable[[str], object]) -> None:
        self._timeout_s, self._tell = timeout_s, tell
        self._has_ended = threading.Event()
        self.beat()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def beat(self) -> None:
        self._last_beat = time.monotonic()
        # Needs no Python, for a library that hangs and lets no other thread run.
        faulthandler.dump_traceback_later(2 * self._timeout_s + SECONDS_TO_TELL, exit=True)

    def stop(self) -> None:
        self._has_ended.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._has_ended.wait(min(1.0, self._timeout_s / 10)):
            if time.monotonic() - self._last_beat > self._timeout_s:
                faulthandler.dump_traceback()
                try:
                    self._tell(f"no step in {self._timeout_s:g} s (--hang-timeout)")
                    time.sleep(SECONDS_TO_TELL)
                finally:
                    os._exit(EXIT_CODE)
