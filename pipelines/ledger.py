"""What became of each item of a stylized bucket: one row an item, in Parquet parts under OUT/_nst/ledger.

While a run goes on it adds parts; the newest row of an item counts. At its end the parts are merged, so
that the ledger holds one row an item. A killed run loses the rows of the last seconds only, whose items are
then done again.

Several runs may write, read and merge at once. A part never changes under its name. A merge reads parts,
writes what they say into new ones, and only then removes those that it read, so that at any moment every row
that counts is in some part. Whoever reads finds in new parts what vanished before its eyes. All it can come
to is a row that is there twice until the next merge.

Tables on disk hold what is read, so that memory does not grow with the ledger.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import io
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage
from pipelines.database import Database, open_database

ROWS_IN_A_PART = 1000
SECONDS_BETWEEN_PARTS = 10.0
ROWS_IN_A_MERGED_PART = 50_000
ROWS_AT_ONCE = 10_000  # in memory, some 1 KB each
MEMORY_MB = 200  # for the tables; sorting goes over the disk
NUM_MERGES = 3  # where others merge at the same time
NUM_LOOKS = 100  # at parts that another run's merges keep replacing

DONE, FAILED, IGNORED = "done", "failed", "ignored"
# What makes a row an item's: its output, or its key if it may not have one; no output begins with a slash.
IDENTITY = "CASE WHEN output = '' THEN '/' || key ELSE output END"
COLUMNS_ADDED_LATER = {"note": ""}

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("output", pa.string()),
        ("source", pa.string()),
        ("etag", pa.string()),
        ("num_bytes", pa.int64()),
        ("style", pa.string()),
        ("style_digest", pa.string()),
        ("model", pa.string()),
        ("model_digest", pa.string()),
        ("settings_digest", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("error", pa.string()),
        ("note", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("seconds", pa.float32()),
        ("output_sha256", pa.string()),
        ("output_num_bytes", pa.int64()),
        ("num_tries", pa.int32()),
        ("finished_at", pa.timestamp("us", tz="UTC")),
    ]
)
ALL_COLUMNS = ", ".join(SCHEMA.names)


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """One item. `key` and `output` are paths relative to SOURCE and OUT; `width` and `height` (px) and
    `output_sha256` are of the output; `reason` is a word that can be counted, `error` a line for people;
    `note` is a line about one that went well (of an animation, the first frame; of several pages, the first).
    status is done, failed, or ignored (no picture). What never reached a worker has no output."""

    key: str
    output: str
    source: str
    etag: str
    num_bytes: int
    style: str
    style_digest: str
    model: str
    model_digest: str
    settings_digest: str
    status: str
    reason: str = ""
    error: str = ""
    note: str = ""
    width: int = 0
    height: int = 0
    seconds: float = 0.0
    output_sha256: str = ""
    output_num_bytes: int = 0
    num_tries: int = 1
    finished_at: datetime.datetime


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a ledger says: the number of items of each status, of failed ones by reason, and some rows."""

    counts: Mapping[str, int]
    reasons: Mapping[str, int]
    rows: pa.Table


@dataclass(frozen=True, kw_only=True)
class _Read:
    parts: list[str]
    has_older: bool


def identity(key: str, output: str) -> str:
    """`IDENTITY` of an item."""
    return output or f"/{key}"


