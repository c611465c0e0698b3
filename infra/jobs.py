"""Ray Jobs: submit a command to a cluster, follow it by polling, know how it really ended."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from infra import cluster
from infra.packaging import pack

SECONDS_TO_CONNECT, SECONDS_TO_ANSWER = 5.0, 60.0
SECONDS_BETWEEN_POLLS = (0.5, 5.0)  # from, to: quick for short jobs, easy on the head for long ones
SECONDS_TO_RECONNECT = 600.0
SECONDS_FOR_LAST_LOG = 15.0
# A fraction is enough to send the driver to a worker node: a head with --num-cpus=0 has none of it.
DRIVER_CPUS = 0.1
SAFE_SETTINGS = (
    "MLFLOW_TRACKING_URI",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)


UNANSWERED = (requests.RequestException, ConnectionError, RuntimeError)  # all that Ray's client raises


class JobsUnreachable(OSError):
    """The cluster stopped answering for longer than we wait. The job itself may go on."""


class JobForgotten(OSError):
    """The cluster answers, but no longer knows the job."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """`status` is PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED; times are Unix seconds."""

    id: str
    status: str
    entrypoint: str
    message: str
    driver_exit_code: int | None
    start_time: float | None
    end_time: float | None

    @property
    def has_ended(self) -> bool:
        return JobStatus(self.status).is_terminal()

    @property
    def succeeded(self) -> bool:
        return self.status == JobStatus.SUCCEEDED


class _Client(JobSubmissionClient):
    """Ray's own client waits for an answer without end."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        timeout = (SECONDS_TO_CONNECT, SECONDS_TO_ANSWER)
        return super()._do_request(method, endpoint, timeout=timeout, **options)


def connect(address: str | None = None) -> JobSubmissionClient:
    """A client for the cluster at `address`, RAY_API_SERVER_ADDRESS or an http:// RAY_ADDRESS.

    Raises ValueError within 15 s if nothing answers there or our token is refused.
    """
    url = _url(address)
    cluster.use_token_if_there_is_one()
    try:
        _probe(url)
        # Ray lets the variable win over the argument.
        with cluster.environment(RAY_API_SERVER_ADDRESS=url):
            return _Client(url)
    except AuthenticationError as error:
        raise ValueError(
            f"the cluster at {url} does not let us in ({_first_line(error)}); set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN to the cluster's token"
        ) from error
    except (*UNANSWERED, KeyError) as error:  # KeyError: JSON, but not Ray's
        raise ValueError(
            f"no Ray jobs server answers at {url} ({type(error).__name__}); is the cluster up, and the port "
            "of its dashboard (8265) forwarded? With the launcher: `ray dashboard ray_cluster.yaml`"
        ) from error


def _url(address: str | None) -> str:
    named = address or os.environ.get("RAY_API_SERVER_ADDRESS") or ""
    if not named and os.environ.get("RAY_ADDRESS", "").startswith(("http://", "https://")):
        named = os.environ["RAY_ADDRESS"]
    if not named:
        raise ValueError(
            "which cluster? Give --address http://HEAD:8265 or set RAY_API_SERVER_ADDRESS (`nst doctor` "
            "checks it); without a cluster, run the verb itself: it starts Ray on this machine"
        )
    url = named if "://" in named else f"http://{named}"
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(f"{named} is no address of a jobs server; it looks like http://HEAD:8265")
    return url.rstrip("/")


def _probe(url: str) -> None:
    """A short look, so that a host that swallows packets costs seconds rather than minutes."""
    requests.get(f"{url}/api/version", timeout=(SECONDS_TO_CONNECT, 2 * SECONDS_TO_CONNECT))


def settings_for_job() -> tuple[dict[str, str], list[str]]:
    """(environment of the job, names of variables that stay here because they hold a password).

    A job's environment is shown in the dashboard and in logs, so it gets a short list of settings and no
    secret: credentials belong to the nodes. A tracking URI that is a file of this machine stays here, too.
    """
    sent, kept = {"PYTHONUNBUFFERED": "1"}, []
    for variable in SAFE_SETTINGS:
        value = os.environ.get(variable, "")
        if "://" in value and "@" in urlsplit(value).netloc:
            kept.append(variable)
        elif value and (variable != "MLFLOW_TRACKING_URI" or value.startswith(("http://", "https://"))):
            sent[variable] = value
    return sent, kept


