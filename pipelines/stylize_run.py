"""A run of `nst stylize` over a folder or bucket: plan, workers, ledger, run.json, gallery.

Plain actors and a ledger of our own, not Ray Data: its checkpoints know which rows are done, not what became
of each picture, and a picture that ends its worker takes the whole block with it.

The model is resolved once and travels to the workers as bytes: what happens in the registry meanwhile
changes nothing. Two runs into one OUT at once do each other no harm: an output is written whole and has the
same bytes whoever writes it, the ledger's parts are added and merged so that no row is lost, and run.json and
the gallery are those of the run that ends last.
"""

from __future__ import annotations

import importlib.metadata
import threading
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray

from infra import cluster, places, registry, storage
from nst.checkpoint import CONFIG_FILE, MODEL_FILE, read_config
from pipelines.actor_pool import CHUNKS_AT_AN_ACTOR, ActorPool, Outcome, WorkersKeepDying
from pipelines.backlog import Backlog
from pipelines.bucket_record import BucketRecord, RunStatus
from pipelines.console import StageFailed, interruptible, say
from pipelines.database import open_database
from pipelines.gallery import write_gallery
from pipelines.ledger import IGNORED, MEMORY_MB, Ledger
from pipelines.lineage import code_digest
from pipelines.models import ResolvedModel
from pipelines.styles import StylePicture
from pipelines.stylize_actor import StylizeWorker
from pipelines.stylize_past import Past
from pipelines.stylize_plan import Entry, EntryText, Item, LeftOut, Look, list_sources, plan
from pipelines.stylize_recorder import GrowingProgress, Recorder
from pipelines.stylize_worker import Report, StylizeSettings
from pipelines.training_record import code_version

SECONDS_FOR_A_CHUNK = 1800.0
SECONDS_TO_FINISH = 20.0  # what is under way when the run is interrupted
WORKERS_A_GPU = 4
NUM_NEWEST = 1_000  # rows of each status that the gallery may choose from


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
    ledger, counts, text = Ledger(run.out_uri), Counter[str](), EntryText(run.looks)
    recorder = Recorder(run, ledger, counts)
    record = BucketRecord(run.out_uri, _record_facts(run))
    is_closing = threading.Event()
    with open_database("nst-plan-", MEMORY_MB) as database:
        past = Past(
            ledger,
            run.out_uri,
            database,
            text,
            model_digest=run.model.digest,
            settings_digest=run.settings.digest,
            is_closing=is_closing,
        )
        sources = list_sources(run.source_uri, run.out_uri)
        planned = plan(sources, run.looks, pairing=run.pairing, format=run.settings.format)
        entries = past.still_to_do(planned, only_failed=run.only_failed, counts=counts)
        with Backlog(
            entries,
            database.folder,
            write=text.write,
            read=text.read,
            kind=_kind,
            is_closing=is_closing,
        ) as backlog:
            has_items = backlog.wait_for("item")
            if not has_items and not backlog.num_of_kind["failure"] and counts.keys() <= {IGNORED}:
                num = counts[IGNORED]
                what = f"holds {num} files, but no picture" if num else "does not exist or is empty"
                raise ValueError(f"SOURCE {run.source_uri} {what}; give a folder or prefix with pictures")
            has_work = backlog.num_found > 0
            if has_work:
                _run_noted(run, recorder, record, backlog, has_items)
            elif not run.only_failed:
                record.catch_up("failed" if recorder.failure else "done", recorder.counts)
    if not has_work and past.has_repeated_rows:
        ledger.merge()  # which a killed run did not come to
    storage.remove_abandoned(run.out_uri)  # by processes that were killed, of this run or an earlier one
    gallery_uri = places.join(run.out_uri, "_nst", "gallery.html")
    if has_work or not storage.exists(gallery_uri):
        write_gallery(run.out_uri, ledger.read(NUM_NEWEST), run.styles, run.looks, _facts(run))
    return recorder.conclude(gallery_uri)


