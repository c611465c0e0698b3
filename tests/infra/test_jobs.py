"""Packaging, settings and addresses without a cluster; submitting and following on a real two-node one."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from infra import job_logs, job_recovery, jobs, packaging
from pipelines import submit_job
from pipelines.console import StageFailed
from tests.infra.test_packaging import make_files
from tests.servers import REPOSITORY, RayCluster, ray_cluster


def test_only_settings_without_secrets_go_along(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in jobs.SAFE_SETTINGS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:secret@store:9000")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///here.db")
    sent, kept = jobs.settings_for_job()
    assert {name for name in sent if name in jobs.SAFE_SETTINGS} == {"AWS_REGION"}
    assert "secret" not in str(sent)
    assert kept == ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert jobs.settings_for_job()[0]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"


@pytest.mark.parametrize(
    "argument",
    ["s3://me:hush-hush@bucket/photos", "--out=https://hush-hush@store:9000/x", "http://a:hush@hush-hush@h/"],
)
def test_a_password_in_the_command_is_refused(argument: str, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"\*\*\*@.* has a password in it") as refused,
        jobs.prepare(["python", argument], working_dir=str(tmp_path), name="shard"),
    ):
        pass
    assert "hush" not in str(refused.value)
    with jobs.prepare(["python", "s3://bucket/a@b:c"], working_dir=str(tmp_path), name="shard") as submission:
        assert submission.entrypoint == "python s3://bucket/a@b:c"


def test_the_commit_goes_along_and_does_not_make_another_submission(tmp_path: Path) -> None:
    make_files(tmp_path, *(f"{package}/__init__.py" for package in packaging.OUR_PACKAGES))

    def git(*arguments: str) -> str:
        settings = ("-c", "user.name=me", "-c", "user.email=me@example.com")
        command = ["git", "-C", str(tmp_path), *settings, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def prepared() -> jobs.Submission:
        with jobs.prepare(["python"], working_dir=str(tmp_path), name="train") as submission:
            return submission

    without = prepared()
    assert "NST_COMMIT" not in without.settings
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    committed = prepared()
    commit = git("rev-parse", "--short=12", "HEAD")
    assert committed.settings["NST_COMMIT"] == committed.metadata["NST_COMMIT"] == commit
    assert committed.base_id == without.base_id
    (tmp_path / "nst" / "__init__.py").write_text("changed = True")
    assert prepared().settings["NST_COMMIT"] == f"{commit}-dirty"
    assert prepared().base_id != without.base_id


@pytest.mark.parametrize(
    ("status", "exit_code", "error_type", "was_lost"),
    [
        ("FAILED", None, "JOB_SUPERVISOR_ACTOR_DIED", True),  # its node died, too
        ("FAILED", None, "JOB_SUPERVISOR_ACTOR_START_FAILURE", True),
        ("FAILED", 137, "JOB_ENTRYPOINT_COMMAND_ERROR", True),  # SIGKILL, through the shell
        ("FAILED", -9, "JOB_ENTRYPOINT_COMMAND_ERROR", True),
        ("FAILED", 139, "JOB_ENTRYPOINT_COMMAND_ERROR", True),
        *(("FAILED", code, "JOB_ENTRYPOINT_COMMAND_ERROR", False) for code in (1, 2, 3, 130, -2)),
        ("FAILED", None, "RUNTIME_ENV_SETUP_FAILURE", False),
        ("FAILED", None, "JOB_SUPERVISOR_ACTOR_START_TIMEOUT", False),
        ("STOPPED", None, None, False),
        ("SUCCEEDED", 0, None, False),
        ("RUNNING", None, None, False),
    ],
)
def test_which_jobs_were_lost(
    status: str, exit_code: int | None, error_type: str | None, was_lost: bool
) -> None:
    assert a_job(status=status, driver_exit_code=exit_code, error_type=error_type).was_lost is was_lost


def a_job(**fields) -> jobs.Job:
    known = {
        "id": "nst-train-1",
        "status": "RUNNING",
        "entrypoint": "python",
        "message": "",
        "error_type": None,
        "driver_exit_code": None,
        "driver_node_id": None,
        "start_time": None,
        "end_time": None,
    }
    return jobs.Job(**{**known, **fields})


def test_a_job_lost_without_a_word_is_submitted_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lost, done = a_job(status="FAILED", error_type="JOB_SUPERVISOR_ACTOR_DIED"), a_job(status="SUCCEEDED")
    ends, written = iter([lost, done]), []
    monkeypatch.setattr(job_recovery, "follow", lambda *_: next(ends))
    monkeypatch.setattr(job_recovery, "wait_until_gone", lambda *_: None)
    monkeypatch.setattr(job_recovery, "submit", lambda *_: (a_job(), True))
    client: Any = None
    with jobs.prepare(["python"], working_dir=str(tmp_path), name="train") as submission:
        ended = job_recovery.follow_to_the_end(client, submission, lost, written.append, max_resubmissions=1)
    assert ended == done
    assert "was lost: the cluster gives no reason; submitting it again, 1 of 1" in written[0]
    with pytest.raises(StageFailed, match="nst-train-1 failed: the cluster gives no reason"):
        submit_job._outcome(lost)


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
    running: RayCluster, *arguments: str, cwd: Path, timeout_s: float = 200, **variables: str
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
        timeout=timeout_s,
        check=False,
    )


PROGRAM = """
import os, pathlib, signal, sys, time
import psutil
import ray

