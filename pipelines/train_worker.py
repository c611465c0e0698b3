"""What each Ray Train worker runs: `nst.train` with hooks that save checkpoints, keep the ranks in agreement
about when to stop, and, on rank 0, report to MLflow."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from PIL import Image
from ray.exceptions import RayError
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import get_device

from infra import scratch, storage, tracking
from nst.checkpoint import save_checkpoint
from nst.config import TrainConfig, from_dict
from nst.corpus import Corpus
from nst.images import to_uint8
from nst.objectives.objective import Objective
from nst.train import Previews, TrainState, prepare, state_to_dict, train
from pipelines.checkpoint_store import CheckpointStore
from pipelines.checkpoint_upload import CheckpointUpload
from pipelines.lookout import Lookout, form_group, keep_watch
from pipelines.node_metrics import NodeMetrics
from pipelines.watchdog import Watchdog

log = logging.getLogger(__name__)

SECONDS_FOR_LAST_CHECKPOINT = 600.0
SECONDS_FOR_LAST_FIGURES = 120.0
SECONDS_FOR_THE_BOARD = 10.0


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What every rank is told.

    Attributes:
        identity: the configuration and the corpora, as JSON holds them.
        checkpoints_uri: the training's `CheckpointStore`.
        tracking_uri: None: the worker's own environment says it.
        checkpoint_seconds: between checkpoints beside those of the configuration.
        hang_timeout_s: a rank without a step for so long is ended.
        num_threads: of PyTorch on a CPU. Sums depend on it, so it is the same wherever the rank runs.
        world_sizes: the numbers of ranks that can share a batch, in rising order.
    """

    identity: dict[str, Any]
    checkpoints_uri: str
    run_id: str
    tracking_uri: str | None
    num_loader_workers: int
    checkpoint_seconds: float
    hang_timeout_s: float
    num_threads: int
    world_sizes: tuple[int, ...]


class RayHooks:
    """Checkpoints, figures and pictures by rank 0 alone; the decision to stop by all ranks together."""

    def __init__(
        self,
        settings: WorkerSettings,
        run: tracking.TrackedRun | None,
        upload: CheckpointUpload | None,
        board: Any,
        previews: Previews,
        watchdog: Watchdog,
    ) -> None:
        self._run, self._upload, self._board, self._previews = run, upload, board, previews
        self._watchdog = watchdog
        self._lookout = Lookout(settings.checkpoint_seconds, self._report)
        self._since, self._seen, self._seen_now = time.monotonic(), None, 0

    def should_stop(self, state: TrainState) -> bool:
        self._watchdog.beat()
        self._seen_now = state.num_images_seen
        self._lookout.look(state.step)
        return self._lookout.is_over

    def should_checkpoint(self) -> bool:
        return self._lookout.take_checkpoint_due()

    def on_metrics(self, state: TrainState, metrics: dict[str, float]) -> None:
        now, seen = time.monotonic(), state.num_images_seen
        if self._seen is not None:
            metrics = {**metrics, "images_per_second": (seen - self._seen) / max(now - self._since, 1e-9)}
        self._since, self._seen = now, seen
        if self._run is not None:
            self._run.log_metrics(metrics, step=seen)
            shown = {
                name: f"{metrics[key]:.3f}"
                for name, key in (
                    ("style", "generator/style_sensitivity"),
                    ("adversarial", "generator/adversarial"),
                )
                if key in metrics
            }
            self._board.write.remote(seen, shown)

    def on_preview(self, state: TrainState, objective: Objective) -> None:
        if self._run is not None:
            with tempfile.TemporaryDirectory(prefix="nst-preview-") as folder:
                path = Path(folder) / "preview.png"
                Image.fromarray(to_uint8(self._previews.draw(objective))).save(path)
                self._run.log_image(path, "preview", step=state.num_images_seen)

    def on_checkpoint(self, state: TrainState, objective: Objective) -> None:
        self._lookout.checkpoint_taken()
        if self._run is None or self._upload is None:
            return
        measured = self._previews.measure(objective)
        self._run.log_metrics(measured, step=state.num_images_seen)
        self._upload.submit(
            lambda folder: save_checkpoint(folder, objective, state_to_dict(state)),
            num_images_seen=state.num_images_seen,
            score=measured["preview/distance"],
        )

    def _report(self) -> bool:
        """Rank 0 tells that it is at work, and hears whether the driver wants it to stop."""
        try:
            return ray.get(self._board.alive.remote(self._seen_now), timeout=SECONDS_FOR_THE_BOARD)
        except RayError:
            return False

    def finish(self) -> None:
        """Waits for what is on its way, checkpoints first: rank 0 alone has some."""
        self._watchdog.stop()
        self._lookout.close()
        if self._upload is not None:
            self._upload.flush(SECONDS_FOR_LAST_CHECKPOINT)


def train_on_worker(given: dict[str, Any]) -> None:
    """One rank of the training, from the newest whole checkpoint if there is one, to the end or to the notice
    that a node will go."""
    settings: WorkerSettings = given["settings"]
    torch.set_num_threads(settings.num_threads)
    if not form_group(settings.world_sizes, settings.hang_timeout_s):
        keep_watch()  # a spare
        return
    board, rank = given["board"], ray.train.get_context().get_world_rank()
    is_first = rank == 0
    config: TrainConfig = from_dict(TrainConfig, settings.identity["config"])
    content, style = (_open_corpus(settings.identity[role]) for role in ("content", "style"))
    store = CheckpointStore(settings.checkpoints_uri)
    with _newest_checkpoint(store, is_first) as checkpoint_dir:
        session = prepare(
            config,
            content,
            style,
            device=get_device(),
            checkpoint_dir=checkpoint_dir,
            num_loader_workers=settings.num_loader_workers,
        )
    previews = Previews.choose(config, content, style)
    run = upload = None
    if is_first:
        run = tracking.TrackedRun.start("training", run_id=settings.run_id, uri=settings.tracking_uri)
        upload = CheckpointUpload(store)
    watchdog = Watchdog(settings.hang_timeout_s, lambda text: board.complain.remote(f"worker {rank}: {text}"))
    with watchdog, NodeMetrics(board, run, session.state):
        hooks = RayHooks(settings, run, upload, board, previews, watchdog)
        try:
            train(session, hooks)
            hooks.finish()
        finally:
            if upload is not None:
                upload.close()
            if run is not None:
                run.finish(None, SECONDS_FOR_LAST_FIGURES)  # the status is the driver's to say


@contextmanager
def _newest_checkpoint(store: CheckpointStore, is_first: bool) -> Iterator[str | None]:
    """A folder with the newest whole checkpoint, None if there is none. Rank 0 chooses, for all ranks."""
    with scratch.folder("nst-resume-") as folder:
        chosen = store.fetch_newest(folder) if is_first else None
        name = broadcast_from_rank_zero(chosen.name if chosen else None)
        if name is not None and not is_first:
            store.fetch(name, folder)
        if is_first:
            log.info("training from %s", f"checkpoint {name}" if name else "the start")
        yield folder if name is not None else None


def _open_corpus(known: dict[str, str]) -> Corpus:
    """The corpus that the driver saw, not one that has changed since."""
    uri = known["uri"]
    corpus = Corpus.open(uri, storage=storage.ObjectStorage() if storage.is_remote(uri) else None)
    if corpus.manifest.digest != known["digest"]:
        raise ValueError(
            f"{uri} has changed since the training began (its digest was {known['digest'][:12]})"
        )
    return corpus
