"""Bootstrap intervals: of independent figures, of pairs that share contents and styles, of differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from nst.intervals import bootstrap_interval, groups_for, paired_interval, summarize

NUM_TRIALS = 200
CONTENTS, STYLES = (np.arange(64) % 16).tolist(), (np.arange(64) // 8).tolist()


def test_an_interval_is_as_wide_as_the_standard_error_says_and_repeats() -> None:
    values = np.random.default_rng(0).normal(3, 1, 200).tolist()
    interval = bootstrap_interval(values)
    assert interval == bootstrap_interval(values)
    assert interval.low < interval.mean < interval.high
    half_width = 1.96 * float(np.std(values)) / 200**0.5
    assert interval.high - interval.low == pytest.approx(2 * half_width, rel=0.1)
    narrower = bootstrap_interval(values, confidence=0.5)
    assert interval.low < narrower.low < narrower.high < interval.high


def coverage(groups: tuple[list[int], ...], spread: float) -> float:
    """How often the interval holds the true mean 0 of figures that contents and styles move by `spread`."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(NUM_TRIALS):
        values = spread * (rng.normal(size=16)[CONTENTS] + rng.normal(size=8)[STYLES]) + rng.normal(size=64)
        interval = bootstrap_interval(values.tolist(), groups=groups, num_resamples=300)
        hits += interval.low <= 0 <= interval.high
    return hits / NUM_TRIALS


def test_intervals_hold_the_truth_where_pairs_share_contents_and_styles() -> None:
    assert coverage((CONTENTS, STYLES), spread=1.0) > 0.87
    assert coverage((CONTENTS, STYLES), spread=0.0) > 0.9
    assert coverage((), spread=1.0) < 0.8  # what the plain bootstrap would claim


def test_groups_of_one_are_the_plain_bootstrap() -> None:
    values = np.random.default_rng(2).normal(size=40).tolist()
    plain, grouped = (bootstrap_interval(values, groups=groups) for groups in ((), (list(range(40)),) * 2))
    assert grouped.high - grouped.low == pytest.approx(plain.high - plain.low, rel=0.1)


def test_paired_differences_see_what_two_intervals_hide() -> None:
    rng = np.random.default_rng(3)
    others = rng.normal(1, 1, 64)
    values = others - 0.1 + rng.normal(0, 0.05, 64)
    groups = (CONTENTS, STYLES)
    found = paired_interval(values.tolist(), others.tolist(), groups=groups)
    assert found.mean == pytest.approx(float((values - others).mean()))
    assert found.high < 0
    assert bootstrap_interval(values.tolist()).high > bootstrap_interval(others.tolist()).low
    scaled = paired_interval(values.tolist(), others.tolist(), factor=0.5, groups=groups)
    assert scaled.mean == pytest.approx(float((values - 0.5 * others).mean()))
    same = paired_interval([1.0, 3.0], [1.0, 3.0])
    assert (same.low, same.mean, same.high) == (0, 0, 0)
    shares = paired_interval([1.0] * 12, [1.0] * 12, is_share=True)
    assert shares.high == -shares.low == pytest.approx(3.1 / 12, rel=0.15)  # the rule of three, both sides


def test_a_summary_holds_every_figure_and_the_pairs_that_it_is_of() -> None:
    pairs = {"content": [0, 0, 1, 1], "style": [0, 1, 0, 1]}
    measures = {"one": [1.0] * 4, "some": [0.0, 4.0], "other": [1.0] * 4}
    own = {"some": {"content": [0, 1], "style": [0, 1]}}
    found = summarize(measures, pairs, own, ["other"])
    assert found["one"] == {"mean": 1, "low": 1, "high": 1, "values": [1.0] * 4}
    assert found["some"]["low"] <= found["some"]["mean"] == 2 <= found["some"]["high"]
    assert groups_for(pairs, found["one"]) == ([0, 0, 1, 1], [0, 1, 0, 1])
    assert groups_for(pairs, found["some"]) == ([0, 1], [0, 1])
    assert found["other"] == {
        "mean": 1,
        "low": pytest.approx(0.025**0.5),  # two contents that hit: a share of 0.16 does so in one of 40 cases
        "high": 1,
        "values": [1.0] * 4,
        "is_share": True,
    }
    assert groups_for({}, found["one"]) == ()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bootstrap_interval([]), "no values"),
        (lambda: bootstrap_interval([1.0], confidence=95), "0.95 is usual"),
        (lambda: bootstrap_interval([1.0, 2.0], groups=([1],)), "1 labels"),
        (lambda: paired_interval([1.0, 2.0], [1.0]), "same pairs"),
    ],
)
def test_mistakes_are_told(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
