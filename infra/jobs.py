"""Ray Jobs: submit a command to a cluster, find it again, stop it, know how it really ended."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from infra import cluster, s3, scratch
from infra.packaging import commit_of, pack

SECONDS_TO_CONNECT, SECONDS_TO_ANSWER = 5.0, 60.0
SECONDS_BETWEEN_LOOKS = 0.5
# What a verb gets to end in order after `stop`; Ray by itself kills it after 3 s.
SECONDS_TO_STOP = 45
# A fraction is enough to send the driver to a worker node: a head with --num-cpus=0 has none of it. And it is
# small, so that beside it as many workers of almost a CPU have room as the node has CPUs.
DRIVER_CPUS = 0.01
SAFE_SETTINGS = (
    "MLFLOW_TRACKING_URI",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    s3.PATIENCE_VARIABLE,
)
# What Ray says of a job that never began, and would not begin the next time either.
NEVER_BEGAN = {
    "RUNTIME_ENV_SETUP_FAILURE",
    "JOB_SUPERVISOR_ACTOR_START_TIMEOUT",
    "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE",
}
PASSWORD = re.compile(r"(?<=://)[^/\s]*@")

UNANSWERED = (requests.RequestException, ConnectionError, RuntimeError)  # all that Ray's client raises


@dataclass(frozen=True, kw_only=True)
class Job:
    """`status` is PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED; times are Unix seconds. `error_type` is
    Ray's name for what went wrong, `driver_node_id` where the job's log is."""

    id: str
    status: str
    entrypoint: str
    message: str
    error_type: str | None
    driver_exit_code: int | None
    driver_node_id: str | None
    start_time: float | None
    end_time: float | None

    @property
    def told(self) -> list[str]:
        """The lines of the message, one at least: first what Ray says, last the job's own last words."""
        return self.message.splitlines() or ["the cluster gives no reason"]

    @property
    def has_ended(self) -> bool:
        return JobStatus(self.status).is_terminal()

    @property
    def succeeded(self) -> bool:
        return self.status == JobStatus.SUCCEEDED

    @property
    def was_lost(self) -> bool:
        """Whether its command was cut off (its node or its supervisor died, a signal killed it) and so has
        not ended by itself. One that was stopped is not lost."""
        if self.status != JobStatus.FAILED:
            return False
        if self.driver_exit_code is None:
            return self.error_type not in NEVER_BEGAN
        killed_by = -self.driver_exit_code if self.driver_exit_code < 0 else self.driver_exit_code - 128
        return killed_by > 0 and killed_by != signal.SIGINT


class Client(JobSubmissionClient):
    """Ray's own client waits for an answer without end, and knows the jobs only."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        timeout = (SECONDS_TO_CONNECT, SECONDS_TO_ANSWER)
        return super()._do_request(method, endpoint, timeout=timeout, **options)

    def read(self, endpoint: str, **parameters: Any) -> requests.Response:
        """What the head's server says at `endpoint`. Raises RuntimeError if that is an error."""
        answer = self._do_request("GET", endpoint, params=parameters)
        if answer.status_code != requests.codes.ok:
            self._raise_error(answer)
        return answer

    def states(self, kind: str, **wanted: str) -> list[dict[str, Any]]:
        """What Ray knows of its `actors`, `workers`, `nodes`, … whose fields are as `wanted`."""
        answer = self.read(
            f"/api/v0/{kind}",
            filter_keys=list(wanted),
            filter_predicates=["="] * len(wanted),
            filter_values=list(wanted.values()),
            exclude_driver=False,  # of workers: drivers are what we look for
            detail=True,
            limit=1000,
        )
        return answer.json()["data"]["result"]["result"]


