"""A bucket of very many pictures: memory of the driver of `nst stylize`, seconds to the first output.

    python -m benchmarks.stylize_scale                   # up to 1 million keys; 10 million planned

A folder with that many names, hard links to a few pictures, is stylized by the real command in a process of
its own, with a small untrained model. "first" is stopped (Ctrl-C) when all is planned and some of it done.
"again" is the run after a whole one, whose ledger and outputs are made here: one key in a thousand is new,
and it runs to its end, with the merge of the ledger and the gallery. "planned" is the plan alone, from a
generator that stands for the listing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.storage import ObjectInfo
from nst.images import encode_jpeg

RESULTS = Path(__file__).parent / "results"
REPOSITORY = Path(__file__).parent.parent
NUM_FOLDERS = 1_000
NUM_PICTURES = 64  # that the names are links to; a file has at most 65,000 of them
NEW_KEY_EVERY = 1_000
SIDE = 32  # px
SECONDS_TO_PLAN = 3_000
SECONDS_OF_WORK = 15.0  # behind the plan
GOAL_MB, GOAL_SECONDS = 500, 15.0  # more memory, and later, than with the fewest keys
LINE = re.compile(rb"stylize: (\d+)(?:/(\d+))? img")


def keys(num: int, *, with_new: bool) -> Iterator[tuple[str, bool]]:
    """(key, whether it is new), in their order."""
    for number in range(num):
        folder, place = divmod(number, -(-num // NUM_FOLDERS))
        is_new = number % NEW_KEY_EVERY == 0
        if with_new or not is_new:
            yield f"artist-{folder:04d}/{place:08d}-a-title-of-some-length-{number % 977}.jpg", is_new


def make_pictures(folder: Path) -> list[Path]:
    import numpy as np

    folder.mkdir()
    generator = np.random.default_rng(0)
    paths = []
    for number in range(NUM_PICTURES):
        pixels = generator.integers(0, 255, (SIDE, SIDE, 3), np.uint8)
        paths.append(folder / f"{number}.jpg")
        paths[-1].write_bytes(encode_jpeg(pixels))
    return paths


def link_all(num: int, folder: Path, pictures: list[Path], *, with_new: bool) -> None:
    """A folder with all keys."""
    made = ""
    for number, (key, _) in enumerate(keys(num, with_new=with_new)):
        parent = key.partition("/")[0]
        if parent != made:
            (folder / parent).mkdir(parents=True, exist_ok=True)
            made = parent
        os.link(pictures[number % len(pictures)], folder / key)


def make_past(num: int, source: Path, out: Path, command: dict[str, Any]) -> None:
    """The ledger and the outputs of a whole run over the keys that are not new."""
    from infra import local_files
    from pipelines.ledger import DONE, Ledger, LedgerRow

    ledger, now = Ledger(str(out)), datetime.datetime.now(datetime.UTC)
    made = ""
    for key, is_new in keys(num, with_new=True):
        if is_new:
            continue
        parent = key.partition("/")[0]
        if parent != made:
            (out / parent).mkdir(parents=True, exist_ok=True)
            made = parent
        os.link(source / key, out / key)
        status = (source / key).stat()
        ledger.append(
            LedgerRow(
                key=key,
                output=key,
                source=str(source / key),
                etag=local_files.etag_of(status),
                num_bytes=status.st_size,
                model="m",
                style="style",
                status=DONE,
                width=SIDE,
                height=SIDE,
                seconds=0.01,
                output_sha256="0" * 64,
                output_num_bytes=status.st_size,
                finished_at=now,
                **command,
            )
        )
    ledger.merge()


def digests(folder: Path) -> dict[str, str]:
    """What the ledger of a run with this model and style holds."""
    from nst.checkpoint import model_digest
    from pipelines.styles import read_styles
    from pipelines.stylize_worker import StylizeSettings

    return {
        "style_digest": read_styles([str(folder / "style.jpg")])[0].digest,
        "model_digest": model_digest(str(folder / "model")),
        "settings_digest": StylizeSettings().digest,
    }


def run(folder: Path, out: Path, num: int, *, to_its_end: bool) -> dict[str, Any]:
    """`nst stylize`, watched from outside."""
    command = [sys.executable, "-m", "pipelines.stylize_bucket", str(folder / "in"), str(out), "--json"]
    command += ["--style", str(folder / "style.jpg"), "--model", str(folder / "model")]
    before = set(count_outputs(out, num))
    log, answer = folder / "log", folder / "answer"
    started = time.monotonic()
    facts: dict[str, Any] = {"seconds_to_first_output": None, "seconds_to_plan": None}
    facts |= {"peak_bytes": 0, "anonymous_bytes": 0}
    with log.open("wb") as errors, answer.open("wb") as output:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=errors)
        try:
            while process.poll() is None and time.monotonic() - started < SECONDS_TO_PLAN:
                time.sleep(0.5)
                seconds = time.monotonic() - started
                facts["peak_bytes"] = status_bytes(process.pid, "VmHWM") or facts["peak_bytes"]
                anonymous = status_bytes(process.pid, "RssAnon")
                facts["anonymous_bytes"] = max(facts["anonymous_bytes"], anonymous)
                if facts["seconds_to_first_output"] is None and new_outputs(out, num, before):
                    facts["seconds_to_first_output"] = seconds
                planned = [match for match in LINE.finditer(log.read_bytes()) if match[2]]
                if planned and facts["seconds_to_plan"] is None:
                    facts["seconds_to_plan"] = seconds
                if not to_its_end and planned and seconds > facts["seconds_to_plan"] + SECONDS_OF_WORK:
                    process.send_signal(signal.SIGINT)
                    process.wait(120)
        finally:
            process.kill()
            process.wait()
    facts["seconds"] = time.monotonic() - started
    facts["result"] = json.loads(answer.read_text().splitlines()[-1])
    return facts


def count_outputs(out: Path, num: int) -> Iterator[str]:
    """Outputs in the folder where the first new ones are to be expected."""
    first = out / next(keys(num, with_new=True))[0].partition("/")[0]
    return (path.name for path in first.iterdir()) if first.is_dir() else iter(())


def new_outputs(out: Path, num: int, before: set[str]) -> set[str]:
    return {name for name in count_outputs(out, num) if not name.startswith(".")} - before


def status_bytes(process_id: int, name: str) -> int:
    """A figure of a process's status; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def stylize_folder(num: int, parent: str) -> list[dict[str, Any]]:
    from tests.checkpoints import tiny_checkpoint

    folder = Path(tempfile.mkdtemp(prefix="nst-scale-", dir=parent))
    try:
        tiny_checkpoint(folder / "model")
        pictures = make_pictures(folder / "pictures")
        shutil.copy(pictures[0], folder / "style.jpg")
        link_all(num, folder / "in", pictures, with_new=True)
        first = run(folder, folder / "first", num, to_its_end=False)
        shutil.rmtree(folder / "first")
        make_past(num, folder / "in", folder / "again", digests(folder))
        again = run(folder, folder / "again", num, to_its_end=True)
        assert again["result"]["done_before"] + again["result"]["done"] == num, again
    finally:
        shutil.rmtree(folder)
    return [{"run": "first", "num_keys": num, **first}, {"run": "again", "num_keys": num, **again}]


