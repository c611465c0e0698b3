"""Dynamic batch sampling: which samples make up the batch of a step, as a pure function of (seed, step).

Each batch holds P different artists with K different works each, and as many fresh photos (paper: dynamic
batch sampling). An artist with n works is drawn in proportion to sqrt(n). Nothing is remembered between
steps, so resuming needs only the step, and any number of loader workers or ranks gives the same batches.

With `batch.adaptive` artists that are hard to tell apart come more often, and a batch is a pure function of
(seed, step, memory); the memory goes into the checkpoint. With `batch.sizes` the size varies from step to
step. `batch.sampling=random` leaves the artists out of it: what the paper's way is to be compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nst.class_draws import WINDOW, AdaptiveClasses, ClassPasses
from nst.config import BatchConfig
from nst.permutation import mix_bits, permute
from nst.size_schedule import SizeSchedule

__all__ = ["BatchPlan", "DynamicBatchSampler", "mix_bits", "permute"]

Rows = np.ndarray


@dataclass(frozen=True)
class BatchPlan:
    """Rows of the corpora that a step needs; the same on every rank.

    Attributes:
        content: [P*K] int64 rows of the content corpus.
        style: [P*K] int64 rows of the style corpus, the K works of a class being neighbours.
        labels: [P*K] int64 class of each artwork, counted from 0 in the order of the corpus's labels.
        size: side of the crops in pixels.
    """

    step: int
    content: Rows
    style: Rows
    labels: Rows
    size: int

    def part(self, rank: int, world_size: int) -> BatchPlan:
        """What one rank takes: whole classes, and its share of the photos."""
        num = len(self.style) // world_size
        mine = slice(rank * num, (rank + 1) * num)
        return replace(self, content=self.content[mine], style=self.style[mine], labels=self.labels[mine])


class DynamicBatchSampler:
    """`sampler.plan(step)` is the batch of that step.

    Args:
        style_labels: int [n], the class of each sample of the style corpus. Where there is one class only,
            the art counts as unlabelled and every picture is its own class (its K works are K crops).
        num_content: samples in the content corpus.
        config: P, K, sizes and how classes are drawn.
        seed: of the whole training.
        world_size: P must be divisible by it, at every size.

    Attributes:
        num_classes: P, at `batch.size`.
        horizon: how many steps plans may be ahead of what was observed; None: any number.

    Raises:
        ValueError: an empty corpus, or P that the ranks cannot share.
    """

    def __init__(
        self,
        style_labels: Sequence[int] | np.ndarray,
        num_content: int,
        config: BatchConfig,
        seed: int,
        world_size: int = 1,
    ) -> None:
        labels = np.asarray(style_labels)
        if len(labels) == 0 or num_content == 0:
            raise ValueError(
                f"training needs samples of both kinds; content has {num_content}, style {len(labels)}"
            )
        if labels.min() == labels.max():
            labels = np.arange(len(labels))
        self._order = np.argsort(labels, kind="stable")  # rows by class
        _, starts, counts = np.unique(labels[self._order], return_index=True, return_counts=True)
        self._starts, self._counts = starts, counts
        self._num_content, self._seed = num_content, seed
        self._k, self._is_random = config.works_per_class, config.sampling == "random"
        self.num_classes = min(config.num_classes, len(counts))
        self._schedule = SizeSchedule(config, len(counts), seed)
        _require_shareable(config, self._schedule, len(counts), world_size)
        self.horizon: int | None = WINDOW if config.adaptive else None
        self._classes = (
            AdaptiveClasses(counts, self._schedule, config.adaptive, seed)
            if config.adaptive
            else ClassPasses(counts, self._schedule, seed)
        )

    def images_before(self, step: int) -> int:
        """Content images in the global batches of all steps before this one."""
        return self._schedule.at(step).classes_before * self._k

    def plan(self, step: int) -> BatchPlan:
        shape = self._schedule.at(step)
        num = shape.num_classes * self._k
        if self._is_random:
            style, labels = self._any_works(step, num)
        else:
            classes, visits, lane = self._classes.draw(shape)
            works = [self._works(int(c), int(visit), lane) for c, visit in zip(classes, visits, strict=True)]
            style, labels = np.concatenate(works), np.repeat(classes, self._k)
        content = self._content(np.arange(num, dtype=np.int64) + shape.classes_before * self._k)
        return BatchPlan(step, content, style, labels, shape.size)

    def observe(self, step: int, labels: Tensor | np.ndarray, losses: Tensor | np.ndarray) -> None:
        """What training saw in a step; to be called after every step where `batch.adaptive` is on.

        Args:
            step: the one just done.
            labels: [n] int, classes of the artworks of all ranks, in rank order, so that every rank learns
                the same.
            losses: [n] float, how hard each was to tell apart.
        """
        if self.horizon is not None:
            known = torch.as_tensor(labels).detach().cpu().long().numpy()
            self._classes.observe(step, known, torch.as_tensor(losses).detach().cpu().double().numpy())

    def memory(self) -> dict[str, Any]:
        """What plans depend on beside seed and step, as JSON holds it; {} unless `batch.adaptive` is on."""
        return self._classes.memory()

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Goes on from where `memory` was taken; before any batch is loaded, since loading plans ahead.

        Raises:
            ValueError: it does not belong to this training.
        """
        self._classes.recall(memory)

    def _works(self, label: int, visit: int, lane: int) -> Rows:
        """K works of a class: each pass over its works takes them in a new random order, K at a time."""
        count, k = int(self._counts[label]), self._k
        if count < k:
            works = (np.arange(k) + visit) % count
        else:
            turn, place = divmod(visit, count // k)
            key = mix_bits(self._seed, 3, label, turn * len(self._schedule) + lane)
            works = permute(np.arange(place * k, (place + 1) * k), count, key)
        return self._order[self._starts[label] + works].astype(np.int64)

    def _any_works(self, step: int, num: int) -> tuple[Rows, Rows]:
        """Works from the whole corpus, and their classes; one twice only if there are not enough."""
        positions = np.arange(num, dtype=np.int64) % len(self._order)
        places = permute(positions, len(self._order), mix_bits(self._seed, 8, step))
        labels = np.searchsorted(self._starts, places, side="right") - 1
        return self._order[places].astype(np.int64), labels.astype(np.int64)

    def _content(self, positions: np.ndarray) -> Rows:
        turns, places = np.divmod(positions, self._num_content)
        rows = np.empty_like(positions)
        for turn in np.unique(turns):
            mine = turns == turn
            rows[mine] = permute(places[mine], self._num_content, mix_bits(self._seed, 4, int(turn)))
        return rows


def _require_shareable(
    config: BatchConfig, schedule: SizeSchedule, num_available: int, world_size: int
) -> None:
    for size, num_classes in zip(schedule.sizes, schedule.num_classes, strict=True):
        if num_classes % world_size:
            # taking fewer would make the global batch depend on the number of ranks
            at_size = f" at {size} px" if config.sizes else ""
            raise ValueError(
                f"a batch{at_size} takes {num_classes} classes (batch.num_classes is {config.num_classes}, "
                f"the corpus has {num_available}), which {world_size} workers cannot share: use another "
                "--num-workers or --set batch.num_classes=..."
            )
