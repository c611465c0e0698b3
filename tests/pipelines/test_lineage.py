"""From a stylized bucket back to version, run, corpora, code and settings, and forward again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from mlflow.entities import Run

from infra import evaluations, registry, tracking_server, usage
from infra.promotions import Grounds, move_champion
from infra.tracking import TrackedRun
from nst.config import to_dict
from nst.manifest import MANIFEST_NAME, Manifest
from nst.presets import resolve_config
from pipelines.bucket_record import BucketRecord
from pipelines.cli import main
from pipelines.models import ResolvedModel, resolve_model
from pipelines.registration import register_checkpoint
from pipelines.styles import read_styles
from pipelines.stylize_plan import single_looks
from pipelines.stylize_run import BucketRun, run_bucket
from pipelines.stylize_worker import StylizeSettings
from pipelines.training_claim import RECORD_FILE
from pipelines.tree import Node, draw
from tests.bad_images import encoded, picture
from tests.checkpoints import tiny_checkpoint
from tests.corpora import make_corpus
from tests.servers import REPOSITORY, S3Server, free_port

COMMIT, CODE = "0123456789ab", "c" * 64


@dataclass(frozen=True)
class World:
    """One model, trained on two corpora and registered as version 1 of `nst`."""

    folder: Path
    content: str
    style: str
    run_id: str
    digest: str


@pytest.fixture(scope="module")
def kept_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        return make_world(folder)


def make_world(folder: Path) -> World:
    corpora = {role: make_corpus(folder / role, role, per_label=2) for role in ("content", "style")}
    place = folder / "runs" / "first"
    tags = {"nst.training": str(place), "nst.commit": COMMIT, "nst.code": CODE}
    run = TrackedRun.start("first", tags=tags)
    config = resolve_config("smoke", None, ["batch.size=32"])
    run.log_params({"num_workers": "2", **to_dict(config)})
    for role, uri in corpora.items():
        run.log_corpus(role, uri, manifest_of(uri).digest, context=role)
    assert run.finish() == {}
    place.mkdir(parents=True)
    record = {"run_id": run.run_id, "driver": {"host": "trainer-7"}}
    (place / RECORD_FILE).write_text(json.dumps(record))
    assert register_checkpoint(tiny_checkpoint(place / "checkpoint"), run_id=run.run_id) == 1
    digest = registry.get_version("nst", 1).digest
    assert digest is not None
    return World(folder, corpora["content"], corpora["style"], run.run_id, digest)


@pytest.fixture
def world(kept_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """The same to every test, in a store that is the test's own."""
    shutil.copyfile(kept_world.folder / "mlflow.db", tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return kept_world


def nst(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def shown(*arguments: object) -> tuple[str, dict[str, Any]]:
    """What `nst history` prints for people, on single spaces, and what for programs."""
    result = nst("history", *arguments, "--json")
    assert result.exit_code == 0, result.output
    *lines, last = result.stdout.splitlines()
    assert max(map(len, lines)) <= 100 or any("/" in line for line in lines)
    assert "\x1b" not in result.stdout, "no colours where nobody looks"
    return " ".join("\n".join(lines).replace("│", " ").split()), json.loads(last)


def manifest_of(uri: str) -> Manifest:
    return Manifest.from_json(Path(uri, MANIFEST_NAME).read_bytes())


def notes() -> list[Run]:
    """The runs that note a bucket."""
    client = tracking_server.client()
    experiment = client.get_experiment_by_name(usage.EXPERIMENT)
    return [] if experiment is None else client.search_runs([experiment.experiment_id])


def record_in(out: Path | str, world: World, *, version: int | None = 1, **facts: Any) -> BucketRecord:
    """The record of a run into `out`, without the pictures."""
    model = {"name": "nst" if version else "runs/first/checkpoint", "version": version}
    known = {
        "arguments": {"source": "s3://photos/2024", "out": str(out), "strength": 0.5},
        "model": {**model, "digest": world.digest},
        "styles": [{"name": "dahlia", "uri": "s3://styles/dahlia.jpg", "sha256": "d" * 64}],
        "settings_digest": "e" * 64,
        "code": {"version": "0.1.0", "commit": COMMIT, "digest": CODE},
    }
    return BucketRecord(str(out), known | facts)


def run_json(out: Path) -> dict[str, Any]:
    return json.loads((out / "_nst" / "run.json").read_text())


def photographs_in(folder: Path, num: int, size: tuple[int, int] = (48, 32)) -> Path:
    folder.mkdir()
    for index in range(num):
        (folder / f"{index}.jpg").write_bytes(encoded(picture(*size, seed=index), "JPEG"))
    return folder


# There and back


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_from_a_bucket_back_to_its_corpora_and_forward_again(world: World, tmp_path: Path) -> None:
    photos, out = photographs_in(tmp_path / "photos", 2), tmp_path / "painted"
    style = photographs_in(tmp_path / "styles", 1) / "0.jpg"
    command = ("stylize", photos, out, "--style", style, "--model", "models:/nst/1", "--strength", 0.5)
    assert nst(*command).exit_code == 0
    (note,) = notes()
    assert note.info.status == "FINISHED"
    model_id = registry.get_version("nst", 1).model_id
    inputs = tracking_server.client().get_run(note.info.run_id).inputs  # a search leaves them out
    assert inputs is not None
    assert [given.model_id for given in inputs.model_inputs] == [model_id]
    (photos / "new.jpg").write_bytes(encoded(picture(48, 32, seed=9), "JPEG"))
    assert nst(*command).exit_code == 0
    assert nst(*command).exit_code == 0
    assert [run.info.run_id for run in notes()] == [note.info.run_id], "one note a bucket"

    text, found = shown("--version", 1)
    (bucket,) = found["buckets"]
    assert (bucket["use"]["out"], bucket["use"]["source"]) == (str(out), str(photos))
    assert (bucket["use"]["num_done"], bucket["problem"]) == (3, "")
    assert found["training"]["run_id"] == world.run_id
    for expected in (
        "nst version 1 @challenger",
        f"digest {world.digest}",
        f"run {world.run_id}",
        "where driver on trainer-7, 2 workers",
        "config preset smoke with batch.size=32; digest ",
        f"code commit {COMMIT}, digest {CODE[:12]}",
        f"content corpus {world.content} digest {manifest_of(world.content).digest} holds 8 samples",
        f"style corpus {world.style} digest {manifest_of(world.style).digest} holds 8 samples",
        "evaluation none yet",
        "it was never the champion",
        f"stylized buckets (1) └─ {out} source {photos} pictures 3 stylized",
        "strength 0.5",
    ):
        assert expected in text

    text, found = shown(out)
    assert found["bucket"]["version"]["training"]["run_id"] == world.run_id
    assert found["bucket"]["version"]["buckets"] == []
    for expected in (
        f"{out} source {photos} pictures 3 stylized",
        f"style {style}",
        f"MLflow run {note.info.run_id} at ",
        "nst version 1 @challenger",
        f"style corpus {world.style}",
    ):
        assert expected in text

    text, found = shown(world.style)
    assert "corpus style, 8 samples" in text
    assert "training run first registered models:/nst/1" in text
    assert found["corpus"]["trainings"][0]["same"] is True


def bucket_run(model: ResolvedModel, photos: Path, out: Path, style: Path) -> BucketRun:
    styles = read_styles([str(style)])
    return BucketRun(
        source_uri=str(photos),
        out_uri=str(out),
        model=model,
        styles=styles,
        looks=single_looks([style.name for style in styles], [style.digest for style in styles]),
        pairing="each",
        settings=StylizeSettings(),
    )


@pytest.mark.faults
@pytest.mark.usefixtures("ray_here")
def test_mlflow_away_costs_no_picture_and_the_note_comes_later(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    photos, out = photographs_in(tmp_path / "photos", 1), tmp_path / "painted"
    run = bucket_run(resolve_model("models:/nst/1"), photos, out, photographs_in(tmp_path / "styles", 1))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", f"http://someone:secret@127.0.0.1:{free_port()}")
        assert run_bucket(run)["done"] == 1
    warnings = [entry.message for entry in caplog.records if entry.name == "infra.usage"]
    assert len(warnings) == 1, warnings
    assert f"was not told of {out}" in warnings[0]
    assert "secret" not in caplog.text + (out / "_nst" / "run.json").read_text()
    assert (run_json(out)["status"], run_json(out)["tracking"], notes()) == ("done", None, [])
    assert "MLflow not told yet" in shown(out)[0]

    assert run_bucket(run)["done_before"] == 1, "nothing is left to do but to say so"
    (note,) = notes()
    assert (note.info.status, note.data.metrics["num_done"]) == ("FINISHED", 1)
    assert run_json(out)["tracking"]["run_id"] == note.info.run_id
    assert "stylized buckets (1)" in shown("--version", 1)[0]


def test_a_silent_mlflow_is_not_waited_for(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "SECONDS_TO_NOTE", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        record = record_in(tmp_path / "out", world)
        record.begin()
        record.end("done", {"done": 1})
        assert time.monotonic() - started < 2
        for thread in threading.enumerate():
            if thread.name == usage.THREAD_NAME:  # or it would tell the next test's MLflow
                thread.join(30)


@pytest.mark.faults
def test_a_killed_run_that_goes_on_is_noted_once(world: World, tmp_path: Path) -> None:
    photos, out = photographs_in(tmp_path / "photos", 40, (640, 480)), tmp_path / "painted"
    style = photographs_in(tmp_path / "styles", 1)
    command = [sys.executable, "-m", "pipelines.stylize_bucket", str(photos), str(out)]
    command += ["--style", str(style), "--model", "models:/nst/1"]
    process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while len(list(out.glob("*.jpg"))) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    assert [run.info.status for run in notes()] == ["RUNNING"]
    assert "begun, and not ended" in shown("--version", 1)[0]
    subprocess.run(command, cwd=REPOSITORY, timeout=200, check=True)
    (note,) = notes()
    assert (note.info.status, note.data.metrics["num_done"]) == ("FINISHED", 40)


def test_what_was_found_and_decided_about_a_version(world: World) -> None:
    style_distance = {"mean": 0.1, "low": 0.09, "high": 0.11, "values": [0.1, 0.1]}
    evaluation = {
        "measures": {"style_distance": style_distance},
        "baselines": {},
        "evaluation_set": {"num_pairs": 2, "digest": "9" * 64},
        "model_digest": world.digest,
    }
    evaluations.record_evaluation("nst", 1, evaluation, files={"report.html": b"<p>"})
    assert register_checkpoint(tiny_checkpoint(world.folder / "second", seed=1)) == 2
    for version, grounds in ((1, Grounds(reason="the first")), (2, Grounds(reason="faces", is_forced=True))):
        move_champion("nst", version, kind="promote", grounds=grounds)
    text, found = shown("--version", 1)
    today = time.strftime("%Y-%m-%d", time.gmtime())
    for expected in (
        f"evaluation when {today}",
        f"measured on digest {'9' * 12}, num_pairs 2 style_distance 0.100 (0.090 to 0.110)",
        f"report runs:/{world.run_id}/evaluations/nst-1-",
        "became the champion, the first one (promote)",
        "because the first",
        "gave way to version 2 (promote, forced)",
        "because faces",
    ):
        assert expected in text
    assert [event["sequence"] for event in found["promotions"]] == [1, 2]
    assert "became the champion in place of version 1" in shown("--version", 2)[0]


# What a record says, and what MLflow makes of it


def test_a_bucket_has_one_note_however_its_runs_ended(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    record_in(out, world).begin()  # killed: no end
    interrupted = record_in(out, world)
    interrupted.begin()
    interrupted.end("interrupted", {"done": 1})
    assert [run.info.status for run in notes()] == ["KILLED"]
    record_in(out, world).end("failed", {"done": 1, "done_before": 1, "failed": 2})
    (note,) = notes()
    assert note.info.status == "FAILED"
    assert (note.data.metrics["num_done"], note.data.metrics["num_failed"]) == (2, 2)
    assert note.data.tags["nst.settings"] == "style dahlia; strength 0.5"
    # a copy is another bucket
    shutil.copytree(out, tmp_path / "copy")
    record_in(tmp_path / "copy", world).end("done", {"done": 2})
    assert {run.data.tags["nst.out"] for run in notes()} == {str(out), str(tmp_path / "copy")}


def test_two_first_runs_at_once_make_one_bucket(world: World, tmp_path: Path) -> None:
    out = tmp_path / "painted"
    runs = [record_in(out, world) for _ in range(2)]
    for record in runs:
        record.begin()
    for record in runs:
        record.end("done", {"done": 2})
    assert len(notes()) == 1


def test_another_version_takes_a_bucket_over(world: World, tmp_path: Path) -> None:
    assert register_checkpoint(tiny_checkpoint(tmp_path / "second", seed=1)) == 2
    second = {"name": "nst", "version": 2, "digest": registry.get_version("nst", 2).digest}
    record_in(tmp_path / "out", world).end("done", {"done": 4})
    record_in(tmp_path / "out", world, model=second).end("done", {"done": 4})
    assert "now its pictures were made anew since, by models:/nst/2" in shown("--version", 1)[0]
    text, found = shown("--version", 2)
    assert found["buckets"][0]["problem"] == ""
    assert "training run none: a checkpoint was registered without its run" in text
    record_in(tmp_path / "out", world).end("done", {"done": 4})
    assert len(notes()) == 2
    assert shown("--version", 1)[1]["buckets"][0]["problem"] == ""


def test_what_is_gone_is_said(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    record_in(out, world).end("done", {"done": 4})
    client = tracking_server.client()
    client.delete_run(world.run_id)
    assert "deleted in MLflow, and still in its trash" in shown("--version", 1)[0]
    client._tracking_client.store._hard_delete_run(world.run_id)  # pyright: ignore[reportAttributeAccessIssue]
    text, found = shown("--version", 1)
    assert "training run run deleted: MLflow has nothing of it any more" in text
    assert found["training"] is None
    text, _ = shown(out)
    assert "trained on, as the bucket remembers" in text
    assert f"style corpus {world.style} digest {manifest_of(world.style).digest} holds 8 samples" in text
    shutil.rmtree(out)
    assert f"{out} now gone" in shown("--version", 1)[0]


def test_a_corpus_that_changed_or_went_is_said(world: World, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "style", "style", per_label=1)
    run = TrackedRun.start("second")
    run.log_corpus("style", corpus, "0" * 64, context="style")
    run.log_corpus("gone", str(tmp_path / "gone"), "1" * 64, context="content")
    assert run.finish() == {}
    assert register_checkpoint(tiny_checkpoint(tmp_path / "second", seed=1), run_id=run.run_id) == 2
    text, _ = shown("--version", 2)
    assert f"holds changed since: it is {manifest_of(corpus).digest[:12]} now" in text
    assert f"content corpus {tmp_path / 'gone'} digest {'1' * 64} holds gone" in text
    text, found = shown(corpus)
    assert "corpus it was another then: samples were added or changed since" in text
    assert [trained["versions"] for trained in found["corpus"]["trainings"]] == [["models:/nst/2"]]


def test_only_the_newest_buckets_are_named(world: World, tmp_path: Path) -> None:
    for number in range(3):
        started = {"started_at": f"2026-01-0{number + 1}T00:00:00+00:00"}
        record_in(tmp_path / f"{number}", world).end("done", {"done": 1})
        (note,) = (run for run in notes() if run.data.tags["nst.out"].endswith(f"/{number}"))
        tracking_server.client().set_tag(note.info.run_id, "nst.started_at", started["started_at"])
    found, num_more = usage.uses("nst", 1, limit=2)
    assert ([Path(use.out).name for use in found], num_more) == (["2", "1"], 1)


def test_a_bucket_by_another_model_exits_with_1(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    record_in(out, world).end("done", {"done": 4})
    record = run_json(out)
    record["model"]["digest"] = "f" * 64
    (out / "_nst" / "run.json").write_text(json.dumps(record))
    result = nst("history", out)
    assert result.exit_code == 1
    assert (
        f"made by a model with the digest {'f' * 12}, but models:/nst/1 in MLflow at sqlite" in result.stderr
    )
    assert f"is {world.digest[:12]}: another model" in result.stderr
    assert "Traceback" not in result.output
    record["model"]["version"] = 9
    (out / "_nst" / "run.json").write_text(json.dumps(record))
    result = nst("history", out)
    assert result.exit_code == 1
    assert "nst has no version 9; the newest are: 1" in result.stderr


def test_a_checkpoint_that_is_not_registered_leaves_no_note(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    record_in(out, world, version=None).end("done", {"done": 4})
    assert notes() == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    text, found = shown(out)
    assert "a checkpoint that is not registered checkpoint runs/first/checkpoint" in text
    assert found["bucket"]["version"] is None


def test_a_bucket_in_an_object_store(world: World, s3: S3Server) -> None:
    bucket = s3.create_bucket()
    record_in(f"{bucket}/painted", world).end("done", {"done": 4})
    text, _ = shown(f"{bucket}/painted/")
    assert f"{bucket}/painted source s3://photos/2024 pictures 4 stylized" in text
    assert f"stylized buckets (1) └─ {bucket}/painted source" in shown("--version", 1)[0]


def test_mistakes_exit_with_2_and_the_remedy(world: World, tmp_path: Path) -> None:
    for arguments, expected in (
        ((tmp_path,), "is neither a stylized bucket (it has no _nst/run.json) nor a corpus"),
        ((tmp_path, "--version", 1), "ask one of them"),
        (("--version", 7), "nst has no version 7; the newest are: 1"),
    ):
        result = nst("history", *arguments)
        assert (result.exit_code, expected in result.stderr) == (2, True), result.output
    (tmp_path / "_nst").mkdir()
    (tmp_path / "_nst" / "run.json").write_text("{")
    result = nst("history", tmp_path)
    assert (result.exit_code, "is no record of a stylized bucket" in result.stderr) == (1, True)
    assert "Traceback" not in result.output


# The tree


def test_a_tree_is_drawn_to_its_width() -> None:
    leaf = Node(title="leaf", facts=[("", "a fact by itself"), ("empty", "")])
    long = Node(title="long", facts=[("uri", "s3://" + "x" * 60), ("words", "many words " * 6)])
    root = Node(title="root", facts=[("a", "1"), ("digest", "2")], children=[long, leaf])
    lines = draw(root, width=60)
    assert lines == [
        "root",
        "│  a       1",
        "│  digest  2",
        "├─ long",
        "│     uri    s3://" + "x" * 60,
        "│     words  many words many words many words many words",
        "│            many words many words",
        "└─ leaf",
        "      a fact by itself",
    ]
    styled = draw(root, width=60, is_styled=True)
    assert "\x1b[1m" in styled[0]
    assert len(styled) == len(lines)
