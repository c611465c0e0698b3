"""Temporary folders go with their process, or, if it was killed, with the next one that makes some."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from infra import scratch

HOLDER = """
import sys, time
from infra import scratch
with scratch.folder("nst-shard-", parent=sys.argv[1]) as folder:
    print(folder, flush=True)
    time.sleep(600)
"""


def test_a_folder_is_removed_at_the_end(tmp_path: Path) -> None:
    with scratch.folder("nst-shard-", parent=str(tmp_path)) as folder:
        Path(folder, "000000.tar").write_bytes(b"a shard")
        assert Path(folder).parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_uses_is_not(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        Path(left, "000000.tar").write_bytes(b"half a shard")
        os.utime(left / scratch.IN_USE, (0, 0))
        foreign = tmp_path / "nst-shard-of-somebody"  # nobody says that it is one of ours
        foreign.mkdir()
        with scratch.folder("nst-shard-", parent=str(tmp_path)):
            assert left.exists()
        process.kill()
        process.wait()
        with scratch.folder("nst-other-", parent=str(tmp_path)):
            assert left.exists()
        with scratch.folder("nst-shard-", parent=str(tmp_path)):
            assert not left.exists()
        assert list(tmp_path.iterdir()) == [foreign]
    finally:
        process.kill()
        process.communicate()
