"""What a training relies on: one run across restarts, everything stored, and no outage that stops it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from infra import tracking
from infra.outbox import Outbox
from infra.tracking import TrackedRun
from tests.servers import end_session, free_port, wait_until_healthy


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for the module: making its tables takes seconds."""
    folder = tmp_path_factory.mktemp("a folder with spaces")
    return f"sqlite:///{folder}/mlflow.db"


def test_a_run_holds_what_was_logged(store: str, tmp_path: Path) -> None:
    picture = tmp_path / "grid.png"
    Image.new("RGB", (40, 30), (200, 10, 10)).save(picture)
    notes = tmp_path / "notes.txt"
    notes.write_text("first")

    run = TrackedRun.start("a run", tags={"preset": "smoke"}, uri=store)
    run.log_params({"model": {"width": 8, "norm": "instance"}, "seed": 3})
    for step in range(3):
        run.log_metrics({"generator/adversarial": 1.0 / (step + 1), "rate": step}, step)
    run.log_corpus("paintings", "s3://bucket/style", "ab" * 32, context="style")
    run.log_artifact(notes, "logs")
    notes.write_text("changed after the call")
    run.log_dict({"a": 1}, "config.json")
    run.log_image(picture, "preview/grid", step=2)
    assert run.finish() == {}
    assert run.finish() == {}, "a second finish is harmless"

    client = tracking.client(store)
    stored = client.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "a run"
    assert stored.data.params == {"model.width": "8", "model.norm": "instance", "seed": "3"}
    assert stored.data.tags["preset"] == "smoke"
    history = client.get_metric_history(run.run_id, "generator/adversarial")
    assert [(m.step, m.value) for m in history] == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    assert stored.inputs is not None
    (corpus,) = stored.inputs.dataset_inputs
    assert corpus.dataset.name == "paintings"
    assert corpus.tags[0].value == "style"
    assert json.loads(corpus.dataset.source)["digest"] == "ab" * 32
    beside_the_database = Path(store.removeprefix("sqlite:///")).parent / "mlartifacts" / "nst"
    kept = beside_the_database / run.run_id / "artifacts" / "logs" / "notes.txt"
    assert kept.read_text() == "first", "a file is stored as it was at the call"
    # What MLflow's page reads for its image series: the tag, and the step in the file's name.
    assert stored.data.tags["mlflow.loggedImages"] == "True"
    images = [entry.path for entry in client.list_artifacts(run.run_id, "images")]
    assert any("preview~grid+step+2" in path and path.endswith(".png") for path in images), images


def test_a_resumed_run_is_the_same_run(store: str, caplog: pytest.LogCaptureFixture) -> None:
    run = TrackedRun.start("resumed", uri=store)
    run.log_params({"images": 100, "seed": 1})
    run.log_metrics({"loss": 2.0}, 0)
    run.finish("KILLED")

    again = TrackedRun.start("resumed", run_id=run.run_id, uri=store)
    again.log_params({"images": 200, "seed": 1})
    again.log_metrics({"loss": 1.0}, 1)
    assert again.flush()
    client = tracking.client(store)
    assert client.get_run(run.run_id).info.status == "RUNNING"
    assert again.finish() == {}

    stored = client.get_run(run.run_id)
    assert again.run_id == run.run_id
    assert stored.info.status == "FINISHED"
    assert stored.data.params["images"] == "100"
    assert stored.data.tags["changed.images"] == "100 -> 200"
    assert [m.step for m in client.get_metric_history(run.run_id, "loss")] == [0, 1]

    with caplog.at_level(logging.WARNING):
        other = TrackedRun.start("resumed", run_id="0" * 32, uri=store)
    assert other.run_id != "0" * 32
    assert "does not know the run" in caplog.text
    other.finish()


def test_status_follows_the_exception(store: str) -> None:
    def status_after(error: BaseException | None) -> str:
        with (
            contextlib.suppress(ZeroDivisionError, KeyboardInterrupt),
            TrackedRun.start("s", uri=store) as run,
        ):
            if error is not None:
                raise error
        return tracking.client(store).get_run(run.run_id).info.status

    assert status_after(None) == "FINISHED"
    assert status_after(ZeroDivisionError()) == "FAILED"
    assert status_after(KeyboardInterrupt()) == "KILLED"


def test_a_refused_record_takes_no_neighbour_with_it(store: str, caplog: pytest.LogCaptureFixture) -> None:
    run = TrackedRun.start("refused", uri=store)
    with caplog.at_level(logging.WARNING):
        for step in range(5):
            run.log_metrics({"loss": step, **({"no,such&name": 1.0} if step == 2 else {})}, step)
        lost = run.finish()
    assert lost == {"metrics": 1}
    assert "no,such&name" in caplog.text
    steps = [m.step for m in tracking.client(store).get_metric_history(run.run_id, "loss")]
    assert steps == [0, 1, 3, 4]


