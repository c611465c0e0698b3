"""When `nst stylize` stops by itself: where the store is gone, and not where some pictures are."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from infra.storage import ObjectInfo
from pipelines.ledger import Ledger
from pipelines.models import ResolvedModel
from pipelines.stylize_plan import Item, single_looks
from pipelines.stylize_recorder import NUM_WITHOUT_STORE, Recorder
from pipelines.stylize_run import BucketRun
from pipelines.stylize_worker import STORAGE, Report, StylizeSettings

LOOKS = single_looks(["monet"], ["d"])
GONE = Report(reason=STORAGE, error="no answer from the store")


def recorder(folder: Path, max_failures: int | None = None) -> Recorder:
    run = BucketRun(
        source_uri=str(folder / "in"),
        out_uri=str(folder / "out"),
        model=ResolvedModel(name="m", checkpoint_dir="", digest="d", version=None),
        styles=[],
        looks=LOOKS,
        pairing="each",
        settings=StylizeSettings(),
        max_failures=max_failures,
    )
    return Recorder(run, Ledger(run.out_uri), Counter())


def item(folder: Path) -> Item:
    path = folder / "in" / "a.jpg"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"picture")
    source = ObjectInfo(uri=str(path), key="a.jpg", num_bytes=7, etag="1")
    return Item(source=source, look=LOOKS[0], output="a.jpg")


def test_a_run_from_which_nothing_can_be_read_stops(tmp_path: Path) -> None:
    tested, one = recorder(tmp_path), item(tmp_path)
    for _ in range(NUM_WITHOUT_STORE - 1):
        tested.item(one, GONE, 1)
    assert not tested.has_given_up
    tested.item(one, GONE, 1)
    assert tested.has_given_up
    assert tested.failure is not None
    assert "no answer from the store" in tested.failure
    assert "--retry-failed" in tested.failure


@pytest.mark.parametrize("lost", ["in", "out"])
def test_pictures_that_nobody_may_read_stop_it_only_with_the_store(tmp_path: Path, lost: str) -> None:
    tested, one = recorder(tmp_path), item(tmp_path)
    tested.item(one, Report(), 1)
    for _ in range(3 * NUM_WITHOUT_STORE):
        tested.item(one, GONE, 1)
    assert not tested.has_given_up
    shutil.rmtree(tmp_path / lost, ignore_errors=True)
    (tmp_path / lost).write_text("no folder")
    for _ in range(NUM_WITHOUT_STORE):
        tested.item(one, GONE, 1)
    assert tested.has_given_up


def test_a_limit_of_ones_own_is_the_only_one(tmp_path: Path) -> None:
    tested, one = recorder(tmp_path, max_failures=NUM_WITHOUT_STORE + 1), item(tmp_path)
    for _ in range(NUM_WITHOUT_STORE + 1):
        tested.item(one, GONE, 1)
    assert not tested.has_given_up
    tested.item(one, GONE, 1)
    assert tested.has_given_up


def test_other_failures_in_between_are_no_row(tmp_path: Path) -> None:
    tested, one = recorder(tmp_path), item(tmp_path)
    for number in range(4 * NUM_WITHOUT_STORE):
        corrupt = Report(reason="corrupt", error="cut")
        tested.item(one, corrupt if number % NUM_WITHOUT_STORE == 0 else GONE, 1)
    assert not tested.has_given_up
