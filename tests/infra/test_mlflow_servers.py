"""The registry on what a team runs: MLflow over PostgreSQL with its artifacts in a bucket, through the server
or straight from the clients, after restarts and after upgrades."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg2
import pytest
import sqlalchemy
import sqlalchemy.exc
from alembic import command
from alembic.script import ScriptDirectory
from mlflow.store.db.utils import _get_alembic_config
from mlflow.store.tracking.dbmodels.initial_models import Base as FirstSchema
from PIL import Image
from skimage import data

from infra import evaluations, promotions, registry, storage, tracking_server
from infra.promotions import Grounds, move_champion
from pipelines.registration import register_checkpoint
from tests.checkpoints import tiny_checkpoint
from tests.registered_models import aliases, register
from tests.servers import (
    BUNDLED_POSTGRES,
    REPOSITORY,
    SITE_PACKAGES,
    MlflowServer,
    PostgresServer,
    S3Server,
    free_port,
    mlflow_server,
    postgres_server,
)

EVALUATION = {
    "measures": {"edge_ssim": {"mean": 0.5, "low": 0.4, "high": 0.6, "values": [0.4, 0.6]}},
    "baselines": {},
    "evaluation_set": {"content_digest": "c", "style_digest": "s", "num_pairs": 2, "seed": 0, "size": 64},
}


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@dataclass(frozen=True, kw_only=True)
class Site:
    """A database and a bucket that outlive the servers over them."""

    postgres: PostgresServer
    store: S3Server
    database: str
    bucket: str
    folder: Path

    def server(self, *options: str, is_proxy: bool = True) -> AbstractContextManager[MlflowServer]:
        return mlflow_server(
            self.folder,
            backend_store_uri=self.postgres.uri(self.database),
            artifacts_destination=f"{self.bucket}/mlflow",
            is_proxy=is_proxy,
            options=options,
            environment=self.store.environment | self.postgres.environment,
        )

    def secrets(self) -> list[str]:
        return [self.store.environment["AWS_SECRET_ACCESS_KEY"], self.postgres.environment["PGPASSWORD"]]


@pytest.fixture
def site(postgres: PostgresServer, store: S3Server, tmp_path: Path) -> Site:
    return Site(
        postgres=postgres,
        store=store,
        database=postgres.create_database(),
        bucket=store.create_bucket(),
        folder=tmp_path / "mlflow",
    )


def make_older_database(uri: str, environment: dict[str, str] | None = None) -> None:
    """What the MLflow version before the last change of its schema has left, with one experiment in it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environment or {}).items():
            patch.setenv(name, value)
        engine = sqlalchemy.create_engine(uri)
        FirstSchema.metadata.create_all(engine)
        config = _get_alembic_config(uri)
        head = ScriptDirectory.from_config(config).get_revision("heads")
        assert head is not None
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, str(head.down_revision))
            connection.exec_driver_sql(
                "INSERT INTO experiments (name, artifact_location, lifecycle_stage, workspace) "
                "VALUES ('from before', 'mlflow-artifacts:/7', 'active', 'default')"
            )
        engine.dispose()


def command_lines(server: MlflowServer) -> list[str]:
    """Of the server and its children, as everybody on the machine can read them."""
    parent = psutil.Process(server.process_id)
    return [" ".join(process.cmdline()) for process in (parent, *parent.children(recursive=True))]


