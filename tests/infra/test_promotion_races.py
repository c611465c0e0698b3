"""A promotion that crashes, sleeps or meets another: one wins, and the history and the aliases agree."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST

from infra import promotion_log, promotions, registry, tracking_server
from infra.promotions import Grounds, move_champion, previous_version, roll_back, verify_history
from tests.registered_models import (
    READS,
    WRITES,
    alias,
    aliases,
    before_calls,
    make_by_hand,
    moves,
    promote,
    restored,
)
from tests.servers import MlflowServer, free_port, mlflow_server

REPOSITORY = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("mlflow_store")


class Crash(BaseException):
    """The process ends here."""


def crash_at(number: int) -> Callable[[str], None]:
    calls = itertools.count(1)

    def act(method: str) -> None:
        if next(calls) == number:
            raise Crash

    return act


@pytest.mark.parametrize("number", range(1, 7))
def test_a_crash_at_any_write_is_repaired_by_a_rerun(
    promoted_model: str, mlflow_database: Path, number: int
) -> None:
    with restored(mlflow_database):
        with pytest.raises(Crash), before_calls(WRITES, crash_at(number)):
            promote(promoted_model, 4)
        assert alias(promoted_model, "champion") in (3, 4), "the champion is never missing"
        assert verify_history(promoted_model) == [], "what a crash left is no tampering"

        promotions.repair(promoted_model)
        if alias(promoted_model, "champion") != 4:
            assert aliases(promoted_model) == (3, 2, 4)
            promote(promoted_model, 4)
        assert aliases(promoted_model) == (4, 3, None)
        assert verify_history(promoted_model) == []
        done = [event for event in promotions.events(promoted_model) if event.status == "done"]
        assert [event.to_version for event in done] == [1, 2, 3, 4]
        mark = registry.get_version(promoted_model, 4).tags["promotion"]
        assert mark == f"{done[-1].sequence} {done[-1].digest}"


@pytest.mark.parametrize("number", range(1, 9))
def test_a_crash_in_the_first_promotion_is_repaired_too(model: str, number: int) -> None:
    with pytest.raises(Crash), before_calls(WRITES, crash_at(number)):
        promote(model, 1)
    assert verify_history(model) == []
    promotions.repair(model)
    if alias(model, "champion") is None:
        promote(model, 1)
    assert aliases(model) == (1, None, None)
    assert verify_history(model) == []


def interleave(model: str, methods: tuple[str, ...], number: int) -> str | None:
    """Promotes version 3; before its call `number` of `methods`, another gives up on that and promotes
    version 2. Returns how it ended; None if there are not so many calls."""
    calls = itertools.count(1)
    has_acted = False

    def interfere(method: str) -> None:
        nonlocal has_acted
        if not has_acted and next(calls) == number:
            has_acted = True
            promote(model, 2)

    known, outcome = promotions.events(model), "done"
    with before_calls(methods, interfere):
        try:
            move_champion(model, 3, kind="promote", grounds=Grounds(), known=known)
        except promotions.Overtaken as error:
            outcome = "has moved" if "has moved" in str(error) else "is moving"
        except TimeoutError:
            outcome = "given up"
    history = promotions.events(model)
    champion, previous, _ = aliases(model)
    assert verify_history(model) == [], (number, outcome)
    assert champion == history[-1].to_version == promotions.recorded_champion(history), (number, outcome)
    assert previous == previous_version(history), (number, outcome)
    made = [event.to_version for event in history[len(known) :] if event.status == "done"]
    assert made == [3] * (outcome == "done") + [2] * has_acted, (number, outcome)
    return outcome if has_acted else None


@pytest.mark.parametrize(
    ("is_first", "methods"),
    [
        (False, WRITES),
        pytest.param(False, READS + WRITES, marks=pytest.mark.faults),
        pytest.param(True, READS + WRITES, marks=pytest.mark.faults),
    ],
)
def test_whatever_another_does_meanwhile_history_and_champion_agree(
    mlflow_database: Path, is_first: bool, methods: tuple[str, ...]
) -> None:
    outcomes = set()
    for number in itertools.count(1):
        with restored(mlflow_database):
            model = make_by_hand("interleaved")
            if not is_first:
                promote(model, 1)
            outcome = interleave(model, methods, number)
        if outcome is None:
            break
        outcomes.add(outcome)
    assert {"done", "is moving", "given up"} <= outcomes
    assert "has moved" in outcomes or methods == WRITES


def test_a_tag_that_two_write_for_the_first_time_is_written(model: str) -> None:
    """MLflow inserts or updates; of two that insert at once, one gets an error that means nothing."""
    refused: set[str] = set()

    def refuse_once(method: str) -> None:
        if method not in refused:
            refused.add(method)
            raise MlflowException("UNIQUE constraint failed", error_code=BAD_REQUEST)

    methods = tuple(method for method in WRITES if "_registered_model_" in method or "_version_" in method)
    with before_calls(methods, refuse_once):
        promote(model, 1)
        refused.discard("set_registered_model_alias")
        promote(model, 2)
    assert refused >= {"set_registered_model_tag", "set_registered_model_alias", "set_model_version_tag"}
    assert aliases(model) == (2, 1, None)
    assert verify_history(model) == []


def test_a_promotion_under_way_does_not_look_like_tampering(
    promoted_model: str, mlflow_database: Path
) -> None:
    for number in itertools.count(1):
        calls = itertools.count(1)
        has_acted = False

        def interfere(method: str, number: int = number, calls: Iterator[int] = calls) -> None:
            nonlocal has_acted
            if not has_acted and next(calls) == number:
                has_acted = True
                promote(promoted_model, 4)

        with restored(mlflow_database), before_calls(READS, interfere):
            assert verify_history(promoted_model) == [], number
        if not has_acted:
            break
    assert number > 5


def test_a_process_that_was_overtaken_puts_the_champion_back(model: str) -> None:
    promote(model, 1)

    def sleep(method: str) -> None:
        if method == "set_registered_model_alias":
            patched.close()
            promotions.repair(model)

    with contextlib.ExitStack() as patched:
        patched.enter_context(before_calls(WRITES, sleep))
        with pytest.raises(TimeoutError, match=r"took too long and was given up \(event 2\)"):
            promote(model, 3)
    assert moves(model) == [("promote", None, 1, "done"), ("promote", 1, 3, "not done")]
    assert aliases(model) == (1, None, None)
    assert registry.get_version(model, 3).tags.get("promotion") is None
    assert verify_history(model) == []


def test_a_process_that_was_overtaken_early_does_not_move_the_champion_at_all(model: str) -> None:
    promote(model, 1)
    methods: list[str] = []

    def sleep(method: str) -> None:
        methods.append(method)
        if methods[-2:] == ["log_param", "get_run"] and methods.count("log_param") == 1:
            promotion_log.conclude(promotions.events(model)[-1], "not done")

    with pytest.raises(TimeoutError), before_calls((*WRITES, "get_run"), sleep):
        promote(model, 3)
    assert "set_registered_model_alias" not in methods
    assert moves(model)[-1] == ("promote", 1, 3, "not done")
    assert aliases(model) == (1, None, None)


def test_a_process_that_slept_too_long_leaves_the_champion_alone(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before others give up on it: they might have, and moved on, by the time that it moves the alias."""
    promote(model, 1)
    monkeypatch.setattr(promotions, "SECONDS_TO_START", 0.0)
    with pytest.raises(TimeoutError, match="took too long and was given up"):
        promote(model, 3)
    assert moves(model)[-1] == ("promote", 1, 3, "not done")
    assert aliases(model) == (1, None, None)
    registry.set_alias(model, "champion", 3)  # as a request does that was on its way for minutes
    assert verify_history(model) == [
        "the champion is version 3, but the history says 1: moved by hand, or late by event 2, which "
        "others had given up on"
    ]


