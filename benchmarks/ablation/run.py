"""Trains every variant with every seed: one process of one thread each, some at a time, each with a log.

What is finished is not trained again, and what was cut off goes on from its checkpoint. All variants of a
seed come before the next seed, so that an early end leaves whole comparisons."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.ablation.corpora import Corpora
from benchmarks.ablation.variants import DEFAULT_VARIANTS, Variant, assignments, resolve
from nst.checkpoint import STATE_FILE, read_config
from nst.config import TrainConfig
from nst.standalone import find_checkpoint

ROOT = Path(__file__).parents[2]
METRICS_FILE, RECORD_FILE, LOG_FILE, LOCK_FILE = "metrics.jsonl", "run.json", "train.log", "lock"
SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_LOOKS = 0.5

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Run:
    """One training: `folder` holds its checkpoint, metrics, log and record."""

    variant: Variant
    seed: int
    num_images: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.variant.name}/seed{self.seed}"

    @property
    def config(self) -> TrainConfig:
        return resolve(self.variant, self.seed, self.num_images)

    def command(self, corpora: Corpora) -> list[str]:
        """What a person would type to train it by hand."""
        command = [sys.executable, "-m", "nst.train", "--preset", self.variant.preset]
        command += ["--content", str(corpora.path("photos")), "--style", str(corpora.path("works"))]
        command += ["--out", str(self.folder), "--images", str(self.num_images)]
        for assignment in assignments(self.variant, self.seed, self.num_images):
            command += ["--set", assignment]
        return command


def plan_runs(
    variants: Sequence[Variant], seeds: Sequence[int], num_images: int, runs_dir: Path
) -> list[Run]:
    """In the order of the training: seed after seed, and what is no part taken from the base behind all
    that."""
    folder = runs_dir / f"{num_images}-images"
    first = [variant for variant in variants if variant.name in DEFAULT_VARIANTS]
    others = [variant for variant in variants if variant.name not in DEFAULT_VARIANTS]
    return [
        Run(variant, seed, num_images, folder / variant.name / f"seed{seed}")
        for group in (first, others)
        for seed in seeds
        for variant in group
    ]


def num_images_done(run: Run) -> int:
    """Images that the newest checkpoint has seen; 0 if there is none.

    Raises:
        ValueError: the folder holds a training with another configuration.
    """
    checkpoint = find_checkpoint(run.folder)
    if checkpoint is None:
        return 0
    if read_config(checkpoint) != run.config:
        raise ValueError(f"{run.folder} holds a training with another configuration; delete it to train anew")
    return json.loads((Path(checkpoint) / STATE_FILE).read_text())["num_images_seen"]


def is_finished(run: Run) -> bool:
    """Whether its last checkpoint is there. Raises ValueError as `num_images_done` does."""
    return num_images_done(run) >= run.num_images


def read_metrics(run: Run) -> list[dict[str, Any]]:
    """What the training reported, in the order of its steps. Of a step that was trained twice, since the
    training was cut off behind its checkpoint, the later figures count."""
    path = run.folder / METRICS_FILE
    by_step: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):  # a line that was cut off, or is being written
            figures = json.loads(line)
            by_step[figures["step"]] = figures
    return [by_step[step] for step in sorted(by_step)]


def read_record(run: Run) -> dict[str, Any]:
    """Seconds, CPU seconds and images of all its processes together, and the digests of the code."""
    path = run.folder / RECORD_FILE
    empty = {"seconds": 0.0, "cpu_seconds": 0.0, "images": 0, "code": []}
    return json.loads(path.read_text()) if path.exists() else empty


def code_digest() -> str:
    """sha256 over the sources of the method: runs of one ablation should have the same."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "nst").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def train_all(runs: Sequence[Run], corpora: Corpora, *, num_at_once: int = 2) -> list[Run]:
    """Trains what is not finished; returns the runs that failed. Ends its processes when it is interrupted.

    Raises:
        ValueError: a run's folder holds a training with another configuration, or is in use.
    """
    waiting = [run for run in runs if not is_finished(run)]
    say(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already")
    progress, failed, running = _Progress(runs, waiting), [], []
    try:
        while waiting or running:
            while waiting and len(running) < num_at_once:
                running.append(_Process(waiting.pop(0), corpora))
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for process in [process for process in running if process.is_over()]:
                running.remove(process)
                if process.code == 0:
                    say(f"{process.run.name} finished in {process.seconds:.0f} s")
                else:
                    failed.append(process.run)
                    say(f"{process.run.name} failed with {process.code}; see {process.run.folder / LOG_FILE}")
            progress.say_sometimes([process.run for process in running], num_at_once)
    finally:
        for process in running:
            process.end()
    return failed


class _Process:
    """A training under way. It holds a lock on its folder, which outlives this program if that is killed."""

    def __init__(self, run: Run, corpora: Corpora) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        self.run, self.code = run, None
        self._done_before, self._started = num_images_done(run), time.monotonic()
        with _locked(run.folder) as lock, (run.folder / LOG_FILE).open("a") as log:
            self._process = subprocess.Popen(
                run.command(corpora),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env={**os.environ, **ENVIRONMENT},
                pass_fds=(lock.fileno(),),
            )

    def is_over(self) -> bool:
        """Whether it has ended; if so, what it took is written down."""
        pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
        if pid == 0:
            return False
        self.code = self._process.returncode = os.waitstatus_to_exitcode(status)
        self.seconds = time.monotonic() - self._started
        record = read_record(self.run)
        record["seconds"] += self.seconds
        record["cpu_seconds"] += usage.ru_utime + usage.ru_stime
        record["images"] += max(0, num_images_done(self.run) - self._done_before)
        record["code"] = sorted({*record["code"], code_digest()})
        (self.run.folder / RECORD_FILE).write_text(json.dumps(record) + "\n")
        return True

    def end(self) -> None:
        if self.code is None:
            self._process.terminate()
            with contextlib.suppress(ChildProcessError):
                self._process.wait()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[IO[str]]:
    with (folder / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is being trained by another process; end that first") from None
        yield lock


class _Progress:
    """Lines about how far all is, with the time left at the speed so far."""

    def __init__(self, runs: Sequence[Run], waiting: Sequence[Run]) -> None:
        self._todo = list(waiting)
        self._num_finished_before = len(runs) - len(waiting)
        self._num_runs, self._started, self._said = len(runs), time.monotonic(), time.monotonic()
        self._before = self._images()
        self._total = sum(run.num_images for run in self._todo)

    def _images(self) -> int:
        return sum(min(_images_seen(run), run.num_images) for run in self._todo)

    def say_sometimes(self, running: Sequence[Run], num_at_once: int) -> None:
        now = time.monotonic()
        if now - self._said < SECONDS_BETWEEN_LINES or not running:
            return
        self._said, images = now, self._images()
        rate = (images - self._before) / (now - self._started)
        left = (
            f"about {_minutes((self._total - images) / rate)} left" if rate > 0 else "time left not known yet"
        )
        num_done = self._num_finished_before + sum(_images_seen(run) >= run.num_images for run in self._todo)
        at = ", ".join(f"{run.name} {_images_seen(run)}/{run.num_images}" for run in running)
        say(f"{num_done} of {self._num_runs} runs done; {at}; {rate:.1f} images/s over {num_at_once}; {left}")


def _images_seen(run: Run) -> int:
    """As last reported, which is ahead of the checkpoint."""
    metrics = read_metrics(run)
    return metrics[-1]["num_images_seen"] if metrics else 0


def _minutes(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"


def say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)
