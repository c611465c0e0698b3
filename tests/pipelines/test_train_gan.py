"""`nst train`: what a user types, and what happens when a worker dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import CliRunner
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from pipelines.cli import main
from tests.corpora import make_corpus
from tests.servers import free_port

TINY = ["--preset", "smoke", "--set", "batch.size=32", "--set", "model.content_widths=[8,8,8,8]"]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("corpora")
    return make_corpus(folder / "content", "content"), make_corpus(folder / "style", "style")


def nst(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


def test_a_dry_run_prints_the_resolved_configuration(corpora):
    result = nst(
        "train", "--content", corpora[0], "--style", corpora[1], "--out", "x", *TINY, "--images", "99",
        "--dry-run", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    config = json.loads(result.stdout.splitlines()[-1])["config"]
    assert config["num_images"] == 99
    assert config["batch"]["size"] == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--preset", "huge"], "there is no preset 'huge'; there are: main"),
        (["--set", "loss.bands"], "must be SECTION.FIELD=VALUE"),
        (["--set", "loss.strokes=1"], "no field 'strokes'"),
        (["--name", "a/b"], "--name 'a/b' must be a plain name"),
        (["--content", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(corpora, change, message, tmp_path):
    options = {"--content": corpora[0], "--style": corpora[1], "--out": str(tmp_path / "runs")}
    given = [part for pair in options.items() if pair[0] not in change for part in pair]
    result = nst("train", *given, *change)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0]


def test_swapped_corpora_are_told_apart(corpora, tmp_path):
    result = nst("train", "--content", corpora[1], "--style", corpora[0], "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "is a style corpus; --content needs one sharded with --role content" in result.stderr


def test_an_unreachable_mlflow_costs_no_training(corpora, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    started = time.monotonic()
    result = nst("train", "--content", corpora[0], "--style", corpora[1], "--out", str(tmp_path / "runs"))
    assert result.exit_code == 2, result.output
    assert "MLFLOW_TRACKING_URI" in result.stderr
    assert time.monotonic() - started < 30


def train_in_a_process(folder: Path, corpora, name: str, images: int = 96) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "pipelines.train_gan",
        "--content",
        corpora[0],
        "--style",
        corpora[1],
        *TINY,
    ]
    command += ["--out", str(folder / "runs"), "--name", name, "--images", str(images), "--num-workers", "2"]
    command += ["--set", "checkpoint_every=16", "--set", "log_every=16", "--json"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=folder)


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.is_running() and "RayTrainWorker" in " ".join(child.cmdline())
    ]


def wait_for(condition, seconds: float):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"nothing came of it in {seconds} s")


def result_of(process: subprocess.Popen) -> dict:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return json.loads(output.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_worker_costs_nothing_but_time(corpora, tmp_path):
    undisturbed = result_of(train_in_a_process(tmp_path, corpora, "undisturbed"))
    process = train_in_a_process(tmp_path, corpora, "disturbed")
    checkpoints = tmp_path / "runs" / "disturbed" / "ray"
    wait_for(lambda: list(checkpoints.glob("checkpoint_*/config.json")), 120)
    victim = wait_for(lambda: workers_of(process), 10)[-1]
    victim.send_signal(signal.SIGKILL)
    disturbed = result_of(process)

    assert disturbed["num_images_seen"] == undisturbed["num_images_seen"] == 96
    first, second = (
        load_file(Path(result["checkpoint"]) / "training.safetensors") for result in (undisturbed, disturbed)
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("nst")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(str(run.info.run_name) for run in runs) == ["disturbed", "undisturbed"]  # one each
    assert {run.info.status for run in runs} == {"FINISHED"}
    history = client.get_metric_history(disturbed["run_id"], "generator/bands")
    assert {metric.step for metric in history} == {16, 32, 48, 64, 80, 96}
    wait_for(lambda: not any("ray::" in " ".join(p.cmdline()) for p in psutil.Process().children(True)), 30)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_same_name_goes_on_after_the_driver_was_killed(corpora, tmp_path):
    process = train_in_a_process(tmp_path, corpora, "one")
    wait_for(lambda: list((tmp_path / "runs/one/ray").glob("checkpoint_*/config.json")), 120)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    process.communicate(timeout=30)
    known = json.loads((tmp_path / "runs/one/run.json").read_text())

    again = result_of(train_in_a_process(tmp_path, corpora, "one"))
    assert again["run_id"] == known["run_id"]
    assert again["num_images_seen"] == 96
    # once more: nothing is left to do, and it says what there is
    assert result_of(train_in_a_process(tmp_path, corpora, "one")) == again
    # the name is taken
    result = nst(
        "train", "--content", corpora[0], "--style", corpora[1], *TINY, "--out", str(tmp_path / "runs"),
        "--name", "one", "--images", "7",
    )  # fmt: skip
    assert result.exit_code == 2
    assert "give this training another --name" in result.stderr
