"""Why the ranks of a training failed, out of what Ray Train says."""

from __future__ import annotations

from ray.exceptions import RayActorError
from ray.train import TrainingFailedError, WorkerGroupError

from infra import cluster
from infra.s3_errors import StoreRefuses
from pipelines.console import StageFailed, say

MAX_TRACEBACK_CHARACTERS = 8000


def in_one_line(error: TrainingFailedError) -> str:
    """The cause, not its consequences: a rank that died before those whose collectives then failed.

    Raises:
        ValueError: our own code says that it is the user's mistake.
    """
    if not isinstance(error, WorkerGroupError):
        return " ".join(str(getattr(error, "controller_failure", error)).split())[:500]
    failures = {
        rank: getattr(failure, "health_check_failure", failure)  # Ray wraps what it says of a death
        for rank, failure in sorted(error.worker_failures.items())
    }
    for failure in failures.values():
        if isinstance(failure, StageFailed):  # trying again does not help
            raise StageFailed(str(failure)) from error
        if isinstance(failure, ValueError) and not isinstance(failure, StoreRefuses):
            # the failure itself has no traceback any more; the text of all has it, in front of the message
            traceback = str(error).partition(f"{type(failure).__name__}: {failure}")[0]
            if cluster.was_raised_by_us(traceback):
                raise ValueError(str(failure)) from error
    deaths = {rank: failure for rank, failure in failures.items() if isinstance(failure, RayActorError)}
    rank, failure = next(iter((deaths or failures).items()))
    if deaths:
        return f"worker {rank} died: {_first_line(failure)}"
    say(str(error)[-MAX_TRACEBACK_CHARACTERS:])  # a rank's own log is a file on its node
    return f"worker {rank} failed: {type(failure).__name__}: {_first_line(failure)}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).strip()
