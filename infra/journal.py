"""Entries in order in one SQLite file, which outlives the process that wrote them."""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

TABLE = """
CREATE TABLE IF NOT EXISTS entries (
    id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, payload TEXT NOT NULL, attachment BLOB,
    is_recovered INTEGER NOT NULL DEFAULT 0
)
"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """`payload` is anything that JSON holds. `is_recovered`: an earlier process wrote it."""

    id: int
    kind: str
    payload: Any
    attachment: bytes | None
    is_recovered: bool
    num_bytes: int


class Journal:
    """A queue on disk. What was appended survives the process's death, though not the machine's: nothing here
    waits for a disk.

    Not safe for threads without a lock around it. All methods raise sqlite3.Error where the disk is full or
    the file is damaged.

    Args:
        path: of the file, made where there is none; None: in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._database = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False)
        try:
            self._database.execute("PRAGMA journal_mode = TRUNCATE")
            self._database.execute("PRAGMA synchronous = OFF")
            if self._database.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError(f"{path} is damaged")
            self._database.execute(TABLE)
            self._database.execute("UPDATE entries SET is_recovered = 1")
        except sqlite3.Error:
            self._database.close()
            raise

    def append(self, kind: str, payload: str, attachment: bytes | None) -> None:
        """`payload` is JSON."""
        self._database.execute(
            "INSERT INTO entries (kind, payload, attachment) VALUES (?, ?, ?)", (kind, payload, attachment)
        )

    def read(self, *, after: int, limit: int) -> list[Entry]:
        """The first `limit` entries behind the one with the id `after`."""
        rows = self._database.execute(
            "SELECT id, kind, payload, attachment, is_recovered FROM entries "
            "WHERE id > ? ORDER BY id LIMIT ?",
            (after, limit),
        )
        return [
            Entry(
                id=number,
                kind=kind,
                payload=json.loads(payload),
                attachment=attachment,
                is_recovered=bool(is_recovered),
                num_bytes=len(payload) + len(attachment or b""),
            )
            for number, kind, payload, attachment, is_recovered in rows
        ]

    def remove(self, *, up_to: int) -> None:
        self._database.execute("DELETE FROM entries WHERE id <= ?", (up_to,))

    def absorb(self, path: Path) -> None:
        """Appends what another journal holds. Its file stays as it is."""
        self._database.execute("ATTACH ? AS other", (str(path),))
        try:
            self._database.execute(
                "INSERT INTO entries (kind, payload, attachment, is_recovered) "
                "SELECT kind, payload, attachment, 1 FROM other.entries ORDER BY id"
            )
        finally:
            self._database.execute("DETACH other")

    def sizes(self, *, after: int) -> tuple[Counter[str], int]:
        """How many entries of each kind there are behind the one with the id `after`, and their bytes."""
        rows = self._database.execute(
            "SELECT kind, COUNT(*), SUM(LENGTH(payload) + COALESCE(LENGTH(attachment), 0)) "
            "FROM entries WHERE id > ? GROUP BY kind",
            (after,),
        ).fetchall()
        return Counter({kind: number for kind, number, _ in rows}), sum(num_bytes for *_, num_bytes in rows)

    def close(self) -> None:
        self._database.close()


def delete_journal(path: Path) -> None:
    for suffix in ("", "-journal"):
        with contextlib.suppress(OSError):
            Path(f"{path}{suffix}").unlink()


def open_journal(path: Path | None) -> Journal:
    """The journal at `path`; where that cannot be, one in memory, and a warning."""
    if path is None:
        return Journal(None)
    try:
        try:
            return Journal(path)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:  # the machine went down while it was written
            log.warning("%s is damaged (%s); what was in it is lost", path, error)
            delete_journal(path)
            return Journal(path)
    except (sqlite3.Error, OSError) as error:
        log.warning("%s: %s; what is not sent yet will be lost with this process", path, error)
        return Journal(None)