def test_a_move_under_way_is_waited_for_and_named(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    promote(model, 1)
    with pytest.raises(Crash), before_calls(("set_registered_model_alias",), crash_at(1)):
        promote(model, 2)
    monkeypatch.setattr(promotions, "SECONDS_TO_MOVE", 2.0)
    assert moves(model)[-1] == ("promote", 1, 2, "begun")
    promote(model, 3)
    assert [status for *_, status in moves(model)] == ["done", "not done", "done"]
    _, second, third = promotions.events(model)
    assert third.age_s() < second.age_s() - 1.5, "the crash might have been a slow process"


# Promotes a version once it is told to, in a process of its own; its answer is one line.
PROMOTER = """
import os, sys
from infra import promotions
for line in sys.stdin:
    os.environ["MLFLOW_TRACKING_URI"], name, version = line.split()
    known = promotions.events(name)
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        event = promotions.move_champion(
            name, int(version), kind="promote", grounds=promotions.Grounds(), known=known
        )
        print("done", event.sequence, flush=True)
    except promotions.Overtaken as error:
        print("refused", error, flush=True)
"""


class Promoter:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROMOTER],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def promoters() -> Iterator[tuple[Promoter, Promoter]]:
    pair = Promoter(), Promoter()
    yield pair
    for promoter in pair:
        promoter.end()


