"""A folder of fetched files with a limit, which all processes of a machine share: the least recently used go.

cache/FILE's first two digits/FILE    complete files
cache/incoming/FILE/                  one that is being fetched, with the lock of the process that does
cache/lock                            held while it is decided what has to go"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# How long a process waits for another one that fetches the same file.
SECONDS_TO_WAIT = 900.0
LIMIT_VARIABLE = "NST_CACHE_GB"
TOUCH_NS = 1_000_000_000  # a use counts as new when the last one is as long ago
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class CacheError(OSError):
    """The cache cannot take what has to be fetched. The message says what helps."""


def default_cache_dir() -> str:
    """A folder of this user's in the temporary folder (TMPDIR moves it)."""
    return str(Path(tempfile.gettempdir(), f"nst-corpora-{os.getuid()}"))


def limit_of_environment() -> int | None:
    """NST_CACHE_GB (1 GB = 10^9 bytes) in bytes; None where it is not set. Raises ValueError."""
    text = os.environ.get(LIMIT_VARIABLE, "")
    if not text:
        return None
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise ValueError(f"{LIMIT_VARIABLE} is {text!r}; give gigabytes, such as 200, or unset it")
    return int(limit * 1e9)


class ShardCache:
    """Files by name, each with its time of last use. A name stands for the same bytes for ever.

    Any number of processes and threads may use it at once, and any may be killed: locks end with their
    process, and what it left is removed by the next that needs room. A file that goes while it is read stays
    readable for who has opened it.

    Args:
        folder: on a local disk; made where it is missing.
        max_bytes: of all files, those being fetched included. None: NST_CACHE_GB, else half of what the disk
            has free or the cache already holds.
    """

    def __init__(self, folder: str, max_bytes: int | None = None) -> None:
        self.folder = folder
        self.max_bytes = limit_of_environment() if max_bytes is None else max_bytes

    def open(self, name: str) -> int | None:
        """A descriptor to read a complete file with, now the most recently used; None if it is not here."""
        path = self._path(name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._refused(error) from error
        # Set by hand: most systems note the time of an access rarely or never.
        status, now = os.fstat(descriptor), time.time_ns()
        if now - status.st_atime_ns > TOUCH_NS:
            with contextlib.suppress(OSError):  # another user's file
                os.utime(descriptor, ns=(now, status.st_mtime_ns))
        return descriptor

    @contextlib.contextmanager
    def fetching(self, name: str, num_bytes: int) -> Iterator[Incoming]:
        """The right to fetch a file of this size. Others who want it wait until the block ends.

        Raises:
            TimeoutError: another process has been fetching it for a quarter of an hour.
            CacheError: the folder cannot be written to.
        """
        folder = Path(self.folder, "incoming", name)
        try:
            lock = self._lock(folder)
        except TimeoutError:
            raise
        except OSError as error:
            raise self._refused(error) from error
        try:
            yield Incoming(self, name, num_bytes, folder)
        finally:
            _clear(folder)
            _unlock(lock)

    def limit(self) -> int:
        """Bytes that all files may have together."""
        if self.max_bytes is not None:
            return self.max_bytes
        used = sum(status.st_size for _, status in self._complete())
        return (used + _free_bytes(Path(self.folder))) // 2

    def _lock(self, folder: Path) -> int:
        deadline = time.monotonic() + SECONDS_TO_WAIT
        while time.monotonic() < deadline:
            # Not exist_ok: that looks again at what was there, and whoever had it may just have removed it.
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True)
            try:
                lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                continue  # whoever had it has just removed the folder
            if _try_lock(lock):
                # Held, but perhaps one that was removed before it was ours.
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(lock), (folder / "lock").stat()):
                        return lock
                _unlock(lock)
            else:
                os.close(lock)
                time.sleep(0.02)
        raise TimeoutError(
            f"{folder.name} has been fetched by another process for {SECONDS_TO_WAIT:.0f} s; is its storage "
            "reachable?"
        )

    def make_room(self, incoming: Incoming) -> None:
        """Sets aside room for a file that is about to be fetched; what was used longest ago goes for it.

        A file that is larger than the limit gets its room all the same, and is then alone."""
        with self._deciding():
            # Its size is how much room it holds, though nothing is in it: others count it in.
            os.truncate(incoming.folder / "lock", incoming.num_bytes)
            reserved = sum(self._reserved())
            files = sorted(self._complete(), key=lambda file: file[1].st_atime_ns)
            used = sum(status.st_size for _, status in files)
            free = _free_bytes(Path(self.folder))
            limit = (used + free) // 2 if self.max_bytes is None else self.max_bytes
            surplus = max(used + reserved - limit, incoming.num_bytes - free)
            for path, status in files:
                if surplus <= 0:
                    break
                path.unlink(missing_ok=True)
                surplus -= status.st_size

    def publish(self, incoming: Incoming) -> int:
        path = self._path(incoming.name)
        Path(path).parent.mkdir(exist_ok=True)
        status = incoming.path.stat()
        os.utime(incoming.path, ns=(time.time_ns(), status.st_mtime_ns))
        descriptor = os.open(incoming.path, os.O_RDONLY | os.O_CLOEXEC)
        incoming.path.replace(path)
        return descriptor

    def _refused(self, error: OSError) -> CacheError:
        return CacheError(
            f"the cache of shards in {self.folder} takes nothing: {error.strerror or error}; free some of "
            f"its disk, let TMPDIR name a folder on another one, or {LIMIT_VARIABLE} a smaller limit"
        )

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Errors that speak of the cache's disk, and not of where a file comes from, become CacheError."""
        try:
            yield
        except OSError as error:
            is_here = isinstance(error.filename, str | os.PathLike) and str(error.filename).startswith(
                self.folder
            )
            if error.errno in FULL or is_here:
                raise self._refused(error) from error
            raise

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name[:2], name)  # noqa: PTH118 - in the way of every single read

    @contextlib.contextmanager
    def _deciding(self) -> Iterator[None]:
        with Path(self.folder, "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _complete(self) -> Iterator[tuple[Path, os.stat_result]]:
        for folder in _entries(self.folder):
            if len(folder.name) == 2:
                for file in _entries(folder.path):
                    with contextlib.suppress(FileNotFoundError):
                        yield Path(file.path), file.stat()

    def _reserved(self) -> Iterator[int]:
        """Bytes set aside for each file that is being fetched. Removes what killed processes left."""
        for folder in _entries(os.path.join(self.folder, "incoming")):  # noqa: PTH118
            try:
                lock = os.open(os.path.join(folder.path, "lock"), os.O_RDWR | os.O_CLOEXEC)  # noqa: PTH118
            except FileNotFoundError:
                continue
            if _try_lock(lock):
                _clear(Path(folder.path))
                _unlock(lock)
            else:
                yield os.fstat(lock).st_size
                os.close(lock)


class Incoming:
    """A file that this process alone may fetch.

    Attributes:
        path: where to put it.
    """

    def __init__(self, cache: ShardCache, name: str, num_bytes: int, folder: Path) -> None:
        self._cache, self.name, self.num_bytes, self.folder = cache, name, num_bytes, folder
        self.path = folder / "file"

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """Around the fetching itself: there is room, and errors of the cache's disk are named."""
        with self._cache.translated():
            self._cache.make_room(self)
            yield self.path

    def publish(self) -> int:
        """Gives the file its name; returns a descriptor to read it with, which holds whatever comes."""
        with self._cache.translated():
            return self._cache.publish(self)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_UN)  # or a process that was forked meanwhile would still hold it
    os.close(descriptor)


def _clear(folder: Path) -> None:
    """Removes a folder of `incoming` whose lock is held. The lock goes last: who finds none starts anew."""
    with contextlib.suppress(OSError):
        for entry in _entries(str(folder)):
            if entry.name != "lock":
                Path(entry.path).unlink(missing_ok=True)
        (folder / "lock").unlink(missing_ok=True)
        folder.rmdir()


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _free_bytes(folder: Path) -> int:
    """Of the disk that a folder is on, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
