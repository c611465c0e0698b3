"""Planning a corpus of very many images: seconds, keys a second and memory of the driver of `nst shard`.

    python -m benchmarks.scale                       # 100 thousand, 1 million, 10 million keys

A generator stands for the listing of SOURCE; everything behind it is the product's code: the catalogue, the
plan, every shard's images fetched and digested as they are for its task, the ledger written. Each run is a
process of its own. "again" is the next run over the same source, one key in a hundred being new.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.storage import ObjectInfo
from nst.ledger import FAILURES_SCHEMA, LEDGER_SCHEMA, write_rows
from nst.planning import ShardPlan, ShardSettings, shard_edges
from pipelines.catalogue import Catalogue, open_catalogue
from pipelines.console import Progress
from pipelines.corpus_inputs import fill
from pipelines.database import DEFAULT_MEMORY_MB, NUM_THREADS
from pipelines.shard_corpus import shard_corpus  # noqa: F401 - a driver has all of it in memory

RESULTS = Path(__file__).parent / "results"
NUM_LABELS = 1_000
GOAL_MB = 1_000
SOURCE = "s3://bucket/paintings"
SETTINGS = ShardSettings(role="style")
NEW_KEY_EVERY = 100


def listing(num_keys: int, *, with_new: bool) -> Iterator[ObjectInfo]:
    """Keys of 60 to 100 characters below 1,000 folders, in their order; `with_new` has 1 % more of them."""
    per_label = -(-num_keys // NUM_LABELS)
    for number in range(num_keys):
        label, place = divmod(number, per_label)
        digest = hashlib.blake2b(number.to_bytes(8), digest_size=16).hexdigest()
        title = "a-longer-title-of-a-work-"[: 5 + number % 21]
        for key in [f"artist-{label:04d}/{place:08d}-{title}{digest}.jpg"] + (
            [f"artist-{label:04d}/{place:08d}-{title}{digest}_new.jpg"]
            if with_new and number % NEW_KEY_EVERY == 0
            else []
        ):
            yield ObjectInfo(uri=f"{SOURCE}/{key}", key=key, num_bytes=40_000 + number % 50_000, etag=digest)


class Peaks:
    """The most memory that this process has, and the most disk that a folder takes, sampled."""

    def __init__(self, folder: str) -> None:
        self.anonymous = self.disk = 0
        self._folder, self._end = Path(folder), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._end.wait(0.05):
            self.anonymous = max(self.anonymous, status_bytes("RssAnon"))
            sizes = []
            for path in self._folder.rglob("*"):
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    continue
            self.disk = max(self.disk, sum(sizes))


def status_bytes(name: str) -> int:
    """A figure of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def plan_corpus(num_keys: int, ledger: Path, *, again: bool) -> dict[str, Any]:
    """Plans in this process. The first run writes the ledger, the one after it (`again`) reads it."""
    seconds: dict[str, float] = {}
    cpu_seconds: dict[str, float] = {}

    def timed(name: str, started: tuple[float, float]) -> tuple[float, float]:
        now = time.perf_counter(), time.process_time()
        seconds[name], cpu_seconds[name] = now[0] - started[0], now[1] - started[1]
        return now

    before = status_bytes("VmHWM")
    clock = time.perf_counter(), time.process_time()
    for _ in listing(num_keys, with_new=again):
        pass
    clock = timed("generator alone", clock)
    with open_catalogue() as catalogue, Peaks(catalogue.folder) as peaks:
        with Progress("list", total=num_keys, unit="file") as progress:
            num_listed = fill(catalogue, listing(num_keys, with_new=again), SOURCE, progress)
        clock = timed("list", clock)
        if again:
            catalogue.load_ledger(str(ledger), None)
        catalogue.label_inputs("dirname", "")
        assert catalogue.changed()[0] == 0
        num_planned = catalogue.plan()
        clock = timed("sort", clock)
        num_shards = digest_shards(catalogue, num_planned)
        clock = timed("fetch and digest", clock)
        written = ledger.with_suffix(".new")
        catalogue.conclude(first_shard=0, num_shards=num_shards)
        write_rows(str(written), LEDGER_SCHEMA, catalogue.ledger())
        write_rows(os.devnull, FAILURES_SCHEMA, catalogue.failures())
        timed("ledger", clock)
    ledger_bytes = written.stat().st_size
    written.replace(ledger)
    return {
        "num_keys": num_listed,
        "num_planned": num_planned,
        "num_shards": num_shards,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "ledger_bytes": ledger_bytes,
        "peak_disk_bytes": peaks.disk,
        "peak_rss_bytes": status_bytes("VmHWM"),
        "peak_anonymous_bytes": peaks.anonymous,
        "rss_at_start_bytes": before,
    }


