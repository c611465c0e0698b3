"""What a training relies on: one run across restarts, everything stored, and no outage that stops it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from infra import tracking, tracking_server
from infra.tracking import TrackedRun, deliver_left
from tests.servers import REPOSITORY, end_session, free_port, wait_until_healthy


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for the module: making its tables takes seconds."""
    folder = tmp_path_factory.mktemp("a folder with spaces")
    return f"sqlite:///{folder}/mlflow.db"


@pytest.fixture
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where what is not sent yet is kept, for this process and its children."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> str:
    """A server that refuses at once."""
    uri = f"http://127.0.0.1:{free_port()}"
    tracking_server.client(uri)  # sets what this test changes
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return uri


def test_a_run_holds_what_was_logged(store: str, tmp_path: Path) -> None:
    picture = tmp_path / "grid.png"
    Image.new("RGB", (40, 30), (200, 10, 10)).save(picture)
    run = TrackedRun.start("a run", tags={"preset": "smoke"}, uri=store)
    run.log_params({"model": {"width": 8, "norm": "instance"}, "seed": 3})
    for step in range(3):
        run.log_metrics({"generator/adversarial": 1.0 / (step + 1), "rate": step}, step)
    run.log_corpus("paintings", "s3://bucket/style", "ab" * 32, context="style")
    run.log_dict({"a": 1}, "config.json")
    run.log_image(picture, "preview/grid", step=2)
    assert run.finish() == {}
    assert run.finish() == {}, "a second finish is harmless"

    client = tracking_server.client(store)
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
    kept = beside_the_database / run.run_id / "artifacts" / "config.json"
    assert json.loads(kept.read_text()) == {"a": 1}
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
    client = tracking_server.client(store)
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


def test_a_refused_record_takes_no_neighbour_with_it(store: str, caplog: pytest.LogCaptureFixture) -> None:
    run = TrackedRun.start("refused", uri=store)
    with caplog.at_level(logging.WARNING):
        for step in range(5):
            run.log_metrics({"loss": step, **({"no,such&name": 1.0} if step == 2 else {})}, step)
        lost = run.finish()
    assert lost == {"metrics": 1}
    assert "no,such&name" in caplog.text
    steps = [m.step for m in tracking_server.client(store).get_metric_history(run.run_id, "loss")]
    assert steps == [0, 1, 3, 4]


def test_a_deleted_experiment_is_named_with_the_remedy(store: str) -> None:
    client = tracking_server.client(store)
    client.delete_experiment(tracking_server.experiment_id(client, "deleted"))
    with pytest.raises(ValueError, match="mlflow experiments restore"):
        TrackedRun.start("run", experiment="deleted", uri=store)


