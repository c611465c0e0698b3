"""Temporary folders that do not pile up: what a killed process left behind goes when the next one is made."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

IN_USE = ".in-use"  # in every such folder, and locked for as long as the folder's process lives
SECONDS_TO_LOCK = 60.0


@contextlib.contextmanager
def folder(prefix: str, *, parent: str | None = None) -> Iterator[str]:
    """A new folder, removed at the end, below `parent` (None: where the system keeps temporary files)."""
    _remove_abandoned(prefix, parent or tempfile.gettempdir())
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as path,
        Path(path, IN_USE).open("x") as lock,
    ):
        with contextlib.suppress(OSError):  # on a file system without locks nothing is ever tidied away
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


def _remove_abandoned(prefix: str, parent: str) -> None:
    for path in Path(parent).glob(f"{prefix}*/{IN_USE}"):
        with contextlib.suppress(OSError), path.open("r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - path.stat().st_mtime > SECONDS_TO_LOCK:  # else its process may be about to
                shutil.rmtree(path.parent, ignore_errors=True)
