"""What became of each item of a stylized bucket: one row an item, in Parquet parts under OUT/_nst/ledger.

While a run goes on it adds parts; the newest row of an item counts. At its end the parts are merged, so
that the ledger holds one row an item. A killed run loses the rows of the last seconds only, whose items are
then done again.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import io
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage

ROWS_IN_A_PART = 1000
SECONDS_BETWEEN_PARTS = 10.0
ROWS_IN_A_MERGED_PART = 100_000

DONE, FAILED, IGNORED = "done", "failed", "ignored"

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
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("seconds", pa.float32()),
        ("output_sha256", pa.string()),
        ("output_num_bytes", pa.int64()),
        ("num_tries", pa.int32()),
        ("finished_at", pa.timestamp("us", tz="UTC")),
    ]
)


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """One item. `key` and `output` are paths relative to SOURCE and OUT; `width` and `height` (px) and
    `output_sha256` are of the output; `reason` is a word that can be counted, `error` a line for people.
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
    width: int = 0
    height: int = 0
    seconds: float = 0.0
    output_sha256: str = ""
    output_num_bytes: int = 0
    num_tries: int = 1
    finished_at: datetime.datetime


class Known(NamedTuple):
    """What a rerun needs to know about an item."""

    fingerprint: bytes
    status: str
    output_num_bytes: int


def identity(key: str, output: str) -> str:
    """What makes a row an item's: its output, or its key if it may not have one."""
    return output or f"/{key}"  # no output begins with a slash


def fingerprint(etag: str, style_digest: str, model_digest: str, settings_digest: str) -> bytes:
    """16 bytes that change with anything that an output depends on."""
    return hashlib.sha256("\0".join([etag, style_digest, model_digest, settings_digest]).encode()).digest()[
        :16
    ]


class Ledger:
    """The ledger below `out_uri`; `known` is what earlier runs wrote."""

    def __init__(self, out_uri: str) -> None:
        self.uri = storage.join(out_uri, "_nst", "ledger")
        self._buffer: list[LedgerRow] = []
        self._written_at = time.monotonic()
        # Parts sort by time, so that later ones count; two runs at once do not share names.
        now = datetime.datetime.now(datetime.UTC)
        self._run = f"{now:%Y%m%dT%H%M%S}-{now.microsecond:06d}-{secrets.token_hex(3)}"
        self._num_parts = 0
        self.known: dict[str, Known] = {}
        self._num_rows = 0
        for table in self._tables():
            self._num_rows += table.num_rows
            columns = ["key", "output", "etag", "style_digest", "model_digest", "settings_digest"]
            columns += ["status", "output_num_bytes"]
            for key, output, *parts, status, num_bytes in zip(
                *(table.column(name).to_pylist() for name in columns), strict=True
            ):
                self.known[identity(key, output)] = Known(fingerprint(*parts), status, num_bytes)

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
        self._num_rows += len(rows)
        self._buffer = []

    def merge(self) -> None:
        """Leaves one row an item, sorted by output. Interrupted, it leaves rows twice, which does no harm."""
        self.flush()
        old_parts = self._parts()
        table = self.read()
        is_clean = len(old_parts) == -(-table.num_rows // ROWS_IN_A_MERGED_PART)
        if is_clean and table.num_rows == self._num_rows:
            return
        for start in range(0, table.num_rows, ROWS_IN_A_MERGED_PART):
            self._write(table.slice(start, ROWS_IN_A_MERGED_PART))
        for part in old_parts:
            storage.delete(part)
        self._num_rows = table.num_rows

    def read(self) -> pa.Table:
        """All stored rows, the newest of each item, sorted by output and key."""
        tables = list(self._tables())
        if not tables:
            return SCHEMA.empty_table()
        table = pa.concat_tables(tables)
        identities = zip(table.column("key").to_pylist(), table.column("output").to_pylist(), strict=True)
        newest = {identity(key, output): index for index, (key, output) in enumerate(identities)}
        table = table.take(pa.array(newest.values(), pa.int64()))
        return table.sort_by([("output", "ascending"), ("key", "ascending")])

    def _parts(self) -> list[str]:
        found = storage.list_objects(self.uri, suffixes=(".parquet",))
        return [part.uri for part in found]

    def _tables(self) -> Iterator[pa.Table]:
        for uri in self._parts():
            try:
                table = pq.read_table(io.BytesIO(storage.read_bytes(uri)))
            except pa.ArrowInvalid as error:
                raise OSError(
                    f"{uri} is no part of a ledger ({error}); delete it to go on without"
                ) from error
            missing = [name for name in SCHEMA.names if name not in table.column_names]
            if missing:
                raise OSError(f"{uri} has no column {missing[0]}; delete it to go on without its rows")
            yield table.select(SCHEMA.names).cast(SCHEMA)

    def _write(self, table: pa.Table) -> None:
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        name = f"{self._run}-{self._num_parts:06d}.parquet"
        self._num_parts += 1
        storage.write_bytes(storage.join(self.uri, name), buffer.getvalue())
