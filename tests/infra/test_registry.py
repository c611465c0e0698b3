"""Versions, aliases, evaluations and the history of promotions, on a real MLflow store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra import evaluations, promotions, publishing, registry, tracking, tracking_server
from infra.promotions import Grounds, move_champion, verify_history
from infra.publishing import ModelInterface
from infra.registry import RegisteredVersion
from tests.servers import mlflow_server

# A model's code in small: gives back what it got, and what it was told about itself.
ECHO = """
import pandas
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class Echo(PythonModel):
    def load_context(self, context):
        self.size = len(open(context.artifacts["checkpoint"] + "/model.safetensors", "rb").read())
        self.digest = context.model_config["digest"]

    def predict(self, context, model_input: pandas.DataFrame, params=None):
        return pandas.DataFrame({"stylized": [f"{self.size} {self.digest} {params['strength']}".encode()]})


set_model(Echo())
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    tracking_server.client(uri)
    return uri


@pytest.fixture(autouse=True)
def _environment(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setattr(promotions, "SECONDS_TO_MOVE", 0.0)


def register(folder: Path, content: str, **options: Any) -> RegisteredVersion:
    checkpoint = folder / content / "checkpoint-7"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "model.safetensors").write_text(content)
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "training.safetensors").write_text("large")
    (checkpoint / "state.json").write_text("{}")
    code = folder / "echo.py"
    code.write_text(ECHO)
    package = folder / "little_package"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text("")
    return publishing.register(
        checkpoint,
        digest=f"digest of {content}",
        python_model_path=code,
        code_paths=[package],
        pip_requirements=["pandas"],
        interface=ModelInterface(
            inputs=("content",),
            outputs=("stylized",),
            params={"strength": 1.0, "colors": "style", "max_side": 0},
        ),
        **options,
    )


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


def alias(name: str, which: str) -> int | None:
    version = registry.with_alias(name, which)
    return version.version if version else None


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


def test_promotions_and_rollbacks_are_a_history(model: str) -> None:
    grounds = Grounds(
        reason="better", gate="gate.toml", findings=("style_distance 0.2",), figures={"style": 0.2}
    )
    first = move_champion(model, 1, kind="promote", grounds=grounds)
    assert (alias(model, "champion"), alias(model, "previous")) == (1, None)
    registry.set_alias(model, "challenger", 2)
    move_champion(model, 2, kind="promote", grounds=Grounds(is_forced=True))
    assert [alias(model, which) for which in ("champion", "previous", "challenger")] == [2, 1, None]
    move_champion(model, 1, kind="rollback", grounds=Grounds())
    move_champion(model, 2, kind="rollback", grounds=Grounds())
    assert [alias(model, which) for which in ("champion", "previous")] == [2, 1]

    history = promotions.events(model)
    assert [(e.sequence, e.kind, e.from_version, e.to_version, e.status) for e in history] == [
        (1, "promote", None, 1, "done"),
        (2, "promote", 1, 2, "done"),
        (3, "rollback", 2, 1, "done"),
        (4, "rollback", 1, 2, "done"),
    ]
    assert history[0] == first
    assert history[0].grounds == grounds
    assert "@" in history[0].who
    assert verify_history(model) == []
    assert tracking_server.client().get_run(first.run_id).data.metrics == {"style": 0.2}
    with pytest.raises(ValueError, match="already"):
        move_champion(model, 2, kind="promote", grounds=Grounds())
    with pytest.raises(ValueError, match="501 characters"):
        move_champion(model, 3, kind="promote", grounds=Grounds(reason="x" * 501))
    assert len(promotions.events(model)) == 4


