"""What an evaluation found about a registered version, kept with it."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from infra import registry, s3, tracking_server
from infra.registry import RegisteredVersion
from infra.run_delivery import MAX_DIGEST_CHARACTERS

MEANS = "evaluation/"  # what the figures of a run are called that are means of an evaluation
EVALUATION_FILE, REPORT_FILE = "evaluation.json", "report.html"


def record_evaluation(
    name: str, version: int, evaluation: Mapping[str, Any], *, files: Mapping[str, bytes] | None = None
) -> None:
    """Keeps what an evaluation found: the whole as JSON and the files of its report beside the version's run,
    the means as figures of the run and of its model, and which evaluation counts in the version's tags: the
    latest of each evaluation set, and the latest of all, whose means are tags too.

    Args:
        evaluation: {"measures": {name: {"mean", "low", "high", "values"}}, "baselines": {name: measures},
            "pairs": {"content", "style"}, "evaluation_set": {...}, "model_digest": sha256}.
        files: name -> bytes of the report; a report.html among them is named in the tag `report`. The
            version's own figures are kept as evaluation.json, whatever is called so here.

    Raises:
        ValueError: the evaluation is of another model than the version holds.
    """
    found = registry.get_version(name, version)
    if evaluation["model_digest"] != found.digest:
        raise ValueError(
            f"the evaluation is of the model {evaluation['model_digest'][:12]}, but {found} is "
            f"{(found.digest or 'of unknown digest')[:12]}; evaluate {found}"
        )
    if found.run_id is None:
        raise ValueError(f"{found} belongs to no run; register its checkpoint again")
    client = tracking_server.client()
    text, digest = _text_of(evaluation), evaluation_digest(evaluation)
    folder = f"evaluations/{name}-{version}-{digest[:12]}"
    path = f"{folder}/{EVALUATION_FILE}"
    kept = {**(files or {}), EVALUATION_FILE: text.encode()}
    _log_files(client, found.run_id, kept, folder)
    set_digest = evaluation_set_digest(evaluation)
    now = int(time.time() * 1000)
    means = {key: float(value["mean"]) for key, value in evaluation["measures"].items()}
    metrics = [
        Metric(
            f"{MEANS}{key}",
            mean,
            now,
            step=0,
            model_id=found.model_id,
            dataset_name="evaluation",
            dataset_digest=set_digest[:MAX_DIGEST_CHARACTERS],
            run_id=found.run_id,
        )
        for key, mean in means.items()
    ]
    client.log_batch(found.run_id, metrics=metrics)
    for key in _names_of_means(client, found.run_id) - set(means):
        if key in found.tags:  # of an evaluation that measured more
            client.delete_model_version_tag(name, str(version), key)
    for key, mean in means.items():
        client.set_model_version_tag(name, str(version), key, f"{mean:.4f}")
    client.set_model_version_tag(name, str(version), "evaluation_set", set_digest)
    if REPORT_FILE in kept:
        report = f"runs:/{found.run_id}/{folder}/{REPORT_FILE}"
        client.set_model_version_tag(name, str(version), "report", report)
    # Last, and each in one tag: this is what makes the evaluation count.
    for tag in (_tag_of(set_digest), "evaluation"):
        client.set_model_version_tag(name, str(version), tag, f"{path} {digest}")


def _names_of_means(client: MlflowClient, run_id: str) -> set[str]:
    """The measures that any evaluation recorded in the run has had."""
    figures = client.get_run(run_id).data.metrics
    return {name.removeprefix(MEANS) for name in figures if name.startswith(MEANS)}


def _tag_of(set_digest: str) -> str:
    return f"evaluation.{set_digest[:12]}"


def _log_files(client: MlflowClient, run_id: str, files: Mapping[str, bytes], folder: str) -> None:
    with tempfile.TemporaryDirectory(prefix="nst-evaluation-") as temporary:
        for name, data in files.items():
            Path(temporary, name).write_bytes(data)
        with s3.errors(folder):
            client.log_artifacts(run_id, temporary, folder)


def evaluation(version: RegisteredVersion, *, of_set: str | None = None) -> dict[str, Any] | None:
    """The latest recorded evaluation of `version`; None if there is none.

    Args:
        of_set: the latest on that set, as `evaluation_set_digest` tells it; None: on any.

    Raises:
        OSError: it is recorded but cannot be read, or was altered since.
    """
    tag = version.tags.get("evaluation" if of_set is None else _tag_of(of_set))
    if tag is None or version.run_id is None:
        return None
    path, _, digest = tag.partition(" ")
    try:
        with tempfile.TemporaryDirectory(prefix="nst-evaluation-") as folder, s3.errors(path):
            text = Path(tracking_server.client().download_artifacts(version.run_id, path, folder)).read_text()
    except (MlflowException, OSError) as error:
        raise OSError(f"{version}: cannot read its evaluation {path} ({error})") from error
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise OSError(
            f"{version}: its evaluation {path} was altered after it was recorded; evaluate it again"
        )
    return json.loads(text)


def evaluation_digest(evaluation: Mapping[str, Any]) -> str:
    """sha256 of an evaluation as it is kept."""
    return hashlib.sha256(_text_of(evaluation).encode()).hexdigest()


def _text_of(evaluation: Mapping[str, Any]) -> str:
    return json.dumps(evaluation, indent=2, sort_keys=True)


def evaluation_set_digest(evaluation: Mapping[str, Any]) -> str:
    """sha256 over what was measured on: only evaluations on one set can be compared."""
    return hashlib.sha256(json.dumps(evaluation["evaluation_set"], sort_keys=True).encode()).hexdigest()
