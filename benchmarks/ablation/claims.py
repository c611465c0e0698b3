"""The seven claims of the paper (arXiv 2302.03875), each with the figures that it is judged by. No verdicts:
those are a person's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.ablation.pairs import SEEN, UNSEEN_ARTISTS, UNSEEN_WORKS
from benchmarks.ablation.summary import BASE, ByVariant, difference, figure, spread_of
from benchmarks.ablation.tables import difference_text, number, spread_text

PLACES = {SEEN: "seen", UNSEEN_WORKS: "unseen works", UNSEEN_ARTISTS: "unseen artists"}
AGAINST_OVERFITTING = (
    "retrieval_unseen",
    "retrieval_gap",
    "metric_unseen",
    "metric_gap",
    "style_distance_gap",
    "artist_precision_gap",
    "diversity",
)
COSTS = {"trained": "numbers trained", "cpu_seconds_per_step": "CPU seconds a step"}


@dataclass(frozen=True)
class _Figures:
    """Where the texts below get their figures from."""

    by_variant: ByVariant
    baselines: Mapping[str, Any]

    def value(self, name: str, place: str = "unseen", variant: str = BASE) -> str:
        runs = self.by_variant.get(variant)
        return spread_text(spread_of(runs, place, name)) if runs else "not trained"

    def baseline(self, kind: str, name: str, place: str = "unseen") -> str:
        return number(figure({"groups": self.baselines[kind]}, place, name))

    def step(self, variant: str, name: str, place: str = "unseen") -> str:
        """Variant minus base."""
        runs, base = self.by_variant.get(variant), self.by_variant.get(BASE)
        if not runs or not base:
            return f"{variant}: not trained"
        return f"{variant} {difference_text(difference(runs, base, place, name))}"


def claims_text(by_variant: ByVariant, baselines: Mapping[str, Any]) -> str:
    """A numbered list in Markdown."""
    figures = _Figures(by_variant, baselines)
    parts = (_any_style, _unpaired, _colours, _rgan, _unigan, _batches, _manner)
    return "\n".join(f"{number}. {part(figures)}" for number, part in enumerate(parts, 1))


def _any_style(figures: _Figures) -> str:
    lines = [
        "**One model, any content, any style.** The base, beside the content unchanged and its colours moved:"
    ]
    for name in ("style_distance", "artist_found", "artist_precision"):
        for place, title in PLACES.items():
            unchanged, moved = (figures.baseline(kind, name, place) for kind in ("content", "color_transfer"))
            lines.append(
                f"{name}, {title}: {figures.value(name, place)} (unchanged {unchanged}, moved {moved})"
            )
    return _bullets(lines)


def _unpaired(_: _Figures) -> str:
    return (
        "**Unpaired training.** By construction: no one paired the photos with the works in these trainings."
    )


def _colours(figures: _Figures) -> str:
    kept, free = figures.value("hist_content_kept"), figures.value("hist_content")
    lines = [
        "**The content's colours can be kept; no artefacts.** The base:",
        f"hist_content with `colors=content`: {kept}; without: {free}",
    ]
    for name in ("checkerboard", "border_error"):
        content, style = (figures.baseline(kind, name) for kind in ("content", "style"))
        lines.append(f"{name}: {figures.value(name)} (content unchanged {content}, the styles {style})")
    lines.append(f"shift_consistency (0 is best): {figures.value('shift_consistency', 'scalars')}")
    return _bullets(lines)


def _rgan(figures: _Figures) -> str:
    lines = ["**Approach 1, rGAN,** beside the base:"]
    for name in ("content_distance", "style_distance", "artist_precision", "checkerboard"):
        lines.append(f"{name}: {figures.value(name, variant='rgan')} (base {figures.value(name)})")
    return _bullets(lines)


def _unigan(figures: _Figures) -> str:
    lines = ["**Approach 2, the encoders being the discriminators; smaller and cheaper.**"]
    for name, title in COSTS.items():
        shown = [f"{one} {figures.value(name, 'cost', one)}" for one in (BASE, "separate_encoders", "rgan")]
        lines.append(f"{title}: {'; '.join(shown)}")
    for name in ("content_distance", "style_distance", "artist_precision"):
        lines.append(f"{name}, minus the base: {figures.step('separate_encoders', name)}")
    return _bullets(lines)


def _batches(figures: _Figures) -> str:
    lines = ["**Dynamic batches and the matrix loss against overfitting and collapse.** Minus the base:"]
    for name in AGAINST_OVERFITTING:
        steps = [figures.step(variant, name, "scalars") for variant in ("random_batches", "fixed_pairs")]
        lines.append(f"{name}: {'; '.join(steps)}")
    return _bullets(lines)


def _manner(figures: _Figures) -> str:
    lines = ["**The artist's manner, not the reference's features.** The base:"]
    for name in ("manner", "reference_pull", "reference_copied"):
        content, style = (figures.baseline(kind, name) for kind in ("content", "style"))
        lines.append(f"{name}: {figures.value(name)} (content unchanged {content}, style copied {style})")
    return _bullets(lines)


def _bullets(lines: list[str]) -> str:
    return "\n   - ".join(lines)