def plan_generated(num: int) -> dict[str, Any]:
    """In this process: the plan of a listing that is generated, with nobody who takes from it."""
    from pipelines.backlog import Backlog
    from pipelines.database import open_database
    from pipelines.ledger import Ledger
    from pipelines.stylize_past import Past
    from pipelines.stylize_plan import EntryText, plan, single_looks
    from pipelines.stylize_run import run_bucket  # noqa: F401 - a driver has all of it in memory

    looks = single_looks(["style"], ["d"])
    text, counts, is_closing = EntryText(looks), Counter[str](), threading.Event()
    listing = (
        ObjectInfo(uri=f"s3://bucket/in/{key}", key=key, num_bytes=40_000, etag="0123456789abcdef" * 2)
        for key, _ in keys(num, with_new=True)
    )
    started, cpu = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="nst-scale-") as out, open_database("nst-plan-") as database:
        past = Past(
            Ledger(out), out, database, text, model_digest="m", settings_digest="s", is_closing=is_closing
        )
        planned = plan(listing, looks, pairing="each", format="jpg")
        entries = past.still_to_do(planned, only_failed=False, counts=counts)
        with Backlog(
            entries,
            database.folder,
            write=text.write,
            read=text.read,
            kind=lambda _: "item",
            is_closing=is_closing,
        ) as backlog:
            anonymous = 0
            while not backlog.is_complete:
                time.sleep(0.2)
                anonymous = max(anonymous, status_bytes(os.getpid(), "RssAnon"))
            assert backlog.num_left == num
            disk = sum(path.stat().st_size for path in Path(database.folder).iterdir())
    return {
        "run": "planned",
        "num_keys": num,
        "seconds_to_plan": time.monotonic() - started,
        "cpu_seconds": time.process_time() - cpu,
        "disk_bytes": disk,
        "peak_bytes": status_bytes(os.getpid(), "VmHWM"),
        "anonymous_bytes": anonymous,
    }


