"""Jobs that a cluster loses: what is left of one is waited for, then it is submitted again."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from ray.job_submission import JobDetails

from infra.job_logs import JobForgotten, follow
from infra.jobs import SECONDS_BETWEEN_LOOKS, UNANSWERED, Client, Job, Submission, find, first_line, submit

# Ray ends a driver whose supervisor died at the next look of a loop that takes a second.
SECONDS_FOR_DRIVER = 3.0
SECONDS_FOR_ACTORS = 90.0
# A node whose head is gone ends itself and all that it runs after 60 s.
SECONDS_WITHOUT_HEAD = 90.0
SECONDS_TO_SUBMIT = 300.0


def follow_to_the_end(
    client: Client, submission: Submission, job: Job, write: Callable[[str], None], *, max_resubmissions: int
) -> Job:
    """Follows the job; submits it again, with the same files, if its driver is lost. Returns how it ended.

    Raises what `follow` raises, and TimeoutError if what a lost job left does not end.
    """
    for num_losses in itertools.count(1):
        try:
            job = follow(client, job.id, write)
        except JobForgotten as error:
            if num_losses > max_resubmissions:
                raise
            reason = first_line(error)
        else:
            if not job.was_lost or num_losses > max_resubmissions:
                return job
            reason = job.told[0]
        write(f"[{job.id} was lost: {reason}; submitting it again, {num_losses} of {max_resubmissions}]\n")
        wait_until_gone(client, job.id)
        job = _submit_patiently(client, submission)
        write(f"[goes on as {job.id}]\n")
    raise AssertionError("unreachable")


def wait_until_gone(client: Client, job_id: str) -> None:
    """Waits until nothing of a job that was lost or forgotten runs any more: Ray ends the driver that has no
    supervisor, and what that driver made in the cluster.

    Raises TimeoutError if something still runs after 90 s.
    """
    time.sleep(SECONDS_FOR_DRIVER)
    deadline = time.monotonic() + SECONDS_FOR_ACTORS
    while left := _left_of(client, job_id):
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{job_id} was lost, but {SECONDS_FOR_ACTORS:.0f} s later there is still {left}"
            )
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _left_of(client: Client, job_id: str) -> str:
    """What still runs, in words."""
    try:
        if find(client, job_id) is None:  # a new head cannot say what the nodes of the former one still run
            time.sleep(SECONDS_WITHOUT_HEAD)
            return ""
        return _living(client, client.get_job_info(job_id))
    except UNANSWERED as error:
        return f"no answer ({first_line(error)})"


def _living(client: Client, details: JobDetails) -> str:
    driver = details.driver_info
    if driver is None:  # it had not joined the cluster
        return ""
    # Ray goes on to call a process alive whose node died with it.
    nodes = {node["node_id"] for node in client.states("nodes", state="ALIVE")}
    for worker in client.states("workers", pid=driver.pid, worker_type="DRIVER", is_alive="True"):
        if worker["ip"] == driver.node_ip_address and worker["node_id"] in nodes:
            return f"its driver, process {driver.pid} on {driver.node_ip_address}"
    for actor in client.states("actors", job_id=driver.id):
        if actor["state"] != "DEAD" and actor["node_id"] in nodes and not actor["is_detached"]:
            return f"its actor {actor['class_name']}, process {actor['pid']}"
    # They hold CPUs and GPUs that the next driver would find in use.
    for group in client.states("placement_groups", creator_job_id=driver.id):
        if group["state"] != "REMOVED" and not group["is_detached"]:
            return f"its placement group {group['placement_group_id']}"
    return ""


def _submit_patiently(client: Client, submission: Submission) -> Job:
    deadline = time.monotonic() + SECONDS_TO_SUBMIT
    while True:
        try:
            return submit(client, submission)[0]
        except UNANSWERED:
            if time.monotonic() > deadline:
                raise
            time.sleep(10 * SECONDS_BETWEEN_LOOKS)
