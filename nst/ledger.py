"""What became of every input: `failures.parquet` for people, `_nst/inputs.parquet` for the next run.

The second lets a run tell new inputs from known ones, and write a lost shard again exactly as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from nst.planning import ShardPlan, ShardSettings, SourceImage
from nst.shards import Failure

NO_SHARD = -1
FAILURES_SCHEMA = pa.schema([(name, pa.string()) for name in ("source", "reason", "detail")])
LEDGER_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("label", pa.string()),
        ("num_bytes", pa.int64()),
        ("shard", pa.int32()),
        ("sha256", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """An input that was dealt with: put into the plan of shard number `shard`, or NO_SHARD for a duplicate.
    `sha256` is that of its bytes where duplicates were looked for, else empty."""

    image: SourceImage
    shard: int
    sha256: str = ""


def encode_failures(failures: Iterable[Failure]) -> bytes:
    ordered = sorted(failures, key=lambda failure: failure.source)
    return _encode(pa.Table.from_pylist([asdict(failure) for failure in ordered], schema=FAILURES_SCHEMA))


def decode_failures(data: bytes) -> list[Failure]:
    return [Failure(**row) for row in pq.read_table(pa.BufferReader(data)).to_pylist()]


def encode_ledger(entries: Iterable[LedgerEntry]) -> bytes:
    ordered = sorted(entries, key=lambda entry: entry.image.source)
    rows = [{**asdict(entry.image), "shard": entry.shard, "sha256": entry.sha256} for entry in ordered]
    return _encode(pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA))


def decode_ledger(data: bytes) -> list[LedgerEntry]:
    return [
        LedgerEntry(shard=row.pop("shard"), sha256=row.pop("sha256"), image=SourceImage(**row))
        for row in pq.read_table(pa.BufferReader(data)).to_pylist()
    ]


def plan_of(number: int, entries: Iterable[LedgerEntry], settings: ShardSettings) -> ShardPlan:
    """The plan that a shard was made from."""
    images = sorted(
        (entry.image for entry in entries if entry.shard == number), key=lambda image: image.order
    )
    return ShardPlan(number=number, images=tuple(images), settings=settings)


def _encode(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()