def test_an_altered_history_shows(model: str) -> None:
    for version in (1, 2, 3):
        move_champion(model, version, kind="promote", grounds=Grounds(reason=f"reason {version}"))
    client = tracking_server.client()
    _, second, third = promotions.events(model)

    text = client.get_run(second.run_id).data.tags[promotions.EVENT_TAG]
    altered = text.replace("reason 2", "reason 9")
    client.set_tag(second.run_id, promotions.EVENT_TAG, altered)
    assert verify_history(model) == ["event 2 was altered after it was written"]
    client.set_tag(second.run_id, promotions.DIGEST_TAG, promotions._digest_of(altered))
    assert verify_history(model) == ["event 3 does not follow from the event before it"]
    client.set_tag(second.run_id, promotions.EVENT_TAG, text)
    client.set_tag(second.run_id, promotions.DIGEST_TAG, second.digest)
    assert verify_history(model) == []

    client.delete_run(second.run_id)
    assert "event 2 is missing" in verify_history(model)[0]
    client.restore_run(second.run_id)
    client.delete_run(third.run_id)
    assert "1 event(s) after event 2 are missing" in verify_history(model)[0]
    move_champion(model, 1, kind="promote", grounds=Grounds())
    assert "event 3 is missing" in verify_history(model)[0], "the gap stays"
    client.restore_run(third.run_id)
    assert verify_history(model) == []

    registry.set_alias(model, "champion", 2)
    assert "moved by hand" in verify_history(model)[0]


class Crash(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("num_calls_before", range(8))
def test_a_crash_at_any_step_is_repaired_by_a_rerun(
    model: str, num_calls_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    move_champion(model, 1, kind="promote", grounds=Grounds())
    move_champion(model, 2, kind="promote", grounds=Grounds())
    registry.set_alias(model, "challenger", 3)

    writes = [
        "create_run",
        "set_registered_model_tag",
        "set_registered_model_alias",
        "delete_registered_model_alias",
        "log_batch",
        "set_terminated",
    ]
    remaining = num_calls_before
    with monkeypatch.context() as patch:
        for method in writes:
            original = getattr(tracking.mlflow.tracking.MlflowClient, method)

            def counted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                nonlocal remaining
                if remaining == 0:
                    raise Crash
                remaining -= 1
                return original(*args, **kwargs)

            patch.setattr(tracking.mlflow.tracking.MlflowClient, method, counted)
        with pytest.raises(Crash):
            move_champion(model, 3, kind="promote", grounds=Grounds())
    assert alias(model, "champion") in (2, 3), "the champion is never missing"

    promotions.repair(model)
    if alias(model, "champion") != 3:
        assert [alias(model, which) for which in ("champion", "previous", "challenger")] == [2, 1, 3]
        move_champion(model, 3, kind="promote", grounds=Grounds())
    assert [alias(model, which) for which in ("champion", "previous", "challenger")] == [3, 2, None]
    assert verify_history(model) == []
    assert [event.to_version for event in promotions.events(model) if event.status == "done"] == [1, 2, 3]


def test_of_two_promotions_at_once_one_is_told(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    move_champion(model, 1, kind="promote", grounds=Grounds())
    # Both have read the history before either has written.
    seen = promotions.events(model)
    original = promotions.events
    answers = [seen, seen]
    monkeypatch.setattr(promotions, "events", lambda name: answers.pop() if answers else original(name))
    move_champion(model, 2, kind="promote", grounds=Grounds())
    answers = [seen, seen]
    monkeypatch.setattr(promotions, "_head", lambda client, name: (1, seen[0].digest))
    with pytest.raises(ValueError, match=r"is moving .* to version 2 at this moment"):
        move_champion(model, 3, kind="promote", grounds=Grounds())
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_server.tracking_uri())


@pytest.mark.slow
def test_the_same_on_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mlflow_server(tmp_path / "server") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        first = register(tmp_path, "one", name="served")
        second = register(tmp_path, "two", name="served")
        assert first.source.startswith("mlflow-artifacts:")
        evaluations.record_evaluation("served", 1, evaluation_of(first.digest, edge_ssim=0.5))
        stored = evaluations.evaluation(registry.resolve("models:/served/1"))
        assert stored == evaluation_of(first.digest, edge_ssim=0.5)
        move_champion("served", 1, kind="promote", grounds=Grounds())
        move_champion("served", 2, kind="promote", grounds=Grounds(figures={"edge_ssim": 0.5}))
        assert registry.resolve("models:/served@champion").version == second.version
        assert verify_history("served") == []
        checkpoint = registry.download(second, tmp_path / "downloaded")
        assert (Path(checkpoint) / "model.safetensors").read_text() == "two"
        assert json.loads((Path(checkpoint) / "config.json").read_text()) == {}
