"""The page of an ablation: tables, the figures that each claim of the paper is judged by, and what made them.
What the figures mean is written by a person, in ABLATION.md."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.ablation.claims import claims_text
from benchmarks.ablation.pairs import SEEN, UNSEEN_ARTISTS, UNSEEN_WORKS
from benchmarks.ablation.summary import ByVariant, to_json
from benchmarks.ablation.tables import cost_table, difference_table, pair_table, scalar_table
from benchmarks.ablation.variants import VARIANTS

RESULTS = Path(__file__).parents[1] / "results"
GROUP_TITLES = {
    UNSEEN_WORKS: "Unseen works by artists that were trained on",
    UNSEEN_ARTISTS: "Artists that no training has seen",
    SEEN: "Photos and works that were trained on",
}
QUALITY = (
    "content_distance",
    "edge_ssim",
    "style_distance",
    "hist_style",
    "hist_content",
    "artist_found",
    "artist_precision",
)
ARTEFACTS = ("checkerboard", "border_error", "hist_content_kept")
VGG = ("content_r31", "style_r11", "style_r21", "style_r31", "gram")
MANNER = ("artist_found", "manner", "reference_pull", "reference_copied")
OWN_ENCODER = ("retrieval_seen", "retrieval_unseen", "metric_seen", "metric_unseen", "cosine", "guessing")
GAPS = ("style_distance_gap", "artist_precision_gap", "retrieval_gap", "metric_gap")
COLLAPSE = ("style_sensitivity", "diversity", *GAPS, "alarms")
SHIFTS = ("shift_consistency",)

READING = """\
Mean ± standard deviation over seeds; arrows say which way is better. Read content and style columns
together: the unchanged content and the copied style each win one side. `artist_found` is the share of
pictures in which the encoder trained apart finds the artist of the style, `artist_precision` how well all
works by the artist are. Definitions: `nst/metrics.py`, `nst/vgg.py`, `benchmarks/ablation/measure.py`."""
DIFFERENCES = """\
Variant minus base on the same pairs, seed by seed: mean [95 % interval over seeds, Student's t] and in
how many seeds the variant is the worse one. **Bold** where the interval leaves out 0. The intervals are
wide with few seeds, and they are not corrected for the number of comparisons. Intervals over pairs are in
`ablation.json`."""
MANNERS = """\
`manner`: how much nearer a picture's statistics are to another work by the artist than to another
artist's work. `reference_pull`: how much nearer to the very style than to that other work.
`reference_copied`: how much nearer its structure is to the very style's than to another's; 0 is chance,
and a copy has about 1."""
ENCODERS = """\
`retrieval_*`: share of works whose nearest trained-on work is of the right label. `metric_*`: matrix loss
over that of guessing, on batches drawn alike for all rows; 1 is collapse. `guessing`: the same as the
training itself reports it at its end, with columns of its own. `cosine`: between different works."""
COLLAPSES = """\
`diversity`: how various one content's pictures are over styles, 1 being as various as the styles.
`*_gap`: how much worse on unseen than on seen, so that more is more overfitting. `alarms`: how many are
up at the end."""


def write_report(
    by_variant: ByVariant, baselines: Mapping[str, Any], facts: Mapping[str, Any], folder: Path
) -> None:
    """`ablation.md` and `ablation.json` in `folder`.

    Args:
        by_variant: variant -> seed -> what `measure.measure_run` says.
        baselines: what `measure.measure_baselines` says.
        facts: how it came about: command, machine, images, seeds, corpora, judge, code (JSON).
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = without_nan({"facts": facts, **to_json(by_variant, baselines)})
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "ablation.json").write_text(text + "\n")
    (folder / "ablation.md").write_text(page(by_variant, baselines, facts))


def page(by_variant: ByVariant, baselines: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The whole page in Markdown."""
    measured = next(iter(next(iter(by_variant.values())).values()))["groups"][UNSEEN_WORKS]
    quality = (*QUALITY, *(name for name in VGG if name in measured))
    parts = ["# Ablation: the figures", _preface(facts), _rows(by_variant), "## Quality", READING]
    for group, title in GROUP_TITLES.items():
        parts += [f"### {title}", pair_table(by_variant, baselines, group, quality)]
    parts += [
        "## Differences to the base, unseen pairs",
        DIFFERENCES,
        difference_table(by_variant, "unseen", quality),
        "## Artefacts and colours, unseen pairs",
        pair_table(by_variant, baselines, "unseen", ARTEFACTS),
        scalar_table(by_variant, SHIFTS),
        "## The artist or the reference, unseen pairs",
        MANNERS,
        pair_table(by_variant, baselines, "unseen", MANNER),
        difference_table(by_variant, "unseen", MANNER),
        "## The style encoder of each training",
        ENCODERS,
        scalar_table(by_variant, OWN_ENCODER),
        difference_table(by_variant, "scalars", OWN_ENCODER),
        "## Overfitting and collapse",
        COLLAPSES,
        scalar_table(by_variant, COLLAPSE),
        difference_table(by_variant, "scalars", COLLAPSE),
        "![the course of the trainings](ablation_curves.png)",
        "## Cost",
        cost_table(by_variant),
        "## What each claim is judged by",
        claims_text(by_variant, baselines),
    ]
    return "\n\n".join(parts) + "\n"


def _preface(facts: Mapping[str, Any]) -> str:
    counts, num_states = facts["counts"], len(facts["code"])
    works, unseen, artists = (counts[name] for name in ("works", UNSEEN_WORKS, UNSEEN_ARTISTS))
    judge = ", ".join(f"{name} {value:.3f}" for name, value in facts["judge"].items())
    seeds = ", ".join(map(str, facts["seeds"]))
    lines = [
        f"Made by `{facts['command']}`. What it means is in [ABLATION.md](../ABLATION.md).",
        "",
        f"- Machine: {facts['machine']}, one thread a training.",
        f"- Trainings: {facts['num_images']} photos each, {facts['batch']} a step, {facts['size']} px; "
        f"seeds {seeds}.",
        f"- Trained on: {counts['photos']['pictures']} photos; {works['pictures']} views of {works['works']} "
        f"works under {works['labels']} labels.",
        f"- Held out: {counts['unseen_photos']['pictures']} photos; {unseen['works']} works of those labels; "
        f"all {artists['works']} works of {', '.join(facts['unseen_artists'])}. Split by work: no detail of "
        "a held-out work was trained on.",
        f"- Measured: {facts['num_pairs']} fixed pairs a group at {facts['side']} px.",
        f"- The artist encoder trained apart finds the artist in this share of: {judge}.",
    ]
    if num_states > 1:
        lines.append(f"- **The code changed between the trainings ({num_states} states of it).**")
    return "\n".join(lines)


def _rows(by_variant: ByVariant) -> str:
    lines = []
    for name, runs in by_variant.items():
        seeds = "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"
        lines.append(f"- `{name}` ({seeds}): {VARIANTS[name].question}")
    return "\n".join(lines)


def without_nan(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
