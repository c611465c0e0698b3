"""Experiment tracking: one MLflow run per logical training, which an outage of the server cannot stop.

Where it goes: MLFLOW_TRACKING_URI; unset, a SQLite file and a folder under `./.nst/`.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

# Before mlflow is imported: a training on a closed network reports to nobody.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import mlflow.tracking
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from PIL import Image

from infra.outbox import Outbox

log = logging.getLogger(__name__)

DEFAULT_EXPERIMENT = "nst"
SECONDS_TO_CHECK = 10.0
SECONDS_TO_FINISH = 60.0
MAX_METRICS_A_REQUEST = 1000  # MLflow's own limits
MAX_PARAMS_A_REQUEST = 100
MAX_PARAM_CHARACTERS = 6000
MAX_DIGEST_CHARACTERS = 36

# The server understood and said no; sending the same again changes nothing.
REFUSALS = {
    "ALREADY_EXISTS",
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "NOT_FOUND",
    "NOT_IMPLEMENTED",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
}

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or the SQLite file under `./.nst/` (an absolute path, fit for other processes)."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / '.nst' / 'mlflow.db'}"


def shown(uri: str) -> str:
    """`uri` without the password that it may carry."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return uri.replace(parts.netloc, parts.netloc.rpartition("@")[2], 1)


def client(uri: str | None = None) -> mlflow.tracking.MlflowClient:
    """A client of the tracking server at `uri` (None: `tracking_uri()`).

    Raises:
        ValueError: `uri` cannot be a store, or its database is of another version of MLflow.
    """
    uri = uri or tracking_uri()
    _set_up_mlflow()
    path = _sqlite_path(uri)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{shown(uri)}: cannot make {path.parent} ({error.strerror}); "
                "set MLFLOW_TRACKING_URI or work in a folder of your own"
            ) from error
    try:
        return mlflow.tracking.MlflowClient(uri)
    except MlflowException as error:
        raise _as_user_error(uri, error) from error


@functools.cache
def _set_up_mlflow() -> None:
    """MLflow would tell of every table and every retry, and wait eight times 120 s for an answer."""
    for name, level in (("mlflow", "WARNING"), ("alembic", "WARNING"), ("urllib3.connectionpool", "ERROR")):
        logging.getLogger(name).setLevel(level)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")


def _sqlite_path(uri: str) -> Path | None:
    path = uri.removeprefix("sqlite:///")
    return None if path == uri or not path else Path(path.partition("?")[0]).absolute()


def require_lasting_store() -> None:
    """Raises ValueError where what is logged would go with the node, or where each node would log for itself:
    a SQLite file in a Ray job or on a cluster of several machines."""
    in_a_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    on_a_cluster = os.environ.get("RAY_ADDRESS", "local") not in ("", "local")
    if _sqlite_path(tracking_uri()) is not None and (in_a_job or on_a_cluster):
        raise ValueError(
            f"{shown(tracking_uri())} is a file on one node: its runs and models would be lost with the job. "
            "Set MLFLOW_TRACKING_URI to an MLflow server that the cluster reaches"
        )


def check(uri: str | None = None) -> None:
    """Asks the tracking server for one experiment, as every later call would.

    Raises:
        ValueError: it gives no useful answer within 10 s, and what to set.
    """
    uri = uri or tracking_uri()
    answers: list[ValueError | None] = []

    def ask() -> None:
        try:
            client(uri).search_experiments(max_results=1)
            answers.append(None)
        except ValueError as error:
            answers.append(error)
        except Exception as error:  # noqa: BLE001 - whatever a store raises, it does not answer
            answers.append(_as_user_error(uri, error))

    thread = threading.Thread(target=ask, name="mlflow-check", daemon=True)
    thread.start()
    # A new SQLite file needs some seconds for its tables, however slow the machine: it is not bounded.
    thread.join(None if uri.startswith("sqlite:") else SECONDS_TO_CHECK)
    answer = answers[0] if answers else _as_user_error(uri, f"no answer within {SECONDS_TO_CHECK:.0f} s")
    if answer is not None:
        raise answer


