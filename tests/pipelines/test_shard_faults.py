"""`nst shard` while its store, processes and machines fail: nothing is lost, doubled or left behind."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra import local_node, storage
from nst.corpus import Corpus
from tests.bad_images import encoded, picture
from tests.fault_proxy import Fault, Request, fault_proxy, seeded
from tests.runs import Run, Start, bytes_below, command_line, starting, wait_until
from tests.servers import RayCluster, S3Server, ray_cluster


def add_pictures(folder: Path, label: str, numbers: range, size: tuple[int, int]) -> None:
    (folder / label).mkdir(parents=True, exist_ok=True)
    for number in numbers:
        image = picture(*size, seed=number)
        (folder / label / f"{number:04d}.jpg").write_bytes(encoded(image, "JPEG", quality=95))


def sharding() -> contextlib.AbstractContextManager[Start]:
    return starting("shard", "--role", "style", "--size", "64", "--dedupe")


@pytest.fixture
def start() -> Iterator[Start]:
    with sharding() as found:
        yield found


# A store that fails


@pytest.fixture
def bucket(store: S3Server) -> str:
    return store.create_bucket()


@pytest.fixture
def uploaded(bucket: str, s3: S3Server, tmp_path: Path) -> str:
    """150 pictures in a bucket, in three shards' worth; some of them twice, one that is none."""
    add_pictures(tmp_path / "source", "monet", range(100), (40, 30))
    add_pictures(tmp_path / "source", "klimt", range(60, 110), (40, 30))
    (tmp_path / "source/klimt/broken.jpg").write_bytes(b"no picture")
    storage.upload_dir(str(tmp_path / "source"), f"{bucket}/source")
    return f"{bucket}/source"


def objects_below(uri: str) -> dict[str, bytes]:
    return {
        found.key: storage.read_bytes(found.uri) for found in storage.list_objects(uri, include_hidden=True)
    }


