"""`nst stylize` while store, disk, processes and machines fail: after the rerun the pictures are the bytes
of an undisturbed run, and the ledger has every input once in each style."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from infra import storage
from tests.bad_images import bad_files, encoded, picture
from tests.checkpoints import tiny_checkpoint
from tests.fault_proxy import Fault, Refusal, Request, fault_proxy, seeded
from tests.runs import SECONDS, Run, Start, bytes_below, command_line, starting, wait_until
from tests.servers import REPOSITORY, RayCluster, S3Server, ray_cluster

NUM_PICTURES, NUM_STYLES = 40, 2
CORRUPT = {"d0/07.jpg": "broken/cut.jpg", "d3/33.jpg": "broken/text.jpg"}  # 5 %
NUM_DONE, NUM_FAILED = (NUM_PICTURES - len(CORRUPT)) * NUM_STYLES, len(CORRUPT) * NUM_STYLES
WORKER = "StylizeWorker"

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Work:
    """What there is to do, and what comes of it: relative path -> bytes, in so many seconds."""

    source: Path
    options: tuple[str, ...]
    outputs: dict[str, bytes]
    seconds: float


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("work")
    source, styles, bad = folder / "source", folder / "styles", bad_files()
    styles.mkdir()
    for number in range(NUM_PICTURES):
        path = source / f"d{number // 10}" / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(480, 360, seed=number), "JPEG"))
    for path, kind in CORRUPT.items():
        (source / path).write_bytes(bad[kind][0])
    for name, rgb in zip(("pavilion", "dahlia"), load_sample_images().images, strict=True):
        Image.fromarray(rgb).resize((128, 96)).save(styles / f"{name}.jpg")
    options = ("--style", str(styles), "--model", tiny_checkpoint(folder / "model"), "--num-workers", "2")
    with starting("stylize", *options) as start:
        began = time.monotonic()
        run = start(source, folder / "out")
        result = run.result()
        seconds = time.monotonic() - began
        run.wait_for_ray()
    assert (result["done"], result["failed"]) == (NUM_DONE, NUM_FAILED)
    outputs = pictures_below(bytes_below(folder / "out"))
    assert len(outputs) == NUM_DONE
    return Work(source=source, options=options, outputs=outputs, seconds=seconds)


@pytest.fixture
def start(work: Work) -> Iterator[Start]:
    with starting("stylize", *work.options) as found:
        yield found


def pictures_below(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: data for path, data in files.items() if not path.startswith("_nst/")}


def assert_as_undisturbed(work: Work, files: dict[str, bytes], ledger_uri: str) -> None:
    """The pictures, nothing beside them (no temporary file, hidden ones neither), and the ledger."""
    pictures = pictures_below(files)
    assert sorted(pictures) == sorted(work.outputs)
    assert [path for path in pictures if pictures[path] != work.outputs[path]] == []
    beside = {path for path in files if path.startswith("_nst/")} - {"_nst/run.json", "_nst/gallery.html"}
    assert [path for path in beside if not path.endswith(".parquet")] == []
    rows = [
        row
        for part in storage.list_objects(ledger_uri, include_hidden=True)
        for row in pq.read_table(io.BytesIO(storage.read_bytes(part.uri))).to_pylist()
    ]
    assert max(Counter((row["key"], row["output"]) for row in rows).values()) == 1
    assert Counter(row["status"] for row in rows) == {"done": NUM_DONE, "failed": NUM_FAILED}
    assert {row["output"] for row in rows if row["status"] == "done"} == set(work.outputs)
    failed = Counter((row["key"], row["reason"]) for row in rows if row["status"] == "failed")
    assert failed == {(key, bad_files()[kind][1]): NUM_STYLES for key, kind in CORRUPT.items()}


# Processes and machines that die


@dataclass(frozen=True)
class Kill:
    """`victim` gets SIGKILL when so many pictures are there; below 0.2 while the run starts and lists."""

    victim: str
    moment: float

    def __str__(self) -> str:
        return f"{self.victim}-{self.moment:.2f}"

    def wait(self, run: Run, out: Path, work: Work) -> str:
        """Returns when the moment has come (or the run is over), and how far the run is then."""
        began = time.monotonic()

        def num_there() -> int:
            return sum(path.suffix == ".jpg" for path in out.rglob("*")) if out.is_dir() else 0

        def has_come() -> bool:
            if self.moment < 0.2:
                return time.monotonic() - began > self.moment / 0.2 * work.seconds / 2
            return num_there() >= (self.moment - 0.2) / 0.8 * NUM_DONE

        wait_until(lambda: has_come() or run.process.poll() is not None, "the moment does not come")
        return f"after {time.monotonic() - began:.2f} s with {num_there()} of {NUM_DONE} pictures"


def planned_kills(victim: str) -> list[Kill]:
    chance = random.Random(20230203875)
    victims = 5 * ["driver"] + 3 * ["worker"] + 2 * ["node"]
    # A driver dies at any moment, the others while they have work.
    moments = [chance.uniform(0, 1) if one == "driver" else chance.uniform(0.2, 0.8) for one in victims]
    return [Kill(one, moment) for one, moment in zip(victims, moments, strict=True) if one == victim]


@pytest.mark.parametrize("kill", planned_kills("driver"), ids=str)
def test_a_killed_program_is_gone_on_with(work: Work, tmp_path: Path, start: Start, kill: Kill) -> None:
    out = tmp_path / "out"
    run = start(work.source, out)
    when = kill.wait(run, out, work)
    run.process.kill()
    print(f"SIGKILL of the driver {when}: it ended with {run.wait()}")
    run.wait_for_ray()
    before = bytes_below(out) if out.exists() else {}
    whole = {path: data for path, data in pictures_below(before).items() if "/.nst-" not in f"/{path}"}
    assert whole.items() <= work.outputs.items()  # nothing half-written has its name
    again = start(work.source, out)
    result = again.result()
    assert result["done"] + result["done_before"] == NUM_DONE
    assert_as_undisturbed(work, bytes_below(out), f"{out}/_nst/ledger")
    again.wait_for_ray()
    again.assert_nothing_left()


@pytest.mark.parametrize("kill", planned_kills("worker"), ids=str)
def test_a_killed_worker_costs_nothing(work: Work, tmp_path: Path, start: Start, kill: Kill) -> None:
    out = tmp_path / "out"
    run = start(work.source, out)
    when = kill.wait(run, out, work)
    victims = run.workers(WORKER)
    assert victims, "the run was over before its worker could die"
    victims[0].kill()
    print(f"SIGKILL of worker {victims[0].pid} {when}")
    assert run.result()["done"] == NUM_DONE
    run.wait_for_ray()
    start(work.source, out).result()
    assert_as_undisturbed(work, bytes_below(out), f"{out}/_nst/ledger")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """Three nodes of one CPU: two may die."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("nodes")))
        with ray_cluster(3, cpus_per_worker=1) as cluster:
            yield cluster


