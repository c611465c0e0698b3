"""What each Ray Train worker runs: `nst.train` with hooks that report to Ray and, on rank 0, to MLflow."""

from __future__ import annotations

import logging
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from PIL import Image
from ray.train.torch import get_device

from infra import cluster, storage, tracking
from nst.checkpoint import save_checkpoint
from nst.config import TrainConfig, from_dict
from nst.corpus import Corpus
from nst.images import to_uint8
from nst.objectives.objective import Objective
from nst.train import Previews, TrainState, prepare, state_to_dict, train

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What every rank is told. `identity` is the configuration and the corpora, as JSON holds them;
    `tracking_uri` None: the worker's own environment says it."""

    identity: dict[str, Any]
    run_id: str
    tracking_uri: str | None
    num_loader_workers: int


@ray.remote(num_cpus=0)
class ProgressBoard:
    """Where rank 0 writes how far it is, and the driver reads it."""

    def __init__(self) -> None:
        self._seen, self._figures = 0, {}

    def write(self, num_images_seen: int, figures: dict[str, str]) -> None:
        self._seen, self._figures = num_images_seen, figures

    def read(self) -> tuple[int, dict[str, str]]:
        return self._seen, self._figures


class RayHooks:
    """Checkpoints through Ray Train on every rank; figures and pictures to MLflow on rank 0 alone."""

    def __init__(self, run: tracking.TrackedRun | None, board: Any, previews: Previews) -> None:
        self._run, self._board, self._previews = run, board, previews
        self._since, self._seen = time.monotonic(), None
        self._last: dict[str, float] = {}

    def should_stop(self) -> bool:
        return False

    def on_metrics(self, state: TrainState, metrics: dict[str, float]) -> None:
        now, seen = time.monotonic(), state.num_images_seen
        if self._seen is not None:
            metrics = {**metrics, "images_per_second": (seen - self._seen) / max(now - self._since, 1e-9)}
        self._since, self._seen, self._last = now, seen, metrics
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
        metrics = {**self._last, **state_to_dict(state)}
        if self._run is None:
            ray.train.report(metrics)  # a barrier: every rank reports as often
            return
        with tempfile.TemporaryDirectory(prefix="nst-checkpoint-") as folder:
            save_checkpoint(folder, objective, state_to_dict(state))
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def train_on_worker(given: dict[str, Any]) -> None:
    """One rank of the training, from the last checkpoint if there is one."""
    settings: WorkerSettings = given["settings"]
    context = ray.train.get_context()
    torch.set_num_threads(max(1, cluster.num_usable_cpus() // context.get_local_world_size()))
    config: TrainConfig = from_dict(TrainConfig, settings.identity["config"])
    content, style = (_open_corpus(settings.identity[role]) for role in ("content", "style"))
    checkpoint = ray.train.get_checkpoint()
    with checkpoint.as_directory() if checkpoint else nullcontext() as checkpoint_dir:
        session = prepare(
            config,
            content,
            style,
            device=get_device(),
            checkpoint_dir=checkpoint_dir,
            num_loader_workers=settings.num_loader_workers,
        )
    run = None
    if context.get_world_rank() == 0:
        run = tracking.TrackedRun.start("training", run_id=settings.run_id, uri=settings.tracking_uri)
    hooks = RayHooks(run, given["board"], Previews.choose(config, content, style))
    try:
        train(session, hooks)
    finally:
        if run is not None and not run.flush():
            log.warning("MLflow did not answer in time: the last figures of run %s are lost", run.run_id)


def _open_corpus(known: dict[str, str]) -> Corpus:
    """The corpus that the driver saw, not one that has changed since."""
    uri = known["uri"]
    corpus = Corpus.open(uri, storage=storage.ObjectStorage() if storage.is_remote(uri) else None)
    if corpus.manifest.digest != known["digest"]:
        raise ValueError(
            f"{uri} has changed since the training began (its digest was {known['digest'][:12]})"
        )
    return corpus
