"""Tables on disk in bounded memory, for what grows with the number of pictures: DuckDB in a folder."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

import duckdb
import pyarrow as pa

from infra import scratch

MEMORY_VARIABLE = "NST_PLAN_MEMORY_MB"
DEFAULT_MEMORY_MB = 400  # enough for ten million pictures
NUM_THREADS = 2
DISK_LIMIT = "max_temp_directory_size"  # is in DuckDB's message where the disk is full, not the memory
INTERRUPTED = "Query interrupted"  # what DuckDB makes of Ctrl-C
ROWS_IN_A_BATCH = 10_000


@contextlib.contextmanager
def open_database(prefix: str, memory_mb: int = DEFAULT_MEMORY_MB) -> Iterator[Database]:
    """An empty database in a folder whose name begins with `prefix`; both go at the end. It takes `memory_mb`
    of memory, or what NST_PLAN_MEMORY_MB says.

    Raises:
        OSError: the disk or the memory is too small for what is put into it; says what helps.
    """
    memory_mb = _memory_mb(memory_mb)
    with (
        scratch.folder(prefix) as folder,
        _translated_errors(folder, memory_mb),
        duckdb.connect(
            f"{folder}/tables.duckdb",
            config={
                "memory_limit": f"{memory_mb}MB",
                "threads": NUM_THREADS,
                "temp_directory": f"{folder}/spilled",
                "autoinstall_known_extensions": False,
            },
        ) as connection,
    ):
        yield Database(connection, folder)


class Database:
    """One thread at a time may use it. `folder` is for files of the same size."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, folder: str) -> None:
        self.folder = folder
        self.connection = connection

    def run(self, sql: str, *values: object) -> None:
        self.connection.execute(sql, list(values))

    def rows(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        return self.connection.execute(sql, list(values)).fetchall()

    def one(self, sql: str, *values: object) -> Any:
        """The first column of the first row; None if there is no row."""
        return next((row[0] for row in self.rows(sql, *values)), None)

    def stream(self, sql: str, num_rows: int = ROWS_IN_A_BATCH) -> Iterator[pa.RecordBatch]:
        """The rows as they come, some `num_rows` at a time; other statements may run meanwhile."""
        with contextlib.closing(self.connection.cursor()) as cursor:
            yield from cursor.sql(sql).to_arrow_reader(num_rows)

    def with_batch(self, batch: pa.Table, sql: str) -> list[tuple[Any, ...]]:
        """Runs a statement that knows these rows as the table `batch`; returns what it gives."""
        self.connection.register("batch", batch)
        try:
            return self.rows(sql)
        finally:
            self.connection.unregister("batch")


@contextlib.contextmanager
def _translated_errors(folder: str, memory_mb: int) -> Iterator[None]:
    try:
        yield
    except (duckdb.OutOfMemoryException, duckdb.IOException) as error:
        what = str(error).splitlines()[0]
        if isinstance(error, duckdb.OutOfMemoryException) and DISK_LIMIT not in str(error):
            raise OSError(
                errno.ENOMEM,
                f"so many pictures need more than {memory_mb} MB to plan in; set {MEMORY_VARIABLE} to twice "
                f"as much ({what})",
            ) from error
        raise OSError(
            errno.ENOSPC, f"no room to plan in; set TMPDIR to a folder on a larger disk ({what})", folder
        ) from error
    except RuntimeError as error:
        if str(error) != INTERRUPTED:
            raise
        raise KeyboardInterrupt from error


def _memory_mb(default: int) -> int:
    text = os.environ.get(MEMORY_VARIABLE, str(default))
    if not text.isdecimal() or int(text) < 50:
        raise ValueError(f"{MEMORY_VARIABLE} is {text!r}; give a number of megabytes from 50, such as 1000")
    return int(text)
