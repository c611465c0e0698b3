"""Where registered versions are used: one MLflow run for each stylized bucket and version, in the experiment
`nst-stylize`.

A bucket has an identity of its own, which lies in it: by that its run is found again, however the process
that noted it ended. Nothing of a bucket depends on MLflow: what it could not be told is noted next time.
"""

from __future__ import annotations

import datetime
import logging
import re
import threading
import time
from dataclasses import dataclass
from typing import Literal

from mlflow.entities import LoggedModelInput, Metric, Run, RunTag
from mlflow.tracking import MlflowClient

from infra import registry, tracking_server, training_runs
from infra.tracking_server import shown
from infra.training_runs import CorpusInput

log = logging.getLogger(__name__)

EXPERIMENT = "nst-stylize"
SECONDS_TO_NOTE = 5.0
THREAD_NAME = "mlflow-usage"
BUCKET_ID = re.compile(r"[0-9a-f]{32}")
REPLACED_TAG = "nst.replaced_by"
FIGURES = ("num_done", "num_failed", "seconds")

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

_one_at_a_time = threading.Lock()  # a note that is late must not make a second run beside the next one's


@dataclass(frozen=True, kw_only=True)
class Use:
    """A bucket that a registered version stylized.

    `bucket` is its identity, `BUCKET_ID`; `source` and `out` are URIs; `started_at` (ISO, UTC) and `seconds`
    are those of the last run into it; `num_done` counts its pictures by this version, `num_failed` those
    that failed. `settings` is one line for people. `replaced_by` names the version whose pictures came in
    place of these ("" if none did), `run_id` the MLflow run ("" before it is noted).
    """

    bucket: str
    model: str
    version: int
    model_digest: str
    source: str
    out: str
    status: Status
    started_at: str
    seconds: float
    num_done: int
    num_failed: int
    settings: str
    settings_digest: str
    code_commit: str
    code_digest: str
    replaced_by: str = ""
    run_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Noted:
    """The run that notes a bucket, and what MLflow knows of the version's origin: the bucket keeps that."""

    tracking_uri: str
    run_id: str
    training_run_id: str | None
    corpora: tuple[CorpusInput, ...]


def note(use: Use) -> Noted:
    """Writes `use` down, in the run that its bucket has for this version.

    Raises:
        ValueError: the version is not the one that was used.
        MlflowException, OSError: MLflow is away.
    """
    client = tracking_server.client()
    version = registry.get_version(use.model, use.version)
    if version.digest != use.model_digest:
        raise ValueError(f"{version} is another model here than the one that {use.out} was made with")
    experiment = tracking_server.experiment_id(client, EXPERIMENT)
    known = client.search_runs([experiment], f"tags.`nst.bucket` = '{use.bucket}'")
    run_id = next((run.info.run_id for run in known if _is_of(run, use)), None)
    started = int(datetime.datetime.fromisoformat(use.started_at).timestamp() * 1000)
    if run_id is None:
        name = use.out.rstrip("/").rpartition("/")[2]
        run_id = client.create_run(experiment, started, _tags_of(use), run_name=name).info.run_id
    else:
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in _tags_of(use).items()])
    if version.model_id is not None:
        client.log_inputs(run_id, models=[LoggedModelInput(version.model_id)])
    now = int(time.time() * 1000)
    client.log_batch(run_id, metrics=[Metric(name, float(getattr(use, name)), now, 0) for name in FIGURES])
    _say_replaced(client, known, run_id, str(version))
    if use.status == "RUNNING":
        client.update_run(run_id, status="RUNNING")
    else:
        client.set_terminated(run_id, use.status, started + int(1000 * use.seconds))
    training = training_runs.find_run(version.run_id) if version.run_id else None
    return Noted(
        tracking_uri=shown(tracking_server.tracking_uri()),
        run_id=run_id,
        training_run_id=version.run_id,
        corpora=training.corpora if training else (),
    )


