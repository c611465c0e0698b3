"""Runs of `nst` in processes of their own, for tests that disturb them; nothing of them outlives a test."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.servers import REPOSITORY

SECONDS = 240


def bytes_below(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@dataclass(kw_only=True)
class Run:
    """A run of a verb. What it and its Ray may leave is below `scratch`."""

    process: subprocess.Popen[bytes]
    scratch: Path
    log: Path
    answer: Path

    def wait(self) -> int:
        return self.process.wait(SECONDS)

    def output(self) -> str:
        return "".join(path.read_text(errors="replace") for path in (self.answer, self.log))

    def result(self) -> dict[str, Any]:
        """What stdout says; Ray's own words about processes that died go to stderr, at any moment."""
        assert self.wait() == 0, self.output()
        return json.loads(self.answer.read_text().splitlines()[-1])

    def workers(self, name: str) -> list[psutil.Process]:
        """Ray's processes that do `name` at this moment."""
        return [process for process in self._processes() if name in command_line(process)]

    def _processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def wait_for_ray(self) -> None:
        """Ray's processes end by themselves when their driver is gone."""
        wait_until(lambda: not processes_of(self.scratch), f"processes of {self.scratch} are still there")

    def assert_nothing_left(self) -> None:
        """But for the folder in which PyTorch keeps what it compiles."""
        paths = (str(path.relative_to(self.scratch)) for path in self.scratch.rglob("*"))
        assert [path for path in paths if not path.startswith("torchinductor_")] == []


Start = Callable[..., Run]


@contextlib.contextmanager
def starting(verb: str, *always: str) -> Iterator[Start]:
    """Gives what starts `nst VERB ARGUMENTS… ALWAYS… --json`, with variables of its environment as keywords;
    whatever is there at the end is killed and removed."""
    runs: list[Run] = []
    scratch = Path(tempfile.mkdtemp(prefix="nst-faults-", dir="/tmp"))  # short: Ray's sockets lie in it

    def start(*arguments: object, **environment: str) -> Run:
        folder, log = scratch / str(len(runs)), scratch / f"{len(runs)}.log"
        answer = log.with_suffix(".json")
        folder.mkdir()
        command = [sys.executable, "-m", "pipelines.cli", verb, *map(str, arguments), *always, "--json"]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        settings = {
            "TMPDIR": str(folder),
            "RAY_TMPDIR": str(folder),
            "RAY_AUTH_MODE": "token",
            **environment,
        }
        with log.open("wb") as stderr, answer.open("wb") as stdout:
            process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=inherited | settings,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        runs.append(Run(process=process, scratch=folder, log=log, answer=answer))
        return runs[-1]

    try:
        yield start
    finally:
        for run in runs:
            if run.process.poll() is None:
                run.process.kill()
                run.process.wait(30)
        for process in processes_of(scratch):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(scratch, ignore_errors=True)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Those that name something below `folder` in their command lines."""
    return [process for process in psutil.process_iter() if str(folder) + "/" in command_line(process)]


def command_line(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return " ".join(process.cmdline())
    return ""


def wait_until(condition: Callable[[], object], problem: str, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, problem
        time.sleep(0.02)
