"""`nst shard`: images under a folder or prefix -> a corpus of WebDataset shards, written by Ray tasks."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from infra import cluster, places, storage
from nst.ledger import NO_SHARD
from nst.manifest import FAILURES_NAME, Manifest
from nst.planning import ShardPlan, ShardSettings, SourceImage, plan_shards
from nst.shards import Failure, ShardRecord
from pipelines.console import Progress, Stage, StageFailed, say
from pipelines.corpus_inputs import list_inputs
from pipelines.corpus_outcome import Outcome
from pipelines.corpus_state import CorpusState, read_state
from pipelines.shard_tasks import hash_some, write_one

NUM_HASHED_TOGETHER = 256
DUPLICATE = "duplicate"


@click.command("shard", cls=Stage)
@click.argument("source")
@click.argument("corpus")
@click.option(
    "--role", type=click.Choice(["content", "style"]), required=True, help="What the images are for."
)
@click.option(
    "--labels",
    default="dirname",
    show_default=True,
    metavar="dirname|none|FILE.csv",
    help="Where labels come from: the first folder below SOURCE, nowhere, or a table with the columns path "
    "(relative to SOURCE) and label.",
)
@click.option(
    "--size", default=288, show_default=True, help="Larger images are shrunk to this shorter side, in pixels."
)
@click.option("--shard-mb", default=256, show_default=True, help="Size that a shard should not pass, in MiB.")
@click.option("--dedupe", is_flag=True, help="Take only the first of several files with the same bytes.")
@click.option("--workers", type=click.IntRange(min=1), help="Shards written at once (default: one a CPU).")
@click.option(
    "--max-failures",
    type=click.IntRange(min=0),
    help="Exit with 1 if more inputs fail (default: any number).",
)
def shard(
    source: str,
    corpus: str,
    role: str,
    labels: str,
    size: int,
    shard_mb: int,
    dedupe: bool,
    workers: int | None,
    max_failures: int | None,
) -> dict[str, Any]:
    """Turn the images under SOURCE into a corpus under CORPUS. Both are folders or s3://bucket/prefix.

    A corpus is a set of plain WebDataset tars with an index each and a corpus.json. The same images and
    options give the same bytes. The same command again goes on after an interruption, adds what is new and
    writes lost shards again. Every file that was not taken is in CORPUS/failures.parquet, with the reason.

    \b
    Examples:
      nst shard photos/ corpora/content --role content
      nst shard paintings/ s3://bucket/style --role style --labels labels.csv --dedupe
    """
    settings = ShardSettings(
        role=role,
        image_size=size,
        shard_mb=shard_mb,
        labels=labels if labels in ("dirname", "none") else "csv",
        dedupe=dedupe,
    )
    return shard_corpus(source, corpus, settings, labels=labels, workers=workers, max_failures=max_failures)


def shard_corpus(
    source_uri: str,
    corpus_uri: str,
    settings: ShardSettings,
    *,
    labels: str = "dirname",
    workers: int | None = None,
    max_failures: int | None = None,
) -> dict[str, Any]:
    """The stage as a function. Raises ValueError for a user's mistake, StageFailed if nothing could be taken
    or more than `max_failures` inputs failed (the corpus is there all the same)."""
    started = time.monotonic()
    source_uri, corpus_uri = _checked_places(source_uri, corpus_uri)
    state = read_state(corpus_uri, settings)
    inputs = list_inputs(source_uri, labels)
    run = _Run(source_uri=source_uri, settings=settings, state=state, workers=workers)
    new, hashes = state.new_images(inputs), {}
    duplicates: list[Failure] = []
    if settings.dedupe and new:
        new, hashes, duplicates = run.without_duplicates(new)
    plans = plan_shards(new, settings, first_number=state.next_number)
    records = run.write(plans)
    outcome = Outcome(
        source_uri=source_uri,
        settings=settings,
        state=state,
        inputs=inputs,
        plans=plans,
        records=records,
        duplicates=duplicates,
        hashes=hashes,
    )
    manifest = outcome.publish()
    return _report(outcome, manifest, seconds=time.monotonic() - started, max_failures=max_failures)


def _checked_places(source_uri: str, corpus_uri: str) -> tuple[str, str]:
    source, corpus = (_absolute(uri) for uri in (source_uri, corpus_uri))
    if source == corpus or corpus.startswith(source.rstrip("/") + "/"):
        raise ValueError(f"CORPUS {corpus_uri} lies in SOURCE {source_uri}; choose a place outside of it")
    if not storage.is_remote(corpus):
        existing = next(path for path in (Path(corpus), *Path(corpus).parents) if path.exists())
        if not existing.is_dir():
            raise ValueError(f"CORPUS {corpus_uri}: {existing} is a file; choose a folder")
    return source, corpus


def _absolute(uri: str) -> str:
    if storage.is_remote(uri):
        return uri.rstrip("/")
    return os.path.realpath(places.local_path(uri))


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One run of the stage: what it works on."""

    source_uri: str
    settings: ShardSettings
    state: CorpusState
    workers: int | None

    def without_duplicates(
        self, images: list[SourceImage]
    ) -> tuple[list[SourceImage], dict[str, str], list[Failure]]:
        """(images whose bytes are new, sha256 by source, the others). The first in corpus order stays."""
        groups = [
            (images[first : first + NUM_HASHED_TOGETHER], self.source_uri)
            for first in range(0, len(images), NUM_HASHED_TOGETHER)
        ]
        hashes: dict[str, str] = {}
        in_flight = self._connect()
        with Progress("hash", total=len(images)) as progress:
            for some in cluster.run_bounded(hash_some, groups, max_in_flight=in_flight):
                hashes |= some
                progress.advance(len(some))
        first_with = {
            entry.sha256: entry.image.source for entry in self.state.ledger if entry.shard != NO_SHARD
        }
        first_with.pop("", None)
        unique: list[SourceImage] = []
        duplicates: list[Failure] = []
        for image in sorted(images, key=lambda image: image.order):
            digest = hashes.get(image.source)
            first = image.source if digest is None else first_with.setdefault(digest, image.source)
            if first == image.source:
                unique.append(image)
            else:
                detail = f"has the same bytes as {first}"
                duplicates.append(Failure(source=image.source, reason=DUPLICATE, detail=detail))
        return unique, hashes, duplicates

    def write(self, plans: list[ShardPlan]) -> dict[str, ShardRecord]:
        """Writes the planned shards that are not there yet, and the published ones that are lost."""
        finished = {plan.name: self.state.finished(plan) for plan in plans}
        records = {name: record for name, record in finished.items() if record is not None}
        lost = self.state.lost_shards(self.settings)
        work = [(plan, None) for plan in plans if plan.name not in records] + lost
        if records:
            say(f"{len(records)} of {len(plans)} shards are there already")
        if lost:
            say(
                f"{len(lost)} published shards are missing or cut: {', '.join(plan.name for plan, _ in lost)}"
            )
        if not work:
            return records
        in_flight = self._connect()
        num_images = sum(len(plan.images) for plan, _ in work)
        with (
            tempfile.TemporaryDirectory(prefix="nst-shards-", ignore_cleanup_errors=True) as folder,
            Progress("shard", total=num_images) as progress,
        ):
            scratch_dir = folder if cluster.remote_address() is None else None
            calls = ((plan, self.source_uri, self.state.uri, scratch_dir, sha256) for plan, sha256 in work)
            for record in cluster.run_bounded(write_one, calls, max_in_flight=in_flight):
                records[record.name] = record
                progress.advance(record.num_samples + len(record.failures), failed=len(record.failures))
        return records

    def _connect(self) -> int:
        """How many tasks to have under way: twice the CPUs, so that none waits for the next."""
        info = cluster.connect(min_cpus=self.workers or 1)
        return self.workers or max(2, 2 * info.num_cpus)


