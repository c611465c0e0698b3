"""What `nst stylize` plans: which output is whose, what is left to do, and all of it in bounded memory."""

from __future__ import annotations

import datetime
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from infra.storage import ObjectInfo
from pipelines.backlog import MAX_IN_A_BATCH, NUM_AT_HAND, Backlog
from pipelines.database import open_database
from pipelines.ledger import DONE, FAILED, Ledger, LedgerRow
from pipelines.stylize_past import Past
from pipelines.stylize_plan import Entry, EntryText, Item, LeftOut, mixed_look, plan, single_looks

LOOKS = single_looks(["monet"], ["d1"])


def source_of(key: str, etag: str = "1") -> ObjectInfo:
    return ObjectInfo(uri=f"s3://in/{key}", key=key, num_bytes=1, etag=etag)


def planned(keys: list[str], styles: int = 1, pairing: str = "each") -> list[Entry]:
    looks = single_looks([f"style-{index}" for index in range(styles)], ["0"] * styles)
    return list(plan(map(source_of, keys), looks, pairing=pairing, format="jpg"))


# Which output is whose


def test_keys_that_lead_out_are_refused_and_named() -> None:
    keys = [
        "../up.jpg",
        "/root.jpg",
        "_nst/run.jpg",
        "a/../../up.jpg",
        "a//b.jpg",
        "a/./b.jpg",
        "a\\..\\b.jpg",
    ]
    keys += ["line\nbreak.jpg", "null\0.jpg", "\udcff.jpg"]
    entries = planned(keys)
    assert [entry.source.key for entry in entries] == keys
    assert all(isinstance(entry, LeftOut) and entry.reason == "unsafe_key" for entry in entries)


def test_no_two_inputs_share_an_output() -> None:
    keys = ["a", "a.jpg", "a.jpg.jpg", "a.m.jpg", "a.png", "a.png.jpg", "a/b.JPG", "a/b.jpeg", "a/b.txt.jpg"]
    entries = planned(keys)
    found = {entry.source.key: entry.output for entry in entries if isinstance(entry, Item)}
    assert found == {
        "a": "a.jpg",
        "a.jpg": "a.jpg.jpg",
        "a.jpg.jpg": "a.jpg.jpg.jpg",
        "a.m.jpg": "a.m.jpg",
        "a.png": "a.png.jpg",
        "a.png.jpg": "a.png.jpg.jpg",
        "a/b.JPG": "a/b.jpg",
        "a/b.jpeg": "a/b.jpeg.jpg",
        "a/b.txt.jpg": "a/b.txt.jpg",
    }


def test_outputs_are_those_of_a_plan_that_remembers_every_one() -> None:
    generator = random.Random(3)
    parts = ["a", "b", "-", ".jpg", ".png", ".JPG", "/", " ", "-2", "ä", ".", "!"]
    for _ in range(300):
        drawn = {"".join(generator.choices(parts, k=generator.randint(1, 5))) for _ in range(60)}
        items = [entry for entry in planned(sorted(drawn)) if isinstance(entry, Item)]
        taken: set[str] = set()
        for item in items:
            stem = item.output.removesuffix(".jpg")
            key, suffix = item.source.key, PurePosixPath(item.source.key).suffix
            plain = key.removesuffix(suffix) if suffix.lower() in (".jpg", ".png") else key
            assert stem == (key if plain in taken else plain), (key, sorted(drawn))
            assert stem not in taken
            taken.add(stem)


def test_style_folders_are_distinct_and_harmless() -> None:
    names = ["monet", "monet", "../up", "_nst", ".hidden", "画", ""]
    looks = single_looks(names, list("abcdefg"))
    assert [look.name for look in looks] == ["monet", "monet-2", "up", "nst", "hidden", "画", "style"]
    mixed = mixed_look(looks[:2], (0.7, 0.3))
    assert mixed.name == "0.7 monet + 0.3 monet-2"
    assert mixed.digest != mixed_look(looks[:2], (0.3, 0.7)).digest


def test_entries_survive_as_text() -> None:
    text = EntryText(LOOKS)
    entries = [*planned(["\udcff.jpg", "line\nbreak.jpg", "notes.txt"])]
    entries += list(plan([source_of("日本/ä.jpg")], LOOKS, pairing="each", format="png"))
    assert [text.read(text.write(entry)) for entry in entries] == entries
    assert all("\n" not in text.write(entry) for entry in entries)