class Ledger:
    """The ledger below `out_uri`."""

    def __init__(self, out_uri: str) -> None:
        self.uri = storage.join(out_uri, "_nst", "ledger")
        self._out_uri = out_uri
        self._buffer: list[LedgerRow] = []
        self._written_at = time.monotonic()
        # Two runs at once do not share names.
        now = datetime.datetime.now(datetime.UTC)
        self._run = f"{now:%Y%m%dT%H%M%S}-{now.microsecond:06d}-{secrets.token_hex(3)}"
        self._num_parts = 0

    def append(self, row: LedgerRow) -> None:
        """Adds a row; it is stored within ten seconds, if rows keep coming."""
        self._buffer.append(row)
        is_due = time.monotonic() - self._written_at >= SECONDS_BETWEEN_PARTS
        if len(self._buffer) >= ROWS_IN_A_PART or is_due:
            self.flush()

    def flush(self) -> None:
        """Stores the rows added so far, as one part."""
        self._written_at = time.monotonic()
        if not self._buffer:
            return
        rows = [dataclasses.asdict(row) for row in self._buffer]
        self._write(pa.Table.from_pylist(rows, schema=SCHEMA))
        self._buffer = []

    def load(self, database: Database, table: str, columns: Sequence[str]) -> bool:
        """Makes a table with the newest row of each item, in the order of `identity`, a column of its own.
        Returns whether there are older rows, which a merge would remove."""
        read = self._read(database, columns)
        names = ", ".join(["identity", *columns])
        database.run(f"CREATE TABLE {table} AS SELECT {names} FROM items ORDER BY identity")
        database.run("DROP VIEW items")
        database.run("DROP TABLE stored")
        database.run("DROP TABLE newest")
        return read.has_older

    def merge(self) -> None:
        """Leaves one row an item, sorted by output and key. Interrupted, it leaves rows twice, which does no
        harm; and so may others that merge meanwhile, which is why it looks again."""
        self.flush()
        for _ in range(NUM_MERGES):
            written = self._merge_once()
            if written.issuperset(self._parts()):
                return

    def _merge_once(self) -> set[str]:
        """Returns the new parts."""
        written: set[str] = set()
        with open_database("nst-ledger-", MEMORY_MB) as database:
            read = self._read(database, SCHEMA.names)
            waiting: list[pa.RecordBatch] = []
            for batch in database.stream(f"SELECT {ALL_COLUMNS} FROM items ORDER BY output, key"):
                waiting.append(batch)
                if sum(one.num_rows for one in waiting) >= ROWS_IN_A_MERGED_PART:
                    written.add(self._write(pa.Table.from_batches(waiting)))
                    waiting = []
            if waiting:
                written.add(self._write(pa.Table.from_batches(waiting)))
        for part in read.parts:
            storage.delete(part)
        return written

    def read(self, num_newest: int) -> Contents:
        """What the ledger says, with the `num_newest` newest rows of each status, the newest first."""
        with open_database("nst-ledger-", MEMORY_MB) as database:
            self._read(database, SCHEMA.names)
            counts = dict(database.rows("SELECT status, count(*) FROM items GROUP BY status"))
            failed = f"SELECT reason, count(*) FROM items WHERE status = '{FAILED}' GROUP BY reason"
            reasons = dict(database.rows(failed))
            batches = [
                batch
                for status in (DONE, FAILED, IGNORED)
                for batch in database.stream(
                    f"SELECT {ALL_COLUMNS} FROM items WHERE status = '{status}' "
                    f"ORDER BY finished_at DESC, output, key LIMIT {num_newest}"
                )
            ]
        tables = [pa.Table.from_batches([batch]).cast(SCHEMA) for batch in batches]
        return Contents(
            counts=counts, reasons=reasons, rows=pa.concat_tables([SCHEMA.empty_table(), *tables])
        )

    def _read(self, database: Database, columns: Sequence[str]) -> _Read:
        """Makes `items`, the newest row of each item: a view of the tables `stored` and `newest`."""
        stored = list(dict.fromkeys([*columns, "key", "output", "finished_at"]))
        database.with_batch(
            SCHEMA.empty_table().select(stored),
            f"CREATE TABLE stored AS SELECT *, {IDENTITY} AS identity FROM batch",
        )
        parts: list[str] = []
        waiting: list[pa.Table] = []
        for uri, data in self._data_of_parts():
            parts.append(uri)
            for rows in _tables(uri, data, stored):
                waiting.append(rows)
                if sum(one.num_rows for one in waiting) >= ROWS_AT_ONCE:
                    _insert(database, waiting)
                    waiting = []
        _insert(database, waiting)
        database.run(
            """CREATE TABLE newest AS
            SELECT arg_max(rowid, finished_at) AS position FROM stored GROUP BY identity"""
        )
        database.run("CREATE VIEW items AS FROM stored WHERE rowid IN (FROM newest)")
        has_older = database.one("SELECT (SELECT count(*) FROM stored) > (SELECT count(*) FROM newest)")
        return _Read(parts=parts, has_older=has_older)

    def _data_of_parts(self) -> Iterator[tuple[str, bytes]]:
        """Every part, once, until a look finds no other."""
        seen: set[str] = set()
        for _ in range(NUM_LOOKS):
            found = self._parts()
            if seen.issuperset(found):
                return
            for uri in found:
                if uri in seen:
                    continue
                seen.add(uri)
                try:
                    data = storage.read_bytes(uri)
                except FileNotFoundError:
                    continue  # merged meanwhile: the next look finds what came in its place
                yield uri, data
        raise OSError(f"{self.uri}: its parts keep changing; are many runs going on at once?")

    def _parts(self) -> list[str]:
        return [part.uri for part in storage.list_objects(self.uri, suffixes=(".parquet",))]

    def _write(self, table: pa.Table) -> str:
        buffer = io.BytesIO()
        pq.write_table(table.cast(SCHEMA), buffer, compression="zstd", row_group_size=ROWS_AT_ONCE)
        name = f"{self._run}-{self._num_parts:06d}.parquet"
        self._num_parts += 1
        uri = storage.join(self.uri, name)
        storage.write_bytes(uri, buffer.getvalue(), within=self._out_uri)
        return uri


def _insert(database: Database, tables: list[pa.Table]) -> None:
    if tables:
        statement = f"INSERT INTO stored SELECT *, {IDENTITY} AS identity FROM batch"
        database.with_batch(pa.concat_tables(tables), statement)


def _tables(uri: str, data: bytes, columns: Sequence[str]) -> Iterator[pa.Table]:
    """These columns of a part, some rows at a time."""
    with _naming(uri):
        part = pq.ParquetFile(io.BytesIO(data))
    found = part.schema_arrow.names
    if missing := [name for name in SCHEMA.names if name not in (*found, *COLUMNS_ADDED_LATER)]:
        raise OSError(f"{uri} has no column {missing[0]}; delete it to go on without its rows")
    schema = pa.schema([SCHEMA.field(name) for name in columns])
    with _naming(uri):
        for batch in part.iter_batches(ROWS_AT_ONCE, columns=[name for name in columns if name in found]):
            table = pa.Table.from_batches([batch])
            for name in set(columns).difference(found):
                table = table.append_column(name, pa.array([COLUMNS_ADDED_LATER[name]] * len(table)))
            yield table.select(columns).cast(schema)


@contextlib.contextmanager
def _naming(uri: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise OSError(f"{uri} is no part of a ledger ({error}); delete it to go on without") from error