def _run_noted(
    run: BucketRun, recorder: Recorder, record: BucketRecord, backlog: Backlog[Entry], has_items: bool
) -> None:
    """Does the work; ledger and record tell of it however it ends."""
    record.begin()
    status: RunStatus = "failed"
    try:
        with GrowingProgress("stylize", total=None) as progress:
            recorder.progress = progress
            feed = _Feed(backlog, recorder, progress)
            if has_items:
                _stylize_all(run, recorder, backlog, feed)
            else:
                assert not feed.take(1)  # records what is left out; nothing needs a worker
        status = "failed" if recorder.failure else "done"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        try:
            recorder.ledger.flush() if status == "interrupted" else recorder.ledger.merge()
        finally:
            record.end(status, recorder.counts)


def _kind(entry: Entry) -> str:
    if isinstance(entry, Item):
        return "item"
    return "failure" if entry.is_failure else IGNORED


class _Feed:
    """Where the workers' items come from. What is left out is recorded on the way."""

    def __init__(self, backlog: Backlog[Entry], recorder: Recorder, progress: GrowingProgress) -> None:
        self._backlog, self._recorder, self._progress = backlog, recorder, progress

    def take(self, num: int) -> list[Item]:
        if self._backlog.is_complete:
            self._progress.expect(self._backlog.num_found)
        items: list[Item] = []
        while len(items) < num and not self._recorder.has_given_up:
            entries = self._backlog.take(num - len(items))
            if not entries:
                break
            for entry in entries:
                if isinstance(entry, LeftOut):
                    self._recorder.left_out(entry)
                else:
                    items.append(entry)
        return items

    @property
    def num_left(self) -> int | None:
        return 0 if self._recorder.has_given_up else self._backlog.num_left


def _stylize_all(run: BucketRun, recorder: Recorder, backlog: Backlog[Entry], feed: _Feed) -> None:
    backlog.hold()
    cluster.connect(min_cpus=run.num_workers or 1)

    def num_workers() -> int:
        if run.num_workers is not None:
            return run.num_workers
        info = cluster.info()
        wanted = min(info.num_cpus, WORKERS_A_GPU * info.num_gpus) if info.num_gpus else info.num_cpus
        return min(wanted, backlog.num_of_kind["item"]) if backlog.is_complete else wanted

    def call(actor: Any, items: list[Item]) -> Any:
        return actor.stylize.remote(items)

    def record(outcome: Outcome[Item]) -> None:
        backlog.run_ahead()
        error = "its worker died or hung each time; it may need too much memory: --max-side makes it smaller"
        gone = Report(reason="worker_died", error=error)
        recorder.item(outcome.item, outcome.result or gone, outcome.num_tries)

    create = _actor_factory(run, max(1, num_workers()))
    pool = ActorPool(create, call, num_actors=num_workers, seconds_for_a_chunk=SECONDS_FOR_A_CHUNK)
    try:
        with interruptible():
            for outcome in pool.run(feed):
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


def _actor_factory(run: BucketRun, num_actors: int) -> Any:
    """() -> a new worker. The model and the styles travel through Ray's object store once."""
    info = cluster.info()
    files = {name: Path(run.model.checkpoint_dir, name).read_bytes() for name in (MODEL_FILE, CONFIG_FILE)}
    model_reference = ray.put(files)
    style_references = [ray.put(style.rgb) for style in run.styles]
    actor_class = StylizeWorker.options(
        num_gpus=1 / WORKERS_A_GPU if info.num_gpus else 0, max_concurrency=CHUNKS_AT_AN_ACTOR
    )
    return lambda: actor_class.remote(
        model_reference,
        style_references,
        run.settings,
        source_uri=run.source_uri,
        out_uri=run.out_uri,
        num_threads=max(1, info.num_cpus // num_actors),
    )


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