def test_a_deleted_experiment_is_named_with_the_remedy(store: str) -> None:
    client = tracking.client(store)
    client.delete_experiment(tracking.experiment_id(client, "deleted"))
    with pytest.raises(ValueError, match="mlflow experiments restore"):
        TrackedRun.start("run", experiment="deleted", uri=store)


def test_the_default_store_is_quiet_and_leaves_the_folder_clean(tmp_path: Path) -> None:
    code = (
        "from infra import tracking\n"
        "tracking.check()\n"
        "run = tracking.TrackedRun.start('quiet')\n"
        "run.log_metrics({'a': 1}, 0)\n"
        "assert run.finish() == {}\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    environment["PYTHONPATH"] = str(Path(tracking.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == [".nst"]
    assert (tmp_path / ".nst" / "mlflow.db").is_file()


def test_check_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "SECONDS_TO_CHECK", 1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as silent:  # accepts, and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://name:hush@127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"no answer within 1 s; .*MLFLOW_TRACKING_URI") as caught:
            tracking.check()
        assert time.monotonic() - start < 5
        assert "hush" not in str(caught.value)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI"):
        tracking.check()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/nothing/mlflow.db")
    with pytest.raises(ValueError, match="cannot make /proc/nothing"):
        tracking.check()


def test_an_outbox_keeps_order_and_its_bounds(caplog: pytest.LogCaptureFixture) -> None:
    is_away = threading.Event()
    is_away.set()
    delivered: list[int] = []

    def deliver(kind: str, payloads: list[int]) -> None:
        if is_away.is_set():
            raise ConnectionError("away")
        delivered.extend(payloads)

    outbox = Outbox("there", deliver, str, max_entries=50, max_bytes=1000)
    with caplog.at_level(logging.WARNING):
        taken = [outbox.put("number", number, num_bytes=1) for number in range(60)]
        assert taken == [True] * 50 + [False] * 10
        assert not outbox.flush(0.1)
        is_away.clear()
        assert outbox.flush(10)
        assert not outbox.put("number", 99, num_bytes=1001)
        assert outbox.put("number", 50)
    assert outbox.close(10) == {"number": 11}
    assert delivered == list(range(51))
    assert caplog.text.count("records are kept") == 1
    assert caplog.text.count("buffer is full") == 1


def test_what_an_outage_without_end_costs_is_said(caplog: pytest.LogCaptureFixture) -> None:
    run = TrackedRun.start("lost", run_id="0" * 32, uri=f"http://127.0.0.1:{free_port()}")
    for step in range(7):
        run.log_metrics({"loss": 1.0}, step)
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        lost = run.finish(timeout_s=1.0)
    assert time.monotonic() - start < 5
    assert lost == {"metrics": 7, "status": 2}
    assert "not stored: 7 x metrics" in caplog.text


@contextlib.contextmanager
def server_on(port: int, folder: Path, *options: str) -> Iterator[str]:
    """An MLflow server on a port of our choice, so that a second one can take the first one's place."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts"), *options]
    log_path = folder / "server.log"
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/health", process, log_path)
        yield f"http://127.0.0.1:{port}"
    finally:
        end_session(process)


@pytest.mark.faults
def test_a_run_survives_its_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    picture = tmp_path / "grid.png"
    Image.new("RGB", (20, 20)).save(picture)
    with server_on(port, tmp_path) as uri:
        tracking.check(uri)
        run = TrackedRun.start("outage", uri=uri)
        run.log_metrics({"loss": 0.0}, 0)
        assert run.flush()

    with caplog.at_level(logging.WARNING):
        slowest = 0.0
        for step in range(1, 200):
            start = time.monotonic()
            run.log_metrics({"loss": float(step)}, step)
            run.log_image(picture, "preview", step) if step == 100 else None
            slowest = max(slowest, time.monotonic() - start)
        assert slowest < 1.0, "training does not wait for a server that is away"
        assert not run.flush(3.0)
        # A restarted worker takes the run up while the server is still away.
        second = TrackedRun.start("outage", run_id=run.run_id, uri=uri)
        second.log_metrics({"loss": 200.0}, 200)
        with server_on(port, tmp_path, "--allowed-hosts", f"127.0.0.1:{port}"):
            with pytest.raises(ValueError, match=rf'403 Invalid Host.*--allowed-hosts "localhost:{port}"'):
                tracking.check(f"http://localhost:{port}")
            assert run.flush(60)
            assert run.finish("KILLED") == {}
            assert second.finish() == {}
            client = tracking.client(uri)
            steps = [m.step for m in client.get_metric_history(run.run_id, "loss")]
            assert sorted(steps) == list(range(201))
            assert client.list_artifacts(run.run_id, "images")
    text = caplog.text
    assert text.count("Connection refused; records are kept and sent later") == 3, (
        "once a queue, in one short line"
    )
    assert capsys.readouterr().out == ""
