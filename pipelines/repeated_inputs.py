"""`--dedupe`: inputs that repeat another, in their bytes or their looks. The first in corpus order stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from infra import cluster
from nst.near_duplicates import NO_HASH, find_near_duplicates
from nst.planning import SourceImage
from pipelines.catalogue import HASHES_SCHEMA, Catalogue
from pipelines.console import Progress
from pipelines.shard_tasks import hash_some

NUM_HASHED_TOGETHER = 256
NUM_FETCHED_TOGETHER = 32 * NUM_HASHED_TOGETHER
DUPLICATE, NEAR_DUPLICATE = "duplicate", "near_duplicate"


def leave_out_repeated(
    catalogue: Catalogue, num_planned: int, source_uri: str, *, near: bool, connect: Callable[[], int]
) -> int:
    """Hashes the planned images and takes those out of the plan that repeat another one, planned before them
    or in the corpus already. Returns how many stay. `connect` gives the number of tasks to have under way."""
    groups = ((group, source_uri, near) for group in _groups(catalogue, num_planned))
    in_flight = connect()
    with Progress("hash", total=num_planned) as progress:
        for rows in cluster.run_bounded(hash_some, groups, max_in_flight=in_flight):
            columns = dict(zip(HASHES_SCHEMA.names, zip(*rows, strict=True), strict=True))
            catalogue.insert("hashes", columns)
            progress.advance(len(rows))
    _find_same_bytes(catalogue)
    if near:
        _find_same_looks(catalogue)
    return catalogue.leave_out_repeated()


def _groups(catalogue: Catalogue, num_planned: int) -> Iterator[tuple[SourceImage, ...]]:
    for first in range(0, num_planned, NUM_FETCHED_TOGETHER):
        images = catalogue.images(first, first + NUM_FETCHED_TOGETHER)
        for start in range(0, len(images), NUM_HASHED_TOGETHER):
            yield images[start : start + NUM_HASHED_TOGETHER]


def _find_same_bytes(catalogue: Catalogue) -> None:
    """Into `repeated` and `failed`: planned images with the bytes of one that the corpus holds or that is
    planned before them."""
    catalogue.run(
        """CREATE TABLE candidates AS SELECT sha256, -1 AS position, source FROM known
        WHERE sha256 IS NOT NULL AND reason IS NULL"""
    )
    catalogue.run(
        """INSERT INTO candidates SELECT sha256, position, source FROM planned JOIN hashes USING (source)
        WHERE sha256 IS NOT NULL"""
    )
    catalogue.run(
        """CREATE TABLE twins AS FROM candidates
        SEMI JOIN (SELECT sha256 FROM candidates GROUP BY sha256 HAVING count(*) > 1) USING (sha256)"""
    )
    catalogue.run(
        """CREATE TABLE same_bytes AS SELECT source, first FROM (SELECT source, position,
        first_value(source) OVER (PARTITION BY sha256 ORDER BY position, source) AS first FROM twins)
        WHERE position >= 0 AND source != first"""
    )
    catalogue.run(
        """INSERT INTO repeated
        SELECT source, label, num_bytes FROM planned JOIN same_bytes USING (source)"""
    )
    catalogue.run(
        "INSERT INTO failed SELECT source, $1, 'has the same bytes as ' || first FROM same_bytes", DUPLICATE
    )


def _find_same_looks(catalogue: Catalogue) -> None:
    """The same for images that look like one that stays. What the corpus holds comes first, and stays."""
    catalogue.run(
        """CREATE TABLE unsorted AS SELECT -1 AS position, label, source, near_hash FROM known
        WHERE near_hash IS NOT NULL AND reason IS NULL"""
    )
    catalogue.run(
        """INSERT INTO unsorted SELECT position, label, source, near_hash FROM planned
        JOIN hashes USING (source) ANTI JOIN repeated USING (source) WHERE near_hash IS NOT NULL"""
    )
    catalogue.run(
        """CREATE TABLE looks AS SELECT row_number() OVER (ORDER BY position, label, source) - 1 AS row,
        position, source, near_hash FROM unsorted"""
    )
    hashes = np.full(catalogue.one("SELECT count(*) FROM looks"), NO_HASH, np.uint64)
    start = 0
    for batch in catalogue.stream("SELECT near_hash FROM looks ORDER BY row"):
        hashes[start : start + batch.num_rows] = batch.column(0).to_numpy()
        start += batch.num_rows
    earlier = find_near_duplicates(hashes)
    rows = np.flatnonzero(earlier >= 0)
    num_bits = np.bitwise_count(hashes[rows] ^ hashes[earlier[rows]]).astype(np.int64)
    catalogue.keep("same_looks", pa.table({"row": rows, "first": earlier[rows], "num_bits": num_bits}))
    catalogue.run(
        """CREATE TABLE look_alikes AS
        SELECT looks.source AS source, originals.source AS first, num_bits FROM same_looks
        JOIN looks ON looks.row = same_looks.row JOIN looks AS originals ON originals.row = same_looks.first
        WHERE looks.position >= 0"""
    )
    catalogue.run(
        """INSERT INTO repeated
        SELECT source, label, num_bytes FROM planned JOIN look_alikes USING (source)"""
    )
    catalogue.run(
        """INSERT INTO failed SELECT source, $1, 'looks like ' || first || ': ' || num_bits
        || ' of the 64 bits of their hashes differ' FROM look_alikes""",
        NEAR_DUPLICATE,
    )
