"""`nst submit`, `nst jobs`, `nst logs`, `nst stop`: the same verbs, as jobs on a Ray cluster."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import Any

import click

from infra import job_logs, job_recovery
from infra import jobs as ray_jobs
from pipelines.cli import VERBS
from pipelines.console import EXIT_GATE_REFUSED, EXIT_INTERRUPTED, EXIT_USER_MISTAKE, Stage, StageFailed, say

address_option = click.option(
    "--address", metavar="URL", help="The cluster's jobs server, http://HEAD:8265. [RAY_API_SERVER_ADDRESS]"
)


@click.command("submit", cls=Stage, context_settings={"ignore_unknown_options": True})
@address_option
@click.option(
    "--working-dir",
    default=".",
    show_default=True,
    metavar="DIR",
    help="Its files travel with the job (64 MiB at most): not what git ignores, hidden files, data, secrets.",
)
@click.option("--follow/--no-follow", default=True, help="Print the job's log until it ends.")
@click.option(
    "--resubmit",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    metavar="N",
    help="Times that a followed job is submitted again after the cluster lost its driver.",
)
@click.argument("verb", nargs=-1, required=True, type=click.UNPROCESSED)
def submit(
    address: str | None, working_dir: str, follow: bool, resubmit: int, verb: tuple[str, ...]
) -> dict[str, Any]:
    """Run a verb as a job on a Ray cluster: `nst submit -- VERB …`.

    The job's id follows from the command and the code. The same command again follows the running job;
    after its end it starts another, and the verb does only what is left to do. Ends as the verb ended. A job
    whose driver dies with its node is submitted again for as long as it is followed; one that ended by itself
    is not. Ctrl-C leaves the job running. Credentials are never sent: the cluster's nodes have their own.

    \b
    Examples:
      nst submit --address http://127.0.0.1:8265 -- shard s3://raw/photos s3://corpora/content --role content
      nst submit --no-follow -- train --content s3://corpora/content --style s3://corpora/style \\
          --preset small --out s3://runs
    """
    if verb[0] not in VERBS:
        raise ValueError(f"there is no verb {verb[0]!r}; the verbs are {', '.join(VERBS)}")
    command = ["python", "-m", "pipelines.cli", *verb]
    with ray_jobs.prepare(command, working_dir=working_dir, name=verb[0]) as submission:
        client = ray_jobs.connect(address)
        sent, kept = ray_jobs.settings_for_job()
        names = ", ".join(name for name in sent if name in ray_jobs.SAFE_SETTINGS)
        say(f"settings that go along: {names or 'none'}; credentials stay here, the nodes use their own")
        for name in kept:
            say(f"{name} holds a password and stays here: set it on the cluster's nodes")
        job, is_new = ray_jobs.submit(client, submission)
        say(f"{job.id} {'submitted' if is_new else 'is running already'}; nst logs {job.id} shows its log")
        if not follow:
            return _result(job)
        ended = job_recovery.follow_to_the_end(client, submission, job, _write, max_resubmissions=resubmit)
        return _outcome(ended)


@click.command("jobs", cls=Stage)
@address_option
def jobs(address: str | None) -> dict[str, Any]:
    """List the jobs of a cluster, the newest first.

    \b
    Example:
      nst jobs --address http://127.0.0.1:8265
    """
    found = ray_jobs.list_jobs(ray_jobs.connect(address))
    for job in found:
        command = job.entrypoint.removeprefix("python -m pipelines.cli ")
        say(f"{job.status:9}  {job.id}  {_age(job.start_time)}  {command}")
    if not found:
        say("no jobs")
    return {"jobs": [asdict(job) for job in found]}


@click.command("logs", cls=Stage)
@address_option
@click.option("--follow/--no-follow", default=True, help="Go on until the job ends.")
@click.argument("job_id", metavar="ID")
def logs(address: str | None, follow: bool, job_id: str) -> dict[str, Any]:
    """Print a job's log; exit with 1 if the job failed.

    \b
    Example:
      nst logs nst-train-5d41402abc4b
    """
    client = ray_jobs.connect(address)
    if follow:
        return _outcome(job_logs.follow(client, job_id, _write))
    _write(job_logs.log_of(client, job_id))
    return _result(ray_jobs.get(client, job_id))


@click.command("stop", cls=Stage)
@address_option
@click.argument("job_id", metavar="ID")
def stop(address: str | None, job_id: str) -> dict[str, Any]:
    """Stop a job. What it has finished stays; the same command submitted again goes on from there.

    \b
    Example:
      nst stop nst-train-5d41402abc4b
    """
    job = ray_jobs.stop(ray_jobs.connect(address), job_id)
    say(f"{job.id} {job.status.lower()}")
    return _result(job)


def _outcome(job: ray_jobs.Job) -> dict[str, Any]:
    """The result of a job that has ended. Raises StageFailed, with the verb's own exit code, if it failed."""
    if not job.succeeded:
        code = "" if job.driver_exit_code is None else f", exit code {job.driver_exit_code}"
        failure = StageFailed(f"{job.id} {job.status.lower()}{code}: {job.told[-1]}", _result(job))
        if job.driver_exit_code in (EXIT_USER_MISTAKE, EXIT_GATE_REFUSED, EXIT_INTERRUPTED):
            failure.exit_code = job.driver_exit_code
        raise failure
    say(f"{job.id} succeeded")
    return _result(job)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _result(job: ray_jobs.Job) -> dict[str, Any]:
    return {"job": asdict(job)}


def _age(since: float | None) -> str:
    if since is None:
        return "not started"
    seconds = max(time.time() - since, 0.0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


if __name__ == "__main__":
    submit()
