"""A job's log, followed by polling: what it prints, until it has ended."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable

from infra.jobs import UNANSWERED, Client, Job, find, first_line, get

SECONDS_BETWEEN_POLLS = (0.5, 5.0)  # from, to: quick for short jobs, easy on the head for long ones
SECONDS_TO_RECONNECT = 600.0
SECONDS_FOR_LAST_LOG = 15.0
SECONDS_WITHOUT_WORD = 20.0
NUM_LINES_A_LOOK = 1000
NUM_BYTES_TO_RECOGNIZE = 4096
WHOLE = -1


class JobsUnreachable(OSError):
    """The cluster stopped answering for longer than we wait. The job itself may go on."""


class JobForgotten(OSError):
    """The cluster answers, but no longer knows the job."""


class LogGone(OSError):
    """The log was on a node that is no more."""


class JobLog:
    """The log of one job, read piece by piece.

    Ray gives no log from an offset on, only its last lines (or all). So what was read last is looked for in
    those lines; all is fetched only where it is not there, or more than once. (And Ray's own `get_job_logs`
    fails for good at the first byte that is not UTF-8.)
    """

    def __init__(self, client: Client, job_id: str) -> None:
        self._client, self._job_id = client, job_id
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_bytes = 0
        self._last = b""

    def read_new(self, job: Job) -> str:
        """What has come since the last call. A log that was cut is read from its start again."""
        if job.driver_node_id is None:  # it has not begun
            return ""
        new = self._new_bytes(job.driver_node_id)
        self._num_bytes += len(new)
        self._last = (self._last + new)[-NUM_BYTES_TO_RECOGNIZE:]
        return self._decoder.decode(new)

    def _new_bytes(self, node_id: str) -> bytes:
        if self._last:
            lines = self._fetch(node_id, NUM_LINES_A_LOOK)
            start = lines.find(self._last)
            if start >= 0 and start == lines.rfind(self._last):
                return lines[start + len(self._last) :]
        log = self._fetch(node_id, WHOLE)
        if not log[: self._num_bytes].endswith(self._last) or len(log) < self._num_bytes:
            self._num_bytes, self._last = 0, b""
        return log[self._num_bytes :]

    def _fetch(self, node_id: str, num_lines: int) -> bytes:
        name = f"job-driver-{self._job_id}.log"
        try:
            answer = self._client.read("/api/v0/logs/file", node_id=node_id, filename=name, lines=num_lines)
        except RuntimeError as error:
            if "file is not found" in str(error):  # it has not printed anything
                return b""
            raise
        return answer.content


def log_of(client: Client, job_id: str) -> str:
    """All that the job has printed so far. Raises LogGone if its node cannot be asked any more."""
    job = get(client, job_id)
    try:
        return JobLog(client, job_id).read_new(job)
    except RuntimeError as error:
        raise LogGone(f"the log of {job_id} cannot be had from its node: {first_line(error)}") from error


def follow(client: Client, job_id: str, write: Callable[[str], None]) -> Job:
    """Hands new log text to `write` until the job has ended, and returns how it ended.

    Polls, because a stream of logs may end while the job goes on. A cluster that does not answer is asked
    again for ten minutes; then JobsUnreachable. One whose head was restarted: JobForgotten.
    """
    job, log = get(client, job_id), JobLog(client, job_id)
    has_log, is_told = True, False
    delay, slowest = SECONDS_BETWEEN_POLLS
    started = last_answer = time.monotonic()
    while True:
        try:
            job = find(client, job_id)  # before the log, so that the log of an ended job is complete
            if job is None:
                raise JobForgotten(f"the cluster forgot {job_id}: its head was restarted; submit it again")
            has_log = False
            text = log.read_new(job)
            has_log = True
        except UNANSWERED as error:
            silent = time.monotonic() - last_answer
            if job is not None and job.has_ended and not has_log and silent > SECONDS_FOR_LAST_LOG:
                write(f"[the rest of the log went with its node: {first_line(error)}]\n")
                return job
            if silent > SECONDS_TO_RECONNECT:
                raise JobsUnreachable(
                    f"{client.get_address()} has not answered for {silent / 60:.0f} minutes "
                    f"({first_line(error)}); the job may go on: `nst logs {job_id}`"
                ) from error
            write(f"[no answer from the cluster for {silent:.0f} s, trying again: {first_line(error)}]\n")
            delay = min(2 * delay, 30.0)
            time.sleep(delay)
            continue
        last_answer = time.monotonic()
        if text:
            write(text)
        if job.has_ended:
            return job
        if not is_told and job.driver_node_id is None and last_answer - started > SECONDS_WITHOUT_WORD:
            is_told = True
            write(f"[{job.message}]\n")
        delay = min(1.3 * delay, slowest)
        time.sleep(delay)
