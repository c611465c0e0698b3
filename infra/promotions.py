"""Who is the champion: the move itself, the way back, and whether the history adds up.

The history (infra/promotion_log.py) is the truth and the aliases follow it. An event is written before the
champion moves, and its outcome after: both once only. So of two that move the champion at once one is
refused; what a crash left half done is completed, or noted as not done, by the next command; and a process
that was so slow that others gave up on it finds that out, and puts the champion back.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Container, Mapping, Sequence

from mlflow.entities import LifecycleStage, Run

from infra import promotion_log, registry, tracking_server
from infra.promotion_log import EXPERIMENT, HISTORY_TAG, Event, Grounds, Kind, twice_if_refused
from infra.registry import RegisteredVersion

__all__ = [
    "Event",
    "Grounds",
    "events",
    "move_champion",
    "previous_version",
    "recorded_champion",
    "repair",
    "roll_back",
    "verify_history",
]

PROMOTION_TAG = "promotion"
MAX_REASON_CHARACTERS = 500
SECONDS_TO_MOVE = 15.0
NUM_TRIES = 20  # each needs another move within milliseconds


def events(name: str = registry.DEFAULT_MODEL) -> list[Event]:
    """The history of the model `name`, the oldest event first.

    Raises:
        OSError: an event cannot be read: it was altered.
    """
    return promotion_log.events(name)


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


def move_champion(
    name: str, to_version: int, *, kind: Kind, grounds: Grounds, known: Sequence[Event] | None = None
) -> Event:
    """Makes `to_version` the champion; appends the event.

    The alias `champion` moves in one step and is never missing. A crash anywhere in here is repaired by the
    next call, or by `repair`.

    Args:
        known: the history that the decision was based on.

    Raises:
        ValueError: the reason is too long, `to_version` is the champion already, somebody else moves the
            champion at this moment, or has moved it since `known`.
        TimeoutError: this process was so slow that another gave up on it; the champion is what the history
            says.
    """
    if len(grounds.reason) > MAX_REASON_CHARACTERS:
        raise ValueError(f"the reason has {len(grounds.reason)} characters; {MAX_REASON_CHARACTERS} are kept")
    # Before the history is read: else these could tell of an event that the decision did not know.
    marks = _marks(registry.list_versions(name))
    history = repair(name)
    if history and history[-1].status == "begun":
        raise ValueError(promotion_log.under_way(history[-1]))
    other = _last_done(history)
    if known is not None and other is not None and _digests([other]) != _digests([_last_done(known)]):
        raise ValueError(
            f"{other.who} has moved {name} to version {other.to_version} meanwhile (event {other.sequence}); "
            "look at `nst history` and try again"
        )
    to = registry.get_version(name, to_version)
    found, recorded = _champion_alias(registry.list_versions(name)), recorded_champion(history)
    if found == recorded == to_version:
        raise ValueError(f"{to} is the champion already")
    # Where the last events were removed or altered, the versions know better, and that stays visible.
    digests = {event.sequence: event.digest for event in history} | dict(marks.values())
    event = promotion_log.append(
        name,
        kind=kind,
        from_version=found,
        recorded_version=recorded,
        to=to,
        grounds=grounds,
        after=max(digests.items(), default=(0, "")),
    )
    if event.status != "not done":  # by now another might have given up on us
        twice_if_refused(registry.set_alias, name, registry.CHAMPION, to_version)
    event = promotion_log.conclude(event, "done")
    _follow_history(name, with_champion=True)
    if event.status != "done":
        raise TimeoutError(
            f"moving {name} to version {to_version} took longer than {SECONDS_TO_MOVE:.0f} s and another "
            f"command gave up on it (event {event.sequence}); look at `nst history` and try again"
        )
    return event


def roll_back(name: str, reason: str = "") -> Event:
    """Brings back the champion before the one that the history knows of. Once more: the one before that.

    Raises:
        ValueError: there is none, or it was deleted or is another model than it was; or as `move_champion`.
    """
    history = repair(name)
    champion, previous = recorded_champion(history), previous_version(history)
    if previous is None:
        nothing = f"there is nothing before version {champion}" if champion else "nothing was promoted yet"
        raise ValueError(
            f"{name} has no previous champion to bring back: {nothing}; `nst history` shows what was"
        )
    to = next((known for known in registry.list_versions(name) if known.version == previous), None)
    if to is None:
        raise ValueError(
            f"version {previous}, the champion before version {champion}, was deleted from {name}; "
            "promote another: nst promote VERSION"
        )
    digests = {event.to_version: event.to_digest for event in history if event.status == "done"}
    if digests.get(previous, to.digest) != to.digest:
        raise ValueError(f"{to} is not the model that was the champion; promote another: nst promote VERSION")
    return move_champion(name, previous, kind="rollback", grounds=Grounds(reason=reason), known=history)


def repair(name: str) -> list[Event]:
    """Completes a move that a crash left begun, or notes it as not done where the champion never moved;
    returns the history. A move younger than `SECONDS_TO_MOVE` may be under way: that is waited for."""
    history = promotion_log.events(name)
    if not history:
        return history
    event = history[-1]
    deadline = time.monotonic() + SECONDS_TO_MOVE
    while event.status == "begun" and event.age_s() < SECONDS_TO_MOVE and time.monotonic() < deadline:
        time.sleep(0.5)
        event = promotion_log.refreshed(event)
    completed = False
    if event.status == "begun":
        has_moved = _champion_alias(registry.list_versions(name)) == event.to_version
        event = promotion_log.conclude(event, "done" if has_moved else "not done")
        completed = has_moved and event.status == "done"
    return _follow_history(name, with_champion=completed)


def verify_history(name: str = registry.DEFAULT_MODEL) -> list[str]:
    """What does not add up in the history, one line each; empty when all is well.

    (Whoever can rewrite the whole database can rewrite the whole history: this is no signature.)
    """
    versions, run = _at_one_moment(name)
    problems: list[str] = []
    history: list[Event] = []
    tag = promotion_log.history_tag(name)
    if run is not None:
        history, problems = _check_entries(name, run)
        if history and versions and tag != run.info.run_id:
            problems.append(
                f"the model's tag {HISTORY_TAG!r} says {tag}, but its history is run {run.info.run_id}: "
                "altered, or the model was deleted and made anew; set the tag when you know"
            )
    elif run_id := promotion_log.history_run_id(name):
        problems.append(f"the history, run {run_id}, is gone")
    elif tag or _marks(versions):
        problems.append(f"the history is gone: no experiment {EXPERIMENT}/{name} names it")
    return [*problems, *_check_versions(versions, history), *_check_champion(versions, history)]


def _at_one_moment(name: str) -> tuple[list[RegisteredVersion], Run | None]:
    """The versions and the history, with no move in between: that would look like one by hand."""
    run = promotion_log.history_run(name)
    for _ in range(NUM_TRIES):
        versions = registry.list_versions(name, missing_ok=True)
        before, run = run, promotion_log.history_run(name)
        if run is None or (before is not None and before.data.params == run.data.params):
            return versions, run
    raise TimeoutError(_restless(name))


def _restless(name: str) -> str:
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
    last = _last_done(history)
    by_version = {event.to_version: event for event in history if event.status == "done"}
    promotions = {(event.sequence, event.digest): event.to_version for event in history}
    for version in versions:
        mark, event = _mark_of(version), by_version.get(version.version)
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


def _check_champion(versions: Sequence[RegisteredVersion], history: Sequence[Event]) -> list[str]:
    if history and history[-1].status == "begun":
        return []
    actual, recorded = _champion_alias(versions), recorded_champion(history)
    if actual == recorded:
        return []
    is_ = f"the champion is version {actual}" if actual else "there is no champion"
    says = f"the history says {recorded}" if recorded else "no promotion made it that"
    return [f"{is_}, but {says}: moved by hand"]


def _follow_history(name: str, *, with_champion: bool) -> list[Event]:
    """Points the aliases where the history says and marks the champion; every step may be repeated.

    The champion only `with_champion`: a move by hand is not undone behind the back of whoever made it. Ends
    when the history stood still meanwhile; whoever changes it comes here after, so the last one is right.
    """
    history = promotion_log.events(name)
    for _ in range(NUM_TRIES):
        _point_aliases(name, history, with_champion)
        before, history = history, promotion_log.events(name)
        if _digests(history) == _digests(before):
            return history
    raise TimeoutError(_restless(name))


def _point_aliases(name: str, history: Sequence[Event], with_champion: bool) -> None:
    versions = {version.version: version for version in registry.list_versions(name)}
    held = {alias: version.version for version in versions.values() for alias in version.aliases}
    champion, previous = recorded_champion(history), previous_version(history)
    if champion is None:  # no event was ever done: as it was found
        champion = history[-1].from_version
    if with_champion:
        _point(name, registry.CHAMPION, champion, versions, held)
    _point(name, registry.PREVIOUS, previous, versions, held)
    last = _last_done(history)
    if last is None or last.to_version not in versions:
        return
    if held.get(registry.CHALLENGER) == last.to_version:
        twice_if_refused(registry.delete_alias, name, registry.CHALLENGER)
    marked, _ = _mark_of(versions[last.to_version]) or (0, "")
    if marked < last.sequence:  # never over the mark of this event: if it differs, the event was altered
        mark = f"{last.sequence} {last.digest}"
        set_tag = tracking_server.client().set_model_version_tag
        twice_if_refused(set_tag, name, str(last.to_version), PROMOTION_TAG, mark)


def _point(
    name: str, alias: str, version: int | None, versions: Container[int | None], held: Mapping[str, int]
) -> None:
    if version is not None and version in versions:
        if held.get(alias) != version:
            twice_if_refused(registry.set_alias, name, alias, version)
    elif alias in held:
        twice_if_refused(registry.delete_alias, name, alias)


def _champion_alias(versions: Sequence[RegisteredVersion]) -> int | None:
    return next((version.version for version in versions if registry.CHAMPION in version.aliases), None)


def _last_done(history: Sequence[Event]) -> Event | None:
    return next((event for event in reversed(history) if event.status == "done"), None)


def _digests(history: Sequence[Event | None]) -> list[str]:
    """What makes two histories the same (figures may be NaN, which equals nothing)."""
    return [event.digest for event in history if event is not None]


def _marks(versions: Sequence[RegisteredVersion]) -> dict[int, tuple[int, str]]:
    """version -> its mark."""
    return {version.version: mark for version in versions if (mark := _mark_of(version))}


def _mark_of(version: RegisteredVersion) -> tuple[int, str] | None:
    """Number and digest of the event that made it the champion last; None without a (readable) mark."""
    number, _, digest = version.tags.get(PROMOTION_TAG, "").partition(" ")
    return (int(number), digest) if number.isdecimal() else None
