"""Files of a corpus as local paths that were checked: size and sha256, once a process and file."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from nst.manifest import REMEDY, CorpusError

# How long a process waits for another one that fetches the same file, before it fetches it itself.
SECONDS_TO_WAIT = 900.0


class Storage(Protocol):
    """What a corpus needs of a storage. Must be picklable where the corpus is to be."""

    def read_bytes(self, uri: str) -> bytes: ...

    def download_file(self, uri: str, path: str) -> None: ...


class LocalStorage:
    """Folders of this machine."""

    def read_bytes(self, uri: str) -> bytes:
        return Path(local_path(uri)).read_bytes()

    def download_file(self, uri: str, path: str) -> None:
        Path(path).write_bytes(self.read_bytes(uri))


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def local_path(uri: str) -> str:
    return unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri


def default_cache_dir() -> str:
    """A folder of this user's in the temporary folder (TMPDIR moves it)."""
    return str(Path(tempfile.gettempdir(), f"nst-corpora-{os.getuid()}"))


class VerifiedFiles:
    """Gives the files below `uri` as local paths.

    Those of a remote corpus are fetched once into `cache_dir`, for all processes of the machine. A file that
    changes after it was checked is checked again.
    """

    def __init__(self, uri: str, storage: Storage, cache_dir: str) -> None:
        self.uri = uri.rstrip("/")
        self.storage = storage
        self.cache_dir = cache_dir
        self._checked: dict[str, tuple[int, int, int]] = {}
        self._lock = threading.Lock()

    def path(self, key: str, *, num_bytes: int, sha256: str) -> str:
        """The local path of a file with exactly these bytes. Raises CorpusError, naming it, if it is missing,
        cut or altered; OSError if it cannot be fetched."""
        if not is_remote(self.uri):
            path = os.path.join(local_path(self.uri), key)  # noqa: PTH118 - in the way of every single read
            self._check(path, path, num_bytes, sha256)
            return path
        uri = f"{self.uri}/{key}"
        path = os.path.join(self.cache_dir, sha256[:2], f"{sha256}{Path(key).suffix}")  # noqa: PTH118
        if self._is_checked(path):
            return path
        with _one_at_a_time(path):
            try:
                self._check(path, uri, num_bytes, sha256)
            except CorpusError:
                self._fetch(uri, path)
                self._check(path, uri, num_bytes, sha256)
        return path

    def _is_checked(self, path: str) -> bool:
        known = self._checked.get(path)
        return known is not None and known == _identity(path)

    def _check(self, path: str, uri: str, num_bytes: int, sha256: str) -> None:
        if self._is_checked(path):
            return
        with self._lock:  # threads of one process need not all read it
            if self._is_checked(path):
                return
            identity = _identity(path)
            if identity is None:
                raise CorpusError(f"{uri} is missing; {REMEDY}")
            if identity[0] != num_bytes:
                raise CorpusError(f"{uri} has {identity[0]:,} bytes instead of {num_bytes:,}; {REMEDY}")
            with Path(path).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise CorpusError(f"{uri} is altered: its checksum does not fit; {REMEDY}")
            self._checked[path] = identity

    def _fetch(self, uri: str, path: str) -> None:
        temporary = f"{path}.{os.getpid()}-{threading.get_ident()}"
        try:
            self.storage.download_file(uri, temporary)
            Path(temporary).replace(path)
        except FileNotFoundError:
            raise CorpusError(f"{uri} is missing; {REMEDY}") from None
        finally:
            Path(temporary).unlink(missing_ok=True)


def _identity(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - in the way of every single read
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


@contextmanager
def _one_at_a_time(path: str) -> Iterator[None]:
    """Processes that want the same file wait for the first. The lock ends with the process that holds it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + SECONDS_TO_WAIT
    with Path(f"{path}.lock").open("wb") as lock:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        yield
