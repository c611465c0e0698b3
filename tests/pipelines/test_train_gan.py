"""`nst train`: what a user types, and what happens when a worker dies."""

from __future__ import annotations

import contextlib
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

from infra import cluster
from pipelines.cli import main
from pipelines.train_gan import check_tracking
from tests.corpora import make_corpus
from tests.servers import free_port
from tests.trial_cluster import wait_for

TINY = ["--preset", "smoke", "--set", "batch.size=32", "--set", "model.content_widths=[8,8,8,8]"]


COMPLETE = "*/checksums.json"


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
        (["--preset", "smoke", "--num-workers", "3"], "which 3 workers cannot share"),
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


def test_a_training_that_goes_on_does_without_mlflow(monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    assert not check_tracking({"run_id": "of an earlier start"})
    assert "goes on without it" in caplog.text


def test_a_tracking_store_that_would_be_lost_is_refused(corpora, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    result = nst("train", "--content", corpora[0], "--style", corpora[1], "--out", str(tmp_path / "runs"))
    assert result.exit_code == 2, result.output
    assert "Set MLFLOW_TRACKING_URI to an MLflow server" in result.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "gpu"], "this machine has room for 0; try other --num-workers or --device cpu"),
        (["--out", "/dev/null/runs"], "/dev/null/runs"),
    ],
)
def test_what_would_fail_later_is_refused_before(corpora, options, message, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    started = time.monotonic()
    result = nst(
        "train", "--content", corpora[0], "--style", corpora[1], *TINY, "--out", str(tmp_path / "runs"),
        *options,
    )  # fmt: skip
    assert result.exit_code == 2, result.output + result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert message in line
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


def result_of(process: subprocess.Popen) -> dict:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return json.loads(output.splitlines()[-1])


def train_with_torchrun(folder: Path, corpora) -> Path:
    """The same training without Ray; its checkpoint."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "nst.train", "--content", corpora[0], "--style", corpora[1], *TINY, "--images", "96"]
    command += ["--set", "checkpoint_every=16", "--set", "log_every=16", "--out", str(folder)]
    # as many threads as each Ray worker takes: sums depend on it
    threads = {"OMP_NUM_THREADS": str(max(1, cluster.num_usable_cpus() // 2))}
    subprocess.run(command, check=True, env={**os.environ, **threads}, timeout=120, stdout=subprocess.DEVNULL)
    return folder / "checkpoint"


@pytest.mark.faults
@pytest.mark.timeout(400)
def test_a_killed_worker_costs_nothing_but_time(corpora, tmp_path):
    process = train_in_a_process(tmp_path, corpora, "disturbed")
    checkpoints = tmp_path / "runs" / "disturbed" / "checkpoints"
    wait_for(lambda: list(checkpoints.glob(COMPLETE)), 120)
    victim = wait_for(lambda: workers_of(process), 10)[-1]
    victim.send_signal(signal.SIGKILL)
    family = psutil.Process(process.pid).children(recursive=True)
    disturbed = result_of(process)

    assert disturbed["num_images_seen"] == 96
    undisturbed = load_file(train_with_torchrun(tmp_path / "undisturbed", corpora) / "training.safetensors")
    weights = load_file(Path(disturbed["checkpoint"]) / "training.safetensors")
    assert weights.keys() == undisturbed.keys()
    assert all(torch.equal(value, undisturbed[name]) for name, value in weights.items())
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("nst")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert [(run.info.run_name, run.info.status) for run in runs] == [("disturbed", "FINISHED")]
    history = client.get_metric_history(disturbed["run_id"], "generator/bands")
    assert {metric.step for metric in history} == {16, 32, 48, 64, 80, 96}
    wait_for(lambda: not any(member.is_running() for member in family), 30, "the end of all its processes")


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_the_same_name_goes_on_however_the_driver_ended(corpora, tmp_path):
    checkpoints, record = tmp_path / "runs/one/checkpoints", tmp_path / "runs/one/run.json"
    run_ids = set()
    for number, status in (
        (signal.SIGINT, "KILLED"),
        (signal.SIGTERM, "KILLED"),
        (signal.SIGKILL, "RUNNING"),
    ):
        before = set(checkpoints.glob(COMPLETE))
        process = train_in_a_process(tmp_path, corpora, "one", images=480)
        wait_for(lambda before=before: set(checkpoints.glob(COMPLETE)) - before, 120)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        output, _ = process.communicate(timeout=90)
        if number == signal.SIGKILL:
            for member in family:  # nothing was left to end them
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
        else:
            assert process.returncode == 130, output
            assert json.loads(output.splitlines()[-1])["exit_code"] == 130
        known = json.loads(record.read_text())
        assert known["status"] == status
        run_ids.add(known["run_id"])
        run = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(known["run_id"])
        assert run.info.status == status

    done = result_of(train_in_a_process(tmp_path, corpora, "one", images=480))
    assert run_ids == {done["run_id"]}
    assert done["num_images_seen"] == 480
    # once more: nothing is left to do, and it says what there is
    assert result_of(train_in_a_process(tmp_path, corpora, "one", images=480)) == done
    # the name is taken
    result = nst(
        "train", "--content", corpora[0], "--style", corpora[1], *TINY, "--out", str(tmp_path / "runs"),
        "--name", "one", "--images", "7",
    )  # fmt: skip
    assert result.exit_code == 2
    assert "give this training another --name" in result.stderr
