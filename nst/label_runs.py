"""The labels of a corpus as runs of neighbours: memory grows with the number of runs, not of samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


class LabelRuns:
    """Samples that lie one behind the other and have the same label, in the order of their rows. A label may
    have any number of runs; those of a corpus also end where a shard ends.

    Args:
        labels: int [R], the label of each run.
        lengths: int [R], its samples, 1 or more.
    """

    def __init__(self, labels: Sequence[int] | np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.ends = np.cumsum(self.lengths)
        self.starts = self.ends - self.lengths

    @classmethod
    def of(cls, labels: Sequence[int] | np.ndarray) -> LabelRuns:
        """The runs in int [n], the label of each sample."""
        values = np.asarray(labels)
        starts = np.flatnonzero(np.diff(values, prepend=values[:1] - 1)) if len(values) else np.zeros(0, int)
        return cls(values[starts], np.diff(starts, append=len(values)))

    @classmethod
    def join(cls, parts: Sequence[LabelRuns]) -> LabelRuns:
        """One behind the other, without merging neighbours."""
        none = [np.zeros(0, np.int64)]
        return cls(
            np.concatenate([part.labels for part in parts] or none),
            np.concatenate([part.lengths for part in parts] or none),
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_samples(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def counts(self, num_labels: int) -> Integers:
        """[num_labels] samples of each label."""
        counts = np.zeros(num_labels, np.int64)
        np.add.at(counts, self.labels, self.lengths)
        return counts

    def per_sample(self) -> NDArray[np.int32]:
        """[n] the label of each sample."""
        return np.repeat(self.labels.astype(np.int32), self.lengths)

    def rows_of(self, label: int) -> Integers:
        """The rows of a label, ascending."""
        mine = self.labels == label
        parts = [np.arange(start, end) for start, end in zip(self.starts[mine], self.ends[mine], strict=True)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


class ClassLayout:
    """Where the works of each class lie. Classes count from 0 in the order of their labels; the works of all
    classes, class after class and ascending by row in each, have the *places* 0 to n - 1.

    Attributes:
        counts: [C] works of each class.
        starts: [C] the place of the first work of each.
    """

    def __init__(self, runs: LabelRuns) -> None:
        self._run_ends = runs.ends
        _, self._run_classes = np.unique(runs.labels, return_inverse=True)
        order = np.argsort(runs.labels, kind="stable")
        self._rows, self._lengths = runs.starts[order], runs.lengths[order]
        self._ends = np.cumsum(self._lengths)
        _, firsts = np.unique(runs.labels[order], return_index=True)
        self._firsts = np.append(firsts, len(order))
        self._class_ends = self._ends[self._firsts[1:] - 1]
        self.counts: Integers = np.diff(self._class_ends, prepend=0)
        self.starts: Integers = self._class_ends - self.counts

    def rows(self, places: np.ndarray) -> Integers:
        """Places to rows of the corpus."""
        runs = np.searchsorted(self._ends, places, side="right")
        return self._rows[runs] + (places - (self._ends[runs] - self._lengths[runs]))

    def classes(self, places: np.ndarray) -> Integers:
        """The class of the work at each place."""
        return np.searchsorted(self._class_ends, places, side="right").astype(np.int64)

    def classes_of_rows(self, rows: np.ndarray) -> Integers:
        """The class of each row of the corpus."""
        return self._run_classes[np.searchsorted(self._run_ends, rows, side="right")].astype(np.int64)

    def run_lengths(self, label: int) -> Integers:
        """Works in each run of a class."""
        return self._lengths[self._firsts[label] : self._firsts[label + 1]]