def race(model: str, promoters: tuple[Promoter, Promoter], num_rounds: int) -> list[int]:
    """Two processes promote two versions at once, again and again: one of them does. Returns the winners."""
    winners: list[int] = []
    for _ in range(num_rounds):
        versions = [version for version in (1, 2, 3) if version not in winners[-1:]][:2]
        for promoter, version in zip(promoters, versions, strict=True):
            promoter.tell(f"{tracking_server.tracking_uri()} {model} {version}")
        assert [promoter.answer() for promoter in promoters] == ["ready", "ready"]
        for promoter in promoters:
            promoter.tell("go")
        answers = [promoter.answer() for promoter in promoters]
        assert sorted(text.split()[0] for text in answers) == ["done", "refused"], answers
        winner = versions[0] if answers[0].startswith("done") else versions[1]
        winners.append(winner)
        (refused,) = [text for text in answers if text.startswith("refused")]
        assert f"{model} to version {winner} " in refused
        assert "look at `nst history` and try again" in refused
        assert alias(model, "champion") == winner
    assert moves(model) == [
        ("promote", before, winner, "done") for before, winner in zip([None, *winners], winners, strict=False)
    ]
    assert verify_history(model) == []
    return winners


@pytest.mark.slow
def test_of_two_processes_that_promote_at_once_one_does(
    model: str, promoters: tuple[Promoter, Promoter]
) -> None:
    winners = race(model, promoters, num_rounds=5)
    assert [event.to_version for event in promotions.events(model)] == winners
    for number in range(3):  # the first promotion of a model makes its history
        first = make_by_hand(f"first-{number}")
        assert race(first, promoters, num_rounds=1) == [alias(first, "champion")]


@pytest.mark.slow
def test_of_two_processes_at_a_server_one_does(
    infra_server: MlflowServer, monkeypatch: pytest.MonkeyPatch, promoters: tuple[Promoter, Promoter]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", infra_server.uri)
    model = make_by_hand("raced")
    race(model, promoters, num_rounds=4)
    for number in range(3):
        race(make_by_hand(f"first-{number}"), promoters, num_rounds=1)
    event = promotions.events(model)[-1]
    with pytest.raises(MlflowException, match="Changing param values is not allowed"):
        tracking_server.client().log_param(event.run_id, promotion_log.event_key(event.sequence), "{}")


@pytest.mark.faults
def test_a_server_is_restarted_in_the_middle_of_a_promotion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, promoters: tuple[Promoter, Promoter]
) -> None:
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with mlflow_server(tmp_path, port=port):
        model = make_by_hand("restarted")
        race(model, promoters, num_rounds=10)
        for number in range(10):
            race(make_by_hand(f"first-{number}"), promoters, num_rounds=1)
        champion = alias(model, "champion")
        with pytest.raises(Crash), before_calls(("set_registered_model_alias",), crash_at(1)):
            promote(model, next(version for version in (1, 2, 3) if version != champion))
    with mlflow_server(tmp_path, port=port):
        assert verify_history(model) == []
        assert moves(model)[-1][-1] == "begun"
        before = previous_version(promotions.events(model))
        roll_back(model)
        assert alias(model, "champion") == before
        assert [status for *_, status in moves(model)][-3:] == ["done", "not done", "done"]
        assert verify_history(model) == []
