"""What is queued is delivered once and in order, whatever becomes of the other side, the process or disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from infra import spool
from infra.journal import Entry
from infra.outbox import Outbox

REPOSITORY = Path(__file__).parent.parent.parent


class Receiver:
    """The other side: away until told otherwise."""

    def __init__(self) -> None:
        self.is_away = threading.Event()
        self.is_away.set()
        self.received: list[tuple[object, bytes | None]] = []
        self.groups: list[int] = []

    def deliver(self, kind: str, entries: list[Entry]) -> None:
        if self.is_away.is_set():
            raise ConnectionError("away")
        self.groups.append(len(entries))
        self.received += [(entry.payload, entry.attachment) for entry in entries]

    @property
    def payloads(self) -> list[object]:
        return [payload for payload, _ in self.received]


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


def test_order_and_bounds(receiver: Receiver, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(1001))
    outbox = Outbox("there", receiver.deliver, str, path=tmp_path / "q", max_entries=50, max_bytes=1000)
    taken = [outbox.put("number", number) for number in range(60)]
    assert taken == [True] * 50 + [False] * 10, "a full buffer refuses the newest"
    assert outbox.put("status", "done", beyond_bounds=True)
    assert not outbox.flush(0.1)
    receiver.is_away.clear()
    assert outbox.flush(10)
    assert not outbox.put("number", 99, large)
    assert outbox.put("number", 50)
    lost, kept = outbox.close(10)
    assert (lost, kept) == ({"number": 11}, {})
    assert receiver.payloads == [*range(50), "done", 50]
    assert caplog.text.count("records are kept") == 1
    assert caplog.text.count("buffer is full") == 1


def test_what_is_not_delivered_waits_for_the_next_one(receiver: Receiver, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"as it is now")

    def outbox() -> Outbox:
        return Outbox("there", receiver.deliver, str, path=tmp_path / "q", grouped_kinds=("a",))

    first = outbox()
    first.put("a", 1, file)
    first.put("b", {"x": float("inf"), "y": [None, "ü"]})
    file.write_bytes(b"changed")
    assert first.close(0.1) == ({}, {"a": 1, "b": 1})
    second = outbox()
    second.put("b", 3)
    second.put("a", 4)
    second.put("a", 5)
    assert second.close(0.1) == ({}, {"a": 3, "b": 2})
    receiver.is_away.clear()
    third = outbox()
    assert third.close(10) == ({}, {})
    assert receiver.payloads == [1, {"x": float("inf"), "y": [None, "ü"]}, 3, 4, 5]
    assert receiver.received[0] == (1, b"as it is now")
    assert receiver.groups == [1, 1, 1, 2]
    assert outbox().close(10) == ({}, {}), "and nothing twice"
    assert len(receiver.received) == 5


def test_another_queue_is_taken_up(receiver: Receiver, tmp_path: Path) -> None:
    left = Outbox("left", receiver.deliver, str, path=tmp_path / "left")
    left.put("a", 1)
    left.put("a", 2)
    left.close(0.1)
    receiver.is_away.clear()
    outbox = Outbox("there", receiver.deliver, str, path=tmp_path / "q")
    assert outbox.adopt(tmp_path / "left")
    outbox.put("a", 3)
    assert outbox.close(10) == ({}, {})
    assert receiver.payloads == [1, 2, 3]


def test_a_refused_record_takes_no_neighbour_with_it(receiver: Receiver, tmp_path: Path) -> None:
    def deliver(kind: str, entries: list[Entry]) -> None:
        if any(entry.payload == 2 for entry in entries) and not receiver.is_away.is_set():
            raise ValueError("2 is not wanted")
        receiver.deliver(kind, entries)

    outbox = Outbox(
        *("there", deliver, lambda error: None if isinstance(error, ValueError) else str(error)),
        path=tmp_path / "q",
        grouped_kinds=("number",),
    )
    for number in range(5):
        outbox.put("number", number)
    receiver.is_away.clear()
    assert outbox.close(10) == ({"number": 1}, {})
    assert receiver.payloads == [0, 1, 3, 4]


def in_another_process(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


FILL_UNTIL_KILLED = """
import itertools, pathlib, sys
from infra.outbox import Outbox

def deliver(kind, entries):
    raise ConnectionError("away")

outbox = Outbox("there", deliver, str, path=pathlib.Path(sys.argv[1]))
for number in itertools.count():
    assert outbox.put("number", number)
    if number % 50 == 0:
        print(number, flush=True)
"""


def test_a_kill_loses_nothing_that_was_put(receiver: Receiver, tmp_path: Path) -> None:
    process = in_another_process(FILL_UNTIL_KILLED, str(tmp_path / "q"))
    assert process.stdout
    for line in process.stdout:
        last = int(line)
        if last >= 500:
            break
    process.kill()
    process.communicate(timeout=30)
    receiver.is_away.clear()
    assert Outbox("there", receiver.deliver, str, path=tmp_path / "q").close(10) == ({}, {})
    assert receiver.payloads == list(range(len(receiver.payloads)))
    assert len(receiver.payloads) > last


FILL_THE_DISK = """
import contextlib, json, logging, pathlib, resource, sys
from infra.outbox import Outbox