ray.init(logging_level='ERROR')
verb = sys.argv[2:]
print('arguments', sys.argv[1:], flush=True)

@ray.remote(num_cpus=0.5)
class Worker:
    def pid(self):
        return os.getpid()

def die(left, what):  # the first attempt leaves an actor behind
    if left.exists():
        print('left from before:', psutil.pid_exists(int(left.read_text())), flush=True)
        return
    worker = Worker.remote()
    left.write_text(str(ray.get(worker.pid.remote())))
    family = [psutil.Process(), *psutil.Process().parents()]
    if what == 'supervisor':
        family = [process for process in family if 'JobSupervisor' in ' '.join(process.cmdline())]
    family[0].kill()
    time.sleep(300)

def stop_slowly(*_):
    time.sleep(5)  # Ray by itself would kill it after 3
    print('ended in order', flush=True)
    sys.exit(130)

if verb[0] == 'die':
    die(pathlib.Path(verb[1]), verb[2])
elif verb[0] == 'wait':
    signal.signal(signal.SIGTERM, stop_slowly)
    print('waiting', flush=True)
    time.sleep(300)
elif verb[0] == 'pause':
    time.sleep(4)
    print('paused', flush=True)
elif verb[0] == 'mischief':
    sys.stdout.buffer.write(b'not UTF-8: \\xff\\n')
    for number in range(3000):
        print('line', number)
    sys.stdout.flush()
    time.sleep(2)
    for number in range(3000, 3010):
        print('line', number, flush=True)
    time.sleep(2)
    os.ftruncate(1, 0)
    print('after the cut', flush=True)
elif verb[0] == 'fail':
    sys.exit(3)
