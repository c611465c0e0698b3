"""`nst promote`, `nst rollback`: which version is the champion."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan
from typing import Any

import click

from infra import evaluations, promotions, registry, tracking_server
from infra.printable import printable
from infra.promotions import Event, Grounds
from infra.registry import RegisteredVersion
from pipelines.console import GateRefused, Stage, StageFailed, say
from pipelines.gate import Finding, Gate, load_gate
from pipelines.models import resolve_model

model_option = click.option(
    "--model", "model_name", default=registry.DEFAULT_MODEL, show_default=True, help="The registered model."
)
reason_option = click.option("--reason", default="", metavar="TEXT", help="One line, kept in the history.")


@click.command(cls=Stage)
@click.argument("version")
@model_option
@click.option(
    "--gate", "gate_path", metavar="FILE.toml", help="Rules to check; left out: those of this package."
)
@click.option("--dry-run", is_flag=True, help="Check only; nothing moves.")
@click.option("--force", is_flag=True, help="Promote in spite of the gate; needs --reason, and is recorded.")
@reason_option
@tracking_server.outages_told("the same command completes what was begun")
def promote(
    version: str, model_name: str, gate_path: str | None, dry_run: bool, force: bool, reason: str
) -> dict[str, Any]:
    """Make VERSION the champion, if the gate agrees.

    VERSION is a number or an alias. It must have been evaluated with `nst evaluate`; its figures are held
    against the gate's rules: fixed limits, the baselines of the same evaluation, and the figures of the same
    pairs of the champion that the history knows of. Exit code 3: the gate said no.

    With --force nothing of that stands in the way, nor a history that does not add up or a champion that was
    moved by hand; what there was to say, and what could not be checked, is kept in the history.

    \b
    Examples:
      nst promote challenger --dry-run
      nst promote 4 --reason "trained on the new corpus"
      nst promote 4 --force --reason "4 holds the fix for portraits; figures to follow"
    """
    reason = _checked_reason(reason, force)
    tracking_server.check()
    gate = load_gate(gate_path)
    candidate = _candidate(version, model_name)
    doubts = promotions.doubts(model_name)
    if not (force or dry_run):
        promotions.require_sound(model_name, doubts)
    known = promotions.events(model_name) if dry_run else promotions.repair(model_name)
    in_use, recorded = registry.champion(model_name), promotions.recorded_champion(known)
    by_hand = promotions.moved_by_hand(model_name, known)
    result: dict[str, Any] = {
        "model": model_name,
        "version": candidate.version,
        "champion": in_use.version if in_use else None,
        "promoted": False,
        "problems": [*doubts, *([by_hand] if by_hand else [])],
    }
    for problem in result["problems"]:
        say(f"  NO  {printable(problem)}")
    if candidate.version == recorded and not by_hand:
        say(f"{candidate} is the champion already")
        return result
    if by_hand and candidate.version != recorded and not (force or dry_run):
        raise ValueError(
            f"{by_hand}; `nst promote {recorded}` puts that back, `nst rollback` brings back the one "
            f"before, and --force --reason TEXT promotes {candidate} all the same"
        )
    evaluation, findings, unchecked = _examine(
        candidate, recorded or (in_use and in_use.version), gate, force
    )
    failed = [finding for finding in findings if not finding.passed]
    result["findings"] = [{"passed": finding.passed, "text": str(finding)} for finding in findings]
    result["unchecked"] = unchecked
    for finding in findings:
        say(f"  {'ok' if finding.passed else 'NO'}  {printable(str(finding))}")
    for text in unchecked:
        say(f"  --  {printable(text)}")
    if failed and not force:
        raise GateRefused(
            f"{candidate} is not promoted, {gate.name} refuses {len(failed)} of {len(findings)}: "
            + "; ".join(str(finding) for finding in failed),
            result,
        )
    grounds = Grounds(
        reason=reason,
        gate=gate.name,
        gate_digest=gate.digest,
        evaluation=evaluations.evaluation_digest(evaluation) if evaluation else "",
        evaluation_set=evaluations.evaluation_set_digest(evaluation) if evaluation else "",
        is_forced=force and bool(failed or unchecked or by_hand),
        findings=(
            *(promotions.finding("NO", problem) for problem in (by_hand,) if problem),
            *(promotions.finding("ok" if found.passed else "NO", found.comparison) for found in findings),
            *(promotions.finding("--", text) for text in unchecked),
        ),
        figures={finding.rule.measure: finding.value for finding in findings if not isnan(finding.value)},
    )
    promotions.check_grounds(grounds)  # before the checkpoint is fetched, and in a dry run too
    resolve_model(str(candidate))  # is it what was registered and measured, and does it still draw the same?
    if dry_run:
        say(f"{candidate} would become the champion{_after(in_use)}; nothing was changed (--dry-run)")
        return result
    event = promotions.move_champion(
        model_name, candidate.version, kind="promote", grounds=grounds, known=known, force=force
    )
    say(f"{candidate} is the champion{_after(in_use)}{' (forced)' if event.grounds.is_forced else ''}")
    say(_event_line(event))
    return {**result, "promoted": True, "forced": event.grounds.is_forced, "event": event.digest}


def _checked_reason(reason: str, force: bool) -> str:
    reason = reason.strip()
    if force and not reason:
        raise ValueError("--force needs a --reason: it is all that the history will have to go by")
    promotions.check_grounds(Grounds(reason=reason))
    return reason


def _candidate(version: str, model_name: str) -> RegisteredVersion:
    if version.isdecimal():
        return registry.get_version(model_name, int(version))
    return registry.resolve(f"models:/{model_name}@{version}")


def _examine(
    candidate: RegisteredVersion, champion: int | None, gate: Gate, force: bool
) -> tuple[dict[str, Any] | None, list[Finding], list[str]]:
    """The candidate's evaluation, what the gate finds, and with `force` what could not be checked and why:
    that the champion's figures are missing takes nothing from the other rules."""
    found, findings = None, []
    try:
        found = _evaluation_of(candidate, gate)
        findings = gate.check(found, None)
        if champion is not None and gate.champion_measures:
            of_set = evaluations.evaluation_set_digest(found)
            reference = registry.get_version(candidate.name, champion)
            findings = gate.check(found, _evaluation_of(reference, gate, of_set))
    except (ValueError, OSError) as error:
        if not force:
            raise
        rules = f"{', '.join(gate.champion_measures)} of the champion" if findings else "the gate's rules"
        return found, findings, [f"not checked: {rules}: {error}"]
    return found, findings, []


