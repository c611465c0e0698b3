"""The tables that a run plans from say what Python's own sorting and sets say, in bounded memory."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from nst.ledger import LEDGER_SCHEMA, NO_SHARD, write_rows
from nst.planning import ShardSettings, SourceImage, plan_shards, shard_edges
from nst.shards import UNREADABLE, Failure
from pipelines.catalogue import Catalogue, open_catalogue

SETTINGS = ShardSettings(role="style", image_size=288, shard_mb=1)
NAMES = ["a", "A", "a-b", "a.b", "ab", "Z", "é", "ß", "日本", "🖼", "z z", "0", "~", "ÿ"]


@pytest.fixture
def catalogue() -> Iterator[Catalogue]:
    with open_catalogue() as opened:
        yield opened


def fill(catalogue: Catalogue, sizes: dict[str, int]) -> None:
    """Lists these files and labels them by their first folder."""
    columns = {"source": list(sizes), "num_bytes": list(sizes.values())}
    nothing = [None] * len(sizes)
    catalogue.insert("found", columns | {"reason": nothing, "detail": nothing})
    catalogue.label_inputs("dirname", "")


def awkward_sizes(count: int = 500) -> dict[str, int]:
    generator = random.Random(1)
    sources = {f"{generator.choice(NAMES)}/{generator.choice(NAMES)}{n}.jpg" for n in range(count)}
    return {source: number for number, source in enumerate([*sources, "top.jpg", "/odd.jpg"])}


def ledger_rows(catalogue: Catalogue, **shards: int) -> dict[str, dict]:
    catalogue.conclude(**shards)
    batches = list(catalogue.ledger())
    table = pa.Table.from_batches(batches, schema=batches[0].schema)
    rows = table.to_pylist()
    assert [row["source"] for row in rows] == sorted(row["source"] for row in rows)
    return {row["source"]: row for row in rows}


def failure_rows(catalogue: Catalogue) -> dict[str, str]:
    return {row["source"]: row["reason"] for batch in catalogue.failures() for row in batch.to_pylist()}


def test_the_plan_is_that_of_a_sorted_list(catalogue: Catalogue) -> None:
    sizes = awkward_sizes()
    fill(catalogue, sizes)
    images = [
        SourceImage(
            source=source, label=source.split("/")[0] if "/" in source else "unlabelled", num_bytes=size
        )
        for source, size in sizes.items()
    ]
    plans = plan_shards(images, SETTINGS, first_number=7)
    assert len(plans) > 8
    assert catalogue.plan() == len(images)
    edges = shard_edges(len(images), SETTINGS)
    assert [catalogue.images(*pair) for pair in itertools.pairwise(edges)] == [plan.images for plan in plans]
    ledger = ledger_rows(catalogue, first_shard=7, num_shards=len(plans))
    assert {source: row["shard"] for source, row in ledger.items()} == {
        image.source: plan.number for plan in plans for image in plan.images
    }


def test_what_earlier_runs_did_decides_what_is_new(catalogue: Catalogue, tmp_path: Path) -> None:
    fill(catalogue, {f"a/{name}": 1 for name in ("new", "taken", "failed", "repaired", "unread", "again")})
    taken = {"label": "a", "num_bytes": 1, "shard": 0, "sha256": None, "near_hash": None}
    corrupt = {"reason": "corrupt", "detail": "x"}
    known = [
        {"source": "a/again", **taken, "num_bytes": 2, **corrupt},
        {"source": "a/failed", **taken, **corrupt},
        {"source": "a/gone", **taken, "reason": None, "detail": None},
        {"source": "a/gone_failed", **taken, **corrupt},
        {"source": "a/repaired", **taken, "num_bytes": 2, **corrupt},
        {"source": "a/taken", **taken, "reason": None, "detail": None},
    ]
    write_rows(
        str(tmp_path / "ledger"),
        LEDGER_SCHEMA,
        pa.Table.from_pylist(known, schema=LEDGER_SCHEMA).to_batches(),
    )
    catalogue.load_ledger(str(tmp_path / "ledger"), None)
    assert catalogue.changed()[0] == 0
    assert catalogue.num_gone() == 1
    assert catalogue.last_known_shard() == 0
    assert [image.source for image in catalogue.known_images(0)] == [row["source"] for row in known]
    assert catalogue.plan() == 4
    assert [image.source for image in catalogue.images(0, 4)] == [
        "a/again",
        "a/new",
        "a/repaired",
        "a/unread",
    ]
    catalogue.add_failures(
        [
            Failure(source="a/again", reason=UNREADABLE, detail="x"),
            Failure(source="a/unread", reason=UNREADABLE, detail="x"),
        ]
    )
    ledger = ledger_rows(catalogue, first_shard=1, num_shards=1)
    assert {source: (row["shard"], row["reason"]) for source, row in ledger.items()} == {
        "a/again": (0, "corrupt"),  # as it was: the next run tries it again
        "a/failed": (0, "corrupt"),
        "a/gone": (0, None),
        "a/gone_failed": (0, "corrupt"),
        "a/new": (1, None),
        "a/repaired": (1, None),
        "a/taken": (0, None),
    }
    assert failure_rows(catalogue) == {"a/again": UNREADABLE, "a/failed": "corrupt", "a/unread": UNREADABLE}
    assert [(reason.reason, reason.num, reason.source) for reason in catalogue.reasons()] == [
        (UNREADABLE, 2, "a/again"),
        ("corrupt", 1, "a/failed"),
    ]


def test_an_image_that_changed_is_told(catalogue: Catalogue, tmp_path: Path) -> None:
    fill(catalogue, {"a/1": 1, "a/2": 2, "a/3": 3})
    catalogue.plan()
    catalogue.conclude(first_shard=0, num_shards=1)
    write_rows(str(tmp_path / "ledger"), LEDGER_SCHEMA, catalogue.ledger())
    with open_catalogue() as later:
        later.load_ledger(str(tmp_path / "ledger"), None)
        fill(later, {"a/1": 1, "a/2": 5, "a/3": 6})
        assert later.changed() == (2, "the size of a/2")


def test_repeated_images_close_up_the_plan(catalogue: Catalogue) -> None:
    fill(catalogue, {f"a/{number}": 1 for number in range(10)})
    catalogue.plan()
    catalogue.run("INSERT INTO repeated SELECT source, label, num_bytes FROM planned WHERE position % 2 = 0")
    assert catalogue.leave_out_repeated() == 5
    assert [image.source for image in catalogue.images(0, 10)] == [
        f"a/{number}" for number in range(1, 10, 2)
    ]
    ledger = ledger_rows(catalogue, first_shard=3, num_shards=1)
    assert [row["shard"] for row in ledger.values()] == [NO_SHARD, 3] * 5


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ("max_temp_directory_size = '1MB'", "TMPDIR"),
        ("memory_limit = '3MB'", "NST_PLAN_MEMORY_MB"),
    ],
)
def test_too_little_room_is_said_with_its_remedy(setting: str, remedy: str) -> None:
    folders: list[str] = []

    def need_much() -> None:
        with open_catalogue() as catalogue:
            folders.append(catalogue.folder)
            catalogue.run("SET memory_limit = '20MB'")
            catalogue.run(f"SET {setting}")
            catalogue.run("CREATE TABLE large AS SELECT hash(range) AS x FROM range(3_000_000) ORDER BY x")

    with pytest.raises(OSError, match=remedy):
        need_much()
    assert not Path(folders[0]).exists()


def test_a_wrong_amount_of_memory_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NST_PLAN_MEMORY_MB", "1GB")
    with pytest.raises(ValueError, match="'1GB'; give a number of megabytes"):
        open_catalogue().__enter__()


def test_ctrl_c_ends_the_queries_and_leaves_nothing() -> None:
    folders: list[str] = []

    def ask_for_ever() -> None:
        with open_catalogue() as catalogue:
            folders.append(catalogue.folder)
            threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            while True:
                catalogue.one("SELECT count(*) FROM range(100_000_000) WHERE hash(range) % 11 = 2")

    with pytest.raises(KeyboardInterrupt):
        ask_for_ever()
    assert not Path(folders[0]).exists()
