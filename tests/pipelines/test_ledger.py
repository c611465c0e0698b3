"""A stylized bucket's ledger: one row an item, whatever was killed and however many runs write at once."""

from __future__ import annotations

import dataclasses
import datetime
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra import storage
from pipelines import ledger as ledger_module
from pipelines.database import open_database
from pipelines.ledger import DONE, FAILED, IGNORED, SCHEMA, Ledger, LedgerRow

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def row(output: str, *, second: int = 0, key: str = "", **values: Any) -> LedgerRow:
    names = ("style", "style_digest", "model", "model_digest", "settings_digest")
    facts: dict[str, Any] = dict.fromkeys(names, "x")
    facts |= {"key": key or output, "source": output, "etag": "1", "status": DONE, **values}
    finished_at = START + datetime.timedelta(seconds=second)
    return LedgerRow(output=output, num_bytes=1, finished_at=finished_at, **facts)


def stored(out: Path) -> list[dict[str, Any]]:
    parts = sorted((out / "_nst" / "ledger").iterdir())
    return [found for part in parts for found in pq.read_table(part).to_pylist()]


def test_the_newest_row_of_an_item_counts(tmp_path: Path) -> None:
    later, earlier = Ledger(str(tmp_path)), Ledger(str(tmp_path))
    for number in range(8):
        later.append(row(f"{number}.jpg", second=20, etag="new"))
    later.append(row("", key="notes.txt", status=IGNORED))
    later.flush()
    for number in range(9):  # of a run that began before, or whose rows are merged into a younger part
        earlier.append(row(f"{number}.jpg", second=10, etag="old", status=FAILED, reason="corrupt"))
    earlier.flush()
    with open_database("nst-test-") as database:
        assert later.load(database, "known", ["etag", "status"])
        known = {one[0]: one[1:] for one in database.rows("FROM known")}
    expected = {f"{number}.jpg": ("new", DONE) for number in range(8)}
    assert known == {**expected, "8.jpg": ("old", FAILED), "/notes.txt": ("1", IGNORED)}

    earlier.merge()
    rows = stored(tmp_path)
    assert [one["output"] for one in rows] == ["", *(f"{number}.jpg" for number in range(9))]
    with open_database("nst-test-") as database:
        assert not later.load(database, "known", ["etag"])
    contents = later.read(num_newest=2)
    assert contents.counts == {DONE: 8, FAILED: 1, IGNORED: 1}
    assert contents.reasons == {"corrupt": 1}
    assert [one["output"] for one in contents.rows.to_pylist()] == ["0.jpg", "1.jpg", "8.jpg", ""]


def test_many_runs_that_merge_at_once_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "ROWS_IN_A_MERGED_PART", 7)
    errors: list[BaseException] = []

    def run(name: int) -> None:
        try:
            for round_number in range(5):
                ledger = Ledger(str(tmp_path))
                for number in range(10):
                    ledger.append(row(f"{name}-{number}.jpg", second=round_number))
                    ledger.append(row(f"shared-{number}.jpg", second=round_number))
                ledger.merge()
        except BaseException as error:  # noqa: BLE001 - seen by the test
            errors.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    Ledger(str(tmp_path)).merge()
    rows = stored(tmp_path)
    names = [*range(3), "shared"]
    assert sorted(one["output"] for one in rows) == sorted(f"{x}-{y}.jpg" for x in names for y in range(10))
    assert {one["finished_at"] for one in rows} == {START + datetime.timedelta(seconds=4)}


def test_an_older_ledger_is_read_and_a_broken_one_named(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    part = tmp_path / "_nst" / "ledger" / "0.parquet"
    part.parent.mkdir(parents=True)
    table = pa.Table.from_pylist([dataclasses.asdict(row("a.jpg"))], schema=SCHEMA)
    pq.write_table(table.drop_columns(["note"]), part)
    assert ledger.read(5).rows.to_pylist()[0]["note"] == ""
    for broken, words in (
        (b"PAR1 and no more", "is no part of a ledger"),
        (None, "has no column etag"),
    ):
        if broken is None:
            pq.write_table(table.drop_columns(["etag"]), part)
        else:
            part.write_bytes(broken)
        with pytest.raises(OSError, match=rf"0\.parquet {words}.*delete it"):
            ledger.read(5)


def test_a_link_in_out_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "_nst").mkdir(parents=True)
    (tmp_path / "out" / "_nst" / "ledger").symlink_to(tmp_path / "elsewhere")
    ledger = Ledger(str(tmp_path / "out"))
    ledger.append(row("a.jpg"))
    with pytest.raises(OSError, match="link"):
        ledger.flush()
    assert not list(storage.list_objects(str(tmp_path / "elsewhere")))
