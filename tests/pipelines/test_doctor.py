"""`nst doctor` in a process of its own: a healthy machine, and each thing that a user can get wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra import storage
from pipelines import doctor
from tests.servers import REPOSITORY, s3_server


def run_doctor(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_", "MLFLOW_"))
    }
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "doctor", "--json", *arguments],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(REPOSITORY), **variables},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def statuses(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    result = json.loads(done.stdout.splitlines()[-1])
    return {check["name"]: check["status"] for check in result["checks"]}


@pytest.mark.faults
def test_a_healthy_machine_passes(tmp_path: Path) -> None:
    done = run_doctor(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = statuses(done)
    assert {"python", "torch", "torchvision", "ray", "mlflow", "storage", "disk", "open files"} <= set(seen)
    assert "FAILED" not in seen.values()
    assert list((tmp_path / ".nst").glob(".nst-check*")) == []


@pytest.mark.slow
def test_each_failure_is_a_line_with_its_remedy_and_the_rest_is_still_checked(tmp_path: Path) -> None:
    done = run_doctor(
        tmp_path,
        "--storage",
        "s3://corpora/tmp",
        AWS_ENDPOINT_URL="http://127.0.0.1:1",
        AWS_ACCESS_KEY_ID="someone",
        AWS_SECRET_ACCESS_KEY="hush-hush",
        RAY_ADDRESS="127.0.0.1:1",
        MLFLOW_TRACKING_URI="http://127.0.0.1:1",
    )
    assert done.returncode == 1
    seen = statuses(done)
    assert [seen[name] for name in ("storage", "mlflow", "ray")] == ["FAILED"] * 3
    assert seen["python"] == "ok"
    assert "cannot reach http://127.0.0.1:1" in done.stdout
    assert "unset RAY_ADDRESS" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert "hush-hush" not in done.stdout + done.stderr
    assert "3 of" in done.stderr


@pytest.mark.faults
def test_a_bucket_is_tried_from_every_node(tmp_path: Path) -> None:
    with s3_server() as store:
        bucket = store.create_bucket()
        done = run_doctor(tmp_path, "--storage", f"{bucket}/tmp", **store.environment)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in store.environment.items():
                patch.setenv(name, value)
            left = list(storage.list_objects(bucket, include_hidden=True))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "written, read back, deleted" in done.stdout
    assert [status for name, status in statuses(done).items() if name.startswith("node ")] == ["ok"]
    assert left == []
    assert store.environment["AWS_SECRET_ACCESS_KEY"] not in done.stdout + done.stderr


def test_a_package_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "webdataset.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "webdataset", raising=False)
    found = {finding.name: finding for finding in doctor.check_packages()}
    assert found["webdataset"].status == "FAILED"
    assert "nms does not exist" in found["webdataset"].detail
    assert "reinstall" in found["webdataset"].remedy
    assert found["torch"].status == "ok"
