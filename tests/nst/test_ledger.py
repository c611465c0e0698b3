"""The tables of inputs: equal rows are equal bytes, however they came."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nst.ledger import FAILURES_SCHEMA, ROWS_PER_GROUP, count_reasons, encode_failures, write_rows
from nst.shards import Failure


def rows(count: int) -> pa.Table:
    return pa.table(
        {
            "source": [f"a/{number:07d}.jpg" for number in range(count)],
            "reason": ["corrupt" if number % 3 else "empty" for number in range(count)],
            "detail": [f"number {number}" for number in range(count)],
        }
    )


def test_the_bytes_do_not_depend_on_how_the_rows_are_cut() -> None:
    table = rows(ROWS_PER_GROUP + 1000)
    written = []
    for size in (table.num_rows, 100_000, 777):
        sink = io.BytesIO()
        write_rows(sink, FAILURES_SCHEMA, table.to_batches(max_chunksize=size))
        written.append(sink.getvalue())
    assert written[0] == written[1] == written[2]
    file = pq.ParquetFile(io.BytesIO(written[0]))
    sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    assert sizes == [ROWS_PER_GROUP, 1000]
    assert file.read().equals(table)


def test_no_rows_are_a_table_all_the_same(tmp_path: Path) -> None:
    write_rows(str(tmp_path / "x"), FAILURES_SCHEMA, [])
    assert pq.read_table(tmp_path / "x").schema.equals(FAILURES_SCHEMA)


def test_failures_are_sorted_and_counted() -> None:
    failures = [Failure(source=name, reason=reason, detail="x") for name, reason in ("bc", "ab", "cb")]
    data = encode_failures(failures)
    assert pq.read_table(pa.BufferReader(data)).column("source").to_pylist() == ["a", "b", "c"]
    assert count_reasons(data) == {"b": 2, "c": 1}
