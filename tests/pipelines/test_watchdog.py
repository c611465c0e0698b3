"""A rank that hangs says so and ends; one that works, or has ended its work, does not."""

from __future__ import annotations

import subprocess
import sys

from pipelines.watchdog import EXIT_CODE
from tests.servers import REPOSITORY

PROGRAM = """
import sys, time
from pipelines.watchdog import Watchdog

with Watchdog(0.5, lambda text: print(text, flush=True)) as watchdog:
    for _ in range(10):
        watchdog.beat()
        time.sleep(0.1)
    if sys.argv[1] == "hang":
        time.sleep(60)
time.sleep(2)
print("done", flush=True)
"""


def run(kind: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, kind]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=50, check=False)


def test_a_rank_that_hangs_is_ended() -> None:
    ended = run("hang")
    assert ended.returncode == EXIT_CODE, ended.stderr
    assert ended.stdout == "no step in 0.5 s (--hang-timeout)\n"
    assert 'File "<string>", line 10' in ended.stderr  # where it hung


def test_one_that_works_is_left_alone() -> None:
    ended = run("work")
    assert (ended.returncode, ended.stdout) == (0, "done\n")
