"""What the driver of a training makes of Ray Train's errors, of sizes and of an absent store. Whole trainings
are in test_train_gan.py and test_train_faults.py."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus
from ray.train.v2._internal.util import construct_user_exception_with_traceback

from infra.s3_errors import StoreRefuses
from nst.config import require
from pipelines import ray_training
from pipelines.console import StageFailed
from pipelines.rank_failures import in_one_line
from pipelines.ray_training import Workers, _End, fit, patiently
from pipelines.train_worker import WorkerSettings


def failure(function) -> WorkerStatus:
    """A rank whose training function has raised, as Ray tells it to the controller."""
    try:
        function()
    except Exception as error:  # noqa: BLE001 - as Ray does
        return WorkerStatus(running=False, error=construct_user_exception_with_traceback(error))
    raise AssertionError("it raises nothing")


def group_error(*statuses: WorkerStatus) -> WorkerGroupError:
    return WorkerGroupPollStatus(worker_statuses=dict(enumerate(statuses))).get_worker_group_error()


def lost_connection() -> None:
    raise RuntimeError("Connection closed by peer [127.0.0.1]:4711")


def test_a_death_is_named_and_not_its_consequences() -> None:
    death = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())
    error = group_error(failure(lost_connection), WorkerStatus(running=False, error=death))
    assert in_one_line(error).startswith("worker 1 died: The actor died")


def test_a_failure_that_nobody_died_of_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert in_one_line(group_error(failure(lost_connection))) == (
        "worker 0 failed: RuntimeError: Connection closed by peer [127.0.0.1]:4711"
    )
    assert ", in lost_connection" in capsys.readouterr().out, "a rank's own log is a file on its node"
    assert in_one_line(ControllerError(RuntimeError("no room\nfor 2"))) == "no room for 2"


def test_a_users_mistake_on_a_rank_is_one_here_too() -> None:
    mistake = failure(lambda: require(False, "batch.size must be a multiple of 16, not 17"))
    for statuses in ((mistake, failure(lost_connection)), (failure(lost_connection), mistake)):
        with pytest.raises(ValueError, match=r"^batch\.size must be a multiple of 16, not 17$"):
            in_one_line(group_error(*statuses))


def test_a_librarys_value_error_is_a_failure() -> None:
    assert in_one_line(group_error(failure(lambda: int("seven")))).startswith(
        "worker 0 failed: ValueError: invalid literal"
    )


def test_a_store_that_refuses_a_rank_is_tried_again() -> None:
    """The driver has asked it before: it is no mistake in the command, and it may pass."""
    refused = failure(lambda: (_ for _ in ()).throw(StoreRefuses("s3://b/runs: ExpiredToken")))
    assert in_one_line(group_error(refused)) == "worker 0 failed: StoreRefuses: s3://b/runs: ExpiredToken"


def test_what_trying_again_cannot_mend_ends_the_training() -> None:
    hopeless = failure(lambda: (_ for _ in ()).throw(StageFailed("every checkpoint is damaged")))
    with pytest.raises(StageFailed, match="every checkpoint is damaged"):
        in_one_line(group_error(hopeless))


def test_the_largest_size_that_has_room_is_taken() -> None:
    workers = Workers(sizes=(2, 4, 8), use_gpu=True, max_restarts=3, wait_for_nodes_s=0, are_here=False)
    assert [workers.best_size(room) for room in (1, 2, 3, 7, 8, 100)] == [0, 2, 2, 4, 8, 8]
    assert workers.demand.num_workers == (2, 8)
    assert workers.demand.bundle == {"GPU": 1, "CPU": 63 / 64}


def test_beside_workers_on_all_cpus_there_is_room_for_a_driver() -> None:
    from infra.jobs import DRIVER_CPUS

    workers = Workers(sizes=(1,), use_gpu=False, max_restarts=0, wait_for_nodes_s=0, are_here=False)
    for num_cpus in (1, 2, 8, 64, 192):
        assert workers.demand.num_that_fit({"CPU": num_cpus - DRIVER_CPUS}) >= num_cpus


def test_a_store_that_is_away_is_asked_again_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_training, "SECONDS_BETWEEN_TRIES", 0.01)
    answers = [OSError("away"), StoreRefuses("ExpiredToken"), 7]

    def ask() -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently(ask) == 7
    monkeypatch.setattr(ray_training, "SECONDS_WITHOUT_STORE", 0.05)
    answers[:] = [OSError("gone")] * 100
    with pytest.raises(OSError, match="gone"):
        patiently(ask)


def lives(
    monkeypatch: pytest.MonkeyPatch, *ends: tuple[int, _End | None], problems: int = 0
) -> tuple[int, str]:
    """`fit` over lives of the workers that end as told, each with (images saved then, why): how many restarts
    it counted and what it said. The first `problems` times something is wrong with a node."""
    saved, told, left, wrong = [0], [], list(ends), ["storage is away"] * problems

    def live(*_: object) -> _End:
        saved[0], end = left.pop(0)
        return end or _End(why="", wanted=1)

    def look() -> None:
        if wrong:
            raise ValueError(wrong.pop())

    monkeypatch.setattr(ray_training, "_live", live)
    monkeypatch.setattr(ray_training, "_images_in", lambda _: saved[0])
    monkeypatch.setattr(ray_training, "_wait_for_size", lambda *_: 1)
    monkeypatch.setattr(ray_training, "say", told.append)
    monkeypatch.setattr(ray_training, "SECONDS_BETWEEN_TRIES", 0.0)
    settings = WorkerSettings(
        identity={"config": {"num_images": 100}},
        checkpoints_uri="",
        claim=("", ""),
        run_id="",
        tracking_uri=None,
        num_loader_workers=0,
        checkpoint_seconds=1,
        hang_timeout_s=60,
        num_threads=1,
    )
    workers = Workers(sizes=(1,), use_gpu=False, max_restarts=1, wait_for_nodes_s=0, are_here=False)
    return fit(settings, workers, check=lambda: None, look_at_nodes=look), "\n".join(told)


DEATH, NOTICE = _End(why="worker 1 died", wanted=1), _End(why="a node went", wanted=1, is_planned=True)


def test_restarts_count_in_a_row_and_those_with_notice_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the notice was too short for a checkpoint."""
    assert lives(monkeypatch, (0, NOTICE), (0, NOTICE), (0, NOTICE), (100, None))[0] == 0
    assert lives(monkeypatch, (0, DEATH), (32, DEATH), (32, DEATH), (100, None))[0] == 3
    with pytest.raises(StageFailed, match="failed 2 times in a row at 32 images: worker 1 died"):
        lives(monkeypatch, (32, NOTICE), (32, DEATH), (32, DEATH))


def test_a_node_that_came_since_is_looked_at_before_workers_start(monkeypatch: pytest.MonkeyPatch) -> None:
    num_restarts, told = lives(monkeypatch, (100, None), problems=1)
    assert num_restarts == 1
    assert told == "storage is away; going on from 0 images"
    with pytest.raises(StageFailed, match="storage is away"):
        lives(monkeypatch, problems=2)
