"""What each Ray Train worker runs: `nst.train` with hooks that save checkpoints, keep the ranks in agreement
about when to stop, and, on rank 0, report to MLflow."""

from __future__ import annotations

import logging
import tempfile
import time
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

from infra import cluster, s3, scratch, storage, tracking
from nst.checkpoint import save_checkpoint
from nst.config import TrainConfig, from_dict
from nst.corpus import Corpus
from nst.images import to_uint8
from nst.objectives.objective import Objective
from nst.train import Previews, Session, TrainState, prepare, state_to_dict, train
from pipelines.checkpoint_store import CheckpointStore
from pipelines.checkpoint_upload import CheckpointUpload
from pipelines.lookout import Lookout
from pipelines.node_metrics import NodeMetrics
from pipelines.training_claim import is_held
from pipelines.watchdog import Watchdog

log = logging.getLogger(__name__)

SECONDS_FOR_LAST_CHECKPOINT = 600.0
SECONDS_FOR_LAST_FIGURES = 600.0
SECONDS_FOR_FIGURES_SO_FAR = 2.0  # a node that is about to go does not wait for MLflow
SECONDS_TO_CLOSE = 5.0
SECONDS_BETWEEN_SIGNS = 5.0
SECONDS_FOR_THE_BOARD = 10.0


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What every rank is told.

    Attributes:
        identity: the configuration and the corpora, as JSON holds them.
        checkpoints_uri: the training's `CheckpointStore`.
        claim: the driver's hold of the training (`TrainingClaim.place`).
        tracking_uri: None: the worker's own environment says it.
        checkpoint_seconds: between checkpoints beside those of the configuration.
        hang_timeout_s: a rank without a step for so long is ended.
        num_threads: of PyTorch on a CPU. Sums depend on it, so it is the same wherever the rank runs.
    """

    identity: dict[str, Any]
    checkpoints_uri: str
    claim: tuple[str, str]
    run_id: str
    tracking_uri: str | None
    num_loader_workers: int
    checkpoint_seconds: float
    hang_timeout_s: float
    num_threads: int


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
        if self._lookout.is_preempted and self._run is not None:
            self._board.note_preemption.remote()
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

    def finish(self, *, is_done: bool) -> None:
        """Waits for what is on its way, checkpoints first; rank 0 alone has some. `is_done`: no other life of
        the workers follows, which would send the figures that are left.

        Raises:
            OSError: the last checkpoint did not reach the store.
        """
        self._watchdog.stop()
        deadline = time.monotonic() + SECONDS_FOR_LAST_CHECKPOINT
        while self._upload is not None and not self._upload.flush(SECONDS_BETWEEN_SIGNS):
            self._report()  # a slow store is no reason to be taken for dead
            if time.monotonic() > deadline:
                raise OSError("the last checkpoint did not reach the store in time")
        patience_s = SECONDS_FOR_LAST_FIGURES if is_done else SECONDS_FOR_FIGURES_SO_FAR
        deadline = time.monotonic() + patience_s
        while self._run is not None and not self._run.flush(min(SECONDS_BETWEEN_SIGNS, patience_s)):
            self._report()
            if time.monotonic() > deadline:
                return  # what is left is said when the run is closed


def train_on_worker(given: dict[str, Any]) -> None:
    """One rank of the training, from the newest whole checkpoint if there is one, to the end or until all
    stop together."""
    settings: WorkerSettings = given["settings"]
    board, rank = given["board"], ray.train.get_context().get_world_rank()
    torch.set_num_threads(settings.num_threads)
    s3.expect_answers()  # the driver has asked it: if it is away now, it was not addressed wrongly
    with (
        Notes(board, rank),
        Watchdog(
            settings.hang_timeout_s, lambda text: board.complain.remote(f"worker {rank}: {text}")
        ) as watchdog,
    ):
        store = CheckpointStore(settings.checkpoints_uri)
        with scratch.folder("nst-resume-") as folder:
            is_there = _fetch_newest(store, folder)
            session, previews = _prepare(settings, folder if is_there else None)
        run = upload = None
        if rank == 0:
            run = tracking.TrackedRun.start("training", run_id=settings.run_id, uri=settings.tracking_uri)
            upload = CheckpointUpload(store, lambda: is_held(settings.claim))
        hooks = RayHooks(settings, run, upload, board, previews, watchdog)
        try:
            with NodeMetrics(board, run, session.state):
                state = train(session, hooks)
                hooks.finish(is_done=state.num_images_seen >= session.config.num_images)
        finally:
            watchdog.stop()
            if upload is not None:
                upload.close()
            if run is not None:
                run.finish(None, SECONDS_TO_CLOSE)  # the status is the driver's to say


class Notes(logging.Handler):
    """What our code warns of on a rank, for whoever follows the training: a rank's own log is a file on its
    node."""

    def __init__(self, board: Any, rank: int) -> None:
        super().__init__(logging.WARNING)
        self._board, self._rank = board, rank

    def emit(self, record: logging.LogRecord) -> None:
        self._board.note.remote(self._rank, record.getMessage())

    def __enter__(self) -> Notes:
        for package in cluster.OUR_PACKAGES:
            logging.getLogger(package).addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        for package in cluster.OUR_PACKAGES:
            logging.getLogger(package).removeHandler(self)


def _fetch_newest(store: CheckpointStore, folder: str) -> bool:
    """Copies the newest whole checkpoint into `folder`; False if there is none. Rank 0 chooses it for all."""
    is_first = ray.train.get_context().get_world_rank() == 0
    chosen = store.fetch_newest(folder) if is_first else None
    name: str | None = broadcast_from_rank_zero(chosen.name if chosen else None)
    if name is not None and not is_first:
        store.fetch(name, folder)
    return name is not None


def _prepare(settings: WorkerSettings, checkpoint_dir: str | None) -> tuple[Session, Previews]:
    config: TrainConfig = from_dict(TrainConfig, settings.identity["config"])
    content, style = (_open_corpus(settings.identity[role]) for role in ("content", "style"))
    session = prepare(
        config,
        content,
        style,
        device=get_device(),
        checkpoint_dir=checkpoint_dir,
        num_loader_workers=settings.num_loader_workers,
    )
    return session, Previews.choose(config, content, style)


def _open_corpus(known: dict[str, str]) -> Corpus:
    """The corpus that the driver saw, not one that has changed since."""
    uri = known["uri"]
    corpus = Corpus.open(uri, storage=storage.ObjectStorage() if storage.is_remote(uri) else None)
    if corpus.manifest.digest != known["digest"]:
        raise ValueError(
            f"{uri} has changed since the training began (its digest was {known['digest'][:12]})"
        )
    return corpus
