"""The launcher's file is valid by Ray's own schema and keeps what its comments promise."""

from __future__ import annotations

import shlex
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


def test_only_gpu_workers_are_spot_and_a_driver_has_somewhere_to_run(written: dict[str, Any]) -> None:
    types = written["available_node_types"]
    spot = [name for name, kind in types.items() if "InstanceMarketOptions" in kind["node_config"]]
    assert spot == ["gpu_worker"]
    assert types["head"]["resources"]["CPU"] == 0
    drivers_place = types["cpu_worker"]
    assert drivers_place["min_workers"] >= 1
    assert drivers_place["resources"]["CPU"] >= jobs.DRIVER_CPUS


def test_it_holds_no_key(written: dict[str, Any]) -> None:
    text = CLUSTER_FILE.read_text()
    for word in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AKIA", "RAY_AUTH_TOKEN="):
        assert word not in text
    assert written["docker"]["image"]
