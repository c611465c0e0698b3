"""The measures of an evaluation as people read them, and how two sides are compared by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nst.intervals import Interval, groups_for, paired_interval
from nst.metrics import LOWER_IS_BETTER

About = Literal["style", "content", "artefacts"]
Outcome = Literal["better", "worse", "undecided"]
Summary = Mapping[str, Mapping[str, Any]]  # as `nst.intervals.summarize` makes it

BASELINE_TITLES = {
    "content": "content unchanged",
    "style": "style copied",
    "color_transfer": "colours moved",
}
HEADINGS: dict[About, str] = {
    "style": "Is it like the style?",
    "content": "Is the content still there?",
    "artefacts": "Is it free of artefacts?",
}


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What a measure says. `trivial`: the baselines that are good at it, or bad, by what they are: they are
    no rivals, and to compare a model with them says nothing. `is_share`: its figures are hits and misses."""

    about: About
    meaning: str
    lower_is_better: bool

    is_share: bool = False

    @property
    def trivial(self) -> tuple[str, ...]:
        return {"style": ("style",), "content": ("content",), "artefacts": ("content", "style")}[self.about]


MEANINGS: dict[About, dict[str, str]] = {
    "style": {
        "style_distance": "Colours and textures: statistics of Haar wavelet packets over four levels; 0 the "
        "same, 1 nothing in common.",
        "hist_style": "Colours: Hellinger distance of RGB histograms to the style's.",
        "style_sensitivity": "How much pictures of one content differ from style to style; 0 not at all.",
        "artist_top1": "Share of pictures whose nearest work is by the style's artist, to an encoder trained "
        "apart on other works.",
        "style_r11": "VGG-19 relu1_1: means and deviations against the style's.",
        "style_r21": "VGG-19 relu2_1, likewise.",
        "style_r31": "VGG-19 relu3_1, likewise.",
        "style_r41": "VGG-19 relu4_1, likewise.",
        "gram": "VGG-19 Gram matrices: relative squared distance to the style's.",
    },
    "content": {
        "content_distance": "Structure: where it is light and where edges are, at three Haar levels; 0 the "
        "same, 1 unrelated.",
        "edge_ssim": "Edges: SSIM of Sobel magnitudes; 1 the same.",
        "ssim": "SSIM of luminance; 1 the same.",
        "hist_content": "Colours: Hellinger distance of RGB histograms to the content's.",
        "content_r31": "VGG-19 relu3_1: mean squared difference to the content's.",
        "content_r41": "VGG-19 relu4_1, likewise.",
    },
    "artefacts": {
        "structure_copied": "Structure of the style picture itself, as in a double exposure; 1 a copy.",
        "checkerboard": "Grids from upsampling: energy at periods of 2 and 4 px, log10.",
        "border_error": "Change near the border over change inside; 1 is even.",
        "shift_consistency": "How much a picture changes where its content is only moved by a few pixels.",
    },
}
MEASURES = {
    name: Measure(
        about=about,
        meaning=meaning,
        lower_is_better={**LOWER_IS_BETTER, "artist_top1": False}.get(name, True),
        is_share=name == "artist_top1",
    )
    for about, meanings in MEANINGS.items()
    for name, meaning in meanings.items()
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The mean of the paired differences `found - reference` of one measure, and what it amounts to."""

    measure: str
    interval: Interval
    outcome: Outcome


def compare(
    name: str, found: Summary, reference: Summary, pairs: Mapping[str, Sequence[int]]
) -> Comparison | None:
    """None where one side was not measured. Undecided while the 95 % interval holds 0."""
    if name not in found or name not in reference:
        return None
    interval = paired_interval(
        found[name]["values"],
        reference[name]["values"],
        groups=groups_for(pairs, found[name]),
        is_share=MEASURES[name].is_share,
    )
    is_lower, is_higher = interval.high < 0, interval.low > 0
    is_better = is_lower if MEASURES[name].lower_is_better else is_higher
    outcome: Outcome = "better" if is_better else "worse" if is_lower or is_higher else "undecided"
    return Comparison(measure=name, interval=interval, outcome=outcome)


def best_of(name: str, summaries: Mapping[str, Summary]) -> str:
    """Which of `summaries` has the best mean; baselines that are good at it by what they are do not count."""
    measure = MEASURES[name]
    means = {key: found[name]["mean"] for key, found in summaries.items() if key not in measure.trivial}
    return (min if measure.lower_is_better else max)(means, key=lambda key: means[key])