def test_the_default_store_is_quiet_and_leaves_the_folder_clean(tmp_path: Path) -> None:
    code = (
        "from infra import tracking, tracking_server\n"
        "tracking_server.check()\n"
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
    monkeypatch.setattr(tracking_server, "SECONDS_TO_CHECK", 1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as silent:  # accepts, and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://name:hush@127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"no answer within 1 s; .*MLFLOW_TRACKING_URI") as caught:
            tracking_server.check()
        assert time.monotonic() - start < 5
        assert "hush" not in str(caught.value)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI"):
        tracking_server.check()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/nothing/mlflow.db")
    with pytest.raises(ValueError, match="cannot make /proc/nothing"):
        tracking_server.check()


def test_what_an_outage_without_end_costs_is_said(
    temporary_folder: Path, unreachable: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = TrackedRun.start("away", run_id="0" * 32, uri=unreachable)
    for step in range(7):
        run.log_metrics({"loss": 1.0}, step)
    start = time.monotonic()
    assert run.finish("FAILED", timeout_s=1.0) == {"metrics": 7, "status": 2}
    assert time.monotonic() - start < 5
    assert (
        "not stored: 7 x metrics, 2 x status; MLflow does not know yet that the run is FAILED" in caplog.text
    )
    assert f"Kept in {temporary_folder}" in caplog.text
    assert [path.name for path in temporary_folder.iterdir()] == [f"nst-tracking-{'0' * 32}"]


def test_what_a_run_has_already_is_not_logged_twice(
    store: str, temporary_folder: Path, tmp_path: Path
) -> None:
    """A training that goes on from a checkpoint repeats the steps behind it."""
    picture = tmp_path / "grid.png"
    Image.new("RGB", (20, 20)).save(picture)
    run = TrackedRun.start("repeated", uri=store)
    for step in range(10):
        run.log_metrics({"loss": step, **({"rare": step} if step % 4 == 0 else {})}, step)
        run.log_image(picture, "preview/grid", step) if step % 3 == 0 else None
    assert run.finish(None) == {}
    assert tracking_server.client(store).get_run(run.run_id).info.status == "RUNNING", (
        "None leaves the status alone"
    )

    again = TrackedRun.start("repeated", run_id=run.run_id, uri=store)
    for step in range(6, 15):
        again.log_metrics({"loss": 100 + step, **({"rare": step} if step % 4 == 0 else {})}, step)
        again.log_image(picture, "preview/grid", step) if step % 3 == 0 else None
    again.log_metrics({"other": 1.0}, 3)
    again.log_metrics({"other": 2.0}, 3)
    assert again.finish() == {}
    client = tracking_server.client(store)
    history = client.get_metric_history(run.run_id, "loss")
    assert [m.step for m in history] == list(range(15))
    assert [m.value for m in history] == [*range(10), *range(110, 115)]
    assert [m.step for m in client.get_metric_history(run.run_id, "rare")] == [0, 4, 8, 12]
    assert len(client.get_metric_history(run.run_id, "other")) == 2, "one start may log a step as it likes"
    assert image_steps(client, run.run_id) == [0, 3, 6, 9, 12]
    assert not list(temporary_folder.glob("nst-*")), "nothing is left when all is stored"


def image_steps(client: MlflowClient, run_id: str) -> list[int]:
    names = [Path(file.path).name for file in client.list_artifacts(run_id, "images")]
    full, small = ([name for name in names if name.endswith(ending)] for ending in (".png", ".webp"))
    assert len(full) == len(small)
    return sorted(int(name.split("+")[2]) for name in full)


def test_an_image_has_the_name_that_mlflow_gives(store: str, tmp_path: Path) -> None:
    picture = tmp_path / "grid.png"
    Image.new("RGB", (20, 20)).save(picture)
    run = TrackedRun.start("images", uri=store)
    run.log_image(picture, "a b/c", step=3)
    assert run.finish() == {}
    client = tracking_server.client(store)
    with Image.open(picture) as image:
        client.log_image(run.run_id, image, key="a b/c", step=3)
    names = [Path(file.path).name for file in client.list_artifacts(run.run_id, "images")]
    assert len(names) == 4
    patterns = {re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID", re.sub(r"\d{13}", "TIME", name)) for name in names}
    assert patterns == {
        "a b~c+step+3+timestamp+TIME+ID.png",
        "a b~c+step+3+timestamp+TIME+ID+compressed.webp",
    }


def test_a_status_that_cannot_be_sent_is_kept(store: str, temporary_folder: Path, unreachable: str) -> None:
    run = TrackedRun.start("status", uri=store)
    run.finish("FINISHED")
    away = TrackedRun.start("status", run_id=run.run_id, uri=unreachable)
    assert away.finish("FAILED", timeout_s=0.1) == {"status": 2}
    client = tracking_server.client(store)
    again = TrackedRun.start("status", run_id=run.run_id, uri=store)
    assert again.flush()
    assert client.get_run(run.run_id).info.status == "RUNNING", "what was kept does not come last"
    late = TrackedRun.start("status", run_id=run.run_id, uri=unreachable)
    assert late.finish("FAILED", timeout_s=0.1) == {"status": 2}
    assert again.finish(None) == {}
    assert client.get_run(run.run_id).info.status == "FAILED", "it comes with whoever goes on"
    assert not list(temporary_folder.glob("nst-*"))


def test_what_another_node_kept_comes_late_and_once(store: str, tmp_path: Path, unreachable: str) -> None:
    """Node A could not send steps 5 to 9 when it died; B went on from 7; now A goes on from 6."""
    folder_of_a, folder_of_b = tmp_path / "a", tmp_path / "b"
    picture = tmp_path / "grid.png"
    Image.new("RGB", (20, 20)).save(picture)
    run = TrackedRun.start("nodes", uri=store)
    client = tracking_server.client(store)

    def log(run: TrackedRun, first: int, end: int) -> None:
        for step in range(first, end):
            run.log_metrics({"loss": step}, step)
            run.log_image(picture, "preview", step) if step % 3 == 0 else None

    log(run, 0, 5)
    assert run.finish(None) == {}
    folder_of_a.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder_of_a))
        on_a = TrackedRun.start("nodes", run_id=run.run_id, uri=unreachable)
        log(on_a, 5, 10)
        assert on_a.finish(None, timeout_s=0.1)
    folder_of_b.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder_of_b))
        on_b = TrackedRun.start("nodes", run_id=run.run_id, uri=store)
        log(on_b, 7, 12)
        assert on_b.finish(None) == {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder_of_a))
        again = TrackedRun.start("nodes", run_id=run.run_id, uri=store)
        log(again, 6, 15)
        assert again.finish() == {}
    steps = [m.step for m in client.get_metric_history(run.run_id, "loss")]
    assert steps == list(range(15))
    assert image_steps(client, run.run_id) == [0, 3, 6, 9, 12]
    assert not list(folder_of_a.glob("nst-*"))


def test_what_is_left_on_a_node_can_be_fetched_in_the_end(
    store: str, temporary_folder: Path, unreachable: str
) -> None:
    """The run's next life was on another node, and nobody goes on here."""
    run = TrackedRun.start("left", uri=store)
    assert run.finish(None) == {}
    left = TrackedRun.start("left", run_id=run.run_id, uri=unreachable)
    left.log_metrics({"loss": 2.0}, 4)
    assert left.finish(None, timeout_s=0.1)
    assert deliver_left(run.run_id, store, 20.0) == {}
    client = tracking_server.client(store)
    assert [m.step for m in client.get_metric_history(run.run_id, "loss")] == [4]
    assert not list(temporary_folder.glob("nst-*"))
    assert deliver_left(run.run_id, unreachable, 0.1) == {}, "nothing is left, nobody is asked"


