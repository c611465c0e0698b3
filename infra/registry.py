"""The registry of models: versions and their aliases."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlflow.artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from infra import model_files, s3, tracking_server

DEFAULT_MODEL = "nst"
CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"

# What inference needs of a checkpoint, and all that is published of it.
MODEL_FILES = ("model.safetensors", "config.json")
CHECKPOINT_ARTIFACT = "artifacts/checkpoint"

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@]+))")


@dataclass(frozen=True, kw_only=True)
class RegisteredVersion:
    """One version of a registered model. `created_at` is in UTC; `model_id` is MLflow's logged model."""

    name: str
    version: int
    run_id: str | None
    model_id: str | None
    aliases: tuple[str, ...]
    tags: dict[str, str]
    source: str
    created_at: datetime.datetime

    @property
    def digest(self) -> str | None:
        """The digest that the model had when it was registered."""
        return self.tags.get("digest")

    @property
    def artifacts_digest(self) -> str | None:
        """That of the list of all its files; None for a version that was registered before there was one."""
        return self.tags.get("artifacts_digest")

    def __str__(self) -> str:
        return f"models:/{self.name}/{self.version}"


def check_name(name: str) -> None:
    """Raises ValueError for a name that MLflow would not take."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a model; use letters, digits and _ . -, such as nst")


def list_versions(name: str = DEFAULT_MODEL, *, missing_ok: bool = False) -> list[RegisteredVersion]:
    """Every version, the newest first.

    Raises:
        ValueError: no model of that name is registered (unless `missing_ok`: then there are no versions).
    """
    check_name(name)
    client = tracking_server.client()
    aliases = _aliases(client, name)
    if aliases is None:
        if missing_ok:
            return []
        raise ValueError(_no_such_model(name))
    versions: list[RegisteredVersion] = []
    token: str | None = None
    while True:
        page = client.search_model_versions(f"name='{name}'", page_token=token)
        versions += [_version_of(found, aliases) for found in page]
        token = page.token
        if not token:
            return sorted(versions, key=lambda version: -version.version)


def get_version(name: str, version: int) -> RegisteredVersion:
    """Raises ValueError, naming the versions that there are, if this one is not among them."""
    check_name(name)
    client = tracking_server.client()
    try:
        found = client.get_model_version(name, str(version))
    except MlflowException as error:
        if error.error_code not in tracking_server.REFUSALS:
            raise
        numbers = ", ".join(str(known.version) for known in list_versions(name)[:10]) or "none"
        raise ValueError(f"{name} has no version {version}; the newest are: {numbers}") from None
    return _version_of(found, _aliases(client, name) or {})


def resolve(model_uri: str) -> RegisteredVersion:
    """`models:/nst@champion` or `models:/nst/3`.

    Raises:
        ValueError: another form, or no such model, version or alias; says which there are.
    """
    match = MODEL_URI.fullmatch(model_uri)
    if match is None:
        raise ValueError(
            f"{model_uri!r} names no registered model; write models:/nst@champion or models:/nst/3"
        )
    name = match["name"]
    if match["version"]:
        return get_version(name, int(match["version"]))
    check_name(name)
    aliases = _aliases(tracking_server.client(), name)
    if aliases is None:
        raise ValueError(_no_such_model(name))
    if match["alias"] not in aliases:
        known = ", ".join(f"@{alias} (version {number})" for alias, number in sorted(aliases.items()))
        raise ValueError(f"{name} has no @{match['alias']}; it has: {known or 'no aliases yet'}")
    return get_version(name, aliases[match["alias"]])


def champion(name: str = DEFAULT_MODEL) -> RegisteredVersion | None:
    """The version in use; None where there is no such model, or none was promoted."""
    return with_alias(name, CHAMPION)


def with_alias(name: str, alias: str) -> RegisteredVersion | None:
    """The version that `alias` points at, or None."""
    check_name(name)
    number = (_aliases(tracking_server.client(), name) or {}).get(alias)
    return None if number is None else get_version(name, number)


def set_alias(name: str, alias: str, version: int) -> None:
    """Points `alias` at `version` in one step: it is never missing in between."""
    tracking_server.client().set_registered_model_alias(name, alias, str(version))


def delete_alias(name: str, alias: str) -> None:
    """Removes `alias`; nothing happens if it is not there."""
    tracking_server.client().delete_registered_model_alias(name, alias)


def download(version: RegisteredVersion, destination_dir: str | Path) -> str:
    """Downloads the version's files below `destination_dir` and checks them; returns the checkpoint's
    directory. Other artifacts of the version lie beside it.

    Raises:
        OSError: the artifacts are gone, cannot be read, or are not those that were registered.
    """
    client = tracking_server.client()
    try:
        with s3.errors(version.source):  # a client may have to go to the bucket itself
            folder = mlflow.artifacts.download_artifacts(
                artifact_uri=client.get_model_version_download_uri(version.name, str(version.version)),
                dst_path=str(Path(destination_dir, "model")),
                tracking_uri=tracking_server.tracking_uri(),
            )
    except (MlflowException, OSError) as error:
        raise OSError(f"{version}: cannot download {version.source} ({error})") from error
    if version.artifacts_digest is not None:
        try:
            model_files.check_files(folder, version.artifacts_digest)
        except OSError as error:
            raise OSError(f"{version}: {error}, at {version.source}; it is not used") from None
    return str(Path(folder, CHECKPOINT_ARTIFACT))


def _aliases(client: MlflowClient, name: str) -> dict[str, int] | None:
    """alias -> version; None where no such model is registered."""
    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return {alias: int(version) for alias, version in aliases.items()}


def _version_of(found: ModelVersion, aliases: Mapping[str, int]) -> RegisteredVersion:
    number = int(found.version)
    return RegisteredVersion(
        name=found.name,
        version=number,
        run_id=found.run_id or None,
        model_id=found.tags.get("model_id"),
        aliases=tuple(sorted(alias for alias, version in aliases.items() if version == number)),
        tags=dict(found.tags),
        source=found.source or "",
        created_at=datetime.datetime.fromtimestamp(found.creation_timestamp / 1000, datetime.UTC),
    )


def _no_such_model(name: str) -> str:
    where = tracking_server.shown(tracking_server.tracking_uri())
    return f"MLflow at {where} has no model {name!r}; train and register one, or correct MLFLOW_TRACKING_URI"
