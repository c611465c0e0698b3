"""What the tests of infra share: one MLflow database, and models in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import promotions, registry, tracking_server
from tests.registered_models import make_by_hand, promote
from tests.servers import MlflowServer, mlflow_server


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with MLflow's tables, which take seconds to make; a test names its own model in it."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    tracking_server.client(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def infra_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server with a database and artifacts of its own."""
    with mlflow_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def mlflow_store(mlflow_database: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """That database is where all is tracked, and nobody waits for a promotion that may be under way."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mlflow_database}")
    monkeypatch.setattr(promotions, "SECONDS_TO_MOVE", 0.0)
    return tracking_server.tracking_uri()


@pytest.fixture
def model(mlflow_store: str, request: pytest.FixtureRequest) -> str:
    """A registered model with the versions 1, 2 and 3."""
    return make_by_hand(request.node.name.replace("[", "-").replace("]", ""))


@pytest.fixture(scope="session")
def promoted_model(mlflow_database: Path) -> str:
    """One whose versions 1, 2 and 3 were promoted in turn; 4 is the challenger. For tests that restore it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mlflow_database}")
        model = make_by_hand("promoted", num_versions=4)
        promote(model, 1, 2, 3)
        registry.set_alias(model, "challenger", 4)
    return model