def test_what_a_slow_death_left_is_sent_at_the_end(
    store: str, temporary_folder: Path, unreachable: str
) -> None:
    """The old worker still lived when the new one began, and died before that was finished."""
    old = TrackedRun.start("slow death", uri=store)
    old.flush()
    dying = TrackedRun.start("slow death", run_id=old.run_id, uri=unreachable)
    new = TrackedRun.start("slow death", run_id=old.run_id, uri=store)
    dying.log_metrics({"loss": 1.0, "only here": 1.0}, 1)
    new.log_metrics({"loss": 1.5}, 1)
    assert new.flush()
    assert dying.finish(None, timeout_s=0.1)
    assert new.finish("FINISHED") == {}
    assert old.finish(None) == {}
    client = tracking_server.client(store)
    assert [m.value for m in client.get_metric_history(old.run_id, "loss")] == [1.5]
    assert [m.value for m in client.get_metric_history(old.run_id, "only here")] == [1.0]
    assert client.get_run(old.run_id).info.status == "FINISHED"
    assert not list(temporary_folder.glob("nst-*"))


@contextlib.contextmanager
def server_on(
    port: int, folder: Path, *options: str, signal_to_end: signal.Signals = signal.SIGTERM
) -> Iterator[str]:
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


LOG_STEPS = """
import sys
from infra.tracking import TrackedRun

uri, run_id, picture, begin = *sys.argv[1:4], int(sys.argv[4])
run = TrackedRun.start("training", run_id=run_id, uri=uri)
run.log_params({f"start_{begin}": begin})
for end in map(int, sys.stdin):
    for step in range(begin, end):
        run.log_metrics({"loss": step, "rate": -step}, step)
        if step % 50 == 0:
            run.log_image(picture, "preview", step)
    print(end, flush=True)
    begin = end
assert run.finish("FINISHED") == {}
"""


class LoggingProcess:
    """Logs steps from `first` on, as far as it is told."""

    def __init__(self, uri: str, run_id: str, picture: Path, first: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOG_STEPS, uri, run_id, str(picture), str(first)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def log_until(self, end: int) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{end}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == f"{end}\n"


@pytest.mark.faults
def test_server_and_process_are_killed(tmp_path: Path, temporary_folder: Path) -> None:
    """The server is killed under a process that logs, which is killed in turn during the outage. The next one
    begins before the server is back, and repeats some steps."""
    port = free_port()
    picture = tmp_path / "grid.png"
    Image.new("RGB", (20, 20)).save(picture)
    with contextlib.ExitStack() as servers:
        uri = servers.enter_context(server_on(port, tmp_path, signal_to_end=signal.SIGKILL))
        run = TrackedRun.start("training", uri=uri)
        assert run.finish(None) == {}
        first = LoggingProcess(uri, run.run_id, picture, 0)
        first.log_until(100)
        servers.close()
        first.log_until(200)
        first.process.kill()
        assert first.process.wait(30) == -signal.SIGKILL
        second = LoggingProcess(uri, run.run_id, picture, 150)
        second.log_until(300)
        servers.enter_context(server_on(port, tmp_path))
        second.log_until(400)
        second.process.communicate(timeout=120)
        assert second.process.returncode == 0

        client = tracking_server.client(uri)
        losses = client.get_metric_history(run.run_id, "loss")
        assert [m.step for m in losses] == list(range(400)), "every step, once, in order"
        assert [m.value for m in losses] == list(range(400))
        assert [m.value for m in client.get_metric_history(run.run_id, "rate")] == [-s for s in range(400)]
        assert image_steps(client, run.run_id) == list(range(0, 400, 50))
        stored = client.get_run(run.run_id)
        assert stored.data.params == {"start_0": "0", "start_150": "150"}
        assert stored.info.status == "FINISHED"
    assert not list(temporary_folder.glob("nst-tracking-*"))


@pytest.mark.faults
def test_a_run_survives_its_server(
    tmp_path: Path,
    temporary_folder: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    port = free_port()
    picture = tmp_path / "grid.png"
    Image.new("RGB", (20, 20)).save(picture)
    with server_on(port, tmp_path) as uri:
        tracking_server.check(uri)
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
                tracking_server.check(f"http://localhost:{port}")
            assert run.flush(60)
            assert run.finish("KILLED") == {}
            assert second.finish() == {}
            client = tracking_server.client(uri)
            steps = [m.step for m in client.get_metric_history(run.run_id, "loss")]
            assert sorted(steps) == list(range(201))
            assert client.list_artifacts(run.run_id, "images")
    text = caplog.text
    assert text.count("Connection refused; records are kept and sent later") == 3, (
        "once a queue, in one short line"
    )
    assert capsys.readouterr().out == ""
    assert not list(temporary_folder.glob("nst-tracking-*"))
