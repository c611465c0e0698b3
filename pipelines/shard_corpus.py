"""`nst shard`: images under a folder or prefix -> a corpus of WebDataset shards, written by Ray tasks."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from infra import cluster, places, scratch, storage
from nst.manifest import FAILURES_NAME, Manifest, ShardInfo
from nst.planning import DEDUPES, ShardPlan, ShardSettings, shard_edges
from pipelines.catalogue import Catalogue, open_catalogue
from pipelines.console import Progress, Stage, StageFailed, say
from pipelines.corpus_inputs import kind_of_labels, list_inputs
from pipelines.corpus_outcome import Outcome, Written
from pipelines.corpus_state import CorpusState, read_state
from pipelines.repeated_inputs import DUPLICATE, NEAR_DUPLICATE, leave_out_repeated
from pipelines.shard_publishing import PublishedShard
from pipelines.shard_tasks import write_one

MAX_EXAMPLE = 100  # characters in the summary


class ShardStage(Stage):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """`--dedupe` alone means exact, also where SOURCE comes behind it."""
        for place, argument in enumerate(args):
            if argument == "--dedupe" and args[place + 1 : place + 2] not in [[name] for name in DEDUPES]:
                args[place] = "--dedupe=exact"
        return super().parse_args(ctx, args)


@click.command("shard", cls=ShardStage)
@click.argument("source")
@click.argument("corpus")
@click.option(
    "--role", type=click.Choice(["content", "style"]), required=True, help="What the images are for."
)
@click.option(
    "--labels",
    default="dirname",
    show_default=True,
    metavar="dirname|none|FILE",
    help="Where labels come from: the first folder below SOURCE, nowhere, or a .csv or .parquet table with "
    "the columns path (relative to SOURCE) and label.",
)
@click.option(
    "--size", default=288, show_default=True, help="Larger images are shrunk to this shorter side, in pixels."
)
@click.option("--shard-mb", default=256, show_default=True, help="Size that a shard should not pass, in MiB.")
@click.option(
    "--dedupe",
    type=click.Choice(DEDUPES),
    default="none",
    metavar="[exact|near]",
    help="Take only the first of several files with the same bytes (exact, also without a value), or also of "
    "those that look the same (near).",
)
@click.option(
    "--keep-bytes", is_flag=True, help="Store JPEG files that need no change as they are, not encoded again."
)
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
    dedupe: str,
    keep_bytes: bool,
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
      nst shard paintings/ s3://bucket/style --role style --labels labels.csv --dedupe near
    """
    settings = ShardSettings(
        role=role,
        image_size=size,
        shard_mb=shard_mb,
        labels=kind_of_labels(labels),
        dedupe=dedupe,
        keep_bytes=keep_bytes,
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
    """The stage as a function. Raises ValueError for a user's mistake, StageFailed if nothing could be taken,
    a shard could not be written, another run was faster, or more than `max_failures` inputs failed (the
    corpus is there all the same)."""
    started = time.monotonic()
    source_uri, corpus_uri = _checked_places(source_uri, corpus_uri)
    with open_catalogue() as catalogue:
        state = read_state(corpus_uri, settings)
        state.load_ledger(catalogue)
        list_inputs(catalogue, source_uri, labels)
        state.refuse_changed(catalogue)
        run = _Run(
            source_uri=source_uri, settings=settings, state=state, catalogue=catalogue, workers=workers
        )
        outcome = run.write(run.plan())
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
    catalogue: Catalogue
    workers: int | None

    def plan(self) -> int:
        """Returns how many images are new, without those that repeat others."""
        num_planned = self.catalogue.plan()
        if self.settings.dedupe == "none" or not num_planned:
            return num_planned
        near = self.settings.dedupe == "near"
        return leave_out_repeated(
            self.catalogue, num_planned, self.source_uri, near=near, connect=self._connect
        )

    def write(self, num_planned: int) -> Outcome:
        """Writes the planned shards, and the published ones that are lost."""
        edges = shard_edges(num_planned, self.settings)
        first_number = self.state.next_number(self.catalogue)
        lost = {shard.name: shard for shard in self.state.lost_shards()}
        if lost:
            say(f"{len(lost)} published shards are missing or cut: {', '.join(lost)}")
        if edges:
            say(f"{num_planned:,} new images for {len(edges) - 1:,} shards")
        written = Written()
        if edges or lost:
            in_flight = self._connect()
            plans = self._plans(edges, first_number, lost)
            num_images = num_planned + sum(shard.num_samples for shard in lost.values())
            with Progress("shard", total=num_images) as progress:
                for published in self._write_all(plans, in_flight):
                    self._take(published, written, progress, is_restored=published.record.name in lost)
        return Outcome(
            source_uri=self.source_uri,
            settings=self.settings,
            state=self.state,
            catalogue=self.catalogue,
            first_number=first_number,
            num_planned_shards=max(len(edges) - 1, 0),
            written=written,
        )

    def _plans(
        self, edges: list[int], first_number: int, lost: dict[str, ShardInfo]
    ) -> Iterator[tuple[ShardPlan, ShardInfo | None]]:
        """One after the other: a shard's images are in memory from here until its task has them."""
        for name, shard in lost.items():
            images = self.catalogue.known_images(int(name))
            yield ShardPlan(number=int(name), images=images, settings=self.settings), shard
        for number, (first, last) in enumerate(itertools.pairwise(edges), first_number):
            images = self.catalogue.images(first, last)
            yield ShardPlan(number=number, images=images, settings=self.settings), None

    def _write_all(
        self, plans: Iterator[tuple[ShardPlan, ShardInfo | None]], in_flight: int
    ) -> Iterator[PublishedShard]:
        """The shards as they are done. Raises StageFailed if one cannot be, when those under way are."""
        with scratch.folder("nst-shards-") as folder:
            scratch_dir = folder if cluster.remote_address() is None else None
            calls = ((plan, self.source_uri, self.state.uri, scratch_dir, shard) for plan, shard in plans)
            try:
                yield from cluster.run_bounded(
                    write_one, calls, max_in_flight=in_flight, name_of=lambda plan, *_: plan.name
                )
            except cluster.CallFailed as error:
                cause = f"{type(error.cause).__name__}: {error.cause}"
                raise StageFailed(
                    f"shard {error.name} could not be written in three attempts ({cause}); the shards that "
                    "were written are kept, and the same command does the rest",
                    {"corpus": self.state.uri, "failed_shard": error.name},
                ) from error

    def _take(
        self, published: PublishedShard, written: Written, progress: Progress, *, is_restored: bool
    ) -> None:
        written.add(published, is_restored=is_restored)
        failures = () if is_restored else published.record.failures  # those of a lost shard are known
        self.catalogue.add_failures(failures)
        progress.advance(published.record.num_samples + len(failures), failed=len(failures))

    def _connect(self) -> int:
        """How many tasks to have under way: twice the CPUs, so that none waits for the next."""
        info = cluster.connect(min_cpus=self.workers or 1)
        return self.workers or max(2, 2 * info.num_cpus)


def _report(
    outcome: Outcome, manifest: Manifest, *, seconds: float, max_failures: int | None
) -> dict[str, Any]:
    state, written, uri = outcome.state, outcome.written, outcome.state.uri
    reasons = outcome.catalogue.reasons()
    counts = {reason.reason: reason.num for reason in reasons}
    num_new = manifest.num_samples - (state.manifest.num_samples if state.manifest else 0)
    result = {
        "corpus": uri,
        "role": manifest.role,
        "num_samples": manifest.num_samples,
        "num_new_samples": num_new,
        "num_shards": len(manifest.shards),
        "num_labels": len(manifest.labels),
        "num_bytes": sum(shard.num_bytes for shard in manifest.shards),
        "num_failures": manifest.num_failures,
        "failures": dict(sorted(counts.items())),
        "digest": manifest.digest,
        "seconds": round(seconds, 2),
    }
    if written.num_were_there:
        say(f"{written.num_were_there} of {len(written.shards)} shards were there already")
    if state.manifest and not written.shards and not num_new:
        say(f"nothing new: {uri} holds all that can be taken")
    say(
        f"{uri}: {manifest.num_samples:,} {manifest.role} images ({num_new:,} new), "
        f"{len(manifest.labels):,} labels, {len(manifest.shards):,} shards, "
        f"{result['num_bytes'] / 1e6:,.1f} MB, in {seconds:.1f} s"
    )
    if num_gone := outcome.catalogue.num_gone():
        say(f"{num_gone} images of the corpus are no longer under SOURCE; the corpus keeps them")
    if reasons:
        say(
            f"not taken: {manifest.num_failures:,}, all listed in {storage.join(uri, FAILURES_NAME)}, such as"
        )
        for reason in reasons:
            say(f"  {reason.num:>7,} {reason.reason:<15} {_shortened(f'{reason.source} {reason.detail}')}")
    num_failed = manifest.num_failures - counts.get(DUPLICATE, 0) - counts.get(NEAR_DUPLICATE, 0)
    if max_failures is not None and num_failed > max_failures:
        raise StageFailed(
            f"{num_failed} inputs were not taken, more than --max-failures {max_failures}", result
        )
    return result


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_EXAMPLE else text[: MAX_EXAMPLE - 1] + "…"


if __name__ == "__main__":
    shard()