# What is left to do


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Of ten pictures 0 to 5 are done, 6 and 7 failed, 8 and 9 were never seen. The output of 1 is gone, that
    of 2 was cut, and 3 has another source now."""
    ledger = Ledger(str(tmp_path))
    for number in range(8):
        has_failed = number in (6, 7)
        ledger.append(
            LedgerRow(
                key=f"{number}.png",
                output=f"{number}.jpg",
                source="",
                etag="0" if number == 3 else "1",
                num_bytes=1,
                style="monet",
                style_digest="d1",
                model="m",
                model_digest="m1",
                settings_digest="s1",
                status=FAILED if has_failed else DONE,
                output_num_bytes=0 if has_failed else 4,
                finished_at=datetime.datetime.now(datetime.UTC),
            )
        )
        if not has_failed and number != 1:
            (tmp_path / f"{number}.jpg").write_bytes(b"cut" if number == 2 else b"full")
    ledger.flush()
    return tmp_path


def left(out: Path, *, only_failed: bool = False, model: str = "m1") -> tuple[list[str], Counter[str]]:
    text, counts = EntryText(LOOKS), Counter[str]()
    keys = [f"{number}.png" for number in range(10)] + ["notes.txt"]
    entries = plan(map(source_of, keys), LOOKS, pairing="each", format="jpg")
    with open_database("nst-test-") as database:
        past = Past(
            Ledger(str(out)),
            str(out),
            database,
            text,
            model_digest=model,
            settings_digest="s1",
            is_closing=threading.Event(),
        )
        found = list(past.still_to_do(entries, only_failed=only_failed, counts=counts))
    return [entry.source.key.removesuffix(".png") for entry in found], counts


def test_what_is_missing_or_changed_is_done_again(out: Path) -> None:
    keys, counts = left(out)
    assert keys[:4] == ["3", "8", "9", "notes.txt"], "what the ledger tells, before all outputs are listed"
    assert sorted(keys[4:]) == ["1", "2"]
    assert counts == {"done_before": 3, "failed_before": 2, "ignored": 1}


def test_what_failed_waits_until_it_is_asked_for(out: Path) -> None:
    keys, counts = left(out, only_failed=True)
    assert keys == ["6", "7", "notes.txt"]
    assert counts == {"done_before": 3, "left_for_later": 5, "ignored": 1}


def test_another_model_does_everything_again(out: Path) -> None:
    keys, counts = left(out, model="m2")
    assert keys == [*map(str, range(10)), "notes.txt"]
    assert +counts == {"ignored": 1}


# The backlog


def backlog(entries: Iterator[int], folder: Path) -> Backlog[int]:
    return Backlog(
        entries,
        str(folder),
        write=str,
        read=int,
        kind=lambda number: "odd" if number % 2 else "even",
        is_closing=threading.Event(),
    )


def take_all(source: Backlog[int]) -> Iterator[int]:
    while source.num_left != 0:
        yield from source.take(700)
    yield from source.take(1)


def test_the_first_are_there_while_the_listing_goes_on(tmp_path: Path) -> None:
    may_go_on = threading.Event()

    def listing() -> Iterator[int]:
        yield from (0, 2, 3)
        assert may_go_on.wait(60)
        yield from range(4, 5_000)

    with backlog(listing(), tmp_path) as source:
        assert source.wait_for("odd") or source.num_found  # the third waits for the fourth at most a while
        assert source.take(1) == [0]
        assert source.num_left is None
        may_go_on.set()
        assert list(take_all(source)) == [2, 3, *range(4, 5_000)]
        assert (source.num_found, source.num_of_kind["odd"]) == (4_999, 2_499)
        assert not source.wait_for("blue")


def test_an_error_of_the_listing_comes_after_what_was_found(tmp_path: Path) -> None:
    def listing() -> Iterator[int]:
        yield from range(1_500)
        raise OSError("the store is away")

    found: list[int] = []
    with backlog(listing(), tmp_path) as source, pytest.raises(OSError, match="is away"):
        found.extend(take_all(source))
    assert found == list(range(1_500))


def test_where_it_is_held_it_runs_ahead_so_far_and_no_further(tmp_path: Path) -> None:
    num_listed, may_begin = 0, threading.Event()

    def listing() -> Iterator[int]:
        nonlocal num_listed
        assert may_begin.wait(60)
        for number in range(50_000):
            num_listed += 1
            yield number

    with backlog(listing(), tmp_path) as source:
        source.hold()
        may_begin.set()
        assert source.wait_for("odd")
        taken = source.take(5)
        time.sleep(0.5)
        assert 5 < num_listed <= NUM_AT_HAND + 2 * MAX_IN_A_BATCH
        # who needs more than is at hand gets it, whether or not anybody says that the wait is over
        assert [*taken, *take_all(source)] == list(range(50_000))