@pytest.mark.parametrize("kill", planned_kills("node"), ids=str)
def test_a_killed_node_costs_nothing(
    work: Work, tmp_path: Path, start: Start, nodes: RayCluster, kill: Kill
) -> None:
    out = tmp_path / "out"
    run = start(work.source, out, **nodes.environment)
    when = kill.wait(run, out, work)
    busy = [
        node
        for node in nodes.workers
        if any(
            WORKER in command_line(process)
            for process in psutil.Process(node.process.pid).children(recursive=True)
        )
    ]
    assert busy, "the run was over before its node could die"
    nodes.kill_node(busy[0])
    print(f"SIGKILL of all processes of node {busy[0].address} {when}")
    assert run.result()["done"] == NUM_DONE
    start(work.source, out, **nodes.environment).result()
    assert_as_undisturbed(work, bytes_below(out), f"{out}/_nst/ledger")
    run.assert_nothing_left()


# A store that fails


def objects_below(uri: str) -> dict[str, bytes]:
    return {
        found.key: storage.read_bytes(found.uri) for found in storage.list_objects(uri, include_hidden=True)
    }


@pytest.fixture
def bucket(s3: S3Server, work: Work) -> str:
    uri = s3.create_bucket()
    storage.upload_dir(str(work.source), f"{uri}/source")
    return uri


def test_a_store_that_throttles_and_cuts_connections_costs_nothing(
    s3: S3Server, bucket: str, work: Work, start: Start
) -> None:
    kinds = (Fault.SLOW_DOWN, Fault.CUT_BEFORE, Fault.CUT_IN_BODY, Fault.LOST_ANSWER)
    with fault_proxy(s3, seeded(5, share=0.2, kinds=kinds)) as proxy:
        result = start(f"{bucket}/source", f"{bucket}/out", **proxy.environment).result()
    print(f"{dict(proxy.faults)} in {proxy.num_requests} requests")
    assert set(proxy.faults) == set(kinds)
    assert (result["done"], result["failed"]) == (NUM_DONE, NUM_FAILED)
    assert_as_undisturbed(work, objects_below(f"{bucket}/out"), f"{bucket}/out/_nst/ledger")