@pytest.mark.faults
def test_a_store_that_fails_now_and_then_costs_nothing(
    s3: S3Server, bucket: str, uploaded: str, tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = start(uploaded, f"{bucket}/plain").result()
    assert (result["num_samples"], result["failures"]) == (110, {"duplicate": 40, "not_an_image": 1})
    with fault_proxy(s3, seeded(3, share=0.2)) as proxy:
        start(uploaded, f"{bucket}/faulty", **proxy.environment).result()
        assert set(proxy.faults) == set(Fault), proxy.faults
        assert objects_below(f"{bucket}/faulty") == objects_below(f"{bucket}/plain")
        proxy.seen.clear()
        for variable, value in proxy.environment.items():
            monkeypatch.setenv(variable, value)
        proxy.script = seeded(4, share=0.5)
        objects = storage.ObjectStorage()
        faulty = Corpus.open(f"{bucket}/faulty", storage=objects, cache_dir=str(tmp_path / "faulty"))
        read = [faulty.read(row) for row in range(len(faulty))]
        proxy.script = None
        plain = Corpus.open(f"{bucket}/plain", storage=objects, cache_dir=str(tmp_path / "plain"))
        assert read == [plain.read(row) for row in range(len(plain))]


@pytest.mark.faults
def test_a_store_that_takes_nothing_more_fails_the_run_which_is_gone_on_with(
    s3: S3Server, bucket: str, uploaded: str, start: Start
) -> None:
    """One shard is there when the store begins to refuse all writing."""
    start(uploaded, f"{bucket}/plain").result()

    def full(request: Request) -> Fault | None:
        is_put = request.method in ("PUT", "POST") and not request.target.endswith(
            ("000000.tar", "000000.parquet")
        )
        return Fault.SLOW_DOWN if is_put else None

    with fault_proxy(s3, full) as proxy:
        began = time.monotonic()
        run = start(
            uploaded, f"{bucket}/corpus", "--workers", 1, **proxy.environment, NST_STORE_PATIENCE_S="15"
        )
        assert run.wait() == 1, run.output()
        print(f"failed after {time.monotonic() - began:.0f} s, {proxy.num_requests} requests")
        message = next(line for line in run.output().splitlines() if line.startswith("nst shard:"))
        assert "503" in message
        assert "000001" in message
        assert not storage.exists(f"{bucket}/corpus/corpus.json")
        proxy.script = None
        result = start(uploaded, f"{bucket}/corpus", **proxy.environment)
        result.result()
        assert "1 of 2 shards were there already" in result.output()
    assert objects_below(f"{bucket}/corpus") == objects_below(f"{bucket}/plain")


# Processes and machines that die


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """520 different pictures in eight shards' worth, 30 of them twice, and one file that is none."""
    folder = tmp_path_factory.mktemp("source")
    for number, label in enumerate(("hokusai", "klimt", "monet", "turner")):
        add_pictures(folder, label, range(130 * number, 130 * (number + 1)), (320, 240))
    add_pictures(folder, "vangogh", range(30), (320, 240))
    (folder / "klimt/broken.jpg").write_bytes(b"no picture")
    return folder


@dataclass(frozen=True)
class Case:
    """A run to disturb: what is at CORPUS before, what an undisturbed run makes of it, and in which time."""

    before: Path | None
    after: dict[str, bytes]
    seconds: float

    def prepare(self, corpus: Path) -> None:
        if self.before is not None:
            shutil.copytree(self.before, corpus)


@pytest.fixture(scope="module")
def new(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    corpus = tmp_path_factory.mktemp("new") / "corpus"
    with sharding() as start:
        began = time.monotonic()
        result = start(source, corpus, "--workers", 2).result()
        seconds = time.monotonic() - began
    assert (result["num_samples"], result["num_shards"]) == (520, 8)
    assert result["failures"] == {"duplicate": 30, "not_an_image": 1}
    return Case(before=None, after=bytes_below(corpus), seconds=seconds)


@pytest.fixture(scope="module")
def growing(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The corpus of half of the pictures gets the other half."""
    folder = tmp_path_factory.mktemp("growing")
    shutil.copytree(source, folder / "half", ignore=shutil.ignore_patterns("monet", "turner", "vangogh"))
    with sharding() as start:
        start(folder / "half", folder / "before").result()
        shutil.copytree(folder / "before", folder / "after")
        began = time.monotonic()
        result = start(source, folder / "after", "--workers", 2).result()
        seconds = time.monotonic() - began
    assert (result["num_samples"], result["num_new_samples"]) == (520, 260)
    return Case(before=folder / "before", after=bytes_below(folder / "after"), seconds=seconds)


@dataclass(frozen=True)
class Kill:
    """`victim` gets the signal `number` when the run has come to `moment`: below 0.2 while it starts and
    lists, then as the shards appear, at 1 when the first of the files appears that say what they hold."""

    victim: str
    number: signal.Signals
    moment: float
    is_growing: bool = False

    def __str__(self) -> str:
        return f"{self.victim}-{self.number.name}-{'growing' if self.is_growing else 'new'}-{self.moment:.2f}"

    def wait(self, run: Run, corpus: Path, case: Case) -> str:
        """Returns when the moment has come (or the run is over), and how far the run is then."""
        began = time.monotonic()
        before = set(bytes_below(case.before)) if case.before else set()
        num_shard_files = sum(name.startswith("shards/") for name in set(case.after) - before)

        def appeared() -> list[str]:
            paths = (path for path in corpus.rglob("*") if path.is_file())
            return [name for name in (str(path.relative_to(corpus)) for path in paths) if name not in before]

        def has_come() -> bool:
            if self.moment < 0.2:
                return time.monotonic() - began > self.moment / 0.2 * case.seconds / 2
            if self.moment >= 1:
                return any(not name.startswith("shards/") for name in appeared())
            return len(appeared()) >= (self.moment - 0.2) / 0.8 * num_shard_files

        wait_until(lambda: has_come() or run.process.poll() is not None, "the moment does not come")
        return f"after {time.monotonic() - began:.2f} s with {len(appeared())} of {num_shard_files} new files"


def planned_kills() -> list[Kill]:
    chance = random.Random(20230203875)
    kills = [
        *(("driver", signal.SIGKILL, is_growing) for is_growing in (False, True) * 3),
        *(
            ("driver", number, is_growing)
            for number in (signal.SIGINT, signal.SIGTERM)
            for is_growing in (0, 0, 1)
        ),
        *(("worker", signal.SIGKILL, is_growing) for is_growing in (0, 0, 0, 1, 1)),
        *(("node", signal.SIGKILL, False) for _ in range(3)),
    ]
    moments = [chance.uniform(0.0, 1.0) for _ in kills]
    moments[:2] = [1.0, 1.0]  # two at the narrowest place
    return [
        Kill(
            victim=victim,
            number=number,
            moment=moment if victim == "driver" else 0.2 + 0.4 * moment,  # while shards are being written
            is_growing=bool(is_growing),
        )
        for (victim, number, is_growing), moment in zip(kills, moments, strict=True)
    ]


@pytest.mark.faults
@pytest.mark.parametrize("kill", [kill for kill in planned_kills() if kill.victim == "driver"], ids=str)
def test_a_killed_program_is_gone_on_with(
    source: Path, new: Case, growing: Case, tmp_path: Path, start: Start, kill: Kill
) -> None:
    case, corpus = growing if kill.is_growing else new, tmp_path / "corpus"
    case.prepare(corpus)
    run = start(source, corpus, "--workers", 2)
    when = kill.wait(run, corpus, case)
    run.process.send_signal(kill.number)
    code = run.wait()
    print(f"{kill.number.name} of the driver {when}: it ended with {code}")
    if kill.number == signal.SIGKILL:
        assert code in (0, -signal.SIGKILL)
    else:
        # A program that has not begun its work knows nothing of signals.
        assert code in (0, 130) or (code == -kill.number and kill.moment < 0.2), run.output()
        assert code != 130 or "the same command goes on from here" in run.output()
        run.assert_nothing_left()
    run.wait_for_ray()
    again = start(source, corpus, "--workers", 1)
    again.result()
    assert bytes_below(corpus) == case.after
    again.assert_nothing_left()
    again.wait_for_ray()


@pytest.mark.faults
@pytest.mark.parametrize("kill", [kill for kill in planned_kills() if kill.victim == "worker"], ids=str)
def test_a_killed_worker_costs_nothing(
    source: Path, new: Case, growing: Case, tmp_path: Path, start: Start, kill: Kill
) -> None:
    case, corpus = growing if kill.is_growing else new, tmp_path / "corpus"
    case.prepare(corpus)
    run = start(source, corpus, "--workers", 2)
    when = kill.wait(run, corpus, case)
    wait_until(lambda: run.workers("write_one"), "no worker writes a shard")
    victim = run.workers("write_one")[0]
    victim.kill()
    print(f"SIGKILL of worker {victim.pid} {when}")
    result = run.result()
    assert result["num_samples"] == 520
    assert bytes_below(corpus) == case.after
    run.assert_nothing_left()
    run.wait_for_ray()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """Four nodes of one CPU: three may die."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("nodes")))
        with ray_cluster(4, cpus_per_worker=1) as cluster:
            yield cluster


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kill", [kill for kill in planned_kills() if kill.victim == "node"], ids=str)
def test_a_killed_node_costs_nothing(
    source: Path, new: Case, tmp_path: Path, start: Start, nodes: RayCluster, kill: Kill
) -> None:
    corpus = tmp_path / "corpus"
    run = start(source, corpus, "--workers", 4, **nodes.environment)
    when = kill.wait(run, corpus, new)
    busy: list[local_node.Node] = []

    def find_busy() -> bool:
        for node in nodes.workers:
            if any("write_one" in command_line(process) for process in local_node.processes_of(node)):
                busy.append(node)
        return bool(busy)

    wait_until(find_busy, "no node writes a shard")
    nodes.kill_node(busy[0])
    print(f"SIGKILL of all processes of {busy[0].address} {when}")
    result = run.result()
    assert result["num_samples"] == 520
    assert bytes_below(corpus) == new.after
    run.assert_nothing_left()


@pytest.mark.faults
@pytest.mark.parametrize("is_growing", [False, True], ids=["new", "growing"])
def test_two_runs_at_once_make_one_corpus(
    source: Path, new: Case, growing: Case, tmp_path: Path, start: Start, is_growing: bool
) -> None:
    """The same command twice, the second a little behind the first."""
    case, corpus = growing if is_growing else new, tmp_path / "corpus"
    case.prepare(corpus)
    first = start(source, corpus, "--workers", 1)
    time.sleep(0.5)
    second = start(source, corpus, "--workers", 1)
    codes = [first.wait(), second.wait()]
    print(f"the two ended with {codes}")
    assert 0 in codes
    for run, code in zip((first, second), codes, strict=True):
        assert code == 0 or "run again" in run.output(), run.output()
    start(source, corpus).result()
    assert bytes_below(corpus) == case.after


@pytest.mark.faults
def test_a_run_that_is_killed_is_gone_on_with_by_more_workers(tmp_path: Path, start: Start) -> None:
    folder, corpus = tmp_path / "source", tmp_path / "corpus"
    add_pictures(folder, "monet", range(130), (64, 48))
    start(folder, tmp_path / "plain", "--workers", 1).result()
    run = start(folder, corpus, "--workers", 2)
    wait_until(lambda: list(corpus.glob("shards/*.parquet")) or run.process.poll() is not None, "no shard")
    run.process.kill()
    run.wait()
    run.wait_for_ray()
    again = start(folder, corpus, "--workers", 4)
    again.result()
    assert bytes_below(corpus) == bytes_below(tmp_path / "plain")
    again.assert_nothing_left()
