"""The champion's history: what is kept, what a rollback brings back, and what tampering shows."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra import promotion_log, promotions, registry, tracking_server
from infra.promotions import Event, Grounds, move_champion, roll_back, verify_history
from tests.registered_models import aliases, moves, promote, restored

pytestmark = pytest.mark.usefixtures("mlflow_store")


def test_a_history_tells_who_made_which_version_the_champion(model: str) -> None:
    grounds = Grounds(
        reason="better",
        gate="gate.toml",
        findings=("style_distance 0.2",),
        figures={"style": 0.2, "undefined": float("nan")},
        evaluation="abc",
        evaluation_set="def",
    )
    assert promotions.events(model) == []
    first = move_champion(model, 1, kind="promote", grounds=grounds)
    assert aliases(model) == (1, None, None)
    registry.set_alias(model, "challenger", 2)
    second = move_champion(model, 2, kind="promote", grounds=Grounds(is_forced=True))
    assert aliases(model) == (2, 1, None)

    kept, _ = promotions.events(model)
    assert (kept.digest, str(kept.grounds)) == (first.digest, str(grounds))
    assert (kept.sequence, kept.to_digest, kept.status) == (1, "digest 1", "done")
    assert "@" in kept.who
    assert second.previous_digest == first.digest
    assert registry.get_version(model, 2).tags["promotion"] == f"2 {second.digest}"
    run = tracking_server.client().get_run(first.run_id)
    assert run.data.tags["nst.kind"] == "history"
    assert tracking_server.client().get_registered_model(model).tags["history"] == run.info.run_id
    assert verify_history(model) == []


def test_what_a_history_does_not_take_moves_nothing(model: str) -> None:
    promote(model, 1)
    for version, grounds, expected in (
        (1, Grounds(), "is the champion already"),
        (9, Grounds(), "no version 9; the newest are: 3, 2, 1"),
        (2, Grounds(reason="x" * 501), "501 characters"),
        (
            2,
            Grounds(findings=("x" * 100,) * 60),
            r"characters and an event keeps 5000; .* fewer rules than 60",
        ),
    ):
        with pytest.raises(ValueError, match=expected):
            move_champion(model, version, kind="promote", grounds=grounds)
    assert moves(model) == [("promote", None, 1, "done")]
    assert aliases(model) == (1, None, None)
    with pytest.raises(ValueError, match="has no model 'unknown'"):
        promote("unknown", 1)


def test_rollbacks_walk_back(model: str) -> None:
    with pytest.raises(ValueError, match="no previous champion to bring back: nothing was promoted yet"):
        roll_back(model)
    promote(model, 1, 2, 3)
    assert aliases(model) == (3, 2, None)
    event = roll_back(model, "3 smears faces")
    assert (event.kind, event.from_version, event.to_version) == ("rollback", 3, 2)
    assert event.grounds.reason == "3 smears faces"
    assert aliases(model) == (2, 1, None)
    roll_back(model)
    assert aliases(model) == (1, None, None)
    with pytest.raises(ValueError, match="there is nothing before version 1"):
        roll_back(model)

    promote(model, 3)
    assert aliases(model) == (3, 1, None)
    roll_back(model)
    assert aliases(model) == (1, None, None)
    assert verify_history(model) == []


def test_a_rollback_goes_by_the_history(model: str) -> None:
    promote(model, 1, 2)
    registry.set_alias(model, "champion", 3)
    registry.set_alias(model, "previous", 3)
    assert verify_history(model) == ["the champion is version 3, but the history says 2: moved by hand"]
    event = roll_back(model)
    assert (event.from_version, event.recorded_version, event.to_version) == (3, 2, 1)
    assert event.was_moved_by_hand
    assert aliases(model) == (1, None, None)
    assert verify_history(model) == []

    registry.set_alias(model, "champion", 3)
    promote(model, 3)  # what was done by hand is made good
    assert aliases(model) == (3, 1, None)
    assert verify_history(model) == []


def test_what_is_gone_or_exchanged_is_not_brought_back(model: str) -> None:
    client = tracking_server.client()
    promote(model, 1, 2, 3)
    client.set_model_version_tag(model, "2", "digest", "of another model")
    with pytest.raises(ValueError, match="/2 is not the model that was the champion; promote another"):
        roll_back(model)
    assert verify_history(model) == ["version 2 is not the model that event 2 promoted"]
    client.delete_model_version(model, "2")
    with pytest.raises(ValueError, match="version 2, the champion before version 3, was deleted"):
        roll_back(model)
    assert aliases(model) == (3, None, None)
    promote(model, 1)
    roll_back(model)
    assert aliases(model) == (3, None, None)


def test_a_model_with_a_champion_set_by_hand_gets_a_history(model: str) -> None:
    registry.set_alias(model, "champion", 2)
    assert verify_history(model) == [
        "the champion is version 2, but no promotion made it that: moved by hand"
    ]
    promote(model, 3)
    assert promotions.events(model)[0].from_version == 2
    assert aliases(model) == (3, 2, None)
    roll_back(model)
    assert aliases(model) == (2, None, None)
    assert verify_history(model) == []


def test_a_model_that_is_made_anew_keeps_its_history(model: str) -> None:
    promote(model, 1, 2)
    run_id = promotions.events(model)[0].run_id
    client = tracking_server.client()
    client.delete_registered_model(model)
    client.create_registered_model(model)
    client.create_model_version(model, "s3://nowhere/1", tags={"digest": "of another model"})
    assert verify_history(model) == [
        f"the model's tag 'history' says None, but its history is run {run_id}: altered, or the model was "
        "deleted and made anew; set the tag when you know",
        "version 1 is not the model that event 1 promoted",
        "there is no champion, but the history says 2: moved by hand",
    ]
    with pytest.raises(ValueError, match="/1 is not the model that was the champion"):
        roll_back(model)
    with pytest.raises(
        OSError, match=r"does not add up: the model's tag 'history' says None, .* more: `nst hist"
    ):
        promote(model, 1)
    move_champion(model, 1, kind="promote", grounds=Grounds(reason="made anew"), force=True)
    client.set_registered_model_tag(model, "history", run_id)
    assert verify_history(model) == []


# Each alters the database as its owner may; `event` is the second of three.
TAMPERING: dict[str, tuple[Callable[[sqlite3.Connection, str, Event], Any], str]] = {
    "an event's content": (
        lambda database, model, event: database.execute(
            "UPDATE params SET value = replace(value, 'reason 2', 'reason 9') WHERE run_uuid = ? AND key = ?",
            (event.run_id, "event-000002"),
        ),
        "event 3 does not follow from the one before: that, or its outcome, was altered",
    ),
    "the last event's content": (
        lambda database, model, event: database.execute(
            "UPDATE params SET value = replace(value, 'reason 3', 'reason 9') WHERE run_uuid = ? AND key = ?",
            (event.run_id, "event-000003"),
        ),
        "version 3 was promoted by event 3, but the history has not that event: it was altered or removed",
    ),
    "an event that is no JSON": (
        lambda database, model, event: database.execute(
            "UPDATE params SET value = 'x' WHERE run_uuid = ? AND key = ?", (event.run_id, "event-000002")
        ),
        "event 2 was altered or removed",
    ),
    "an outcome": (
        lambda database, model, event: database.execute(
            "UPDATE params SET value = 'not done' WHERE run_uuid = ? AND key = ?",
            (event.run_id, "outcome-000002"),
        ),
        "event 3 does not follow from the one before",
    ),
    "an outcome that is none": (
        lambda database, model, event: database.execute(
            "UPDATE params SET value = 'perhaps' WHERE run_uuid = ? AND key = ?",
            (event.run_id, "outcome-000002"),
        ),
        "event 2 was altered or removed: .*its outcome is 'perhaps'",
    ),
    "an event removed": (
        lambda database, model, event: database.execute(
            "DELETE FROM params WHERE run_uuid = ? AND key = ?", (event.run_id, "event-000002")
        ),
        "event 2 was altered or removed",
    ),
    "an outcome removed": (
        lambda database, model, event: database.execute(
            "DELETE FROM params WHERE run_uuid = ? AND key = ?", (event.run_id, "outcome-000002")
        ),
        "event 2 lost its outcome: later events have theirs",
    ),
    "an event and its outcome removed": (
        lambda database, model, event: database.execute(
            "DELETE FROM params WHERE run_uuid = ? AND key LIKE '%-000002'", (event.run_id,)
        ),
        r"1 event\(s\) after event 1 are missing",
    ),
    "the last event and its outcome removed": (
        lambda database, model, event: database.execute(
            "DELETE FROM params WHERE run_uuid = ? AND key LIKE '%-000003'", (event.run_id,)
        ),
        "version 3 was promoted by event 3, but the history has not that event",
    ),
    "an event of another model": (
        lambda database, model, event: database.execute(
            "UPDATE params SET value = replace(value, ?, 'other') WHERE run_uuid = ? AND key = ?",
            (model, event.run_id, "event-000003"),
        ),
        "event 3 was put there: it is event 3 of other",
    ),
    "the history run deleted": (
        lambda database, model, event: tracking_server.client().delete_run(event.run_id),
        "the history was deleted: restore it with `mlflow runs restore --run-id",
    ),
    "the history run purged": (
        lambda database, model, event: [
            database.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (event.run_id,))
            for table in ("params", "tags", "runs")
        ],
        "the history, run [0-9a-f]+, is gone",
    ),
    "the experiment that names it renamed": (
        lambda database, model, event: database.execute(
            "UPDATE experiments SET name = ? WHERE name = ?",
            (f"x{model}", f"{promotion_log.EXPERIMENT}/{model}"),
        ),
        "the history is gone: no experiment nst-promotions/.* names it",
    ),
    "the tag pointed elsewhere": (
        lambda database, model, event: tracking_server.client().set_registered_model_tag(
            model, "history", "x"
        ),
        "the model's tag 'history' says x, but its history is run",
    ),
    "the tag removed": (
        lambda database, model, event: tracking_server.client().delete_registered_model_tag(model, "history"),
        "the model's tag 'history' says None",
    ),
    "a version's tag removed": (
        lambda database, model, event: tracking_server.client().delete_model_version_tag(
            model, "2", "promotion"
        ),
        "version 2 lost its tag 'promotion'",
    ),
    "the champion moved": (
        lambda database, model, event: registry.set_alias(model, "champion", 2),
        "the champion is version 2, but the history says 3: moved by hand",
    ),
    "the champion removed": (
        lambda database, model, event: registry.delete_alias(model, "champion"),
        "there is no champion, but the history says 3: moved by hand",
    ),
}


@pytest.mark.parametrize("what", TAMPERING)
def test_tampering_shows(promoted_model: str, what: str, mlflow_database: Path) -> None:
    assert verify_history(promoted_model) == []
    tamper, expected = TAMPERING[what]
    with restored(mlflow_database) as connection:
        tamper(connection, promoted_model, promotions.events(promoted_model)[1])
        connection.commit()
        problems = verify_history(promoted_model)
        assert any(re.match(expected, problem) for problem in problems), problems
        promotions.repair(promoted_model)
        assert verify_history(promoted_model) == problems, "no other command hides it"
        if "moved by hand" in expected:
            return
        before = promotions.events(promoted_model)
        for move in (lambda: promote(promoted_model, 4), lambda: roll_back(promoted_model)):
            with pytest.raises(
                (OSError, ValueError), match=r"does not add up|nothing before|nothing was prom"
            ):
                move()
        assert promotions.events(promoted_model) == before


def test_a_gap_stays_visible(model: str, mlflow_database: Path) -> None:
    promote(model, 1, 2, 3)
    run_id = promotions.events(model)[0].run_id
    with contextlib.closing(sqlite3.connect(mlflow_database)) as connection, connection:
        connection.execute("DELETE FROM params WHERE run_uuid = ? AND key LIKE '%-000003'", (run_id,))
    problem = (
        "version 3 was promoted by event 3, but the history has not that event: it was altered or removed"
    )
    assert promotions.doubts(model) == [problem]
    forced = move_champion(model, 1, kind="promote", grounds=Grounds(reason="known"), force=True)
    assert (forced.sequence, forced.grounds.is_forced, forced.grounds.findings) == (
        4,
        True,
        (f"NO {problem}",),
    )
    gap = "1 event(s) after event 2 are missing"
    with pytest.raises(OSError, match=re.escape(gap)):  # which nobody knew of yet
        promote(model, 3)
    move_champion(model, 3, kind="promote", grounds=Grounds(reason="known"), force=True)
    promote(model, 2)  # what a forced move took upon itself needs no force again
    assert verify_history(model) == [gap]


def test_a_deleted_history_is_written_to_again_only_when_restored(model: str) -> None:
    promote(model, 1, 2)
    run_id = promotions.events(model)[0].run_id
    client = tracking_server.client()
    client.delete_run(run_id)
    for move in (lambda: promote(model, 3), lambda: roll_back(model)):
        with pytest.raises(
            OSError, match=f"was deleted: restore it with `mlflow runs restore --run-id {run_id}`"
        ):
            move()
    assert aliases(model) == (2, 1, None)
    client.restore_run(run_id)
    promote(model, 3)
    assert verify_history(model) == []
