"""What became of every input: `failures.parquet` for people, `_nst/inputs-*.parquet` for the next run.

The second lets a run tell new inputs from known ones, and write a lost shard again exactly as it was. Both
are tables sorted by source in row groups of a fixed size, so that equal rows give equal bytes; they are
written and read as streams, because a corpus may have more inputs than memory holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from nst.shards import Failure

NO_SHARD = -1
ROWS_PER_GROUP = 1 << 17
FAILURES_SCHEMA = pa.schema([(name, pa.string()) for name in ("source", "reason", "detail")])
# An input that was dealt with: put into the plan of shard number `shard`, or NO_SHARD for one that repeats
# another. `reason` and `detail` are null for what was taken; `sha256` (hex, of its bytes) and `near_hash` (of
# `nst.near_duplicates`) where repeated inputs were looked for.
LEDGER_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("label", pa.string()),
        ("num_bytes", pa.int64()),
        ("shard", pa.int32()),
        ("sha256", pa.string()),
        ("near_hash", pa.uint64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


def write_rows(target: str | IO[bytes], schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Writes a Parquet file whose bytes depend on the rows alone, however they are cut into batches."""
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        pending: list[pa.RecordBatch] = []
        num_pending = 0
        for batch in batches:
            pending.append(batch)
            num_pending += batch.num_rows
            while num_pending >= ROWS_PER_GROUP:
                table = pa.Table.from_batches(pending)
                writer.write_table(table.slice(0, ROWS_PER_GROUP).cast(schema).combine_chunks())
                pending = table.slice(ROWS_PER_GROUP).to_batches()
                num_pending -= ROWS_PER_GROUP
        if num_pending:
            writer.write_table(pa.Table.from_batches(pending).cast(schema).combine_chunks())


def encode_failures(failures: Iterable[Failure]) -> bytes:
    """`failures.parquet` of failures that fit in memory."""
    rows = [asdict(failure) for failure in sorted(failures, key=lambda failure: failure.source)]
    sink = pa.BufferOutputStream()
    write_rows(sink, FAILURES_SCHEMA, pa.Table.from_pylist(rows, schema=FAILURES_SCHEMA).to_batches())
    return sink.getvalue().to_pybytes()


def count_reasons(failures: bytes) -> Counter[str]:
    """How many inputs were not taken for which reason, from the bytes of a `failures.parquet`."""
    reasons: Counter[str] = Counter()
    for batch in pq.ParquetFile(pa.BufferReader(failures)).iter_batches(columns=["reason"]):
        for count in batch.column("reason").value_counts().to_pylist():
            reasons[count["values"]] += count["counts"]
    return reasons
