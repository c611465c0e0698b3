"""One training, one fault each, on a cluster of three nodes: in the end as if nothing had happened.

`make fault-matrix` runs this and writes what came of each fault into the README.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from infra import storage
from infra.local_node import processes_of
from tests.corpora import make_corpus
from tests.fault_proxy import Fault, always
from tests.servers import S3Server
from tests.trial_cluster import (
    NUM_IMAGES,
    Outcome,
    Submitted,
    TrialCluster,
    command_line,
    kill,
    trial_cluster,
    wait_for,
)

# Of each test alone: the first one has the cluster and the undisturbed training set up.
pytestmark = [pytest.mark.faults, pytest.mark.timeout(600, func_only=True)]

TABLE = os.environ.get("NST_FAULT_TABLE")  # where `make fault-matrix` wants the outcomes
SECONDS_OF_REFUSAL = 20
SECONDS_OF_NOTICE = 45
SECONDS_FOR_ANOTHER_LIFE = 120  # of the workers: what ended the last is seen, and new ones are at work
NUM_IMAGES_OF_ELASTIC = 5120


@pytest.fixture(scope="module")
def trial(store: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrialCluster]:
    folder = tmp_path_factory.mktemp("trial")
    corpora = make_corpus(folder / "content", "content"), make_corpus(folder / "style", "style")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        with trial_cluster(store, corpora, folder) as running:
            yield running


@pytest.fixture(autouse=True)
def restored(trial: TrialCluster) -> Iterator[None]:
    """A test that failed leaves no node that is dead, or one too many, to the next one."""
    yield
    trial.restore()


@pytest.fixture(scope="module")
def undisturbed(trial: TrialCluster) -> Outcome:
    with trial.train("undisturbed") as training:
        return training.result()


def kill_a_rank(trial: TrialCluster, training: Submitted) -> None:
    kill(trial.ranks()[1])


def kill_rank_0(trial: TrialCluster, training: Submitted) -> None:
    kill(trial.ranks()[0])


def kill_a_raylet(trial: TrialCluster, training: Submitted) -> None:
    """And nothing else of its node: the rank there ends by itself, before its successor begins. Then the rest
    of the node goes, and another one comes, as an autoscaler would see to it."""
    victim = trial.node_without_driver()
    os.kill(victim.raylet_process_id, signal.SIGKILL)
    wait_for(
        lambda: not any("RayTrainWorker" in command_line(process) for process in processes_of(victim)),
        30,
        "the end of the rank whose raylet is gone",
    )
    trial.cluster.kill_node(victim)
    trial.cluster.add_worker(num_cpus=1)


def kill_the_driver(trial: TrialCluster, training: Submitted) -> None:
    """Who follows the job submits it again."""
    kill(trial.driver())


def drain_a_node(trial: TrialCluster, training: Submitted) -> None:
    """A notice, a checkpoint at that moment, a restart elsewhere; then the node is gone.

    No other checkpoint is due before the end, so the one that there is then comes of the notice.
    """
    victim, ranks = trial.node_without_driver(), trial.ranks()
    assert not training.store.stored()
    try:
        # Telling Ray takes seconds, in which the training could come to its end.
        for rank in ranks:
            rank.suspend()
        trial.cluster.drain(victim, SECONDS_OF_NOTICE)
        for rank in ranks:
            rank.resume()
        saved, *_ = wait_for(training.store.stored, SECONDS_OF_NOTICE, "a checkpoint")
        assert saved.num_images_seen < training.num_images, "the training did not hear of the notice"
        wait_for(
            lambda: set(trial.ranks()).isdisjoint(processes_of(victim)),
            SECONDS_OF_NOTICE,
            "the workers' departure from the node",
        )
    finally:
        trial.cluster.kill_node(victim)
    trial.cluster.add_worker(num_cpus=1)


def refuse_writes(trial: TrialCluster, training: Submitted) -> None:
    before = sum(trial.proxy.faults.values())
    trial.proxy.script = always(Fault.SLOW_DOWN, "PUT", "POST", "DELETE")
    time.sleep(SECONDS_OF_REFUSAL)
    trial.proxy.script = None
    assert sum(trial.proxy.faults.values()) > before


def take_mlflow_away(trial: TrialCluster, training: Submitted) -> None:
    """For the whole middle third."""
    trial.mlflow.stop()
    training.wait_until(2 / 3)
    trial.mlflow.start()


def damage_the_newest_checkpoint(trial: TrialCluster, training: Submitted) -> None:
    """While nobody writes another one; then rank 0 dies, before it can, and the training goes on from the one
    before."""
    ranks = trial.ranks()
    for rank in ranks:
        rank.suspend()
    newest, *_ = training.store.stored()
    victim = storage.join(training.store.uri_of(newest), "training.safetensors")
    data = storage.read_bytes(victim)
    storage.write_bytes(victim, data[: len(data) // 2] + b"x" * (len(data) - len(data) // 2))
    kill(ranks[0])
    ranks[1].resume()


def hang_a_rank(trial: TrialCluster, training: Submitted) -> None:
    """It lives and does nothing: its peer's deadline ends both."""
    trial.ranks()[1].send_signal(signal.SIGSTOP)