def submit(
    client: JobSubmissionClient, command: list[str], *, working_dir: str, name: str
) -> tuple[Job, bool]:
    """Starts `command` with the files of `working_dir`; returns (job, whether it was started just now).

    The id follows from the command, its settings and the files. So the same submission finds its running
    job; after that has ended another one is started, with a number behind its id.
    Raises ValueError if the files are too many (see `infra.packaging`).
    """
    entrypoint = shlex.join(command)
    settings, _ = settings_for_job()
    with tempfile.TemporaryDirectory(prefix="nst-job-") as folder:
        archive = Path(folder) / "package.zip"
        code_digest = pack(working_dir, archive)
        identity = json.dumps([entrypoint, settings, code_digest], sort_keys=True)
        base = f"nst-{name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
        for submission_id in _numbered(base):
            existing = find(client, submission_id)
            if existing is not None:
                if not existing.has_ended:
                    return existing, False
                continue
            try:
                client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=submission_id,
                    runtime_env={"working_dir": str(archive), "env_vars": settings},
                    metadata={"code_digest": code_digest},
                    entrypoint_num_cpus=DRIVER_CPUS,
                )
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise
                # Somebody submitted the same at this moment: theirs is the job.
            return get(client, submission_id), True
    raise AssertionError("unreachable")


def _numbered(base: str) -> Iterator[str]:
    yield base
    number = 2
    while True:
        yield f"{base}-{number}"
        number += 1


def find(client: JobSubmissionClient, job_id: str) -> Job | None:
    """The job of that id; None if the cluster has none."""
    try:
        return _job(client.get_job_info(job_id))
    except RuntimeError as error:
        if "status code 404" in str(error):
            return None
        raise


def get(client: JobSubmissionClient, job_id: str) -> Job:
    """The job of that id. Raises ValueError if the cluster has none."""
    job = find(client, job_id)
    if job is None:
        raise ValueError(
            f"the cluster at {client.get_address()} knows no job {job_id!r}; `nst jobs` lists them (a head "
            "that was restarted has forgotten its jobs)"
        )
    return job


def list_jobs(client: JobSubmissionClient) -> list[Job]:
    """Submitted jobs, the newest first."""
    jobs = [_job(details) for details in client.list_jobs() if details.submission_id]
    return sorted(jobs, key=lambda job: job.start_time or 0.0, reverse=True)


def stop(client: JobSubmissionClient, job_id: str, *, timeout_s: float = 60.0) -> Job:
    """Asks the job to end and waits until it has. Raises TimeoutError if it has not after `timeout_s`."""
    get(client, job_id)
    client.stop_job(job_id)
    deadline = time.monotonic() + timeout_s
    while not (job := get(client, job_id)).has_ended:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{job_id} is still {job.status} after {timeout_s:.0f} s")
        time.sleep(SECONDS_BETWEEN_POLLS[0])
    return job


def log_of(client: JobSubmissionClient, job_id: str) -> str:
    """All that the job has printed so far."""
    get(client, job_id)
    return client.get_job_logs(job_id)


def follow(client: JobSubmissionClient, job_id: str, write: Callable[[str], None]) -> Job:
    """Hands new log text to `write` until the job has ended, and returns how it ended.

    Polls, because a stream of logs may end while the job goes on. A cluster that does not answer is asked
    again for ten minutes; then JobsUnreachable.
    """
    job = get(client, job_id)
    num_written, has_log = 0, True
    delay, slowest = SECONDS_BETWEEN_POLLS
    last_answer = time.monotonic()
    while True:
        try:
            job = find(client, job_id)  # before the log, so that the log of an ended job is complete
            if job is None:
                raise JobForgotten(f"the cluster forgot {job_id}: its head was restarted; submit it again")
            has_log = False
            text = client.get_job_logs(job_id)
            has_log = True
        except UNANSWERED as error:
            silent = time.monotonic() - last_answer
            if job is not None and job.has_ended and not has_log and silent > SECONDS_FOR_LAST_LOG:
                write(f"[the rest of the log went with its node: {_first_line(error)}]\n")
                return job
            if silent > SECONDS_TO_RECONNECT:
                raise JobsUnreachable(
                    f"{client.get_address()} has not answered for {silent / 60:.0f} minutes "
                    f"({_first_line(error)}); the job may go on: `nst logs {job_id}`"
                ) from error
            write(f"[no answer from the cluster for {silent:.0f} s, trying again: {_first_line(error)}]\n")
            delay = min(2 * delay, 30.0)
            time.sleep(delay)
            continue
        last_answer = time.monotonic()
        if len(text) > num_written:
            write(text[num_written:])
            num_written = len(text)
        if job.has_ended:
            return job
        delay = min(1.3 * delay, slowest)
        time.sleep(delay)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _job(details: JobDetails) -> Job:
    return Job(
        id=details.submission_id or "",
        status=str(details.status.value),
        entrypoint=details.entrypoint,
        message=(details.message or "").strip(),
        driver_exit_code=details.driver_exit_code,
        start_time=details.start_time / 1000 if details.start_time else None,
        end_time=details.end_time / 1000 if details.end_time else None,
    )
