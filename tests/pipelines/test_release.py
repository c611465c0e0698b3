"""The way of a model to its users, as a team goes it: registered, evaluated, promoted, rolled back, on MLflow
over PostgreSQL with its artifacts in a bucket; and what happens when something fails on that way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from click.testing import CliRunner
from mlflow.tracking import MlflowClient
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images

from infra import storage
from pipelines.cli import main
from pipelines.registration import register_checkpoint
from tests.checkpoints import tiny_checkpoint
from tests.servers import (
    REPOSITORY,
    MlflowServer,
    PostgresServer,
    S3Server,
    mlflow_server,
    postgres_server,
)

LENIENT = 'held_out = false\n[[rule]]\nmeasure = "style_distance"\nmax = 10.0\n'
COMPARING = LENIENT + '[[rule]]\nmeasure = "style_distance"\nmax_plus = 10.0\nthan = "champion"\n'
STRICT = 'held_out = false\n[[rule]]\nwhy = "nothing is that sharp"\nmeasure = "edge_ssim"\nmin = 2.0\n'
SECONDS_TO_MEET = 120.0


@dataclass(frozen=True, kw_only=True)
class Site:
    """A database and a bucket for MLflow servers, and a folder with pictures and gates."""

    folder: Path
    postgres: PostgresServer
    store: S3Server
    database: str
    bucket: str

    def server(self, name: str) -> contextlib.AbstractContextManager[MlflowServer]:
        return mlflow_server(
            self.folder / name,
            backend_store_uri=self.postgres.uri(self.database),
            artifacts_destination=f"{self.bucket}/mlflow",
            environment=self.store.environment | self.postgres.environment,
        )

    def path(self, name: str) -> str:
        return str(self.folder / name)


def write_pictures(folder: Path, pictures: dict[str, Any]) -> None:
    folder.mkdir()
    for name, pixels in pictures.items():
        Image.fromarray(pixels).resize((120, 100)).save(folder / f"{name}.png")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, store: S3Server) -> Iterator[Site]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("release")
    photos = {"astronaut": data.astronaut(), "coffee": data.coffee(), "chelsea": data.chelsea()}
    write_pictures(folder / "content", photos)
    write_pictures(folder / "style", dict(zip(("china", "flower"), load_sample_images().images, strict=True)))
    for name, gate in (("lenient", LENIENT), ("comparing", COMPARING), ("strict", STRICT)):
        (folder / f"{name}.toml").write_text(gate)
    with postgres_server() as postgres:
        yield Site(
            folder=folder,
            postgres=postgres,
            store=store,
            database=postgres.create_database(),
            bucket=store.create_bucket(),
        )


@pytest.fixture(scope="module")
def mlflow(site: Site) -> Iterator[MlflowServer]:
    with site.server("mlflow") as server:
        yield server


@pytest.fixture(scope="module")
def versions(site: Site, mlflow: MlflowServer) -> str:
    """The model `tiny` with three versions, all evaluated on the same pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", mlflow.uri)
        patch.setenv("XDG_CACHE_HOME", site.path("cache"))
        for seed in (1, 2, 3):
            checkpoint = tiny_checkpoint(site.folder / f"checkpoint-{seed}", seed)
            assert register_checkpoint(checkpoint, model_name="tiny") == seed
            evaluate(site, f"models:/tiny/{seed}")
    return "tiny"


