"""Registered models for the tests: real ones of a few bytes, and mere entries in the registry."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from infra import promotions, publishing, registry, tracking_server
from infra.promotions import Grounds, move_champion
from infra.publishing import ModelInterface
from infra.registry import RegisteredVersion

# All that the history is read and written with.
READS = ("get_experiment_by_name", "get_run", "get_registered_model", "search_model_versions")
WRITES = (
    "create_run",
    "set_terminated",
    "create_experiment",
    "set_registered_model_tag",
    "log_param",
    "set_registered_model_alias",
    "delete_registered_model_alias",
    "set_model_version_tag",
)

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


def register(folder: Path, content: str, **options: Any) -> RegisteredVersion:
    """Publishes a checkpoint whose weights are `content`; its digest is "digest of `content`"."""
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


def make_by_hand(name: str, num_versions: int = 3) -> str:
    """A registered model as a person makes it: versions that hold nothing but a digest."""
    client = tracking_server.client()
    client.create_registered_model(name)
    for number in range(1, num_versions + 1):
        client.create_model_version(name, f"s3://nowhere/{number}", tags={"digest": f"digest {number}"})
    return name


def alias(name: str, which: str) -> int | None:
    version = registry.with_alias(name, which)
    return version.version if version else None


def aliases(name: str) -> tuple[int | None, int | None, int | None]:
    """The champion, the previous and the challenger."""
    champion, previous, challenger = (
        alias(name, which) for which in (registry.CHAMPION, registry.PREVIOUS, registry.CHALLENGER)
    )
    return champion, previous, challenger


def promote(name: str, *versions: int) -> None:
    for version in versions:
        move_champion(name, version, kind="promote", grounds=Grounds(reason=f"reason {version}"))


def moves(name: str) -> list[tuple[str, int | None, int, str]]:
    return [
        (event.kind, event.from_version, event.to_version, event.status) for event in promotions.events(name)
    ]


@contextlib.contextmanager
def before_calls(methods: tuple[str, ...], act: Callable[[str], None]) -> Iterator[None]:
    """Calls `act` with the name of each call of MLflow's client among `methods`, before it is made."""
    with pytest.MonkeyPatch.context() as patch:
        for method in methods:
            original = getattr(MlflowClient, method)

            def watched(*args: Any, method: str = method, original: Any = original, **kwargs: Any) -> Any:
                act(method)
                return original(*args, **kwargs)

            patch.setattr(MlflowClient, method, watched)
        yield


@contextlib.contextmanager
def restored(database: Path) -> Iterator[sqlite3.Connection]:
    """The database, to be altered past MLflow; behind it all is as it was before."""
    with (
        contextlib.closing(sqlite3.connect(database)) as connection,
        contextlib.closing(sqlite3.connect(":memory:")) as copy,
    ):
        connection.backup(copy)
        try:
            yield connection
        finally:
            connection.rollback()
            copy.backup(connection)
