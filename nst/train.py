"""The training loop, and what it needs to begin or to go on. Knows nothing of clusters: its surroundings are
hooks. `nst.standalone` runs it on one machine, `pipelines.train_gan` under Ray Train."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nst.batch import Batch
from nst.checkpoint import load_checkpoint, load_weights
from nst.config import TrainConfig
from nst.corpus import Corpus
from nst.crops import random_crop
from nst.decoding import decodes_on_device
from nst.distributed import gather, gather_labels, rank, reduce_mean, world_size
from nst.loader import load_batches
from nst.metrics import content_distance, style_distance
from nst.objectives.build import build_objective
from nst.objectives.objective import Objective
from nst.resident import ResidentPictures
from nst.sampling import DynamicBatchSampler, mix_bits

NUM_PREVIEWS = 4
REMEDY = (
    "start another one with lower rates (--set optim.generator_lr=..., optim.encoder_lr=...) or --set "
    "precision=fp32"
)


@dataclass
class TrainState:
    """How far a training is. Everything that is random follows from the seed and the step; `sampler` is what
    an adaptive sampler has seen."""

    step: int = 0
    num_images_seen: int = 0
    sampler: dict[str, Any] = field(default_factory=dict)


class Hooks(Protocol):
    """What the surroundings do at points of the loop. Called on every rank, in the same order, and with the
    same answers on all of them: `should_stop` before a step, `should_checkpoint` after it, for checkpoints
    beside those that `checkpoint_every` asks for."""

    def should_stop(self, state: TrainState) -> bool: ...
    def should_checkpoint(self) -> bool: ...
    def on_metrics(self, state: TrainState, metrics: dict[str, float]) -> None: ...
    def on_preview(self, state: TrainState, objective: Objective) -> None: ...
    def on_checkpoint(self, state: TrainState, objective: Objective) -> None: ...


@dataclass(frozen=True)
class Session:
    """A training that is ready for `train`."""

    config: TrainConfig
    objective: Objective
    sampler: DynamicBatchSampler
    batches: Iterator[Batch]
    state: TrainState


def train(session: Session, hooks: Hooks) -> TrainState:
    """Trains from `session.state` until `config.num_images` were seen or a hook says stop; returns where it
    ended. The last step always reports metrics, preview and checkpoint, and a stop before it a checkpoint."""
    config, objective, state = session.config, session.objective, session.state
    last_saved = state.step

    def save() -> None:
        nonlocal last_saved
        last_saved, state.sampler = state.step, session.sampler.memory()
        hooks.on_checkpoint(state, objective)

    while state.num_images_seen < config.num_images and not hooks.should_stop(state):
        batch = next(session.batches).to(objective.device)
        assert batch.step == state.step, (batch.step, state.step)

        # whatever this step draws at random follows from its number, on every rank alike
        torch.manual_seed(mix_bits(config.seed, 5, state.step) >> 1)
        metrics = objective.step(batch, progress=state.num_images_seen / config.num_images)
        if session.sampler.horizon is not None:  # an adaptive one
            session.sampler.observe(state.step, gather_labels(batch.labels), gather(objective.artist_losses))

        before, num_images = state.num_images_seen, batch.num_images * world_size()
        state.step += 1
        state.num_images_seen += num_images
        objective.update_ema(num_images, state.num_images_seen)

        is_last = state.num_images_seen >= config.num_images
        if _is_due(before, state.num_images_seen, config.log_every) or is_last:
            figures = reduce_mean(metrics)
            hooks.on_metrics(state, figures | objective.alarm_metrics(figures, batch))
        if _is_due(before, state.num_images_seen, config.preview_every) or is_last:
            hooks.on_preview(state, objective)
        is_due = _is_due(before, state.num_images_seen, config.checkpoint_every)
        if hooks.should_checkpoint() or is_due or is_last:
            save()
    if state.step > last_saved:
        save()
    return state


def _is_due(before: int, now: int, every: int) -> bool:
    """Whether a multiple of `every` was passed: batches vary, so counts are rarely hit exactly."""
    return now // every > before // every


def prepare(
    config: TrainConfig,
    content: Corpus,
    style: Corpus,
    *,
    device: torch.device | str = "cpu",
    checkpoint_dir: str | None = None,
    start_from: str | None = None,
    num_loader_workers: int = 0,
) -> Session:
    """A training from the start, or from `checkpoint_dir` on. One that begins has the weights of the
    checkpoint `start_from`, or random ones.

    Raises:
        ValueError: the corpora and the configuration do not fit, or the checkpoint is of another training.
    """
    sampler = DynamicBatchSampler.for_corpora(content, style, config.batch, config.seed, world_size())
    decode_on_device = decodes_on_device(config.decode, torch.device(device))
    resident = None
    if config.decode == "resident":
        where = torch.device(device)
        resident = ResidentPictures.decode(content, where), ResidentPictures.decode(style, where)
    objective = build_objective(config, device)
    state = TrainState()
    if checkpoint_dir is not None:
        state = TrainState(**load_checkpoint(checkpoint_dir, objective))
        sampler.recall(state.sampler)
    elif start_from is not None:
        load_weights(start_from, config, [objective.generator, objective.ema_generator])
    batches = load_batches(
        content,
        style,
        sampler,
        config.batch,
        seed=config.seed,
        step=state.step,
        rank=rank(),
        world_size=world_size(),
        num_workers=num_loader_workers,
        device=device,
        decode_on_device=decode_on_device,
        resident=resident,
    )
    return Session(config, objective, sampler, batches, state)


def state_to_dict(state: TrainState) -> dict[str, Any]:
    return asdict(state)


@dataclass(frozen=True)
class Previews:
    """The same contents and styles each time, so that pictures of a training can be compared.

    Attributes:
        content, style: [n, 3, size, size] in [-1, 1].
    """

    content: Tensor
    style: Tensor

    @classmethod
    def choose(cls, config: TrainConfig, content: Corpus, style: Corpus) -> Previews:
        """Contents evenly over their corpus; styles of as many labels as there are, up to four."""
        contents = np.linspace(0, len(content) - 1, min(NUM_PREVIEWS, len(content))).astype(int)
        labels = np.unique(style.label_runs.labels)
        if len(labels) > 1:
            chosen = labels[np.linspace(0, len(labels) - 1, min(NUM_PREVIEWS, len(labels))).astype(int)]
            styles = np.array([int(style.rows_of(label)[0]) for label in chosen])
        else:
            styles = np.linspace(0, len(style) - 1, min(NUM_PREVIEWS, len(style))).astype(int)

        def crops(corpus: Corpus, rows: np.ndarray) -> Tensor:
            return torch.stack([random_crop(corpus.decode(int(row)), config.batch, key=0) for row in rows])

        return cls(crops(content, contents), crops(style, styles))

    def draw(self, objective: Objective) -> Tensor:
        """The grid [3, H, W] in [-1, 1]: styles along the top, contents down the left, stylized between."""
        stylized = objective.preview(self.content.to(objective.device), self.style.to(objective.device)).cpu()
        corner = torch.ones_like(self.content[0])
        rows = [torch.cat([corner, *self.style], dim=2)]
        rows += [
            torch.cat([content, *row], dim=2) for content, row in zip(self.content, stylized, strict=True)
        ]
        return torch.cat(rows, dim=1)

    def measure(self, objective: Objective) -> dict[str, float]:
        """How good the grid's diagonal is, averaged: `preview/style_distance` and `preview/content_distance`
        (`nst.metrics`), and their sum `preview/distance`, by which checkpoints can be compared."""
        pairs = list(zip(self.content.split(1), self.style.split(1), strict=False))
        content, style = (torch.cat(pictures).add(1).div(2) for pictures in zip(*pairs, strict=True))
        drawn = [objective.preview(*(part.to(objective.device) for part in pair))[0] for pair in pairs]
        stylized = torch.cat(drawn).cpu().clamp(-1, 1).add(1).div(2)
        if not stylized.isfinite().all():
            raise ValueError(f"the training has diverged: its pictures hold no numbers any more; {REMEDY}")
        distances = {
            "preview/style_distance": style_distance(stylized, style),
            "preview/content_distance": content_distance(stylized, content),
        }
        means = {name: float(values.mean()) for name, values in distances.items()}
        return {**means, "preview/distance": sum(means.values())}


if __name__ == "__main__":  # `python -m nst.train`
    import sys

    from nst.standalone import main

    sys.exit(main())
