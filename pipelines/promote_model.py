"""`nst promote`, `nst rollback`: which version is the champion."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan
from typing import Any

import click

from infra import evaluations, promotions, registry, tracking_server
from infra.promotions import Grounds
from infra.registry import RegisteredVersion
from pipelines.console import GateRefused, Stage, say
from pipelines.gate import Finding, Gate, load_gate
from pipelines.models import resolve_model

model_option = click.option(
    "--model", "model_name", default=registry.DEFAULT_MODEL, show_default=True, help="The registered model."
)
reason_option = click.option("--reason", default="", metavar="TEXT", help="Kept in the history.")


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
    against the gate's rules: fixed limits, the baselines of the same evaluation, and the champion's figures
    of the same pairs. Exit code 3: the gate said no.

    \b
    Examples:
      nst promote challenger --dry-run
      nst promote 4 --reason "trained on the new corpus"
      nst promote 4 --force --reason "4 holds the fix for portraits; figures to follow"
    """
    if force and not reason:
        raise ValueError("--force needs a --reason: it is all that the history will have to go by")
    tracking_server.check()
    gate = load_gate(gate_path)
    candidate = _candidate(version, model_name)
    known = promotions.events(model_name) if dry_run else promotions.repair(model_name)
    champion = registry.champion(model_name)
    result: dict[str, Any] = {
        "model": model_name,
        "version": candidate.version,
        "champion": champion.version if champion else None,
        "promoted": False,
    }
    if champion and champion.version == candidate.version == promotions.recorded_champion(known):
        say(f"{candidate} is the champion already")
        return result
    evaluation, findings = _examine(candidate, champion, gate, force)
    failed = [finding for finding in findings if not finding.passed]
    result["findings"] = [{"passed": finding.passed, "text": str(finding)} for finding in findings]
    for finding in findings:
        say(f"  {'ok' if finding.passed else 'NO'}  {finding}")
    if failed and not force:
        raise GateRefused(
            f"{candidate} is not promoted, {gate.name} refuses {len(failed)} of {len(findings)}: "
            + "; ".join(str(finding) for finding in failed),
            result,
        )
    resolve_model(str(candidate))  # is it what was registered and measured, and does it still draw the same?
    if dry_run:
        say(f"{candidate} would become the champion{_after(champion)}; nothing was changed (--dry-run)")
        return result
    grounds = Grounds(
        reason=reason,
        gate=gate.name,
        gate_digest=gate.digest,
        evaluation=evaluations.evaluation_digest(evaluation) if evaluation else "",
        evaluation_set=evaluations.evaluation_set_digest(evaluation) if evaluation else "",
        is_forced=force and bool(failed or not findings),
        findings=tuple(f"{'ok' if finding.passed else 'NO'} {finding}" for finding in findings),
        figures={finding.rule.measure: finding.value for finding in findings if not isnan(finding.value)},
    )
    event = promotions.move_champion(
        model_name, candidate.version, kind="promote", grounds=grounds, known=known
    )
    say(f"{candidate} is the champion{_after(champion)}{' (forced)' if event.grounds.is_forced else ''}")
    return {**result, "promoted": True, "forced": event.grounds.is_forced, "event": event.digest}


def _candidate(version: str, model_name: str) -> RegisteredVersion:
    if version.isdecimal():
        return registry.get_version(model_name, int(version))
    return registry.resolve(f"models:/{model_name}@{version}")


def _examine(
    candidate: RegisteredVersion, champion: RegisteredVersion | None, gate: Gate, force: bool
) -> tuple[dict[str, Any] | None, list[Finding]]:
    """The candidate's evaluation and what the gate finds. With `force` an evaluation that is missing or
    cannot be compared gives nothing."""
    try:
        found = _evaluation_of(candidate, gate)
        of_champion = None
        if champion and gate.compares_with_champion:
            of_champion = _evaluation_of(champion, gate, evaluations.evaluation_set_digest(found))
        return found, gate.check(found, of_champion)
    except ValueError as error:
        if not force:
            raise
        say(f"  --  not checked: {error}")
        return None, []


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


@click.command(cls=Stage)
@model_option
@reason_option
@tracking_server.outages_told("the same command completes what was begun")
def rollback(model_name: str, reason: str) -> dict[str, Any]:
    """Bring the previous champion back.

    No gate is asked. Each rollback takes one promotion back: after 1, 2 and 3 were promoted, the first brings
    2 back and the second 1. What was rolled back can be promoted again.

    \b
    Examples:
      nst rollback --reason "4 smears faces"
    """
    tracking_server.check()
    registry.list_versions(model_name)  # says so if there is no such model
    target = promotions.previous_version(promotions.repair(model_name))
    if target is not None:
        resolve_model(f"models:/{model_name}/{target}")  # out of the frying pan, but not into the fire
    event = promotions.roll_back(model_name, reason)
    before = promotions.previous_version(promotions.events(model_name))
    if event.was_moved_by_hand:
        say(
            f"the champion had been moved by hand to {event.from_version or 'nothing'}; "
            f"by the history it was {event.recorded_version}"
        )
    say(f"models:/{model_name}/{event.to_version} is the champion again in place of {event.from_version}")
    say(f"another rollback would bring {before} back" if before else "no champion came before it")
    return {
        "model": model_name,
        "version": event.to_version,
        "rolled_back": event.from_version,
        "previous": before,
        "event": event.digest,
    }


if __name__ == "__main__":
    promote()