class BackgroundNote:
    """`note` in the background, so that an MLflow that is away or slow holds nothing up."""

    def __init__(self, use: Use) -> None:
        self._use = use
        self._noted: Noted | None = None
        self._reason = f"no answer within {SECONDS_TO_NOTE:.0f} s"
        self._thread = threading.Thread(target=self._note, name=THREAD_NAME, daemon=True)
        self._thread.start()

    def _note(self) -> None:
        try:
            with _one_at_a_time:
                self._noted = note(self._use)
        except Exception as error:  # noqa: BLE001 - whatever a store raises, the bucket is not worse for it
            self._reason = tracking_server.in_short(str(error))

    def result(self) -> Noted | None:
        """Waits at most `SECONDS_TO_NOTE`; None, with a warning, if MLflow was not told by then."""
        self._thread.join(SECONDS_TO_NOTE)
        if self._noted is None:
            log.warning(
                "MLflow at %s was not told of %s (%s); the next `nst stylize` into it does that",
                *(shown(tracking_server.tracking_uri()), self._use.out, self._reason),
            )
        return self._noted


def uses(name: str, version: int, *, limit: int = 20) -> tuple[list[Use], int]:
    """The buckets that a version stylized, the last first: at most `limit` of them, and how many more."""
    client = tracking_server.client()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return [], 0
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(
            [experiment.experiment_id],
            f"tags.`nst.model` = '{name}' and tags.`nst.version` = '{version}'",
            order_by=["tags.`nst.started_at` DESC"],
            page_token=token,
        )
        runs += page
        token = page.token
        if not token:
            break
    return [_use_of(run) for run in runs[:limit]], max(0, len(runs) - limit)


def _is_of(run: Run, use: Use) -> bool:
    tags = run.data.tags
    found = (tags.get("nst.model"), tags.get("nst.version"), tags.get("nst.model_digest"))
    return found == (use.model, str(use.version), use.model_digest)


def _tags_of(use: Use) -> dict[str, str]:
    return {
        "nst.bucket": use.bucket,
        "nst.model": use.model,
        "nst.version": str(use.version),
        "nst.model_digest": use.model_digest,
        "nst.source": shown(use.source),
        "nst.out": shown(use.out),
        "nst.started_at": use.started_at,
        "nst.settings": use.settings,
        "nst.settings_digest": use.settings_digest,
        "nst.commit": use.code_commit,
        "nst.code": use.code_digest,
    }


def _use_of(run: Run) -> Use:
    tags, figures = run.data.tags, run.data.metrics
    return Use(
        bucket=tags.get("nst.bucket", ""),
        model=tags["nst.model"],
        version=int(tags["nst.version"]),
        model_digest=tags.get("nst.model_digest", ""),
        source=tags.get("nst.source", ""),
        out=tags.get("nst.out", ""),
        status=run.info.status,  # pyright: ignore[reportArgumentType]
        started_at=tags.get("nst.started_at", ""),
        seconds=figures.get("seconds", 0.0),
        num_done=int(figures.get("num_done", 0)),
        num_failed=int(figures.get("num_failed", 0)),
        settings=tags.get("nst.settings", ""),
        settings_digest=tags.get("nst.settings_digest", ""),
        code_commit=tags.get("nst.commit", ""),
        code_digest=tags.get("nst.code", ""),
        replaced_by=tags.get(REPLACED_TAG, ""),
        run_id=run.info.run_id,
    )


def _say_replaced(client: MlflowClient, known: list[Run], run_id: str, version: str) -> None:
    """Of the versions that made one bucket's pictures, the last is not replaced, all others are."""
    for run in known:
        tag = run.data.tags.get(REPLACED_TAG)
        if run.info.run_id == run_id:
            if tag is not None:
                client.delete_tag(run_id, REPLACED_TAG)
        elif tag != version:
            client.set_tag(run.info.run_id, REPLACED_TAG, version)
