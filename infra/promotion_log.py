"""The log behind a champion's history: numbered entries that are written once, by whoever comes first.

It stands on what MLflow's database guarantees. A parameter of a run cannot get another value: its primary key
decides between two that write at once, whichever server, worker or clock they have. So each registered model
has one run, its history, in the experiment `nst-promotions`; entry 7 is the parameter `event-000007`, and
what became of it is `outcome-000007`.

Which run that is must be settled the same way, for two may make one at once, and a model made by hand has
none. Of all that MLflow names, only an experiment is both unique by its name and created together with its
tags: the empty experiment `nst-promotions/MODEL` holds the run's id, and that counts; the registered model's
tag `history` says the same to people, and to `verify_history`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import getpass
import hashlib
import json
import os
import re
import secrets
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlflow.entities import LifecycleStage, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from infra import registry, tracking_server
from infra.printable import printable
from infra.registry import RegisteredVersion

EXPERIMENT = "nst-promotions"
HISTORY_TAG = "history"
# MLflow cuts a parameter at 6000 characters, and says nothing; of an event the rest takes less than 1000.
MAX_GROUNDS_CHARACTERS = 5000
MAX_WHO_CHARACTERS = 100
ENTRY = re.compile(r"(event|outcome)-(\d{6,})")

Kind = Literal["promote", "rollback"]
Outcome = Literal["done", "not done"]
Status = Literal["done", "begun", "not done"]


class Overtaken(OSError):
    """Somebody else moves the champion, or has moved it meanwhile: nothing is wrong, try again."""


@dataclass(frozen=True, kw_only=True)
class Grounds:
    """Why a version becomes the champion.

    Args:
        is_forced: something stood against it, or was not looked at.
        findings: one line each: "ok", "NO" or "--" (not checked), and what.
        figures: the means that the gate looked at.
        evaluation: digest of the evaluation that counted.
        evaluation_set: digest of what it was measured on.
    """

    reason: str = ""
    gate: str = ""
    gate_digest: str = ""
    is_forced: bool = False
    findings: tuple[str, ...] = ()
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    evaluation: str = ""
    evaluation_set: str = ""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One move of the champion alias.

    Args:
        from_version: the champion that was found.
        recorded_version: the champion that the history knew of.
        at: ISO time in UTC.
        attempt: tells this event from one with the same content; two equal values would be no conflict.
        digest: of this event and its outcome; the next event holds it as `previous_digest`.
    """

    model: str
    sequence: int
    kind: Kind
    from_version: int | None
    recorded_version: int | None
    to_version: int
    to_digest: str | None
    at: str
    who: str
    grounds: Grounds
    attempt: str
    previous_digest: str
    digest: str
    status: Status
    run_id: str

    @property
    def was_moved_by_hand(self) -> bool:
        """Somebody had moved the champion past the history before this event."""
        return self.from_version != self.recorded_version

    def age_s(self) -> float:
        began = datetime.datetime.fromisoformat(self.at)
        return (datetime.datetime.now(datetime.UTC) - began).total_seconds()


def events(name: str) -> list[Event]:
    """The events of the model `name` that can be read, the oldest first."""
    found: list[Event] = []
    if (run := history_run(name)) is not None:
        for number in entry_numbers(run):
            with contextlib.suppress(OSError):
                found.append(read_event(run, number))
    return found


def history_run(name: str) -> Run | None:
    """The run that holds the history of the model `name`, be it deleted; None where there is none."""
    run_id = history_run_id(name)
    return None if run_id is None else _run_of(run_id)


def _run_of(run_id: str) -> Run | None:
    try:
        return tracking_server.client().get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def history_run_id(name: str) -> str | None:
    """What the experiment `nst-promotions/NAME` says."""
    registry.check_name(name)
    experiment = tracking_server.client().get_experiment_by_name(f"{EXPERIMENT}/{name}")
    return None if experiment is None else experiment.tags.get(HISTORY_TAG)


def history_tag(name: str) -> str | None:
    """What the registered model itself says: nothing is decided by it, for tags may be overwritten."""
    try:
        return tracking_server.client().get_registered_model(name).tags.get(HISTORY_TAG)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def entry_numbers(run: Run) -> list[int]:
    """The numbers of events and of outcomes."""
    return sorted({int(match[2]) for key in run.data.params if (match := ENTRY.fullmatch(key))})


def event_key(number: int) -> str:
    return f"event-{number:06d}"


def outcome_key(number: int) -> str:
    return f"outcome-{number:06d}"


def read_event(run: Run, number: int) -> Event:
    """Event `number` of a history.

    Raises:
        OSError: it is missing or cannot be read.
    """
    params: Mapping[str, str] = run.data.params
    text, status = params.get(event_key(number), ""), params.get(outcome_key(number), "begun")
    try:
        if status not in ("begun", "done", "not done"):
            raise ValueError(f"its outcome is {status!r}")
        body: dict[str, Any] = json.loads(text)
        grounds = body.pop("grounds")
        return Event(
            grounds=Grounds(**{**grounds, "findings": tuple(grounds["findings"])}),
            **body,
            digest=_digest_of(text, status),
            status=status,
            run_id=run.info.run_id,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"event {number} in run {run.info.run_id} cannot be read ({error})") from error


