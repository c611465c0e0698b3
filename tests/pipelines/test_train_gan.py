"""`nst train`: what a user types, and what happens when a worker dies."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import CliRunner
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from infra import cluster, tracking_server
from nst.corpus import Corpus
from nst.manifest import REMEDY
from pipelines import preflight
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


@pytest.fixture(scope="module")
def empty_mlflow(tmp_path_factory) -> Path:
    """A SQLite file with MLflow's tables, which take seconds to make."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    tracking_server.client(f"sqlite:///{path}")
    return path


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.usefixtures("ray_here")
class TestRefusals:
    """What would fail once the GPUs are paid for, told before by the command itself."""

    @pytest.fixture
    def refusal(self, corpora, empty_mlflow, tmp_path, monkeypatch) -> Callable[..., str]:
        """The one line with which a training is refused, of these options and settings."""
        shutil.copy(empty_mlflow, tmp_path)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")

        def refuse(*options: str, **settings: str) -> str:
            for name, value in settings.items():
                monkeypatch.setenv(name, value)
            given = ("--content", corpora[0], "--style", corpora[1], "--out", str(tmp_path / "runs"), *TINY)
            result = nst("train", *given, *options)  # the last of two counts
            assert result.exit_code == 2, result.output + result.stderr
            (line,) = result.stderr.strip().splitlines()
            return line

        return refuse

    def test_too_few_gpus(self, refusal):
        line = refusal("--device", "gpu")
        assert "this machine has room for 0; try other --num-workers or --device cpu" in line

    @pytest.mark.parametrize("place", ["/dev/null/runs", "/sys/runs"])
    def test_storage_that_cannot_be_written(self, refusal, place):
        line = refusal("--out", place)
        assert place in line
        assert "let the user of this process read and write there, or choose another place" in line

    @pytest.mark.parametrize("option", ["--content", "--out"])
    def test_wrong_credentials(self, refusal, s3, option):
        line = refusal(option, f"{s3.create_bucket()}/place", AWS_SECRET_ACCESS_KEY="a-wrong-one")
        assert "does not accept these credentials" in line
        assert "check AWS_ACCESS_KEY_ID" in line
        assert "a-wrong-one" not in line

    @pytest.mark.parametrize("option", ["--content", "--out"])
    def test_a_store_that_says_nothing(self, refusal, s3, monkeypatch, option):
        monkeypatch.setattr(preflight, "SECONDS_TO_OPEN", 0.5)
        with socket.create_server(("127.0.0.1", 0)) as listener:  # takes connections
            endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
            line = refusal(
                option, "s3://somebodys/place", AWS_ENDPOINT_URL=endpoint, AWS_ENDPOINT_URL_S3=endpoint
            )
        assert "s3://somebodys/place" in line
        assert "try again when the store answers, or correct AWS_ENDPOINT_URL" in line

    def test_an_mlflow_that_is_not_there(self, refusal):
        line = refusal(MLFLOW_TRACKING_URI=f"http://127.0.0.1:{free_port()}")
        assert "start that server, correct MLFLOW_TRACKING_URI" in line

    def test_an_mlflow_that_keeps_no_artifacts(self, refusal, tmp_path):
        (tmp_path / "mlartifacts").touch()  # where there should be a folder
        line = refusal()
        assert "the artifacts of MLflow at sqlite:///" in line
        assert "let this process write there" in line

    def test_a_corpus_of_the_other_role(self, refusal, corpora):
        line = refusal("--style", corpora[0])
        assert "is a content corpus; --style needs one sharded with --role style" in line

    def test_a_corpus_whose_shard_was_cut_or_changed(self, refusal, corpora, tmp_path):
        style = shutil.copytree(corpora[1], tmp_path / "style")
        shard = Corpus.open(str(style)).manifest.shards[0]
        tar, index = style / shard.tar, style / shard.index
        os.truncate(tar, tar.stat().st_size - 512)
        line = refusal("--style", str(style))
        assert f"{tar.name} has " in line
        assert REMEDY in line
        index.write_bytes(bytes(byte ^ 1 for byte in index.read_bytes()))
        line = refusal("--style", str(style))
        assert f"{index} is altered" in line
        assert REMEDY in line


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
