"""Who is the champion: the move itself, and the way back.

The history (infra/promotion_log.py) is the truth and the aliases follow it. An event is written before the
champion moves, and its outcome after: both once only. So of two that move the champion at once one is
refused; what a crash left half done is completed, or noted as not done, by the next command; and a process
that was so slow that others gave up on it finds that out, and puts the champion back. Nothing moves on a
history that does not add up (infra/promotion_history.py) unless it is forced.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Container, Mapping, Sequence

from infra import promotion_history, promotion_log, registry, tracking_server
from infra.printable import printable
from infra.promotion_history import (
    NUM_TRIES,
    PROMOTION_TAG,
    at_one_moment,
    champion_alias,
    digests_of,
    finding,
    last_concluded,
    last_done,
    mark_of,
    marks_of,
    previous_version,
    recorded_champion,
    restless,
    verify_history,
)
from infra.promotion_log import Event, Grounds, Kind, Overtaken, twice_if_refused

__all__ = [
    "Event",
    "Grounds",
    "Overtaken",
    "check_grounds",
    "doubts",
    "events",
    "finding",
    "last_concluded",
    "move_champion",
    "moved_by_hand",
    "previous_version",
    "recorded_champion",
    "repair",
    "require_sound",
    "roll_back",
    "verify_history",
]

MAX_REASON_CHARACTERS = 500
SECONDS_TO_MOVE = 15.0  # others wait that long for the outcome of an event, and then give up on it
SECONDS_TO_START = 10.0  # who has not moved the alias by then leaves it: others may be about to give up


def events(name: str = registry.DEFAULT_MODEL) -> list[Event]:
    """The events of the model `name` that can be read; `verify_history` names the others."""
    return promotion_log.events(name)


def doubts(name: str) -> list[str]:
    """What was altered in the history or is missing, but for what a forced move took upon itself already. A
    champion that was moved by hand is none of it."""
    return promotion_history.not_noted(*promotion_history.examine(at_one_moment(name)))


def require_sound(name: str, problems: Sequence[str]) -> None:
    """Raises OSError, naming the first, if there are `problems` (as `doubts` gives them)."""
    if problems:
        more = f" (and {len(problems) - 1} more: `nst history`)" if len(problems) > 1 else ""
        raise OSError(
            f"the history of {name} does not add up: {problems[0]}{more}; mend it, or move the champion "
            "all the same with --force --reason TEXT, which the history will show"
        )


def moved_by_hand(name: str, history: Sequence[Event]) -> str | None:
    """One line if the alias is not where `history` says; None if it is, or if no event says anything."""
    if recorded_champion(history) is None:
        return None
    versions = registry.list_versions(name)
    return next(iter(promotion_history.check_champion(versions, history)), None)


def check_grounds(grounds: Grounds) -> None:
    """Raises ValueError for a reason that is too long or more than plain text, and for more findings than an
    event keeps."""
    reason = grounds.reason
    if len(reason) > MAX_REASON_CHARACTERS:
        raise ValueError(f"the reason has {len(reason)} characters; {MAX_REASON_CHARACTERS} are kept")
    if printable(reason) != reason:
        raise ValueError(
            f"the reason is '{printable(reason)}': it holds line breaks or other control characters; write "
            "one line of plain text"
        )
    promotion_log.check_length(grounds)


def move_champion(
    name: str,
    to_version: int,
    *,
    kind: Kind,
    grounds: Grounds,
    known: Sequence[Event] | None = None,
    force: bool = False,
) -> Event:
    """Makes `to_version` the champion; appends the event.

    The alias `champion` moves in one step and is never missing. A crash anywhere in here is repaired by the
    next call, or by `repair`.

    Args:
        known: the history that the decision was based on.
        force: also on a history that does not add up; what is wrong with it joins the event's findings.

    Raises:
        ValueError: `check_grounds` says no, or `to_version` is the champion already.
        Overtaken: somebody else moves the champion at this moment, or has moved it since `known`.
        OSError: the history does not add up, and no `force`.
        TimeoutError: this process was too slow; the champion is what the history says.
    """
    check_grounds(grounds)
    repair(name)
    moment = at_one_moment(name)
    history, problems = promotion_history.examine(moment)
    problems = promotion_history.not_noted(history, problems)
    if history and history[-1].status == "begun":
        raise Overtaken(promotion_log.under_way(history[-1]))
    other = last_done(history)
    if known is not None and other is not None and digests_of([other]) != digests_of([last_done(known)]):
        raise Overtaken(
            f"{other.who} has moved {name} to version {other.to_version} meanwhile (event {other.sequence}); "
            "look at `nst history` and try again"
        )
    if not force:
        require_sound(name, problems)
    elif problems:
        findings = (*grounds.findings, *(finding("NO", problem) for problem in problems))
        grounds = dataclasses.replace(grounds, is_forced=True, findings=findings)
        check_grounds(grounds)
    to = registry.get_version(name, to_version)
    found, recorded = champion_alias(moment.versions), recorded_champion(history)
    if found == recorded == to_version:
        raise ValueError(f"{to} is the champion already")
    # Where the last events were removed or altered, the versions know better, and that stays visible; the
    # number of one that cannot be read is taken.
    digests = dict.fromkeys(promotion_log.entry_numbers(moment.run) if moment.run else (), "")
    digests |= {event.sequence: event.digest for event in history} | dict(marks_of(moment.versions).values())
    started = time.monotonic()
    event = promotion_log.append(
        name,
        kind=kind,
        from_version=found,
        recorded_version=recorded,
        to=to,
        grounds=grounds,
        after=max(digests.items(), default=(0, "")),
    )
    # By now another might have given up on us. (Between this look and the alias nothing can be locked.)
    is_late = promotion_log.refreshed(event).status == "not done"
    if is_late or time.monotonic() - started > SECONDS_TO_START:
        event = promotion_log.conclude(event, "not done")
    else:
        twice_if_refused(registry.set_alias, name, registry.CHAMPION, to_version)
        event = promotion_log.conclude(event, "done")
    _follow_history(name, with_champion=True)
    if event.status != "done":
        raise TimeoutError(
            f"moving {name} to version {to_version} took too long and was given up (event "
            f"{event.sequence}); look at `nst history` and try again"
        )
    return event


def roll_back(name: str, reason: str = "", *, force: bool = False, findings: tuple[str, ...] = ()) -> Event:
    """Brings back the champion before the one that the history knows of. Once more: the one before that.

    Args:
        force: also on a history that does not add up.
        findings: what was found, or not looked at, for this; with `force` the event shows it.

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
    grounds = Grounds(reason=reason, is_forced=force, findings=findings)
    return move_champion(name, previous, kind="rollback", grounds=grounds, known=history, force=force)


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
        has_moved = champion_alias(registry.list_versions(name)) == event.to_version
        event = promotion_log.conclude(event, "done" if has_moved else "not done")
        completed = has_moved and event.status == "done"
    return _follow_history(name, with_champion=completed)


