"""Files of a corpus, opened and checked: size and sha256, once a process and file."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from nst.manifest import REMEDY, CorpusError
from nst.shard_cache import ShardCache


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


class VerifiedFiles:
    """Opens the files below `uri` to be read.

    Those of a remote corpus are fetched once into `cache`, for all processes of the machine, and again when
    others needed their room meanwhile. A file that changes after it was checked is checked again.
    """

    def __init__(self, uri: str, storage: Storage, cache: ShardCache) -> None:
        self.uri = uri.rstrip("/")
        self.storage = storage
        self.cache = cache
        self.is_remote = is_remote(uri)
        self._folder = local_path(self.uri)
        self._checked: dict[str, tuple[int, int, int, int]] = {}
        self._lock = threading.Lock()

    def open(self, key: str, *, num_bytes: int, sha256: str) -> int:
        """A descriptor of a file with exactly these bytes, to be closed by the caller.

        Raises:
            CorpusError: it is missing, cut or altered; the message names it.
            CacheError: there is no room for it, or no right to write.
            OSError: it cannot be fetched.
        """
        if not self.is_remote:
            path = os.path.join(self._folder, key)  # noqa: PTH118 - in the way of every single read
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                raise CorpusError(f"{path} is missing; {REMEDY}") from None
            return self._checked_descriptor(descriptor, path, path, num_bytes, sha256)
        name = _cached_name(key, sha256)
        descriptor = self.cache.open(name)
        if descriptor is not None:
            try:
                return self._checked_descriptor(descriptor, name, name, num_bytes, sha256)
            except CorpusError:
                pass  # damaged on this disk
        return self._fetch(key, num_bytes, sha256)

    def fetch_ahead(self, key: str, *, num_bytes: int, sha256: str) -> None:
        """Sees to it that a remote file is here when it is opened; errors as `open`."""
        if self.is_remote:
            descriptor = self.cache.open(_cached_name(key, sha256))
            os.close(self._fetch(key, num_bytes, sha256) if descriptor is None else descriptor)

    def _fetch(self, key: str, num_bytes: int, sha256: str) -> int:
        uri, name = f"{self.uri}/{key}", _cached_name(key, sha256)
        with self.cache.fetching(name, num_bytes) as incoming:
            descriptor = self.cache.open(name)
            if descriptor is not None:  # another process was first
                try:
                    return self._checked_descriptor(descriptor, name, name, num_bytes, sha256)
                except CorpusError:
                    pass
            with incoming.writing() as path:
                try:
                    self.storage.download_file(uri, str(path))
                except FileNotFoundError:
                    raise CorpusError(f"{uri} is missing; {REMEDY}") from None
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            os.close(self._checked_descriptor(descriptor, name, uri, num_bytes, sha256))
            return incoming.publish()

    def _checked_descriptor(
        self, descriptor: int, known_as: str, shown_as: str, num_bytes: int, sha256: str
    ) -> int:
        try:
            self._check(descriptor, known_as, shown_as, num_bytes, sha256)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _check(self, descriptor: int, known_as: str, shown_as: str, num_bytes: int, sha256: str) -> None:
        identity = _identity(descriptor)
        if self._checked.get(known_as) == identity:
            return
        with self._lock:  # threads of one process need not all read it
            if self._checked.get(known_as) == identity:
                return
            if identity[0] != num_bytes:
                raise CorpusError(f"{shown_as} has {identity[0]:,} bytes instead of {num_bytes:,}; {REMEDY}")
            with os.fdopen(os.dup(descriptor), "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise CorpusError(f"{shown_as} is altered: its checksum does not fit; {REMEDY}")
            self._checked[known_as] = identity


def _cached_name(key: str, sha256: str) -> str:
    return f"{sha256}{Path(key).suffix}"


def _identity(descriptor: int) -> tuple[int, int, int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev
