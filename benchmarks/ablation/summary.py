"""From the measures of single runs to rows: means and deviations over seeds, and differences to the base,
seed by seed and pair by pair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.ablation.measure import LOWER_IS_BETTER, means
from nst.intervals import bootstrap_interval

BASE = "base"
# Student's t at 97.5 %, by degrees of freedom: the half-width of a 95 % interval in standard errors.
T_QUANTILE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

Measures = Mapping[str, Any]  # of one run, as `measure.measure_run` gives them
ByVariant = Mapping[str, Mapping[int, Measures]]  # variant -> seed -> measures


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1) over seeds; NaN where there is one seed."""

    mean: float
    std: float
    num: int


@dataclass(frozen=True)
class Difference:
    """Variant minus base.

    Attributes:
        mean: over the seeds that both have.
        low, high: 95 % interval over seeds (paired t); NaN with one seed.
        pairs_low, pairs_high: 95 % interval over pairs (bootstrap of the seeds' mean), NaN for figures a run
            has
            one of. It leaves out how much seeds differ.
        num_worse: seeds in which the variant is worse than the base; None where neither way is better.
        num: seeds.
    """

    mean: float
    low: float
    high: float
    pairs_low: float
    pairs_high: float
    num_worse: int | None
    num: int

    @property
    def is_clear(self) -> bool:
        """The interval over seeds leaves 0 out."""
        return self.low > 0 or self.high < 0


def figure(measures: Measures, place: str, name: str) -> float:
    """One figure of one run. `place` is a group of pairs, "unseen" (both unseen groups), "scalars" or
    "cost"."""
    if place in ("scalars", "cost"):
        return measures[place].get(name, math.nan)
    return float(np.mean(pair_figures(measures, place, name) or [math.nan]))


def pair_figures(measures: Measures, place: str, name: str) -> list[float]:
    """A figure a pair; none where it was not measured."""
    groups = ("unseen_works", "unseen_artists") if place == "unseen" else (place,)
    return [value for group in groups for value in measures["groups"][group].get(name, [])]


def spread(values: Sequence[float]) -> Spread:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Spread(math.nan, math.nan, 0)
    std = float(np.std(known, ddof=1)) if len(known) > 1 else math.nan
    return Spread(float(np.mean(known)), std, len(known))


def spread_of(runs: Mapping[int, Measures], place: str, name: str) -> Spread:
    """Over the seeds of a variant."""
    return spread([figure(measures, place, name) for measures in runs.values()])


def difference(
    runs: Mapping[int, Measures], base: Mapping[int, Measures], place: str, name: str
) -> Difference:
    """Over the seeds that both have: equal seeds have seen the same batches, so far as they draw alike."""
    seeds = sorted(set(runs) & set(base))
    steps = [figure(runs[seed], place, name) - figure(base[seed], place, name) for seed in seeds]
    steps = [step for step in steps if not math.isnan(step)]
    found = spread(steps)
    half = math.nan
    if found.num > 1:
        half = T_QUANTILE.get(found.num - 1, 1.96) * found.std / math.sqrt(found.num)
    pairs_low, pairs_high = _interval_over_pairs(runs, base, seeds, place, name)
    lower_is_better = LOWER_IS_BETTER.get(name)
    worse = (
        None if lower_is_better is None else sum(step > 0 if lower_is_better else step < 0 for step in steps)
    )
    return Difference(
        found.mean, found.mean - half, found.mean + half, pairs_low, pairs_high, worse, found.num
    )


def _interval_over_pairs(
    runs: Mapping[int, Measures], base: Mapping[int, Measures], seeds: Sequence[int], place: str, name: str
) -> tuple[float, float]:
    if place in ("scalars", "cost") or not seeds:
        return math.nan, math.nan
    steps = [
        np.subtract(pair_figures(runs[seed], place, name), pair_figures(base[seed], place, name))
        for seed in seeds
    ]
    if not len(steps[0]):
        return math.nan, math.nan
    interval = bootstrap_interval(np.mean(steps, axis=0).tolist())
    return interval.low, interval.high


def to_json(by_variant: ByVariant, baselines: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the figures of single pairs."""
    return {
        "baselines": {
            name: {group: means(measures) for group, measures in groups.items()}
            for name, groups in baselines.items()
        },
        "runs": {
            name: {
                str(seed): {
                    "groups": {group: means(values) for group, values in measures["groups"].items()},
                    "scalars": measures["scalars"],
                    "cost": measures["cost"],
                }
                for seed, measures in runs.items()
            }
            for name, runs in by_variant.items()
        },
        "differences_to_base": {
            name: _differences(runs, by_variant[BASE])
            for name, runs in by_variant.items()
            if name != BASE and BASE in by_variant
        },
    }


def _differences(runs: Mapping[int, Measures], base: Mapping[int, Measures]) -> dict[str, dict[str, Any]]:
    one = next(iter(runs.values()))
    places = {place: list(measures) for place, measures in one["groups"].items()}
    places["unseen"] = places["unseen_works"]
    places["scalars"], places["cost"] = list(one["scalars"]), list(one["cost"])
    return {
        place: {name: vars(difference(runs, base, place, name)) for name in names}
        for place, names in places.items()
    }
