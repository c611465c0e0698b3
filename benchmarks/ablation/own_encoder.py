"""What a run's own style encoder knows: does it tell artists apart, on works that it was trained on and on
works that it was not? A wide gap between the two is overfitting; guessing on both is collapse."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ablation.pairs import Evaluation, Pixels, Works
from nst import losses
from nst.checkpoint import load_checkpoint, read_config
from nst.images import to_float
from nst.objectives.build import build_objective
from nst.objectives.objective import Objective
from nst.objectives.rgan import Rgan
from nst.objectives.unigan import Unigan

Embed = Callable[[Pixels], Tensor]
TEMPERATURE = 0.2
NUM_EPISODES, NUM_CLASSES, WORKS_PER_CLASS = 40, 8, 2
CHUNK = 32  # pictures in one pass


def load_objective(checkpoint_dir: str | Path) -> Objective:
    """Networks as the training left them, the judging ones too."""
    objective = build_objective(read_config(checkpoint_dir))
    load_checkpoint(checkpoint_dir, objective)
    return objective


def embedding_of(objective: Objective) -> Embed:
    """uint8 [N, S, S, 3] -> unit vectors [N, D] of the style encoder, as the training last had it (it keeps
    no averaged one). Pictures are looked at in the size of its crops."""
    side = objective.config.batch.size

    @torch.inference_mode()
    def embed(pictures: Pixels) -> Tensor:
        parts = []
        for chunk in to_float(pictures).split(CHUNK):
            images = F.interpolate(chunk, (side, side), mode="bilinear", antialias=True)
            parts.append(_look(objective, images).float())
        return torch.cat(parts)

    return embed


def _look(objective: Objective, images: Tensor) -> Tensor:
    if isinstance(objective, Unigan):
        return objective.encoders(images, images).z
    assert isinstance(objective, Rgan), type(objective)
    return objective.style_discriminator(images)


def trained_parameters(objective: Objective) -> dict[str, int]:
    """How many numbers are trained, and how many of them a stylization needs."""
    trained: dict[int, nn.Parameter] = {}
    for name, network in objective.networks().items():
        if name != "ema":
            trained |= {id(parameter): parameter for parameter in network.parameters()}
    generator = sum(parameter.numel() for parameter in objective.generator.parameters())
    return {"trained": sum(parameter.numel() for parameter in trained.values()), "generator": generator}


def probe_encoder(embed: Embed, evaluation: Evaluation) -> dict[str, float]:
    """retrieval_*: share of works whose nearest among the trained-on works (other works only) has the right
    label. metric_*: the matrix loss over the loss of guessing, 1 being collapse. *_gap: seen minus unseen,
    and unseen minus seen, so that more is more overfitting. cosine: mean cosine between different works."""
    seen, unseen = evaluation.works, evaluation.unseen_works
    z_seen, z_unseen = embed(seen.pictures), embed(unseen.pictures)
    figures = {
        "retrieval_seen": retrieval(z_seen, seen, z_seen, seen),
        "retrieval_unseen": retrieval(z_unseen, unseen, z_seen, seen),
        "metric_seen": matrix_over_guessing(z_seen, seen.labels),
        "metric_unseen": matrix_over_guessing(z_unseen, unseen.labels),
        "cosine": float(losses.off_diagonal_cosine(torch.cat([z_seen, z_unseen]))),
    }
    figures["retrieval_gap"] = figures["retrieval_seen"] - figures["retrieval_unseen"]
    figures["metric_gap"] = figures["metric_unseen"] - figures["metric_seen"]
    return figures


def retrieval(queries: Tensor, query_works: Works, gallery: Tensor, gallery_works: Works) -> float:
    """Share of queries [N, D] whose nearest in the gallery [M, D], the query's own work left out, has their
    label."""
    similarity = queries @ gallery.T
    own = np.equal.outer(np.array(query_works.work_ids), np.array(gallery_works.work_ids))
    nearest = similarity.masked_fill(torch.from_numpy(own), -math.inf).argmax(dim=1).tolist()
    right = [
        gallery_works.labels[found] == label for found, label in zip(nearest, query_works.labels, strict=True)
    ]
    return float(np.mean(right))


def matrix_over_guessing(embeddings: Tensor, labels: Sequence[str], seed: int = 0) -> float:
    """The paper's matrix loss over ln(columns), mean over batches of P labels x K works drawn as in a
    training,
    whatever the training itself drew: 1 is guessing. NaN if no two labels have K works."""
    rng = np.random.default_rng(seed)
    by_label: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        by_label.setdefault(label, []).append(row)
    usable = sorted(label for label, rows in by_label.items() if len(rows) >= WORKS_PER_CLASS)
    if len(usable) < 2:
        return math.nan
    num, k = min(NUM_CLASSES, len(usable)), WORKS_PER_CLASS
    positives = torch.arange(num * k).view(num, k).roll(-1, dims=1).flatten()
    groups = torch.arange(num).repeat_interleave(k)
    mask = groups[:, None] == groups[None, :]
    ratios = []
    for _ in range(NUM_EPISODES):
        rows = [
            row
            for label in rng.permutation(usable)[:num]
            for row in rng.permutation(by_label[label])[:k].tolist()
        ]
        z = embeddings[rows]
        loss = losses.matrix_loss(z, z, positives, TEMPERATURE, mask)
        ratios.append(float(loss) / math.log(num * k - k + 1))
    return float(np.mean(ratios))
