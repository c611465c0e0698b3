"""What `infra.storage` does with local folders: atomic writes, listing in the order of an object store."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat as stat_modes
from collections.abc import Iterator
from pathlib import Path
from typing import IO

# What the names of a file that is being written and of a lock begin and end with.
TEMPORARY, LOCK = (".nst-", ".tmp"), (".nst-", ".lock")
# Some file systems (exFAT, a few FUSE ones) have no hard links.
NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


@contextlib.contextmanager
def naming(uri: str) -> Iterator[None]:
    """An OSError that does not say which file it is about gets `uri` as its file name (same class)."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror or str(error), uri) from error


def etag_of(status: os.stat_result) -> str:
    """Changes whenever the file is written: modification time and size."""
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"


def file_status(path: str) -> os.stat_result | None:
    """The status of a regular file; None where there is none (a folder is none)."""
    try:
        status = Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status if stat_modes.S_ISREG(status.st_mode) else None


def write(path: str, source: bytes | IO[bytes], *, if_absent: bool, within: str | None = None) -> bool:
    """Writes a whole file or nothing: temporary file, fsync, then rename (or link, which refuses to replace).

    Args:
        within: a folder above `path`; no link below it is followed (an OSError says so).

    Returns:
        False if `if_absent` and the file was there already.
    """
    target = Path(path)
    with naming(path):
        if within is not None:
            _refuse_links(target.parent, within)
        target.parent.mkdir(parents=True, exist_ok=True)
        if if_absent and target.exists():
            return False
        with _temporary_file(target) as (file, temporary):
            if isinstance(source, bytes):
                file.write(source)
            else:
                shutil.copyfileobj(source, file, 4 << 20)
            file.flush()
            os.fsync(file.fileno())
            return publish(temporary, target, if_absent=if_absent)


def read(path: str, *, within: str | None = None) -> bytes:
    """The whole file. No link leads out of the folder `within` (an OSError says so)."""
    if within is not None and not Path(path).resolve().is_relative_to(Path(within).resolve()):
        raise OSError(errno.ELOOP, f"a link leads out of {within}; remove it", path)
    with naming(path):
        return Path(path).read_bytes()


def _refuse_links(folder: Path, within: str) -> None:
    if folder.resolve() != Path(within).resolve() / os.path.relpath(folder, within):
        raise OSError(errno.ELOOP, f"a link leads elsewhere from below {within}; remove it", str(folder))


@contextlib.contextmanager
def _temporary_file(target: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A new file beside `target`, removed at the end. It is locked while its writer lives, which tells it
    from one that was left behind."""
    while True:
        path = temporary_beside(target)
        try:
            with path.open("xb") as file:
                # On a file system without locks nothing is ever tidied away.
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
                if not _is_open_file(file, path):
                    continue  # tidied away before it was locked
                yield file, path
                return
        finally:
            path.unlink(missing_ok=True)


def remove_abandoned(folder: str) -> None:
    """Removes the temporary files and locks below `folder` whose writers were killed; those of living ones
    stay."""
    for root, _, names in os.walk(folder):
        for path in (Path(root, name) for name in names if name.startswith(TEMPORARY[0])):
            if not path.name.endswith((TEMPORARY[1], LOCK[1])) or path.is_symlink():
                continue
            with contextlib.suppress(OSError), path.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_open_file(file, path):  # else it is another's by now, under the same name
                    path.unlink()


def replace(path: str, data: bytes, *, expected: bytes) -> bool:
    """Writes the file if it holds `expected`. Returns False if it holds something else (or is gone), True if
    it holds `data` now. Other writers that do the same wait meanwhile, on any file system that has locks."""
    target = Path(path)
    try:
        with naming(path), _locked(target):
            found = target.read_bytes()
            return write(path, data, if_absent=False) if found == expected else found == data
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    path = target.parent / target.name.join(LOCK)
    while True:
        with path.open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_open_file(lock, path):
                continue  # whoever held it has removed it: this is no longer the file that others wait for
            try:
                yield
            finally:
                path.unlink()
            return


def _is_open_file(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def temporary_beside(target: Path) -> Path:
    """A fresh hidden name in the same folder, so that the rename stays on one file system."""
    return target.parent / secrets.token_hex(8).join(TEMPORARY)


def publish(temporary: Path, target: Path, *, if_absent: bool = False) -> bool:
    """Gives a complete temporary file its name in one step. Returns False if `if_absent` and it was taken."""
    if if_absent:
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            # Not atomic against another writer at this very moment, but the best this file system has.
            if target.exists():
                return False
            temporary.replace(target)
    else:
        temporary.replace(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the name itself survives a power cut too
    finally:
        os.close(descriptor)
    return True


def walk(root: str, *, include_hidden: bool) -> Iterator[tuple[str, os.stat_result | None]]:
    """(posix path relative to `root`, status) of every file below `root`, in plain string order of the paths.

    One folder's names are in memory at a time (and its parents'). The status is None for what is not to be
    followed or opened: links to folders, to nothing or to files outside of `root`, and what is no file.
    """
    resolved_root = os.path.realpath(root)
    pending = [_entries(resolved_root, "", include_hidden)]
    while pending:
        entry = next(pending[-1], None)
        if entry is None:
            pending.pop()
            continue
        key, item = entry
        try:
            if item.is_symlink():
                inside = os.path.realpath(item.path).startswith(resolved_root.rstrip("/") + "/")
                yield key, item.stat() if inside and item.is_file() else None
            elif item.is_dir():
                pending.append(_entries(item.path, key + "/", include_hidden))
            else:
                yield key, item.stat() if item.is_file() else None
        except FileNotFoundError:
            continue  # it went away while we walked


def _entries(folder: str, prefix: str, include_hidden: bool) -> Iterator[tuple[str, os.DirEntry[str]]]:
    with naming(folder), os.scandir(folder) as found:
        entries = [entry for entry in found if include_hidden or not entry.name.startswith(".")]
    # "a/b" comes after "a.b" in the order of whole paths, though "a" comes before "a.b".
    entries.sort(key=lambda entry: entry.name + "/" if entry.is_dir(follow_symlinks=False) else entry.name)
    return ((prefix + entry.name, entry) for entry in entries)