def page(facts: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    from benchmarks.timing import describe, table

    rows = []
    for one in runs:
        first, result = one.get("seconds_to_first_output"), one.get("result", {})
        rows.append(
            [
                f"{one['num_keys']:,}",
                one["run"],
                f"{first:.0f}" if first is not None else "",
                f"{one['seconds_to_plan']:.0f}" if one["seconds_to_plan"] else "",
                f"{one['num_keys'] / one['seconds_to_plan']:,.0f}" if one["seconds_to_plan"] else "",
                f"{one['anonymous_bytes'] / 1e6:,.0f}",
                f"{one['peak_bytes'] / 1e6:,.0f}",
                f"{result.get('done', 0):,}" if result else "",
                f"{one['seconds']:.0f}" if "seconds" in one else "",
            ]
        )
    memory = [one["anonymous_bytes"] / 1e6 for one in runs]
    most = max(memory) - min(memory)
    whole = [one for one in runs if "result" in one]
    seconds = [one["seconds_to_first_output"] or math.inf for one in whole]
    later = max(seconds) - min(seconds)
    verdict = "**met**" if most < GOAL_MB and later < GOAL_SECONDS else "**NOT met**"
    header = ["keys", "run", "s to the first output", "s to the whole plan", "keys/s"]
    return "\n".join(
        [
            "# Stylizing a bucket of very many pictures",
            "",
            describe(facts),
            "",
            table([*header, "driver MB", "with libraries", "stylized", "s in all"], rows),
            "",
            f"Goal: whatever the number of keys, the driver needs at most {GOAL_MB:,} MB more than with the "
            f"fewest, and the first output is at most {GOAL_SECONDS:.0f} s later: {verdict} ({most:,.0f} "
            f"MB and {later:.0f} s).",
            "",
            "*driver MB*: the most memory of its own that was seen; *with libraries*: the peak with pages "
            "of shared libraries, most of which are PyTorch's and CUDA's, whatever the number of keys.",
            "",
            "The seconds are those of the whole command: importing PyTorch, starting Ray and the workers are "
            "in them, and other work on the machine lengthens them. *first*: nothing done yet, stopped when "
            "all was planned. *again*: all was done but one key in a thousand; to the end, with the ledger "
            "merged. Its plan is whole when all outputs are listed too. *planned*: a generated listing, the "
            "plan alone.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", default="1000,100000,1000000", help="numbers, separated by commas")
    parser.add_argument("--planned", default="10000000", help="numbers, of a generated listing")
    parser.add_argument("--parent", default=tempfile.gettempdir(), help="folder for the folders")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(plan_generated(options.one)))
        return
    import torch

    from benchmarks.timing import machine, write_results

    facts = machine(torch.device("cpu"))
    runs: list[dict[str, Any]] = []
    for num in map(int, filter(None, options.keys.split(","))):
        runs += stylize_folder(num, options.parent)
        print(json.dumps(runs[-2:]), file=sys.stderr, flush=True)
    for num in map(int, filter(None, options.planned.split(","))):
        command = [sys.executable, "-m", "benchmarks.stylize_scale", "--one", str(num)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=REPOSITORY)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    write_results(options.out, "stylize_scale", {"machine": facts, "runs": runs}, page(facts, runs))


if __name__ == "__main__":
    main()
