"""What earlier runs of `nst stylize` left, and what of a plan is still to be done. Tables on disk hold it, so
that memory grows neither with the ledger nor with the bucket."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pyarrow as pa

from infra import storage
from pipelines.database import Database
from pipelines.ledger import FAILED, IGNORED, Ledger, identity
from pipelines.stylize_plan import Entry, EntryText, Item, LeftOut

ENTRIES_AT_ONCE = 5_000


class Known(NamedTuple):
    """What the ledger says of an item."""

    etag: str
    style_digest: str
    model_digest: str
    settings_digest: str
    status: str
    output_num_bytes: int


KNOWN_COLUMNS = Known._fields


class Past:
    """
    Args:
        database: of this object alone.
        text: how entries are kept in it.
        model_digest, settings_digest: of this run.
        is_closing: once it is set, nothing more is looked for.
    """

    def __init__(
        self,
        ledger: Ledger,
        out_uri: str,
        database: Database,
        text: EntryText,
        *,
        model_digest: str,
        settings_digest: str,
        is_closing: threading.Event,
    ) -> None:
        self._out_uri, self._database, self._text = out_uri, database, text
        self._is_closing = is_closing
        self._now = model_digest, settings_digest
        self.has_repeated_rows = ledger.load(database, "known", KNOWN_COLUMNS)
        self._is_empty = database.one("SELECT count(*) FROM known") == 0
        database.run("CREATE TABLE claimed (entry VARCHAR, output VARCHAR, num_bytes BIGINT)")
        database.run("CREATE TABLE present (output VARCHAR, num_bytes BIGINT)")

    def still_to_do(
        self, planned: Iterable[Entry], *, only_failed: bool, counts: Counter[str]
    ) -> Iterator[Entry]:
        """What is missing or changed, or, `only_failed`, what failed. `counts` is told of the rest:
        done_before, failed_before, left_for_later, and of all that is ignored.

        First, as it is listed, what the ledger does not call done; then, when all that is listed, what it
        calls done but whose output is gone or has another size: that takes a list of all outputs.
        """
        remaining = iter(planned)
        while batch := list(itertools.islice(remaining, 1 if self._is_empty else ENTRIES_AT_ONCE)):
            claimed = []
            for entry, known in zip(batch, self._known(batch), strict=True):
                if isinstance(entry, LeftOut):
                    yield from self._left_out(entry, known, counts)
                elif known is None or not self._is_of_now(entry, known):
                    if not only_failed or (known is not None and known.status == FAILED):
                        yield entry
                    else:
                        counts["left_for_later"] += 1
                elif known.status == FAILED:
                    if only_failed:
                        yield entry
                    else:
                        counts["failed_before"] += 1
                else:
                    claimed.append((entry, known.output_num_bytes))
                    counts["done_before"] += 1  # so it is said; corrected where that is not true
            self._claim(claimed)
            if self._is_closing.is_set():
                return
        for entry in self._without_output():
            counts["done_before"] -= 1
            if only_failed:
                counts["left_for_later"] += 1
            else:
                yield entry
        for table in ("known", "claimed", "present"):  # and the memory that they have
            self._database.run(f"DROP TABLE {table}")

    def _known(self, batch: list[Entry]) -> list[Known | None]:
        """What the ledger says of each."""
        if self._is_empty:
            return [None] * len(batch)
        identities = [
            identity(entry.source.key.encode("utf-8", "backslashreplace").decode(), "")
            if isinstance(entry, LeftOut)
            else entry.output
            for entry in batch
        ]
        wanted = pa.table({"place": range(len(batch)), "identity": identities})
        names = ", ".join(f"known.{name}" for name in KNOWN_COLUMNS)
        rows = self._database.with_batch(
            wanted, f"SELECT place, {names} FROM known JOIN batch USING (identity)"
        )
        found = {place: Known(*values) for place, *values in rows}
        return [found.get(place) for place in range(len(batch))]

    def _is_of_now(self, item: Item, known: Known) -> bool:
        return known[:4] == (item.source.etag, item.look.digest, *self._now)

    def _left_out(self, entry: LeftOut, known: Known | None, counts: Counter[str]) -> Iterator[LeftOut]:
        has_seen = known is not None and known.etag == entry.source.etag
        if not entry.is_failure:
            counts[IGNORED] += 1
        elif has_seen:
            counts["failed_before"] += 1
        if not has_seen:
            yield entry

    def _claim(self, claimed: list[tuple[Item, int]]) -> None:
        if claimed:
            rows = [(self._text.write(item), item.output, num_bytes) for item, num_bytes in claimed]
            columns = dict(
                zip(("entry", "output", "num_bytes"), map(list, zip(*rows, strict=True)), strict=True)
            )
            self._database.with_batch(pa.table(columns), "INSERT INTO claimed FROM batch")

    def _without_output(self) -> Iterator[Entry]:
        if self._database.one("SELECT count(*) FROM claimed") == 0:
            return
        listed = storage.list_objects(self._out_uri)
        while batch := list(itertools.islice(listed, ENTRIES_AT_ONCE)):
            batch = [found for found in batch if _is_text(found.key)]
            columns = {
                "output": [found.key for found in batch],
                "num_bytes": [found.num_bytes for found in batch],
            }
            self._database.with_batch(
                pa.table(columns, schema=pa.schema([("output", pa.string()), ("num_bytes", pa.int64())])),
                "INSERT INTO present FROM batch",
            )
            if self._is_closing.is_set():
                return
        missing = "SELECT entry FROM claimed ANTI JOIN present USING (output, num_bytes)"
        for rows in self._database.stream(missing):
            for text in rows.column(0).to_pylist():
                yield self._text.read(text)


def _is_text(key: str) -> bool:
    """Names of files may be none; no output's is."""
    return key.encode("utf-8", "replace").decode() == key
