"""A training's MLflow run, as its driver sees it: begun, and told how it ended."""

from __future__ import annotations

import logging
from typing import Any, Literal

from infra import cluster_nodes, s3, storage, tracking, tracking_server
from nst.config import to_dict
from pipelines.lineage import code_digest
from pipelines.train_worker import WorkerSettings
from pipelines.training_claim import TrainingClaim
from pipelines.training_record import Training, code_version

log = logging.getLogger(__name__)

SECONDS_TO_SEND_LEFT = 30.0
SECONDS_TO_TELL_END = 5.0  # each to the store and to MLflow; `nst stop` waits for a checkpoint before


def check_tracking(known: dict[str, Any]) -> bool:
    """Whether MLflow answers and keeps artifacts. Raises ValueError if it does not where a training begins;
    one that goes on has its run, and can do without for a while."""
    try:
        tracking_server.check()
        tracking_server.check_artifacts(tracking.DEFAULT_EXPERIMENT)
    except ValueError as error:
        if not known:
            raise
        log.warning("%s; the training goes on without it", error)
        return False
    return True


def start_run(
    training: Training, claim: TrainingClaim, num_workers: tuple[int, int], num_threads: int
) -> tracking.TrackedRun:
    """The training's MLflow run, new or going on, with all that does not change any more."""
    run = tracking.TrackedRun.start(
        training.name,
        run_id=claim.known.get("run_id"),
        tags={"nst.training": training.uri, "nst.commit": code_version(), "nst.code": code_digest()},
    )
    claim.take(run.run_id, num_threads)  # at once: a run that nobody knows of would be made twice
    run.log_params(
        {"num_workers": ":".join(map(str, dict.fromkeys(num_workers))), **to_dict(training.config)}
    )
    run.log_dict(to_dict(training.config), "config.json")
    for role, corpus in (("content", training.content), ("style", training.style)):
        run.log_corpus(storage.name(corpus.uri), corpus.uri, corpus.manifest.digest, context=role)
    return run


def send_left(settings: WorkerSettings) -> None:
    """What ranks that were killed while MLflow was away had not sent lies on their nodes."""
    calls = cluster_nodes.call_on_nodes(
        cluster_nodes.living_nodes(),
        tracking.deliver_left,
        settings.run_id,
        settings.tracking_uri,
        SECONDS_TO_SEND_LEFT,
        timeout_s=2 * SECONDS_TO_SEND_LEFT,
    )
    for address, left in calls.items():
        if left:
            log.warning("%s still has figures that MLflow has not: %s", address, left)


def tell_end(claim: TrainingClaim, run: tracking.TrackedRun, status: Literal["KILLED", "FAILED"]) -> None:
    """To the store and to MLflow, each though the other does not answer. Whoever stops a job gives it some
    seconds only."""
    try:
        with s3.patience(SECONDS_TO_TELL_END):
            claim.end(status)
    except Exception as error:  # noqa: BLE001 - there is an error already, which this must not hide
        log.warning("the training's record still says RUNNING: %s", error)
    run.finish(status, SECONDS_TO_TELL_END)


def shareable_tracking_uri() -> str | None:
    """The tracking server as the workers are told it; None if it holds a password. Ray shows a run's settings
    to whoever sees its dashboard, and the workers have the address in their own environment."""
    uri = tracking_server.tracking_uri()
    return uri if tracking_server.shown(uri) == uri else None
