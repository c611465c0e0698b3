"""From a checkpoint to a registered version: an MLflow pyfunc of code, safetensors and JSON."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow.pyfunc
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from infra import model_files, registry, s3, scratch, tracking_server
from infra.registry import RegisteredVersion
from infra.tracking import DEFAULT_EXPERIMENT

CARD = "README.md"
MAX_DESCRIPTION_CHARACTERS = 5000  # of MLflow's tables


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
    name: str = registry.DEFAULT_MODEL,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    artifacts: Mapping[str, str | Path] | None = None,
    model_config: Mapping[str, str] | None = None,
    card: str = "",
) -> RegisteredVersion:
    """Publishes a checkpoint's inference half as the next version of `name`, with the alias `challenger`.

    The model is code (`python_model_path`) and artifacts (safetensors and JSON, and those given); nothing is
    pickled. The version comes last, when all its files are stored: a registration that was cut off leaves
    none, and is simply repeated. The same digest from the same run is registered once.

    Args:
        digest: of the model; whoever loads it checks it.
        code_paths: package directories that the model's code imports.
        run_id: the training run. None: a run is made to hold what belongs to the version.
        artifacts: name -> a file or folder of that name, which travels with the checkpoint.
        model_config: more that the model's code is told, beside the digest.
        card: the model card in Markdown: its README.md, and the version's description.

    Raises:
        ValueError: not a checkpoint, a name that MLflow would not take, or no such run.
    """
    registry.check_name(name)
    for file in registry.MODEL_FILES:
        if not (Path(checkpoint_dir) / file).is_file():
            raise ValueError(f"{checkpoint_dir} is not a checkpoint: it has no {file}")
    known = find_version(name, digest, run_id)
    if known is not None:
        return known
    client = tracking_server.client()
    run = _run_of(client, run_id, name)
    logged = client.create_logged_model(
        run.info.experiment_id, name=name, source_run_id=run.info.run_id, tags={"digest": digest}
    )
    try:
        with scratch.folder("nst-register-") as folder:
            model_dir, staged = Path(folder, "model"), Path(folder, "checkpoint")
            staged.mkdir()  # its name becomes the artifact's
            for file in registry.MODEL_FILES:
                shutil.copyfile(Path(checkpoint_dir) / file, staged / file)
            _save_model(
                model_dir,
                python_model=str(python_model_path),
                artifacts={
                    key: str(path) for key, path in {**(artifacts or {}), "checkpoint": staged}.items()
                },
                code_paths=[str(path) for path in code_paths],
                pip_requirements=list(pip_requirements),
                signature=interface.signature(),
                model_config={**(model_config or {}), "digest": digest},
                mlflow_model=Model(
                    artifact_path=logged.artifact_location,
                    run_id=run.info.run_id,
                    model_uuid=logged.model_id,
                    model_id=logged.model_id,
                ),
            )
            if card:
                (model_dir / CARD).write_text(card)
            artifacts_digest = model_files.write_manifest(model_dir)
            with s3.errors(logged.artifact_location):
                client.log_model_artifacts(logged.model_id, str(model_dir))
    except BaseException:
        with contextlib.suppress(MlflowException, OSError):
            client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run.info.run_id, [LoggedModelOutput(logged.model_id, step=0)])
    _ensure_registered_model(client, name)
    created = client.create_model_version(
        name,
        logged.artifact_location,
        run_id=run.info.run_id,
        # MLflow's own database forgets the model's id: a tag keeps it.
        tags={
            **(tags or {}),
            "digest": digest,
            "artifacts_digest": artifacts_digest,
            "model_id": logged.model_id,
        },
        description=_description(card) or None,
        model_id=logged.model_id,
    )
    return _with_challenger_alias(registry.get_version(name, int(created.version)))


def _save_model(model_dir: Path, **model: Any) -> None:
    """MLflow's own, without its advice and without what Python left beside the code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="mlflow")  # it asks for examples and type hints
        mlflow.pyfunc.save_model(model_dir, **model)
    for cache in model_dir.rglob("__pycache__"):
        shutil.rmtree(cache)


def find_version(name: str, digest: str, run_id: str | None = None) -> RegisteredVersion | None:
    """The version that this model from this run (None: from any) was registered as, if it was."""
    for version in registry.list_versions(name, missing_ok=True):
        if version.digest == digest and run_id in (None, version.run_id):
            return _with_challenger_alias(version)
    return None


def _with_challenger_alias(version: RegisteredVersion) -> RegisteredVersion:
    """The newest version is the challenger, unless it is the champion already."""
    is_newest = registry.list_versions(version.name)[0].version == version.version
    if is_newest and not {registry.CHAMPION, registry.CHALLENGER} & set(version.aliases):
        registry.set_alias(version.name, registry.CHALLENGER, version.version)
    return registry.get_version(version.name, version.version)


def _description(card: str) -> str:
    """As much of a card as a version's description holds."""
    if len(card) <= MAX_DESCRIPTION_CHARACTERS:
        return card
    rest = f"\n\n(The rest is in {CARD}, beside the model.)"
    return card[: MAX_DESCRIPTION_CHARACTERS - len(rest)].rpartition("\n")[0] + rest


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
