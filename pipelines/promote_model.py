"""`nst promote`, `nst rollback`: which version is the champion."""

from __future__ import annotations

from typing import Any

import click

from infra import evaluations, promotions, registry, tracking_server
from infra.promotions import Grounds
from infra.registry import RegisteredVersion
from pipelines.console import GateRefused, Stage, say
from pipelines.gate import Finding, Gate, load_gate

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
def promote(
    version: str, model_name: str, gate_path: str | None, dry_run: bool, force: bool, reason: str
) -> dict[str, Any]:
    """Make VERSION the champion, if the gate agrees.

    VERSION is a number or an alias. It must have been evaluated with `nst evaluate`; its figures are held
    against the gate's rules: fixed limits, the baselines of the same evaluation, and the champion.
    Exit code 3: the gate said no.

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
    if not dry_run:
        promotions.repair(model_name)
    champion = registry.champion(model_name)
    result: dict[str, Any] = {
        "model": model_name,
        "version": candidate.version,
        "champion": champion.version if champion else None,
        "promoted": False,
    }
    if champion is not None and champion.version == candidate.version:
        say(f"{candidate} is the champion already")
        return result
    findings = _examine(candidate, champion, gate, force)
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
    if dry_run:
        say(f"{candidate} would become the champion{_after(champion)}; nothing was changed (--dry-run)")
        return result
    grounds = Grounds(
        reason=reason,
        gate=gate.name,
        gate_digest=gate.digest,
        is_forced=force and bool(failed or not findings),
        findings=tuple(f"{'ok' if finding.passed else 'NO'} {finding}" for finding in findings),
        figures={
            finding.rule.measure: finding.value for finding in findings if finding.value == finding.value
        },
    )
    event = promotions.move_champion(model_name, candidate.version, kind="promote", grounds=grounds)
    say(f"{candidate} is the champion{_after(champion)}{' (forced)' if event.grounds.is_forced else ''}")
    return {**result, "promoted": True, "forced": event.grounds.is_forced, "event": event.digest}


def _candidate(version: str, model_name: str) -> RegisteredVersion:
    if version.isdecimal():
        return registry.get_version(model_name, int(version))
    return registry.resolve(f"models:/{model_name}@{version}")


def _examine(
    candidate: RegisteredVersion, champion: RegisteredVersion | None, gate: Gate, force: bool
) -> list[Finding]:
    """The gate's findings. With `force` an evaluation that is missing or cannot be compared gives none."""
    try:
        found = _evaluation_of(candidate)
        of_champion = _evaluation_of(champion) if champion and gate.compares_with_champion else None
        return gate.check(found, of_champion)
    except ValueError as error:
        if not force:
            raise
        say(f"  --  not checked: {error}")
        return []


def _evaluation_of(version: RegisteredVersion) -> dict[str, Any]:
    found = evaluations.evaluation(version)
    if found is None:
        raise ValueError(
            f"{version} was not evaluated; run: "
            f"nst evaluate {version} --content CORPUS --style CORPUS --report DIR"
        )
    if found["model_digest"] != version.digest:
        raise ValueError(f"the evaluation recorded for {version} is of another model; evaluate it again")
    return found


def _after(champion: RegisteredVersion | None) -> str:
    return f" in place of version {champion.version}" if champion else ", the first one"


@click.command(cls=Stage)
@model_option
@reason_option
def rollback(model_name: str, reason: str) -> dict[str, Any]:
    """Bring the previous champion back.

    The two change places, so that a second rollback undoes the first. No gate is asked.

    \b
    Examples:
      nst rollback --reason "4 smears faces"
    """
    tracking_server.check()
    promotions.repair(model_name)
    previous, champion = (
        registry.with_alias(model_name, alias) for alias in (registry.PREVIOUS, registry.CHAMPION)
    )
    if previous is None:
        raise ValueError(f"{model_name} has no previous champion to bring back; `nst history` shows what was")
    event = promotions.move_champion(
        model_name, previous.version, kind="rollback", grounds=Grounds(reason=reason)
    )
    say(f"{previous} is the champion again{_after(champion) if champion else ''}")
    return {
        "model": model_name,
        "version": previous.version,
        "previous": champion.version if champion else None,
        "event": event.digest,
    }


if __name__ == "__main__":
    promote()
