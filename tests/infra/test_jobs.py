"""Packaging, settings and addresses without a cluster; submitting and following on a real two-node one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import jobs, packaging
from tests.servers import REPOSITORY, RayCluster, ray_cluster


def make_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_a_package_has_the_code_and_no_data_caches_or_secrets(tmp_path: Path) -> None:
    make_files(
        tmp_path,
        "labels.csv",
        "inputs/list.txt",
        ".git/config",
        ".env",
        ".nst/mlflow.db",
        ".venv-s3/bin/python",
        "nst-demo/photo.jpg",
        "corpora/style/corpus.json",
        "corpora/style/shards/000000.tar",
        "runs/first/run.json",
        "painted/_nst/run.json",
        "painted/cat.jpg",
        "inputs/__pycache__/x.pyc",
        "server.pem",
        "nst.egg-info/PKG-INFO",
    )
    names = set(packaging.files_to_pack(str(tmp_path)))
    assert {name for name in names if not name.startswith(packaging.OUR_PACKAGES)} == {
        "labels.csv",
        "inputs/list.txt",
    }
    assert {"nst/__init__.py", "infra/jobs.py", "pipelines/cli.py"} <= names  # none there, so ours travel


def test_a_folder_with_our_packages_sends_its_own(tmp_path: Path) -> None:
    make_files(tmp_path, *(f"{package}/__init__.py" for package in packaging.OUR_PACKAGES))
    files = packaging.files_to_pack(str(tmp_path))
    assert sorted(files) == ["infra/__init__.py", "nst/__init__.py", "pipelines/__init__.py"]


def test_the_same_files_give_the_same_package(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_files(source, "b.txt", "a/c.txt")
    first = packaging.pack(str(source), tmp_path / "1.zip")
    os.utime(source / "b.txt", (1, 1))
    second = packaging.pack(str(source), tmp_path / "2.zip")
    assert first == second
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    assert zipfile.ZipFile(tmp_path / "1.zip").read("a/c.txt") == b"a/c.txt"
    (source / "b.txt").write_text("other")
    assert packaging.pack(str(source), tmp_path / "3.zip") != first


def test_too_much_is_refused_by_name(tmp_path: Path) -> None:
    with (tmp_path / "photos.tar").open("wb") as file:
        file.truncate(packaging.MAX_BYTES + 1)
    with pytest.raises(ValueError, match=r"photos\.tar \(64\.0 MiB\)"):
        packaging.files_to_pack(str(tmp_path))
    with pytest.raises(ValueError, match="no folder"):
        packaging.files_to_pack(str(tmp_path / "nowhere"))


def test_only_settings_without_secrets_go_along(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in jobs.SAFE_SETTINGS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:secret@store:9000")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///here.db")
    sent, kept = jobs.settings_for_job()
    assert sent == {"PYTHONUNBUFFERED": "1", "AWS_REGION": "eu-central-1"}
    assert kept == ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert jobs.settings_for_job()[0]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"


def test_without_a_cluster_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ValueError, match="--address"):
        jobs.connect()
    with pytest.raises(ValueError, match="looks like"):
        jobs.connect("ray://head:10001")
    with pytest.raises(ValueError, match=r"no Ray jobs server answers at http://127\.0\.0\.1:1"):
        jobs.connect("127.0.0.1:1")


@pytest.mark.slow
def test_a_silent_server_costs_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        started = time.monotonic()
        with pytest.raises(ValueError, match="no Ray jobs server"):
            jobs.connect(f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert time.monotonic() - started < 15


@pytest.fixture(scope="module")
def running() -> Iterator[RayCluster]:
    with ray_cluster(1) as cluster:
        yield cluster


def nst(
    running: RayCluster, *arguments: str, cwd: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= running.environment | {"PYTHONPATH": str(REPOSITORY), **variables}
    del environment["RAY_ADDRESS"]
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A working folder whose `pipelines` is tiny, so that a job is done at once."""
    make_files(tmp_path, "nst/__init__.py", "infra/__init__.py", "pipelines/__init__.py")
    program = (
        "import os, sys, time\n"
        "import ray\n"
        "ray.init(logging_level='ERROR')\n"
        "print('arguments', sys.argv[1:], flush=True)\n"
        "where = ray.get(ray.remote(lambda: os.environ.get('AWS_SECRET_ACCESS_KEY')).remote())\n"
        "print('secret:', where, 'cpus:', ray.cluster_resources()['CPU'], flush=True)\n"
        "print('ünïcode', flush=True)\n"
        "if 'wait' in sys.argv: time.sleep(300)\n"
        "sys.exit(3 if 'fail' in sys.argv else 0)\n"
    )
    for package in packaging.OUR_PACKAGES:
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "pipelines" / "cli.py").write_text(program)
    return tmp_path


