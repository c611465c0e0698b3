"""What MLflow knows of trainings: read back, by the run or by the corpus that it was trained on."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass

from mlflow.entities import DatasetInput, Run, ViewType
from mlflow.exceptions import MlflowException

from infra import places, registry, tracking_server
from infra.registry import RegisteredVersion
from infra.run_delivery import MAX_DIGEST_CHARACTERS
from infra.tracking import DEFAULT_EXPERIMENT


@dataclass(frozen=True, kw_only=True)
class CorpusInput:
    """A corpus that a run was trained on. `role` is content or style, `digest` that of its manifest."""

    role: str
    uri: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A run as MLflow has it. Times are in UTC; `ended_at` is None while it runs. `is_training` is false for
    a run that only holds what belongs to a version whose checkpoint came from elsewhere. `metrics` are the
    last values."""

    run_id: str
    name: str
    status: str
    is_deleted: bool
    is_training: bool
    started_at: datetime.datetime
    ended_at: datetime.datetime | None
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]
    corpora: tuple[CorpusInput, ...]


def find_run(run_id: str) -> TrainingRun | None:
    """The run; None where MLflow has nothing of it any more."""
    try:
        return _run_of(tracking_server.client().get_run(run_id))
    except MlflowException as error:
        if error.error_code not in tracking_server.REFUSALS:
            raise
        return None


def trained_on(uri: str, digest: str) -> list[TrainingRun]:
    """The runs that were trained on the corpus with this digest, wherever it lay, and those that were trained
    on what was at `uri` in its time; the newest first."""
    client = tracking_server.client()
    experiment = client.get_experiment_by_name(DEFAULT_EXPERIMENT)
    if experiment is None:
        return []
    found: dict[str, TrainingRun] = {}
    filters = [f"dataset.digest = '{digest[:MAX_DIGEST_CHARACTERS]}'"]
    if "'" not in (name := places.name(uri)):  # MLflow's filters have no way to write one
        filters.append(f"dataset.name = '{name}'")
    for wanted in filters:
        token: str | None = None
        while True:
            page = client.search_runs([experiment.experiment_id], wanted, ViewType.ALL, page_token=token)
            for run in map(_run_of, page):
                if any(corpus.digest == digest or corpus.uri == uri for corpus in run.corpora):
                    found[run.run_id] = run
            token = page.token
            if not token:
                break
    return sorted(found.values(), key=lambda run: run.started_at, reverse=True)


def logged_at(run_id: str, figure: str) -> datetime.datetime | None:
    """When a figure of a run was logged last; None if it never was."""
    times = [metric.timestamp for metric in tracking_server.client().get_metric_history(run_id, figure)]
    return _time_of(max(times)) if times else None


def versions_of(run_id: str) -> list[RegisteredVersion]:
    """The registered versions that came from a run, of whatever name, the oldest first."""
    found = tracking_server.client().search_model_versions(f"run_id = '{run_id}'")
    numbers = sorted((version.name, int(version.version)) for version in found)
    return [registry.get_version(name, number) for name, number in numbers]


def _run_of(run: Run) -> TrainingRun:
    return TrainingRun(
        run_id=run.info.run_id,
        name=run.info.run_name or "",
        status=run.info.status,
        is_deleted=run.info.lifecycle_stage == "deleted",
        is_training=run.data.tags.get("nst.kind") != "register",
        started_at=_time_of(run.info.start_time),
        ended_at=_time_of(run.info.end_time) if run.info.end_time else None,
        tags=dict(run.data.tags),
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
        corpora=tuple(map(_corpus_of, run.inputs.dataset_inputs if run.inputs else ())),
    )


def _corpus_of(given: DatasetInput) -> CorpusInput:
    """The whole digest stands in the source, beside the URI; another program's dataset is taken as it is."""
    role = next((tag.value for tag in given.tags if tag.key == "mlflow.data.context"), "other")
    try:
        source = json.loads(given.dataset.source)
        uri, digest = str(source["uri"]), str(source["digest"])
    except (ValueError, TypeError, KeyError):
        uri, digest = given.dataset.source, given.dataset.digest
    return CorpusInput(role=role, uri=uri, digest=digest)


def _time_of(milliseconds: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC)
