"""What a champion's history says, and whether it adds up: with itself, with the marks of the versions and
with the alias."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mlflow.entities import LifecycleStage, Run

from infra import promotion_log, registry
from infra.printable import printable
from infra.promotion_log import EXPERIMENT, HISTORY_TAG, Event
from infra.registry import RegisteredVersion

PROMOTION_TAG = "promotion"
MAX_FINDING_CHARACTERS = 200
NUM_TRIES = 20  # each needs another move within milliseconds


def recorded_champion(history: Sequence[Event]) -> int | None:
    """The version that is the champion by the history; None where none was made one."""
    return next(iter(_champions(history)[-1:]), None)


def previous_version(history: Sequence[Event]) -> int | None:
    """What the next rollback brings back: the champion before the recorded one; None where there is none."""
    return next(iter(_champions(history)[-2:-1]), None)


def _champions(history: Sequence[Event]) -> list[int]:
    """The recorded champion last, before it what rollbacks would bring back: a promotion adds one, a rollback
    takes one away. A champion that was set by hand before the history began comes first."""
    champions: list[int] = []
    for event in history:
        if event.status != "done":
            continue
        if not champions and event.from_version is not None:
            champions.append(event.from_version)
        if event.kind == "rollback":
            del champions[-1:]
        if champions[-1:] != [event.to_version]:
            champions.append(event.to_version)
    return champions


def last_concluded(history: Sequence[Event]) -> Event | None:
    """The head of the history: its digest stands for all events up to it (that of a move under way would
    change with the outcome)."""
    return next((event for event in reversed(history) if event.status != "begun"), None)


def verify_history(name: str = registry.DEFAULT_MODEL) -> list[str]:
    """What does not add up in the history, one line each; empty when all is well.

    This finds accidents, and alterations by those who overlook something. It is no signature: digests and
    marks have no key, so whoever may write to MLflow can put another history in place, digests and all. Only
    a digest that was kept elsewhere (`last_concluded`) shows that.
    """
    moment = at_one_moment(name)
    history, problems = examine(moment)
    return [*problems, *check_champion(moment.versions, history)]


def examine(moment: Moment) -> tuple[list[Event], list[str]]:
    """The events that can be read, and what was altered or is missing, one line each."""
    problems: list[str] = []
    history: list[Event] = []
    run, versions, tag = moment.run, moment.versions, moment.tag
    if run is not None:
        history, problems = _check_entries(moment.name, run)
        if history and versions and tag != run.info.run_id:
            problems.append(
                f"the model's tag {HISTORY_TAG!r} says {tag}, but its history is run {run.info.run_id}: "
                "altered, or the model was deleted and made anew; set the tag when you know"
            )
    elif moment.run_id:
        problems.append(f"the history, run {moment.run_id}, is gone")
    elif tag or marks_of(versions):
        problems.append(f"the history is gone: no experiment {EXPERIMENT}/{moment.name} names it")
    return history, [*problems, *_check_versions(versions, history)]


def finding(mark: Literal["ok", "NO", "--"], text: str) -> str:
    """One of an event's findings, short enough to leave room for others."""
    return f"{mark} {printable(text)}"[:MAX_FINDING_CHARACTERS]


