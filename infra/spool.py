"""Folders on this machine that outlive a killed process, so that the next one finds what it left behind."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import itertools
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

DAYS_TO_KEEP = 7


class Spool:
    """A folder that belongs to this process until `release`, `remove` or the process's death, whichever
    comes first. It is the folder itself that is locked, as programs that tidy temporary folders expect."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    def release(self) -> None:
        """Leaves the folder to whoever comes next."""
        os.close(self._lock)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def claim(name: str) -> Spool:
    """The first of the folders `name`, `name-2`, `name-3`, … below the system's temporary folder that no
    living process has, with what a dead one left in it; made where there is none.

    Raises:
        OSError: no folder can be made or locked there.
    """
    for number in itertools.count(1):
        path = Path(tempfile.gettempdir(), name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        if (spool := _lock(path)) is not None:
            return spool
    raise AssertionError("unreachable")


def abandoned(name: str) -> Iterator[Spool]:
    """The folders that `claim(name)` gave to processes that are gone. The caller releases or removes each."""
    for path in sorted(Path(tempfile.gettempdir()).glob(f"{glob.escape(name)}*")):
        if re.fullmatch(rf"{re.escape(name)}(-\d+)?", path.name) and (spool := _lock(path)) is not None:
            yield spool


def remove_old(prefix: str) -> None:
    """Removes the folders of that prefix in which nothing was written for `DAYS_TO_KEEP` days."""
    for path in Path(tempfile.gettempdir()).glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(OSError):
            last_written = max(entry.stat().st_mtime for entry in (path, *path.iterdir()))
            if time.time() - last_written > DAYS_TO_KEEP * 86400 and (spool := _lock(path)) is not None:
                spool.remove()


def _lock(path: Path) -> Spool | None:
    """The folder, if it is our own user's and no living process has it."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    is_ours = False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # its owner may have removed it since we opened it
        is_ours = os.fstat(lock).st_uid == os.getuid() and os.path.samestat(os.fstat(lock), path.lstat())
    except (BlockingIOError, FileNotFoundError):
        pass
    finally:
        if not is_ours:
            os.close(lock)
    return Spool(path, lock) if is_ours else None