def nst(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A verb in a process of its own, where MLflow keeps no client of other credentials."""
    return python("-m", "pipelines.cli", *arguments, **environment)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_the_wheels_postgres_lets_nobody_in_without_the_password() -> None:
    with postgres_server(SITE_PACKAGES / BUNDLED_POSTGRES / "bin") as server:
        assert server.execute("SELECT current_user") == [("mlflow",)]
        with pytest.raises(sqlalchemy.exc.OperationalError, match="password"):
            sqlalchemy.create_engine(server.uri("postgres")).connect()
    with pytest.raises(psycopg2.OperationalError, match="refused"):
        server.execute("SELECT 1")


@pytest.mark.faults
def test_the_registry_outlives_its_server(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = tmp_path / "large.bin"
    large.write_bytes(os.urandom(40_000_000))
    with site.server() as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        assert "AWS_SECRET_ACCESS_KEY" not in os.environ, "a client of the server needs no credentials"
        first, second = (register(tmp_path, content, name="served") for content in ("one", "two"))
        evaluation = EVALUATION | {"model_digest": first.digest}
        evaluations.record_evaluation("served", 1, evaluation)
        move_champion("served", 1, kind="promote", grounds=Grounds(reason="é 1"))
        move_champion("served", 2, kind="promote", grounds=Grounds(figures={"edge_ssim": 0.5}))
        history = promotions.events("served")
        tracking_server.client().log_artifact(first.run_id or "", str(large), "in one piece")
        monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "true")
        monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", "10000000")
        tracking_server.client().log_artifact(first.run_id or "", str(large), "in parts")
        shown = [Path(server.log_path).read_text(), *command_lines(server)]
    assert len(shown) > 2
    assert not [text for text in shown for secret in site.secrets() if secret in text]

    with site.server() as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        tracking_server.check_artifacts("nst")
        digests = [version.digest for version in registry.list_versions("served")]
        assert digests == [second.digest, first.digest]
        assert aliases("served") == (2, 1, None)
        assert promotions.events("served") == history
        assert promotions.verify_history("served") == []
        assert evaluations.evaluation(registry.get_version("served", 1)) == evaluation
        champion = registry.resolve("models:/served@champion")
        checkpoint = registry.download(champion, tmp_path / "downloaded")
        assert (Path(checkpoint) / "model.safetensors").read_text() == "two"
        client = tracking_server.client()
        for folder in ("in one piece", "in parts"):
            copy = client.download_artifacts(first.run_id or "", f"{folder}/large.bin", str(tmp_path))
            assert Path(copy).read_bytes() == large.read_bytes()
    for name, value in site.store.environment.items():
        monkeypatch.setenv(name, value)
    keys = [found.key for found in storage.list_objects(f"{site.bucket}/mlflow")]
    assert sum(key.endswith("model.safetensors") for key in keys) == 2
    assert not [key for key in keys if "nst-check" in key]


@pytest.mark.faults
def test_clients_that_go_to_the_bucket_themselves(
    site: Site, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is an upgraded one: the version before has left its database."""
    make_older_database(site.postgres.uri(site.database), site.postgres.environment)
    with site.server(is_proxy=False) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        kept = tracking_server.client().get_experiment_by_name("from before")
        assert kept is not None
        assert kept.artifact_location == "mlflow-artifacts:/7", "the database was brought up to date"

        tracking_server.check_artifacts("nst")
        assert list(storage.list_objects(site.bucket, include_hidden=True)) == []
        version = register_checkpoint(tiny_checkpoint(tmp_path / "checkpoint"), model_name="direct")
        found = registry.get_version("direct", version)
        assert found.source.startswith(f"{site.bucket}/mlflow/")
        weights = storage.read_bytes(f"{found.source}/artifacts/checkpoint/model.safetensors")
        assert weights == (tmp_path / "checkpoint" / "model.safetensors").read_bytes()
        Image.fromarray(data.coffee()).resize((96, 64)).save(tmp_path / "coffee.png")
        evaluate = ("evaluate", f"models:/direct/{version}", "--report", str(tmp_path / "report"))
        evaluate += ("--content", str(tmp_path), "--style", str(tmp_path))
        closed = f"http://127.0.0.1:{free_port()}"
        for environment, expected in (
            ({"AWS_SECRET_ACCESS_KEY": "a-wrong-secret"}, "does not match the signature|does not accept"),
            ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no usable credentials"),
            ({"AWS_ENDPOINT_URL": closed, "AWS_ENDPOINT_URL_S3": closed}, f"cannot reach {closed}"),
        ):
            done = nst(*evaluate, **environment)
            assert done.returncode in (1, 2), done.stderr
            assert re.search(expected, done.stderr), done.stderr
            assert found.source in done.stderr
            assert "Traceback" not in done.stderr
            shown = done.stdout + done.stderr + Path(server.log_path).read_text()
            assert not [secret for secret in ("a-wrong-secret", *site.secrets()) if secret in shown]
            probe = "from infra import tracking_server; tracking_server.check_artifacts('nst')"
            done = python("-c", probe, **environment)
            assert re.search(f"ValueError: the artifacts of MLflow at .*({expected})", done.stderr), (
                done.stderr
            )


@pytest.mark.slow
def test_a_database_of_another_mlflow_version(tmp_path: Path) -> None:
    older, newer = f"sqlite:///{tmp_path}/older.db", f"sqlite:///{tmp_path}/newer.db"
    make_older_database(older)
    shutil.copyfile(tmp_path / "older.db", tmp_path / "newer.db")
    tracking_server.check(older)
    assert tracking_server.client(older).get_experiment_by_name("from before") is not None

    with contextlib.closing(sqlite3.connect(tmp_path / "newer.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'fedcba987654'")
    with pytest.raises(
        ValueError, match=r"a newer version of MLflow than .*; install that newer version"
    ) as told:
        tracking_server.check(newer)
    assert "\n" not in str(told.value)