@pytest.mark.slow
def test_a_job_is_submitted_and_followed_and_may_be_repeated(
    running: RayCluster, project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("elsewhere")
    command = (
        "submit",
        "--working-dir",
        str(project),
        "--json",
        "--",
        "inspect",
        "a b;echo $HOME",
        "--verify",
    )
    done = nst(running, *command, cwd=home, AWS_SECRET_ACCESS_KEY="hush-hush", AWS_REGION="eu-west-1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "arguments ['inspect', 'a b;echo $HOME', '--verify']" in done.stdout
    assert "secret: None cpus: 2.0" in done.stdout
    assert "ünïcode" in done.stdout
    assert "settings that go along: AWS_REGION" in done.stdout
    assert "hush-hush" not in done.stdout + done.stderr
    job = json.loads(done.stdout.splitlines()[-1])["job"]
    assert job["status"] == "SUCCEEDED"

    repeated = nst(running, *command, cwd=home, AWS_REGION="eu-west-1")
    assert repeated.returncode == 0
    assert json.loads(repeated.stdout.splitlines()[-1])["job"]["id"] == f"{job['id']}-2"

    log = nst(running, "logs", job["id"], cwd=home)
    assert log.returncode == 0
    assert log.stdout.count("arguments") == 1
    listed = nst(running, "jobs", cwd=home)
    assert job["id"] in listed.stdout
    unknown = nst(running, "logs", "nst-unknown", cwd=home)
    assert unknown.returncode == 2
    assert "nst jobs" in unknown.stderr
    assert "Traceback" not in unknown.stderr


@pytest.mark.slow
def test_a_failed_job_exits_as_its_verb_did_and_can_be_submitted_again(
    running: RayCluster, project: Path
) -> None:
    command = ("submit", "--working-dir", str(project), "--", "inspect", "fail")
    first = nst(running, *command, cwd=project.parent)
    assert first.returncode == 3, first.stdout + first.stderr
    assert "failed, exit code 3" in first.stderr
    second = nst(running, *command, cwd=project.parent)
    assert second.returncode == 3
    assert "-2 submitted" in second.stdout


@pytest.mark.slow
def test_a_running_job_is_found_again_and_stopped(running: RayCluster, project: Path) -> None:
    command = ("submit", "--no-follow", "--json", "--working-dir", str(project), "--", "inspect", "wait")
    first = nst(running, *command, cwd=project.parent)
    assert first.returncode == 0, first.stdout + first.stderr
    job_id = json.loads(first.stdout.splitlines()[-1])["job"]["id"]
    second = nst(running, *command, cwd=project.parent)
    assert f"{job_id} is running already" in second.stdout
    stopped = nst(running, "stop", job_id, cwd=project.parent)
    assert stopped.returncode == 0, stopped.stderr
    assert nst(running, "logs", job_id, cwd=project.parent).returncode == 1


@pytest.mark.slow
def test_our_own_packages_travel_and_run_on_the_cluster(running: RayCluster, tmp_path: Path) -> None:
    done = nst(running, "submit", "--", "doctor", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Usage:" in done.stdout


@pytest.mark.slow
def test_a_wrong_token_is_the_users_mistake(running: RayCluster, tmp_path: Path) -> None:
    refused = nst(running, "jobs", cwd=tmp_path, RAY_AUTH_TOKEN="0" * 64)
    assert refused.returncode == 2
    assert "RAY_AUTH_TOKEN" in refused.stderr
    assert "Traceback" not in refused.stderr
