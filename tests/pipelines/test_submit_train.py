"""A person trains on a cluster as the README says: `nst submit`, the same again, and `ray job submit`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from infra.local_cluster import LocalCluster, local_cluster
from infra.local_node import processes_of
from infra.packaging import commit_of
from tests.corpora import make_corpus
from tests.servers import REPOSITORY, mlflow_server
from tests.trial_cluster import command_line, wait_for

TINY = ["--preset", "smoke", "--images", "32", "--set", "batch.size=32", "--threads", "1"]
TINY += ["--set", "model.content_widths=[8,8,8,8]", "--set", "preview_every=32"]


def run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def result_of(output: str) -> dict[str, Any]:
    """What the verb's own --json said, somewhere in the job's log."""
    (line,) = (line for line in output.splitlines() if line.startswith('{"run_id"'))
    return json.loads(line)


def nodes_with_ranks(cluster: LocalCluster) -> int:
    return sum(
        any("RayTrainWorker" in command_line(process) for process in processes_of(node))
        for node in cluster.workers
    )


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_training_is_submitted_repeated_and_finished(tmp_path: Path) -> None:
    corpora = []
    for role in ("content", "style"):
        corpora += [f"--{role}", make_corpus(tmp_path / role, role)]
    train = [*corpora, *TINY, "--out", str(tmp_path / "runs"), "--num-workers", "2", "--json"]
    with mlflow_server(tmp_path / "mlflow") as mlflow:
        settings = {"MLFLOW_TRACKING_URI": mlflow.uri}
        with (
            local_cluster(2, cpus_per_worker=2, environment=settings) as cluster,
            ThreadPoolExecutor() as pool,
        ):
            environment = {**os.environ, **settings, **cluster.environment}
            environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
            del environment["RAY_ADDRESS"]  # a person has the address of the jobs server only

            submit = ["nst", "submit", "--", "train", *train]
            output = pool.submit(run, submit, environment)
            seen = wait_for(
                lambda: nodes_with_ranks(cluster) == 2 or (output.done() and output.result()),
                200,
                "a rank on each node",
            )
            assert seen is True, "one node, which has room for both ranks, got both"
            result = result_of(output.result())
            again = run(submit, environment)
            assert "is finished; another --name trains anew" in again
            assert result_of(again) == result

            record = (tmp_path / "runs" / "smoke" / "run.json").read_bytes()
            submit = ["ray", "job", "submit", "--working-dir", ".", "--entrypoint-num-cpus", "0.01", "--"]
            run([*submit, "python", "-m", "pipelines.train_gan", *train], environment)
            assert (tmp_path / "runs" / "smoke" / "run.json").read_bytes() == record
        client = MlflowClient(mlflow.uri)
        first = client.get_run(result["run_id"])
        assert first.info.status == "FINISHED"
        assert first.data.tags["nst.commit"] == commit_of(str(REPOSITORY))
        assert [version.version for version in client.search_model_versions("name='nst'")] == ["1"]