def digest_shards(catalogue: Catalogue, num_planned: int) -> int:
    """What `nst shard` does before each task. Returns the number of shards."""
    edges = shard_edges(num_planned, SETTINGS)
    last = ("", "")
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        plan = ShardPlan(number=number, images=catalogue.images(start, end), settings=SETTINGS)
        plan.digest()
        assert len(plan.images) == end - start
        assert last < plan.images[0].order
        last = plan.images[-1].order
    return max(len(edges) - 1, 0)


def in_own_process(num_keys: int, ledger: Path, *, again: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.scale", "--one", str(num_keys), "--ledger", str(ledger)]
    done = subprocess.run(
        command + ["--again"] * again, stdout=subprocess.PIPE, check=True, cwd=Path(__file__).parent.parent
    )
    return json.loads(done.stdout.splitlines()[-1])


def page(facts: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    from benchmarks.timing import describe, table  # here: it loads PyTorch, which a driver does not

    header = ["keys", "run", "new", "shards", "CPU s", "s", "keys/s", "list", "sort", "fetch", "ledger"]
    header += ["peak RSS MB", "anonymous MB", "disk MB", "ledger MB"]
    rows = []
    for run in runs:
        seconds = run["seconds"]
        total = total_of(seconds)
        phases = [f"{seconds[name]:.1f}" for name in ("list", "sort", "fetch and digest", "ledger")]
        sizes = [run[f"{name}_bytes"] / 1e6 for name in ("peak_rss", "peak_anonymous", "peak_disk", "ledger")]
        rows.append(
            [
                f"{run['num_keys']:,}",
                "again" if run["again"] else "first",
                f"{run['num_planned']:,}",
                f"{run['num_shards']:,}",
                f"{total_of(run['cpu_seconds']):.1f}",
                f"{total:.1f}",
                f"{run['num_keys'] / total:,.0f}",
                *phases,
                *(f"{size:,.0f}" for size in sizes),
            ]
        )
    most = max(run["peak_rss_bytes"] for run in runs) / 1e6
    first = [run for run in runs if not run["again"]]
    growth = (
        max(
            (total_of(large["cpu_seconds"]) / total_of(small["cpu_seconds"]))
            / (large["num_keys"] / small["num_keys"])
            for small, large in itertools.pairwise(first)
        )
        if len(first) > 1
        else 1.0
    )
    verdict = "**met**" if most < GOAL_MB else "**NOT met**"
    return "\n".join(
        [
            "# Planning at scale",
            "",
            describe(facts),
            f"- DuckDB's own memory is bounded to {DEFAULT_MEMORY_MB} MB, on {NUM_THREADS} threads; the rest "
            "is Python, PyArrow, Ray and boto3",
            "",
            table(header, rows),
            "",
            f"Goal: the driver plans in less than {GOAL_MB:,} MB: {verdict}, at most {most:,.0f} MB. Ten "
            f"times the keys take at most {10 * growth:.1f} times the CPU seconds.",
            "",
            "The phases are seconds by the clock, which other work on the machine lengthens. *list* includes "
            "the generator that stands for the listing (alone: "
            + ", ".join(f"{run['seconds']['generator alone']:.1f} s" for run in first)
            + "). *sort*: labels, what is known already, what has changed, the order of the corpus. *fetch*: "
            "the images of every shard out of the catalogue, and the digest of its plan. *ledger*: what "
            "became of every input, sorted and written.",
            "",
        ]
    )


def total_of(seconds: dict[str, float]) -> float:
    """Of all phases but the one that is no part of planning."""
    return sum(value for name, value in seconds.items() if name != "generator alone")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", default="100000,1000000,10000000", help="numbers, separated by commas")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ledger", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--again", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(plan_corpus(options.one, options.ledger, again=options.again)))
        return
    import torch

    from benchmarks.timing import machine, write_results

    facts = machine(torch.device("cpu"))
    runs = []
    with tempfile.TemporaryDirectory(prefix="nst-scale-") as folder:
        for num_keys in map(int, options.keys.split(",")):
            for again in (False, True):
                run = in_own_process(num_keys, Path(folder, "ledger.parquet"), again=again)
                runs.append({"again": again, **run})
                print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    write_results(options.out, "scale", {"machine": facts, "runs": runs}, page(facts, runs))


if __name__ == "__main__":
    main()
