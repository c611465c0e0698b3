"""What choosing a batch costs when a corpus grows: seconds of a plan, memory of the sampler, shards touched.

    python -m benchmarks.sampler_scale               # 100 thousand to 100 million rows

The rows are simulated: two corpora whose shards hold 2,000 samples each, as `nst shard` lays them out. What
`nst.corpus.Corpus` holds for a real one is 8 bytes a row, which the loader workers share. Each measurement is
a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import timing
from nst.config import BatchConfig
from nst.label_runs import LabelRuns
from nst.sampling import DynamicBatchSampler

ROWS = (10**5, 10**6, 10**7, 10**8)
NUM_LABELS = 1_000
ROWS_PER_SHARD = 2_000
WINDOW = 4
NUM_TIMED = 300  # steps
STRETCH, NUM_COUNTED = 100, 3_000  # steps whose shards are counted
BATCH = BatchConfig(num_classes=8, works_per_class=2)


def style_runs(num_rows: int, kind: str) -> LabelRuns:
    """1,000 labels of very different size, or one; cut where shards end."""
    if kind == "unlabelled":
        ends = [num_rows]
    else:
        weights = 1 / np.arange(1, NUM_LABELS + 1) ** 0.5
        ends = np.maximum.accumulate(np.rint(np.cumsum(weights / weights.sum()) * num_rows)).astype(int)
    edges = np.unique([0, *ends, *range(0, num_rows, ROWS_PER_SHARD), num_rows])
    return LabelRuns(np.searchsorted(ends, edges[:-1], side="right"), np.diff(edges))


def megabytes() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure(num_rows: int, kind: str, window: int) -> dict[str, Any]:
    """One row of the table, in this process."""
    shards = np.full(num_rows // ROWS_PER_SHARD, ROWS_PER_SHARD)
    ends = np.cumsum(shards)
    config = BatchConfig(num_classes=8, works_per_class=2, window_shards=window)
    small = DynamicBatchSampler(np.arange(20) // 5, 100, config, 0)  # what it takes before there are any rows
    small.plan(0)
    before, started = megabytes(), time.perf_counter()
    runs = style_runs(num_rows, kind)
    sampler = DynamicBatchSampler(runs, num_rows, config, 0, content_shards=shards, style_shards=shards)
    built = time.perf_counter()
    sampler.plan(0)
    first, seconds = time.perf_counter() - built, []
    for step in range(1, NUM_TIMED + 1):
        start = time.perf_counter()
        sampler.plan(step)
        seconds.append(time.perf_counter() - start)
    memory = megabytes() - before
    plans = [sampler.plan(step) for step in range(NUM_COUNTED)]
    touched = {
        name: num_shards_touched([np.searchsorted(ends, part, side="right") for part in rows])
        for name, rows in (
            ("content", [plan.content for plan in plans]),
            ("style", [plan.style for plan in plans]),
        )
    }
    return {
        "rows": num_rows,
        "art": kind,
        "window": window,
        "shards": len(shards),
        "runs": len(runs),
        "seconds_to_build": built - started,
        "seconds_of_the_first_plan": first,
        "seconds_of_a_plan": float(np.median(seconds)),
        "seconds_of_the_slowest_plan": float(np.max(seconds)),
        "megabytes": memory,
        "content_shards": touched["content"],
        "style_shards": touched["style"],
    }


def num_shards_touched(shards_of_steps: list[np.ndarray]) -> tuple[float, int]:
    """Distinct shards in a stretch of steps (the median of all stretches), and in all steps."""
    starts = range(0, len(shards_of_steps), STRETCH)
    stretches = [len(np.unique(np.concatenate(shards_of_steps[start : start + STRETCH]))) for start in starts]
    return float(np.median(stretches)), len(np.unique(np.concatenate(shards_of_steps)))


def measured_apart(num_rows: int, kind: str, window: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.sampler_scale", "--one", str(num_rows), kind, str(window)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(done.stdout, end="", file=sys.stderr, flush=True)
    return json.loads(done.stdout)


def page(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    header = ["rows", "art", "window", "shards", "build ms", "first plan ms", "plan ms", "slowest ms"]
    header += ["MB", "content shards", "in all", "style shards", "in all"]
    body = [
        [
            f"{row['rows']:,}",
            row["art"],
            row["window"] or "off",
            f"{row['shards']:,}",
            f"{1e3 * row['seconds_to_build']:.1f}",
            f"{1e3 * row['seconds_of_the_first_plan']:.1f}",
            f"{1e3 * row['seconds_of_a_plan']:.2f}",
            f"{1e3 * row['seconds_of_the_slowest_plan']:.1f}",
            f"{row['megabytes']:.1f}",
            *(f"{number:,.0f}" for kind in ("content", "style") for number in row[f"{kind}_shards"]),
        ]
        for row in rows
    ]
    lines = [
        "# Sampling at scale",
        "",
        f"Batches of {BATCH.num_classes} classes x {BATCH.works_per_class} works and as many photos from two "
        f"simulated corpora of that many rows each, {ROWS_PER_SHARD:,} to a shard. *MB*: what the sampler "
        f"adds to the peak memory of its process. *Shards*: distinct ones that {STRETCH} steps touch, of all "
        f"ranks (median), and that all {NUM_COUNTED:,} do. *Window*: `batch.window_shards`. *Plan ms*: the "
        f"median of {NUM_TIMED}.",
        "",
        timing.table(header, body),
        "",
        timing.describe(facts),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="separated by commas")
    parser.add_argument("--out", type=Path, default=timing.RESULTS, help="folder for the results")
    parser.add_argument("--one", nargs=3, metavar=("ROWS", "ART", "WINDOW"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        num_rows, kind, window = options.one
        print(json.dumps(measure(int(num_rows), kind, int(window))))
        return
    facts = timing.machine(torch.device("cpu"))
    rows = [
        measured_apart(num_rows, kind, window)
        for kind in (f"{NUM_LABELS:,} labels", "unlabelled")
        for window in (0, WINDOW)
        for num_rows in map(int, options.rows.split(","))
    ]
    timing.write_results(options.out, "sampler_scale", {"machine": facts, "rows": rows}, page(facts, rows))


if __name__ == "__main__":
    main()
