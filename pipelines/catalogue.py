"""All inputs of a corpus as tables on disk: what a run of `nst shard` plans from, whatever their number.

A DuckDB database in a temporary folder, with a bound on its memory. What grows with the number of inputs is
in its tables; queries are asked for counts, or for one shard's images at a time, or are read as streams.

    found       what lies under SOURCE, as it was listed
    inputs      of that, what could be taken, with labels
    known       what became of the inputs of earlier runs (the ledger)
    planned     the inputs that are new, numbered in the order of the corpus: by label, then source
    hashes      of the planned ones, where repeated inputs are looked for
    repeated    of those, what is left out
    failed      every input that this run did not take, with the reason
    not_taken   at the end: what failures.parquet says
    dealt_with  at the end: what the next ledger says
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from nst.ledger import FAILURES_SCHEMA, LEDGER_SCHEMA, NO_SHARD, ROWS_PER_GROUP
from nst.planning import NO_LABEL, SourceImage
from nst.shards import UNREADABLE, Failure
from pipelines.database import Database, open_database

# Of text columns, strings compare by their UTF-8 bytes: the order of Python's strings and of object stores.
FOUND_SCHEMA = pa.schema(
    [("source", pa.string()), ("num_bytes", pa.int64()), ("reason", pa.string()), ("detail", pa.string())]
)
LABELS_SCHEMA = pa.schema([("source", pa.string()), ("label", pa.string())])
HASHES_SCHEMA = pa.schema([("source", pa.string()), ("sha256", pa.string()), ("near_hash", pa.uint64())])
LEDGER_COLUMNS = ", ".join(LEDGER_SCHEMA.names)
TABLES = {"found": FOUND_SCHEMA, "labels": LABELS_SCHEMA, "hashes": HASHES_SCHEMA, "failed": FAILURES_SCHEMA}
SQL_TYPES = {pa.string(): "VARCHAR", pa.int64(): "BIGINT", pa.int32(): "INTEGER", pa.uint64(): "UBIGINT"}


# What `labels` means where it is no table; $1 stands for no label.
LABEL_OF = {
    "none": "$1",
    "dirname": "CASE WHEN contains(source, '/') THEN split_part(source, '/', 1) ELSE $1 END",
}


class Reason(NamedTuple):
    """Why some inputs were not taken, with the first of them as an example."""

    reason: str
    num: int
    source: str
    detail: str


@contextlib.contextmanager
def open_catalogue() -> Iterator[Catalogue]:
    """An empty catalogue, which goes with its folder at the end. Raises OSError, which says what helps, if
    the disk or the memory is too small for what is put into it."""
    with open_database("nst-plan-") as database:
        yield Catalogue(database)


class Catalogue(Database):
    """The tables, and what is asked of them. `folder` is for files of the same size."""

    def __init__(self, database: Database) -> None:
        super().__init__(database.connection, database.folder)
        for name, schema in {**TABLES, "known": LEDGER_SCHEMA}.items():
            columns = ", ".join(f"{field.name} {SQL_TYPES[field.type]}" for field in schema)
            self.run(f"CREATE TABLE {name} ({columns})")
        self.run("CREATE TABLE repeated (source VARCHAR, label VARCHAR, num_bytes BIGINT)")

    # Asking

    def stream(self, sql: str, num_rows: int = ROWS_PER_GROUP) -> Iterator[pa.RecordBatch]:
        yield from super().stream(sql, num_rows)

    def insert(self, table: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Appends rows to one of TABLES."""
        self.with_batch(pa.table(dict(columns), schema=TABLES[table]), f"INSERT INTO {table} FROM batch")

    def keep(self, table: str, rows: pa.Table) -> None:
        """Makes a table of these rows."""
        self.with_batch(rows, f"CREATE TABLE {table} AS FROM batch")

    # Filling

    def label_inputs(self, labels: str, table_name: str) -> None:
        """Makes `inputs` of what was found: `labels` is dirname, none, or anything else for the table
        `labels`. What has no row there, and what is there but was not found, is recorded as failed."""
        self.run("INSERT INTO failed SELECT source, reason, detail FROM found WHERE reason IS NOT NULL")
        if labels in LABEL_OF:
            self.run(
                f"""CREATE TABLE inputs AS SELECT source, {LABEL_OF[labels]} AS label, num_bytes
                FROM found WHERE reason IS NULL""",
                NO_LABEL,
            )
        else:
            self._join_labels(table_name)
        self.run("DROP TABLE found")
        self.run("DROP TABLE labels")

    def _join_labels(self, table_name: str) -> None:
        self.run(
            """CREATE TABLE inputs AS SELECT source, label, num_bytes
            FROM found JOIN (SELECT DISTINCT source, label FROM labels) USING (source) WHERE reason IS NULL"""
        )
        self.run(
            """INSERT INTO failed SELECT source, 'no_label', 'has no row in ' || $1
            FROM found ANTI JOIN labels USING (source) WHERE reason IS NULL""",
            table_name,
        )
        self.run(
            """INSERT INTO failed
            SELECT DISTINCT source, 'missing', 'is in ' || $1 || ', but not under SOURCE'
            FROM labels ANTI JOIN found USING (source)""",
            table_name,
        )

    def load_ledger(self, path: str, failures_path: str | None) -> None:
        """Makes `known` of a ledger, which is read where it lies. An old one has no reasons: they are in its
        `failures.parquet`."""
        ledger = self.connection.read_parquet(path)
        self.run("DROP TABLE known")
        if failures_path is None:
            ledger.create_view("known")
            return
        ledger.create_view("old_ledger")
        self.connection.read_parquet(failures_path).create_view("old_failures")
        self.run(
            """CREATE TABLE known AS SELECT source, label, num_bytes, shard, nullif(sha256, '') AS sha256,
            NULL::UBIGINT AS near_hash, reason, detail
            FROM old_ledger LEFT JOIN old_failures USING (source)"""
        )

    def add_failures(self, failures: Iterable[Failure]) -> None:
        rows = [(failure.source, failure.reason, failure.detail) for failure in failures]
        if rows:
            self.insert("failed", dict(zip(FAILURES_SCHEMA.names, zip(*rows, strict=True), strict=True)))

    # Planning

    def changed(self) -> tuple[int, str]:
        """(number of inputs that were taken and are others now, the first of them)."""
        num_changed, source, is_size = self.rows(
            """SELECT count(*), min(source), arg_min(inputs.num_bytes != known.num_bytes, source)
            FROM inputs JOIN known USING (source)
            WHERE reason IS NULL AND (inputs.num_bytes != known.num_bytes OR inputs.label != known.label)"""
        )[0]
        return num_changed, f"the {'size' if is_size else 'label'} of {source}"

    def plan(self) -> int:
        """Makes `planned` of the inputs that no run has dealt with, and of those that failed and have another
        size now. Returns how many."""
        self.run(
            """CREATE TABLE planned AS
            SELECT row_number() OVER (ORDER BY label, source) - 1 AS position, source, label, num_bytes
            FROM (SELECT inputs.* FROM inputs LEFT JOIN known USING (source) WHERE known.source IS NULL
            OR (reason IS NOT NULL AND inputs.num_bytes != known.num_bytes))"""
        )
        return self.num_planned()

    def leave_out_repeated(self) -> int:
        """Takes what is in `repeated` out of the plan. Returns how many stay."""
        if self.one("SELECT count(*) FROM repeated"):
            self.run(
                """CREATE TABLE remaining AS
                SELECT row_number() OVER (ORDER BY position) - 1 AS position, source, label, num_bytes
                FROM planned ANTI JOIN repeated USING (source)"""
            )
            self.run("DROP TABLE planned")
            self.run("ALTER TABLE remaining RENAME TO planned")
        return self.num_planned()

    def num_planned(self) -> int:
        return self.one("SELECT count(*) FROM planned")

    def images(self, first: int, last: int) -> tuple[SourceImage, ...]:
        """The planned images from position `first` up to `last`."""
        return self._images("planned WHERE position >= $1 AND position < $2 ORDER BY position", first, last)

    def known_images(self, shard: int) -> tuple[SourceImage, ...]:
        """The images that a shard of an earlier run was made from, in the order of its plan."""
        return self._images("known WHERE shard = $1 ORDER BY label, source", shard)

    def _images(self, which: str, *values: int) -> tuple[SourceImage, ...]:
        rows = self.rows(f"SELECT source, label, num_bytes FROM {which}", *values)
        return tuple(SourceImage(source=source, label=label, num_bytes=size) for source, label, size in rows)

    def last_known_shard(self) -> int:
        """The highest number of a shard that the ledger names; NO_SHARD if it names none."""
        return self.one("SELECT coalesce(max(shard), $1) FROM known", NO_SHARD)

    def num_gone(self) -> int:
        """Images that earlier runs took and that are no longer under SOURCE."""
        return self.one("SELECT count(*) FROM known ANTI JOIN inputs USING (source) WHERE reason IS NULL")

    # What came of it

    def conclude(self, *, first_shard: int, num_shards: int) -> None:
        """Makes `not_taken` and `dealt_with` when all is done. The plan was cut into `num_shards` shards,
        numbered from `first_shard`, at `nst.planning.shard_edges`.

        (Tables, because DuckDB sorts a table in bounded memory, and a UNION ALL not.)
        """
        self.run("CREATE TABLE not_taken AS FROM failed")
        self.run(
            """INSERT INTO not_taken SELECT source, reason, detail FROM (FROM known WHERE reason IS NOT NULL)
            SEMI JOIN inputs USING (source) ANTI JOIN planned USING (source)
            ANTI JOIN repeated USING (source)"""
        )
        num_planned = max(self.num_planned(), 1)
        self.run(
            f"""CREATE TABLE handled AS SELECT source, label, num_bytes,
            ({first_shard} + ((position + 1) * {num_shards} - 1) // {num_planned})::INTEGER AS shard
            FROM planned"""
        )
        self.run(f"INSERT INTO handled SELECT source, label, num_bytes, {NO_SHARD} FROM repeated")
        self.run(
            f"""CREATE TABLE dealt_with AS SELECT {LEDGER_COLUMNS} FROM handled
            LEFT JOIN hashes USING (source) LEFT JOIN failed USING (source)
            WHERE reason IS DISTINCT FROM '{UNREADABLE}'"""
        )
        self.run("DROP TABLE handled")
        self.run(
            f"""INSERT INTO dealt_with SELECT {LEDGER_COLUMNS} FROM (FROM known WHERE reason IS NOT NULL)
            ANTI JOIN (SELECT source FROM dealt_with) USING (source)"""
        )
        self.run(f"INSERT INTO dealt_with SELECT {LEDGER_COLUMNS} FROM known WHERE reason IS NULL")

    def failures(self) -> Iterator[pa.RecordBatch]:
        """One row an input that is under SOURCE now and was not taken, by this or an earlier run."""
        return self.stream("FROM not_taken ORDER BY source, reason, detail")

    def reasons(self) -> list[Reason]:
        """Why inputs were not taken, the most frequent first."""
        rows = self.rows(
            """SELECT reason, count(*) AS num, min(source), arg_min(detail, source) FROM not_taken
            GROUP BY reason ORDER BY num DESC, reason"""
        )
        return [Reason(*row) for row in rows]

    def ledger(self) -> Iterator[pa.RecordBatch]:
        """What was dealt with, unlike what could not be read, which the next run tries again."""
        return self.stream("FROM dealt_with ORDER BY source")
