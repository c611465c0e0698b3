"""The whole chain as a user types it, with every place in a bucket: images -> corpora -> training ->
registry -> evaluation -> promotion -> stylized bucket."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from mlflow.tracking import MlflowClient
from PIL import Image

from infra import cluster, storage
from nst.images import encode_jpeg
from pipelines import painter
from pipelines.cli import main
from tests.bad_images import make_difficult_images
from tests.corpora import pieces
from tests.servers import S3Server, mlflow_server

STRICT_GATE = 'held_out = false\n[[rule]]\nwhy = "nobody passes"\nmeasure = "style_distance"\nmax = 0.0\n'


def nst(*arguments: object, exit_code: int = 0) -> dict[str, Any]:
    """Runs a verb; returns what `--json` printed."""
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == exit_code, f"{arguments}\n{result.output}\n{result.stderr}"
    return json.loads(result.stdout.splitlines()[-1])


def write_pictures(folder: Path) -> None:
    photos = folder / "photos"
    photos.mkdir(parents=True)
    for label, cut in pieces(96).items():
        for number, piece in enumerate(cut[:6]):
            (photos / f"{label} {number} é.jpg").write_bytes(encode_jpeg(piece))
    for manner in ("impasto", "woodblock", "pointillism", "fauvism"):
        (folder / "paintings" / manner).mkdir(parents=True)
        for seed in range(3):
            picture = Image.fromarray(painter.paint(manner, seed, size=(128, 96)))
            picture.save(folder / "paintings" / manner / f"{seed}.png")


# Through folders `make demo` goes the same way, which `make test-faults` runs.
@pytest.fixture
def place(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket where everything lives, with an MLflow to match."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = s3.create_bucket()
    server = mlflow_server(
        tmp_path / "mlflow", artifacts_destination=f"{root}/mlflow", environment=s3.environment
    )
    with server as mlflow:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow.uri)
        yield f"{root}/place"
    cluster.disconnect()  # workers have this place's environment


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_chain(place: str, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    write_pictures(pictures)
    difficult = make_difficult_images(pictures / "difficult")
    storage.upload_dir(str(pictures), f"{place}/pictures")

    content, style = f"{place}/corpora/content", f"{place}/corpora/style"
    nst("shard", f"{place}/pictures/photos", content, "--role", "content", "--size", 96)
    nst("shard", f"{place}/pictures/paintings", style, "--role", "style", "--size", 96)
    shown = nst("inspect", style, "--verify", "--no-contact-sheet")
    assert shown["num_samples"] == 12
    assert set(shown["labels"]) == {"impasto", "woodblock", "pointillism", "fauvism"}

    training = nst(
        "train", "--content", content, "--style", style, "--preset", "smoke", "--images", 320,
        "--set", "batch.size=32", "--set", "checkpoint_every=160", "--num-workers", 2,
        "--out", f"{place}/runs", "--name", "first",
    )  # fmt: skip
    assert training["num_images_seen"] == 320
    assert {found.key for found in storage.list_objects(training["checkpoint"])} == {
        "model.safetensors", "config.json", "training.safetensors", "state.json",
    }  # fmt: skip
    run = MlflowClient().get_run(training["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["batch.size"] == "32"
    assert run.data.metrics["generator/bands"] > 0
    assert run.inputs is not None
    assert len(run.inputs.dataset_inputs) == 2
    assert any(
        file.path.endswith(".png") for file in MlflowClient().list_artifacts(training["run_id"], "images")
    )

    nst("promote", "challenger", exit_code=2)  # not evaluated yet
    nst(
        "evaluate", "models:/nst@challenger", "--content", content, "--style", style,
        "--report", f"{place}/report", "--pairs", 16, "--size", 96,
    )  # fmt: skip
    assert storage.exists(f"{place}/report/report.html")
    gate = tmp_path / "strict.toml"
    gate.write_text(STRICT_GATE)
    unseen = nst("promote", training["version"], exit_code=2)
    assert "was evaluated on pictures that it was trained on: " in unseen["error"]
    refused = nst("promote", training["version"], "--gate", gate, exit_code=3)
    assert "style_distance" in json.dumps(refused)
    nst("promote", training["version"], "--force", "--reason", "a test of the chain")
    nst("rollback", exit_code=2)  # there is no former champion
    assert "a test of the chain" in json.dumps(nst("history"))

    arguments = ["stylize", f"{place}/pictures/difficult", f"{place}/out"]
    arguments += ["--style", f"{place}/pictures/paintings/impasto/0.png", "--format", "png"]
    stylized = nst(*arguments)
    assert stylized["done"] == len(difficult.taken)
    not_done = difficult.refused | dict.fromkeys(difficult.hidden, "hidden")
    assert stylized["failed"] + stylized["ignored"] == len(not_done)
    storage.download_dir(f"{place}/out/_nst/ledger", str(tmp_path / "ledger"))
    rows = pq.read_table(tmp_path / "ledger").to_pylist()
    assert sorted(row["key"] for row in rows if row["status"] == "done") == sorted(difficult.taken)
    assert {row["key"]: row["reason"] for row in rows if row["status"] != "done"} == not_done
    for row in rows:
        if row["status"] == "done":
            picture = Image.open(io.BytesIO(storage.read_bytes(f"{place}/out/{row['output']}")))
            assert picture.size == difficult.taken[row["key"]], row["key"]
    again = nst(*arguments)
    assert (again["done"], again["done_before"]) == (0, len(difficult.taken))
