"""Figures over many pictures: a mean with its bootstrap interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Interval:
    """The mean with its percentile bootstrap interval (Efron 1979); the same values give the same interval.

    Raises:
        ValueError: no values, or a confidence outside of (0, 1).
    """
    if not len(values):
        raise ValueError("no values to average; measure at least one pair")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1; 0.95 is usual")
    sample = np.asarray(values, dtype=np.float64)
    rows = np.random.default_rng(seed).integers(len(sample), size=(num_resamples, len(sample)))
    low, high = np.quantile(sample[rows].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean=float(sample.mean()), low=float(low), high=float(high))


def summarize(measures: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """name -> {mean, low, high} of every measure, as JSON holds it."""
    intervals = {name: bootstrap_interval(values) for name, values in measures.items()}
    return {
        name: {"mean": interval.mean, "low": interval.low, "high": interval.high}
        for name, interval in intervals.items()
    }
