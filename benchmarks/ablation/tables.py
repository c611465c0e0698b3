"""The tables of an ablation in Markdown: a row a variant, a column a measure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.ablation.measure import LOWER_IS_BETTER
from benchmarks.ablation.summary import (
    BASE,
    ByVariant,
    Difference,
    Spread,
    difference,
    figure,
    spread_of,
)

UNKNOWN = "–"
BASELINES = {"content": "content unchanged", "style": "style copied", "color_transfer": "colour transfer"}
COSTS = {
    "trained": "numbers trained",
    "generator": "needed to stylize",
    "cpu_seconds_per_step": "CPU s a step",
    "seconds_per_step": "wall s a step",
    "seconds": "wall s a run",
}


def pair_table(by_variant: ByVariant, baselines: Mapping[str, Any], place: str, names: Sequence[str]) -> str:
    """Measures of pairs, the baselines below the variants; `place` as in `summary.figure`."""
    rows = [
        [f"`{variant}`", *(spread_text(spread_of(runs, place, name)) for name in names)]
        for variant, runs in by_variant.items()
    ]
    for kind, groups in baselines.items():
        figures = [figure({"groups": groups}, place, name) for name in names]
        rows.append([BASELINES[kind], *map(number, figures)])
    return markdown(["", *map(_heading, names)], rows)


def scalar_table(by_variant: ByVariant, names: Sequence[str]) -> str:
    """Figures that a run has one of."""
    return pair_table(by_variant, {}, "scalars", names)


def difference_table(by_variant: ByVariant, place: str, names: Sequence[str]) -> str:
    """Every variant but the base, minus the base."""
    if BASE not in by_variant or len(by_variant) < 2:
        return "There is no base, or nothing beside it."
    base = by_variant[BASE]
    rows = [
        [f"`{variant}`", *(difference_text(difference(runs, base, place, name)) for name in names)]
        for variant, runs in by_variant.items()
        if variant != BASE
    ]
    return markdown(["", *map(_heading, names)], rows)


def cost_table(by_variant: ByVariant) -> str:
    rows = []
    for variant, runs in by_variant.items():
        figures = [spread_of(runs, "cost", name) for name in COSTS]
        counts = [f"{one.mean:,.0f}" for one in figures[:2]]
        rows.append([f"`{variant}`", *counts, *map(spread_text, figures[2:])])
    return markdown(["", *COSTS.values()], rows)


def spread_text(found: Spread) -> str:
    if not found.num:
        return UNKNOWN
    return number(found.mean) + ("" if math.isnan(found.std) else f" ± {number(found.std, 2)}")


def difference_text(found: Difference) -> str:
    """Mean, interval and in how many seeds it is worse; bold where the interval leaves out 0."""
    if not found.num:
        return UNKNOWN
    text = f"{found.mean:+.2g}"
    if found.num > 1:
        text += f" [{found.low:+.2g}, {found.high:+.2g}]"
        text = f"**{text}**" if found.is_clear else text
    return text if found.num_worse is None else f"{text}, worse in {found.num_worse}/{found.num}"


def number(value: float, digits: int = 3) -> str:
    if math.isnan(value):
        return UNKNOWN
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column stands left, the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _heading(name: str) -> str:
    return name + {True: " ↓", False: " ↑", None: ""}[LOWER_IS_BETTER.get(name)]