def _as_user_error(uri: str, cause: Exception | str) -> ValueError:
    """One line that says which setting to look at."""
    text = str(cause)
    remedy = "start that server, correct MLFLOW_TRACKING_URI, or unset it to track in ./.nst/mlflow.db"
    code = getattr(cause, "error_code", "")
    if "Invalid Host header" in text:
        remedy = f'start the server with --allowed-hosts "{urlsplit(uri).netloc.rpartition("@")[2]}"'
        text = "403 Invalid Host header"
    elif code in ("PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED", "UNAUTHENTICATED"):
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        text = "it does not let us in"
    elif "out-of-date database schema" in text:
        remedy = f"run `mlflow db upgrade {shown(uri)}` after making a copy"
        text = "its database is of another version of MLflow"
    return ValueError(f"MLflow at {shown(uri)}: {_in_short(text.replace(uri, shown(uri)))}; {remedy}")


def experiment_id(mlflow_client: mlflow.tracking.MlflowClient, name: str) -> str:
    """The experiment of that name, made where there is none.

    Beside a SQLite store its artifacts lie in `mlartifacts/`; a server says itself where they go.

    Raises:
        ValueError: the experiment was deleted.
    """
    experiment = mlflow_client.get_experiment_by_name(name)
    if experiment is None:
        path = _sqlite_path(mlflow_client.tracking_uri)
        location = (path.parent / "mlartifacts" / name).as_uri() if path else None
        try:
            return mlflow_client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = mlflow_client.get_experiment_by_name(name)  # another process was faster
    assert experiment is not None, name
    if experiment.lifecycle_stage == "deleted":
        found = experiment.experiment_id
        raise ValueError(f"the experiment {name!r} was deleted: run `mlflow experiments restore -x {found}`")
    return experiment.experiment_id


