"""Dynamic batch sampling: which samples make up the batch of a step, as a pure function of (seed, step).

Each batch holds P different artists with K different works each, and as many fresh photos (paper: dynamic
batch sampling). An artist with n works is drawn in proportion to sqrt(n). Nothing is remembered between
steps, so resuming needs only the step, and any number of loader workers or ranks gives the same batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nst.config import BatchConfig

Rows = np.ndarray

_MASK = (1 << 64) - 1


def mix_bits(*parts: int) -> int:
    """A 64-bit hash of integers (splitmix64 finaliser): the same on every machine and Python version."""
    value = 0
    for part in parts:
        value = (value + (part & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        value ^= value >> 31
    return value


def permute(positions: np.ndarray, num: int, key: int) -> np.ndarray:
    """Where each position goes in a random permutation of range(num), without making the permutation: a
    four-round Feistel network over the next even number of bits, walked until it lands inside.

    Cost and memory do not grow with `num`.

    Args:
        positions: int64, each in [0, num).
        num: up to 2^60.
        key: which permutation.
    """
    if num <= 1:
        return np.zeros_like(positions)
    half = max(1, ((num - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = [np.uint64(mix_bits(key, turn)) for turn in range(4)]
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> np.uint64(half), values[outside] & mask
        for turn_key in keys:
            left, right = right, left ^ (_scramble(right ^ turn_key) & mask)
        values[outside] = (left << np.uint64(half)) | right
        outside = values >= np.uint64(num)
    return values.astype(np.int64)


def _scramble(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class BatchPlan:
    """Rows of the corpora that a step needs; the same on every rank.

    Attributes:
        content: [P*K] int64 rows of the content corpus.
        style: [P*K] int64 rows of the style corpus, the K works of a class being neighbours.
        labels: [P*K] int64 class of each artwork.
    """

    step: int
    content: Rows
    style: Rows
    labels: Rows

    def part(self, rank: int, world_size: int) -> BatchPlan:
        """What one rank takes: whole classes, and its share of the photos."""
        size = len(self.style) // world_size
        mine = slice(rank * size, (rank + 1) * size)
        return BatchPlan(self.step, self.content[mine], self.style[mine], self.labels[mine])


class DynamicBatchSampler:
    """`sampler.plan(step)` is the batch of that step.

    Args:
        style_labels: int [n], the class of each sample of the style corpus. Where there is one class only,
            the art counts as unlabelled and every picture is its own class (its K works are K crops).
        num_content: samples in the content corpus.
        config: P and K.
        seed: of the whole training.
        world_size: P must be divisible by it.

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
        self._k = config.works_per_class
        self.num_classes = min(config.num_classes, len(counts))
        if self.num_classes % world_size:
            # taking fewer would make the global batch depend on the number of ranks
            raise ValueError(
                f"a batch takes {self.num_classes} classes (batch.num_classes is {config.num_classes}, the "
                f"corpus has {len(counts)}), which {world_size} workers cannot share: use another "
                "--num-workers or --set batch.num_classes=..."
            )
        self._visits = _visits_per_pass(counts, self.num_classes)
        self._batches_per_pass = int(self._visits.sum()) // self.num_classes

    @property
    def images_per_step(self) -> int:
        """Content images in a global batch."""
        return self.num_classes * self._k

    def plan(self, step: int) -> BatchPlan:
        classes, visits = self._classes(step)
        rows = [self._works(int(label), int(visit)) for label, visit in zip(classes, visits, strict=True)]
        positions = np.arange(self.images_per_step, dtype=np.int64) + step * self.images_per_step
        return BatchPlan(step, self._content(positions), np.concatenate(rows), np.repeat(classes, self._k))

    def _classes(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The P classes of a step, and how often each was visited before.

        A pass lays the visits of all classes, classes in random order, in one row and deals them out to its
        batches like cards: neighbours go to different batches, so that no batch holds a class twice.
        """
        turn, place = divmod(step, self._batches_per_pass)
        order, ends = _pass_order(self._visits.tobytes(), mix_bits(self._seed, 1, turn))
        batch = permute(np.array([place]), self._batches_per_pass, mix_bits(self._seed, 2, turn))[0]
        slots = batch + np.arange(self.num_classes) * self._batches_per_pass
        which = np.searchsorted(ends, slots, side="right")
        classes = order[which]
        first = ends[which] - self._visits[classes]
        return classes, turn * self._visits[classes] + (slots - first)

    def _works(self, label: int, visit: int) -> np.ndarray:
        """K works of a class: each pass over its works takes them in a new random order, K at a time."""
        count, k = int(self._counts[label]), self._k
        if count < k:
            works = (np.arange(k) + visit) % count
        else:
            turn, place = divmod(visit, count // k)
            works = permute(
                np.arange(place * k, (place + 1) * k), count, mix_bits(self._seed, 3, label, turn)
            )
        return self._order[self._starts[label] + works].astype(np.int64)

    def _content(self, positions: np.ndarray) -> np.ndarray:
        turns, places = np.divmod(positions, self._num_content)
        rows = np.empty_like(positions)
        for turn in np.unique(turns):
            mine = turns == turn
            rows[mine] = permute(places[mine], self._num_content, mix_bits(self._seed, 4, int(turn)))
        return rows


def _visits_per_pass(counts: np.ndarray, num_classes: int) -> np.ndarray:
    """How often each class comes in one pass: in proportion to sqrt(n), but never more often than there are
    batches in the pass, so that no batch needs to hold a class twice."""
    visits = np.maximum(1, np.rint(4 * np.sqrt(counts / counts.min()))).astype(np.int64)
    while visits.max() > (limit := int(visits.sum()) // num_classes):
        visits = np.minimum(visits, limit)
    return visits


@lru_cache(maxsize=4)
def _pass_order(visits: bytes, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes in the random order of one pass, and where each one's visits end."""
    counts = np.frombuffer(visits, dtype=np.int64)
    order = permute(np.arange(len(counts)), len(counts), key)
    return order, np.cumsum(counts[order])