def _report(
    outcome: Outcome, manifest: Manifest, *, seconds: float, max_failures: int | None
) -> dict[str, Any]:
    before, uri = outcome.state.manifest, outcome.state.uri
    reasons = Counter(failure.reason for failure in outcome.failures())
    num_new = manifest.num_samples - (before.num_samples if before else 0)
    result = {
        "corpus": uri,
        "role": manifest.role,
        "num_samples": manifest.num_samples,
        "num_new_samples": num_new,
        "num_shards": len(manifest.shards),
        "num_labels": len(manifest.labels),
        "num_bytes": sum(shard.num_bytes for shard in manifest.shards),
        "num_failures": manifest.num_failures,
        "failures": dict(sorted(reasons.items())),
        "digest": manifest.digest,
        "seconds": round(seconds, 2),
    }
    if before is not None and not outcome.records and not num_new:
        say(f"nothing new: {uri} holds all that can be taken")
    say(
        f"{uri}: {manifest.num_samples} {manifest.role} images ({num_new} new), "
        f"{len(manifest.labels)} labels, {len(manifest.shards)} shards, {result['num_bytes'] / 1e6:.1f} MB, "
        f"in {seconds:.1f} s"
    )
    if num_gone := outcome.num_gone():
        say(f"{num_gone} images of the corpus are no longer under SOURCE; the corpus keeps them")
    if reasons:
        shown = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        say(f"not taken: {manifest.num_failures} ({shown}); listed in {storage.join(uri, FAILURES_NAME)}")
    num_failed = manifest.num_failures - reasons[DUPLICATE]
    if max_failures is not None and num_failed > max_failures:
        raise StageFailed(
            f"{num_failed} inputs were not taken, more than --max-failures {max_failures}", result
        )
    return result


if __name__ == "__main__":
    shard()