def _evaluation_of(version: RegisteredVersion, gate: Gate, of_set: str | None = None) -> dict[str, Any]:
    """The latest; with `of_set` the latest on that set, if there is one."""
    found = evaluations.evaluation(version, of_set=of_set) if of_set else None
    found = found or evaluations.evaluation(version)
    if found is None:
        raise ValueError(
            f"{version} was not evaluated; run: "
            f"nst evaluate {version} --content CORPUS --style CORPUS --report DIR"
        )
    if found["model_digest"] != version.digest:
        raise ValueError(f"the evaluation recorded for {version} is of another model; evaluate it again")
    if gate.held_out:
        _require_unseen(version, found)
    return found


def _require_unseen(version: RegisteredVersion, evaluation: Mapping[str, Any]) -> None:
    """Raises ValueError if the version was trained on pictures that it was measured on, or if that cannot be
    told."""
    seen = evaluation.get("seen")
    if seen is None:
        raise ValueError(
            f"the evaluation of {version} does not say what it was trained on; evaluate it again"
        )
    if seen["unknown"]:
        raise ValueError(
            f"it cannot be told whether {version} was trained on the pictures that it was evaluated on: "
            f"{seen['unknown']}; evaluate it where the corpora of its training can be read, or write "
            "held_out = false into a gate of your own"
        )
    if seen["pictures"]:
        raise ValueError(
            f"{version} was evaluated on pictures that it was trained on: {seen['content']} contents and "
            f"{seen['style']} styles; {seen['pictures'][0]}; evaluate it on pictures that it never saw, or "
            "write held_out = false into a gate of your own"
        )


def _after(champion: RegisteredVersion | None) -> str:
    return f" in place of version {champion.version}" if champion else ", the first one"


def _event_line(event: Event) -> str:
    return f"event {event.sequence}, digest {event.digest}"


@click.command(cls=Stage)
@model_option
@click.option(
    "--force", is_flag=True, help="Do not look at the version first; needs --reason, and is recorded."
)
@reason_option
@tracking_server.outages_told("the same command completes what was begun")
def rollback(model_name: str, force: bool, reason: str) -> dict[str, Any]:
    """Bring the previous champion back.

    No gate is asked. Each rollback takes one promotion back: after 1, 2 and 3 were promoted, the first brings
    2 back and the second 1. What was rolled back can be promoted again.

    The version is fetched first, and must draw here what it drew when it was registered. With --force it is
    not even fetched (for another PyTorch than then, or a machine that does not reach the bucket), and a
    history that does not add up is no obstacle.

    \b
    Examples:
      nst rollback --reason "4 smears faces"
      nst rollback --force --reason "4 smears faces; the bucket is not reached from here"
    """
    reason = _checked_reason(reason, force)
    tracking_server.check()
    registry.list_versions(model_name)  # says so if there is no such model
    if not force:
        promotions.require_sound(model_name, promotions.doubts(model_name))
    target = promotions.previous_version(promotions.repair(model_name))
    unchecked: tuple[str, ...] = ()
    if target is not None and force:
        unchecked = (
            promotions.finding("--", f"not checked: the files of version {target}, and what it draws"),
        )
    elif target is not None:
        _require_usable(f"models:/{model_name}/{target}")
    event = promotions.roll_back(model_name, reason, force=force, findings=unchecked)
    before = promotions.previous_version(promotions.events(model_name))
    if event.was_moved_by_hand:
        say(
            f"the champion had been moved by hand to {event.from_version or 'nothing'}; "
            f"by the history it was {event.recorded_version}"
        )
    say(f"models:/{model_name}/{event.to_version} is the champion again in place of {event.from_version}")
    say(f"another rollback would bring {before} back" if before else "no champion came before it")
    say(_event_line(event))
    return {
        "model": model_name,
        "version": event.to_version,
        "rolled_back": event.from_version,
        "previous": before,
        "forced": event.grounds.is_forced,
        "event": event.digest,
    }


def _require_usable(model_uri: str) -> None:
    """Out of the frying pan, but not into the fire: raises StageFailed for a version that cannot be had, or
    draws something else here."""
    try:
        resolve_model(model_uri)
    except (OSError, ValueError) as error:
        raise StageFailed(
            f"{error}; `nst rollback --force --reason TEXT` brings it back without that check"
        ) from error


if __name__ == "__main__":
    promote()
