"""A run of `nst stylize` over a folder or bucket: plan, workers, ledger, run.json, gallery."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import ray

from infra import cluster, places, registry, storage
from nst.checkpoint import CONFIG_FILE, MODEL_FILE, read_config
from pipelines.actor_pool import ActorPool, Outcome, WorkersKeepDying
from pipelines.bucket_record import BucketRecord, RunStatus
from pipelines.console import Progress, StageFailed, interruptible, say
from pipelines.gallery import write_gallery
from pipelines.ledger import DONE, FAILED, IGNORED, Ledger, LedgerRow
from pipelines.lineage import code_digest
from pipelines.models import ResolvedModel
from pipelines.styles import StylePicture
from pipelines.stylize_plan import Item, LeftOut, Look, Past, list_sources, plan, still_to_do
from pipelines.stylize_worker import Report, StylizeSettings, StylizeWorker
from pipelines.training_record import code_version

NUM_PLANNED_AHEAD = 100_000  # items; beyond that the total is not known while the run goes on
SECONDS_FOR_AN_ITEM = 1800.0
SECONDS_TO_FINISH = 20.0  # what is under way when the run is interrupted
NUM_SHOWN = 10  # failures on the terminal; all are in the ledger
WORKERS_A_GPU = 4


@dataclass(frozen=True, kw_only=True)
class BucketRun:
    """What is to be done. URIs are absolute."""

    source_uri: str
    out_uri: str
    model: ResolvedModel
    styles: list[StylePicture]
    looks: list[Look]
    pairing: str
    settings: StylizeSettings
    only_failed: bool = False
    max_failures: int | None = None
    num_workers: int | None = None


def run_bucket(run: BucketRun) -> dict[str, Any]:
    """Does what is missing or changed; returns what happened, as JSON holds it.

    Raises:
        ValueError: SOURCE holds no picture, or OUT is a place that it lies in.
        StageFailed: more failures than allowed, or nothing that succeeded.
    """
    read_config(run.model.checkpoint_dir)  # a model that cannot be read must not cost a start of Ray
    ledger = Ledger(run.out_uri)
    past = Past.read(run.out_uri, ledger.known, run.model.digest, run.settings.digest)
    recorder = Recorder(run, ledger)
    sources = list_sources(run.source_uri, run.out_uri)
    planned = plan(sources, run.looks, pairing=run.pairing, format=run.settings.format)
    entries = still_to_do(planned, past, only_failed=run.only_failed, counts=recorder.counts)
    head = list(islice(entries, NUM_PLANNED_AHEAD))
    if recorder.counts.keys() <= {IGNORED} and all(_is_ignored(entry) for entry in head):
        num = recorder.counts[IGNORED]
        what = f"holds {num} files, but no picture" if num else "does not exist or is empty"
        raise ValueError(f"SOURCE {run.source_uri} {what}; give a folder or prefix with pictures")
    record = BucketRecord(run.out_uri, _record_facts(run))
    if head:
        _run_noted(run, recorder, record, head, entries)
    elif not run.only_failed:
        record.catch_up("failed" if recorder.failure else "done", recorder.counts)
    gallery_uri = places.join(run.out_uri, "_nst", "gallery.html")
    if head or not storage.exists(gallery_uri):
        write_gallery(run.out_uri, ledger.read(), run.styles, run.looks, _facts(run))
    return recorder.conclude(gallery_uri)


def _run_noted(
    run: BucketRun,
    recorder: Recorder,
    record: BucketRecord,
    head: list[Item | LeftOut],
    rest: Iterator[Item | LeftOut],
) -> None:
    """Does the work; ledger and record tell of it however it ends."""
    record.begin()
    status: RunStatus = "failed"
    try:
        _do(run, recorder, head, rest)
        status = "failed" if recorder.failure else "done"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        recorder.ledger.flush() if status == "interrupted" else recorder.ledger.merge()
        record.end(status, recorder.counts)


def _is_ignored(entry: Item | LeftOut) -> bool:
    return isinstance(entry, LeftOut) and not entry.is_failure


class Recorder:
    """Counts, and one row in the ledger for each item."""

    def __init__(self, run: BucketRun, ledger: Ledger) -> None:
        self._run, self.ledger = run, ledger
        self.counts: Counter[str] = Counter()
        self.progress: Progress | None = None

    def item(self, item: Item, report: Report, num_tries: int) -> None:
        """What a worker made of an item."""
        status = FAILED if report.reason else DONE
        self.counts[status] += 1
        if report.reason:
            self._say_failed(f"{item.source.key}: {report.reason}: {report.error}")
        row = self._row(item.source, status, report.reason, report.error)
        self.ledger.append(
            LedgerRow(
                **row,
                output=item.output,
                style=item.look.name,
                style_digest=item.look.digest,
                model=self._run.model.name,
                model_digest=self._run.model.digest,
                settings_digest=self._run.settings.digest,
                width=report.width,
                height=report.height,
                seconds=report.seconds,
                output_sha256=report.sha256,
                output_num_bytes=report.num_bytes,
                num_tries=num_tries,
            )
        )
        if self.progress is not None:
            self.progress.advance(failed=int(status == FAILED))

    def left_out(self, entry: LeftOut) -> None:
        """A source that no worker saw."""
        status = FAILED if entry.is_failure else IGNORED
        if entry.is_failure:
            self.counts[FAILED] += 1
            self._say_failed(f"{_printable(entry.source.key)}: {entry.reason}: {entry.detail}")
        row = self._row(entry.source, status, entry.reason, entry.detail)
        blank = dict.fromkeys(
            ("output", "style", "style_digest", "model", "model_digest", "settings_digest"), ""
        )
        self.ledger.append(LedgerRow(**row, **blank))
        if self.progress is not None:
            self.progress.advance(failed=int(entry.is_failure))

    @property
    def num_failed(self) -> int:
        return self.counts[FAILED]

    @property
    def has_failed_too_often(self) -> bool:
        # with those of earlier runs: a rerun that skips them must not turn failure into success
        return self._run.max_failures is not None and self.num_failed_ever > self._run.max_failures

    @property
    def num_failed_ever(self) -> int:
        return self.num_failed + self.counts["failed_before"]

    @property
    def failure(self) -> str | None:
        """Why the run as a whole failed; None if it did not."""
        failed, limit = self.num_failed_ever, self._run.max_failures
        if self.has_failed_too_often:
            return f"{failed} pictures failed, more than --max-failures {limit}"
        if failed and not self.counts[DONE] and not self.counts["done_before"]:
            return f"none of {failed} pictures succeeded"
        return None

    def conclude(self, gallery_uri: str) -> dict[str, Any]:
        """Says what happened; raises StageFailed if that is a failure."""
        counts, out_uri = self.counts, self._run.out_uri
        result = {
            "done": counts[DONE],
            "failed": self.num_failed,
            "done_before": counts["done_before"],
            "failed_before": counts["failed_before"],
            "ignored": counts["ignored"],
            "out": out_uri,
            "ledger": self.ledger.uri,
            "gallery": gallery_uri,
        }
        if self.num_failed > NUM_SHOWN:
            say(f"… and {self.num_failed - NUM_SHOWN} more; all are in the ledger")
        say(_summary(counts, self.num_failed))
        say(f"  pictures  {out_uri}")
        say(f"  gallery   {gallery_uri}")
        say(f"  ledger    {self.ledger.uri}")
        if self.failure is not None:
            raise StageFailed(self.failure, result)
        return result

    def _row(self, source: storage.ObjectInfo, status: str, reason: str, error: str) -> dict[str, Any]:
        return {
            "key": _printable(source.key),
            "source": _printable(source.uri),
            "etag": source.etag,
            "num_bytes": source.num_bytes,
            "status": status,
            "reason": reason,
            "error": _printable(error),
            "finished_at": datetime.datetime.now(datetime.UTC),
        }

    def _say_failed(self, line: str) -> None:
        if self.num_failed <= NUM_SHOWN:
            say(f"failed: {line}")


def _do(
    run: BucketRun, recorder: Recorder, head: list[Item | LeftOut], rest: Iterator[Item | LeftOut]
) -> None:
    """Feeds what is to be done to the workers, and records what comes back."""
    has_more = len(head) == NUM_PLANNED_AHEAD

    def items() -> Iterator[Item]:
        for entry in chain(head, rest):
            if recorder.has_failed_too_often:
                return
            if isinstance(entry, LeftOut):
                recorder.left_out(entry)
            else:
                yield entry

    with Progress("stylize", total=None if has_more else len(head)) as recorder.progress:
        if not has_more and not any(isinstance(entry, Item) for entry in head):
            assert next(items(), None) is None  # records what is left out; nothing needs a worker
            return
        _stylize_all(run, recorder, items(), None if has_more else len(head))


def _stylize_all(run: BucketRun, recorder: Recorder, items: Iterator[Item], num_items: int | None) -> None:
    info = cluster.connect(min_cpus=run.num_workers or 1)
    num_actors = run.num_workers or _num_workers(info, num_items)
    create = _actor_factory(run, info, num_actors)

    def call(actor: Any, item: Item) -> Any:
        return actor.stylize.remote(item.source.uri, places.join(run.out_uri, item.output), item.look)

    def record(outcome: Outcome[Item]) -> None:
        error = "its worker died or hung each time; it may need too much memory: --max-side makes it smaller"
        gone = Report(reason="worker_died", error=error)
        recorder.item(outcome.item, outcome.result or gone, outcome.num_tries)

    pool = ActorPool(create, call, num_actors=num_actors, seconds_for_an_item=SECONDS_FOR_AN_ITEM)
    try:
        with interruptible():
            for outcome in pool.run(items):
                record(outcome)
    except KeyboardInterrupt:
        say("stopping: finishing the pictures under way (Ctrl-C again: at once)")
        for outcome in pool.drain(SECONDS_TO_FINISH):
            record(outcome)
        raise
    except WorkersKeepDying as error:
        raise StageFailed(f"workers keep dying: {error}") from error
    finally:
        pool.close()


def _num_workers(info: cluster.ClusterInfo, num_items: int | None) -> int:
    wanted = min(info.num_cpus, WORKERS_A_GPU * info.num_gpus) if info.num_gpus else info.num_cpus
    return max(1, wanted if num_items is None else min(wanted, num_items))


def _actor_factory(run: BucketRun, info: cluster.ClusterInfo, num_actors: int) -> Any:
    """() -> a new worker. The model and the styles travel through Ray's object store once."""
    files = {name: Path(run.model.checkpoint_dir, name).read_bytes() for name in (MODEL_FILE, CONFIG_FILE)}
    model_reference = ray.put(files)
    style_references = [ray.put(style.rgb) for style in run.styles]
    num_gpus = max(0.01, int(100 * info.num_gpus / num_actors) / 100) if info.num_gpus else 0
    num_threads = max(1, info.num_cpus // num_actors)
    actor_class = StylizeWorker.options(num_gpus=min(1.0, num_gpus))
    return lambda: actor_class.remote(model_reference, style_references, run.settings, num_threads)


def _printable(text: str) -> str:
    """Keys may hold what is no text; the ledger holds UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def _summary(counts: Counter[str], num_failed: int) -> str:
    parts = [f"{counts[DONE]} stylized", f"{num_failed} failed"]
    texts = {
        "done_before": "done before",
        "failed_before": "failed before (--retry-failed tries them again)",
        "left_for_later": "left alone by --retry-failed",
        "ignored": "files that are no pictures",
    }
    return ", ".join(parts + [f"{counts[name]} {text}" for name, text in texts.items() if counts[name]])


def _facts(run: BucketRun) -> dict[str, Any]:
    """What the gallery's head says about the run."""
    return {
        "source": run.source_uri,
        "out": run.out_uri,
        "model": run.model.name,
        "model_digest": run.model.digest,
        "settings": asdict(run.settings),
        "pairing": run.pairing,
    }


def _record_facts(run: BucketRun) -> dict[str, Any]:
    """What run.json says of a run from its beginning."""
    match = registry.MODEL_URI.match(run.model.name) if run.model.version is not None else None
    return {
        "arguments": {
            "source": run.source_uri,
            "out": run.out_uri,
            "pairing": run.pairing,
            "retry_failed": run.only_failed,
            "max_failures": run.max_failures,
            **asdict(run.settings),
        },
        "model": {
            "name": match["name"] if match else run.model.name,
            "version": run.model.version,
            "digest": run.model.digest,
        },
        "looks": [{"name": look.name, "weights": look.weights, "digest": look.digest} for look in run.looks],
        "styles": [{"name": style.name, "uri": style.uri, "sha256": style.digest} for style in run.styles],
        "settings_digest": run.settings.digest,
        "code": {
            "version": importlib.metadata.version("nst"),
            "commit": code_version(),
            "digest": code_digest(),
        },
    }
