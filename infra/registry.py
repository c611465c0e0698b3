"""The registry of models: versions, their aliases, and what an evaluation found about them."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow.artifacts
import mlflow.pyfunc
from mlflow.entities import LoggedModelOutput, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from infra import tracking_server
from infra.run_delivery import MAX_DIGEST_CHARACTERS
from infra.tracking import DEFAULT_EXPERIMENT

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

    def __str__(self) -> str:
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True, kw_only=True)
class ModelInterface:
    """What a served model takes and gives: columns of bytes, and parameters with their defaults."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    params: Mapping[str, str | int | float] = field(default_factory=dict)

    def signature(self) -> ModelSignature:
        types = {str: DataType.string, int: DataType.long, float: DataType.double}
        params = [ParamSpec(name, types[type(value)], value) for name, value in self.params.items()]
        return ModelSignature(
            inputs=Schema([ColSpec(DataType.binary, name) for name in self.inputs]),
            outputs=Schema([ColSpec(DataType.binary, name) for name in self.outputs]),
            params=ParamSchema(params),
        )


def register(
    checkpoint_dir: str | Path,
    *,
    digest: str,
    python_model_path: str | Path,
    code_paths: Sequence[str | Path],
    pip_requirements: Sequence[str],
    interface: ModelInterface,
    name: str = DEFAULT_MODEL,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> RegisteredVersion:
    """Publishes a checkpoint's inference half as the next version of `name`, with the alias `challenger`.

    The model is code (`python_model_path`) and artifacts (safetensors and JSON); nothing is pickled. The same
    digest from the same run is registered once: a rerun finds the version it made before.

    Args:
        digest: of the model; whoever loads it checks it.
        code_paths: package directories that the model's code imports.
        run_id: the training run. None: a run is made to hold what belongs to the version.

    Raises:
        ValueError: not a checkpoint, a name that MLflow would not take, or no such run.
    """
    check_name(name)
    for file in MODEL_FILES:
        if not (Path(checkpoint_dir) / file).is_file():
            raise ValueError(f"{checkpoint_dir} is not a checkpoint: it has no {file}")
    client = tracking_server.client()
    for version in list_versions(name, missing_ok=True):
        if version.digest == digest and run_id in (None, version.run_id):
            return _with_challenger_alias(version)
    run = _run_of(client, run_id, name)
    logged = client.create_logged_model(
        run.info.experiment_id, name=name, source_run_id=run.info.run_id, tags={"digest": digest}
    )
    with tempfile.TemporaryDirectory(prefix="nst-register-") as temporary:
        staged = Path(temporary) / "checkpoint"  # its name becomes the artifact's
        staged.mkdir()
        for file in MODEL_FILES:
            shutil.copyfile(Path(checkpoint_dir) / file, staged / file)
        folder = Path(temporary) / "model"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="mlflow")  # it asks for examples and type hints
            mlflow.pyfunc.save_model(
                folder,
                python_model=str(python_model_path),
                artifacts={"checkpoint": str(staged)},
                code_paths=[str(path) for path in code_paths],
                pip_requirements=list(pip_requirements),
                signature=interface.signature(),
                model_config={"digest": digest},
                mlflow_model=Model(
                    artifact_path=logged.artifact_location,
                    run_id=run.info.run_id,
                    model_uuid=logged.model_id,
                    model_id=logged.model_id,
                ),
            )
        for cache in folder.rglob("__pycache__"):
            shutil.rmtree(cache)
        client.log_model_artifacts(logged.model_id, str(folder))
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run.info.run_id, [LoggedModelOutput(logged.model_id, step=0)])
    _ensure_registered_model(client, name)
    created = client.create_model_version(
        name,
        logged.artifact_location,
        run_id=run.info.run_id,
        # MLflow's own database forgets the model's id: a tag keeps it.
        tags={**(tags or {}), "digest": digest, "model_id": logged.model_id},
        model_id=logged.model_id,
    )
    return _with_challenger_alias(get_version(name, int(created.version)))


def _with_challenger_alias(version: RegisteredVersion) -> RegisteredVersion:
    """The newest version is the challenger, unless it is the champion already."""
    is_newest = list_versions(version.name)[0].version == version.version
    if is_newest and not {CHAMPION, CHALLENGER} & set(version.aliases):
        set_alias(version.name, CHALLENGER, version.version)
    return get_version(version.name, version.version)


