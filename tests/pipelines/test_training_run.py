"""How a training ended is told to its record and to MLflow, whatever made it end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from infra import storage
from infra.s3_errors import StoreRefuses
from nst.corpus import Corpus
from nst.presets import resolve_config
from pipelines import train_gan
from pipelines.console import StageFailed
from pipelines.ray_training import Workers
from pipelines.train_worker import WorkerSettings
from pipelines.training_claim import RECORD_FILE, Overtaken, TrainingClaim
from pipelines.training_record import Training
from pipelines.training_run import start_run
from tests.corpora import make_corpus

WORKERS = Workers(sizes=(1,), use_gpu=False, max_restarts=0, wait_for_nodes_s=0, are_here=True)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Training:
    folder = tmp_path_factory.mktemp("training")
    content, style = (Corpus.open(make_corpus(folder / role, role)) for role in ("content", "style"))
    config = resolve_config("smoke", None, [])
    return Training(name="first", out_uri=str(folder), config=config, content=content, style=style)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StageFailed("no room"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (Overtaken("by another"), "RUNNING"),
    ],
)
@pytest.mark.parametrize("store_answers", [True, False])
def test_how_it_ended_is_told(
    training: Training,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: str,
    store_answers: bool,
) -> None:
    """Of a training that another driver has taken over that one tells."""
    folder = tmp_path_factory.getbasetemp() / "test_how_it_ended.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}")
    claim = TrainingClaim.of(training)
    run = start_run(training, claim, (1, 1), 1)

    def end(*_: object) -> tuple[int, None]:
        if not store_answers:
            monkeypatch.setattr(storage, "replace_bytes", refuse)
        raise error

    def refuse(uri: str, data: bytes, *, expected: bytes | None) -> bool:
        raise StoreRefuses(f"{uri}: ExpiredToken")

    monkeypatch.setattr(train_gan, "fit_and_publish", end)
    settings = WorkerSettings(
        identity=training.identity(),
        checkpoints_uri=training.checkpoints_uri,
        claim=claim.place,
        run_id=run.run_id,
        tracking_uri=None,
        num_loader_workers=0,
        checkpoint_seconds=300,
        hang_timeout_s=300,
        num_threads=1,
    )
    with pytest.raises(type(error)):
        train_gan.run_training(training, claim, run, settings, WORKERS, lambda: None, "nst")
    assert MlflowClient().get_run(run.run_id).info.status == status
    record = json.loads((Path(training.uri) / RECORD_FILE).read_text())
    assert record["status"] == (status if store_answers else "RUNNING")
    (Path(training.uri) / RECORD_FILE).unlink()