def not_noted(history: Sequence[Event], problems: Sequence[str]) -> list[str]:
    """Those of `problems` that no forced move took upon itself: what cannot be mended needs force once, not
    for ever."""
    known = {finding for event in history if event.status == "done" for finding in event.grounds.findings}
    return [problem for problem in problems if finding("NO", problem) not in known]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A model's versions and its history, with no move in between: that would look like tampering.

    Args:
        run_id, run: the history, as its experiment names it, and whether there is such a run.
        tag: what the model itself says of it.
    """

    name: str
    versions: list[RegisteredVersion]
    run_id: str | None
    run: Run | None
    tag: str | None


def at_one_moment(name: str) -> Moment:
    run = promotion_log.history_run(name)
    for _ in range(NUM_TRIES):
        versions, tag = registry.list_versions(name, missing_ok=True), promotion_log.history_tag(name)
        before, run_id, run = run, promotion_log.history_run_id(name), promotion_log.history_run(name)
        if (run and run.data.params) == (before and before.data.params):
            return Moment(name=name, versions=versions, run_id=run_id, run=run, tag=tag)
    raise TimeoutError(restless(name))


def restless(name: str) -> str:
    return f"the history of {name} does not stand still; look at `nst history`"


def _check_entries(name: str, run: Run) -> tuple[list[Event], list[str]]:
    problems: list[str] = []
    if run.info.lifecycle_stage == LifecycleStage.DELETED:
        problems.append(
            f"the history was deleted: restore it with `mlflow runs restore --run-id {run.info.run_id}`"
        )
    history: list[Event] = []
    numbers = promotion_log.entry_numbers(run)
    for before, number in itertools.pairwise([0, *numbers]):
        if number > before + 1:
            problems.append(f"{number - before - 1} event(s) after event {before} are missing")
        try:
            event = promotion_log.read_event(run, number)
        except OSError as error:
            problems.append(f"event {number} was altered or removed: {error}")
            continue
        if (event.model, event.sequence) != (name, number):
            problems.append(f"event {number} was put there: it is event {event.sequence} of {event.model}")
        if event.status == "begun" and number != numbers[-1]:
            problems.append(f"event {number} lost its outcome: later events have theirs")
        last = history[-1] if history else None
        expected = last.digest if last else ""
        if event.previous_digest != expected and (last.sequence if last else 0) == number - 1:
            problems.append(
                f"event {number} does not follow from the one before: that, or its outcome, was altered"
            )
        history.append(event)
    return history, problems


def _check_versions(versions: Sequence[RegisteredVersion], history: Sequence[Event]) -> list[str]:
    problems: list[str] = []
    last = last_done(history)
    by_version = {event.to_version: event for event in history if event.status == "done"}
    promotions = {(event.sequence, event.digest): event.to_version for event in history}
    for version in versions:
        mark, event = mark_of(version), by_version.get(version.version)
        if event is not None and event.to_digest != version.digest:
            problems.append(
                f"version {version.version} is not the model that event {event.sequence} promoted"
            )
        elif mark is not None and promotions.get(mark) != version.version:
            problems.append(
                f"version {version.version} was promoted by event {mark[0]}, but the history has not that "
                "event: it was altered or removed"
            )
        elif event is not None and event is not last and mark != (event.sequence, event.digest):
            # The last one's mark may be missing: it is written after its outcome, or by the next command.
            problems.append(f"version {version.version} lost its tag {PROMOTION_TAG!r}")
    return problems


def check_champion(versions: Sequence[RegisteredVersion], history: Sequence[Event]) -> list[str]:
    """Whether the alias is where the history says; one line if not."""
    if history and history[-1].status == "begun":
        return []
    actual, recorded = champion_alias(versions), recorded_champion(history)
    if actual == recorded:
        return []
    is_ = f"the champion is version {actual}" if actual else "there is no champion"
    says = f"the history says {recorded}" if recorded else "no promotion made it that"
    late = [event for event in history if event.status == "not done" and event.to_version == actual]
    how = f", or late by event {late[-1].sequence}, which others had given up on" if late else ""
    return [f"{is_}, but {says}: moved by hand{how}"]


def champion_alias(versions: Sequence[RegisteredVersion]) -> int | None:
    return next((version.version for version in versions if registry.CHAMPION in version.aliases), None)


def last_done(history: Sequence[Event]) -> Event | None:
    return next((event for event in reversed(history) if event.status == "done"), None)


def digests_of(history: Sequence[Event | None]) -> list[str]:
    """What makes two histories the same (figures may be NaN, which equals nothing)."""
    return [event.digest for event in history if event is not None]


def marks_of(versions: Sequence[RegisteredVersion]) -> dict[int, tuple[int, str]]:
    """version -> its mark."""
    return {version.version: mark for version in versions if (mark := mark_of(version))}


def mark_of(version: RegisteredVersion) -> tuple[int, str] | None:
    """Number and digest of the event that made it the champion last; None without a (readable) mark."""
    number, _, digest = version.tags.get(PROMOTION_TAG, "").partition(" ")
    return (int(number), digest) if number.isdecimal() else None