class TrackedRun:
    """One MLflow run. After `start`, nothing here waits for the server and no outage raises.

    Records go through a bounded queue, in order, from a background thread; while the server is away they are
    kept and sent later. `finish` says what was lost, if anything was.
    """

    def __init__(self, mlflow_client: mlflow.tracking.MlflowClient, run_id: str) -> None:
        self.run_id = run_id
        self._client = mlflow_client
        self._spool = tempfile.TemporaryDirectory(prefix="nst-tracking-")
        self._num_spooled = 0
        self._lost: dict[str, int] | None = None
        # Two queues: an artifact store that refuses us must not hold the metrics back.
        uri = shown(mlflow_client.tracking_uri)
        self._records = Outbox(f"MLflow at {uri}", self._deliver_records, _outage, grouped_kinds=("metrics",))
        self._files = Outbox(f"artifacts of MLflow at {uri}", self._deliver_files, _outage)

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
        if run_id is not None and not _is_unknown_run(mlflow_client, run_id):
            run = cls(mlflow_client, run_id)
            run._records.put("status", "RUNNING")
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
            raise _as_user_error(uri, error) from error
        return cls(mlflow_client, created.info.run_id)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Parameters; nested mappings become `outer.inner`. One that a resumed run changes keeps its first
        value, and the change is noted in a tag `changed.<name>`."""
        self._records.put("params", dict(_flattened(params)))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Figures at `step`, stamped with the time of this call."""
        now = int(time.time() * 1000)
        self._records.put("metrics", [Metric(key, float(value), now, step) for key, value in metrics.items()])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        if tags:
            self._records.put("tags", {key: str(value) for key, value in tags.items()})

    def log_corpus(self, name: str, uri: str, digest: str, *, context: str) -> None:
        """Notes a corpus as an input of the run; `context` is its part, such as "content" or "style"."""
        source = json.dumps({"uri": uri, "digest": digest})
        kind = "s3" if uri.startswith("s3:") else "local"
        # MLflow keeps 36 characters of a digest; the whole one stands in the source.
        dataset = Dataset(name=name, digest=digest[:MAX_DIGEST_CHARACTERS], source_type=kind, source=source)
        self._records.put("corpus", DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A file as it is now (it is copied), below `folder` of the run's artifacts."""
        self._num_spooled += 1
        copy = Path(self._spool.name) / str(self._num_spooled) / Path(path).name
        copy.parent.mkdir()
        shutil.copyfile(path, copy)
        if not self._files.put("artifact", (copy, folder), num_bytes=copy.stat().st_size):
            copy.unlink()

    def log_dict(self, data: Any, artifact_file: str) -> None:
        """`data` as JSON, as the artifact `artifact_file`."""
        text = json.dumps(data, indent=2, sort_keys=True, default=str)
        self._files.put("document", (text, artifact_file), num_bytes=len(text))

    def log_image(self, path: str | Path, key: str, step: int = 0) -> None:
        """An image of a series: MLflow shows those of one `key` with a slider over the steps.

        `key` may hold letters, digits, spaces and `_-./`.
        """
        data = Path(path).read_bytes()
        self._files.put("image", (data, key, step), num_bytes=len(data))

    def flush(self, timeout_s: float = SECONDS_TO_FINISH) -> bool:
        """Waits until all that was logged is stored; False if that takes longer than `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        is_stored = self._files.flush(timeout_s)
        return self._records.flush(max(0.0, deadline - time.monotonic())) and is_stored

    def finish(self, status: RunStatus = "FINISHED", timeout_s: float = SECONDS_TO_FINISH) -> dict[str, int]:
        """Sends what is left and sets the run's status, for at most `timeout_s` seconds.

        Returns:
            How many records of each kind could not be stored; empty when all were. A second call changes
            nothing and returns the same.
        """
        if self._lost is not None:
            return self._lost
        deadline = time.monotonic() + timeout_s
        self._records.put("status", status)
        lost = self._files.close(timeout_s)
        lost |= self._records.close(max(1.0, deadline - time.monotonic()))
        self._lost = lost
        self._spool.cleanup()
        if lost:
            counts = ", ".join(f"{number} x {kind}" for kind, number in sorted(lost.items()))
            log.warning("MLflow run %s: not stored: %s", self.run_id, counts)
        return lost

    def __enter__(self) -> TrackedRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish("FINISHED")
        else:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")

    def _deliver_records(self, kind: str, payloads: list[Any]) -> None:
        if kind == "metrics":
            metrics = [metric for payload in payloads for metric in payload]
            for start in range(0, len(metrics), MAX_METRICS_A_REQUEST):
                self._client.log_batch(self.run_id, metrics=metrics[start : start + MAX_METRICS_A_REQUEST])
            return
        (payload,) = payloads
        if kind == "params":
            self._deliver_params(payload)
        elif kind == "tags":
            self._client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in payload.items()])
        elif kind == "corpus":
            self._client.log_inputs(self.run_id, datasets=[payload])
        elif payload == "RUNNING":
            self._client.update_run(self.run_id, status=payload)
        else:
            self._client.set_terminated(self.run_id, status=payload)

    def _deliver_params(self, params: dict[str, str]) -> None:
        stored = self._client.get_run(self.run_id).data.params
        new = [Param(key, value) for key, value in params.items() if key not in stored]
        for start in range(0, len(new), MAX_PARAMS_A_REQUEST):
            self._client.log_batch(self.run_id, params=new[start : start + MAX_PARAMS_A_REQUEST])
        for key, value in params.items():
            if stored.get(key, value) != value:
                self._client.set_tag(self.run_id, f"changed.{key}", f"{stored[key]} -> {value}")

    def _deliver_files(self, kind: str, payloads: list[Any]) -> None:
        (payload,) = payloads
        if kind == "artifact":
            path, folder = payload
            self._client.log_artifact(self.run_id, str(path), folder)
            path.unlink()
        elif kind == "document":
            text, artifact_file = payload
            self._client.log_text(self.run_id, text, artifact_file)
        else:
            data, key, step = payload
            with Image.open(io.BytesIO(data)) as image:
                self._client.log_image(self.run_id, image, key=key, step=step)


def _flattened(params: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)[:MAX_PARAM_CHARACTERS]


def _outage(error: Exception) -> str | None:
    """What stands in the way, in a few words, if the same call may well succeed later."""
    if isinstance(error, MlflowException):
        is_outage = error.error_code not in REFUSALS
    else:
        is_outage = not isinstance(error, (FileNotFoundError, LookupError, TypeError, ValueError))
    return _in_short(str(error)) if is_outage else None


def _in_short(text: str) -> str:
    """The innermost cause of a failed request: "[Errno 111] Connection refused"."""
    if "Caused by " in text:
        text = text.rpartition("Caused by ")[2].rpartition(": ")[2].rstrip("'\")")
    return " ".join(text.split())[:300]


def _is_unknown_run(mlflow_client: mlflow.tracking.MlflowClient, run_id: str) -> bool:
    """True only where the server says so: an outage proves nothing."""
    try:
        run: Run = mlflow_client.get_run(run_id)
    except MlflowException as error:
        return error.error_code in REFUSALS
    except OSError:
        return False
    return run.info.lifecycle_stage == "deleted"
