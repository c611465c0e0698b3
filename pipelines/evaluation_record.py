"""What an evaluation leaves behind: its files at a place, and the same kept with the registered versions.

The files come first. Whatever happens to MLflow then, the same command finds them and measures nothing again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from infra import evaluations, places, storage, tracking_server
from infra.registry import RegisteredVersion
from pipelines.console import say
from pipelines.evaluation_report import FILES
from pipelines.evaluation_set import Identity
from pipelines.registration import wait_for_mlflow

Kept = Mapping[str, Any]  # what is kept of a model, as `pipelines.evaluation.Evaluation.kept` makes it


def write_files(files: Mapping[str, bytes], report_uri: str) -> None:
    """evaluation.json last: where it is, the others are whole."""
    for name in FILES:
        storage.write_bytes(places.join(places.absolute(report_uri), name), files[name])


def find_files(
    report_uri: str, identity: Identity, code: str, models: Sequence[Mapping[str, Any]]
) -> tuple[Sequence[Kept], dict[str, bytes]] | None:
    """What this very evaluation left at `report_uri` before: what is kept of each model, and its files.

    Args:
        code: digest of the sources that measure.
        models: {"model_digest", "seen"} of each.
    """
    try:
        files = {name: storage.read_bytes(places.join(places.absolute(report_uri), name)) for name in FILES}
        found = json.loads(files[evaluations.EVALUATION_FILE])
        shared = {name: found[name] for name in ("baselines", "pairs", "evaluation_set")}
        names = ("measures", "model_digest", "seen")
        kept = [{**shared, **{name: one[name] for name in names}} for one in found.get("models", [found])]
        known = [{name: one[name] for name in ("model_digest", "seen")} for one in kept]
        is_same = (found["evaluation_set"], found["code_digest"], known) == (identity, code, list(models))
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError, ValueError):
        return None  # nothing there, or nothing of ours
    return (kept, files) if is_same else None


def record(
    versions: Sequence[RegisteredVersion | None],
    kept: Sequence[Kept],
    files: Mapping[str, bytes],
    report_uri: str,
) -> list[str | None]:
    """Keeps figures and report with each registered version, and names it; None where there is none.

    Raises:
        StageFailed: MLflow stays away.
        OSError: it went away, or its artifacts cannot be written.
    """
    consolation = (
        f"the figures are in {places.join(report_uri, evaluations.EVALUATION_FILE)}, and the same command "
        "records them without measuring again"
    )
    if any(version is not None for version in versions):
        wait_for_mlflow(consolation)
    for version, found in zip(versions, kept, strict=True):
        if version is not None:
            with tracking_server.outages_told(consolation):
                try:
                    evaluations.record_evaluation(version.name, version.version, found, files=files)
                except OSError as error:  # its artifacts
                    raise OSError(f"{error}; {consolation}") from error
            say(f"kept with {version}")
    return [None if version is None else str(version) for version in versions]
