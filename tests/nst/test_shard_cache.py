"""The cache of remote shards: bounded, shared by processes that come, go and are killed, and always right."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from pathlib import Path

import pytest

from nst.corpus import Corpus, CorpusError, LocalStorage
from nst.shard_cache import CacheError, ShardCache
from nst.verified_files import VerifiedFiles

NUM_FILES, NUM_BYTES = 6, 40_000
FORK = multiprocessing.get_context("fork")


class FarStorage(LocalStorage):
    """Serves the folder `root` under far://store; counts what is fetched."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fetched: list[str] = []

    def download_file(self, uri: str, path: str) -> None:
        self.fetched.append(Path(uri).name)
        super().download_file(str(self.root / uri.removeprefix("far://store/")), path)


class StuckStorage(FarStorage):
    """Writes half a file and then waits for ever."""

    def download_file(self, uri: str, path: str) -> None:
        Path(path).write_bytes(b"half")
        Path(f"{path}.tmp").write_bytes(b"what a storage keeps beside it")
        time.sleep(600)


class Far:
    """A remote folder of files `0.tar` to `5.tar`, and a cache of it."""

    def __init__(self, folder: Path) -> None:
        self.root, self.cache_dir = folder / "far", folder / "cache"
        self.root.mkdir()
        self.data = {f"{n}.tar": random.Random(n).randbytes(NUM_BYTES + n) for n in range(NUM_FILES)}
        for name, data in self.data.items():
            (self.root / name).write_bytes(data)

    def files(self, max_bytes: int | None, storage: FarStorage | None = None) -> VerifiedFiles:
        return VerifiedFiles(
            "far://store", storage or FarStorage(self.root), ShardCache(str(self.cache_dir), max_bytes)
        )

    def read(self, files: VerifiedFiles, number: int) -> bytes:
        data = self.data[f"{number}.tar"]
        descriptor = files.open(f"{number}.tar", num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        with os.fdopen(descriptor, "rb") as file:
            file.seek(0)
            return file.read()

    def cached(self) -> set[int]:
        names = {hashlib.sha256(data).hexdigest(): int(name[0]) for name, data in self.data.items()}
        return {names[path.stem] for path in self.cache_dir.glob("??/*.tar")}

    def set_last_use(self, number: int, seconds_ago: float) -> None:
        name = hashlib.sha256(self.data[f"{number}.tar"]).hexdigest()
        path = self.cache_dir / name[:2] / f"{name}.tar"
        os.utime(path, ns=(time.time_ns() - int(seconds_ago * 1e9), path.stat().st_mtime_ns))

    def incoming(self) -> list[Path]:
        return list(self.cache_dir.glob("incoming/*"))


@pytest.fixture
def far(tmp_path: Path) -> Far:
    return Far(tmp_path)


def test_the_least_recently_used_files_go_when_room_is_needed(far: Far) -> None:
    files = far.files(3 * NUM_BYTES + 100)
    for number in range(3):
        assert far.read(files, number) == far.data[f"{number}.tar"]
    assert far.cached() == {0, 1, 2}
    for number in range(3):
        far.set_last_use(number, 60 - number)  # 0 is the oldest
    far.read(files, 0)
    far.read(files, 3)
    assert far.cached() == {0, 2, 3}
    assert files.storage.fetched == ["0.tar", "1.tar", "2.tar", "3.tar"]  # pyright: ignore
    assert far.read(files, 1) == far.data["1.tar"], "what has gone is fetched again"
    assert far.incoming() == []


def test_a_file_that_is_larger_than_the_cache_is_read_all_the_same(far: Far) -> None:
    files = far.files(1)
    for number in (0, 1, 0):
        assert far.read(files, number) == far.data[f"{number}.tar"]
    assert far.cached() == {0}


def test_a_file_that_goes_while_it_is_open_stays_readable(far: Far) -> None:
    files, data = far.files(1), far.data["0.tar"]
    descriptor = files.open("0.tar", num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    far.read(files, 1)
    assert far.cached() == {1}
    assert os.pread(descriptor, 100, 1000) == data[1000:1100]
    os.close(descriptor)


def test_the_limit_comes_from_the_environment_or_the_free_disk(
    far: Far, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NST_CACHE_GB", "0.00009")
    files = far.files(None)
    for number in range(NUM_FILES):
        far.read(files, number)
    assert far.cached() == {4, 5}
    monkeypatch.delenv("NST_CACHE_GB")
    assert 1_000_000 < ShardCache(str(far.cache_dir)).limit() < 2**60
    for wrong in ("much", "-1", "0", "inf", "nan"):
        monkeypatch.setenv("NST_CACHE_GB", wrong)
        with pytest.raises(ValueError, match=rf"NST_CACHE_GB is '{wrong}'; give gigabytes"):
            ShardCache(str(far.cache_dir))


def test_what_is_missing_or_damaged_far_away_is_named_and_not_kept(far: Far) -> None:
    files = far.files(None)
    (far.root / "1.tar").unlink()
    (far.root / "2.tar").write_bytes(b"x" * (NUM_BYTES + 2))
    with pytest.raises(CorpusError, match=r"far://store/1\.tar is missing"):
        far.read(files, 1)
    with pytest.raises(CorpusError, match=r"far://store/2\.tar is altered"):
        far.read(files, 2)
    assert far.cached() == set()
    assert far.incoming() == []


def test_a_cache_that_cannot_be_written_to_is_one_clear_error(far: Far) -> None:
    far.cache_dir.write_text("a file where the folder should be")
    with pytest.raises(CacheError, match=rf"cache of shards in {far.cache_dir} takes nothing: .*TMPDIR"):
        far.read(far.files(None), 0)


def _read_on_a_full_disk(far: Far, sender) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (NUM_BYTES, NUM_BYTES))  # what is longer, the system refuses
    try:
        far.read(far.files(None), 3)
    except OSError as error:
        sender.send((type(error).__name__, str(error), far.incoming()))


def test_a_disk_that_takes_no_more_is_one_clear_error_and_leaves_nothing(far: Far) -> None:
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=_read_on_a_full_disk, args=(far, sender))
    child.start()
    assert receiver.poll(30)
    name, text, left = receiver.recv()
    child.join(30)
    assert name == "CacheError"
    assert str(far.cache_dir) in text
    assert "NST_CACHE_GB" in text
    assert left == []
    assert far.cached() == set()


def _get_stuck(far: Far, number: int) -> None:
    far.read(far.files(None, StuckStorage(far.root)), number)


def test_what_a_killed_process_was_fetching_is_fetched_and_cleaned_up_by_the_next(far: Far) -> None:
    children = [FORK.Process(target=_get_stuck, args=(far, number)) for number in (0, 1)]
    for child in children:
        child.start()
    deadline = time.monotonic() + 30
    while len(list(far.cache_dir.glob("incoming/*/*.tmp"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(far.incoming()) == 2
    # the size of what is being fetched counts: there is room for one more beside the two
    files = far.files(3 * NUM_BYTES + 100)
    far.read(files, 2)
    far.read(files, 3)
    assert far.cached() == {3}
    for child in children:
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join(30)
    assert far.read(files, 0) == far.data["0.tar"]
    assert far.incoming() == []
    assert far.cached() == {3, 0}


def _read_at_random(far: Far, seed: int, sender) -> None:
    draw, files = random.Random(seed), far.files(2 * NUM_BYTES + 10)
    wrong = 0
    for _ in range(60):
        number = draw.randrange(NUM_FILES)
        wrong += far.read(files, number) != far.data[f"{number}.tar"]
    sender.send(wrong)


def test_processes_that_take_each_others_room_all_read_what_is_right(far: Far) -> None:
    receiver, sender = FORK.Pipe(duplex=False)
    children = [FORK.Process(target=_read_at_random, args=(far, seed, sender)) for seed in range(4)]
    for child in children:
        child.start()
    for _ in children:
        assert receiver.poll(60)
        assert receiver.recv() == 0
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    assert len(far.cached()) <= 2
    assert far.incoming() == []


def test_threads_that_want_one_file_fetch_it_once(far: Far) -> None:
    files = far.files(None)
    threads = [threading.Thread(target=far.read, args=(files, 0)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert files.storage.fetched == ["0.tar"]  # pyright: ignore[reportAttributeAccessIssue]


def test_a_corpus_larger_than_the_cache_is_read_whole(corpora: tuple[Corpus, Corpus], tmp_path: Path) -> None:
    local = corpora[0]

    class Corpora(FarStorage):
        def read_bytes(self, uri: str) -> bytes:
            return super().read_bytes(str(self.root / uri.removeprefix("far://store/")))

    remote = Corpus.open(
        "far://store", storage=Corpora(Path(local.uri)), cache_dir=str(tmp_path), cache_bytes=1
    )
    assert [remote.read(row) for row in range(len(remote))] == [local.read(row) for row in range(len(local))]