def _follow_history(name: str, *, with_champion: bool) -> list[Event]:
    """Points the aliases where the history says and marks the champion; every step may be repeated.

    The champion only `with_champion`: a move by hand is not undone behind the back of whoever made it. Ends
    when the history stood still meanwhile; whoever changes it comes here after, so the last one is right.
    """
    history = promotion_log.events(name)
    for _ in range(NUM_TRIES):
        _point_aliases(name, history, with_champion)
        before, history = history, promotion_log.events(name)
        if digests_of(history) == digests_of(before):
            return history
    raise TimeoutError(restless(name))


def _point_aliases(name: str, history: Sequence[Event], with_champion: bool) -> None:
    versions = {version.version: version for version in registry.list_versions(name)}
    held = {alias: version.version for version in versions.values() for alias in version.aliases}
    champion, previous = recorded_champion(history), previous_version(history)
    if champion is None:  # no event was ever done: as it was found
        champion = history[-1].from_version
    if with_champion:
        _point(name, registry.CHAMPION, champion, versions, held)
    _point(name, registry.PREVIOUS, previous, versions, held)
    last = last_done(history)
    if last is None or last.to_version not in versions:
        return
    if held.get(registry.CHALLENGER) == last.to_version:
        twice_if_refused(registry.delete_alias, name, registry.CHALLENGER)
    marked, _ = mark_of(versions[last.to_version]) or (0, "")
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