class Trouble(NamedTuple):
    """What happens at a third of a training, by its `progress`, how often that is then restarted, and what is
    said of it to whoever follows the job."""

    cause: Callable[[TrialCluster, Submitted], None]
    num_restarts: int
    options: tuple[str, ...] = ()
    progress: Callable[[Submitted], int] = Submitted.num_images_saved
    said: str = ""


FAULTS = {
    "a worker is killed": Trouble(kill_a_rank, 1),
    "rank 0 is killed": Trouble(kill_rank_0, 1),
    "a worker hangs": Trouble(hang_a_rank, 1),
    "a worker's raylet is killed, its node goes": Trouble(kill_a_raylet, 1),
    "the driver is killed": Trouble(kill_the_driver, 0),
    "a node is drained and goes": Trouble(
        drain_a_node,
        0,
        ("--set", f"checkpoint_every={NUM_IMAGES}", "--checkpoint-seconds", "3600"),
        Submitted.num_images_logged,
        "a node is about to go; going on from",
    ),
    f"the store refuses writes for {SECONDS_OF_REFUSAL} s": Trouble(refuse_writes, 0),
    "MLflow is away for the middle third": Trouble(take_mlflow_away, 0),
    "the newest checkpoint is damaged, a worker is killed": Trouble(
        damage_the_newest_checkpoint, 1, said="the checkpoint before it is taken"
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_it_ends_as_if_nothing_had_happened(
    fault: str, trial: TrialCluster, undisturbed: Outcome, tmp_path: Path
) -> None:
    cause, num_restarts, options, progress, said = FAULTS[fault]
    with trial.train(cause.__name__.replace("_", "-"), *options) as training:
        training.wait_until(1 / 3, done=progress)
        cause(trial, training)
        outcome = training.result()

    assert outcome.record["status"] == "FINISHED"
    assert outcome.record["result"]["num_restarts"] == num_restarts, outcome.output
    assert said in outcome.output, outcome.output
    assert_same_weights(undisturbed, outcome, tmp_path)
    outcome.assert_one_whole_run()
    outcome.assert_nothing_is_left()
    if TABLE:
        later = outcome.seconds - undisturbed.seconds
        with Path(TABLE).open("a") as table:
            table.write(
                f"| {fault} | {num_restarts} | {later:+.0f} s | the same bits | one, FINISHED | 0 |\n"
            )


@pytest.mark.timeout(1200, func_only=True)
def test_workers_come_and_go(trial: TrialCluster) -> None:
    """One begins where there is one node, a second joins it at a checkpoint, and leaves with its node."""
    trial.cluster.kill_node(trial.cluster.workers[-1])
    with trial.train("elastic", "--num-workers", "1:4", num_images=NUM_IMAGES_OF_ELASTIC) as training:
        training.wait_until(0.1)
        assert len(trial.ranks()) == 1
        trial.cluster.add_worker(num_cpus=1)
        wait_for(lambda: len(trial.ranks()) == 2, SECONDS_FOR_ANOTHER_LIFE, "a second worker")
        both, before = set(trial.ranks()), training.num_images_saved()
        wait_for(
            lambda: training.num_images_saved() > before, SECONDS_FOR_ANOTHER_LIFE, "a checkpoint of both"
        )
        trial.cluster.kill_node(trial.node_without_driver())
        wait_for(
            lambda: len(ranks := trial.ranks()) == 1 and both.isdisjoint(ranks),
            SECONDS_FOR_ANOTHER_LIFE,
            "one worker again",
        )
        trial.cluster.add_worker(num_cpus=1)
        outcome = training.result()
    assert outcome.record["status"] == "FINISHED"
    assert outcome.record["result"]["num_restarts"] == 1, outcome.output  # for the node that died
    assert "there is room for 2 workers; going on from" in outcome.output
    outcome.assert_one_whole_run()
    outcome.assert_nothing_is_left()


def assert_same_weights(undisturbed: Outcome, outcome: Outcome, folder: Path) -> None:
    """Bit for bit."""
    expected, weights = undisturbed.weights(folder / "undisturbed"), outcome.weights(folder / "disturbed")
    assert weights.keys() == expected.keys()
    assert [name for name, value in weights.items() if not torch.equal(value, expected[name])] == []