@pytest.fixture
def model(
    versions: str,
    mlflow: MlflowServer,
    site: Site,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """A model of its own with those three versions."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow.uri)
    monkeypatch.setenv("XDG_CACHE_HOME", site.path("cache"))
    client, name = MlflowClient(), request.node.name.replace("[", "-").replace("]", "")
    client.create_registered_model(name)
    for number in ("1", "2", "3"):
        one = client.get_model_version(versions, number)
        client.create_model_version(
            name, str(one.source), one.run_id, one.tags, model_id=one.tags["model_id"]
        )
    return name


def nst(*arguments: object, exit_code: int = 0) -> dict[str, Any]:
    """Runs a verb; returns what `--json` printed, with what was told to people as `stderr`."""
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == exit_code, f"{arguments}\n{result.output}\n{result.stderr}"
    assert "Traceback" not in result.output
    return {**json.loads(result.stdout.splitlines()[-1]), "stderr": result.stderr}


def evaluate(site: Site, *arguments: object, exit_code: int = 0, style: str = "style") -> dict[str, Any]:
    options = ("--style", site.path(style), "--report", site.path("report"), "--pairs", 4, "--size", 64)
    return nst("evaluate", *arguments, "--content", site.path("content"), *options, exit_code=exit_code)


def start(*arguments: object, tracking_uri: str | None = None) -> subprocess.Popen[str]:
    """A verb in a process of its own."""
    environment = {"MLFLOW_TRACKING_URI": tracking_uri} if tracking_uri else {}
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *map(str, arguments), "--json"],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    """(exit code, what `--json` printed, standard error)"""
    try:
        out, errors = process.communicate(timeout=150)
    finally:
        process.kill()
    assert "Traceback" not in errors, errors
    return process.returncode, json.loads(out.splitlines()[-1]), errors


def champion(model: str) -> int | None:
    version = MlflowClient().get_registered_model(model).aliases.get("champion")
    return None if version is None else int(version)


def moves(model: str) -> list[tuple[str, int | None, int, str]]:
    """What `nst history` tells, which must add up."""
    told = nst("history", "--model", model)
    assert told["problems"] == []
    return [
        (event["kind"], event["from_version"], event["to_version"], event["status"])
        for event in told["events"]
    ]


@pytest.mark.faults
def test_the_way_to_the_users_and_back(model: str, site: Site) -> None:
    gate = ("--model", model, "--gate", site.path("comparing.toml"))
    strict = ("--model", model, "--gate", site.path("strict.toml"))
    assert nst("promote", 1, *gate, "--dry-run")["promoted"] is False
    assert champion(model) is None
    assert nst("promote", 1, *gate, "--reason", "the first")["promoted"] is True

    refused = nst("promote", 2, *strict, exit_code=3)
    assert "edge_ssim" in refused["error"]
    assert "nothing is that sharp" in refused["error"]
    assert champion(model) == 1
    assert "--reason" in nst("promote", 2, *strict, "--force", exit_code=2)["error"]
    forced = nst("promote", 2, *strict, "--force", "--reason", "an emergency")
    assert (forced["promoted"], forced["forced"]) == (True, True)
    assert nst("promote", 3, *gate)["promoted"] is True
    assert nst("promote", 3, *gate)["promoted"] is False, "it is the champion already"

    assert nst("rollback", "--model", model, "--reason", "3 smears faces")["version"] == 2
    assert nst("rollback", "--model", model)["version"] == 1
    nst("rollback", "--model", model, exit_code=2)
    assert champion(model) == 1
    assert moves(model) == [
        ("promote", None, 1, "done"),
        ("promote", 1, 2, "done"),
        ("promote", 2, 3, "done"),
        ("rollback", 3, 2, "done"),
        ("rollback", 2, 1, "done"),
    ]
    told = nst("history", "--model", model)["events"]
    assert [event["grounds"]["reason"] for event in told[:4]] == [
        "the first",
        "an emergency",
        "",
        "3 smears faces",
    ]
    assert [event["grounds"]["is_forced"] for event in told[:3]] == [False, True, False]


@pytest.mark.faults
def test_versions_measured_on_different_pictures_are_not_compared(model: str, site: Site) -> None:
    gate = ("--model", model, "--gate", site.path("comparing.toml"))
    nst("promote", 1, *gate)
    evaluate(site, f"models:/{model}/2", style="content")
    refused = nst("promote", 2, *gate, exit_code=2)["error"]
    assert "different" in refused
    assert "style_digest" in refused, "what differs"
    assert "evaluate" in refused, "the remedy"
    assert champion(model) == 1


@pytest.mark.faults
def test_what_was_altered_in_the_bucket_is_not_used(
    mlflow: MlflowServer, site: Site, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow.uri)
    monkeypatch.setenv("XDG_CACHE_HOME", site.path("cache"))
    gate = ("--gate", site.path("lenient.toml"))
    for seed in (4, 5):
        register_checkpoint(tiny_checkpoint(site.folder / f"checkpoint-{seed}", seed))
    evaluate(site, "models:/nst/2")
    nst("promote", 1, *gate, "--force", "--reason", "not evaluated yet")
    for number in (1, 2):
        source = str(MlflowClient().get_model_version("nst", str(number)).source)
        weights = f"{site.bucket}/mlflow/{source.partition(':/')[2]}/artifacts/checkpoint/model.safetensors"
        content = bytearray(storage.read_bytes(weights))
        content[-1] ^= 1
        storage.write_bytes(weights, bytes(content))

    told = nst("stylize", site.path("content"), site.path("out"), "--style", site.path("style"), exit_code=1)
    assert "models:/nst/1" in told["error"]
    assert "altered" in told["error"]
    assert not list(storage.list_objects(site.path("out")))
    for told in (evaluate(site, "models:/nst/2", exit_code=1), nst("promote", 2, *gate, exit_code=1)):
        assert "models:/nst/2" in told["error"]
        assert "altered" in told["error"]
    assert champion("nst") == 1


class Proxy(ThreadingHTTPServer):
    """Stands before an MLflow server, and lets a test see each request before the server does."""

    daemon_threads = True

    def __init__(self, server_uri: str, on_request: Callable[[str, str, bytes], None]) -> None:
        super().__init__(("127.0.0.1", 0), _PassOn)
        self.server_uri, self.on_request = server_uri, on_request
        self.uri = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is nothing to print."""


class _PassOn(BaseHTTPRequestHandler):
    server: Proxy  # pyright: ignore[reportIncompatibleVariableOverride]

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.on_request(self.command, self.path, body)
        headers = {name: value for name, value in self.headers.items() if name != "Host"}
        try:
            answer = requests.request(
                self.command, self.server.server_uri + self.path, headers=headers, data=body, timeout=60
            )
        except requests.RequestException:
            return  # the client finds its connection closed without an answer
        self.send_response(answer.status_code)
        self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

    def log_message(self, *_: object) -> None:
        """Requests are nothing to print."""


@contextlib.contextmanager
def proxy(server_uri: str, on_request: Callable[[str, str, bytes], None]) -> Iterator[str]:
    with Proxy(server_uri, on_request) as listener:
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield listener.uri
        finally:
            listener.shutdown()
            thread.join(10)


@pytest.mark.faults
def test_of_two_people_who_promote_at_once_one_is_told(model: str, site: Site, mlflow: MlflowServer) -> None:
    gate = ("--model", model, "--gate", site.path("comparing.toml"))
    nst("promote", 1, *gate)
    both_are_there = threading.Barrier(2)

    def wait_for_the_other(method: str, path: str, body: bytes) -> None:
        if path.endswith("/runs/log-parameter") and b"event-000002" in body:
            both_are_there.wait(SECONDS_TO_MEET)

    with proxy(mlflow.uri, wait_for_the_other) as uri:
        processes = {number: start("promote", number, *gate, tracking_uri=uri) for number in (2, 3)}
        answers = {number: ended(process) for number, process in processes.items()}
    winner, loser = sorted(answers, key=lambda number: answers[number][0])
    assert (answers[winner][0], answers[loser][0]) == (0, 1), answers
    told = answers[loser][1]["error"]
    assert f"to version {winner} at this moment" in told
    assert "nst history" in told
    assert champion(model) == winner
    assert moves(model) == [("promote", None, 1, "done"), ("promote", 1, winner, "done")]
    nst("promote", loser, *gate)
    assert moves(model)[-1] == ("promote", winner, loser, "done")


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_server_that_dies_while_the_champion_moves(
    model: str, site: Site, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    gate = ("--model", model, "--gate", site.path("comparing.toml"))
    nst("promote", 1, *gate)
    has_moved = threading.Event()
    with site.server("dying") as server:

        def kill_it(method: str, path: str, body: bytes) -> None:
            is_move = method == "POST" and path.endswith("/registered-models/alias") and b"champion" in body
            if (is_move and moment == "before") or has_moved.is_set():
                os.killpg(server.process_id, signal.SIGKILL)
            if is_move:
                has_moved.set()

        with proxy(server.uri, kill_it) as uri:
            exit_code, _, errors = ended(start("promote", 2, *gate, tracking_uri=uri))
        assert has_moved.is_set()
        assert exit_code == 1, errors
    assert champion(model) == (1 if moment == "before" else 2), "there always is one"
    with site.server("again") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        nst("promote", 2, *gate)
        assert champion(model) == 2
        done = [move for move in moves(model) if move[-1] == "done"]
        assert done == [("promote", None, 1, "done"), ("promote", 1, 2, "done")]
        assert nst("rollback", "--model", model)["version"] == 1
