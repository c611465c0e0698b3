"""`nst inspect`: what is in a corpus, a contact sheet of it, and whether every byte is what it was."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from infra import storage
from nst.corpus import Corpus, read_manifest
from nst.corpus_check import check_corpus
from nst.grids import picture_grid
from nst.images import Pixels, encode_jpeg
from nst.ledger import count_reasons
from nst.manifest import FAILURES_NAME, Manifest
from pipelines.console import Progress, Stage, StageFailed, say

NUM_LABELS_SHOWN = 20
SHEET_ROWS, SHEET_COLUMNS, SHEET_CELL = 12, 8, 128


@click.command("inspect", cls=Stage)
@click.argument("corpus")
@click.option("--verify", is_flag=True, help="Read every byte back against the checksums.")
@click.option(
    "--contact-sheet",
    type=click.Path(dir_okay=False),
    help="Where to write it, a local JPEG (default: NAME-contact-sheet.jpg in the current folder).",
)
@click.option("--no-contact-sheet", is_flag=True, help="Write none.")
def inspect(corpus: str, verify: bool, contact_sheet: str | None, no_contact_sheet: bool) -> dict[str, Any]:
    """Show what is in CORPUS (a folder or s3://bucket/prefix): counts, labels, sizes and a contact sheet.

    With --verify, every damaged part is named and the exit code is 1 if there is one.

    \b
    Examples:
      nst inspect corpora/style
      nst inspect s3://bucket/style --verify --no-contact-sheet
    """
    corpus = corpus.rstrip("/")
    manifest = read_manifest(corpus, storage.ObjectStorage())
    result = describe(corpus, manifest)
    if verify:
        _verify(corpus, manifest, result)
    opened = Corpus.open(corpus, storage=storage.ObjectStorage())
    result["sizes"] = sizes = _sizes(opened)
    for name, figures in sizes.items():
        title = name.replace("_", " ") + ":"
        say(f"  {title:<14}{figures['min']} to {figures['max']} px, median {figures['median']}")
    if not no_contact_sheet:
        path = contact_sheet or f"{storage.name(corpus)}-contact-sheet.jpg"
        storage.write_bytes(path, encode_jpeg(draw_contact_sheet(opened), quality=88))
        result["contact_sheet"] = str(Path(path).absolute())
        say(f"contact sheet: {path}")
    return result


def describe(uri: str, manifest: Manifest) -> dict[str, Any]:
    """Prints what the manifest says; returns the same for programs."""
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    reasons = _failures(uri, manifest)
    say(f"{uri}: {manifest.num_samples} {manifest.role} images, {num_bytes / 1e6:.1f} MB")
    say(f"  {'made from:':<14}{manifest.source}")
    kind = "adopted, as they were found" if manifest.is_adopted else f"shorter side {manifest.image_size} px"
    say(f"  {'images:':<14}{kind}")
    say(f"  {'shards:':<14}{len(manifest.shards)}")
    shown = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    say(f"  {'not taken:':<14}{manifest.num_failures}{f' ({shown})' if shown else ''}")
    say(f"  {'digest:':<14}{manifest.digest}")
    by_count = sorted(manifest.labels.items(), key=lambda item: (-item[1], item[0]))
    say(f"  {'labels:':<14}{len(by_count)}")
    for label, count in by_count[:NUM_LABELS_SHOWN]:
        say(f"    {count:>7}  {label}")
    if len(by_count) > NUM_LABELS_SHOWN:
        say(f"    {'…':>7}  and {len(by_count) - NUM_LABELS_SHOWN} more")
    return {
        "corpus": uri,
        "role": manifest.role,
        "image_size": manifest.image_size,
        "num_samples": manifest.num_samples,
        "num_bytes": num_bytes,
        "num_shards": len(manifest.shards),
        "labels": manifest.labels,
        "num_failures": manifest.num_failures,
        "failures": dict(reasons),
        "source": manifest.source,
        "settings": manifest.settings,
        "digest": manifest.digest,
    }


def _failures(uri: str, manifest: Manifest) -> Counter[str]:
    """How many inputs were not taken, by reason; none where the list is gone or damaged (--verify says)."""
    try:
        data = storage.read_bytes(storage.join(uri, FAILURES_NAME))
    except FileNotFoundError:
        return Counter()
    if hashlib.sha256(data).hexdigest() != manifest.files.get(FAILURES_NAME):
        return Counter()
    return count_reasons(data)


def _verify(uri: str, manifest: Manifest, result: dict[str, Any]) -> None:
    damaged: dict[str, list[str]] = {}
    with Progress("verify", total=manifest.num_samples) as progress:
        for part in check_corpus(uri, manifest, storage.ObjectStorage()):
            if part.problems:
                damaged[part.key] = list(part.problems)
                for problem in part.problems:
                    say(f"DAMAGED {storage.join(uri, part.key)} {problem}")
            progress.advance(part.num_samples)
    result["damaged"] = damaged
    if damaged:
        remedy = (
            "fetch those tars again and run `nst index`"
            if manifest.is_adopted
            else "delete them and run the `nst shard` that made the corpus again"
        )
        raise StageFailed(
            f"{len(damaged)} parts of {uri} are damaged: {', '.join(damaged)}; {remedy}", result
        )
    say("verified: every byte is what it was")


def _sizes(corpus: Corpus) -> dict[str, dict[str, int]]:
    def figures(values: NDArray[Any]) -> dict[str, int]:
        return {
            "min": int(values.min()), "median": int(np.median(values)), "max": int(values.max())
        }  # fmt: skip

    shorter = np.minimum(corpus.widths, corpus.heights)
    return {
        "width": figures(corpus.widths),
        "height": figures(corpus.heights),
        "shorter_side": figures(shorter),
    }


def draw_contact_sheet(corpus: Corpus) -> Pixels:
    """Samples spread over the labels (of many, those with the most samples) as uint8 [H, W, 3]."""
    counts = np.bincount(corpus.labels, minlength=len(corpus.label_names))
    # Few labels get several rows each, so that the sheet is full.
    largest = sorted(np.argsort(-counts, kind="stable")[:SHEET_ROWS])
    rows_each = max(1, SHEET_ROWS // len(largest))
    rows: list[list[Pixels | None]] = []
    names: list[str] = []
    for label_id in largest:
        found = corpus.rows_of(int(label_id))
        chosen = found[np.unique(np.linspace(0, len(found) - 1, rows_each * SHEET_COLUMNS).astype(int))]
        for first in range(0, len(chosen), SHEET_COLUMNS):
            pictures: list[Pixels | None] = [
                corpus.decode(int(row)) for row in chosen[first : first + SHEET_COLUMNS]
            ]
            rows.append(pictures + [None] * (SHEET_COLUMNS - len(pictures)))
            names.append(f"{corpus.label_names[label_id]} ({counts[label_id]})" if first == 0 else "")
    return picture_grid(rows, cell=SHEET_CELL, row_labels=names)


if __name__ == "__main__":
    inspect()