def _run_of(client: MlflowClient, run_id: str | None, name: str) -> Any:
    if run_id is None:
        experiment = tracking_server.experiment_id(client, DEFAULT_EXPERIMENT)
        run = client.create_run(experiment, run_name=f"register {name}", tags={"nst.kind": "register"})
        client.set_terminated(run.info.run_id)
        return run
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in tracking_server.REFUSALS:
            raise
        where = tracking_server.shown(tracking_server.tracking_uri())
        raise ValueError(
            f"MLflow at {where} knows no run {run_id}; was the model trained with another?"
        ) from None


def _ensure_registered_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


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
    """Downloads the version's checkpoint below `destination_dir`; returns the checkpoint's directory.

    Raises:
        OSError: the artifacts are gone or cannot be read.
    """
    client = tracking_server.client()
    try:
        source = client.get_model_version_download_uri(version.name, str(version.version))
        return mlflow.artifacts.download_artifacts(
            artifact_uri=f"{source}/{CHECKPOINT_ARTIFACT}",
            dst_path=str(destination_dir),
            tracking_uri=tracking_server.tracking_uri(),
        )
    except (MlflowException, OSError) as error:
        raise OSError(f"{version}: cannot download {version.source} ({error})") from error


def record_evaluation(name: str, version: int, evaluation: Mapping[str, Any]) -> None:
    """Keeps what an evaluation found: the whole as JSON beside the version's run, the means as figures of the
    run and of its model, and which evaluation counts (the latest) in the version's tags.

    Args:
        evaluation: {"measures": {name: {"mean", "low", "high"}}, "baselines": {name: measures},
            "evaluation_set": {...}, "model_digest": sha256}.

    Raises:
        ValueError: the evaluation is of another model than the version holds.
    """
    found = get_version(name, version)
    if evaluation["model_digest"] != found.digest:
        raise ValueError(
            f"the evaluation is of the model {evaluation['model_digest'][:12]}, but {found} is "
            f"{(found.digest or 'of unknown digest')[:12]}; evaluate {found}"
        )
    if found.run_id is None:
        raise ValueError(f"{found} belongs to no run; register its checkpoint again")
    client = tracking_server.client()
    text = json.dumps(evaluation, indent=2, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    path = f"evaluations/{name}-{version}-{digest[:12]}.json"
    client.log_text(found.run_id, text, path)
    set_digest = evaluation_set_digest(evaluation)
    now = int(time.time() * 1000)
    means = {key: float(value["mean"]) for key, value in evaluation["measures"].items()}
    metrics = [
        Metric(
            f"evaluation/{key}",
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
    for key, mean in means.items():
        client.set_model_version_tag(name, str(version), key, f"{mean:.4f}")
    client.set_model_version_tag(name, str(version), "evaluation_set", set_digest)
    # Last, and in one tag: this is what makes the evaluation count.
    client.set_model_version_tag(name, str(version), "evaluation", f"{path} {digest}")


def evaluation(version: RegisteredVersion) -> dict[str, Any] | None:
    """The latest recorded evaluation of `version`; None if there is none.

    Raises:
        OSError: it is recorded but cannot be read, or was altered since.
    """
    tag = version.tags.get("evaluation")
    if tag is None or version.run_id is None:
        return None
    path, _, digest = tag.partition(" ")
    try:
        with tempfile.TemporaryDirectory(prefix="nst-evaluation-") as folder:
            text = Path(tracking_server.client().download_artifacts(version.run_id, path, folder)).read_text()
    except (MlflowException, OSError) as error:
        raise OSError(f"{version}: cannot read its evaluation {path} ({error})") from error
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise OSError(
            f"{version}: its evaluation {path} was altered after it was recorded; evaluate it again"
        )
    return json.loads(text)


def evaluation_set_digest(evaluation: Mapping[str, Any]) -> str:
    """sha256 over what was measured on: only evaluations on one set can be compared."""
    return hashlib.sha256(json.dumps(evaluation["evaluation_set"], sort_keys=True).encode()).hexdigest()


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
