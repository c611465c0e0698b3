"""Experiment tracking: one MLflow run per logical training, which an outage of the server cannot stop."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import mlflow.tracking
from mlflow.exceptions import MlflowException

from infra import spool
from infra.outbox import Outbox
from infra.run_delivery import RunDelivery
from infra.tracking_server import (
    as_user_error,
    client,
    experiment_id,
    is_unknown_run,
    outage,
    shown,
    tracking_uri,
)

log = logging.getLogger(__name__)

DEFAULT_EXPERIMENT = "nst"
SECONDS_TO_FINISH = 60.0
MAX_PARAM_CHARACTERS = 6000  # MLflow's own limit
SPOOL_PREFIX = "nst-tracking-"

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


class TrackedRun:
    """One MLflow run. After `start`, nothing here waits for the server and no outage raises.

    Records go through a bounded queue on disk, in order, from a background thread; while the server is away
    they are kept and sent later, by the next process on this machine that resumes the run if this one is
    killed. A resumed run takes no figure at a step, and no image, that it has from before: what a training
    repeats after its last checkpoint is there once. `finish` says what was lost, if anything was.
    """

    def __init__(self, mlflow_client: mlflow.tracking.MlflowClient, run_id: str, *, is_resumed: bool) -> None:
        self.run_id = run_id
        self._delivery = RunDelivery(mlflow_client, run_id, is_resumed=is_resumed)
        self._not_stored: dict[str, int] | None = None
        self._spool = _claim_spool(run_id)
        # Two queues: an artifact store that refuses us must not hold the metrics back.
        uri = shown(mlflow_client.tracking_uri)
        self._records = Outbox(
            f"MLflow at {uri}",
            self._delivery.records,
            outage,
            path=self._spool and _records_path(self._spool),
            grouped_kinds=("metrics",),
        )
        self._files = Outbox(
            f"artifacts of MLflow at {uri}",
            self._delivery.files,
            outage,
            path=self._spool and _files_path(self._spool),
        )
        self._adopt_abandoned()

    @classmethod
    def start(
        cls,
        name: str,
        *,
        experiment: str = DEFAULT_EXPERIMENT,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
        uri: str | None = None,
    ) -> TrackedRun:
        """A new run, or the one with `run_id` going on (a new one, with a warning, if nobody knows it).

        Raises:
            ValueError: a new run is wanted and the server does not answer. An outage while a run is being
                resumed is bridged like any other.
        """
        uri = uri or tracking_uri()
        mlflow_client = client(uri)
        if run_id is not None and not is_unknown_run(mlflow_client, run_id):
            run = cls(mlflow_client, run_id, is_resumed=True)
            run._put_status("RUNNING")
            run.set_tags(tags or {})
            return run
        given = dict(tags or {})
        if run_id is not None:
            log.warning("MLflow at %s does not know the run %s; a new one goes on", shown(uri), run_id)
            given["nst.resumed_from"] = run_id
        try:
            created = mlflow_client.create_run(
                experiment_id(mlflow_client, experiment), run_name=name, tags=given
            )
        except (MlflowException, OSError) as error:
            raise as_user_error(uri, error) from error
        return cls(mlflow_client, created.info.run_id, is_resumed=False)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Parameters; nested mappings become `outer.inner`. One that a resumed run changes keeps its first
        value, and the change is noted in a tag `changed.<name>`."""
        self._records.put("params", dict(_flattened(params)))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Figures at `step`, stamped with the time of this call."""
        values = {key: float(value) for key, value in metrics.items()}
        self._records.put("metrics", {"values": values, "step": int(step), "time": _now_ms()})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        if tags:
            self._records.put("tags", {key: str(value) for key, value in tags.items()})

    def log_corpus(self, name: str, uri: str, digest: str, *, context: str) -> None:
        """Notes a corpus as an input of the run; `context` is its part, such as "content" or "style"."""
        self._records.put("corpus", {"name": name, "uri": uri, "digest": digest, "context": context})

    def log_dict(self, data: Any, artifact_file: str) -> None:
        """`data` as JSON, as the artifact `artifact_file`."""
        text = json.dumps(data, indent=2, sort_keys=True, default=str)
        self._files.put("document", {"text": text, "file": artifact_file})

    def log_image(self, path: str | Path, key: str, step: int = 0) -> None:
        """An image of a series: MLflow shows those of one `key` with a slider over the steps.

        `key` may hold letters, digits, spaces and `_-./`.
        """
        # The name is made here, so that a second attempt replaces what the first one may have left behind.
        identifier = {"key": key, "step": int(step), "time": _now_ms(), "identifier": str(uuid.uuid4())}
        self._files.put("image", identifier, Path(path))

    def flush(self, timeout_s: float = SECONDS_TO_FINISH) -> bool:
        """Waits until all that was logged is stored; False if that takes longer than `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        is_stored = self._files.flush(timeout_s)
        return self._records.flush(max(0.0, deadline - time.monotonic())) and is_stored

    def finish(
        self, status: RunStatus | None = "FINISHED", timeout_s: float = SECONDS_TO_FINISH
    ) -> dict[str, int]:
        """Sends what is left and sets the run's status, for at most `timeout_s` seconds. None leaves the
        status to another process that tracks the same run.

        Returns:
            How many records of each kind could not be stored; empty when all were. They are kept on disk,
            and sent by whoever resumes the run on this machine within some days, as far as a warning does
            not say otherwise. A second call changes nothing and returns the same.
        """
        if self._not_stored is not None:
            return self._not_stored
        deadline = time.monotonic() + timeout_s
        self._adopt_abandoned()
        if status is not None:
            self._put_status(status)
        lost_files, kept_files = self._files.close(timeout_s)
        lost_records, kept_records = self._records.close(max(1.0, deadline - time.monotonic()))
        lost, kept = lost_files + lost_records, kept_files + kept_records
        self._not_stored = dict(lost + kept)
        if lost:
            log.warning("MLflow run %s: not stored, and lost: %s", self.run_id, _listed(lost))
        if self._spool is None:
            return self._not_stored
        if kept:
            is_unknown = status is not None and "status" in kept
            end = f"; MLflow does not know yet that the run is {status}" if is_unknown else ""
            log.warning(
                "MLflow run %s: not stored: %s%s. Kept in %s for %d days and sent if the run is resumed here",
                *(self.run_id, _listed(kept), end, self._spool.path, spool.DAYS_TO_KEEP),
            )
        if self._files.has_ended and self._records.has_ended:  # else the end of the process releases it
            self._spool.release() if kept else self._spool.remove()
        return self._not_stored

    def _put_status(self, status: str) -> None:
        self._records.put("status", {"status": status, "time": _now_ms()}, beyond_bounds=True)

    def _adopt_abandoned(self) -> None:
        """Takes up what killed processes on this machine could not send of this run."""
        if self._spool is None:
            return
        try:
            for left in spool.abandoned(SPOOL_PREFIX + self.run_id):
                self._delivery.history.forget()
                pairs = ((self._records, _records_path(left)), (self._files, _files_path(left)))
                if all(outbox.adopt(path) for outbox, path in pairs if path.exists()):
                    left.remove()
                else:
                    left.release()
        except OSError as error:
            log.warning(
                "MLflow run %s: what an earlier process left stays where it is: %s", self.run_id, error
            )


def deliver_left(run_id: str, uri: str | None, timeout_s: float) -> dict[str, int]:
    """Sends what killed processes on this machine could not send of a run.

    Returns:
        How many records of each kind are still not stored; empty when all are, or none were left.
    """
    return TrackedRun(client(uri or tracking_uri()), run_id, is_resumed=True).finish(None, timeout_s)


def _claim_spool(run_id: str) -> spool.Spool | None:
    """A folder for what is not sent yet; None, with a warning, where there can be none."""
    try:
        spool.remove_old(SPOOL_PREFIX)
        return spool.claim(SPOOL_PREFIX + run_id)
    except OSError as error:
        log.warning(
            "no folder for what MLflow has not got yet (%s): it is lost if this process is killed", error
        )
        return None


def _records_path(folder: spool.Spool) -> Path:
    return folder.path / "records.sqlite"


def _files_path(folder: spool.Spool) -> Path:
    return folder.path / "files.sqlite"


def _listed(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{number} x {kind}" for kind, number in sorted(numbers.items()))


def _now_ms() -> int:
    return int(time.time() * 1000)


def _flattened(params: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)[:MAX_PARAM_CHARACTERS]