def deliver(kind, entries):
    if is_away:
        raise ConnectionError("away")
    delivered.extend(int(entry.payload.split()[0]) for entry in entries)

logging.basicConfig(level="WARNING")
is_away, delivered = True, []
outbox = Outbox("there", deliver, str, path=pathlib.Path(sys.argv[1]))
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), limits[1]))
taken = [outbox.put("text", f"{number} {'x' * 1000}") for number in range(1000)]
with contextlib.suppress(OSError), pathlib.Path(sys.argv[1] + "-other").open("wb", buffering=0) as other:
    while True:
        other.write(bytes(4096))
is_away = False
assert outbox.flush(20)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
taken.append(outbox.put("text", "1000"))
lost, kept = outbox.close(10)
print(json.dumps([taken, delivered, lost, kept]))
"""


def check_full_disk(process: subprocess.Popen[str]) -> None:
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    taken, delivered, lost, kept = json.loads(output)
    assert (taken[0], taken[-2], taken[-1]) == (True, False, True), "room, none, room again"
    assert delivered == [number for number, is_taken in enumerate(taken) if is_taken]
    assert (lost, kept) == ({"text": taken.count(False)}, {})
    assert errors.count("records are dropped") == 1


def test_a_full_disk_is_told_once_and_stops_nobody(receiver: Receiver, tmp_path: Path) -> None:
    """A process whose files may not grow beyond 500 kB: writing fails as it does on a full disk."""
    check_full_disk(in_another_process(FILL_THE_DISK, str(tmp_path / "q"), "500000"))
    receiver.is_away.clear()
    Outbox("there", receiver.deliver, str, path=tmp_path / "q").close(10)
    assert not receiver.received


def test_a_disk_without_room_to_remove_anything(tmp_path: Path) -> None:
    """A file system of 500 kB."""
    private = ["unshare", "--mount", "--map-root-user", "sh", "-euc"]
    mount = f"mount -t tmpfs -o size=500k none {tmp_path}"
    if shutil.which("unshare") is None or subprocess.run([*private, mount], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system for one process")
    command = [*private, f'{mount}; exec "$@"', "sh", sys.executable, "-c", FILL_THE_DISK, f"{tmp_path}/q"]
    check_full_disk(
        subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    )


def test_a_damaged_file_and_no_place_for_one(
    receiver: Receiver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = tmp_path / "damaged"
    damaged.write_bytes(os.urandom(5000))
    for path, text in ((damaged, "damaged"), (tmp_path / "nowhere" / "q", "will be lost")):
        outbox = Outbox("there", receiver.deliver, str, path=path)
        assert outbox.put("a", 1)
        lost, kept = outbox.close(0.1)
        assert lost + kept == {"a": 1}
        assert bool(kept) == (path == damaged)
        assert text in caplog.text


@pytest.fixture
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


CLAIM = """
import sys, time
from infra import spool

print(spool.claim("nst-test-run").path.name, flush=True)
time.sleep(60)
"""


def test_a_folder_belongs_to_one_living_process(temporary_folder: Path) -> None:
    process = in_another_process(CLAIM)
    assert process.stdout
    assert process.stdout.readline().strip() == "nst-test-run"
    (temporary_folder / "nst-test-run" / "left").touch()
    other_run = spool.claim("nst-test-run1")
    second = spool.claim("nst-test-run")
    assert second.path.name == "nst-test-run-2"
    assert not list(spool.abandoned("nst-test-run"))
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    (found,) = spool.abandoned("nst-test-run")
    assert (found.path / "left").exists()
    found.release()
    first = spool.claim("nst-test-run")
    assert first.path == found.path, "what it left is found by whoever comes next"
    for folder in (first, second, other_run):
        folder.remove()
    assert not list(temporary_folder.iterdir())


def test_folders_that_nobody_came_back_for_go_after_some_days(temporary_folder: Path) -> None:
    def folder(name: str, days: float) -> spool.Spool:
        made = spool.claim(name)
        (made.path / "q").touch()
        then = time.time() - days * 86400
        for path in (made.path / "q", made.path):
            os.utime(path, (then, then))
        return made

    folder("nst-test-old", 8).release()
    folder("nst-test-young", 6).release()
    folder("nst-else-old", 8).release()
    in_use = folder("nst-test-in-use", 8)
    spool.remove_old("nst-test-")
    names = sorted(path.name for path in temporary_folder.iterdir())
    assert names == ["nst-else-old", "nst-test-in-use", "nst-test-young"]
    in_use.remove()


def test_what_is_not_ours_is_left_alone(temporary_folder: Path) -> None:
    (temporary_folder / "elsewhere").mkdir()
    (temporary_folder / "nst-test-run").symlink_to("elsewhere")
    (temporary_folder / "nst-test-run-2").touch()
    claimed = spool.claim("nst-test-run")
    assert claimed.path.name == "nst-test-run-3"
    assert claimed.path.stat().st_mode & 0o777 == 0o700
    claimed.remove()