else:
    where = ray.get(ray.remote(lambda: os.environ.get('AWS_SECRET_ACCESS_KEY')).remote())
    print('secret:', where, 'cpus:', ray.cluster_resources()['CPU'], flush=True)
    print('ünïcode', flush=True)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A working folder whose `pipelines` is tiny, so that a job is done at once."""
    for package in packaging.OUR_PACKAGES:
        make_files(tmp_path, f"{package}/__init__.py")
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "pipelines" / "cli.py").write_text(PROGRAM)
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
    assert "submitting it again" not in first.stdout
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
    deadline = time.monotonic() + 60
    while "waiting" not in nst(running, "logs", "--no-follow", job_id, cwd=project.parent).stdout:
        assert time.monotonic() < deadline
    stopped = nst(running, "stop", job_id, cwd=project.parent)
    assert stopped.returncode == 0, stopped.stderr
    log = nst(running, "logs", job_id, cwd=project.parent)
    assert log.returncode == 1
    assert "ended in order" in log.stdout


@pytest.mark.faults
def test_a_job_that_lost_its_supervisor_goes_on_when_nothing_of_it_is_left(
    running: RayCluster, project: Path, tmp_path: Path
) -> None:
    verb = ("inspect", "die", str(tmp_path / "left"), "supervisor")
    done = nst(running, "submit", "--json", "--working-dir", str(project), "--", *verb, cwd=project.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "submitting it again, 1 of 3]" in done.stdout
    assert "left from before: False" in done.stdout
    job = json.loads(done.stdout.splitlines()[-1])["job"]
    assert job["status"] == "SUCCEEDED"
    assert job["id"].endswith("-2")


@pytest.mark.faults
def test_a_killed_driver_is_repeated_only_as_often_as_was_asked_for(
    running: RayCluster, project: Path, tmp_path: Path
) -> None:
    command = ("--working-dir", str(project), "--", "inspect", "die", str(tmp_path / "left"), "driver")
    lost = nst(running, "submit", "--resubmit", "0", *command, cwd=project.parent)
    assert lost.returncode == 1, lost.stdout + lost.stderr
    assert "failed, exit code 137" in lost.stderr
    assert "submitting it again" not in lost.stdout


@pytest.mark.slow
def test_two_submissions_at_the_same_moment_are_one_job(running: RayCluster, project: Path) -> None:
    command = ("submit", "--json", "--working-dir", str(project), "--", "inspect", "pause")
    with ThreadPoolExecutor(2) as both:
        done = [both.submit(nst, running, *command, cwd=project.parent) for _ in range(2)]
        first, second = (future.result() for future in done)
    assert first.returncode == second.returncode == 0, first.stdout + second.stdout + second.stderr
    ids = {json.loads(result.stdout.splitlines()[-1])["job"]["id"] for result in (first, second)}
    assert len(ids) == 1
    assert first.stdout.count("paused") == second.stdout.count("paused") == 1
    said = sorted("is running already" in result.stdout for result in (first, second))
    assert said == [False, True]


@pytest.mark.slow
def test_a_log_is_followed_through_junk_and_cuts(
    running: RayCluster, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def fetch(log: job_logs.JobLog, node_id: str, num_lines: int) -> bytes:
        fetched.append(num_lines)
        return really_fetch(log, node_id, num_lines)

    really_fetch = job_logs.JobLog._fetch
    monkeypatch.setattr(job_logs.JobLog, "_fetch", fetch)
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    client, written = jobs.connect(), []
    command = ["python", "-m", "pipelines.cli", "inspect", "mischief"]
    with jobs.prepare(command, working_dir=str(project), name="mischief") as submission:
        job, _ = jobs.submit(client, submission)
        assert job_logs.follow(client, job.id, written.append).succeeded
    text = "".join(written)
    assert "not UTF-8: \ufffd\n" in text
    numbers = [int(line.removeprefix("line ")) for line in text.splitlines() if line.startswith("line ")]
    assert numbers == list(range(3010))
    assert text.splitlines()[-1] == "after the cut"
    assert fetched.count(job_logs.WHOLE) <= 5, "a log is fetched whole only where its end is not enough"
    assert set(fetched) - {job_logs.WHOLE}
    assert job_logs.log_of(client, job.id) == "after the cut\n"


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_job_outlives_the_node_of_its_driver_and_the_head(project: Path) -> None:
    with ray_cluster(2) as cluster, ThreadPoolExecutor(1) as background:
        command = ("submit", "--json", "--working-dir", str(project), "--", "inspect", "wait")
        done = background.submit(nst, cluster, *command, cwd=project.parent, timeout_s=500)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in cluster.environment.items():
                patch.setenv(name, value)
            client = jobs.connect()

            def wait_for_job(number: int) -> jobs.Job:
                deadline = time.monotonic() + 200
                while time.monotonic() < deadline:
                    with contextlib.suppress(*jobs.UNANSWERED, job_logs.LogGone):
                        found = jobs.list_jobs(client)
                        if len(found) == number and "waiting" in job_logs.log_of(client, found[0].id):
                            return jobs.get(client, found[0].id)  # by now it says where its driver is
                    time.sleep(0.5)
                raise AssertionError(f"no job number {number}")

            first = wait_for_job(1)
            node = next(node for node in cluster.workers if node.node_id == first.driver_node_id)
            cluster.kill_node(node)
            second = wait_for_job(2)
            assert second.id == f"{first.id}-2"

            port = int(cluster.jobs_url.rpartition(":")[2])
            cluster.kill_node(cluster.head)
            cluster.start_head(jobs_port=port)
            cluster.add_worker(num_cpus=2)
            again = wait_for_job(1)  # the new head has forgotten the others
            assert again.id == first.id
            jobs.stop(client, again.id)
        result = done.result()
    assert result.returncode == 1, result.stdout + result.stderr
    assert "its head was restarted" in result.stdout
    assert json.loads(result.stdout.splitlines()[-1])["job"]["status"] == "STOPPED"


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
