"""`nst history`: who made which version the champion, and why."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from infra import promotions, registry, tracking_server
from infra.promotions import Event
from pipelines.console import Stage, StageFailed, say
from pipelines.promote_model import model_option


@click.command(cls=Stage)
@model_option
def history(model_name: str) -> dict[str, Any]:
    """Who made which version the champion, when, why, with which figures.

    Exit code 1: the history was altered, or the champion was moved by hand.

    \b
    Examples:
      nst history
      nst history --json
    """
    tracking_server.check()
    registry.list_versions(model_name)  # says so if there is no such model
    events = promotions.events(model_name)
    problems = promotions.verify_history(model_name)
    if events:
        _print_table([_row(event) for event in events])
    else:
        say(f"{model_name}: nothing was promoted yet")
    result = {
        "model": model_name,
        "events": [dataclasses.asdict(event) for event in events],
        "problems": problems,
    }
    if problems:
        raise StageFailed(f"the history of {model_name} does not add up: {'; '.join(problems)}", result)
    return result


SHOWN = ("style_distance", "content_distance")  # --json has all
COLUMNS = ("#", "when (UTC)", "what", "version", "who", "figures", "reason")


def _row(event: Event) -> tuple[str, ...]:
    grounds = event.grounds
    what = event.kind + (", forced" if grounds.is_forced else "")
    if event.status != "done":
        what += f" ({event.status})"
    return (
        str(event.sequence),
        event.at[:16].replace("T", " "),
        what,
        f"{event.from_version or '-'} -> {event.to_version}",
        event.who,
        ", ".join(f"{key} {value:.3f}" for key, value in grounds.figures.items() if key in SHOWN) or "-",
        grounds.reason or "-",
    )


def _print_table(rows: list[tuple[str, ...]]) -> None:
    lines = [COLUMNS, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    for line in lines:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    history()
