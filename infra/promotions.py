"""The history of a registered model's champion: events that are only ever appended, and the move itself.

Each event is an MLflow run in the experiment `nst-promotions`. It is written before the aliases move, so that
whatever a crash left half done is completed, or noted as not done, by the next command. Each holds the digest
of the one before: an event that is altered, removed or slipped in shows in `verify_history`. (Whoever can
rewrite the whole database can rewrite the whole chain; this is no signature.)
"""

from __future__ import annotations

import dataclasses
import datetime
import getpass
import hashlib
import json
import os
import socket
import time
from dataclasses import dataclass
from typing import Any, Literal

from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from infra import registry, tracking_server

EXPERIMENT = "nst-promotions"
EVENT_TAG, DIGEST_TAG, MODEL_TAG, HEAD_TAG = "nst.event", "nst.digest", "nst.model", "history_head"
MAX_EVENT_CHARACTERS = 7500  # MLflow cuts a run's tag at 8000
MAX_REASON_CHARACTERS = 500
SECONDS_TO_MOVE = 15.0

Kind = Literal["promote", "rollback"]
Status = Literal["done", "begun", "not done"]
STATUS_OF_RUN: dict[str, Status] = {"FINISHED": "done", "RUNNING": "begun"}


@dataclass(frozen=True, kw_only=True)
class Grounds:
    """Why a version becomes the champion. `findings` is one line a rule of the gate; `figures` are the means
    that it looked at."""

    reason: str = ""
    gate: str = ""
    gate_digest: str = ""
    is_forced: bool = False
    findings: tuple[str, ...] = ()
    figures: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Event:
    """One move of the champion alias. `at` is an ISO time in UTC."""

    model: str
    sequence: int
    kind: Kind
    from_version: int | None
    to_version: int
    to_digest: str | None
    at: str
    who: str
    grounds: Grounds
    previous_digest: str
    digest: str
    status: Status
    run_id: str

    def age_s(self) -> float:
        began = datetime.datetime.fromisoformat(self.at)
        return (datetime.datetime.now(datetime.UTC) - began).total_seconds()


def events(name: str = registry.DEFAULT_MODEL) -> list[Event]:
    """The history of the model `name`, the oldest event first."""
    registry.check_name(name)
    client = tracking_server.client()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(
            [experiment.experiment_id], f"tags.`{MODEL_TAG}` = '{name}'", page_token=token
        )
        runs += page
        token = page.token
        if not token:
            break
    return sorted(
        (_event_of(run) for run in runs), key=lambda event: (event.sequence, event.at, event.run_id)
    )


def move_champion(name: str, to_version: int, *, kind: Kind, grounds: Grounds) -> Event:
    """Makes `to_version` the champion and the champion before it `previous`; appends the event.

    The alias `champion` moves in one step and is never missing. A crash anywhere in here is repaired by the
    next call, or by `repair`.

    Raises:
        ValueError: the reason is too long, `to_version` is the champion already, or somebody else moves the
            champion at this moment.
    """
    if len(grounds.reason) > MAX_REASON_CHARACTERS:
        raise ValueError(f"the reason has {len(grounds.reason)} characters; {MAX_REASON_CHARACTERS} are kept")
    repair(name)
    client = tracking_server.client()
    champion = registry.champion(name)
    to = registry.get_version(name, to_version)
    if champion is not None and champion.version == to_version:
        raise ValueError(f"{to} is the champion already")
    event = _append(client, name, kind, champion.version if champion else None, to, grounds)
    registry.set_alias(name, registry.CHAMPION, to_version)
    return _complete(client, event)


def repair(name: str) -> None:
    """Completes events that a crash left begun, or notes them as not done where the champion never moved."""
    client = tracking_server.client()
    for event in events(name):
        deadline = time.monotonic() + SECONDS_TO_MOVE
        while event.status == "begun" and event.age_s() < SECONDS_TO_MOVE and time.monotonic() < deadline:
            time.sleep(0.5)  # it may be somebody else's, under way
            event = _event_of(client.get_run(event.run_id))
        if event.status != "begun":
            continue
        champion = registry.champion(name)
        if champion is not None and champion.version == event.to_version:
            _complete(client, event)
        else:
            client.set_terminated(event.run_id, status="FAILED")


