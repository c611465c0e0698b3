"""The MLflow server or store that everything is tracked in: where it is, and what its errors mean.

Where it is: MLFLOW_TRACKING_URI; unset, a SQLite file and a folder under `./.nst/`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import mlflow.store.db_migrations
import mlflow.tracking
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from infra import s3, scratch

SECONDS_TO_CHECK = 10.0

# In what MLflow says, and what Alembic says behind it, of a database that is not of this version.
SCHEMA_REVISION = re.compile(r"(?:database schema \(found version|locate revision identified by) '?(\w+)")

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


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or the SQLite file under `./.nst/` (an absolute path, fit for other processes)."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / '.nst' / 'mlflow.db'}"


def is_set_up() -> bool:
    """Whether there is one to ask: a set MLFLOW_TRACKING_URI, or the SQLite file of an earlier command.
    Asking a store that is not there would make it."""
    path = _sqlite_path(tracking_uri())
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) or path is None or path.is_file()


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
        raise as_user_error(uri, error) from error


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
    try:
        # A new SQLite file needs some seconds for its tables, however slow the machine: it is not bounded.
        seconds = None if uri.startswith("sqlite:") else SECONDS_TO_CHECK
        _within(seconds, lambda: client(uri).search_experiments(max_results=1))
    except ValueError:
        raise
    except Exception as error:  # whatever a store raises, it does not answer
        raise as_user_error(uri, error) from error


def _within(seconds: float | None, ask: Callable[[], object]) -> None:
    """Raises what `ask` raises, and TimeoutError if it has not ended after `seconds`."""
    ends: list[Exception | None] = []

    def run() -> None:
        try:
            ask()
            ends.append(None)
        except Exception as error:  # noqa: BLE001 - is raised by the thread that waits
            ends.append(error)

    thread = threading.Thread(target=run, name="mlflow-check", daemon=True)
    thread.start()
    thread.join(seconds)
    end = ends[0] if ends else TimeoutError(f"no answer within {seconds:.0f} s")
    if end is not None:
        raise end


def check_artifacts(experiment: str, uri: str | None = None) -> None:
    """Stores a few bytes where the experiment's runs keep their artifacts, reads them back and removes them:
    through the server, or with this machine's own credentials where the server sends its clients to a bucket.

    Raises:
        ValueError: that does not work within 10 s; what it says, and what to look at.
    """
    uri = uri or tracking_uri()
    location = experiment
    try:
        mlflow_client = client(uri)
        found = mlflow_client.get_experiment(experiment_id(mlflow_client, experiment))
        location = str(found.artifact_location)
        repository = get_artifact_repository(location, tracking_uri=uri)
        with s3.errors(location):
            _within(SECONDS_TO_CHECK, lambda: _keep_a_few_bytes(repository))
    except ValueError as error:  # with its remedy
        raise ValueError(f"the artifacts of MLflow at {shown(uri)}: {error}") from error
    except Exception as error:
        remedy = "let this process write there"
        if location.startswith("mlflow-artifacts:"):
            remedy = "look at that server's --artifacts-destination and at its credentials for it"
        elif "://" in location and not location.startswith("file:"):
            remedy = "let the credentials of this process get, put and delete objects there"
        raise ValueError(
            f"the artifacts of MLflow at {shown(uri)} cannot be kept in {location} ({in_short(str(error))}); "
            f"{remedy}"
        ) from error


def _keep_a_few_bytes(repository: ArtifactRepository) -> None:
    folder = f"nst-check-{secrets.token_hex(8)}"
    with scratch.folder("nst-check-") as here:
        sent = Path(here, "probe.txt")
        sent.write_text(folder)
        repository.log_artifact(str(sent), folder)
        try:
            repository.download_artifacts(f"{folder}/{sent.name}", here)
        finally:
            with contextlib.suppress(Exception):  # who may not delete can train all the same
                repository.delete_artifacts(folder)
        if Path(here, folder, sent.name).read_text() != folder:
            raise OSError("what is read back is not what was written")


def as_user_error(uri: str, cause: Exception | str) -> ValueError:
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
    elif schema := SCHEMA_REVISION.search(text):
        text, remedy = _of_schema(uri, schema[1])
    return ValueError(f"MLflow at {shown(uri)}: {in_short(text.replace(uri, shown(uri)))}; {remedy}")


def _of_schema(uri: str, revision: str) -> tuple[str, str]:
    """What to do about a database that MLflow has not brought up to date by itself, as it does with most."""
    schemas = Path(str(mlflow.store.db_migrations.__file__)).with_name("versions")
    if any(schemas.glob(f"{revision}_*.py")):
        return (
            "its database is of an older version of MLflow",
            f"run `mlflow db upgrade {shown(uri)}` after making a copy",
        )
    return (
        f"its database is of a newer version of MLflow than {mlflow.__version__}, which is installed here",
        "install that newer version, or go back to a copy of the database from before",
    )


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


def outage(error: Exception) -> str | None:
    """What stands in the way, in a few words, if the same call may well succeed later."""
    if isinstance(error, MlflowException):
        is_outage = error.error_code not in REFUSALS
    else:
        is_outage = not isinstance(error, (FileNotFoundError, LookupError, TypeError, ValueError))
    return in_short(str(error)) if is_outage else None


@contextlib.contextmanager
def outages_told(consolation: str) -> Iterator[None]:
    """Within it (or in a function that it decorates) a server that goes away is told in one line.

    Raises:
        OSError: the server did not answer; `consolation` says what then.
    """
    try:
        yield
    except MlflowException as error:
        cause = outage(error)
        if cause is None:
            raise
        raise OSError(f"MLflow at {shown(tracking_uri())} went away ({cause}); {consolation}") from error


def in_short(text: str) -> str:
    """The innermost cause of a failed request: "[Errno 111] Connection refused"."""
    if "Caused by " in text:
        text = text.rpartition("Caused by ")[2].rpartition(": ")[2].rpartition("('")[2].rstrip("'\")")
    return " ".join(text.split())[:300]


def is_unknown_run(mlflow_client: mlflow.tracking.MlflowClient, run_id: str) -> bool:
    """True only where the server says so: an outage proves nothing."""
    try:
        run: Run = mlflow_client.get_run(run_id)
    except MlflowException as error:
        return error.error_code in REFUSALS
    except OSError:
        return False
    return run.info.lifecycle_stage == "deleted"