@pytest.mark.parametrize("refusal", list(Refusal), ids=lambda refusal: refusal.name.lower())
def test_a_store_that_takes_nothing_for_a_while(
    s3: S3Server, bucket: str, work: Work, start: Start, refusal: Refusal
) -> None:
    """It is full, or the credentials lose a right, when half of the pictures are there."""
    num_written = 0

    def script(request: Request) -> Refusal | None:
        nonlocal num_written
        if request.method != "PUT":
            return None
        num_written += 1
        return refusal if num_written > NUM_DONE // 2 else None

    with fault_proxy(s3, script) as proxy:
        run = start(f"{bucket}/source", f"{bucket}/out", **proxy.environment)
        code = run.wait()
        print(f"{refusal.name}: ended with {code} after {num_written} writes")
        assert_is_told(run, code)
        proxy.script = None
        go_on(start, f"{bucket}/source", f"{bucket}/out", **proxy.environment)
    assert_as_undisturbed(work, objects_below(f"{bucket}/out"), f"{bucket}/out/_nst/ledger")


def assert_is_told(run: Run, code: int) -> None:
    """A run that could not write everything does not say that all is well."""
    assert code in (0, 1, 2), run.output()
    assert code != 0 or '"failed": 0' not in run.answer.read_text()
    assert "Traceback" not in run.output(), run.output()


def go_on(start: Start, source: object, out: object, **environment: str) -> None:
    """As a person would: the same command, and then what failed."""
    start(source, out, **environment).wait()
    start(source, out, "--retry-failed", **environment).wait()


# A disk without room


def test_a_full_disk(work: Work, tmp_path: Path) -> None:
    """OUT is a file system of half the size that is needed, which grows between the runs. It is mounted in a
    name space of the test's own, which needs no root, and is gone with its last process."""
    out, copy, log = tmp_path / "out", tmp_path / "copy", tmp_path / "log"
    out.mkdir()
    num_kib = sum(map(len, work.outputs.values())) // 2 // 1024
    command = [sys.executable, "-m", "pipelines.cli", "stylize", str(work.source), str(out), *work.options]
    steps = [
        f"mount -t tmpfs -o size={num_kib}k nst {out} || exit 77",
        f"{shlex.join(command)}; echo ended with $? at $(df --output=avail {out} | tail -1) KiB left",
        f"mount -o remount,size=64m {out}",
        shlex.join(command),
        f"{shlex.join(command)} --retry-failed",
        f"cp -a {out}/. {copy}",
    ]
    scratch = Path("/tmp") / f"nst-full-{os.getpid()}"  # short: Ray's sockets lie in it
    scratch.mkdir()
    settings = {"TMPDIR": str(scratch), "RAY_TMPDIR": str(scratch), "RAY_AUTH_MODE": "token"}
    try:
        with log.open("wb") as output:
            done = subprocess.run(
                ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", "\n".join(steps)],
                cwd=REPOSITORY,
                env={**os.environ, **settings},
                stdout=output,
                stderr=output,
                timeout=2 * SECONDS,
                check=False,
            )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    told = log.read_text(errors="replace")
    if "unshare failed" in told or done.returncode == 77:
        pytest.skip(f"this machine lets nobody mount a file system: {told.splitlines()[-1]}")
    print(next(line for line in told.splitlines() if line.startswith("ended with")))
    assert "No space left on device" in told, told
    assert "Traceback" not in told, told
    assert_as_undisturbed(work, bytes_below(copy), f"{copy}/_nst/ledger")


def test_two_runs_at_once_do_each_other_no_harm(work: Work, tmp_path: Path, start: Start) -> None:
    """The same command twice, one of which is killed in the middle of the other."""
    out = tmp_path / "out"
    first, second = start(work.source, out), start(work.source, out)
    wait_until(lambda: len(list(out.rglob("*.jpg"))) >= NUM_DONE // 3, "no pictures")
    with contextlib.suppress(ProcessLookupError):
        first.process.send_signal(signal.SIGKILL)
    print(f"the two ended with {first.wait()} and {second.wait()}")
    second.result()
    start(work.source, out).result()
    assert_as_undisturbed(work, bytes_below(out), f"{out}/_nst/ledger")