def verify_history(name: str = registry.DEFAULT_MODEL) -> list[str]:
    """What does not add up in the history, one line each; empty when all is well."""
    client = tracking_server.client()
    found = events(name)
    problems: list[str] = []
    digest = ""
    for number, event in enumerate(found, start=1):
        if event.sequence != number:
            problems.append(
                f"event {number} is missing or doubled: event {event.sequence} stands in its place"
            )
            break
        if _digest_of(_body_of(event)) != event.digest:
            problems.append(f"event {number} was altered after it was written")
        if event.previous_digest != digest:
            problems.append(f"event {number} does not follow from the event before it")
        digest = event.digest
    head_sequence, head_digest = _head(client, name)
    if head_sequence > len(found):
        problems.append(f"{head_sequence - len(found)} event(s) after event {len(found)} are missing")
    elif not problems and head_sequence and found[head_sequence - 1].digest != head_digest:
        problems.append(f"event {head_sequence} is not the one that was written")
    done = [event for event in found if event.status == "done"]
    champion = registry.champion(name)
    if not any(event.status == "begun" for event in found):
        expected = done[-1].to_version if done else None
        actual = champion.version if champion else None
        if actual != expected:
            problems.append(
                f"the champion is version {actual}, but the history says {expected}: moved by hand"
            )
    return problems


def _append(
    client: MlflowClient,
    name: str,
    kind: Kind,
    from_version: int | None,
    to: registry.RegisteredVersion,
    grounds: Grounds,
) -> Event:
    known = events(name)
    head_sequence, head_digest = _head(client, name)
    # Where the last events were removed, the gap must stay visible.
    last = max([(event.sequence, event.digest) for event in known] + [(head_sequence, head_digest)])
    body = {
        "model": name,
        "sequence": last[0] + 1,
        "kind": kind,
        "from_version": from_version,
        "to_version": to.version,
        "to_digest": to.digest,
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "who": _who(),
        "grounds": dataclasses.asdict(grounds),
        "previous_digest": last[1],
    }
    text = json.dumps(body, sort_keys=True)
    if len(text) > MAX_EVENT_CHARACTERS:
        raise ValueError(
            f"the gate has {len(grounds.findings)} rules, more than an event can hold; use fewer"
        )
    run = client.create_run(
        tracking_server.experiment_id(client, EXPERIMENT),
        run_name=f"{name} {body['sequence']}: {kind} {to.version}",
        tags={MODEL_TAG: name, EVENT_TAG: text, DIGEST_TAG: _digest_of(text)},
    )
    event = _event_of(run)
    rivals = [other for other in events(name) if other.sequence == event.sequence]
    if rivals[0].run_id != event.run_id:
        client.delete_run(event.run_id)
        raise ValueError(
            f"{rivals[0].who} is moving {name} to version {rivals[0].to_version} at this moment; "
            "look at `nst history` and try again"
        )
    client.set_registered_model_tag(name, HEAD_TAG, f"{event.sequence} {event.digest}")
    return event


def _complete(client: MlflowClient, event: Event) -> Event:
    """All that follows the move of the champion; every step may be repeated."""
    client.set_registered_model_tag(event.model, HEAD_TAG, f"{event.sequence} {event.digest}")
    if event.from_version is not None and event.from_version != event.to_version:
        registry.set_alias(event.model, registry.PREVIOUS, event.from_version)
    challenger = registry.with_alias(event.model, registry.CHALLENGER)
    if challenger is not None and challenger.version == event.to_version:
        registry.delete_alias(event.model, registry.CHALLENGER)
    now = int(time.time() * 1000)
    figures = [Metric(key, value, now, 0) for key, value in event.grounds.figures.items()]
    client.log_batch(event.run_id, metrics=figures)
    client.set_terminated(event.run_id)
    return dataclasses.replace(event, status="done")


def _event_of(run: Run) -> Event:
    text = run.data.tags[EVENT_TAG]
    try:
        body: dict[str, Any] = json.loads(text)
        grounds = body.pop("grounds")
        grounds["findings"] = tuple(grounds["findings"])
        return Event(
            grounds=Grounds(**grounds),
            **body,
            digest=run.data.tags[DIGEST_TAG],
            status=STATUS_OF_RUN.get(run.info.status, "not done"),
            run_id=run.info.run_id,
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise OSError(f"the promotion event in run {run.info.run_id} cannot be read ({error})") from error


def _body_of(event: Event) -> str:
    values = dataclasses.asdict(event)
    for key in ("digest", "status", "run_id"):
        del values[key]
    return json.dumps(values, sort_keys=True)


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _head(client: MlflowClient, name: str) -> tuple[int, str]:
    """Number and digest of the last event, as the registered model remembers them; (0, "") at first."""
    try:
        tag = client.get_registered_model(name).tags.get(HEAD_TAG, "0 ")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        tag = "0 "
    sequence, _, digest = tag.partition(" ")
    return int(sequence), digest


def _who() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        user = f"uid-{os.getuid()}"
    return f"{user}@{socket.gethostname()}"
