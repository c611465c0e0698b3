"""What MLflow's page of system metrics is given."""

from __future__ import annotations

import hashlib
import time

import psutil

from infra.system_metrics import SystemMetrics


def test_a_sample_says_how_busy_the_node_is() -> None:
    metrics = SystemMetrics()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        hashlib.sha256(b"busy" * 10_000)
    sample = metrics.sample()
    assert sample["system/cpu_utilization_percentage"] > 0
    used = psutil.virtual_memory().used / 1e6
    assert 0.5 * used < sample["system/system_memory_usage_megabytes"] < 2 * used
    assert 0 < sample["system/disk_usage_percentage"] <= 100
    assert sample["system/network_receive_megabytes"] >= 0
    assert set(map(type, sample.values())) == {float}


def test_a_sample_is_of_the_moment() -> None:
    metrics = SystemMetrics()
    usages = []
    for is_busy in (True, False) * 3:
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            hashlib.sha256(b"busy" * 10_000) if is_busy else time.sleep(0.01)
        usages.append(metrics.sample()["system/cpu_utilization_percentage"])
    assert len(set(usages)) > 1, "no average over all samples"


def test_nodes_are_told_apart_as_the_page_expects() -> None:
    here, there = SystemMetrics("node_0").sample(), SystemMetrics("node_1").sample()
    assert "system/node_0/cpu_utilization_percentage" in here
    assert not here.keys() & there.keys()
