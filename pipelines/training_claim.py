"""OUT/NAME/run.json: how far a training is, and which one driver has it."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import psutil

from infra import s3, storage
from pipelines.console import StageFailed, say
from pipelines.training_record import Training

log = logging.getLogger(__name__)

RECORD_FILE = "run.json"
SECONDS_BETWEEN_BEATS = 10.0
SECONDS_TO_WATCH = 35.0  # for a sign of a driver elsewhere: more than three beats
SECONDS_BETWEEN_LOOKS = 2.0
NUM_TRIES = 5

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


class Overtaken(StageFailed):
    """Another driver has the training now: this one must not touch it any more."""


class TrainingClaim:
    """The record of one training, and this process's hold of it.

        claim = TrainingClaim.of(training)  # refuses what another driver is at
        with claim:  # gives signs of life, from `take` on
            claim.take(run_id, num_threads)
            ...
            claim.end("FINISHED", result)

    The record is only ever replaced by compare and swap. Whoever finds it RUNNING by a driver on another
    machine watches it for half a minute: clocks of machines differ, but a record that changes has a living
    driver. One that was taken over while it was cut off finds that out at its next sign, or, if its rank 0
    asks (`is_held`), before that publishes a checkpoint.

    Attributes:
        known: what the record said of an earlier start, {} if there was none.
    """

    def __init__(self, training: Training, stored: bytes | None, known: dict[str, Any]) -> None:
        self.known = known
        self.token = secrets.token_hex(8)
        self._uri = _uri_of(training)
        self._identity = training.identity()
        self._stored, self._record = stored, dict(known)
        self._changing = threading.Lock()
        self._is_over, self._overtaken_by = threading.Event(), ""

    @classmethod
    def of(cls, training: Training) -> TrainingClaim:
        """Raises ValueError: the name belongs to a training of something else, or to one that runs now."""
        stored = _read(_uri_of(training))
        known = _parse(training, stored) if stored is not None else {}
        if stored is not None and known["status"] == "RUNNING" and _lives(training, known["driver"], stored):
            driver = known["driver"]
            raise ValueError(
                f"{training.uri} is being trained now, by process {driver['pid']} on {driver['host']}; stop "
                "it there, or give this training another --name"
            )
        return cls(training, stored, known)

    @property
    def place(self) -> tuple[str, str]:
        """(the record, this driver's token), for `is_held`."""
        return self._uri, self.token

    def take(self, run_id: str, num_threads: int) -> None:
        """From here on the training is this process's, in that MLflow run.

        Raises:
            ValueError: another command has taken it at this moment.
        """
        self._record |= {"run_id": run_id, "num_threads": num_threads, "result": None}
        try:
            self._replace("RUNNING")
        except Overtaken as error:
            raise ValueError(f"{error}; one at a time may have it") from error

    def end(self, status: Status, result: dict[str, Any] | None = None) -> None:
        """How it ended, for whoever comes next. Raises Overtaken, or OSError: the store does not take it."""
        self._is_over.set()
        self._record["result"] = result
        self._replace(status)

    def check(self) -> None:
        """Raises Overtaken."""
        if self._overtaken_by:
            raise Overtaken(self._overtaken_by)

    def __enter__(self) -> TrainingClaim:
        threading.Thread(target=self._beat, name="training-claim", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()

    def _beat(self) -> None:
        while not self._is_over.wait(SECONDS_BETWEEN_BEATS):
            if self._record.get("driver", {}).get("token") != self.token:
                continue  # not taken yet
            try:
                with s3.patience(SECONDS_BETWEEN_BEATS):
                    self._replace("RUNNING")
            except Overtaken:
                return  # `check` says so
            except Exception as error:  # noqa: BLE001 - while the store is away nobody else can take it either
                log.info("no sign of life in %s: %s", self._uri, error)

    def _replace(self, status: Status) -> None:
        with self._changing:
            self.check()
            if self._is_over.is_set() and status == "RUNNING":
                return
            number = self._record.get("driver", {}).get("beat", 0)
            self._record |= {
                "identity": self._identity,
                "status": status,
                "driver": {**_this_process(), "token": self.token, "beat": number + 1},
            }
            data = json.dumps(self._record, indent=2).encode()
            for _ in range(NUM_TRIES):
                if storage.replace_bytes(self._uri, data, expected=self._stored):
                    self._stored = data
                    return
                found = _read(self._uri)
                if found is not None and not _is_by(found, self.token):
                    break
                self._stored = found  # ours: a write whose answer was lost
            self._overtaken_by = f"another command has taken this training over ({self._uri})"
            raise Overtaken(self._overtaken_by)


def is_held(place: tuple[str, str]) -> bool:
    """Whether the driver of `TrainingClaim.place` still has its training. True too where the store does not
    say."""
    uri, token = place
    try:
        stored = _read(uri)
    except (OSError, ValueError):
        return True
    return stored is not None and _is_by(stored, token)


def _uri_of(training: Training) -> str:
    return storage.join(training.uri, RECORD_FILE)


def _read(uri: str) -> bytes | None:
    try:
        return storage.read_bytes(uri)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_by(stored: bytes, token: str) -> bool:
    try:
        return json.loads(stored)["driver"]["token"] == token
    except (KeyError, TypeError, ValueError):
        return False


def _parse(training: Training, stored: bytes) -> dict[str, Any]:
    try:
        known = json.loads(stored)
        identity, _, driver = known["identity"], known["status"], known["driver"]
        _ = driver["pid"], driver["host"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{_uri_of(training)} is no record of this version's trainings ({error!r}); give this training "
            "another --name"
        ) from None
    for part, value in training.identity().items():
        if identity.get(part) != value:
            raise ValueError(
                f"{training.uri} was started with another {part}; give this training another --name"
            )
    return known


def _lives(training: Training, driver: dict[str, Any], stored: bytes) -> bool:
    """Whether the driver that wrote `stored` is at work: here by its process, elsewhere by its signs."""
    if driver.get("machine") == _machine():
        try:
            return psutil.Process(driver["pid"]).create_time() == driver.get("started")
        except (psutil.NoSuchProcess, ValueError, TypeError):
            return False
    say(
        f"{training.uri} was last driven from {driver['host']}: watching up to {SECONDS_TO_WATCH:.0f} s for "
        "a sign of life"
    )
    deadline = time.monotonic() + SECONDS_TO_WATCH
    while time.monotonic() < deadline:
        time.sleep(SECONDS_BETWEEN_LOOKS)
        if _read(_uri_of(training)) != stored:
            return True
    return False


def _this_process() -> dict[str, Any]:
    """What tells this process from every other."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def _machine() -> str:
    """Where a process id means the same. (Containers may share their host's name.)"""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()