def check_length(grounds: Grounds) -> None:
    """Raises ValueError if an event cannot hold so much."""
    length = len(_json(dataclasses.asdict(grounds)))
    if length > MAX_GROUNDS_CHARACTERS:
        raise ValueError(
            f"reason and findings have {length} characters and an event keeps {MAX_GROUNDS_CHARACTERS}; "
            f"shorten the reason, or use a gate of fewer rules than {len(grounds.findings)}"
        )


def append(
    name: str,
    *,
    kind: Kind,
    from_version: int | None,
    recorded_version: int | None,
    to: RegisteredVersion,
    grounds: Grounds,
    after: tuple[int, str],
) -> Event:
    """Writes the event that follows the one with the number and digest `after` ((0, "") at first).

    Raises:
        Overtaken: another event has that number already.
        ValueError: the history was deleted.
    """
    sequence = after[0] + 1
    body = {
        "model": name,
        "sequence": sequence,
        "kind": kind,
        "from_version": from_version,
        "recorded_version": recorded_version,
        "to_version": to.version,
        "to_digest": to.digest,
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "who": _who(),
        "grounds": dataclasses.asdict(grounds),
        "attempt": secrets.token_hex(8),
        "previous_digest": after[1],
    }
    text = _json(body)
    client = tracking_server.client()
    run_id = _ensure_history(client, name)
    if not _write_once(client, run_id, event_key(sequence), text):
        raise Overtaken(under_way(read_event(client.get_run(run_id), sequence)))
    return read_event(client.get_run(run_id), sequence)


def conclude(event: Event, outcome: Outcome) -> Event:
    """Notes the outcome of `event`, unless it has one; returns the event with the one that counts."""
    client = tracking_server.client()
    _write_once(client, event.run_id, outcome_key(event.sequence), outcome)
    return refreshed(event)


def refreshed(event: Event) -> Event:
    """`event` as it is now."""
    return read_event(tracking_server.client().get_run(event.run_id), event.sequence)


def under_way(event: Event) -> str:
    return (
        f"{event.who} is moving {event.model} to version {event.to_version} at this moment (event "
        f"{event.sequence}); look at `nst history` and try again"
    )


def twice_if_refused(write: Callable[..., object], *arguments: object) -> None:
    """Writes a tag or an alias. Of two that write one for the first time MLflow refuses one as a duplicate;
    the second time it finds the row and updates it."""
    try:
        write(*arguments)
    except MlflowException as error:
        if error.error_code != "BAD_REQUEST":
            raise
        write(*arguments)


def _write_once(client: MlflowClient, run_id: str, key: str, value: str) -> bool:
    """Whether `key` has got this value. (`log_batch` would not tell a lost race from a broken database.)"""
    try:
        client.log_param(run_id, key, value)
        return True
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE" or key not in client.get_run(run_id).data.params:
            raise
        return False


def _ensure_history(client: MlflowClient, name: str) -> str:
    """The id of the run to write to; made where the model has none."""
    run_id = history_run_id(name) or _create_history(client, name)
    run = _run_of(run_id)
    if run is None:
        where = tracking_server.shown(tracking_server.tracking_uri())
        raise ValueError(
            f"the history of {name}, run {run_id}, is gone from MLflow at {where}: restore its database, or "
            f"rename the experiment {EXPERIMENT}/{name} to begin another history, which will show the gap"
        )
    if run.info.lifecycle_stage == LifecycleStage.DELETED:
        raise ValueError(
            f"the history of {name} was deleted: run `mlflow runs restore --run-id {run_id}` (and restore "
            f"the experiment {EXPERIMENT}, if that is deleted)"
        )
    if not entry_numbers(run):  # also if the process that made the run ended here
        twice_if_refused(client.set_registered_model_tag, name, HISTORY_TAG, run_id)
    return run_id


def _create_history(client: MlflowClient, name: str) -> str:
    run = client.create_run(
        tracking_server.experiment_id(client, EXPERIMENT),
        run_name=f"history of {name}",
        tags={"nst.kind": "history", "nst.model": name},
    )
    own_id = run.info.run_id
    client.set_terminated(own_id)  # else it would look like a training that still runs
    try:
        client.create_experiment(
            f"{EXPERIMENT}/{name}",
            tags={
                HISTORY_TAG: own_id,
                "mlflow.note.content": f"Names the run that is the history of {name}.",
            },
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    run_id = history_run_id(name)
    if run_id != own_id:
        client.delete_run(own_id)  # another process was faster
    if run_id is None:
        raise ValueError(
            f"the experiment {EXPERIMENT}/{name} lost its tag {HISTORY_TAG!r}, the id of the run that is the "
            f"history of {name}: set it again"
        )
    return run_id


def _digest_of(text: str, status: str) -> str:
    return hashlib.sha256(f"{text}\n{status}".encode()).hexdigest()


def _json(values: Mapping[str, Any]) -> str:
    # Escapes would make a reason in Cyrillic six times as long.
    return json.dumps(values, sort_keys=True, ensure_ascii=False)


def _who() -> str:
    """A note, and no proof of identity: the name comes from the environment (LOGNAME)."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        user = f"uid-{os.getuid()}"
    return printable(f"{user}@{socket.gethostname()}")[:MAX_WHO_CHARACTERS]
