"""Dynamic batch sampling: which samples make up the batch of a step, as a pure function of (seed, step).

Each batch holds P different artists with K different works each, and as many fresh photos (paper: dynamic
batch sampling). An artist with n works is drawn in proportion to sqrt(n). Nothing is remembered between
steps, so resuming needs only the step, and any number of loader workers or ranks gives the same batches.

With `batch.adaptive` artists that are hard to tell apart come more often, and a batch is a pure function of
(seed, step, memory); the memory goes into the checkpoint. With `batch.sizes` the size varies from step to
step. `batch.sampling=random` leaves the artists out of it: what the paper's way is to be compared with.

With `batch.window_shards` neighbouring steps keep to a moving window of shards, for corpora that are larger
than the cache (`nst.windowed_order`); without it any step may need any shard."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nst.class_draws import WINDOW, AdaptiveClasses, ClassPasses, PicturePasses
from nst.config import BatchConfig
from nst.label_runs import ClassLayout, LabelRuns
from nst.permutation import mix_bits, permute
from nst.size_schedule import SizeSchedule
from nst.windowed_order import WindowedOrder

if TYPE_CHECKING:
    from nst.corpus import Corpus

__all__ = ["BatchPlan", "DynamicBatchSampler", "largest_world_size", "mix_bits", "permute"]

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

    Its memory grows with the number of classes, runs and shards, not of samples (but for `batch.adaptive`
    over unlabelled art, which follows every picture). The cost of a batch does not grow with the corpus, but
    for `batch.window_shards` with labels, where it grows slowly with the shards of a class.

    With `batch.window_shards` = W above 0:
    - photos: each of L tracks of a batch, L the greatest common divisor of the P of all sizes, walks through
      a part of the corpus of its own, W shards at a time; a rank takes whole tracks. Every photo comes at
      most once in a pass, and fewer than L are left out of it, others each time. `random` art alike.
    - artworks: the works of a class come out of W of its shards at a time, each at most once in a pass over
      the class (n mod K of its n works are left out of it, as ever). The classes of a step are those of
      W = 0, so that W shards of every class are in use, by each size its own.
    - unlabelled art: as photos, P pictures a step, each K times; fewer than P are left out of a pass.

    Args:
        style_labels: int [n], the class of each sample of the style corpus, or their runs. Where there is one
            class only, the art counts as unlabelled and every picture is its own class (its K works are K
            crops).
        num_content: samples in the content corpus.
        config: P, K, sizes and how classes are drawn.
        seed: of the whole training.
        world_size: P must be divisible by it, at every size.
        content_shards, style_shards: samples in each shard, for `batch.window_shards`; runs of labels should
            end where shards end. None: there is one shard.

    Attributes:
        num_classes: P, at `batch.size`.
        horizon: how many steps plans may be ahead of what was observed; None: any number.

    Raises:
        ValueError: an empty corpus, P that the ranks cannot share, or settings that exclude each other.
    """

    def __init__(
        self,
        style_labels: Sequence[int] | np.ndarray | LabelRuns,
        num_content: int,
        config: BatchConfig,
        seed: int,
        world_size: int = 1,
        *,
        content_shards: Sequence[int] | np.ndarray | None = None,
        style_shards: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        runs = style_labels if isinstance(style_labels, LabelRuns) else LabelRuns.of(style_labels)
        num_style = runs.num_samples
        if num_style == 0 or num_content == 0:
            raise ValueError(
                f"training needs samples of both kinds; content has {num_content}, style {num_style}"
            )
        self._layout = ClassLayout(runs)
        self._is_unlabelled = len(self._layout.counts) == 1
        num_available = _num_classes_of(runs)
        self._num_content, self._num_style, self._seed = num_content, num_style, seed
        self._k, self._is_random = config.works_per_class, config.sampling == "random"
        self.num_classes = min(config.num_classes, num_available)
        self._schedule = SizeSchedule(config, num_available, seed)
        _require_shareable(config, self._schedule, num_available, world_size)

        self._window = config.window_shards
        self._photos = self._pictures = None
        if self._window:
            photos = [num_content] if content_shards is None else content_shards
            pictures = [num_style] if style_shards is None else style_shards
            self._photos = WindowedOrder(np.asarray(photos), self._window)
            self._pictures = WindowedOrder(np.asarray(pictures), self._window)

        self.horizon: int | None = WINDOW if config.adaptive else None
        if config.adaptive and self._is_unlabelled and self._window:
            raise ValueError(
                "batch.adaptive chooses single pictures of unlabelled art wherever they are, "
                "batch.window_shards keeps to a few shards: set one of them back"
            )
        if config.adaptive:
            counts = np.ones(num_style, np.int64) if self._is_unlabelled else self._layout.counts
            self._classes = AdaptiveClasses(counts, self._schedule, config.adaptive, seed)
        elif self._is_unlabelled:
            self._classes = PicturePasses(num_style, self._schedule, seed, self._pictures)
        else:
            self._classes = ClassPasses(self._layout.counts, self._schedule, seed)

    @classmethod
    def for_corpora(
        cls, content: Corpus, style: Corpus, config: BatchConfig, seed: int, world_size: int = 1
    ) -> DynamicBatchSampler:
        return cls(
            style.label_runs,
            len(content),
            config,
            seed,
            world_size,
            content_shards=[shard.num_samples for shard in content.manifest.shards],
            style_shards=[shard.num_samples for shard in style.manifest.shards],
        )

    def images_before(self, step: int) -> int:
        """Content images in the global batches of all steps before this one."""
        return self._schedule.at(step).classes_before * self._k

    def plan(self, step: int) -> BatchPlan:
        shape = self._schedule.at(step)
        num, before = shape.num_classes * self._k, shape.classes_before * self._k
        if self._is_random:
            style, labels = self._any_works(step, num, before)
        else:
            classes, visits, lane = self._classes.draw(shape)
            labels = np.repeat(classes, self._k)
            style = labels if self._is_unlabelled else self._works_of(classes, visits, lane)
        return BatchPlan(step, self._content(num, before), style, labels, shape.size)

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

    def _works_of(self, classes: Rows, visits: Rows, lane: int) -> Rows:
        """[P*K] rows, K for each class."""
        works = [self._works(int(c), int(visit), lane) for c, visit in zip(classes, visits, strict=True)]
        return self._layout.rows(np.concatenate(works))

    def _works(self, label: int, visit: int, lane: int) -> Rows:
        """Places of K works of a class: each pass over its works takes them in a new random order, K at a
        time."""
        count, k = int(self._layout.counts[label]), self._k
        if count < k:
            works = (np.arange(k) + visit) % count
        else:
            turn, place = divmod(visit, count // k)
            key = mix_bits(self._seed, 3, label, turn * len(self._schedule) + lane)
            positions = np.arange(place * k, (place + 1) * k)
            if self._window:
                works = WindowedOrder(self._layout.run_lengths(label), self._window).at(positions, key)
            else:
                works = permute(positions, count, key)
        return self._layout.starts[label] + works

    def _any_works(self, step: int, num: int, before: int) -> tuple[Rows, Rows]:
        """Works from the whole corpus, and their classes; one twice only if there are not enough."""
        if self._pictures is not None:
            rows = self._in_places(self._pictures, num, before, 10)
            return rows, rows if self._is_unlabelled else self._layout.classes_of_rows(rows)
        positions = np.arange(num, dtype=np.int64) % self._num_style
        places = permute(positions, self._num_style, mix_bits(self._seed, 8, step))
        if self._is_unlabelled:
            return places, places
        return self._layout.rows(places), self._layout.classes(places)

    def _content(self, num: int, before: int) -> Rows:
        if self._photos is not None:
            return self._in_places(self._photos, num, before, 9)
        turns, places = np.divmod(np.arange(before, before + num, dtype=np.int64), self._num_content)
        rows = np.empty_like(places)
        for turn in np.unique(turns):
            mine = turns == turn
            rows[mine] = permute(places[mine], self._num_content, mix_bits(self._seed, 4, int(turn)))
        return rows

    def _in_places(self, order: WindowedOrder, num: int, before: int, domain: int) -> Rows:
        """[num] rows of a stream in which each of L tracks of the batch walks through a part of its own."""
        num_tracks = math.gcd(*self._schedule.num_classes)
        if order.num_samples < num_tracks:
            num_tracks = 1
        length = order.num_samples // num_tracks  # of the part that a track walks through in a pass
        steps = np.arange(before // num_tracks, (before + num) // num_tracks, dtype=np.int64)
        turns, offsets = np.divmod(steps, length)
        firsts = np.arange(num_tracks, dtype=np.int64)[:, None] * length
        rows = np.empty((num_tracks, len(steps)), np.int64)
        for turn in np.unique(turns):
            mine = turns == turn
            positions = (firsts + offsets[mine]).reshape(-1)
            key = mix_bits(self._seed, domain, int(turn))
            rows[:, mine] = order.at(positions, key).reshape(num_tracks, -1)
        return rows.reshape(-1)


def largest_world_size(
    style_labels: Sequence[int] | np.ndarray | LabelRuns, config: BatchConfig, num_workers: int
) -> int:
    """How many of `num_workers` can train: the largest number up to it that can share the batches of every
    size, so that `DynamicBatchSampler` takes it as a world size. 1 or more.

    Args:
        style_labels: as for `DynamicBatchSampler`; a corpus has them as `label_runs`.
        config: P and sizes.
        num_workers: 1 or more.
    """
    runs = style_labels if isinstance(style_labels, LabelRuns) else LabelRuns.of(style_labels)
    # the number of classes at a size does not depend on the seed
    common = math.gcd(*SizeSchedule(config, _num_classes_of(runs), seed=0).num_classes)
    return max(num for num in range(1, num_workers + 1) if common % num == 0)


def _num_classes_of(runs: LabelRuns) -> int:
    """Classes that can be drawn from: pictures, where there are no labels to tell them apart."""
    num_labels = len(np.unique(runs.labels))
    return runs.num_samples if num_labels == 1 else num_labels


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
