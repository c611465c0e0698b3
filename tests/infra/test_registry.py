"""Versions, aliases and evaluations, on a real MLflow store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra import evaluations, publishing, registry, tracking_server
from infra.publishing import ModelInterface
from infra.registry import RegisteredVersion
from tests.registered_models import alias, register
from tests.servers import MlflowServer


@pytest.fixture(scope="module")
def store(mlflow_database: Path) -> str:
    return f"sqlite:///{mlflow_database}"


@pytest.fixture(autouse=True)
def _environment(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)


def evaluation_of(digest: str | None, **measures: float) -> dict[str, Any]:
    return {
        "measures": {key: {"mean": value, "low": value, "high": value} for key, value in measures.items()},
        "baselines": {},
        "evaluation_set": {"content_digest": "c", "style_digest": "s", "num_pairs": 8, "seed": 0, "size": 64},
        "model_digest": digest,
    }


@pytest.fixture(scope="module")
def three_versions(store: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RegisteredVersion]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store)
        folder = tmp_path_factory.mktemp("three")
        yield [register(folder, content, name="shared") for content in ("one", "two", "three")]


@pytest.fixture
def model(three_versions: list[RegisteredVersion], request: pytest.FixtureRequest) -> str:
    """A registered model of its own with three versions, made of the shared artifacts: that is quicker."""
    client = tracking_server.client()
    name = request.node.name[:90].replace("[", "-").replace("]", "")
    client.create_registered_model(name)
    for shared in three_versions:
        client.create_model_version(name, shared.source, shared.run_id, shared.tags, model_id=shared.model_id)
    return name


def test_a_registered_model_holds_the_inference_half_and_no_pickle(tmp_path: Path) -> None:
    version = register(tmp_path, "abc", name="half", tags={"preset": "smoke"})
    assert (version.version, version.digest, version.aliases) == (1, "digest of abc", ("challenger",))
    assert version.tags["preset"] == "smoke"

    checkpoint = registry.download(version, tmp_path / "downloaded")
    assert sorted(path.name for path in Path(checkpoint).iterdir()) == ["config.json", "model.safetensors"]
    root = Path(version.source.removeprefix("file://"))
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    assert files == [
        "MLmodel",
        "artifacts/checkpoint/config.json",
        "artifacts/checkpoint/model.safetensors",
        "code/little_package/__init__.py",
        "conda.yaml",
        "echo.py",
        "files.json",
        "python_env.yaml",
        "requirements.txt",
    ]
    run = tracking_server.client().get_run(version.run_id or "")
    assert run.info.status == "FINISHED"
    assert run.outputs is not None
    assert run.outputs.model_outputs[0].model_id == version.model_id


def test_the_model_loads_and_predicts_in_another_process(tmp_path: Path, store: str) -> None:
    version = register(tmp_path, "abcd", name="echo")
    code = (
        "import mlflow, pandas\n"
        f"model = mlflow.pyfunc.load_model('{version}')\n"
        "given = pandas.DataFrame({'content': [b'x']})\n"
        "print(model.predict(given, params={'strength': 0.5})['stylized'][0])\n"
    )
    environment = {**os.environ, "MLFLOW_TRACKING_URI": store}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "b'4 digest of abcd 0.5'" in done.stdout, done.stderr


def test_registering_twice_gives_one_version(tmp_path: Path) -> None:
    client = tracking_server.client()
    run = client.create_run(tracking_server.experiment_id(client, "nst"))
    first = register(tmp_path, "same", name="twice", run_id=run.info.run_id)
    again = register(tmp_path, "same", name="twice", run_id=run.info.run_id)
    other = register(tmp_path, "other", name="twice")
    assert (first.version, again.version, other.version) == (1, 1, 2)
    assert first.run_id == run.info.run_id
    assert [version.version for version in registry.list_versions("twice")] == [2, 1]
    assert alias("twice", "challenger") == 2


def test_mistakes_are_told_with_what_there_is(model: str, tmp_path: Path) -> None:
    for model_uri, expected in (
        (f"models:/{model}@champion", r"no @champion; it has: no aliases yet"),
        (f"models:/{model}/9", r"no version 9; the newest are: 3, 2, 1"),
        ("models:/unknown/1", r"no model 'unknown'; train and register one"),
        ("models:/unknown@champion", r"no model 'unknown'"),
        ("models:/nst", r"write models:/nst@champion"),
        ("models:/it's/1", r"no name for a model"),
    ):
        with pytest.raises(ValueError, match=expected):
            registry.resolve(model_uri)
    with pytest.raises(ValueError, match=r"is not a checkpoint: it has no model\.safetensors"):
        publishing.register(
            tmp_path,
            digest="",
            python_model_path="x.py",
            code_paths=[],
            pip_requirements=[],
            interface=ModelInterface(inputs=(), outputs=()),
        )
    with pytest.raises(ValueError, match="knows no run"):
        register(tmp_path, "orphan", name="orphan", run_id="0" * 32)
    assert registry.champion("unknown") is None
    assert registry.resolve(f"models:/{model}/2").version == 2


def test_an_evaluation_is_kept_and_checked(model: str) -> None:
    version = registry.get_version(model, 1)
    assert evaluations.evaluation(version) is None
    found = evaluation_of(version.digest, style_distance=0.25, edge_ssim=0.75)
    evaluations.record_evaluation(model, 1, evaluation_of(version.digest, style_distance=0.5))
    evaluations.record_evaluation(model, 1, found)

    version = registry.get_version(model, 1)
    assert evaluations.evaluation(version) == found
    assert version.tags["style_distance"] == "0.2500"
    client = tracking_server.client()
    assert client.get_run(version.run_id or "").data.metrics["evaluation/edge_ssim"] == 0.75
    on_model = {m.key: m.value for m in client.get_logged_model(version.model_id or "").metrics or []}
    assert on_model["evaluation/edge_ssim"] == 0.75

    with pytest.raises(ValueError, match="evaluate models:/"):
        evaluations.record_evaluation(model, 2, found)
    stored_path, _, _ = version.tags["evaluation"].partition(" ")
    artifact_uri = client.get_run(version.run_id or "").info.artifact_uri or ""
    path = Path(artifact_uri.removeprefix("file://")) / stored_path
    path.write_text(path.read_text().replace("0.25", "0.05"))
    with pytest.raises(OSError, match="altered"):
        evaluations.evaluation(version)


@pytest.mark.slow
def test_the_same_on_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, infra_server: MlflowServer
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", infra_server.uri)
    first = register(tmp_path, "one", name="served")
    second = register(tmp_path, "two", name="served")
    assert first.source.startswith("mlflow-artifacts:")
    evaluations.record_evaluation("served", 1, evaluation_of(first.digest, edge_ssim=0.5))
    stored = evaluations.evaluation(registry.resolve("models:/served/1"))
    assert stored == evaluation_of(first.digest, edge_ssim=0.5)
    assert registry.resolve("models:/served@challenger").version == second.version
    checkpoint = registry.download(second, tmp_path / "downloaded")
    assert (Path(checkpoint) / "model.safetensors").read_text() == "two"
    assert json.loads((Path(checkpoint) / "config.json").read_text()) == {}
