"""The benchmark of planning goes the product's way, and says so when its goal is missed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import scale, timing


def test_both_runs_plan_every_key(tmp_path: Path) -> None:
    keys = [found.key for found in scale.listing(3_000, with_new=True)]
    assert keys == sorted(set(keys))
    assert all(60 <= len(key) <= 100 for key in keys)
    first = scale.plan_corpus(3_000, tmp_path / "ledger", again=False)
    again = scale.plan_corpus(3_000, tmp_path / "ledger", again=True)
    assert (first["num_keys"], first["num_planned"], first["num_shards"]) == (3_000, 3_000, 8)
    assert (again["num_keys"], again["num_planned"], again["num_shards"]) == (3_030, 30, 1)
    assert pq.read_metadata(tmp_path / "ledger").num_rows == 3_030
    assert first["peak_rss_bytes"] > first["peak_anonymous_bytes"] > 0


@pytest.mark.parametrize(("peak", "verdict"), [(900, "**met**"), (1_100, "**NOT met**")])
def test_the_page_judges_the_goal(peak: int, verdict: str) -> None:
    run: dict[str, Any] = {
        "again": False,
        "num_planned": 1,
        "num_shards": 1,
        "ledger_bytes": 1,
        "peak_disk_bytes": 1,
        "peak_rss_bytes": peak * 1e6,
        "peak_anonymous_bytes": 1,
        "seconds": {"generator alone": 9, "list": 1, "sort": 1, "fetch and digest": 1, "ledger": 1},
    }
    run["cpu_seconds"] = run["seconds"]
    runs = [run | {"num_keys": 10}, run | {"num_keys": 100}]
    page = scale.page(timing.machine(torch.device("cpu")), runs)
    assert verdict in page
    assert "take at most 1.0 times the CPU seconds" in page
