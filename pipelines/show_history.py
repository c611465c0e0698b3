"""`nst history`: who promoted what; where a version, a stylized bucket or a corpus comes from and went."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from collections.abc import Iterable
from typing import Any

import click

from infra import places, promotions, registry, tracking_server
from infra.printable import printable
from infra.promotions import Event
from pipelines import lineage_facts, lineage_tree
from pipelines.console import Stage, StageFailed, say
from pipelines.promote_model import model_option
from pipelines.tree import Node, draw

MAX_WIDTH = 120
SHOWN = ("style_distance", "content_distance")  # --json has all
DIGEST = re.compile("[0-9a-fA-F]{64}")
COLUMNS = ("#", "when (UTC)", "what", "version", "who", "figures", "reason")


@click.command(cls=Stage)
@click.argument("place", required=False)
@click.option(
    "--version", type=click.IntRange(min=1), metavar="N", help="Everything about one version, as a tree."
)
@click.option(
    "--expect",
    metavar="DIGEST",
    help="Fail unless the history holds the event with this digest, kept elsewhere.",
)
@model_option
def history(place: str | None, version: int | None, expect: str | None, model_name: str) -> dict[str, Any]:
    """Who made which version the champion, when, why, with which figures.

    With --version: where that version comes from (training run, corpora, code, settings) and where it went
    (evaluation, promotions, stylized buckets). With PLACE, a stylized folder or prefix: which version made
    it, and where that comes from; PLACE may also be a corpus: what was trained on it.

    The last line is the head: number and digest of the newest event. A digest that you keep elsewhere (in a
    release note, a CI variable) and give to --expect shows a history that was replaced as a whole, which
    adds up by itself.

    Exit code 1: the history (of the model that is asked for, or that PLACE has to do with) was altered, the
    champion was moved by hand, the event of --expect is not there, or a bucket was made by another model
    than the registry has under that version.

    \b
    Examples:
      nst history
      nst history --version 3
      nst history --expect "$CHAMPION_EVENT"
      nst history s3://painted/2024
      nst history corpora/style --json
    """
    if expect is not None and (place is not None or version is not None):
        raise ValueError("--expect asks for the history of a model; leave PLACE and --version away")
    if expect is not None and not DIGEST.fullmatch(expect):
        raise ValueError(
            f"--expect {expect}: give the 64 hexadecimal digits that promote, rollback or history printed"
        )
    if place is not None:
        if version is not None:
            raise ValueError(f"{place} and --version {version} are two questions; ask one of them")
        return _of_place(places.absolute(place).rstrip("/"))
    tracking_server.check()
    if version is not None:
        facts = lineage_facts.version_facts(registry.get_version(model_name, version))
        _show(lineage_tree.version_tree(facts))
        return _sound([model_name], dataclasses.asdict(facts))
    return _of_model(model_name, expect)


def _sound(model_names: Iterable[str], result: dict[str, Any]) -> dict[str, Any]:
    """`result`, if the histories of these models add up.

    Raises:
        StageFailed: one does not.
    """
    for name in sorted(set(model_names)):
        if problems := promotions.verify_history(name):
            raise StageFailed(_does_not_add_up(name, problems), {**result, "problems": problems})
    return result


def _of_place(uri: str) -> dict[str, Any]:
    """A stylized bucket's way back, or a corpus's way forward."""
    origin = lineage_facts.bucket_origin(uri)
    if origin is not None:
        _show(lineage_tree.bucket_tree(origin))
        result = {"bucket": dataclasses.asdict(origin)}
        if origin.problem:
            raise StageFailed(f"{uri}: {origin.problem}", result)
        return _sound([origin.version.model] if origin.version else [], result)
    use = lineage_facts.corpus_use(uri)
    if use is None:
        raise ValueError(
            f"{uri} is neither a stylized bucket (it has no _nst/run.json) nor a corpus (no corpus.json); "
            "give the OUT of `nst stylize` or the CORPUS of `nst shard`"
        )
    _show(lineage_tree.corpus_tree(use))
    versions = [version for trained in use.trainings for version in trained.versions]
    return _sound(
        [registry.resolve(version).name for version in versions], {"corpus": dataclasses.asdict(use)}
    )


def _show(tree: Node) -> None:
    width = min(MAX_WIDTH, shutil.get_terminal_size((100, 24)).columns)
    for line in draw(tree, width=width, is_styled=sys.stdout.isatty()):
        say(line)


def _of_model(model_name: str, expect: str | None) -> dict[str, Any]:
    """The promotions of a model, as a table."""
    registry.list_versions(model_name)  # says so if there is no such model
    problems = promotions.verify_history(model_name)
    events = promotions.events(model_name)
    head = promotions.last_concluded(events)
    if events:
        _print_table([_row(event) for event in events])
    else:
        say(f"{model_name}: nothing was promoted yet")
    result = {
        "model": model_name,
        "events": [dataclasses.asdict(event) for event in events],
        "head": head and head.digest,
        "problems": problems,
    }
    if head is not None:
        say(f"head: event {head.sequence}, digest {head.digest}")
    if problems:
        raise StageFailed(_does_not_add_up(model_name, problems), result)
    if expect is not None and expect.lower() not in (event.digest for event in events):
        raise StageFailed(
            f"the history of {model_name} has no event with the digest {expect}: it is another history than "
            "the one that digest was taken from",
            result,
        )
    return result


def _does_not_add_up(model_name: str, problems: list[str]) -> str:
    return f"the history of {model_name} does not add up: {'; '.join(problems)}"


def _row(event: Event) -> tuple[str, ...]:
    grounds = event.grounds
    what = event.kind + (", forced" if grounds.is_forced else "")
    if event.status != "done":
        what += f" ({event.status})"
    if event.was_moved_by_hand:
        what += f" (by hand before, from {event.recorded_version or '-'})"
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
    lines = [COLUMNS, *(tuple(map(printable, row)) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    for line in lines:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    history()
