"""The launcher's file is valid by Ray's own schema and keeps what its comments promise."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from infra import jobs

CLUSTER_FILE = Path(__file__).parent.parent / "ray_cluster.yaml"


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER_FILE.read_text())


def test_ray_takes_it_with_its_defaults_filled_in(written: dict[str, Any]) -> None:
    prepared = prepare_config(written)
    validate_config(prepared)
    assert prepared["available_node_types"]["head"]["max_workers"] == 0


def test_a_word_that_ray_does_not_know_would_be_found(written: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config({**written, "idle_timeout": 10})


def option(command: str, name: str) -> str | None:
    for word in shlex.split(command):
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    return None


def test_every_node_demands_the_token_and_the_dashboard_stays_inside(written: dict[str, Any]) -> None:
    head = next(text for text in written["head_start_ray_commands"] if "ray start" in text)
    worker = next(text for text in written["worker_start_ray_commands"] if "ray start" in text)
    for command in (head, worker):
        assert "RAY_AUTH_MODE=token ray start" in command
        assert "ulimit -n 65535" in command
    assert option(head, "dashboard-host") == "127.0.0.1"
    assert option(head, "num-cpus") == "0"
    assert option(head, "autoscaling-config") == "~/ray_bootstrap_config.yaml"
    assert option(worker, "address") == f"$RAY_HEAD_IP:{option(head, 'port')}"
    assert any(path.endswith(".ray/auth_token") for path in written["file_mounts"])


def test_the_spot_agent_runs_beside_ray_once_and_holds_nothing_up(
    written: dict[str, Any], tmp_path: Path
) -> None:
    """The command as it is, with a stand-in for the program that writes down how it was started."""
    *before, command = written["worker_start_ray_commands"]
    assert "ray start" in before[-1]  # which makes the folder of the log
    (tmp_path / "python").write_text('#!/bin/sh\necho $$ "$RAY_AUTH_MODE" "$@"\nexec sleep 30\n')
    (tmp_path / "python").chmod(0o755)
    for place in ("/tmp/ray/session_latest/logs", "/tmp/nst-spot-agent.lock"):
        assert place in command
        command = command.replace(place, str(tmp_path / Path(place).name))
    (tmp_path / "logs").mkdir()
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RAY_HEAD_IP": "10.0.0.1"}
    for _ in range(2):  # the launcher starts Ray again after a change
        subprocess.run(["bash", "-c", command], env=environment, check=True, timeout=10)
        time.sleep(0.5)
    (line,) = (tmp_path / "logs" / "spot_agent.log").read_text().splitlines()
    process_id, *said = line.split()
    os.kill(int(process_id), signal.SIGKILL)
    assert said == ["token", "-m", "infra.spot_agent", "--address=10.0.0.1:6379"]


def test_only_gpu_workers_are_spot_and_a_driver_has_somewhere_to_run(written: dict[str, Any]) -> None:
    types = written["available_node_types"]
    spot = [name for name, kind in types.items() if "InstanceMarketOptions" in kind["node_config"]]
    assert spot == ["gpu_worker"]
    assert types["head"]["resources"]["CPU"] == 0
    drivers_place = types["cpu_worker"]
    assert drivers_place["min_workers"] >= 1
    assert drivers_place["resources"]["CPU"] >= jobs.DRIVER_CPUS


@pytest.mark.parametrize(
    ("name", "stays_here"),
    [
        ("infra/deploy/secrets/ray_token", True),
        ("trial.env", True),
        ("trial/mlflow/mlflow.db", True),
        ("corpora/photos/corpus.json", True),
        ("runs/first/run.json", True),
        (".venv-s3/bin/python", True),
        ("server.pem", True),
        ("google_credentials.json", True),
        ("nst/corpus.py", False),
        ("infra/deploy/Dockerfile", False),
        ("pyproject.toml", False),
        ("constraints.txt", False),
    ],
)
def test_the_mounted_project_has_the_code_and_neither_data_nor_secrets(
    written: dict[str, Any], tmp_path: Path, name: str, stays_here: bool
) -> None:
    (filter_file,) = written["rsync_filter"]  # of each folder, as git reads it
    for folder in (".", "infra/deploy"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(CLUSTER_FILE.parent / folder / filter_file, tmp_path / folder)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    done = subprocess.run(["git", "-C", tmp_path, "check-ignore", "--quiet", name], check=False)
    assert (done.returncode == 0 or is_excluded(written, name)) is stays_here


def is_excluded(written: dict[str, Any], name: str) -> bool:
    """As rsync reads a pattern without slashes, or with one in front."""
    first, *others = name.split("/")
    patterns = written["rsync_exclude"]
    return any(fnmatch(first, pattern.removeprefix("/")) for pattern in patterns) or any(
        fnmatch(part, pattern) for part in others for pattern in patterns
    )


@pytest.mark.parametrize("name", ["auth_token", "ray_bootstrap_key.pem", "ray_bootstrap_config.yaml"])
def test_what_ray_itself_sends_to_the_head_is_not_held_back(written: dict[str, Any], name: str) -> None:
    assert not is_excluded(written, name)  # rsync holds back a file that is named alone, too


def test_every_node_gets_the_versions_that_were_tested(written: dict[str, Any]) -> None:
    (place,) = (place for place, source in written["file_mounts"].items() if source == ".")
    installing = [text for text in written["setup_commands"] if "pip install" in text]
    assert installing
    for command in installing:
        words = shlex.split(command)
        assert words[words.index("--constraint") + 1] == f"{place}/constraints.txt"


def test_it_holds_no_key(written: dict[str, Any]) -> None:
    text = CLUSTER_FILE.read_text()
    for word in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AKIA", "RAY_AUTH_TOKEN="):
        assert word not in text
    assert written["docker"]["image"]