def connect(address: str | None = None) -> Client:
    """A client for the cluster at `address`, RAY_API_SERVER_ADDRESS or an http:// RAY_ADDRESS.

    Raises ValueError within 15 s if nothing answers there or our token is refused.
    """
    url = _url(address)
    cluster.use_token_if_there_is_one()
    try:
        _probe(url)
        # Ray lets the variable win over the argument.
        with cluster.environment(RAY_API_SERVER_ADDRESS=url):
            return Client(url)
    except AuthenticationError as error:
        raise ValueError(
            f"the cluster at {url} does not let us in ({first_line(error)}); set RAY_AUTH_MODE=token and "
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
    sent, kept = {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(SECONDS_TO_STOP)}, []
    for variable in SAFE_SETTINGS:
        value = os.environ.get(variable, "")
        if PASSWORD.search(value):
            kept.append(variable)
        elif value and (variable != "MLFLOW_TRACKING_URI" or value.startswith(("http://", "https://"))):
            sent[variable] = value
    return sent, kept


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A command with its settings and files, packed once, so that it can be started again as it was.

    `base_id` follows from the command, its settings and the files: the same submission has the same.
    """

    entrypoint: str
    settings: dict[str, str]
    metadata: dict[str, str]
    archive: Path
    base_id: str


@contextlib.contextmanager
def prepare(command: list[str], *, working_dir: str, name: str) -> Iterator[Submission]:
    """Packs the files of `working_dir`. Raises ValueError if they are too many (see `infra.packaging`), or if
    the command has a password in it, which everybody would see who looks at the cluster's jobs."""
    for argument in command:
        if PASSWORD.search(argument):
            raise ValueError(
                f"{PASSWORD.sub('***@', argument)} has a password in it, which the cluster's dashboard would "
                "show; leave it out: credentials are in the nodes' own variables (AWS_…, MLFLOW_TRACKING_…)"
            )
    entrypoint = shlex.join(command)
    settings, _ = settings_for_job()
    with scratch.folder("nst-job-") as folder:
        archive = Path(folder) / "package.zip"
        code_digest = pack(working_dir, archive)
        identity = json.dumps([entrypoint, settings, code_digest], sort_keys=True)
        commit = {"NST_COMMIT": found} if (found := commit_of(working_dir)) else {}
        yield Submission(
            entrypoint=entrypoint,
            settings=settings | commit,
            metadata={"code_digest": code_digest, **commit},
            archive=archive,
            base_id=f"nst-{name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}",
        )


def submit(client: JobSubmissionClient, submission: Submission) -> tuple[Job, bool]:
    """Finds the submission's running job or starts one; returns (job, whether it was started just now).

    After a job has ended the next one gets a number behind its id.
    """
    for submission_id in _numbered(submission.base_id):
        existing = find(client, submission_id)
        if existing is None:
            try:
                client.submit_job(
                    entrypoint=submission.entrypoint,
                    submission_id=submission_id,
                    runtime_env={
                        "working_dir": str(submission.archive),
                        "env_vars": submission.settings,
                    },
                    metadata=dict(submission.metadata),
                    entrypoint_num_cpus=DRIVER_CPUS,
                )
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise
                # Somebody submitted the same at this moment: theirs is the job.
                return get(client, submission_id), False
            return get(client, submission_id), True
        if not existing.has_ended:
            return existing, False
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


def stop(client: JobSubmissionClient, job_id: str, *, timeout_s: float = SECONDS_TO_STOP + 15.0) -> Job:
    """Asks the job to end and waits until it has. Raises TimeoutError if it has not after `timeout_s`."""
    get(client, job_id)
    client.stop_job(job_id)
    deadline = time.monotonic() + timeout_s
    while not (job := get(client, job_id)).has_ended:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{job_id} is still {job.status} after {timeout_s:.0f} s")
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return job


def first_line(error: Exception) -> str:
    """What is worth a line of what Ray's client raises."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _job(details: JobDetails) -> Job:
    return Job(
        id=details.submission_id or "",
        status=str(details.status.value),
        entrypoint=details.entrypoint,
        message=(details.message or "").strip(),
        error_type=details.error_type,
        driver_exit_code=details.driver_exit_code,
        driver_node_id=details.driver_node_id,
        start_time=details.start_time / 1000 if details.start_time else None,
        end_time=details.end_time / 1000 if details.end_time else None,
    )
